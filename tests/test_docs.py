"""What the documentation claims: it is complete, it runs, its links and names are real, and it names no machine."""

import ast
import json
import re
import shlex
import shutil
import tomllib
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from huggingface_hub import HfApi
from PIL import Image
from scripts.api_reference import render, verbs
from torch.distributed.run import get_args_parser

import alula
from alula.config import check_train, parse_settings, read_recipe
from alula.data.documents import RATIOS, SOURCE
from alula.data.tasks import TASKS
from alula.errors import UserError
from alula.files import write_json, write_jsonl
from alula.methods import METHODS
from alula.report.definitions import METRICS
from alula.running.cells import check_methods
from alula.running.grid import read_grid
from terminal import Terminal
from zoo import build

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
GUIDE = ROOT / "docs" / "own_model_and_data.md"
FIRST_HOUR = ROOT / "docs" / "first_hour.md"
# Of a page that is typed: a tiny model, few samples, few steps.
SMALL = {
    r"^MODEL=smol$": "MODEL=my-model",
    r'"train": 96, "test": 24': '"train": 9, "test": 4',
    r"(alula learn .*)": r"\1 --set steps=2 --set batch_size=4",
    r"--limit \d+": "--limit 4",
    r"(alula generate .*)": r"\1 --max-new-tokens 3",
    r"^import alula\.models  # needed for smol alone.*": "",
}


def blocks(page, language):
    """The code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def typed():
    """Every line of a block that starts alula or a launcher, in a shell, in what a shell showed or in a step of a workflow, as words."""
    every = [block.replace("\\\n", " ") for page in PAGES for block in blocks(page, "(?:bash|text|yaml)")]
    lines = [line.strip().removeprefix("run: ") for block in every for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith(("alula ", "torchrun ", "accelerate "))]


def commands():
    """What `typed` says of alula itself; the options of a launcher are read by the launcher, which refuses those it does not have."""
    for program, *words in typed():
        if program == "alula":
            yield words
            continue
        given = get_args_parser().parse_args(words) if program == "torchrun" else launch_command_parser().parse_args(words[1:])
        assert given.module and given.training_script == "alula"
        yield given.training_script_args


def mentioned():
    """Every `alula verb ...` within a sentence, as words."""
    return [found.split() for page in PAGES for found in re.findall(r"`alula ([a-z]+[^`\n]*)`", page.read_text(encoding="utf-8"))]


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A working folder with a tiny model and a data file."""
    model, processor = build("llava")
    image_token = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    model.generation_config.suppress_tokens = [image_token]  # a random model would say it
    model.save_pretrained(tmp_path / "my-model")
    processor.save_pretrained(tmp_path / "my-model")
    colours = ["red", "blue", "green"]
    for index in range(24):
        Image.new("RGB", (30 + index, 30), colours[index % 3]).save(tmp_path / f"{index}.png")
    rows = [{"image": f"{index}.png", "question": "What colour?", "answer": colours[index % 3]} for index in range(24)]
    write_jsonl(tmp_path / "invoices.jsonl", rows)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shortened(code):
    """The same code with fewer steps and samples."""
    return re.sub(r"\b(steps|max_steps|gate_steps|warmup_steps)=\d+", r"\1=2", re.sub(r"\b(train|test)_size=\d+", r"\1_size=8", code))


def test_reference_names_all_that_is_public_and_is_what_the_docstrings_say():
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    missing = [name for name in alula.__all__ if f"### `{name}`" not in page]
    assert not missing
    assert page == render(), "docs/reference.md is not what the docstrings say. Run `make docs`."


def test_the_readmes_python_runs_on_a_model_of_ones_own(desk, capsys):
    code = blocks(ROOT / "README.md", "python")[0]
    assert '"smol"' in code and len(code.strip().splitlines()) <= 12
    exec(compile(shortened(code.replace('"smol"', '"my-model"')), "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("before ")
    assert alula.Pool.open("my-pool").names == ["animals"]


# torch's and PEFT's own: pin_memory without an accelerator, and a property's former name.
@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning", "ignore::FutureWarning")
def test_the_guides_python_runs_from_top_to_bottom(desk, capsys):
    pytest.importorskip("peft")
    space: dict = {}
    for number, code in enumerate(blocks(GUIDE, "python")):
        if "adapter-folder" in code:
            shutil.copytree("python-pool/experts/invoices", "adapter-folder")
        exec(compile(shortened(code), f"{GUIDE.name}, block {number + 1}", "exec"), space)
    assert alula.Pool.open("python-pool").names == ["invoices", "receipts"]


def test_the_first_hour_can_be_typed_from_top_to_bottom(desk, monkeypatch):
    pushed = []
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **options: None)  # there is no network in tests
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **options: pushed.append(options["repo_id"]))
    with Terminal(small=SMALL) as terminal:
        terminal.type_page(FIRST_HOUR.read_text(encoding="utf-8"))
        terminal.interrupt_server()
    assert pushed == ["me/my-pool"]
    assert alula.Pool.open("my-pool").names == ["colours", "shapes"]
    assert {path.name for path in desk.iterdir()} >= {"colours-adapter", "merged", "predictions"}


def test_the_pages_and_the_errors_install_what_there_is_from_a_clone():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    files = [*PAGES, *(ROOT / "src").rglob("*.py")]
    texts = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in files}
    wanted = [entry for text in texts.values() for entry in re.findall(r"pip install '\.\[([\w,]+)\]'", text)]
    wanted += [entry for text in texts.values() for entry in re.findall(r"""install_extra\(['"](\w+)['"]\)""", text)]
    assert len(wanted) > 5 and {extra for entry in wanted for extra in entry.split(",")} <= set(extras)
    by_name = re.compile(r"pip install '?alula\b")  # a name that is on no index yet, and may be taken by somebody
    assert [name for name, text in texts.items() if by_name.search(text)] == []


