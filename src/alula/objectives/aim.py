"""Predicting each patch of an image from those before it. It knows no encoder.

Source: El-Nouby et al., "Scalable Pre-training of Large Autoregressive Image Models", sections 3.1 and 3.2,
https://arxiv.org/abs/2401.08541; the details are those of the published code, https://github.com/apple/ml-l3m.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

EPSILON = 1e-6

Patches = Float[Tensor, "images patches pixels"]
Prefix = Int[Tensor, " images"]


def prefix_causal_mask(num_patches: int, prefix: Prefix) -> Bool[Tensor, "images patches patches"]:
    """Which patch (row) may read which (column): those of the prefix, those before it, and itself.

    Args:
        prefix: patches at the start that are read in both directions.

    Example:
        >>> prefix_causal_mask(3, torch.tensor([2]))[0].int().tolist()
        [[1, 1, 0], [1, 1, 0], [1, 1, 1]]
    """
    index = torch.arange(num_patches, device=prefix.device)
    return (index < prefix[:, None, None]) | (index <= index[:, None])


def patches_of(pixel_values: Float[Tensor, "images 3 height width"], grid: tuple[int, int]) -> Patches:
    """The pixels of each patch of a grid, left to right, top to bottom.

    Args:
        grid: rows and columns.
    """
    height, width = pixel_values.shape[2] // grid[0], pixel_values.shape[3] // grid[1]
    cut = pixel_values.unfold(2, height, height).unfold(3, width, width)
    return cut.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def aim_loss(predictions: Patches, patches: Patches, prefix: Prefix) -> Float[Tensor, ""]:
    """The mean squared error of each prediction to the next patch, over the patches outside of the prefix, in fp32.

    A patch is a target in units of its own deviation (unbiased) from its own mean.

    Args:
        predictions: row i is of patch i + 1; the last row is of nothing.
        prefix: patches at the start that are no targets, from 1 to their number - 1.
    """
    patches = patches.float()
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    targets = (patches - mean) / (variance + EPSILON).sqrt()
    errors = (predictions[:, :-1].float() - targets[:, 1:]).square().mean(-1)
    is_target = torch.arange(1, patches.shape[1], device=prefix.device) >= prefix[:, None]
    return errors[is_target].mean()
