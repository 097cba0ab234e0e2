"""Which samples are held out for testing: decided by what they say and show, so that every machine decides alike."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence

from alula.data.sample import Sample
from alula.data.views import Chosen
from alula.errors import UserError


def split(samples: Sequence[Sample], *, test_ratio: float, seed: int) -> tuple[Sequence[Sample], Sequence[Sample]]:
    """Train and test samples; those that are equal or share an id fall on the same side.

    Args:
        test_ratio: 0-1, the share held out.
        seed: gives another split.

    Raises:
        UserError: too few samples, a ratio outside 0-1, or an image file that cannot be read.
    """
    if not 0 < test_ratio < 1:
        raise UserError(f"test_ratio is {test_ratio}, a number between 0 and 1 is wanted. The default is 0.1.")
    keys = [(f"content {content_key(sample)}", f"id {sample.id}") for sample in samples]
    groups = _groups(keys)
    if len(groups) < 2:
        raise UserError(
            f"{samples[0].origin}: {len(samples)} samples that are all equal or share one id cannot be split. "
            "Add samples, correct the ids, or give test_path."
        )
    contents = [content.removeprefix("content ") for content, _ in keys]
    placed = sorted(((_place((contents[index] for index in group), seed), group) for group in groups), key=lambda pair: pair[0])
    count = min(max(sum(place < test_ratio for place, _ in placed), 1), len(placed) - 1)  # neither side may be empty
    in_test = {index for _, group in placed[:count] for index in group}
    train = [index for index in range(len(samples)) if index not in in_test]
    return _pick(samples, train), _pick(samples, sorted(in_test))


def refuse_shared(train: Sequence[Sample], test: Sequence[Sample]) -> None:
    """Checks that no test sample is a training sample too; images are compared where the words are equal.

    Raises:
        UserError: one is; both are named.
    """
    tested = {sample.messages for sample in test}
    learnt = {content_key(sample): sample.origin for sample in train if sample.messages in tested}
    shared = [(learnt[key], sample.origin) for sample in test if (key := content_key(sample)) in learnt]
    if shared:
        first, second = shared[0]
        raise UserError(
            f"{second}: this test sample is also a training sample ({first}); {len(shared)} are. "
            "A score on them would measure memory: drop them from one of the files."
        )


def content_key(sample: Sample) -> str:
    """A hash of what `sample` says and shows; image files count by their bytes, whatever they are called.

    Raises:
        BadRow: an image file cannot be read.
    """
    digest = hashlib.sha256()
    for message in sample.messages:
        digest.update(f"{message.role}\0{message.content}\0".encode())
    for content in sample.image_bytes():
        digest.update(content + b"\0")
    return digest.hexdigest()


def _groups(keys: Sequence[tuple[str, str]]) -> list[list[int]]:
    """Samples (by index) that must stay on one side: linked by equal content or an equal id."""
    leader: dict[str, str] = {}

    def find(key: str) -> str:
        while leader.setdefault(key, key) != key:
            leader[key] = key = leader[leader[key]]
        return key

    for content, identity in keys:
        low, high = sorted((find(content), find(identity)))
        leader[high] = low  # the lowest key leads, whatever the order of the rows: a content key where there is one
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for index, (content, _) in enumerate(keys):
        groups[find(content)].append(index)
    return [groups[key] for key in sorted(groups)]


def _place(contents: Iterable[str], seed: int) -> float:
    """A number in 0-1 that only the group's first content key and `seed` decide."""
    return int.from_bytes(hashlib.sha256(f"{seed} {min(contents)}".encode()).digest()[:8]) / 2**64


def _pick(samples: Sequence[Sample], indices: list[int]) -> Sequence[Sample]:
    return [samples[index] for index in indices] if isinstance(samples, list) else Chosen(samples, indices)
