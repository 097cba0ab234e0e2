"""Which method suits a user's tasks: what is not allowed goes first, then a short pilot, then one stated rule.

The pilot is an ordinary run over some samples and a few steps; its folder can be looked at with `alula report`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from alula.config import Recipe, TaskChoice, check_recipe, write_recipe
from alula.files import write_json, write_text
from alula.report.format import show, show_bytes, show_interval, show_time
from alula.report.reading import read_run
from alula.report.series import Series, series_of
from alula.report.verdict import difference, noise_level
from alula.running.candidates import RULE, Limits, Line, candidates, constrain, decide, judge, measure
from alula.running.choices import load_chosen, load_stream
from alula.running.learn import absolute
from alula.running.memory import Sizes, longest_row, measure_sizes
from alula.running.run import run_recipe
from alula.training import TrainSettings

PILOT, RECIPE, RESULT = "pilot", "recipe.yaml", "recommendation.json"


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """The lines, what they led to in sentences, and the recipe of the chosen method; None where none may be recommended."""

    chosen: str | None
    lines: tuple[Line, ...]
    sentences: tuple[str, ...]
    recipe: Path | None


def recommend(
    tasks: Sequence[TaskChoice],
    *,
    folder: Path,
    limits: Limits,
    model: str = "smol",
    base_tasks: Sequence[TaskChoice] = (),
    settings: TrainSettings | None = None,
    pilot_size: int = 64,
    pilot_steps: int = 10,
    progress: Progress | None = None,
    say: Callable[[str], None] = print,
) -> Recommendation:
    """Runs a pilot of the methods that `limits` allow and recommends one by `RULE`.

    The pilot is short: it shows what training costs and gross losses, not small differences, and a full run may forget more.
    Interrupted, the same call goes on. Written to `folder`: the pilot's run folder, ``recommendation.json`` with all
    numbers, and ``recipe.yaml`` for the chosen method on all data.

    Args:
        settings: of the full run.
        pilot_size: samples of each task at most, to learn and to score.
        pilot_steps: optimizer steps of each task, no more than those of the full run.

    Raises:
        UserError: data or model that cannot be used, or a folder with another pilot.
    """
    settings = settings or TrainSettings()
    steps = min(pilot_steps, settings.steps)
    full = _full_recipe(tasks, base_tasks, absolute(model), settings)
    pilot = _pilot_recipe(full, size=pilot_size, steps=steps)
    sizes = _sizes(pilot)
    lines = [constrain(candidate, sizes, limits, num_tasks=len(tasks)) for candidate in candidates(settings)]
    found: dict[str, Series] = {}
    errors: dict[str, str] = {}
    if not all(line.out for line in lines):
        allowed = [line.name for line in lines if not line.out]
        run_recipe(_with_methods(pilot, allowed), folder / PILOT, progress=progress, say=say)
        run = read_run(folder / PILOT)
        found = {series.method: series for series in series_of(run) if series.members and not series.is_partial}
        errors = {cell.method: cell.error for cell in run.cells}
    scale: dict[str, Any] = {"batch_size": settings.batch_size, "factor": settings.steps / steps}
    measured = [line if line.out else measure(line, found.get(line.name), error=errors.get(line.name, ""), **scale) for line in lines]
    lines = [judge(line, limits) for line in measured]
    chosen, close = decide(lines, is_clear=lambda best, other: _is_clear(found[best], found[other]))
    recipe = folder / RECIPE if chosen is not None else None
    short = f"The pilot is short: {steps} of {settings.steps} steps, up to {pilot_size} samples a task, one seed."
    sentences = (*_explain(lines, chosen, close, limits), f"{short} A full run may forget more. {_noise(list(found.values()))}".strip())
    result = Recommendation(chosen=chosen, lines=tuple(lines), sentences=sentences, recipe=recipe)
    if recipe is not None:
        write_text(recipe, write_recipe(_with_methods(full, [str(chosen)])))
    inputs = {"limits": asdict(limits), "sizes": asdict(sizes), "pilot": {"size": pilot_size, "steps": steps}}
    write_json(folder / RESULT, {"chosen": chosen, "rule": RULE, "sentences": sentences, "candidates": _plain(lines), **inputs})
    return result


def _full_recipe(tasks: Sequence[TaskChoice], base_tasks: Sequence[TaskChoice], model: str, settings: TrainSettings) -> Recipe:
    """All candidates on all data; files by their whole paths, so that the recipe runs from every folder."""
    wanted, base = ([_by_whole_paths(choice.model_dump()) for choice in choices] for choices in (tasks, base_tasks))
    methods = [candidate.choice.model_dump(by_alias=True) for candidate in candidates(settings)]
    return check_recipe({"model": model, "tasks": wanted, "base_tasks": base, "methods": methods, "train": settings.model_dump()})


def _by_whole_paths(value: Any) -> Any:
    """`value` with every path in it absolute, at any depth."""
    if isinstance(value, dict):
        return {key: _by_whole_paths(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_by_whole_paths(entry) for entry in value]
    return value.resolve() if isinstance(value, Path) else value


def _with_methods(recipe: Recipe, names: Sequence[str]) -> Recipe:
    return recipe.model_copy(update={"methods": [choice for choice in recipe.methods if choice.shown in names]})


def _pilot_recipe(full: Recipe, *, size: int, steps: int) -> Recipe:
    few = {"train_size": size, "test_size": size}
    return full.model_copy(
        update={
            "tasks": [choice.model_copy(update=few) for choice in full.tasks],
            "base_tasks": [choice.model_copy(update=few) for choice in full.base_tasks],
            "train": full.train.model_copy(update={"steps": steps}),
            "evaluation": full.evaluation.model_copy(update={"future_tasks": False, "base_every_task": False}),
            "examples": 0,
        }
    )


def _sizes(pilot: Recipe) -> Sizes:
    """Of the model where it trains, and of a batch as long as the longest row of the pilot."""
    model, processor = load_chosen(pilot)
    samples = [sample for task in load_stream(pilot).tasks for sample in task.train]
    return measure_sizes(model, settings=pilot.train, tokens=longest_row(processor, samples))


def _is_clear(first: Series, second: Series) -> bool:
    _, interval = difference(first, second)
    return interval is not None and interval.excludes(0.0)


def _explain(lines: Sequence[Line], chosen: str | None, close: Sequence[str], limits: Limits) -> list[str]:
    """What was decided and why, in sentences."""
    if chosen is None:
        return ["No method can be recommended: each is out, with its reason above. Loosen a limit."]
    line = next(line for line in lines if line.name == chosen)
    score = f"{show(100 * line.score)} points {show_interval(line.score_interval)}".strip()
    cost = f"training in full takes about {show_time(line.seconds)}, and about {show_bytes(line.memory)} of memory"
    said = [f"Recommended: {chosen}. Average score in the pilot {score} (n = {line.num_samples}); {cost}."]
    others = [name for name in close if name != chosen]
    if others:
        doubted = any(other.unsure for other in lines if other.name in others)
        those = "those that keep the limit" if doubted and not line.unsure else "these"
        said.append(f"Its score cannot be told apart from that of {', '.join(others)}; of {those} it costs least.")
    elif sum(not other.out for other in lines) > 1:
        said.append("It is ahead of the others that are left by more than noise.")
    if math.isnan(line.lost):
        said.append("Without a base task that has right answers nothing is known of what the base model forgets.")
    else:
        lost = f"{show(100 * line.lost)} points {show_interval(line.lost_interval)}".strip()
        said.append(f"On base tasks it lost {lost} (n = {line.num_base}); {limits.base_forgetting:g} may be lost.")
    if line.unsure:
        said.append(f"It is only possible: it {line.unsure}. For more of them take a larger --pilot-size and another --out.")
    return said


def _noise(series: Sequence[Series]) -> str:
    level = noise_level(series)
    if not level:
        return "" if level is None else "All methods have the same score in it: it says nothing about which is better."
    return f"Differences under {show(100 * level)} points of average score are noise here."


def _plain(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Lines for JSON, which knows no NaN."""
    rows = [asdict(line) for line in lines]
    return [{key: None if value != value else value for key, value in row.items()} for row in rows]
