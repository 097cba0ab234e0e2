"""Data files and data sets to samples and tasks. It knows paths; rows are known by `forms`, files by `formats`."""

import glob
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from alula.data.boxes import check_boxes
from alula.data.formats import Line, find_format, read_lines
from alula.data.formats.class_labels import with_names
from alula.data.formats.saved_dataset import MARKER, SPLITS
from alula.data.formats.table import endings
from alula.data.forms import sample_from_row
from alula.data.images import image_roots
from alula.data.sample import BadRow, Sample
from alula.data.splitting import refuse_shared, split
from alula.data.stream import Task
from alula.data.views import Rows
from alula.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    Readable: TypeAlias = "Path | str | Dataset | IterableDataset"

Filled = TypeVar("Filled", bound=Sequence[Sample])


def read_samples(source: "Readable", *, image_root: Path | str | None = None, format: str | None = None) -> Sequence[Sample]:
    """The samples of one file, of its shards, or of a data set; each knows its line as `origin` (``file.jsonl:12``).

    Rows may differ in form: LLaVA and ShareGPT (``conversations``), OpenAI or LLaMA-Factory (``messages``), TRL (``prompt``
    and ``completion``), FineVision (``texts``), CoIN (``text`` and ``answer``), ``question`` and ``answer``, or running
    ``text``. Images are checked for existence, not opened: see `check_images`.

    Args:
        source: .jsonl (one object a line), .json (a list of objects), .parquet, a WebDataset .tar, a folder that
            ``save_to_disk`` wrote, several of one kind (``shards/train-*.tar``), or a data set of the ``datasets`` library.
            The rows of a ``Dataset`` stay where they are until they are needed; all others are kept in memory.
        image_root: folder that relative image paths start at; None: the folder of the file, else the first of the places
            where CoIN and UCIT keep images.
        format: a name of `FORMATS`, for a file whose ending does not tell.

    Raises:
        UserError: no such file, another format, no rows, or a row that cannot be used (its line is named).
    """
    if not isinstance(source, str | Path):
        found = _opened(source, image_root)
        return found if isinstance(found, Rows) else _filled(list(found), "The data set")
    path = Path(source)
    if path.is_dir() and (stored := find_format(path, name=format).open(path)) is not None:
        return _rows_of(stored, path.name, image_roots(path / MARKER, root=image_root))
    return _filled(list(stream_samples(path, image_root=image_root, format=format)), str(path))


def stream_samples(source: "Readable", *, image_root: Path | str | None = None, format: str | None = None) -> Iterator[Sample]:
    """The samples one after another, of which none is kept: for data that is larger than memory.

    Args:
        source: as in `read_samples`; an ``IterableDataset`` may have no end.
        image_root: as in `read_samples`.
        format: as in `read_samples`.

    Raises:
        UserError: as `read_samples`, when the row is reached.
    """
    if not isinstance(source, str | Path):
        yield from _opened(source, image_root)
        return
    for path in find_shards(source):
        roots = image_roots(path, root=image_root)
        for line in read_lines(path, format=format):
            yield sample_of(line, roots)


def sample_of(line: Line, roots: Sequence[Path]) -> Sample:
    """The sample of one line.

    Raises:
        BadRow: the line cannot be read, or holds no row that can be learnt from.
    """
    if isinstance(line.row, BadRow):
        raise line.row
    if not isinstance(line.row, dict):
        raise BadRow(f"{line.origin}: a {type(line.row).__name__} came, an object with keys is wanted. Correct the line.")
    return sample_from_row(line.row, origin=line.origin, roots=roots)


def read_task(
    name: str,
    path: "Readable",
    *,
    test_path: Path | str | None = None,
    test_ratio: float = 0.1,
    scoring: str = "exact_match",
    seed: int = 0,
    image_root: Path | str | None = None,
    max_new_tokens: int | None = None,
    format: str | None = None,
) -> Task:
    """A task from one file (split here), two files, or a folder that holds ``train`` and perhaps ``test``.

    The split hashes what samples say and show: it is the same on every machine and in every order of the rows, and samples that
    are equal or share an id fall on the same side.

    Args:
        path: what `read_samples` takes, or a folder as `find_splits` describes it.
        test_path: where the test samples are; None: they are split off.
        test_ratio: 0-1, the share split off where there is no test file.
        scoring: as in `Task`.
        seed: gives another split.
        image_root: as in `read_samples`.
        max_new_tokens: tokens; as in `Task`. None: room for the longest test answer.
        format: as in `read_samples`.

    Raises:
        UserError: as `read_samples`; too few samples to split; a ratio outside 0-1; the same sample in both files;
            answers that are no boxes where boxes are scored.
    """
    if isinstance(path, str | Path) and Path(path).is_dir():
        path, found = find_splits(path)
        test_path = test_path or found
    samples = read_samples(path, image_root=image_root, format=format)
    if test_path is None:
        train, test = split(samples, test_ratio=test_ratio, seed=seed)
    else:
        train, test = samples, read_samples(test_path, image_root=image_root, format=format)
        refuse_shared(train, test)
    if scoring == "box_iou":
        check_boxes(train, others_allowed=True)
    return Task(name=name, train=train, test=test, scoring=scoring, max_new_tokens=max_new_tokens or room_for(test))


def read_test(
    name: str, path: "Readable", *, scoring: str = "exact_match", image_root: Path | str | None = None, format: str | None = None
) -> Task:
    """A task to score, not to learn: all rows of a file are its test samples.

    Raises:
        UserError: as `read_samples`.
    """
    samples = read_samples(path, image_root=image_root, format=format)
    return Task(name=name, train=(), test=samples, scoring=scoring, max_new_tokens=room_for(samples))


