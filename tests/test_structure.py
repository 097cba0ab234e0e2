"""The shape of the code: which room imports which, how long files and functions are, what happens at import."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import alula
from alula.cli.listing import first_sentence
from alula.data.tasks import INFO, TASKS
from alula.methods import ADDITIONS, METHODS

SOURCE = Path(alula.__file__).parent
ROOT = Path(__file__).parents[1]
FILES = sorted(SOURCE.rglob("*.py"))

# A room imports only from rooms above it in this list. `training.settings` is a room of its own: it knows no model, and both methods
# and recipes name it.
ROOMS = (
    "errors",
    "registry",
    "files",
    "data",
    "models",
    "context",
    "experts",
    "routers",
    "mixture",
    "learners",
    "adapters",
    "peft_format",
    "learner_format",
    "pool",
    "objectives",
    "training.settings",
    "methods",
    "training",
    "evaluation",
    "report",
    "overrides",
    "config",
    "running",
    "aligning",
    "serving",
    "cli",
    "__main__",
)
LONGEST_FILE, LONGEST_FUNCTION = 300, 50


def wrong(check, files=FILES, top=SOURCE):
    """What `check` finds in each file. One test looks at all files: a test for each would take longer to start than to run."""
    return {str(path.relative_to(top)): found for path in files if (found := list(check(path)))}


@cache
def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def room_of(module):
    """``alula.training.loop`` -> training."""
    parts = module.split(".")[1:]
    longest = ".".join(parts[:2])
    return longest if longest in ROOMS else parts[0] if parts else "alula"


def for_type_checkers(tree):
    """Everything below ``if TYPE_CHECKING``."""
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    return {inner for block in blocks for inner in ast.walk(block)}


def imported(tree):
    """(line, module) of every import that happens at run time, inside functions too."""
    exempt = for_type_checkers(tree)
    for node in ast.walk(tree):
        if node in exempt:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            own = f"{node.module}."
            is_package = node.module == "alula" or (SOURCE.parent / node.module.replace(".", "/")).is_dir()
            yield from ((node.lineno, own + alias.name if is_package else node.module) for alias in node.names)


def test_every_file_lives_in_a_listed_room():
    found = {room_of(".".join(path.relative_to(SOURCE.parent).with_suffix("").parts)) for path in FILES} - {"__init__"}
    assert found == set(ROOMS)


def imports_from_below(path):
    module = ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts)
    own = room_of(module)
    for line, name in imported(parsed(path)):
        if name.split(".")[0] == "alula" and ROOMS.index(room_of(name)) > ROOMS.index(own):
            yield f"line {line}: {own} imports {name}"


def test_a_room_imports_only_rooms_above_it():
    assert wrong(imports_from_below, FILES[1:]) == {}  # the first is the list of public names


def long_file(path):
    if (lines := len(path.read_text(encoding="utf-8").splitlines())) > LONGEST_FILE:
        yield f"{lines} lines"


def long_functions(path):
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and lines_of(node) > LONGEST_FUNCTION:
            yield f"{node.name}: {lines_of(node)} lines"


def test_files_and_functions_stay_short():
    everywhere = [path for folder in ("src", "tests", "scripts", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    assert wrong(long_file, everywhere, ROOT) == {}
    assert wrong(long_functions) == {}


def lines_of(function):
    """Lines without the docstring."""
    first = function.body[0]
    has_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    docstring = first.end_lineno - first.lineno + 1 if has_docstring else 0
    return function.end_lineno - function.lineno + 1 - docstring


def foreign_state(path):
    """Globals, and what is assigned to attributes of another module's."""
    tree = parsed(path)
    yield from (f"line {node.lineno}: global" for node in ast.walk(tree) if isinstance(node, ast.Global))
    foreign = {name for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom) for name in bound_names(node)}
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AugAssign | ast.AnnAssign) else []
        yield from (ast.unparse(node) for target in targets for part in ast.walk(target) if is_attribute_of(part, foreign))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr" and root(node.args[0]) in foreign:
            yield ast.unparse(node)


def test_there_is_no_global_state():
    assert wrong(foreign_state) == {}


def bound_names(node):
    return {(alias.asname or alias.name).split(".")[0] for alias in node.names}


def root(node):
    """``torch.backends.cuda`` -> torch."""
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def is_attribute_of(node, foreign):
    return isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and root(node) in foreign


# What may be called while a file is imported: makers of plain values and tables, and the entry into a table.
CALLED_AT_IMPORT = {
    *("ConfigDict", "Console", "Field", "Metric", "Path", "Registry", "Routing", "Side", "Style", "TaskInfo", "TypeVar"),
    *("Column", "typer.Argument", "typer.Option", "typer.Typer"),
    *("attrgetter", "dataclass", "field", "field_validator", "frozenset", "logging.getLogger", "partial", "re.compile", "sorted"),
    *("app.command", "register_auto_classes"),
}


