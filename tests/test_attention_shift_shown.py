"""Claims about what is made of attention shifts: paired changes, pages, `alula diagnose`, a cell of a run."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from alula.cli.app import app
from alula.config import check_recipe
from alula.files import read_json, write_json, write_text
from alula.learners import attach_learners
from alula.models import base_fingerprint
from alula.pool import Pool
from alula.report import build_report
from alula.report.attention_shift import FILE, shift_lines
from alula.running.run import run_recipe
from zoo import build


def row_of(index, shifts, **fields):
    wave = [0.2, 0.3, 0.1]
    curves = {"before": wave, "itself": [0.5, 0.4, 0.6], "between": [0.0] * 3, "after": [0.3] * 3}
    return {"row": index, "arm": "default", "layers": [0, 1, 2], "curves": curves, "shift": float(np.mean(shifts)), "interval": [0.1, 0.9],
            "n": len(shifts), "left_out": {"no image": 2}, "ids": ["a", "b", "c"][: len(shifts)], "shifts": shifts, **fields}  # fmt: skip


def test_the_change_is_paired_by_sample():
    first, second, other = row_of(0, [0.1, 0.5, 0.9]), row_of(1, [0.4, 0.8, 1.2]), row_of(2, [0.4, 0.8])
    lines = shift_lines([first, second, other])
    assert [line["moment"] for line in lines] == ["base model", "after 1 task", "after 2 tasks"]
    assert lines[1]["change"] == "+0.300" and lines[1]["change_interval"] == "[0.300, 0.300]" and lines[1]["kind"] == "worse"
    assert lines[0]["change"] == lines[2]["change"] == "–"  # other samples


def test_the_report_of_a_run_shows_the_curves(tmp_path):
    cell = tmp_path / "cells" / "wings-seed0"
    write_json(cell / FILE, [row_of(0, [0.1, 0.5, 0.9]), row_of(1, [0.2, 0.5, 0.9]), row_of(2, [0.4, 0.8, 1.2], arm="no_router")])
    write_json(tmp_path / "cells" / "finetune-seed0" / FILE, row_of(1, [0.4, 0.8, 1.2]))
    write_text(tmp_path / "cells" / "joint-seed0" / FILE, '[{"row": 0')
    page = build_report(tmp_path).read_text(encoding="utf-8")
    section = page[page.index('id="attention"') : page.index('id="cells"')]
    assert section.count("<svg") == 4  # wings: base, after 1 task, the other arm; finetune: after 1 task
    assert "after 2 tasks, no_router" in section and "+0.300" in section and "2 no image" in section
    assert "text between images" not in section
    assert "joint-seed0" in section and "not valid JSON" in section


def test_a_run_without_a_diagnosis_has_no_such_section(tmp_path):
    (tmp_path / "cells" / "wings-seed0").mkdir(parents=True)
    assert 'id="attention"' not in build_report(tmp_path).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two saved models, a data file, and a pool with learners for the first model."""
    folder = tmp_path_factory.mktemp("world")
    for name, number in (("tiny", 0), ("other", 1)):
        model, processor = build("llava", seed=number)
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    model, _ = build("llava")
    fingerprint = base_fingerprint(model)
    learners = attach_learners(model, rank=2)
    for parameter in learners.parameters().values():
        torch.nn.init.normal_(parameter, std=0.3)
    pool = Pool.create(folder / "pool", learners, base=str(folder / "tiny"), fingerprint=fingerprint)
    pool.add_learners(learners, "colours", about={})
    rows = []
    for number, colour in enumerate(["red", "green", "blue"] * 2):
        Image.new("RGB", (40 + number, 40), colour).save(folder / f"{number}.png")
        rows.append({"question": "What colour is this?", "answer": colour, "image": f"{number}.png"})
    rows.append({"question": "What is blue?", "answer": "the sky"})
    (folder / "colours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("after", ["pool", "other", None])
def test_alula_diagnose_writes_curves_and_shifts(world, tmp_path, after):
    extra = ["--tuned", str(world / after)] if after else []
    call = ["diagnose", str(world / "tiny"), "--data", str(world / "colours.jsonl"), "--out", str(tmp_path), *extra]
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 0, result.output
    rows = read_json(tmp_path / FILE)
    assert [row["row"] for row in rows] == [0, 1][: len(rows)] and len(rows) == 1 + bool(after)
    assert all(row["n"] == 6 and row["left_out"]["no image"] == 1 for row in rows)
    assert "attention shift" in result.stdout and "base model" in result.stdout and "1 no image" in result.stdout
    page = (tmp_path / "attention_shift.html").read_text(encoding="utf-8")
    assert page.count("<svg") == len(rows) and "http" not in page
    if after:
        assert rows[0]["curves"] != rows[1]["curves"]
        assert f"tuned: {after}" in result.stdout
        assert shift_lines(rows)[1]["change"] in result.stdout


def test_alula_diagnose_takes_a_limit_and_refuses_a_foreign_pool(world, tmp_path):
    call = ["diagnose", str(world / "tiny"), "--data", str(world / "colours.jsonl"), "--out", str(tmp_path), "--limit", "2"]
    assert CliRunner().invoke(app, call).exit_code == 0
    assert read_json(tmp_path / FILE)[0]["n"] == 2
    foreign = ["diagnose", str(world / "other"), *call[2:], "--tuned", str(world / "pool")]
    result = CliRunner().invoke(app, foreign)
    assert result.exit_code == 2 and "was made for base model" in result.stderr


def test_a_cell_keeps_its_shift_before_and_after_learning(tmp_path):
    model, processor = build("llava")
    model.save_pretrained(tmp_path / "tiny")
    processor.save_pretrained(tmp_path / "tiny")
    recipe = check_recipe(
        {
            "model": str(tmp_path / "tiny"),
            "tasks": [{"name": "digits", "train_size": 8, "test_size": 4}],
            "methods": [{"name": "wings", "options": {"rank": 2}}],
            "train": {"steps": 2, "batch_size": 4},
            "evaluation": {"attention_shift": 4},
        }
    )
    run_recipe(recipe, tmp_path / "run")
    before, after = read_json(tmp_path / "run" / "cells" / "wings-seed0" / "attention_shift.json")
    assert (before["row"], after["row"]) == (0, 1) and before["ids"] == after["ids"] and before["curves"] != after["curves"]
    assert "ttention" in build_report(tmp_path / "run").read_text()