def room_for(samples: Sequence[Sample]) -> int:
    """Tokens for the longest answer and its end."""
    return max(12, max(map(_most_tokens, samples), default=0) + 2)


def _most_tokens(sample: Sample) -> int:
    """Of the answer: byte-level tokenizers need at worst about .7 a byte of words (Japanese, Urdu), and one for each digit or sign."""
    said = sample.answer
    return int(0.75 * len(said.encode()) + 0.25 * sum(not sign.isalpha() for sign in said))


def check_images(*parts: Sequence[Sample]) -> None:
    """Opens every image of every part once, with a progress bar on a terminal; no sample is kept.

    Raises:
        UserError: images are missing or broken; the first ten are named.
    """
    from rich.console import Console
    from rich.progress import track

    broken: list[str] = []
    is_hidden, count = not sys.stderr.isatty(), sum(map(len, parts))
    samples = (sample for part in parts for sample in part)
    for sample in track(samples, "Opening images", total=count, console=Console(stderr=True), transient=True, disable=is_hidden):
        try:
            sample.open_images()
        except UserError as error:
            broken.append(str(error))
    if broken:
        more = f"\n... and {len(broken) - 10} more." if len(broken) > 10 else ""
        raise UserError(f"{len(broken)} of {count} samples have broken images:\n" + "\n".join(broken[:10]) + more)


def find_shards(path: Path | str) -> list[Path]:
    """The files that `path` names, in the order of their names: one, or several where it holds ``*``, ``?`` or ``[``.

    Raises:
        UserError: no file fits.
    """
    pattern = str(path)
    if not glob.has_magic(pattern) or Path(path).exists():
        return [Path(path)]
    found = sorted(glob.glob(pattern, recursive=True))
    if not found:
        raise UserError(f"No file fits {pattern}. Check the path; relative paths start at {Path.cwd()}.")
    return [Path(name) for name in found]


def find_splits(folder: Path | str) -> tuple[str, str | None]:
    """Where the train rows of a folder are, and its test rows if there are any.

    ``train.jsonl`` and ``test.jsonl`` (or another ending); shards (``train-00000-of-00002.parquet``) or a name with a number
    (``test_3000.json`` of UCIT), in the folder or in ``data`` below it; or what ``DatasetDict.save_to_disk`` wrote. A folder
    that is one saved data set is its own train rows.

    Raises:
        UserError: there are none, or several of different endings.
    """
    folder = Path(folder)
    if (folder / MARKER).is_file():
        return str(folder), None
    if (folder / SPLITS).is_file():
        found = {split: str(folder / split) if (folder / split).is_dir() else None for split in ("train", "test")}
    else:
        found = {split: _split_pattern(folder, split) or _split_pattern(folder / "data", split) for split in ("train", "test")}
    if found["train"] is None:
        wanted = ", ".join(f"train{ending}" for ending in endings())
        raise UserError(f"{folder} holds none of {wanted}. Name the data file itself, or rename it.")
    return found["train"], found["test"]


def _split_pattern(folder: Path, split: str) -> str | None:
    whole = [folder / f"{split}{ending}" for ending in endings() if (folder / f"{split}{ending}").is_file()]
    if len(whole) > 1:
        raise UserError(f"{folder} holds {', '.join(path.name for path in whole)}. Keep one of them, or name the file.")
    if whole:
        return str(whole[0])
    kinds = sorted({path.suffix for path in folder.glob(f"{split}[-_][0-9]*") if path.name.endswith(endings())})
    if len(kinds) > 1:
        raise UserError(f"{folder} holds {split} files with the endings {', '.join(kinds)}. Keep one kind, or name the files.")
    return f"{glob.escape(str(folder))}/{split}[-_][0-9]*{kinds[0]}" if kinds else None


def _opened(dataset: Any, image_root: Path | str | None) -> "Rows | Iterator[Sample]":
    """The samples of a data set of the ``datasets`` library, which is there if somebody made one."""
    from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

    if isinstance(dataset, DatasetDict | IterableDatasetDict):
        raise UserError(f"A {type(dataset).__name__} came. One of its splits is wanted: {', '.join(map(str, dataset))}.")
    roots = image_roots(Path("dataset"), root=image_root)
    if isinstance(dataset, Dataset):
        return _rows_of(dataset, "dataset", roots)
    if not isinstance(dataset, IterableDataset):
        raise UserError(f"A {type(dataset).__name__} came. A path, a datasets.Dataset or a datasets.IterableDataset is wanted.")
    stored = dataset.decode(False) if dataset.features else dataset
    described = dataset.features.to_dict() if dataset.features else None
    return (_numbered(row, number, name="dataset", roots=roots, described=described) for number, row in enumerate(stored, start=1))


def _rows_of(dataset: "Dataset", name: str, roots: Sequence[Path]) -> Rows:
    stored = dataset if dataset.format["type"] == "custom" else dataset.with_format("arrow")  # custom: a transform of the user's
    found = Rows(stored, partial(_numbered, name=name, roots=roots, described=dataset.features.to_dict()))
    for _ in found:  # makes every sample once: a row that cannot be used is told now, not in the middle of the training
        pass
    return _filled(found, name)


def _numbered(row: dict[str, Any], number: int, *, name: str, roots: Sequence[Path], described: dict[str, Any] | None) -> Sample:
    return sample_of(Line(origin=f"{name}:{number}", row=with_names(row, described)), roots)


def _filled(samples: Filled, name: str) -> Filled:
    if not samples:
        raise UserError(f"{name} holds no rows. At least one is wanted: check that it was written to the end.")
    return samples
