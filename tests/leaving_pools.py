"""Models of two architectures, each with a pool of two experts; and the commands that take experts out of it."""

import pytest
from typer.testing import CliRunner

from alula.cli.app import app
from alula.context import Routing
from alula.mixture import attach, observe
from alula.pool import Pool
from pool_of_one import logits, teach
from zoo import build, example_batch

MODELS = ("llava", "qwen2_vl")  # the first has other names on disk than in memory, the second biases


class World:
    """Per architecture: a model folder, a pool of two experts for it, and the live model that carries them."""

    def __init__(self, folder, name):
        self.base, self.folder = folder / name, folder / f"{name}-pool"
        self.model, processor = build(name)
        self.model.save_pretrained(self.base)
        processor.save_pretrained(self.base)
        self.batch = example_batch(name, processor)
        self.mixtures = attach(self.model)
        self.pool = Pool.create(self.folder, self.mixtures, base=str(self.base))
        for seed, expert in enumerate(("invoices", "receipts")):
            teach(self.mixtures, expert, seed=seed)
            observe(self.mixtures, expert, self.batch)
            about = {"samples": 9, "before": 0.25, "after": 0.75, "test_samples": 4, "metric": "exact_match"}
            self.pool.add(self.mixtures, expert, about=about)

    def logits(self, **weights):
        with self.mixtures.using(Routing(fixed=weights)):
            return logits(self.model, self.batch)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    return {name: World(tmp_path_factory.mktemp("worlds"), name) for name in MODELS}


@pytest.fixture
def world(worlds):
    return worlds["llava"]


def alula(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result


def refused(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2, result.output
    return result.stderr
