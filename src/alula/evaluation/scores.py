"""What one answer is worth, and whether its form could be read at all. It knows no model."""

import hashlib
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alula.data.sample import Sample
from alula.data.stream import Task
from alula.errors import UserError

QUOTES = "\"'`´‘’‚“”„«»‹›「」『』"
FINAL_PUNCTUATION = ".,;:!?…。、।؟،؛"


def normalise(text: str) -> str:
    """`text` as it is compared: NFKC, case folded, single spaces, no quotes around it, no punctuation after it.

    Example:
        >>> normalise('  "Le  Chat." ')
        'le chat'
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    spaced = " ".join(folded.split())
    bare = spaced.strip(QUOTES + " ").rstrip(FINAL_PUNCTUATION + QUOTES + " ").lstrip(QUOTES + " ")
    return bare or spaced  # an answer that is nothing but punctuation stays itself


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A score from 0 to 1, whether the form of the answer could be read, and the IoU of a box."""

    score: float
    parsed: bool
    iou: float | None = None


def exact_match(output: str, references: Sequence[str], *, known_answers: Collection[str] | None = None, ended: bool = True) -> Scored:
    """1 where the normalised output equals a normalised reference, else 0.

    An answer is *unparsed* when its form could not be read. With a closed answer set that is every output that is none of
    the task's answers: empty, chatter, another language, the format of another task. With an open one it is an output that
    is empty, goes on over several lines, or reaches the token limit without an end.
    Source: SEFE (Chen et al. 2025, arXiv 2505.02486) calls losing the form *superficial forgetting*. Ours is the rule.

    Args:
        known_answers: every answer of the task, normalised (`closed_answers`); None where the set is open.
        ended: False when generation stopped at the token limit.
    """
    said = normalise(output)
    if said in {normalise(reference) for reference in references}:
        return Scored(score=1.0, parsed=True)
    if known_answers is not None:
        return Scored(score=0.0, parsed=said in known_answers)
    return Scored(score=0.0, parsed=bool(said) and ended and "\n" not in output.strip())


def closed_answers(task: Task) -> frozenset[str] | None:
    """Every normalised answer of the test samples of `task` (references and options), or None where the set is open.

    It is closed when at most half as many different answers as samples exist: naming one of twenty animals is closed,
    transcribing a word is open.
    """
    answers = {normalise(text) for sample in task.test for text in (*sample.references, *sample.options)}
    return frozenset(answers) if 2 * len(answers) <= len(task.test) else None


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One answer to one sample: a line of the predictions file.

    Attributes:
        score: 0 to 1; for ``bits_per_byte`` the bits of this sample's prose for each of its bytes (lower is better).
        parsed: whether the form of the answer could be read.
        options: the ranked options; empty when the answer was generated.
        loss_bits: bits; total over the targets of a prose sample.
        bytes: bytes; UTF-8 length of a prose sample.
        iou: 0 to 1; of the box that was said and the true one.
        prompt_hash: of what the model read, as its chat template wrote it (see `hash_of`); empty where that is not known.
    """

    id: str
    task: str
    prompt: str
    reference: str
    output: str
    score: float
    parsed: bool = True
    method: str = ""
    seed: int = 0
    options: tuple[str, ...] = ()
    loss_bits: float | None = None
    bytes: int | None = None
    iou: float | None = None
    prompt_hash: str = ""

    def as_row(self) -> dict[str, object]:
        """The prediction as one JSON object; what does not apply is left out."""
        row: dict[str, object] = {
            name: getattr(self, name) for name in ("id", "task", "prompt", "reference", "output", "score", "parsed", "method", "seed")
        }
        if self.options:
            row["options"] = list(self.options)
        if self.loss_bits is not None:
            row |= {"loss_bits": self.loss_bits, "bytes": self.bytes}
        if self.iou is not None:
            row["iou"] = self.iou
        if self.prompt_hash:
            row["prompt_hash"] = self.prompt_hash
        return row


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """The score of one task: one cell of the score matrix.

    Attributes:
        prompt_hash: of all its prompts, in any order; empty where one is not known. Scores with different ones do not compare.
    """

    score: float
    num_samples: int
    unparsed: int
    metric: str
    higher_is_better: bool
    prompt_hash: str = ""


def score_task(task: Task, predictions: Iterable[Prediction]) -> TaskScore:
    """The mean score of `predictions`; for prose all bits over all bytes, so that long samples weigh more."""
    rows = list(predictions)
    if task.scoring == "bits_per_byte":
        total = sum(row.loss_bits or 0.0 for row in rows) / max(sum(row.bytes or 0 for row in rows), 1)
    else:
        total = sum(row.score for row in rows) / max(len(rows), 1)
    return TaskScore(
        score=total,
        num_samples=len(rows),
        unparsed=sum(not row.parsed for row in rows),
        metric=task.scoring,
        higher_is_better=task.scoring != "bits_per_byte",
        prompt_hash=hash_of_all(row.prompt_hash for row in rows),
    )


def hash_of(text: str) -> str:
    """The first half of the SHA-256 of `text`, as 32 hex digits.

    Example:
        >>> hash_of("USER: Capital of Kenya? BOT:")
        '6a2d1aefdd85c16bb309bc0c3590fd68'
    """
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def hash_of_all(hashes: Iterable[str]) -> str:
    """One hash of several, whatever their order; empty where there is none, or one of them is."""
    found = sorted(hashes)
    return hash_of("\n".join(found)) if found and found[0] else ""


def check_prompts(task: str, first: Mapping[Any, Mapping[str, Any]], second: Mapping[Any, Mapping[str, Any]]) -> None:
    """Refuses to compare answers to the same samples (rows by the same keys) that were asked in other words.

    What was scored before hashes were kept is taken on trust.

    Raises:
        UserError: the chat template wrote a sample in two ways.
    """
    for key, row in first.items():
        one, other = row.get("prompt_hash"), second[key].get("prompt_hash")
        if one and other and one != other:
            raise UserError(
                f"Task '{task}', sample '{row['id']}': the prompt as the model read it has the hash {one[:12]} in BASE and {other[:12]} in "
                "TUNED. The sample is the same, so the chat templates differ, and a difference in scores would be theirs, too. "
                "Give both models the same processor and score the task again."
            )


def prompt_text(sample: Sample) -> str:
    """What the sample asks, all turns, as it is stored beside the answer."""
    return "\n".join(message.content for message in sample.prompt)
