"""How adapters sit in a model, as values. It knows no model."""

from pydantic import BaseModel, ConfigDict, Field

OWN = "embeddings"


class AdapterConfig(BaseModel):
    """How adapters sit in a model; kept with their tensors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_experts: int = Field(4, ge=1)
    """Adapters beside each network; 4 in the paper's figures."""
    bottleneck: int = Field(64, ge=1)
    """Width between an adapter's two maps; 64 in the paper."""
    router: str = "instance"
    """What each network's router reads: instance (the instruction, as published), token, or both."""
    hidden_dim: int = Field(128, ge=1)
    """Width between the router's two maps; ours."""
    gumbel: bool = False
    """Adds Gumbel noise to the scores while the model is in training mode."""
    instruction: str = OWN
    """embeddings: the mean of the model's own token embeddings; `minilm` or a folder: a sentence encoder, which wants a tokenizer."""
    layers: tuple[int, ...] | None = None
    """Decoder layers by index; None is all."""
