"""Which prompts are behind the scores of a run: their hashes, and where a task was asked in two ways."""

from collections.abc import Sequence

from alula.evaluation.scores import hash_of_all
from alula.report.reading import Cell

SHOWN = 12
"""Hex digits of a hash that a page shows."""


def prompts_of(cells: Sequence[Cell]) -> dict[str, list[str]]:
    """The hashes of each task's prompts, in the order in which they came; a run from before hashes were kept has none."""
    found: dict[str, dict[str, None]] = {}
    for cell in cells:
        for row in cell.scores:
            if row.get("prompt_hash"):
                found.setdefault(row["task"], {})[row["prompt_hash"]] = None
    return {task: list(hashes) for task, hashes in found.items()}


def prompt_versions(cells: Sequence[Cell]) -> dict[str, str]:
    """What stands beside the versions: the prompts of each task, by the beginning of their hash."""
    return {f"prompts of {task} (SHA-256)": ", ".join(one[:SHOWN] for one in hashes) for task, hashes in prompts_of(cells).items()}


def prompt_fact(cells: Sequence[Cell]) -> str:
    """One hash of all prompts, for the head of a page: runs whose hashes are equal asked the same in the same words."""
    found = prompts_of(cells)
    whole = hash_of_all(one for hashes in found.values() for one in hashes)
    return f"{whole[:SHOWN]} (SHA-256), {len(found)} tasks" if found else ""


def prompt_problems(cells: Sequence[Cell]) -> list[str]:
    """A sentence for each task whose scores belong to different prompts."""
    return [
        f"{task} was asked with {len(hashes)} different sets of prompts ({', '.join(one[:SHOWN] for one in hashes)}): the chat template or "
        "the test samples changed within this run, so its scores do not compare. Run it again in a new folder."
        for task, hashes in prompts_of(cells).items()
        if len(hashes) > 1
    ]
