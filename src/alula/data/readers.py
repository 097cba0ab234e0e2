"""Data files to samples and tasks. It knows files and lines; what a row means is known by `formats`."""

import hashlib
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from alula.data.formats import sample_from_row
from alula.data.sample import Sample
from alula.data.stream import Task
from alula.errors import UserError

ENDINGS = (".jsonl", ".json", ".parquet")


def read_samples(path: Path | str, *, image_root: Path | str | None = None) -> list[Sample]:
    """The samples of one file; each knows its line as `origin` (``file.jsonl:12``).

    Rows may differ in form: LLaVA (``conversations``), OpenAI or LLaMA-Factory (``messages``), TRL (``prompt`` and
    ``completion``), FineVision (``texts``), ``question`` and ``answer``, or running ``text``. Images are checked for
    existence, not opened: see `check_images`.

    Args:
        path: .jsonl (one object a line), .json (a list of objects) or .parquet (line = row number from 1).
        image_root: folder that relative image paths start at; None: the folder of `path`.

    Raises:
        UserError: no such file, another ending, no rows, or a row that cannot be used (its line is named).
    """
    path = Path(path)
    root = path.parent if image_root is None else Path(image_root)
    samples = [
        sample_from_row(_checked(row, f"{path.name}:{line}"), origin=f"{path.name}:{line}", image_root=root) for line, row in _rows(path)
    ]
    if not samples:
        raise UserError(f"{path} holds no rows. At least one is wanted: check that it was written to the end.")
    return samples


def read_task(
    name: str,
    path: Path | str,
    *,
    test_path: Path | str | None = None,
    test_ratio: float = 0.1,
    scoring: str = "exact_match",
    seed: int = 0,
    image_root: Path | str | None = None,
    max_new_tokens: int | None = None,
) -> Task:
    """A task from one file (split here), two files, or a folder that holds ``train`` and perhaps ``test``.

    The split hashes what samples say: it is the same on every machine and in every order of the rows, and samples that
    are equal or share an id fall on the same side.

    Args:
        path: a data file, or a folder with ``train.jsonl`` and perhaps ``test.jsonl`` (also .json and .parquet).
        test_path: the file with the test samples; None: they are split off.
        test_ratio: 0-1, the share split off where there is no test file.
        scoring: as in `Task`.
        seed: gives another split.
        image_root: as in `read_samples`.
        max_new_tokens: tokens; as in `Task`. None: room for the longest test answer.

    Raises:
        UserError: as `read_samples`; too few samples to split; a ratio outside 0-1; the same sample in both files.
    """
    path = Path(path)
    if path.is_dir():
        test_path = test_path or next(iter(_split_files(path, "test")), None)
        path = _train_file(path)
    samples = read_samples(path, image_root=image_root)
    if test_path is None:
        train, test = _split(samples, test_ratio=test_ratio, seed=seed)
    else:
        train, test = samples, read_samples(test_path, image_root=image_root)
        _refuse_shared(train, test)
    return Task(name=name, train=train, test=test, scoring=scoring, max_new_tokens=max_new_tokens or _room_for(test))


def read_test(name: str, path: Path | str, *, scoring: str = "exact_match", image_root: Path | str | None = None) -> Task:
    """A task to score, not to learn: all rows of a file are its test samples.

    Raises:
        UserError: as `read_samples`.
    """
    samples = read_samples(path, image_root=image_root)
    return Task(name=name, train=(), test=samples, scoring=scoring, max_new_tokens=_room_for(samples))


def _room_for(samples: Sequence[Sample]) -> int:
    """Tokens for the longest answer: byte-level tokenizers need at worst about .7 a byte (Japanese, Urdu), less elsewhere."""
    longest = max((len(sample.answer.encode()) for sample in samples), default=0)
    return max(12, int(longest * 0.75) + 2)


