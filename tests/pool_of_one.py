"""Experts that say something without training, a pool with one of them, and copies of it that a test may spoil."""

import shutil

import pytest
import torch

from alula.mixture import attach, observe
from alula.pool import Pool
from zoo import build, example_batch


def with_expert(name="llava", *, expert="invoices", seed=1):
    model, processor = build(name)
    mixtures = attach(model)
    teach(mixtures, expert, seed=seed)
    return model, processor, mixtures


def teach(mixtures, expert, *, seed):
    generator = torch.Generator().manual_seed(seed)
    mixtures.grow(expert, rank=2, generator=generator)
    for mixture in mixtures.sites.values():
        mixture.experts.B[-1].data.normal_(std=0.2, generator=generator)
        mixture.routers["gate"].gates[-1].data.normal_(generator=generator)
    mixtures.freeze()
    mixtures.refresh()


@torch.no_grad()
def logits(model, batch):
    return model(**batch).logits


def make_pool(folder):
    model, processor, mixtures = with_expert()
    batch, text = example_batch("llava", processor), example_batch("llava", processor, text_only=True)
    observe(mixtures, "invoices", batch)
    observe(mixtures, "base", text)
    pool = Pool.create(folder, mixtures, base="tiny")
    pool.add(mixtures, "invoices", about={"samples": 2})
    return model, processor, mixtures, pool


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A pool with one expert and the live model that carries it."""
    folder = tmp_path_factory.mktemp("made") / "pool"
    return folder, *make_pool(folder)


@pytest.fixture
def folder(made, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(made[0], tmp_path / "pool")
