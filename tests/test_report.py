"""Claims about the report: one file, everything in it, built from what the run folder holds and from nothing else."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest

import run_folder
from alula.errors import UserError
from alula.evaluation.measures import MEASURES
from alula.files import read_jsonl, write_json, write_jsonl, write_text
from alula.report import build_report, summary
from alula.report.figures import round_ticks
from alula.report.format import show, show_amount, show_bytes, show_time
from alula.report.reading import read_run
from alula.report.routing import layer_groups
from alula.report.series import series_of
from alula.report.verdict import difference
from run_folder import BASE_TASKS, NUM_SAMPLES, TASKS, write_run


class Page(HTMLParser):
    """The addresses, tags and text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("href", "src", "action", "data", "poster")]
        if tag not in ("meta", "br", "link", "img", "image", "path", "circle", "line", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "emoji & charts")


@pytest.fixture(scope="module")
def html(run: Path) -> str:
    return build_report(run).read_text(encoding="utf-8")


def rows_of(run: Path, cell: str) -> dict[tuple[int, str, str], dict]:
    return {(row["row"], row["arm"], row["task"]): row for row in read_jsonl(run / "cells" / cell / "scores.jsonl")}


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


def test_the_summary_equals_arithmetic_on_the_scores(run: Path) -> None:
    found = {row["series"]: row["metrics"] for row in summary(run)}
    by_seed = []
    for seed in (0, 1):
        rows = rows_of(run, f"finetune-seed{seed}")
        score = {(row, task): rows[row, "default", task]["score"] for row, arm, task in rows if arm == "default"}
        by_seed.append(
            {
                "average_score": 100 * sum(score[4, task] for task in TASKS) / 4,
                "backward_transfer": 100 * sum(score[4, task] - score[i + 1, task] for i, task in enumerate(TASKS[:3])) / 3,
                "base_forgetting": 100 * sum(score[0, task] - score[4, task] for task in BASE_TASKS[:2]) / 2,
                "base_bits_increase": score[4, "prose"] - score[0, "prose"],
                "unparsed_share": 100 * sum(rows[4, "default", task]["unparsed"] for task in TASKS) / (4 * NUM_SAMPLES),
            }
        )
    for name in by_seed[0]:
        values = [one[name] for one in by_seed]
        metric = found["finetune"][name]
        assert metric["mean"] == pytest.approx(sum(values) / 2)
        assert (metric["min"], metric["max"]) == (pytest.approx(min(values)), pytest.approx(max(values)))
        assert metric["seeds"] == 2
    assert found["finetune"]["average_score"]["samples"] == 4 * NUM_SAMPLES
    assert found["finetune"]["backward_transfer"]["samples"] == 3 * NUM_SAMPLES


def test_intervals_hold_their_mean(run: Path) -> None:
    for row in summary(run):
        for name in ("average_score", "backward_transfer", "base_forgetting"):
            metric = row["metrics"][name]
            assert metric["mean"] is None or metric["low"] <= metric["mean"] <= metric["high"]


def test_joint_training_has_a_last_row_and_no_backward_transfer(run: Path) -> None:
    joint = next(row for row in summary(run) if row["series"] == "joint")
    assert joint["is_reference"] and joint["metrics"]["average_score"]["samples"] == 4 * NUM_SAMPLES
    assert joint["metrics"]["backward_transfer"]["mean"] is None


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


