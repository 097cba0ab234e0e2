"""Whether a run folder can go on with a recipe: one that says the same, or has more methods, seeds or orders besides."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from alula.config import MethodChoice, Recipe, read_recipe
from alula.errors import UserError
from alula.files import read_json

ABSENT = "not given"


def refuse_other(recipe: Recipe, kept: Path) -> None:
    """Refuses to go on where the recipe in the file `kept` says something else than `recipe`.

    By meaning, not by letter: a key that a newer alula knows, at its default, changes nothing. What is added changes nothing of the
    cells that are there: each has a folder and an identity of its own.

    Raises:
        UserError: with the first key that differs.
    """
    try:
        before = read_recipe(kept)
    except UserError as error:
        raise UserError(f"{error} It says what the run in {kept.parent} is: restore it, or delete the folder.") from error
    if change := next(_changes(before, recipe), ""):
        raise UserError(
            f"{kept.parent} holds a run of another recipe (see {kept}): {change}. Methods and seeds may be added, and orders after the "
            "others. Continue it with the same recipe otherwise, choose another --out folder, or delete this one if nothing in it counts."
        )


def refuse_other_weights(digests: Mapping[str, str], kept: Path) -> None:
    """Refuses to go on with a file whose digest is another one than in `kept`; what is not noted there, as by older runs, is taken.

    Raises:
        UserError: with the first such file.
    """
    before = read_json(kept) if kept.exists() else {}
    for name, digest in digests.items():
        if before.get(name, digest) != digest:
            raise UserError(
                f"{kept.parent} holds a run that began with another {name} (see {kept}): it was written anew since. Put the former file "
                "back, or choose another --out folder."
            )


def _changes(kept: Recipe, recipe: Recipe) -> Iterator[str]:
    """What of `kept` is not so in `recipe`, key by key in the order of a recipe."""
    before, now = (one.model_dump(mode="json", by_alias=True) for one in (kept, recipe))
    for key in before:
        if key == "methods":
            yield from _lost_methods(kept, recipe)
        elif key == "seeds":
            yield from (f"seeds lacks {seed}" for seed in kept.seeds if seed not in recipe.seeds)
        elif key == "orders":
            first, second = (one.orders or [one.order(0)] for one in (kept, recipe))
            yield from _differences(first, second[: len(first)], key)
        else:
            yield from _differences(before[key], now[key], key)


def _lost_methods(kept: Recipe, recipe: Recipe) -> Iterator[str]:
    """Methods by the names of their folders; each may run more orders than before."""
    named = {choice.shown: choice for choice in recipe.methods}
    for choice in kept.methods:
        place = f"methods.{choice.shown}"
        if choice.shown not in named:
            yield f"{place} is missing"
            continue
        yield from _differences(_said(choice), _said(named[choice.shown]), place)
        orders = recipe.orders_of(named[choice.shown])
        yield from (f"{place}.orders lacks {number}" for number in kept.orders_of(choice) if number not in orders)


def _said(choice: MethodChoice) -> dict[str, Any]:
    return choice.model_dump(mode="json", by_alias=True, exclude={"label", "orders"})


def _differences(before: Any, now: Any, place: str) -> Iterator[str]:
    """Each place below `place` where two plain values differ, with both."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            yield from _differences(before.get(key, ABSENT), now.get(key, ABSENT), f"{place}.{key}")
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for number, pair in enumerate(zip(before, now, strict=True)):
            yield from _differences(*pair, f"{place}.{number}")
    elif before != now:
        yield f"{place} was {_shown(before)}, is {_shown(now)}"


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
