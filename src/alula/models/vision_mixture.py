"""Several encoders as one: each with its own connector, mixed by the instruction (MoVE). It knows no text and no backbone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from alula.errors import UserError
from alula.models.composed_processor import ComposedImageProcessor
from alula.models.connectors import Connector
from alula.models.encoders import Encoder

STATISTICS = ("image_mean", "image_std")
"""Keys of an encoder's configuration that say how the pixels it was trained on were normalised."""
IMAGENET = {"image_mean": [*ComposedImageProcessor.image_mean], "image_std": [*ComposedImageProcessor.image_std]}
"""What pixels that come are normalised with where the first encoder does not say."""


def statistics_of(part: Mapping[str, object]) -> dict:
    """Both of `STATISTICS` as an encoder's configuration names them, or nothing where it names none.

    Raises:
        UserError: one without the other, or not three numbers.
    """
    found = {key: part.get(key) for key in STATISTICS}
    if not any(found.values()):
        return {}
    if any(not isinstance(values, list | tuple) or len(values) != 3 for values in found.values()):
        came = " and ".join(f"{key}={values}" for key, values in found.items())
        raise UserError(
            f"Encoder '{part.get('name')}' got {came}. Three numbers each are accepted, of red, green and blue. Set both or none."
        )
    return found


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """What a mixture makes of a batch of images.

    Attributes:
        weights: G_i, each encoder's share.
        importance: the Euclidean norm of G_i f_i over an image's tokens. Shares alone do not compare encoders: their features differ
            in scale.
    """

    tokens: Float[Tensor, "images tokens dim"]
    weights: Float[Tensor, "images encoders"]
    importance: Float[Tensor, "images encoders"]


class EncoderGroup(nn.Module):
    """Several encoders that see the same images, each at its own resolution and normalisation.

    Args:
        statistics: `image_mean` and `image_std` of each encoder, empty where it says nothing and sees the pixels as they come; these are
            normalised with the first one's, which are `IMAGENET` if empty.
    """

    def __init__(self, encoders: Sequence[Encoder], *, statistics: Sequence[Mapping[str, Sequence[float]]]) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        self.image_size = max(encoder.image_size for encoder in encoders)
        self.statistics = list(statistics)

    def forward(self, pixel_values: Float[Tensor, "images 3 height width"]) -> list[Float[Tensor, "images patches dim"]]:
        """Each encoder's features."""
        return [
            encoder(self._pixels_for(encoder, own, pixel_values))  # type: ignore[arg-type]
            for encoder, own in zip(self.encoders, self.statistics, strict=True)
        ]

    def _pixels_for(self, encoder: Encoder, own: Mapping[str, Sequence[float]], pixels: Tensor) -> Tensor:
        if pixels.shape[-2:] != (encoder.image_size, encoder.image_size):
            size = (encoder.image_size, encoder.image_size)
            resized = functional.interpolate(pixels.float(), size, mode="bilinear", antialias=True, align_corners=False)
            pixels = resized.to(pixels)
        came = self.statistics[0] or IMAGENET
        if not own or own == came:
            return pixels
        came_mean, came_std, mean, std = (pixels.new_tensor(one[key]).view(3, 1, 1) for one in (came, own) for key in STATISTICS)
        return (pixels * came_std + came_mean - mean) / std


class InstructionRouter(nn.Module):
    """Shares of the encoders by an instruction: softmax(W2 GELU(W1 I + b1) + b2).

    Source: Shen et al., "MoME", equations 6 and 7, https://arxiv.org/abs/2407.12709; the hidden width is ours.

    Args:
        num_encoders: shares.
        input_dim: width of the sentence embedding; all-MiniLM-L6-v2 gives 384.
        hidden_dim: between the two linear maps.
    """

    def __init__(self, *, num_encoders: int, input_dim: int = 384, hidden_dim: int = 128) -> None:
        super().__init__()
        self.inner = nn.Linear(input_dim, hidden_dim)
        self.outer = nn.Linear(hidden_dim, num_encoders)

    def scores(self, instruction: Float[Tensor, "images width"]) -> Float[Tensor, "images encoders"]:
        """Before normalising."""
        return self.outer(functional.gelu(self.inner(instruction.to(self.inner.weight.dtype))))

    def forward(self, instruction: Float[Tensor, "images width"]) -> Float[Tensor, "images encoders"]:
        """Shares that sum to one, in float32."""
        return self.scores(instruction).float().softmax(-1)


