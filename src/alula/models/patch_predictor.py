"""An image encoder below a head that says the pixels of the next patch. It knows no loss and draws no prefix."""

from jaxtyping import Bool, Float
from torch import Tensor, nn

from alula.models.encoders import VitEncoder


class ResidualMLP(nn.Module):
    """``x + MLP(norm(x))``, with four times the width inside.

    Args:
        dim: width.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, rows: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows dim"]:
        """The rows, each changed by itself."""
        return rows + self.mlp(rows)


class PatchPredictor(nn.Module):
    """The encoder's rows through a linear map, residual MLP blocks without attention, a norm and a linear map to pixels.

    Source: AIM, section 3.2 ("MLP prediction heads"), https://arxiv.org/abs/2401.08541, with the blocks' residuals of the published
    code (https://github.com/apple/ml-aim issue 32).

    Args:
        encoder: the part that is kept afterwards; its mask says which patches it may read.
        head_dim: width of the head.
        num_blocks: of the head.

    Example:
        >>> import torch
        >>> model = PatchPredictor(VitEncoder(image_size=16, dim=12, num_layers=1), head_dim=8, num_blocks=1)
        >>> model(torch.zeros(2, 3, 16, 16), mask=torch.ones(2, 4, 4, dtype=torch.bool)).shape
        torch.Size([2, 4, 192])
    """

    def __init__(self, encoder: VitEncoder, *, head_dim: int = 2048, num_blocks: int = 12) -> None:
        super().__init__()
        self.encoder = encoder
        self.num_pixels = 3 * encoder.image_size**2 // encoder.num_tokens
        self.head = nn.Sequential(
            nn.Linear(encoder.output_dim, head_dim),
            *(ResidualMLP(head_dim) for _ in range(num_blocks)),
            nn.LayerNorm(head_dim),
            nn.Linear(head_dim, self.num_pixels),
        )
        for module in self.head.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(
        self, pixel_values: Float[Tensor, "images 3 height width"], *, mask: Bool[Tensor, "images patches patches"]
    ) -> Float[Tensor, "images patches pixels"]:
        """Row i says patch i + 1, if `mask` keeps that one from it."""
        return self.head(self.encoder(pixel_values, mask=mask))
