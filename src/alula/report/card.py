"""The page that a pool shows on the Hugging Face hub: what it can do, what was lost, how to use it. It reads JSON only."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from alula.errors import UserError
from alula.files import write_text
from alula.pool.manifest import read_manifest
from alula.report.format import show
from alula.report.pool_page import Measured, moments

CARD = "README.md"
YOURS = "<!-- alula leaves what stands below this line as it is -->"
HOW_TO_READ = """Points from 0 to 100 on `n` test samples; bits per byte, where the metric says so, are better when lower.
*Before*: the model with the pool as it was. *Right after*: with this task learnt. *Now*: the last evaluation of the whole pool,
which is told no task. *Forgotten*: what was lost since, on the same samples; below zero is a gain. A dash was not measured:
`alula eval` measures it."""
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
TAGS = ("alula", "lora", "peft", "continual-learning", "mixture-of-experts")


def write_card(folder: Path | str, *, repo: str | None = None, license: str | None = None) -> Path:
    """Writes the pool's ``README.md`` anew and gives its path; keys of its head that are not ours, and what its owner wrote below, stay.

    Args:
        repo: where it will be on the hub (``owner/name``), for the lines to copy; None: the folder's name.
        license: as the hub names them (``apache-2.0``); None: the one that stands there, else ``unknown``.

    Raises:
        UserError: no pool there, or a head that is no YAML.
    """
    home, page = Path(folder), Path(folder) / CARD
    manifest = read_manifest(home)
    former = page.read_text(encoding="utf-8") if page.exists() else ""
    head = _former_head(former, page) | _head(manifest)
    head["license"] = license or head.get("license", "unknown")
    below = former.partition(YOURS)[2].strip()
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---",
        *_body(home, manifest, repo or _plain(home.resolve().name)),
    ]
    write_text(page, "\n\n".join([*parts, YOURS, *([below] if below else [])]) + "\n")
    return page


def _former_head(text: str, page: Path) -> dict[str, Any]:
    found = re.match(r"---\n(.*?)\n?---\n", text, flags=re.DOTALL)
    try:
        head = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError as error:
        raise UserError(f"{page}: what stands between the first two '---' is no YAML. Correct it, or remove the file.") from error
    return head if isinstance(head, dict) else {}


def _head(manifest: Mapping[str, Any]) -> dict[str, Any]:
    base = manifest["base"]["name"]
    known = {"base_model": [base], "base_model_relation": "adapter"} if HUB_NAME.fullmatch(base) else {}
    return {**known, "library_name": "alula", "pipeline_tag": "image-text-to-text", "tags": list(TAGS)}


def _body(home: Path, manifest: Mapping[str, Any], repo: str) -> list[str]:
    entries, base = manifest["experts"] or manifest["learners"], _plain(manifest["base"]["name"])
    what = "experts" if manifest["experts"] or not entries else "learners"
    tasks = f"{len(entries)} task{'' if len(entries) == 1 else 's'}"
    parts = [
        f"# {_plain(repo.rpartition('/')[2])}",
        f"What `{base}` learnt in {tasks}, one after another, each without the data of the others: a pool of {what} made with alula.",
        "## What it can do, and what was lost",
        _table(home, entries),
        HOW_TO_READ,
        "## How to use it",
        f'```bash\nalula generate --pool {repo} --image picture.png "What is this?"\n```',
    ]
    if manifest["experts"]:
        name = manifest["experts"][0]["name"]
        alone = f'PeftModel.from_pretrained(base, "{repo}", subfolder="experts/{name}")'
        parts += [
            "Each expert is also a PEFT adapter, without the routing:",
            f"```python\nfrom peft import PeftModel\n\nmodel = {alone}\n```",
        ]
    fingerprint = manifest["base"]["fingerprint"][:12]
    return [*parts, f"It fits the base model with fingerprint `{fingerprint}` alone; alula refuses any other."]


def _table(home: Path, entries: list[dict[str, Any]]) -> str:
    lines = ["| Task | Added | Before | Right after | Now | Forgotten | n | Metric |", "|---|---|---:|---:|---:|---:|---:|---|"]
    for entry in entries:
        about, (_, after, now) = entry.get("about", {}), moments(home, entry["name"])
        is_bits = about.get("metric") == "bits_per_byte"
        numbers = [
            _number(value, is_bits=is_bits) for value in (about.get("before"), about.get("after"), now.score, _lost(after, now, is_bits))
        ]
        count, metric = about.get("test_samples"), _plain(str(about.get("metric") or "–")).replace("_", " ")
        lines.append(f"| {entry['name']} | {_plain(entry.get('added', ''))} | {' | '.join(numbers)} | {count or '–'} | {metric} |")
    return "\n".join(lines)


def _lost(after: Measured, now: Measured, is_bits: bool) -> float | None:
    """Only on the same samples."""
    if after.score is None or now.score is None or after.ids != now.ids:
        return None
    return now.score - after.score if is_bits else after.score - now.score


def _number(value: float | None, *, is_bits: bool) -> str:
    return show(None) if value is None else show(value if is_bits else 100 * value, digits=3 if is_bits else 1)


def _plain(text: str) -> str:
    """A line that Markdown and HTML take as it is."""
    return re.sub(r"[^\w ./:@+,=-]", "_", text)
