"""Claims about the report: one file, everything in it, built from what the run folder holds and from nothing else."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml

from alula.errors import UserError
from alula.evaluation.measures import MEASURES
from alula.files import read_jsonl, write_jsonl, write_text
from alula.report import build_report, summary
from alula.report.comparison import build_comparison
from alula.report.figures import round_ticks
from alula.report.format import show, show_amount, show_bytes, show_time
from alula.report.reading import read_run
from alula.report.routing import layer_groups
from alula.report.series import series_of
from alula.report.verdict import difference
from html_page import Page
from run_folder import BASE_TASKS, NUM_SAMPLES, TASKS, rows_of, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "emoji & charts")


@pytest.fixture(scope="module")
def html(run: Path) -> str:
    return build_report(run).read_text(encoding="utf-8")


def test_the_report_asks_nothing_of_the_network(html: str) -> None:
    assert "http:" not in html and "https:" not in html and "@import" not in html and "url(" not in html
    for address in Page(html).addresses:
        assert address.startswith("data:image/") or not re.match(r"^([a-z]+:|//)", address), address


def test_every_link_leads_to_a_file_that_is_there(run: Path, html: str) -> None:
    links = [address for address in Page(html).addresses if not address.startswith("data:")]
    assert len([link for link in links if link.endswith(".jsonl")]) > 100
    assert all((run / unquote(link)).exists() for link in links)


def test_links_hold_from_another_folder(run: Path, tmp_path: Path) -> None:
    page = build_report(run, out=tmp_path / "deep" / "page.html")
    links = [address for address in Page(page.read_text(encoding="utf-8")).addresses if not address.startswith("data:")]
    assert links and all((page.parent / unquote(link)).exists() for link in links)


def test_every_score_is_in_the_report(run: Path, html: str) -> None:
    text = Page(html).text
    assert "emoji & charts" in text
    for name in (*TASKS, *BASE_TASKS, "routed:analytic", "routed:oracle", "finetune", "joint", "rehearsal"):
        assert name in text
    first, second = rows_of(run, "finetune-seed0"), rows_of(run, "finetune-seed1")
    for key, row in first.items():
        mean = (row["score"] + second[key]["score"]) / 2
        assert (show(mean, digits=3) if row["metric"] == "bits_per_byte" else show(100 * mean, digits=0)) in text


def test_a_crashed_cell_is_shown_and_counts_in_no_mean(run: Path, html: str) -> None:
    text = Page(html).text
    assert "Crashed , and not in any mean: wings-seed2" in text and "the loss is not finite at step 12" in text
    assert "finetune-seed2" in text and "unfinished" in text
    finetune = next(row for row in summary(run) if row["series"] == "finetune")
    assert finetune["seeds"] == [0, 1] and finetune["states"]["finetune-seed2"] == "unfinished"


def test_the_verdict_calls_nothing_better_that_noise_could_explain(run: Path, html: str) -> None:
    text = Page(html).text
    assert "routed:analytic has the highest average score of the methods" in text
    assert "points are noise here" in text
    by_name = {series.name: series for series in series_of(read_run(run))}
    gap, interval = difference(by_name["joint"], by_name["routed:analytic"])
    assert interval is not None and interval.low <= gap <= interval.high
    judged = re.search(r"The reference joint \(all tasks at once\) is [^:]*: ([a-z ]+)\.", text)
    assert judged and judged[1] == ("more than noise" if interval.excludes(0) else "noise could explain it")


def test_every_measure_is_in_the_report_with_its_definition(html: str) -> None:
    text = Page(html).text
    for one in MEASURES.values():
        assert text.count(one.label) >= 2 or one.over == "base_ranked", one.name  # no base task of this run ranks options
        assert one.meaning in text and one.formula in text and one.source in text, one.name
    assert "Against joint: the series joint; specialist: the series routed:oracle." in text


def test_routing_and_examples_are_in_the_report(html: str) -> None:
    text = Page(html).text
    for words in ("Who spoke", "layers 0–3", "Can the router tell the tasks apart?", "Oracle gap", "The shape is a circle."):
        assert words in text
    assert html.count("data:image/png;base64,") == 2
    assert html.count('class="patch') == 2 * 16


@pytest.mark.parametrize("missing", ["routing.json", "examples.json", "cost.jsonl", "examples", "predictions"])
def test_the_report_survives_a_missing_part(run: Path, tmp_path: Path, missing: str) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    for path in copy.glob(f"cells/*/{missing}"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    text = Page(build_report(copy).read_text(encoding="utf-8")).text
    assert "Score matrices" in text and "Definitions" in text
    assert ("Who spoke" in text) == (missing != "routing.json")
    assert ("What it cost" in text) == (missing != "cost.jsonl")


def test_a_damaged_file_of_predictions_is_named_and_costs_no_report(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    file = copy / "cells" / "finetune-seed0" / "predictions" / "row04" / "default" / "digits.jsonl"
    file.write_text(file.read_text()[:-9])
    text = Page(build_report(copy).read_text(encoding="utf-8")).text
    assert f"{file}:{NUM_SAMPLES}: not valid JSON" in text and "Score matrices" in text


def test_a_run_that_has_just_begun_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "cells" / "routed-seed0").mkdir(parents=True)
    text = Page(build_report(tmp_path).read_text(encoding="utf-8")).text
    assert "No method has finished the stream yet" in text and "routed-seed0" in text
    assert summary(tmp_path) == []


def test_a_finished_run_in_bits_alone_is_not_called_unfinished(tmp_path: Path) -> None:
    write_text(tmp_path / "recipe.yaml", "tasks: [pages]\nmethods: [finetune]")
    cell = tmp_path / "cells" / "finetune-seed0"
    rows = []
    for row, bits in ((0, 3.0), (1, 2.0)):
        answers = [{"id": str(i), "task": "pages", "score": bits, "loss_bits": bits, "bytes": 1, "parsed": True} for i in range(9)]
        write_jsonl(cell / "predictions" / f"row{row:02d}" / "default" / "pages.jsonl", answers)
        rows.append({"row": row, "after": "pages" if row else None, "arm": "default", "task": "pages", "is_base": False, "score": bits,
                     "num_samples": 9, "unparsed": 0, "metric": "bits_per_byte", "higher_is_better": False})  # fmt: skip
    write_jsonl(cell / "scores.jsonl", rows)
    write_text(cell / "done.json", "{}")
    text = Page(build_report(tmp_path).read_text(encoding="utf-8")).text
    assert "Every task is scored in bits, of which there is no average score" in text and "No method has finished" not in text
    assert "On the way" not in text  # of one task there is none


def test_only_unfinished_cells_are_shown_with_their_stage(tmp_path: Path, run: Path) -> None:
    (tmp_path / "cells").mkdir()
    shutil.copytree(run / "cells" / "finetune-seed2", tmp_path / "cells" / "finetune-seed2")
    row = summary(tmp_path)[0]
    assert row["is_partial"] and row["tasks_learnt"] == 2
    assert row["metrics"]["average_score"]["samples"] == 2 * NUM_SAMPLES
    assert "after 2 tasks" in Page(build_report(tmp_path).read_text(encoding="utf-8")).text


def test_a_half_written_file_is_named_and_the_rest_is_shown(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    write_text(copy / "cells" / "routed-seed0" / "routing.json", '[{"arm": "anal')
    text = Page(build_report(copy).read_text(encoding="utf-8")).text
    assert "routing.json" in text and "not valid JSON" in text and "Who spoke" in text


def test_a_score_that_its_predictions_do_not_give_is_reported(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    path = copy / "cells" / "finetune-seed0" / "scores.jsonl"
    rows = read_jsonl(path)
    changed = next(row for row in rows if row["row"] == 4 and row["task"] == "animals")
    changed["score"] = 0.99
    write_jsonl(path, rows)
    assert "finetune-seed0, row 4, animals: score 0.9900, predictions give" in Page(build_report(copy).read_text("utf-8")).text


def test_what_a_model_says_cannot_change_the_page(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    path = copy / "cells" / "routed-seed0" / "examples.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    rows[0] |= {"after": "<script>alert(1)</script>", "question": "</main>", "tokens": []}
    path.write_text(json.dumps(rows), encoding="utf-8")
    assert "<script>alert" not in build_report(copy).read_text(encoding="utf-8")


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run folder"):
        build_report(tmp_path)


def test_reports_need_no_torch() -> None:
    code = "import alula.report, alula.evaluation, sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_numbers_are_written_for_people() -> None:
    assert [show(-0.04), show(-1.25, digits=2), show(3.0, is_signed=True), show(None), show(float("nan"))] == [
        "0.0",
        "−1.25",
        "+3.0",
        "–",
        "–",
    ]
    assert [show_amount(2_442_240), show_amount(800), show_bytes(9_768_960), show_bytes(12)] == ["2.44 M", "800", "9.77 MB", "12 B"]
    assert [show_time(41), show_time(200), show_time(7500)] == ["41 s", "3 min 20 s", "2 h 05 min"]


def test_axes_have_round_ticks_that_span_the_values() -> None:
    assert round_ticks(0, 56) == [0, 20, 40, 60]
    ticks = round_ticks(-3.1, 0.4)
    assert ticks[0] <= -3.1 and ticks[-1] >= 0.4 and len(ticks) <= 6
    assert len(round_ticks(0, 0)) >= 1


def test_layers_are_grouped_by_depth_whatever_their_names() -> None:
    names = [f"model.layers.{i}.{part}" for i in range(6) for part in ("self_attn", "mlp")]
    assert layer_groups(names) == [("layers 0–1", [0, 1, 2, 3]), ("layers 2–3", [4, 5, 6, 7]), ("layers 4–5", [8, 9, 10, 11])]
    assert layer_groups(["a", "b"]) == [("layer 0", [0]), ("layer 1", [1])]


def test_a_model_made_of_parts_is_named_by_them(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    recipe = yaml.safe_load((copy / "recipe.yaml").read_text())
    parts = {"backbone": "smol", "encoder": [{"name": "vit", "width": 8}, "patch"], "connector": "mlp", "options": {}}
    (copy / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "model": parts}))
    for build in (build_report, build_comparison):
        assert "smol + vit + patch + mlp" in build(copy).read_text()
