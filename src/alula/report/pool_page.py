"""A pool folder becomes one HTML file: what the pool can do, and what the model could do before. It reads JSON only."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from alula.evaluation.bootstrap import Interval, bootstrap_interval, paired_interval
from alula.evaluation.scores import hash_of_all
from alula.files import read_jsonl
from alula.pool.manifest import inside, read_manifest
from alula.report.format import show, show_bytes, show_interval, show_time
from alula.report.page import write_page
from alula.report.prompts import SHOWN as HASH_SHOWN
from alula.report.sections import link_to

View = dict[str, object]
Rows = Sequence[dict]
SHOWN = 8
"""Answers per task that the page shows."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The predictions of one task at one moment: before it was learnt, right after, or in the last evaluation."""

    path: Path
    rows: Rows

    @property
    def values(self) -> list[float]:
        """The score of each sample."""
        return [float(row["score"]) for row in self.rows]

    @property
    def is_prose(self) -> bool:
        """In bits per byte, lower is better; otherwise a share of right answers."""
        return any("loss_bits" in row for row in self.rows)

    @property
    def score(self) -> float | None:
        """The mean over samples (over bytes for prose); None where there are none."""
        if not self.rows:
            return None
        if self.is_prose:
            return sum(row["loss_bits"] for row in self.rows) / max(sum(row["bytes"] for row in self.rows), 1)
        return float(np.mean(self.values))

    @property
    def ids(self) -> list[str]:
        """The samples, in order."""
        return [str(row["id"]) for row in self.rows]

    @property
    def prompts(self) -> str:
        """The hash of all prompts as the model read them; empty where it was not kept."""
        return hash_of_all(row.get("prompt_hash", "") for row in self.rows)


def build_pool_report(folder: Path | str, *, out: Path | str | None = None) -> Path:
    """Writes the report of a pool and gives its path.

    Scores "now" are those of the last ``alula eval`` into the pool's ``evaluation`` folder.

    Args:
        out: the HTML file; None for ``report.html`` in the pool.

    Raises:
        UserError: `folder` is not a pool, or `out` cannot be written.
    """
    home = Path(folder)
    page = Path(out) if out is not None else home / "report.html"
    return write_page(page, "pool.html.j2", pool_view(home, read_manifest(home), page))


def pool_view(home: Path, manifest: dict, page: Path) -> View:
    """Everything the template shows."""
    experts = manifest["experts"]
    names = [expert["name"] for expert in experts]
    evaluated = {path.stem: _measured(inside(path, root=home)) for path in sorted((home / "evaluation").glob("*.jsonl"))}
    prompts = [f"{name} {found.prompts[:HASH_SHOWN]}" for name, found in evaluated.items() if found.prompts]
    return {
        "title": home.resolve().name,
        "folder": str(home),
        "facts": [
            ("Base model", f"{manifest['base']['name']} (fingerprint {manifest['base']['fingerprint'][:12]})"),
            ("Experts", str(len(experts))),
            ("Chosen by", manifest["arm"]),
            ("Stored", show_bytes(sum(_size(home, name) for name in names))),
            *([("Prompts now (SHA-256)", ", ".join(prompts))] if prompts else []),
        ],
        "tasks": [_task_view(home, expert, page) for expert in experts],
        "others": [
            {"name": name, "now": _score_view(found, None, page)} for name, found in evaluated.items() if name not in names
        ],
        "answers": [found for name in names if (found := _answers(home, name))["rows"]],
    }  # fmt: skip


def _task_view(home: Path, expert: dict, page: Path) -> View:
    about, name = expert.get("about", {}), expert["name"]
    before, after, now = moments(home, name)
    return {
        "name": name,
        "added": expert.get("added", ""),
        "samples": about.get("samples", "–"),
        "before": _score_view(before, about.get("before"), page),
        "after": _score_view(after, about.get("after"), page),
        "now": _score_view(now, None, page),
        "learnt": _change_view(before, after),
        "kept": _change_view(after, now),
        "seconds": show_time(about.get("cost", {}).get("seconds")),
        "stored": show_bytes(_size(home, name)),
    }


def moments(home: Path, name: str) -> tuple[Measured, Measured, Measured]:
    """The predictions on one task: before learning, right after, and in the last evaluation.

    Raises:
        UserError: a file that leads out of the pool, or that holds no predictions.
    """
    folder = home / "experts" / name
    paths = (folder / "before.jsonl", folder / "predictions.jsonl", home / "evaluation" / f"{name}.jsonl")
    before, after, now = (_measured(inside(path, root=home)) for path in paths)
    return before, after, now


def _measured(path: Path) -> Measured:
    return Measured(path=path, rows=read_jsonl(path) if path.exists() else ())


def _score_view(found: Measured, noted: float | None, page: Path) -> View:
    """A score with its interval; the one `noted` in the manifest where the predictions are gone."""
    score = found.score if found.rows else noted
    scale, digits = (1.0, 3) if found.is_prose else (100.0, 1)
    if score is None:
        return {"text": show(None)}
    interval = None if found.is_prose else bootstrap_interval(found.values)
    return {
        "text": show(score * scale, digits=digits) + (" bits" if found.is_prose else ""),
        "interval": show_interval(interval),
        "samples": len(found.rows) or "–",
        "href": link_to(found.path, page) if found.rows else "",
    }


def _change_view(first: Measured, second: Measured) -> View:
    """Second minus first on the same prompts; better or worse only where the 95 % interval leaves out zero."""
    if not first.rows or first.ids != second.ids:
        return {"text": show(None), "kind": "empty"}
    if first.prompts and second.prompts and first.prompts != second.prompts:
        return {"text": "asked with another chat template", "kind": "empty"}
    change = (second.score or 0.0) - (first.score or 0.0)
    if second.is_prose:  # long samples weigh more: the interval of a plain mean would be another number's
        return {"text": show(change, digits=3, is_signed=True), "kind": "same"}
    interval: Interval | None = paired_interval(second.values, first.values)
    is_sure = interval is not None and interval.excludes(0.0)
    return {
        "text": show(change * 100, is_signed=True),
        "interval": show_interval(interval),
        "kind": ("better" if change > 0 else "worse") if is_sure else "same",
    }


def _answers(home: Path, name: str) -> View:
    """Some answers before, right after and now; those that changed come first."""
    before, after, now = ({str(row["id"]): row for row in found.rows} for found in moments(home, name))
    rows = [
        {
            "question": row["prompt"].replace("<image>", "").strip(),
            "reference": row["reference"],
            "answers": [_answer(found.get(key)) for found in (before, after, now)],
        }
        for key, row in after.items()
        if "loss_bits" not in row
    ]
    rows.sort(key=lambda row: len({answer["is_right"] for answer in row["answers"] if answer}) == 1)
    return {"task": name, "rows": rows[:SHOWN], "count": len(rows)}


def _answer(row: dict | None) -> View:
    return {} if row is None else {"text": row["output"] or "(nothing)", "is_right": row["score"] == 1}


def _size(home: Path, name: str) -> int:
    folder = home / "experts" / name
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
