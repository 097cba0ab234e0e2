"""Tiny models whose learners say something, and batches put together row by row."""

import contextlib
from functools import cache

import torch

from alula.learners import attach_learners
from zoo import build

PAD = 0


@cache
def built(name):
    """A zoo model that tests share: whoever changes it changes it back."""
    model, processor = build(name)
    return model.requires_grad_(False), processor


@torch.no_grad()
def teach(learners, *, sharp=25.0):
    """Random weights instead of silence: maps of gain 1, but queries and keys so long that attention picks."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in learners.parameters().items():
        if name.endswith((".A", ".B")):
            parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
        elif ".router." in name:
            parameter.normal_(std=1.0, generator=generator)
        if name.endswith((".q.B", ".k.B")):
            parameter.mul_(sharp)
    return learners


@contextlib.contextmanager
def taught(name="llava", **options):
    """The shared model with learners that say something; inside the block."""
    model, _ = built(name)
    learners = teach(attach_learners(model, **{"rank": 4, "positions": 64, **options}))
    try:
        yield model, learners
    finally:
        learners.detach()


def row(*parts, seed=0, image_token=4):
    """Token ids and pixels of one row of the tiny LLaVA: numbers are so many text tokens, ``"I"`` is an image of four tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.full((4,), image_token) if part == "I" else torch.randint(60, 500, (part,), generator=generator) for part in parts]
    return torch.cat(ids), torch.randn(parts.count("I"), 3, 28, 28, generator=generator)


def together(*rows, left=False):
    """One batch of rows, padded on one side."""
    longest = max(len(ids) for ids, _ in rows)
    ids, mask = torch.full((len(rows), longest), PAD), torch.zeros(len(rows), longest, dtype=torch.long)
    for index, (tokens, _) in enumerate(rows):
        where = slice(longest - len(tokens), None) if left else slice(0, len(tokens))
        ids[index, where], mask[index, where] = tokens, 1
    pixels = torch.cat([pixels for _, pixels in rows])
    return {"input_ids": ids, "attention_mask": mask, **({"pixel_values": pixels} if len(pixels) else {})}


@torch.no_grad()
def logits(model, batch, **options):
    """Logits without a cache: what packed rows and training see."""
    return model(**batch, use_cache=False, **options).logits
