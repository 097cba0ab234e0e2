"""The page of a comparison: what it says of noise, its plots and curves, its table in a real browser."""

import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from itertools import combinations, pairwise

import pytest

import run_folder
from alula.files import read_jsonl, write_json, write_jsonl
from alula.report.columns import NEW_SKILL
from alula.report.comparison import build_comparison
from alula.report.figures import Line, line_chart
from alula.report.pairs import pairs_of
from alula.report.pareto import Spot, front, scatter, span
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


def test_the_front_leaves_out_what_is_beaten_and_what_is_a_reference():
    spots = [
        Spot(label="cheap", number=1, colour=1, x=1, y=20),
        Spot(label="beaten", number=2, colour=2, x=2, y=19),
        Spot(label="good", number=3, colour=3, x=3, y=50),
        Spot(label="joint", number=4, colour=4, x=1, y=90, is_reference=True),
    ]
    assert [spot.label for spot in front(spots, is_lower_x_better=True, is_lower_y_better=False)] == ["cheap", "good"]
    assert [spot.label for spot in front(spots, is_lower_x_better=False, is_lower_y_better=True)] == ["beaten", "good"]
    drawn = scatter(spots, x_label="x", y_label="y", x_unit=str, y_unit=str, description="d")
    assert re.findall(r">(\d)</text>", drawn) == ["1", "2", "3", "4"]
    assert drawn.count("hollow") == 1


@pytest.mark.parametrize("values", [(0.0,), (5.0,), (3.0, 3.0), (-2.0, 7.0), (1e3, 4e8), (0.0, 9e6), (30.0, 900.0)])
def test_an_axis_spans_its_values(values):
    axis = span(values)
    assert all(-1e-9 <= axis.share(value) <= 1 + 1e-9 for value in values)
    assert all(-1e-9 <= axis.share(tick) <= 1 + 1e-9 for tick in axis.ticks)
    assert 2 <= len(axis.ticks) <= 9


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


def test_numbers_of_coinciding_spots_do_not_hide_each_other():
    at = [(1.0, 5.0)] * 6 + [(1.01, 5.0), (1.0, 5.02), (9.0, 0.0), (9.0, 0.0)]
    spots = [Spot(label=str(n), number=n, colour=1, x=x, y=y) for n, (x, y) in enumerate(at, start=1)]
    drawn = scatter(spots, x_label="x", y_label="y", x_unit=str, y_unit=str, description="d")
    places = [(float(x), float(y)) for x, y in re.findall(r'class="spot c1" cx="([\d.]+)" cy="([\d.]+)"', drawn)]
    assert len(places) == len(spots)
    assert all(abs(a - c) >= 15.9 or abs(b - d) >= 15.9 for (a, b), (c, d) in combinations(places, 2))
    assert drawn.count('class="leader') == drawn.count('class="place') == 8  # one of the eight here and one of the two there stay in place


def test_lines_that_end_together_have_their_numbers_apart():
    lines = [Line(label=f"m{n}", colour=n, points=((0, 0.0), (1, 50.0 if n < 9 else 0.0)), number=n) for n in range(1, 13)]
    drawn = line_chart(lines, x_labels=["base", "a"], unit=str, description="d", learnt=1)
    heights = sorted(float(y) for y in re.findall(r'class="number" x="[\d.]+" y="([\d.]+)"', drawn))
    assert len(heights) == 12
    assert all(after - before >= 10.9 for before, after in pairwise(heights))
    assert drawn.count('class="learnt-here"') == 1
    high = [Line(label="high", colour=1, points=((0, 80.0), (1, 80.5)))]
    ticks = re.findall(
        r'class="tick end" x="[\d.]+" y="[\d.]+">([\d.]+)<', line_chart(high, x_labels=[], unit=str, description="d", from_zero=False)
    )
    assert 79 < float(ticks[0]) < 80 and 80.5 < float(ticks[-1]) < 82
    assert "number" not in line_chart([replace(lines[0], number=0)], x_labels=["base", "a"], unit=str, description="d")


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
