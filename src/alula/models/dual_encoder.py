"""An image encoder beside a small text encoder, both ending in one space: what is trained by contrast. It knows no loss."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from alula.models.encoders import Encoder

CONTEXT = 77
"""Tokens of a text at most (MM1, CLIP)."""


class DualEncoder(nn.Module):
    """Images and texts as rows of one space, not normalised.

    Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", section 2.4,
    https://arxiv.org/abs/2103.00020: a causal transformer reads the text, its last token stands for it. Deliberate difference: an image is
    the mean of its patches, since `vit` has no class token.

    Args:
        encoder: the part that is kept afterwards.
        vocab_size: tokens that the text encoder knows.
        output_dim: width of the common space.
        text_dim: width of the text encoder.
        num_text_layers: its blocks.
        num_text_heads: a divisor of `text_dim`.
        log_scale: the first value of the logarithm of the scores' scale, which is learnt.

    Example:
        >>> from alula.models.encoders import VitEncoder
        >>> model = DualEncoder(VitEncoder(image_size=16, dim=12, num_layers=1), vocab_size=9, output_dim=6, text_dim=8)
        >>> ids = torch.tensor([[5, 2, 0], [5, 7, 2]])
        >>> images, texts = model(torch.zeros(2, 3, 16, 16), ids, torch.tensor([[1, 1, 0], [1, 1, 1]]))
        >>> images.shape, texts.shape
        (torch.Size([2, 6]), torch.Size([2, 6]))
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        vocab_size: int,
        output_dim: int = 128,
        text_dim: int = 128,
        num_text_layers: int = 2,
        num_text_heads: int = 4,
        log_scale: float = 0.0,
    ) -> None:
        super().__init__()
        config = CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=text_dim,
            intermediate_size=4 * text_dim,
            num_hidden_layers=num_text_layers,
            num_attention_heads=num_text_heads,
            max_position_embeddings=CONTEXT,
            bos_token_id=0,  # these two are for a pooled output that is not used
            eos_token_id=0,
        )
        self.encoder, self.text_encoder = encoder, CLIPTextModel(config)
        self.image_projection = nn.Linear(encoder.output_dim, output_dim, bias=False)
        self.text_projection = nn.Linear(text_dim, output_dim, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(log_scale))

    def embed_images(self, pixel_values: Float[Tensor, "images 3 height width"]) -> Float[Tensor, "images dim"]:
        """The projected mean of each image's patches."""
        return self.image_projection(self.encoder(pixel_values).mean(1))

    def embed_texts(
        self, input_ids: Int[Tensor, "texts tokens"], attention_mask: Int[Tensor, "texts tokens"]
    ) -> Float[Tensor, "texts dim"]:
        """The projected last token of each text, padded on the right."""
        states = self.text_encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        # Not Transformers' pooled output: with an end token of id 2, SmolLM2's, it takes the largest id for the end.
        last = attention_mask.sum(1) - 1
        return self.text_projection(states[torch.arange(len(states), device=states.device), last])

    def forward(
        self,
        pixel_values: Float[Tensor, "pairs 3 height width"],
        input_ids: Int[Tensor, "pairs tokens"],
        attention_mask: Int[Tensor, "pairs tokens"],
    ) -> tuple[Float[Tensor, "pairs dim"], Float[Tensor, "pairs dim"]]:
        """The rows of the images and of the texts."""
        return self.embed_images(pixel_values), self.embed_texts(input_ids, attention_mask)
