"""Files that are either whole or absent: every write is atomic, every read says what is wrong with the file."""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from alula.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Json = dict | list | str | int | float | bool | None


@contextlib.contextmanager
def told_of(path: Path | str) -> Iterator[None]:
    """Turns the operating system's refusal to write `path` into a sentence.

    Raises:
        UserError: the disk is full or the folder cannot be written; `path` keeps its former content.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"Cannot write {path}: {error.strerror or error}. What was there before is unchanged. "
            "Free some space or choose another folder, then run the same command again."
        ) from error


@contextlib.contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place only if the block ends well.

    Raises:
        UserError: see `told_of`.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with told_of(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
            os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def clear_leftovers(folder: Path | str) -> None:
    """Deletes the half-written files that a killed process left in `folder`, where nobody else may be writing now."""
    for leftover in Path(folder).rglob(".*.part"):
        leftover.unlink(missing_ok=True)


def _write(path: Path | str, fill: Callable[[IO[str]], object]) -> None:
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as out:
        fill(out)


def write_text(path: Path | str, text: str) -> None:
    """Puts `text` into `path`, atomically."""
    _write(path, lambda out: out.write(text))


def write_json(path: Path | str, value: Json) -> None:
    """Puts `value` as indented JSON into `path`, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path | str, rows: Iterable[dict]) -> None:
    """Puts one JSON object a line into `path`, atomically."""
    _write(path, lambda out: out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_tensors(path: Path | str, tensors: "dict[str, Tensor]", *, metadata: dict[str, str] | None = None) -> None:
    """Puts `tensors` as safetensors into `path`, atomically."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    whole = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(whole, temporary, metadata=metadata)
            temporary.chmod(0o644)  # safetensors makes files that only their owner can read
        except SafetensorError as error:  # safetensors reports a full disk with its own class
            raise OSError(str(error)) from error


def _text(path: Path | str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"No file {path}. Check the path; relative paths start at {Path.cwd()}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Cannot read {path}: {error}. A UTF-8 text file is wanted.") from error


def _value(text: str, *, path: Path | str, number: int = 1, remedy: str) -> Any:
    """The JSON value in a text that starts at line `number` of `path`.

    Raises:
        UserError: it is none, is nested too deeply, or holds a number of thousands of digits.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        number, problem = number + error.lineno - 1, error.msg
    except RecursionError:
        problem = "it is nested too deeply"
    except ValueError as error:
        problem = str(error)
    raise UserError(f"{path}:{number}: not valid JSON ({problem}). {remedy}")


def read_json(path: Path | str) -> Any:
    """The JSON value in `path`, of whatever type was written there.

    Raises:
        UserError: no such file, or not JSON (with the line).
    """
    return _value(_text(path), path=path, remedy="The file may be half written: restore or delete it.")


def read_jsonl(path: Path | str) -> list[dict]:
    """One object per non-empty line of `path`.

    Raises:
        UserError: no such file, or a line that is not a JSON object (with its number).
    """
    rows: list[dict] = []
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        row = _value(line, path=path, number=number, remedy="One JSON object a line is wanted.")
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: a {type(row).__name__} came, one JSON object a line is wanted.")
        rows.append(row)
    return rows


def read_tensors(path: Path | str) -> "dict[str, Tensor]":
    """The tensors of a safetensors file, on the CPU.

    Raises:
        UserError: no such file, or a truncated or foreign file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"No file {path}. Check the path, or learn the task again.") from None
    except SafetensorError as error:
        raise UserError(
            f"{path} is not a whole safetensors file ({error}). It may be half written: delete it and use an earlier one."
        ) from error


def map_tensors(path: Path | str) -> "dict[str, Tensor]":
    """What `read_tensors` gives, as views of the mapped file: a page is read when somebody first looks at it.

    `read_tensors` touches every tensor, which makes most of a file of small ones resident. What is written into the views stays
    in memory and never reaches the file.

    Raises:
        UserError: no such file, or a truncated or foreign file.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    try:
        with safe_open(path, framework="pt") as found:
            places = [(key, found.get_slice(key)) for key in found.offset_keys()]
    except (FileNotFoundError, SafetensorError):
        return read_tensors(path)  # it says what is wrong
    if any(place.get_dtype() not in dtypes for _, place in places):
        return read_tensors(path)
    size = Path(path).stat().st_size
    content = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    tensors: dict[str, Tensor] = {}
    end = size
    for key, place in reversed(places):  # they fill the file up to its end, without gaps
        kind, shape = dtypes[place.get_dtype()], place.get_shape()
        start = end - math.prod(shape) * kind.itemsize
        if start % kind.itemsize:  # a writer that does not align its tensors
            return read_tensors(path)
        tensors[key], end = content[start:end].view(kind).view(shape), start
    return tensors


def sha256(path: Path | str) -> str:
    """The hex digest of a file's bytes."""
    with open(path, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
