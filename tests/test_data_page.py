"""Claims about docs/data.md: its rows, its code and its recipe work, and it names every format and finding."""

import re
from pathlib import Path

import yaml

from alula.config import check_recipe
from alula.data import read_samples
from alula.data.formats import FORMATS
from data_files import png

PAGE = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")


def block(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


def test_the_rows_of_the_page_are_read(tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    for number in (1, 2):
        (tmp_path / "scans" / f"{number}.png").write_bytes(png(number))
    rows = block("json")[0]
    (tmp_path / "rows.jsonl").write_text(rows, encoding="utf-8")
    assert len(read_samples(tmp_path / "rows.jsonl")) == len(rows.splitlines()) == 9


def test_the_code_of_the_page_runs(capsys) -> None:
    space: dict = {}
    for code in block("python"):
        exec(compile(code, "data.md", "exec"), space)
    assert len(space["first"]) == 8
    assert capsys.readouterr().out.startswith("[('sums', ")


def test_the_recipe_of_the_page_is_valid() -> None:
    (task,) = check_recipe(yaml.safe_load(block("yaml")[0])).tasks
    assert [source.ratio for source in task.blend] == [3, 1, 0.5]


def test_the_page_names_every_format_and_every_kind_of_finding() -> None:
    assert [name for name in FORMATS if f"| `{name}` |" not in PAGE] == []
    source = Path(__file__).parents[1] / "src" / "alula" / "data"
    kinds = {
        kind
        for path in (*source.glob("*.py"), *source.glob("formats/*.py"))
        for kind in re.findall(r'kind="([a-z ]+)"', path.read_text(encoding="utf-8"))
    }
    assert len(kinds) > 10
    table = PAGE.partition("| kind |")[2].partition("**Lengths.**")[0]
    named = {word.strip() for line in table.splitlines() for word in line.split("|")[1:2] for word in word.split(",")}
    assert kinds - named == set()
