"""Any task with solved examples before each question: the same prompts, byte for byte, for the same seed. It knows no model.

`few_shot` makes a task of a task, so that whatever evaluates tasks evaluates it. See docs/few_shot.md.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import islice
from typing import Any

from alula.data.collate import Collator
from alula.data.interleaved.embedding import Embed
from alula.data.interleaved.retrieval import nearest_texts
from alula.data.rendering import TEXT, is_plain, is_prose
from alula.data.sample import PLACEHOLDER, ImageSource, Message, Sample
from alula.data.stream import Task
from alula.data.tasks.selection import generator
from alula.errors import UserError, nearest
from alula.evaluation.scores import Prediction
from alula.evaluation.vqa import cut_answer, normalise_vqa

CHAT = "chat"
PROMPTS = {"vqa": "{images} Question: {question} Short answer:", "caption": "{images} A photo of"}
"""Published prompts, one line a shot, without a chat template. Source: MM1 (arXiv 2403.09611), after Flamingo (arXiv 2204.14198)."""
FORMS = (CHAT, *PROMPTS)
WAYS = ("seed", "similarity")


class Budget:
    """How many tokens a prompt may have, and how many one has.

    Args:
        context: tokens of the prompt and the longest answer together.
    """

    def __init__(self, collator: Collator, *, context: int) -> None:
        self.collator, self.context = collator, context
        self._grown: dict[str, int] = {}

    def length(self, prompted: Sample, parts: Sequence[Sample]) -> int:
        """Tokens of `prompted` with its answer: those of its text, and what the images of its `parts` grow to."""
        return self.collator.count_text(prompted) + sum(self._growth(part) for part in parts if part.images)

    def _growth(self, part: Sample) -> int:
        if part.id not in self._grown:
            self._grown[part.id] = int(self.collator([part])["attention_mask"].sum()) - self.collator.count_text(part)
        return self._grown[part.id]


def context_of(model: Any, collator: Collator) -> int | None:
    """Tokens that a prompt and its answer may have: the least of the model's positions and the collator's limit; None: no limit."""
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    found = [size for size in (positions, collator.max_length) if size]
    return min(found, default=None)


@dataclass(frozen=True, kw_only=True)
class FewShot:
    """A task with shots, and what became of them.

    Attributes:
        task: each test sample's prompt holds its shots.
        shots: wanted for each sample.
        counts: shots that each test sample has.
        num_cut: shots left out for want of room.
        num_too_long: test samples that do not fit even without shots.
        form: one of `FORMS`.
        split: what the shots are from: ``train``, or ``test`` of a task that has no train split.
        room: tokens that a prompt may have; None: not limited.
    """

    task: Task
    shots: int
    counts: tuple[int, ...]
    num_cut: int
    num_too_long: int
    form: str
    split: str
    room: int | None

    @property
    def num_dropped(self) -> int:
        """Shots left out for want of room or of samples."""
        return self.shots * len(self.counts) - sum(self.counts)

    def describe(self) -> str:
        """One line: how many samples have how many shots, why some have fewer, and how many do not fit at all."""
        has = ", ".join(f"{count} for {number}" for count, number in sorted(Counter(self.counts).items(), reverse=True))
        line, room = f"{self.task.name}: shots from the {self.split} split: {has} samples.", f"a prompt has room for {self.room} tokens"
        if self.num_dropped:
            why = [room] * (self.num_cut > 0) + [f"the {self.split} split has no more"] * (self.num_dropped > self.num_cut)
            line += f" {self.num_dropped} of {self.shots * len(self.counts)} shots dropped, the least near first: {', and '.join(why)}."
        if self.num_too_long:
            line += f" {room[0].upper()}{room[1:]}, and {self.num_too_long} of {len(self.counts)} are longer even without shots."
        return line


def few_shot(
    task: Task,
    *,
    shots: int,
    by: str = "seed",
    seed: int = 0,
    form: str = CHAT,
    embed: Embed | None = None,
    budget: Budget | None = None,
    limit: int | None = None,
) -> FewShot:
    """`task` with `shots` solved samples before each test sample, never the sample itself; the best stands nearest to it.

    Args:
        shots: 0 or more. With the same seed, fewer shots are part of more.
        by: ``seed``: drawn at random for each test sample; ``similarity``: those with the most similar questions.
        seed: of the draw.
        form: ``chat``: turns of the model's own conversation. ``vqa``, ``caption``: the published lines of `PROMPTS`.
        embed: texts to vectors, for ``similarity``.
        budget: shots that do not fit are dropped, the least near first; None: all stay.
        limit: test samples; only the first so many are taken, None for all.

    Raises:
        UserError: a negative number, an unknown way or form, running text, or no way to tell which questions are similar.
    """
    _check(task, shots=shots, by=by, form=form)
    pool, samples = list(task.train or task.test), list(task.test)[:limit]
    same = Sameness()
    if by == "similarity" and shots:
        chosen = _similar(task.name, samples, pool, shots, embed, same)
    else:
        chosen = [_drawn(pool, sample, shots, same, f"few_shot/{task.name}/{seed}") for sample in samples]
    room = budget.context - task.max_new_tokens if budget else None
    test = [_fitting(sample, found, form=form, budget=budget, room=room) for sample, found in zip(samples, chosen, strict=True)]
    return FewShot(
        task=replace(task, test=[prompted for prompted, _, _ in test]),
        shots=shots,
        counts=tuple(count for _, count, _ in test),
        num_cut=sum(len(found) - count for found, (_, count, _) in zip(chosen, test, strict=True)),
        num_too_long=sum(not fits for _, _, fits in test),
        form=form,
        split="train" if task.train else "test",
        room=room,
    )


def rescore(found: FewShot, predictions: Sequence[Prediction]) -> list[Prediction]:
    """Generated answers to published prompts, cut at the form's stop and compared as VQA compares; others as they are.

    Args:
        predictions: of `found.task`, in the order of its test samples; there may be fewer.
    """
    if found.form == CHAT or found.task.scoring != "exact_match":
        return list(predictions)
    done = []
    for prediction, sample in zip(predictions, found.task.test, strict=False):
        said = cut_answer(prediction.output, form=found.form)
        right = normalise_vqa(said) in {normalise_vqa(reference) for reference in sample.references}
        done.append(replace(prediction, output=said, score=float(right), parsed=bool(said)))
    return done


def asks(task: Task) -> bool:
    """Whether its samples ask something: running text and documents do not."""
    return not any(is_plain(sample) for sample in task.test[:1])


def _check(task: Task, *, shots: int, by: str, form: str) -> None:
    if shots < 0:
        raise UserError(f"{shots} shots came. A number from 0 up is accepted; published are 0, 4, 8 and 16.")
    for word, known, what in ((by, WAYS, "way to choose shots"), (form, FORMS, "form of prompts")):
        if word not in known:
            raise UserError(f"Unknown {what} '{word}'. {nearest(word, known)}")
    if not asks(task):
        raise UserError(f"Task '{task.name}' is running text, which asks nothing. Few-shot evaluation wants questions: take another task.")
    if task.scoring == "bits_per_byte" and form == CHAT:
        raise UserError(
            f"Task '{task.name}' is scored in bits per byte of its answers, and in form '{CHAT}' the shots' answers would count, too. "
            f"Choose form {' or '.join(repr(one) for one in PROMPTS)}."
        )


class Sameness:
    """Whether two samples are the same question: the same id, or the same words and pixels, however the pictures came.

    Pictures are decoded only where the words agree, and once.
    """

    def __init__(self) -> None:
        self._seen: dict[int, tuple[Sample, bytes]] = {}  # with the sample, so that its id becomes no other one's

    def __call__(self, one: Sample, other: Sample) -> bool:
        """Whether `one` and `other` are."""
        if one.id == other.id:
            return True
        is_alike = one.question == other.question and len(one.images) == len(other.images)
        return is_alike and (not one.images or self._pixels(one) == self._pixels(other))

    def _pixels(self, sample: Sample) -> bytes:
        if id(sample) not in self._seen:
            digest = sha256()
            for image in sample.open_images():
                digest.update(f"{image.size}".encode() + image.tobytes())
            self._seen[id(sample)] = sample, digest.digest()
        return self._seen[id(sample)][1]


def _drawn(pool: Sequence[Sample], sample: Sample, count: int, same: Sameness, key: str) -> list[Sample]:
    """`count` of `pool`, one after another: fewer are a beginning of more."""
    rng = generator(key, sample.id)
    tried: set[int] = set()
    found: list[Sample] = []
    while len(found) < count and len(tried) < len(pool):
        place = rng.randrange(len(pool))
        if place not in tried and not same(pool[place], sample):
            found.append(pool[place])
        tried.add(place)
    return found


def _similar(
    name: str, asked: Sequence[Sample], pool: Sequence[Sample], count: int, embed: Embed | None, same: Sameness
) -> list[list[Sample]]:
    """For each of `asked` the `count` of `pool` with the most similar questions, nearest first."""
    if embed is None:
        raise UserError("Shots by similarity came without an encoder of sentences. Give one, such as load_embedder('minilm').")
    questions = [sample.question for sample in pool]
    if len(set(questions)) == 1:
        raise UserError(f"Task '{name}' asks one question of every picture: none is more similar. Choose shots by seed.")
    alike, named = Counter(questions), Counter(sample.id for sample in pool)
    most = count + max((alike[sample.question] + named[sample.id] for sample in asked), default=0)  # so many may be the sample itself
    found = nearest_texts([sample.question for sample in asked], questions, embed=embed, count=most)
    return [
        list(islice((pool[place] for place in places if not same(pool[place], sample)), count))
        for sample, places in zip(asked, found, strict=True)
    ]


def _fitting(sample: Sample, shots: Sequence[Sample], *, form: str, budget: Budget | None, room: int | None) -> tuple[Sample, int, bool]:
    """`sample` after as many of its shots as fit, how many they are, and whether that fits: without any it may be too long."""
    write: Callable[[Sample, Sequence[Sample]], Sample] = _as_turns if form == CHAT else _as_lines(form)
    for count in range(len(shots), -1, -1):
        prompted = write(sample, shots[:count][::-1])
        if fits := budget is None or room is None or budget.length(prompted, [*shots[:count], sample]) <= room:
            break
    return prompted, count, fits


def _as_turns(sample: Sample, shots: Sequence[Sample]) -> Sample:
    """One conversation: the sample's system message, the shots' turns, its own turns."""
    messages = [message for message in sample.messages if message.role == "system"]
    for part in (*shots, sample):
        own = [message for message in part.messages if message.role != "system"]
        if is_prose(part) or own[0].role != "user":
            raise UserError(f"{part.origin or part.id}: it opens with no question, so it cannot be a shot. Give samples that ask first.")
        messages += own
    return replace(sample, messages=tuple(messages), images=_images(sample, shots))


def _as_lines(form: str) -> Callable[[Sample, Sequence[Sample]], Sample]:
    """What writes each sample as one line of the published prompt."""

    def line(sample: Sample) -> str:
        if len(sample.messages) != 2 + (sample.messages[0].role == "system"):
            where = sample.origin or sample.id
            raise UserError(f"{where}: it has several turns, form '{form}' is for one question and one answer. Use form '{CHAT}'.")
        return PROMPTS[form].format(images=PLACEHOLDER * len(sample.images), question=sample.question).strip()

    def write(sample: Sample, shots: Sequence[Sample]) -> Sample:
        solved = "".join(f"{line(shot)} {shot.answer}\n" for shot in shots)
        prompt = Message(role=TEXT, content=solved + line(sample))
        return replace(sample, messages=(prompt, sample.messages[-1]), images=_images(sample, shots))

    return write


def _images(sample: Sample, shots: Sequence[Sample]) -> tuple[ImageSource, ...]:
    return tuple(image for part in (*shots, sample) for image in part.images)
