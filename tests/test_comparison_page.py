"""The page of a comparison: what it says of noise, its plots and curves, its table in a real browser."""

import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

import run_folder
from alula.evaluation.measures import MEASURES
from alula.files import read_jsonl, write_json, write_jsonl
from alula.report.columns import NEW_SKILL
from alula.report.comparison import build_comparison, table_columns
from alula.report.pairs import pairs_of
from alula.report.reading import read_run
from alula.report.series import series_of
from alula.report.verdict import best_first, difference, listed


class Page(HTMLParser):
    """Headings that sort, the rows of the sortable table, and all words."""

    def __init__(self, html):
        super().__init__()
        self.heads, self.rows, self.words, self.addresses = [], [], [], []
        self._in_ranked = self._in_style = False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.addresses += [value for name, value in attrs if name in ("href", "src")]
        self._in_style |= tag in ("style", "script")
        if tag == "table":
            self._in_ranked = found.get("class") == "ranked"
        if self._in_ranked and tag == "th" and "aria-sort" in found:
            self.heads.append(found)
        if self._in_ranked and tag == "tr":
            self.rows.append([])
        if self._in_ranked and tag == "td" and "data-sort" in found:
            self.rows[-1].append(found["data-sort"])

    def handle_endtag(self, tag):
        self._in_style &= tag not in ("style", "script")

    def handle_data(self, data):
        if not self._in_style:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A run with invented answers: four methods, two seeds, two orders, one crashed cell and one unfinished."""
    folder = run_folder.write_run(tmp_path_factory.mktemp("runs") / "a & b", with_routing=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder, "TASKS", ("shapes", "animals", "charts", "digits"))
        for seed in (0, 1):
            for method in ("finetune", "rehearsal"):
                cell = folder / "cells" / f"{method}-seed{seed}-order1"
                run_folder.write_cell(cell, method, seed, ("default",), with_routing=False)
                write_json(cell / "order.json", {"tasks": list(run_folder.TASKS)})
    return folder


@pytest.fixture(scope="module")
def page(compared):
    return Page(build_comparison(compared).read_text(encoding="utf-8"))


def test_the_table_can_be_sorted_by_every_column(page):
    assert [head["aria-sort"] for head in page.heads].count("descending") == 1
    assert {head["data-first"] for head in page.heads} == {"ascending", "descending"}
    rows = [row for row in page.rows if row]
    assert len(rows) == 6
    assert all(len(row) == len(page.heads) - 1 for row in rows)  # the name sorts by its text
    scores = [float(row[0]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert "" in {value for row in rows for value in row}  # joint has no backward transfer


def test_the_verdict_says_what_is_noise_what_is_not_and_what_comes_back(compared, page):
    assert "points are noise here" in page.text
    by_name = {one.name: one for one in series_of(read_run(compared))}
    pairs = pairs_of(list(by_name.values()))
    clear = [pair for pair in pairs if not pair.is_noise]
    assert f"Of {len(pairs)} pairs of series {len(clear)} can be told apart" in page.text
    assert f"{sum(pair.is_reproduced for pair in clear)} of these {len(clear)} differences have the same sign" in page.text
    pair = next(p for p in pairs if (p.first.name, p.second.name) == ("rehearsal", "finetune"))
    assert (pair.num_cells, pair.num_same) == (4, 4)
    assert pair.interval.low <= pair.gap <= pair.interval.high


def test_the_verdict_says_after_which_methods_base_tasks_stand_best_and_which_lost_some(compared, page):
    ours = [one for one in series_of(read_run(compared)) if not one.is_reference]
    for metric, opening in (("base_forgetting", "Base tasks stand"), ("base_bits_increase", "Prose stands")):
        best = best_first(ours, metric)[0]
        said = re.search(
            rf"{opening} best after {re.escape(best.name)} \([^()]*\), .*? Clearly lost by (.*?)\. (?=Prose|The ref)", page.text
        )[1]
        for one in ours:
            lost, interval = one.spread(metric).mean, one.interval(metric)
            assert (f"{one.name} (" in said) == (lost > 0 and interval.excludes(0)), (metric, one.name, said)
        assert "finetune (" in said and "routed" not in said


def test_the_head_says_what_was_run_how_long_and_on_what(page):
    for words in (
        *("Orders animals → digits → charts → shapes; shapes → animals → charts → digits", "Base tasks antonym, definition, prose"),
        *("Seeds 0, 1, 2", "Cells 12 finished, 1 crashed, 1 unfinished", "Steps a task 50 S", "Samples seen a task 800 to 1.28 k B"),
        *("Batch size 8 to 16", "Test samples 420 a row", "Machine 2 x x86_64", "Versions alula 0.1.0, torch 2.13.0, python 3.11.2"),
    ):
        assert words in page.text, words


def test_every_measure_has_an_interval_and_the_number_of_its_samples(compared, page):
    heads = [head["title"] for head in page.heads]
    for name in ("average_over_stages", "gap_to_joint", "base_forgetting_generation", "unparsed_share"):
        assert heads.count(MEASURES[name].meaning) == 1, name
    assert MEASURES["base_forgetting"].meaning not in heads  # all base tasks are generated: it would be the same column again
    known = {column.label: numbers for column, numbers in table_columns(series_of(read_run(compared)))}
    for label, samples in (("Average score", 240), ("Forgetting", 180), ("Base forgetting, generation", 120), ("Unparsed", 240)):
        assert {one.samples for one in known[label] if one.is_known} == {samples}, label
        assert all(one.interval for one in known[label] if one.is_known)
    assert page.text.count("n = 240") >= 12


def test_base_tasks_of_both_kinds_have_a_column_each_beside_their_mean(compared, tmp_path):
    copy = shutil.copytree(compared, tmp_path / "run")
    for path in copy.glob("cells/*/scores.jsonl"):
        write_jsonl(path, [row | ({"metric": "ranked"} if row["task"] == "antonym" else {}) for row in read_jsonl(path)])
    labels = [column.label for column, _ in table_columns(series_of(read_run(copy)))]
    assert {"Base forgetting", "Base forgetting, understanding", "Base forgetting, generation"} <= set(labels)


def test_crashed_cells_are_shown_with_the_first_line_of_their_reason(compared, page, tmp_path):
    assert "wings-seed2" in page.text
    assert "the loss is not finite at step 12" in page.text
    copy = shutil.copytree(compared, tmp_path / "run")
    write_json(copy / "cells" / "wings-seed2" / "crashed.json", {"error": "<b>first\nsecond line"})
    text = build_comparison(copy).read_text(encoding="utf-8")
    assert "&lt;b&gt;first" in text
    assert "second line" not in text


def test_the_page_asks_nothing_of_the_network_and_shows_every_plot(compared, page):
    html = (compared / "compare.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|@import|url\(", html)
    assert all((compared / address).exists() for address in page.addresses)
    for title in ("Score kept against training time", "Score kept against what is stored", "Base forgetting against new skill"):
        assert title in page.text
    assert html.count('class="front"') >= 1
    assert html.count('class="learnt-here"') == 2 * 4  # both orders, each task
    assert "Order 1: shapes → animals → charts → digits" in page.text


def test_new_skill_is_what_the_stream_added(compared):
    one = next(one for one in series_of(read_run(compared)) if one.name == "finetune")
    gains = []
    for member in one.members:
        rows = {(row["row"], row["task"]): row["score"] for row in read_jsonl(member.cell.folder / "scores.jsonl")}
        gains.append(sum(rows[4, task] - rows[0, task] for task in run_folder.TASKS) / 4)
    known = NEW_SKILL.of(one)
    assert known.value == pytest.approx(sum(gains) / 4)
    assert known.sd and re.fullmatch(r"\[[\d.]+, [\d.]+\]", known.interval)


def test_a_run_that_has_just_begun_has_a_page(tmp_path):
    (tmp_path / "cells" / "routed-seed0").mkdir(parents=True)
    text = build_comparison(tmp_path).read_text(encoding="utf-8")
    assert "No method has finished the stream yet" in text
    assert "routed-seed0" in text


CLICKS = """<script>
const heads = [...document.querySelectorAll("table.ranked thead th")], button = (i) => heads[i].querySelector("button");
const first = () => document.querySelector("table.ranked tbody th").dataset.name;
const found = [first()];
button(0).focus(); found.push(document.activeElement === button(0));
button(0).click(); found.push(first(), heads[0].ariaSort);
button(0).click(); found.push(first(), heads[0].ariaSort, document.getElementById("said").textContent);
button(3).click(); found.push(heads[0].ariaSort, heads[3].ariaSort);
found.push([...document.querySelectorAll("table.ranked tbody tr")].at(-1).cells[0].dataset.name);
const pick = document.querySelector(".picks button"), faint = () => [...document.querySelectorAll("svg .series")].filter((one) =>
  getComputedStyle(one).opacity !== "1").map((one) => one.dataset.series);