class JoinedGate(nn.Module):
    """How much an encoder that joined later takes part: tanh(a), exactly 0 at first, times a share by the instruction if there is one.

    Args:
        share: a router of one score, which a sigmoid turns into a share; the encoder then takes this share from what was there.
            None: it is added to what was there.
    """

    def __init__(self, share: InstructionRouter | None) -> None:
        super().__init__()
        self.amount = nn.Parameter(torch.zeros(1))
        self.share = share

    def reset_parameters(self) -> None:
        """Silence."""
        nn.init.zeros_(self.amount)

    def forward(self, instruction: Tensor | None, *, images: int) -> tuple[Float[Tensor, "images 1"], Float[Tensor, "images 1"]]:
        """What is kept of what was there, and the newcomer's weight, in float32."""
        amount = self.amount.float().tanh().expand(images, 1)
        if self.share is None or instruction is None:
            return torch.ones_like(amount), amount
        weight = amount * self.share.scores(instruction).float().sigmoid()
        return 1 - weight, weight


class VisionMixture(nn.Module):
    """F = sum over i of G_i(I) connector_i(features_i), and what joined later on top of it.

    Source: Shen et al., "MoME", https://arxiv.org/abs/2407.12709, MoVE. Encoders that join later are ours: the router is left as it
    is, and each has a `JoinedGate` of its own, so that the sum is what it was until something is trained.

    Args:
        connectors: one for each encoder, all with the same number of tokens and the same width.
        router: shares of those encoders that were there from the start; None adds them up.
        gates: of the last encoders, those that joined.

    Raises:
        UserError: the numbers of tokens differ.

    Example:
        >>> from alula.models.connectors import LinearConnector
        >>> parts = [LinearConnector(width, 4, grid=(2, 2)) for width in (6, 8)]
        >>> mixture = VisionMixture(parts, router=InstructionRouter(num_encoders=2, input_dim=3))
        >>> mixed = mixture([torch.ones(1, 4, 6), torch.ones(1, 4, 8)], torch.ones(1, 3))
        >>> mixed.tokens.shape, mixed.weights.sum().item()
        (torch.Size([1, 4, 4]), 1.0)
    """

    def __init__(self, connectors: Sequence[Connector], *, router: InstructionRouter | None, gates: Sequence[JoinedGate] = ()) -> None:
        super().__init__()
        counts = [connector.num_tokens for connector in connectors]
        if len(set(counts)) > 1:
            raise UserError(
                f"The connectors give {' and '.join(map(str, counts))} tokens an image. Only equal numbers can be added up. "
                f"Set num_tokens of each to the same (average_pool, attention_pool, c_abstractor, deformable), for example {min(counts)}."
            )
        self.num_tokens = counts[0]
        self.connectors = nn.ModuleList(connectors)
        self.router = router
        self.gates = nn.ModuleList(gates)

    @property
    def reads_instruction(self) -> bool:
        """Whether anything here needs the instruction's embedding."""
        return any(isinstance(module, InstructionRouter) for module in self.modules())

    def forward(self, features: Sequence[Float[Tensor, "images patches dim"]], instruction: Float[Tensor, "images width"] | None) -> Mixed:
        """The mixed tokens.

        Args:
            instruction: the embedding of the sentence that each image came with; not needed where encoders are added up.

        Raises:
            UserError: an instruction is needed and did not come, or not one for each image.
        """
        images = len(features[0])
        self._check(instruction, images=images)
        tokens = [connector(rows) for connector, rows in zip(self.connectors, features, strict=True)]
        first = len(tokens) - len(self.gates)
        weights = tokens[0].new_ones(images, first, dtype=torch.float32)
        if self.router is not None and instruction is not None:
            weights = self.router(instruction)
        mixed = _weighed(tokens[0], weights[:, 0])
        for index in range(1, first):
            mixed = mixed + _weighed(tokens[index], weights[:, index])
        for gate, newcomer in zip(self.gates, tokens[first:], strict=True):
            keep, weight = gate(instruction, images=images)
            mixed = _weighed(mixed, keep[:, 0]) + _weighed(newcomer, weight[:, 0])
            weights = torch.cat([weights * keep, weight], -1)
        with torch.no_grad():
            norms = torch.stack([rows.float().flatten(1).norm(dim=-1) for rows in tokens], -1)
        return Mixed(tokens=mixed, weights=weights, importance=weights.detach().abs() * norms)

    def _check(self, instruction: Tensor | None, *, images: int) -> None:
        if self.reads_instruction and instruction is None:
            raise UserError(
                "Images came without instruction_embedding, but the mixture of encoders weighs them by the instruction. The processor "
                "makes it if it has an instruction_encoder: ComposedProcessor(..., instruction_encoder='minilm')."
            )
        if instruction is not None and len(instruction) != images:
            raise UserError(
                f"{len(instruction)} instruction embeddings came with {images} images. One for each image is wanted, in reading order: "
                "let the processor make both."
            )


def _weighed(tokens: Float[Tensor, "images tokens dim"], weights: Float[Tensor, " images"]) -> Float[Tensor, "images tokens dim"]:
    return tokens * weights[:, None, None].to(tokens.dtype)