def test_gaps_are_paired_differences_of_average_scores(run: Path) -> None:
    by_name = {series.name: series for series in series_of(read_run(run))}
    for name, reference in (("gap_to_joint", "joint"), ("gap_to_specialist", "routed:oracle")):
        for other in set(by_name) - {reference}:
            gap, interval = difference(by_name[reference], by_name[other])
            assert by_name[other].spread(name).mean == pytest.approx(gap)
            found = by_name[other].interval(name)
            assert found is not None and interval is not None and found.low <= gap <= found.high
            assert (found.low, found.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
        own = next(row["metrics"][name] for row in summary(run) if row["series"] == reference)
        assert own["mean"] is None and own["low"] is None  # nothing is held against itself


def test_a_method_called_specialist_is_the_specialist(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    for seed in (0, 1):
        shutil.copytree(copy / "cells" / f"rehearsal-seed{seed}", copy / "cells" / f"specialist-seed{seed}")
    found = {row["series"]: row["metrics"] for row in summary(copy)}
    assert found["rehearsal"]["gap_to_specialist"]["mean"] == found["rehearsal"]["gap_to_specialist"]["low"] == 0
    assert found["routed:oracle"]["gap_to_specialist"]["mean"] < 0


def test_where_every_method_sees_all_tasks_at_once_none_is_a_mere_reference(tmp_path: Path) -> None:
    write_run(tmp_path, seeds=2, with_failures=False)
    for cell in (tmp_path / "cells").iterdir():
        if cell.name.startswith("joint-"):
            shutil.copytree(cell, cell.with_name(cell.name.replace("joint", "wings")))
        else:
            shutil.rmtree(cell)
    assert {row["series"]: row["is_reference"] for row in summary(tmp_path)} == {"joint": False, "wings": False}
    assert "highest average score" in build_report(tmp_path).read_text(encoding="utf-8")


def test_joint_training_is_known_by_what_it_did_not_by_its_name(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    for seed in (0, 1):
        (copy / "cells" / f"joint-seed{seed}").rename(copy / "cells" / f"full_at_once-seed{seed}")
    before, after = ({row["series"]: row for row in summary(folder)} for folder in (run, copy))
    assert after["full_at_once"]["is_reference"]
    assert after["finetune"]["metrics"]["gap_to_joint"] == before["finetune"]["metrics"]["gap_to_joint"]
    assert "The reference full_at_once (all tasks at once)" in Page(build_report(copy).read_text(encoding="utf-8")).text


@pytest.fixture(scope="module")
def two_orders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of finetune in two orders, and of joint in one."""
    folder = write_run(tmp_path_factory.mktemp("orders") / "run", with_failures=False)
    for path in folder.glob("cells/r*"):
        shutil.rmtree(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder, "TASKS", TASKS[::-1])
        for seed in (0, 1):
            cell = folder / "cells" / f"finetune-seed{seed}-order1"
            run_folder.write_cell(cell, "finetune", seed, ("default",))
            write_json(cell / "order.json", {"tasks": list(TASKS[::-1])})
    return folder


def test_the_spread_is_over_seeds_and_orders(two_orders: Path) -> None:
    found = {row["series"]: row for row in summary(two_orders)}
    assert (found["finetune"]["seeds"], found["finetune"]["orders"], found["joint"]["orders"]) == ([0, 1], [0, 1], [0])
    scores, transfers = [], []
    for seed in (0, 1):
        for suffix, order in (("", TASKS), ("-order1", TASKS[::-1])):
            rows = rows_of(two_orders, f"finetune-seed{seed}{suffix}")
            score = {(row, task): rows[row, "default", task]["score"] for row, arm, task in rows if arm == "default"}
            scores.append(100 * np.mean([score[4, task] for task in TASKS]))
            transfers.append(100 * np.mean([score[4, task] - score[i + 1, task] for i, task in enumerate(order[:3])]))
    for name, values in (("average_score", scores), ("backward_transfer", transfers)):
        metric = found["finetune"]["metrics"][name]
        assert (metric["cells"], metric["seeds"], metric["orders"]) == (4, 2, 2)
        assert metric["mean"] == pytest.approx(np.mean(values)) and metric["sd"] == pytest.approx(np.std(values, ddof=1))
        assert (metric["min"], metric["max"]) == (pytest.approx(min(values)), pytest.approx(max(values)))
        assert metric["low"] <= metric["mean"] <= metric["high"]


def test_orders_are_named_in_the_report(two_orders: Path) -> None:
    text = Page(build_report(two_orders).read_text(encoding="utf-8")).text
    for words in ("4 cells: 2 seeds, 2 orders", " → ".join(TASKS[::-1]), "seed 1, order 1", "2 with another task order not in this mean"):
        assert words in text, words
    assert "does not fit" not in text and "things that do not fit together" not in text


def test_a_reference_without_that_order_is_compared_by_seed(two_orders: Path) -> None:
    by_name = {series.name: series for series in series_of(read_run(two_orders))}
    joint = {member.cell.seed: member for member in by_name["joint"].members}
    for member in by_name["finetune"].members:
        gap = joint[member.cell.seed].summaries["average_score"] - member.summaries["average_score"]
        assert member.summaries["gap_to_joint"] == pytest.approx(gap)


def test_an_order_that_the_scores_deny_is_reported(two_orders: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(two_orders, tmp_path / "run")
    write_json(copy / "cells" / "finetune-seed0-order1" / "order.json", {"tasks": [TASKS[3], *TASKS[:3]]})
    write_text(copy / "cells" / "finetune-seed1-order1" / "order.json", '{"tasks": [')
    text = Page(build_report(copy).read_text(encoding="utf-8")).text
    assert "finetune-seed0-order1: charts was not learnt where its order names it (shapes, animals, digits, charts)." in text
    assert "order.json" in text and "not valid JSON" in text


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


def test_a_run_that_has_just_begun_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "cells" / "routed-seed0").mkdir(parents=True)
    text = Page(build_report(tmp_path).read_text(encoding="utf-8")).text
    assert "No method has finished the stream yet" in text and "routed-seed0" in text
    assert summary(tmp_path) == []


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


def test_the_base_row_may_be_stored_by_one_cell_for_all(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    for cell in copy.glob("cells/finetune-seed*"):
        rows = read_jsonl(cell / "scores.jsonl")
        write_jsonl(cell / "scores.jsonl", [row for row in rows if row["row"] > 0])
        shutil.rmtree(cell / "predictions" / "row00")
    before, after = ({row["series"]: row["metrics"] for row in summary(folder)}["finetune"] for folder in (run, copy))
    assert after["base_forgetting"]["mean"] == pytest.approx(before["base_forgetting"]["mean"])


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
