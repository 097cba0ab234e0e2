"""What is wrong with a data set, row by row, as one model's processor sees it. It changes nothing and stops at no mistake."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from transformers import ProcessorMixin

from alula.data.collate import Collator
from alula.data.forecast import DecoderShape, RowForecast
from alula.data.formats import read_lines
from alula.data.images import image_roots
from alula.data.origins import shortest_names
from alula.data.readers import find_shards, find_splits, sample_of
from alula.data.sample import PLACEHOLDER, BadRow, Sample
from alula.errors import UserError, counted

PERCENTILES = (50, 90, 99, 100)
NUM_LONGEST = 3


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        level: an error stops a training, a warning does not.
        kind: by which findings are counted.
        origin: ``file.jsonl:12``, with the folders that tell it from another file of that name.
        message: what came, what is accepted, what to do.
    """

    level: Literal["error", "warning"]
    kind: str
    origin: str
    message: str


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row that can be learnt from, in numbers.

    Attributes:
        text: tokens without those of images.
        visual: tokens of images.
        tokens: of the whole row.
        content: a hash of what it says and of its pictures' pixels.
        pictures: hashes of the pictures' pixels.
    """

    origin: str
    text: int
    visual: int
    tokens: int
    content: str
    pictures: tuple[str, ...]


@dataclass(kw_only=True)
class FileReport:
    """What one file holds: all its rows, and those that can be learnt from."""

    name: str
    split: Literal["train", "test"]
    num_rows: int = 0
    rows: list[Row] = field(default_factory=list)


@dataclass(kw_only=True)
class Examination:
    """All that was found.

    Attributes:
        max_length: tokens; the longest row allowed, if anything limits it.
        batch_bytes: of a batch of the longest rows, see `DecoderShape.batch_bytes`; None where the decoder is not known.
        usual_batch_bytes: of a batch of rows of which nine in ten are no longer.
    """

    batch_size: int
    max_length: int | None = None
    batch_bytes: int | None = None
    usual_batch_bytes: int | None = None
    files: list[FileReport] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def rows(self) -> list[Row]:
        """The rows of all files that can be learnt from."""
        return [row for file in self.files for row in file.rows]

    @property
    def is_sound(self) -> bool:
        """Whether nothing would stop a training."""
        return not any(finding.level == "error" for finding in self.findings)

    @property
    def counts(self) -> dict[tuple[str, str], int]:
        """Findings by level and kind, errors first."""
        return dict(sorted(Counter((finding.level, finding.kind) for finding in self.findings).items()))

    @property
    def lengths(self) -> dict[str, dict[int, int]]:
        """Percentiles (50, 90, 99, 100) of text tokens, visual tokens and whole rows."""
        return {name: _percentiles([getattr(row, name) for row in self.rows]) for name in ("text", "visual", "tokens")}

    @property
    def longest(self) -> list[Row]:
        """The longest rows, which decide the memory of their batches."""
        return sorted(self.rows, key=lambda row: -row.tokens)[:NUM_LONGEST]

    def as_json(self) -> dict[str, Any]:
        """Everything but single rows."""
        return {
            "sound": self.is_sound,
            "files": [{"name": file.name, "split": file.split, "rows": file.num_rows, "usable": len(file.rows)} for file in self.files],
            "lengths": {name: {str(key): value for key, value in found.items()} for name, found in self.lengths.items()},
            "longest": [{"origin": row.origin, "tokens": row.tokens, "visual": row.visual} for row in self.longest],
            "batch": {"size": self.batch_size, "bytes": self.batch_bytes, "bytes_of_90_percent": self.usual_batch_bytes},
            "max_length": self.max_length,
            "findings": [vars(finding) for finding in self.findings],
        }


def examine(
    train: Sequence[Path | str],
    processor: ProcessorMixin,
    *,
    test: Path | str | None = None,
    max_length: int | None = None,
    batch_size: int = 16,
    shape: DecoderShape | None = None,
    image_root: Path | str | None = None,
    format: str | None = None,
    progress: Callable[[str], None] = lambda origin: None,
) -> Examination:
    """Reads every row, opens every image, renders every conversation, and counts tokens.

    Args:
        train: what `read_samples` takes as a path, or folders as `find_splits` describes them.
        max_length: tokens; the longest row allowed. None: as many as the decoder can read.
        batch_size: samples in one forward.
        shape: of the decoder; None: no memory is forecast.
        progress: is told the origin of each row.

    Raises:
        UserError: a folder holds no train rows, no file fits a pattern, or the processor can make no batch at all.
    """
    limit = max_length or (shape.max_tokens if shape else None)
    found = Examination(batch_size=batch_size, max_length=limit)
    reader = _Reader(Collator(processor), found, limit)
    files = list(_files(train, test))
    names = shortest_names([path for path, _ in files])
    for path, split in files:
        reader.read(path, split, name=names[path], image_root=image_root, format=format, progress=progress)
    reader.check_probes()
    found.findings += _repeated(found.files)
    if shape and found.rows:
        found.batch_bytes = shape.batch_bytes(batch_size, found.lengths["tokens"][100])
        found.usual_batch_bytes = shape.batch_bytes(batch_size, found.lengths["tokens"][90])
    return found


def _files(train: Sequence[Path | str], test: Path | str | None) -> Iterator[tuple[Path, Literal["train", "test"]]]:
    """Each file with its split; a folder gives its own test rows, unless others are named."""
    tests = [test] if test is not None else []
    for path in train:
        if Path(path).is_dir():
            path, held_out = find_splits(path)
            tests += [held_out] if held_out and test is None else []
        yield from ((file, "train") for file in find_shards(path))
    yield from ((file, "test") for path in tests for file in find_shards(path))


class _Reader:
    """Reads files into an `Examination`."""

    def __init__(self, collator: Collator, found: Examination, max_length: int | None) -> None:
        self.collator = collator
        self.found = found
        self.max_length = max_length
        self.forecast = RowForecast(collator)
        self.image_token = getattr(collator.processor, "image_token", None)
        self.specials = sorted({*collator.tokenizer.all_special_tokens, self.image_token} - {None, PLACEHOLDER})
        self._probes: dict[int, tuple[Sample, Row]] = {}

    def read(
        self,
        path: Path,
        split: Literal["train", "test"],
        *,
        name: str,
        image_root: Path | str | None,
        format: str | None,
        progress: Callable[[str], None],
    ) -> None:
        """All rows of one file, which is called `name` in their origins."""
        file = FileReport(name=str(path), split=split)
        self.found.files.append(file)
        roots = image_roots(path, root=image_root)
        lines = read_lines(path, format=format)
        while True:
            try:
                line = next(lines, None)
            except UserError as error:  # the file ends here
                self._tell("error", "file", str(path), str(error))
                return
            if line is None:
                break
            line = replace(line, origin=name + line.origin.removeprefix(path.name))
            progress(line.origin)
            file.num_rows += 1
            try:
                sample = sample_of(line, roots)
                file.rows.append(self._measured(sample))
            except UserError as error:
                self._tell("error", getattr(error, "kind", "template"), line.origin, str(error))
        if file.num_rows == 0:
            self._tell("error", "file", str(path), f"{path} holds no rows. At least one is wanted: check that it was written to the end.")

    def _measured(self, sample: Sample) -> Row:
        self._check_words(sample)
        images = sample.open_images()
        text = self.forecast.text(sample)
        try:
            visual = self.forecast.visual([image.size for image in images])
        except UserError as error:
            raise BadRow(f"{sample.origin}: {error} Use another image, or drop the row.", kind="image size") from error
        tokens = text + visual
        pictures = tuple(hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest() for image in images)
        said = "\0".join(f"{message.role}\0{message.content}" for message in sample.messages)
        content = hashlib.sha256("\0".join((said, *pictures)).encode()).hexdigest()
        row = Row(origin=sample.origin, text=text, visual=visual, tokens=tokens, content=content, pictures=pictures)
        if self.max_length is not None and tokens > self.max_length:
            shorter = "Use smaller images" if visual > text else "Shorten it"
            came = f"{sample.origin}: {tokens} tokens ({visual} of images), and {self.max_length} are allowed."
            message = f"{came} Rows are never cut. {shorter}, or drop the row."
            self._tell("error", "too long", sample.origin, message)
        known = self._probes.setdefault(min(len(images), 2), (sample, row))
        if tokens > known[1].tokens:
            self._probes[min(len(images), 2)] = (sample, row)
        return row

    def _check_words(self, sample: Sample) -> None:
        """Words that the tokenizer reads as marks: the model's image mark breaks the batch, others end or open a turn."""
        text = "\n".join(message.content.replace(PLACEHOLDER, "") for message in sample.messages)
        for token in (token for token in self.specials if token in text):
            message = f"{sample.origin}: the text holds {token!r}, a token of this model that stands for something else. Take it out."
            if token == self.image_token:
                raise BadRow(message, kind="special token")
            self._tell("warning", "special token", sample.origin, message)

    def check_probes(self) -> None:
        """The longest row without images, with one and with several go through the processor; their forecast must hold."""
        for sample, row in self._probes.values():
            try:
                length = self.collator([sample])["input_ids"].shape[1]
            except UserError as error:
                self._tell("error", "processor", row.origin, str(error))
                continue
            if length != row.tokens:
                message = f"{row.origin}: {row.tokens} tokens were forecast, and the processor made {length}. Lengths are not exact."
                self._tell("warning", "forecast", row.origin, message)

    def _tell(self, level: Literal["error", "warning"], kind: str, origin: str, message: str) -> None:
        self.found.findings.append(Finding(level=level, kind=kind, origin=origin, message=message))


