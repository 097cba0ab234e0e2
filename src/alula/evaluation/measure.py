"""What a measure is: one number that sums up a score matrix, with its formula, its sign, its unit and its source.

`MEASURES` is filled by `alula.evaluation.measures`: import it from there.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from jaxtyping import Float, Int

Rows = Float[np.ndarray, "*resamples rows tasks"]
Columns = Int[np.ndarray, " columns"]
Values = Float[np.ndarray, "*resamples"]
Reference = Float[np.ndarray, "*resamples tasks"]
Function = TypeVar("Function", bound=Callable[..., Values])

OVER = {
    "tasks": "tasks learnt so far, scored from 0 to 1",
    "earlier": "the same without the one learnt last",
    "later": "the same without the one learnt first",
    "base": "base tasks scored from 0 to 1",
    "base_ranked": "base tasks whose options are ranked",
    "base_generated": "base tasks whose answer is generated",
    "base_bits": "base tasks in bits per byte",
    "answers": "answers on the tasks learnt so far",
}
"""Which columns a measure gets."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One number that sums up a score matrix.

    Attributes:
        formula: T is the number of tasks learnt, j a task, b a base task.
        meaning: the definition in words.
        over: a key of `OVER`.
        against: the series that `function` takes as its third argument, ``joint`` or ``specialist``; empty for none.
        unit: ``points`` (a hundredth of a score), ``bits`` (a byte of prose) or ``%``.
        is_signed: a difference whose plus is worth showing.
        also_called: names of the same number elsewhere.
        function: takes rows and columns; for ``answers`` the unparsed and all answers of each task.
    """

    name: str
    label: str
    formula: str
    higher_is_better: bool
    meaning: str
    source: str
    over: str
    against: str
    unit: str
    is_signed: bool
    also_called: tuple[str, ...]
    function: Callable[..., Values]

    @property
    def better(self) -> str:
        """``higher`` or ``lower``."""
        return "higher" if self.higher_is_better else "lower"

    @property
    def scale(self) -> float:
        """What a value is multiplied with to be shown in `unit`."""
        return 1.0 if self.unit == "bits" else 100.0


MEASURES: dict[str, Measure] = {}
"""Every measure, in the order of this file."""


def measure(
    label: str,
    formula: str,
    *,
    better: str,
    over: str = "tasks",
    against: str = "",
    unit: str = "points",
    is_signed: bool = False,
    also_called: tuple[str, ...] = (),
) -> Callable[[Function], Function]:
    """A decorator that enters a function in `MEASURES` under its name; see `Measure`."""
    assert better in ("higher", "lower") and over in OVER, (better, over)

    def enter(function: Function) -> Function:
        name = function.__name__
        assert name not in MEASURES, f"measure '{name}' is there twice"
        paragraphs = [" ".join(part.split()) for part in (inspect.getdoc(function) or "").split("\n\n")]
        source = next((part.removeprefix("Source: ").rstrip(".") for part in paragraphs if part.startswith("Source: ")), "")
        MEASURES[name] = Measure(
            name=name, label=label, formula=formula, higher_is_better=better == "higher", meaning=paragraphs[0], source=source, over=over,
            against=against, unit=unit, is_signed=is_signed, also_called=also_called, function=function,
        )  # fmt: skip
        return function

    return enter