found.push(faint().length); pick.click(); found.push(faint().length > 20 && !faint().includes(pick.dataset.series), pick.ariaPressed);
pick.click(); found.push(faint().length);
document.body.innerHTML = "<pre>" + found.join("|") + "</pre>";
</script>"""


@pytest.mark.browser
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium")
def test_headings_sort_in_a_real_browser(compared, tmp_path):
    html = build_comparison(compared).read_text(encoding="utf-8").replace("</body>", CLICKS + "</body>")
    (tmp_path / "page.html").write_text(html, encoding="utf-8")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    shown = subprocess.run([*command, f"file://{tmp_path / 'page.html'}"], capture_output=True, text=True, timeout=120, check=True).stdout
    found = re.search(r"<pre>(.*?)</pre>", shown, re.DOTALL)[1].split("|")
    assert found[:4] == [found[0], "true", "finetune", "ascending"]
    assert found[4:7] == ["routed:oracle", "descending", "Sorted by Series, descending."]
    assert found[7:9] == ["none", "descending"]
    assert found[10:] == ["0", "true", "true", "0"]  # a picked series alone stays as it was
    assert found[9] == "joint"  # it has no backward transfer: last, either way


@pytest.fixture(scope="module")
def joint_only(tmp_path_factory):
    """Two methods that saw all tasks at once, two seeds, with probes and attention shifts; a third has only scored the base model."""
    folder = run_folder.write_run(tmp_path_factory.mktemp("joint"), seeds=2, with_failures=False)
    for path in folder.glob("cells/*"):
        if not path.name.startswith("joint-"):
            shutil.rmtree(path)
    for cell in sorted(folder.glob("cells/joint-*")):
        run_folder.add_probes(cell, {0: 0.3, 1: 0.4})
        write_json(cell / "attention_shift.json", run_folder.attention_rows([0.1, 0.5, None], [0.4, 0.9, 0.2]))
        shutil.copytree(cell, cell.with_name(cell.name.replace("joint", "wings")))
    started = shutil.copytree(folder / "cells" / "joint-seed0", folder / "cells" / "prefix-seed0")
    (started / "done.json").unlink()
    write_jsonl(started / "scores.jsonl", [row for row in read_jsonl(started / "scores.jsonl") if row["row"] == 0])
    return folder


def test_a_run_of_joint_methods_alone_has_a_page_of_what_it_measured(joint_only):
    html = build_comparison(joint_only).read_text(encoding="utf-8")
    page = Page(html)
    heads = {head["title"].split(":")[0] for head in page.heads}
    assert "Tasks, all at once animals, digits, charts, shapes" in page.text
    assert "After 4 tasks at once" in page.text
    for shown in ("IIT", "IIT, change", "Attention shift, change", "Scores by task", "untouched model"):
        assert shown in page.text, shown
    assert not any(word in " ".join(heads) for word in ("right after learning", "best score at any earlier stage"))  # nothing to forget
    assert "Learning curves" not in page.text
    assert "reference" not in html.split('id="table"')[1].split("</table>")[0]
    assert "prefix-seed0 unfinished" in page.text
    assert len([row for row in page.rows if row]) == 2  # the one that learnt nothing yet is no line of the table


def test_differences_are_over_the_cells_that_both_series_have(tmp_path):
    """A method that learnt in one order only is not compared with what another made of a harder or easier one."""
    run_folder.write_run(tmp_path, seeds=2, with_failures=False)
    for seed in (0, 1):
        easy = shutil.copytree(tmp_path / "cells" / f"joint-seed{seed}", tmp_path / "cells" / f"finetune-seed{seed}-order1")
        write_json(easy / "order.json", {"tasks": list(run_folder.TASKS)})
    by_name = {one.name: one for one in series_of(read_run(tmp_path))}
    mine, other = by_name["finetune"], by_name["rehearsal"]
    own = [member.summaries["average_score"] for member in mine.members if member.cell.order == 0]
    gap, interval = difference(other, mine)
    assert gap == pytest.approx(other.spread("average_score").mean - sum(own) / 2)
    assert gap > other.spread("average_score").mean - mine.spread("average_score").mean + 0.05
    assert interval.low <= gap <= interval.high
    assert [one.name for one in best_first([mine, other])] == ["rehearsal", "finetune"]


def test_a_long_list_of_names_is_cut_and_says_how_many_more():
    assert listed(list("abcde")) == "a, b, c, d, e"  # one more name is no longer than saying so
    assert listed(list("abcdef")) == "a, b, c, d and 2 more"