def _repeated(files: Sequence[FileReport]) -> Iterator[Finding]:
    """Rows that say and show the same: within a split they are learnt or counted twice, across splits a score is memory."""
    seen: dict[str, dict[str, str]] = {"train": {}, "test": {}}
    for file in files:
        for row in file.rows:
            first = seen[file.split].setdefault(row.content, row.origin)
            learnt = seen["train"].get(row.content) if file.split == "test" else None
            if learnt is not None:
                message = f"{row.origin}: this test row is also a training row ({learnt}). A score on it is memory: drop one of them."
                yield Finding(level="error", kind="in train and test", origin=row.origin, message=message)
            elif first != row.origin:
                message = f"{row.origin}: the same row as {first}. It counts twice: drop one, or give a blend a ratio instead."
                yield Finding(level="warning", kind="duplicate", origin=row.origin, message=message)
    learnt_pictures = {picture for file in files if file.split == "train" for row in file.rows for picture in row.pictures}
    others = [row for file in files if file.split == "test" for row in file.rows if row.content not in seen["train"]]
    tested = [row for row in others if learnt_pictures.intersection(row.pictures)]
    if tested:
        more = f" and {counted(len(tested) - 1, 'more test row')}" if len(tested) > 1 else ""
        message = f"{tested[0].origin}{more}: an image of train rows under another text. Check that this is meant."
        yield Finding(level="warning", kind="shared image", origin=tested[0].origin, message=message)


def _percentiles(values: list[int]) -> dict[int, int]:
    """Nearest-rank percentiles; zeros for no values."""
    ordered = sorted(values) or [0]
    return {percent: ordered[max(0, -(-len(ordered) * percent // 100) - 1)] for percent in PERCENTILES}