def test_the_guides_rows_and_recipe_are_read(tmp_path):
    (tmp_path / "scans").mkdir()
    for index in range(1, 6):
        Image.new("RGB", (8, 8)).save(tmp_path / "scans" / f"{index:04}.png")
    rows = blocks(GUIDE, "json")[0]
    (tmp_path / "invoices.jsonl").write_text(rows, encoding="utf-8")
    assert len(alula.read_samples(tmp_path / "invoices.jsonl")) == len([json.loads(row) for row in rows.splitlines()])
    (tmp_path / "recipe.yaml").write_text(blocks(GUIDE, "yaml")[0], encoding="utf-8")
    assert [choice.name for choice in read_recipe(tmp_path / "recipe.yaml").tasks] == ["invoices", "receipts"]


def test_the_guides_messages_are_those_that_come(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = re.search(r"^```\n(Error .*?)^```", GUIDE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)[1]
    good, came = {"question": "a", "answer": "b"}, []
    for row in ({"image": "scans/3.png", "question": "a", "anser": "b"}, {**good, "image": "scans/5.png"}):
        write_jsonl("invoices.jsonl", [good] * (2 if "anser" in row else 5) + [row])
        with pytest.raises(UserError) as caught:
            alula.read_samples("invoices.jsonl")
        came.append(str(caught.value))
    with pytest.raises(UserError) as caught:
        check_train(parse_settings(["stpes=100"]))
    came.append(re.sub(r"(?s)Known: .*?\. ", "Known: [...] ", str(caught.value)))
    assert shown.split() == " ".join(f"Error {message}" for message in came).split()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif not target.startswith(("http://", "https://")):
            assert (page.parent / target.partition("#")[0]).exists(), target


def test_every_command_in_the_pages_exists_with_its_options():
    known = verbs()
    assert {program for program, *_ in typed()} == {"alula", "torchrun", "accelerate"}
    assert {"learn", "eval", "generate", "report", "list", "run", "recommend", "gate"} <= {verb for verb, *_ in commands()}
    for verb, *words in (*commands(), *mentioned()):
        assert verb in known, verb
        accepted = {option for parameter in known[verb].params for option in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
        assert {word for word in words if word.startswith("--")} <= accepted, words


def test_every_recipe_in_the_pages_names_what_exists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_json(tmp_path / "ds_config.json", {})  # what a page on DeepSpeed calls its file
    shown = [yaml.safe_load(block) for page in PAGES for block in blocks(page, "yaml")]
    parts = [raw for raw in shown if isinstance(raw, dict) and "task" not in raw]  # not steps of a workflow, not a task of lm-eval
    assert len(parts) > 8
    for raw in parts:
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"tasks": ["easy_vqa"], "methods": ["routed"], **raw}), encoding="utf-8")
        for recipe in [point.recipe for point in read_grid("recipe.yaml").points] if "grid" in raw else [read_recipe("recipe.yaml")]:
            check_methods(recipe)
            tasks = [*recipe.tasks, *recipe.base_tasks]
            named = [task for task in tasks if not task.blend] + [source for task in tasks for source in task.blend]
            assert {one.name for one in named if one.path is None} <= {*TASKS, *(SOURCE + kind for kind in RATIOS)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_that_a_page_names_exists(page):
    for file, name in re.findall(r"(tests/\w+\.py)::(\w+)", page.read_text(encoding="utf-8")):
        functions = {one.name for one in ast.parse((ROOT / file).read_text(encoding="utf-8")).body if isinstance(one, ast.FunctionDef)}
        assert name in functions, f"{file}::{name}"


def test_every_room_is_in_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    source = ROOT / "src" / "alula"
    rooms = [f"{folder.name}/" for folder in source.iterdir() if (folder / "__init__.py").exists()]
    assert [room for room in rooms if f"`{room}`" not in readme] == []
    named = re.findall(r"`([\w/]+(?:/|\.py))`", readme.partition("## Rooms")[2].partition("## Status")[0])
    assert [name for name in named if not (source / name).exists() and not (source / "data" / name).exists() and name != "src/alula"] == []


def test_every_metric_of_the_report_is_defined():
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert [metric.label for metric in METRICS if f"| {metric.label} |" not in page] == []


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_is_valid_and_names_what_exists(path):
    recipe = read_recipe(path)
    for choice in (*recipe.tasks, *recipe.base_tasks):
        assert choice.path is not None or choice.name in TASKS, choice.name
    assert all(choice.name in METHODS for choice in recipe.methods)


def test_no_file_names_a_machine():
    places = re.compile(r"(?<![\w.])/(?:" + "|".join(["work", "tmp", "home", "root", "Users"]) + r")/")
    endings = {".md", ".py", ".yaml", ".toml", ".j2", ".js", ".css", ".sh", ".txt", ".json"}
    files = [*PAGES, *RECIPES, ROOT / "Makefile", ROOT / "pyproject.toml", ROOT / "constraints.txt"]
    files += [path for room in ("src", "tests", "scripts") for path in (ROOT / room).rglob("*") if path.suffix in endings]
    assert [str(path.relative_to(ROOT)) for path in files if places.search(path.read_text(encoding="utf-8"))] == []


def test_pages_promise_nothing_by_adjective():
    words = re.compile(r"\b(simply|easily|powerful|seamless\w*|state-of-the-art|blazing\w*|effortless\w*|cutting-edge)\b", re.IGNORECASE)
    assert [(page.name, found) for page in PAGES for found in words.findall(page.read_text(encoding="utf-8"))] == []