def called_at_import(node):
    """Calls outside of function bodies; decorators and class bodies count, what only a started program does does not."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test) == "__name__ == '__main__'":
            continue
        if isinstance(child, ast.Call):
            yield child
        yield from called_at_import(child)


def work_at_import(path):
    for call in called_at_import(parsed(path)):
        name = ast.unparse(call.func).split("(")[0]
        if name not in CALLED_AT_IMPORT and not name.endswith(".register"):
            yield f"line {call.lineno}: {ast.unparse(call)}"
    loops = [node.lineno for node in parsed(path).body if isinstance(node, ast.For | ast.While | ast.With | ast.Try)]
    if loops and "register" not in ast.unparse(parsed(path).body[-1]):
        yield f"lines {loops}"


def test_importing_a_file_does_no_work():
    assert wrong(work_at_import) == {}


def environment_read(path):
    text = "" if path.parent.name == "cli" else ast.unparse(parsed(path))
    yield from (word for word in ("os.environ", "os.getenv") if word in text)


def test_the_environment_is_read_by_the_command_line_alone():
    assert wrong(environment_read) == {}


def private_imports(path):
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("torch", "transformers", "peft", "accelerate"):
            names = (*node.module.split("."), *(alias.name for alias in node.names))
            yield from (f"line {node.lineno}: {part}" for part in names if part.startswith("_"))


def test_nothing_private_of_torch_or_transformers_is_imported():
    assert wrong(private_imports) == {}


def foreign_code(path):
    """What could run code out of a file that is read."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name.split(".")[0] for alias in node.names} | {getattr(node, "module", None) or ""}
            if names & {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}:
                yield ast.unparse(node)
        if isinstance(node, ast.Call):
            called, keywords = ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if (
                called == "torch.save"  # `write_tensors` is there
                or (called == "torch.load" and keywords.get("weights_only") != "True")
                or (called in ("np.load", "numpy.load") and keywords.get("allow_pickle", "False") != "False")
                or keywords.get("trust_remote_code", "False") != "False"
            ):
                yield f"line {node.lineno}: {ast.unparse(node)}"


def test_no_pickle_is_written_or_read():
    assert wrong(foreign_code) == {}


def drawers(path):
    if path.stem in ("utils", "helpers", "common", "misc", "manager"):
        yield path.stem
    if "annotations" in [alias.name for node in ast.walk(parsed(path)) if isinstance(node, ast.ImportFrom) for alias in node.names]:
        yield "postponed annotations"


def test_no_file_is_a_drawer_and_no_annotations_are_postponed():
    assert wrong(drawers) == {}


def loaded_after(code):
    ask = f"{code}\nimport sys\nprint(*(set(sys.modules) & {{'torch', 'transformers', 'datasets', 'numpy', 'PIL'}}))"
    return set(subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True).stdout.split())


def test_import_alula_imports_nothing_heavy():
    assert loaded_after("import alula") == set()


def test_the_report_and_recipes_import_no_torch():
    code = "import alula.report, alula.report.pool_page, alula.config, alula.evaluation"
    assert not loaded_after(code) & {"torch", "transformers", "datasets"}


def test_every_public_name_is_there_and_says_what_it_is():
    for name in set(alula.__all__) - {"__version__"}:
        found = getattr(alula, name)
        assert found.__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        alula.nothing  # noqa: B018


def test_everything_that_can_be_named_says_what_it_is_in_one_sentence_of_its_own():
    said = {name: first_sentence(table[name]) for table in (METHODS, ADDITIONS) for name in table}
    assert set(TASKS) == set(INFO)
    for name, sentence in (*said.items(), *((name, INFO[name].summary) for name in TASKS)):
        assert sentence[0].isupper() and sentence.endswith(".") and 20 < len(sentence) <= 130, (name, sentence)
    assert len(set(said.values())) == len(said)
    assert all(INFO[name].licence.strip() for name in TASKS)


# Files of several methods, and of one whose name says more than the method's.
METHOD_FILES = {
    "one_lora": ("finetune", "joint"),
    "full": ("finetune_full", "joint_full"),
    "routed": ("routed", "specialist"),
    "merged_lora": ("lora",),
}


def test_methods_and_tasks_live_in_files_one_can_guess():
    for name in METHODS:
        file = METHODS[name].__module__.removeprefix("alula.methods.")
        assert name in METHOD_FILES.get(file, (file,)), f"{name} is in {file}"
    for name in TASKS:
        builder = getattr(TASKS[name], "func", TASKS[name])  # one builder for several languages is a partial
        assert name.startswith(builder.__module__.removeprefix("alula.data.tasks.")), name