def check_images(samples: Sequence[Sample]) -> None:
    """Opens every image once, with a progress bar on a terminal.

    Raises:
        UserError: images are missing or broken; the first ten are named.
    """
    from rich.console import Console
    from rich.progress import track

    broken: list[str] = []
    is_hidden = not sys.stderr.isatty()
    for sample in track(samples, "Opening images", console=Console(stderr=True), transient=True, disable=is_hidden):
        try:
            sample.open_images()
        except UserError as error:
            broken.append(str(error))
    if broken:
        more = f"\n... and {len(broken) - 10} more." if len(broken) > 10 else ""
        raise UserError(f"{len(broken)} of {len(samples)} samples have broken images:\n" + "\n".join(broken[:10]) + more)


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(line, row) pairs."""
    if path.suffix not in ENDINGS:
        raise UserError(f"{path}: unknown ending '{path.suffix}'. Known: {', '.join(ENDINGS)}. Convert the file.")
    if not path.is_file():
        raise UserError(f"No file {path}. Check the path; relative paths start at {Path.cwd()}.")
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    try:
        text = path.read_text(encoding="utf-8-sig")  # Excel and PowerShell put a byte order mark in front
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Cannot read {path}: {error}. A UTF-8 text file is wanted.") from error
    return _listed_rows(path, text) if text.lstrip().startswith("[") else _line_rows(path, text)


def _line_rows(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    # Not str.splitlines: it also splits at U+2028 and others, which JSON strings may hold as they are.
    for line, row in enumerate(text.split("\n"), start=1):
        if row.strip():
            try:
                yield line, json.loads(row)
            except json.JSONDecodeError as error:
                raise _not_json(path, line, error) from error


def _listed_rows(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """The items of a JSON list one by one, because a parsed list no longer knows its lines."""
    decoder = json.JSONDecoder()
    at, line, counted = _skip(text, text.index("[") + 1), 1, 0
    while not text.startswith("]", at):
        line, counted = line + text.count("\n", counted, at), at
        try:
            row, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise _not_json(path, error.lineno, error) from error
        yield line, row
        at = _skip(text, at)
        if text.startswith(",", at):
            at = _skip(text, at + 1)
        elif not text.startswith("]", at):
            line += text.count("\n", counted, at)
            raise UserError(f"{path}:{line}: the list ends too early or lacks a comma. Write the file again, whole.")


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _not_json(path: Path, line: int, error: json.JSONDecodeError) -> UserError:
    return UserError(f"{path}:{line}: not valid JSON ({error.msg}). Correct the line, or write the file again.")


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as table:
            batches = table.iter_batches(batch_size=1024)
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
    except (ArrowException, OSError) as error:
        raise UserError(f"{path} is not a whole parquet file ({error}). Download or write it again.") from error


def _checked(row: Any, origin: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{origin}: a {type(row).__name__} came, an object with keys is wanted. Correct the line.")
    return row


def _split_files(folder: Path, split: str) -> list[Path]:
    found = [folder / f"{split}{ending}" for ending in ENDINGS if (folder / f"{split}{ending}").is_file()]
    if len(found) > 1:
        raise UserError(f"{folder} holds {', '.join(path.name for path in found)}. Keep one of them, or name the file.")
    return found


def _train_file(folder: Path) -> Path:
    found = _split_files(folder, "train")
    if not found:
        wanted = ", ".join(f"train{ending}" for ending in ENDINGS)
        raise UserError(f"{folder} holds none of {wanted}. Name the data file itself, or rename it.")
    return found[0]


def _content_key(sample: Sample) -> str:
    """A hash of what `sample` says and shows; image files count by name, so a moved folder changes nothing."""
    digest = hashlib.sha256()
    for message in sample.messages:
        digest.update(f"{message.role}\0{message.content}\0".encode())
    for source in sample.images:
        if isinstance(source, Path):
            digest.update(source.name.encode())
        else:
            digest.update(source if isinstance(source, bytes) else source.tobytes())
        digest.update(b"\0")
    return digest.hexdigest()


def _groups(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Samples that must stay on one side: linked by equal content or an equal id."""
    leader: dict[str, str] = {}

    def find(key: str) -> str:
        while leader.setdefault(key, key) != key:
            leader[key] = key = leader[leader[key]]
        return key

    keys = [(f"content {_content_key(sample)}", f"id {sample.id}") for sample in samples]
    for content, identity in keys:
        low, high = sorted((find(content), find(identity)))
        leader[high] = low  # the lowest key leads, whatever the order of the rows: a content key where there is one
    groups: defaultdict[str, list[Sample]] = defaultdict(list)
    for sample, (content, _) in zip(samples, keys, strict=True):
        groups[find(content)].append(sample)
    return [groups[key] for key in sorted(groups)]


def _split(samples: list[Sample], *, test_ratio: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    if not 0 < test_ratio < 1:
        raise UserError(f"test_ratio is {test_ratio}, a number between 0 and 1 is wanted. The default is 0.1.")
    groups = _groups(samples)
    if len(groups) < 2:
        raise UserError(
            f"{samples[0].origin}: {len(samples)} samples that are all equal or share one id cannot be split. "
            "Add samples, correct the ids, or give test_path."
        )
    place = {id(group): _place(group, seed) for group in groups}
    ordered = sorted(groups, key=lambda group: place[id(group)])
    count = sum(place[id(group)] < test_ratio for group in ordered)
    count = min(max(count, 1), len(ordered) - 1)  # neither side may be empty
    in_test = {id(sample) for group in ordered[:count] for sample in group}
    train = [sample for sample in samples if id(sample) not in in_test]
    return train, [sample for sample in samples if id(sample) in in_test]


def _place(group: Iterable[Sample], seed: int) -> float:
    """A number in 0-1 that only the group's first content key and `seed` decide."""
    key = min(_content_key(sample) for sample in group)
    return int.from_bytes(hashlib.sha256(f"{seed} {key}".encode()).digest()[:8]) / 2**64


def _refuse_shared(train: Sequence[Sample], test: Sequence[Sample]) -> None:
    learnt = {_content_key(sample): sample for sample in train}
    shared = [(learnt[key], sample) for sample in test if (key := _content_key(sample)) in learnt]
    if shared:
        first, second = shared[0]
        raise UserError(
            f"{second.origin}: this test sample is also a training sample ({first.origin}); {len(shared)} are. "
            "A score on them would measure memory: drop them from one of the files."
        )
