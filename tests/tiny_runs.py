"""Recipes of seconds on a tiny random model, and all that a cell of theirs measured."""

from alula.config import check_recipe
from alula.files import read_jsonl
from zoo import build

ORDERS = [["easy_vqa", "digits"], ["digits", "easy_vqa"]]


LORA = {"name": "finetune", "options": {"rank": 2, "layers": [1]}}


def recipe(tiny, **changes):
    raw = {
        "model": str(tiny),
        "tasks": [{"name": "easy_vqa", "train_size": 8, "test_size": 4}, {"name": "digits", "train_size": 8, "test_size": 4}],
        "base_tasks": [{"name": "capital", "test_size": 3}],
        "orders": ORDERS,
        "methods": [LORA, {**LORA, "label": "together", "joint": True}],
        "train": {"steps": 1, "batch_size": 4, "learning_rate": 1e-2},
    }
    return check_recipe({**raw, **changes})


def measured(cell):
    """Everything that was measured in a cell, byte for byte; of scores all but the clock."""
    found = {str(path.relative_to(cell)): path.read_bytes() for path in sorted(cell.rglob("predictions/**/*.jsonl"))}
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in read_jsonl(cell / "scores.jsonl")]
    return found, rows, read_jsonl(cell / "losses.jsonl")


def save_tiny(folder):
    """A tiny random LLaVA and its processor in `folder`."""
    model, processor = build("llava")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
