"""What a harness found, as rows for a table and as files. It knows no harness and no model."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from alula.files import write_json, write_jsonl

KEPT = ("results", "groups", "configs", "versions", "n-shot", "n-samples", "higher_is_better")
"""What is kept of the harness's own answer, under its own names."""


def summary(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each task and metric: value, standard error (None where the harness gives none) and number of samples."""
    rows = []
    for task, metrics in found["results"].items():
        for key, value in metrics.items():
            name, comma, filtered = key.partition(",")
            if not comma or "_stderr" in name or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{name}_stderr,{filtered}")
            label = name if filtered == "none" else f"{name} ({filtered})"
            number = found.get("n-samples", {}).get(task, {}).get("effective", metrics.get("sample_len"))
            is_known = isinstance(error, int | float) and math.isfinite(error)
            rows.append({"task": task, "metric": label, "value": value, "stderr": error if is_known else None, "num_samples": number})
    return rows


def write_results(found: Mapping[str, Any], folder: Path, *, harness: str, about: Mapping[str, Any]) -> None:
    """Writes ``<harness>.json``, and one ``<task>.jsonl`` with each sample's prompt, reference, output and score.

    The samples are rows that `alula gate` reads.
    """
    kept = {key: found[key] for key in KEPT if key in found}
    write_json(folder / f"{harness}.json", json.loads(json.dumps({"harness": harness, **about, **kept}, default=str)))
    for task, samples in found.get("samples", {}).items():
        filters = list(dict.fromkeys(sample["filter"] for sample in samples))
        for name in filters:
            rows = [row for sample in samples if sample["filter"] == name for row in _rows(task, sample)]
            write_jsonl(folder / f"{task if len(filters) == 1 else f'{task}-{name}'}.jsonl", rows)


def _rows(task: str, sample: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A sample as a prediction; none where its metrics are no number of this one sample."""
    arguments, said = sample["arguments"], sample["filtered_resps"]
    row = {"id": str(sample["doc_id"]), "task": task, "prompt": str(arguments[0][0]), "reference": str(sample["target"])}
    if "byte_perplexity" in sample:
        nats, size = sample["byte_perplexity"]
        bits = -float(nats) / math.log(2)
        yield {**row, "output": "", "score": bits / size, "loss_bits": bits, "bytes": int(size)}
        return
    if len(arguments) > 1:  # ranked: (log-likelihood, is greedy) for each option
        options = [str(each[1]).strip() for each in arguments]
        best = max(range(len(said)), key=lambda i: float(said[i][0]))
        is_index = isinstance(sample["target"], int) and 0 <= sample["target"] < len(options)
        row |= {"output": options[best], "options": options} | ({"reference": options[sample["target"]]} if is_index else {})
    else:
        row["output"] = str(said[0])
    scores = [float(sample[name]) for name in sample["metrics"] if isinstance(sample[name], int | float)]
    if scores:
        yield {**row, "score": scores[0]}
