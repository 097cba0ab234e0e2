"""A tiny model in a folder and a pool of two experts for it, taught by hand: prompts with images are of one, text of the other."""

from dataclasses import dataclass
from pathlib import Path

import torch

from alula.mixture import attach, observe
from alula.pool import Pool
from zoo import build, example_batch


@dataclass(frozen=True)
class Taught:
    model: Path
    pool: Path


def taught_pool(folder):
    """``model`` and ``pool`` in `folder`; the pool's experts are pictures and words, chosen by prompt."""
    model, processor = build("llava")
    image_token = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    model.generation_config.suppress_tokens = [image_token, processor.tokenizer.eos_token_id]  # a random model would say them
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(0)
    mixtures = attach(model)
    pool = Pool.create(folder / "pool", mixtures, base=str(folder / "model"), arm="analytic")
    for name, text_only in (("pictures", False), ("words", True)):
        mixtures.grow(name, rank=2, generator=generator)
        for mixture in mixtures.sites.values():
            mixture.experts.B[-1].data.normal_(std=0.4, generator=generator)
        observe(mixtures, name, example_batch("llava", processor, text_only=text_only, batch=6))
        pool.add(mixtures, name, about={})
    return Taught(model=folder / "model", pool=folder / "pool")
