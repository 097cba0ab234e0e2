"""Claims about the Markdown of a run: the numbers of the run folder, with columns for what it holds and for nothing else."""

import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from alula.cli.app import app
from alula.errors import UserError
from alula.files import read_jsonl, write_json, write_jsonl
from alula.report import summary
from alula.report.markdown import markdown_tables
from run_folder import TASKS, add_probes, attention_rows, rows_of, write_run


def tables(text: str) -> list[list[dict[str, str]]]:
    """The tables of a text, a dict for each line."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
        assert len({len(line) for line in lines}) == 1
        found.append([dict(zip(lines[0], line, strict=True)) for line in lines[2:]])
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stream with one crashed and one unfinished cell."""
    return write_run(tmp_path_factory.mktemp("runs") / "run", with_routing=False)


def test_every_number_is_that_of_the_summary(run: Path) -> None:
    results, _ = tables(markdown_tables(run))
    metrics = {row["series"]: row["metrics"] for row in summary(run)}
    assert [line[""] for line in results[1:]] == list(metrics)
    for line in results[1:]:
        own = metrics[line[""]]["average_score"]
        assert line["Average score"] == f"{own['mean']:.1f} ± {own['sd']:.1f} [{own['low']:.1f}, {own['high']:.1f}]"
        assert (line["n"], line["seeds"]) == (str(own["samples"]), "2")
    by_name = {line[""]: line for line in results}
    assert by_name["joint"]["Forgetting"] == "–" and by_name["finetune"]["Forgetting"] != "–"
    assert by_name["finetune"]["Trainable"] == "2.44 M"
    assert by_name["finetune"]["Seconds a task"] == "116"  # mean of 115, 116, 117, 118, rounded to even
    assert by_name["joint"]["Seconds a task"] == "116"  # 466 for four tasks


def test_scores_by_task_are_those_of_the_last_row(run: Path) -> None:
    _, by_task = tables(markdown_tables(run))
    lines = {line["at the end"]: line for line in by_task}
    for name in TASKS:
        last = [rows_of(run, f"finetune-seed{seed}")[4, "default", name]["score"] for seed in (0, 1)]
        assert lines["finetune"][name] == f"{100 * sum(last) / 2:.1f}"
        assert lines["untouched model"][name] == f"{100 * rows_of(run, 'finetune-seed0')[0, 'default', name]['score']:.1f}"
    assert re.fullmatch(r"\d\.\d{3}", lines["finetune"]["prose (bits per byte)"])


def test_columns_appear_when_there_is_something_to_say(run: Path, tmp_path: Path) -> None:
    (bare, *_), _ = tables(markdown_tables(run))
    assert not {"IIT", "Attention shift (0 to 2)", "orders", "Base forgetting, understanding"} & set(bare)
    copy = shutil.copytree(run, tmp_path / "run")
    for cell in copy.glob("cells/finetune-seed[01]"):
        add_probes(cell, {0: 0.3, 4: 0.5})
        write_json(cell / "attention_shift.json", attention_rows([0.1, 0.5, None], [0.4, 0.9, 0.2]))
    results, _ = tables(markdown_tables(copy))
    line = next(line for line in results if line[""] == "finetune")
    assert line["IIT"].startswith("50.0 ± 0.0 [") and line["IIT, change"].startswith("+20.0 ± 0.0 [")
    assert results[0]["IIT"].startswith("30.0") and results[0][""] == "untouched model"
    assert line["Attention shift (0 to 2)"].startswith("0.650 ± 0.000 [")  # of the two samples that have one before and after
    assert line["Attention shift, change (0 to 2)"].startswith("+0.350 ± 0.000 [")
    assert next(line for line in results if line[""] == "rehearsal")["IIT"] == "–"


def test_understanding_and_generation_are_apart(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    for cell in copy.glob("cells/*/scores.jsonl"):
        rows = [row | ({"metric": "ranked"} if row["task"] == "antonym" else {}) for row in read_jsonl(cell)]
        write_jsonl(cell, rows)
    line = next(line for line in tables(markdown_tables(copy))[0] if line[""] == "finetune")
    for kind, name in (("understanding", "antonym"), ("generation", "definition")):
        rows = [rows_of(copy, f"finetune-seed{seed}") for seed in (0, 1)]
        lost = sum(own[0, "default", name]["score"] - own[4, "default", name]["score"] for own in rows) / 2
        assert line[f"Base forgetting, {kind}"].startswith(f"{100 * lost:.1f} ±")


def test_what_crashed_or_goes_on_is_named_and_half_a_run_has_tables(run: Path, tmp_path: Path) -> None:
    text = markdown_tables(run)
    assert "Crashed: wings-seed2. Unfinished: finetune-seed2." in text
    (tmp_path / "cells").mkdir()
    assert markdown_tables(tmp_path) == "No task has been learnt yet.\n"
    shutil.copytree(run / "cells" / "finetune-seed2", tmp_path / "cells" / "finetune-seed2")
    results, _ = tables(markdown_tables(tmp_path))
    assert [line[""] for line in results] == ["untouched model", "finetune (unfinished)"]


def test_alula_report_prints_the_tables_and_builds_the_comparison(run: Path, tmp_path: Path) -> None:
    said = CliRunner().invoke(app, ["report", str(run), "--markdown"])
    assert said.exit_code == 0 and said.stdout == markdown_tables(run)
    page = tmp_path / "page.html"
    built = CliRunner().invoke(app, ["report", str(run), "--comparison", "--out", str(page)])
    assert built.exit_code == 0 and f"Comparison: {page}" in built.stdout
    assert "alula comparison" in page.read_text(encoding="utf-8")
    with pytest.raises(UserError, match="is not a run folder"):
        markdown_tables(tmp_path)
