"""What one answer is worth, and whether its form could be read at all. It knows no model."""

import unicodedata
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from alula.data.sample import Sample
from alula.data.stream import Task

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
    """A score from 0 to 1, and whether the form of the answer could be read."""

    score: float
    parsed: bool


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

    def as_row(self) -> dict[str, object]:
        """The prediction as one JSON object; what does not apply is left out."""
        row: dict[str, object] = {
            name: getattr(self, name) for name in ("id", "task", "prompt", "reference", "output", "score", "parsed", "method", "seed")
        }
        if self.options:
            row["options"] = list(self.options)
        if self.loss_bits is not None:
            row |= {"loss_bits": self.loss_bits, "bytes": self.bytes}
        return row


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """The score of one task: one cell of the score matrix."""

    score: float
    num_samples: int
    unparsed: int
    metric: str
    higher_is_better: bool


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
    )


def prompt_text(sample: Sample) -> str:
    """What the sample asks, all turns, as it is stored beside the answer."""
    return "\n".join(message.content for message in sample.prompt)
