"""What a `ComposedVLM` is made of. It knows names and numbers, no weights."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from transformers import AutoConfig, LlamaConfig, PreTrainedConfig

from alula.errors import UserError, nearest
from alula.models.composed_processor import count_views

MIXINGS = ("add", "router")
Part = Mapping[str, object]


class ComposedConfig(PreTrainedConfig):
    """The parts, how they are joined, and where images go.

    Args:
        text_config: configuration of the backbone, any type `AutoModelForCausalLM` knows; None is a default Llama.
        encoder_config: `{"name": <registered encoder>, **its keywords}`, or a list of these. Of several, those that were trained on
            pixels normalised otherwise than the first one's say so with `image_mean` and `image_std`; the first one's are ImageNet's
            where it does not say.
        connector_config: `{"name": <registered connector>, **its keywords}`, or a list with one for each encoder. The widths and the
            grid come from the neighbours; `input_dim` and `output_dim` may be said, and are then compared.
        image_token_id: the placeholder in `input_ids`; an id of the backbone's vocabulary.
        image_seq_length: tokens per image; must be what the connector gives, times the views of an image.
        crops: n of the n x n crops in which an image is seen beside the whole; 0 is the whole image only.
        mixing: how the tokens of several encoders become one row of tokens: `add`, or `router`, weights by the instruction.
        router_config: keywords of `InstructionRouter`: `input_dim` (width of the sentence embedding), `hidden_dim`.
        num_joined: how many of the encoders, the last ones, were added to a model that was there.

    Raises:
        UserError: a part that is no mapping; an unknown mixing; a router of one encoder; no encoder; another number of connectors than
            of encoders; as many joined as there are.
    """

    model_type = "alula_composed"
    sub_configs: ClassVar[dict] = {"text_config": AutoConfig}

    def __init__(
        self,
        *,
        text_config: PreTrainedConfig | dict | None = None,
        encoder_config: Part | Sequence[Part] | None = None,
        connector_config: Part | Sequence[Part] | None = None,
        image_token_id: int = 4,
        image_seq_length: int = 16,
        crops: int = 0,
        mixing: str = "add",
        router_config: dict | None = None,
        num_joined: int = 0,
        **kwargs,
    ) -> None:
        if isinstance(text_config, dict):
            keywords = dict(text_config)
            text_config = AutoConfig.for_model(keywords.pop("model_type", "llama"), **keywords)
        self.text_config = text_config or LlamaConfig()
        self.encoder_config = _plain({"name": "efficientnet_lite0"} if encoder_config is None else encoder_config, what="encoder_config")
        self.connector_config = _plain({"name": "mlp"} if connector_config is None else connector_config, what="connector_config")
        self.image_token_id = image_token_id
        self.image_seq_length = image_seq_length
        self.crops = crops
        self.mixing = mixing
        self.router_config = dict(router_config or {})
        self.num_joined = num_joined
        kwargs.setdefault("tie_word_embeddings", getattr(self.text_config, "tie_word_embeddings", False))
        super().__init__(**kwargs)
        count_views(crops)
        if mixing not in MIXINGS:
            raise UserError(f"Unknown mixing '{mixing}'. {nearest(mixing, MIXINGS)}")
        if not self.encoders or len(self.connectors) != len(self.encoders):
            raise UserError(
                f"{len(self.encoders)} encoders came with {len(self.connectors)} connectors. Give one connector for each encoder, or one "
                "connector as a dict, which is built once for each."
            )
        if mixing == "router" and len(self.encoders) == 1:
            raise UserError(
                f"mixing='router' came with one encoder, '{self.encoders[0].get('name')}'. A router weighs two or more. Give a list of "
                "encoders, or mixing='add'."
            )
        if not 0 <= num_joined < len(self.encoders):
            raise UserError(f"num_joined={num_joined} came with {len(self.encoders)} encoders. At least one encoder joins nobody.")

    @property
    def encoders(self) -> list[dict]:
        """The encoders' configurations, as a list also for one."""
        return self.encoder_config if isinstance(self.encoder_config, list) else [self.encoder_config]

    @property
    def connectors(self) -> list[dict]:
        """The connectors' configurations, one for each encoder."""
        if isinstance(self.connector_config, list):
            return self.connector_config
        return [self.connector_config] * len(self.encoders)


def check_parts(given: object, *, what: str, kinds: tuple[type, ...] = (Mapping,)) -> None:
    """Refuses what is neither a part nor a list of parts.

    Args:
        what: it is given for, for the error.
        kinds: what a part may be.

    Raises:
        UserError: it is something else.
    """
    for one in given if isinstance(given, Sequence) and not isinstance(given, str) else [given]:
        if not isinstance(one, kinds) or (isinstance(one, Mapping) and "name" not in one):
            raise UserError(
                f"{what} got {one!r}. {{'name': <a registered name>, **its keywords}} is accepted, or a list of these. Give one of them."
            )


def _plain(given: Part | Sequence[Part], *, what: str) -> dict | list[dict]:
    check_parts(given, what=what)
    return dict(given) if isinstance(given, Mapping) else [dict(one) for one in given]
