"""A composed model without its head, for those who compute the loss themselves. It knows no weights."""

from typing import TYPE_CHECKING

from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

if TYPE_CHECKING:
    from alula.models.composed import ComposedVLM


class ComposedBody(nn.Module):
    """A `ComposedVLM` up to its last hidden states: another way to call the same modules, made anew whenever it is asked for.

    Transformers' own vision-language models keep all but the head in a module of its own, under the name ``model``. Here the parts
    are the model's children, as saved folders have them, so this is a view, which no model holds.
    """

    _tp_plan = _pp_plan = None  # Transformers asks a body for them

    def __init__(self, whole: "ComposedVLM") -> None:
        super().__init__()
        self.whole = whole

    def forward(
        self,
        input_ids: Int[Tensor, "batch tokens"] | None = None,
        pixel_values: Float[Tensor, "images ..."] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Float[Tensor, "batch tokens dim"] | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        instruction_embedding: Float[Tensor, "images width"] | None = None,
        **kwargs,
    ) -> ModelOutput:
        """What the backbone's own body gives, `last_hidden_state` first; arguments as `ComposedVLM.forward`, without labels."""
        embeds, _ = self.whole.read_inputs(
            input_ids, inputs_embeds, pixel_values, instruction_embedding, past_key_values=past_key_values, encoded=mm_encoder_outputs
        )
        body = self.whole.language_model.base_model
        return body(inputs_embeds=embeds, attention_mask=attention_mask, past_key_values=past_key_values, **kwargs)
