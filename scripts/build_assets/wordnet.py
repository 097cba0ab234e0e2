"""Reads WordNet's files. Source: wndb(5WN), https://wordnet.princeton.edu/documentation/wndb5wn."""

import collections
import re
from dataclasses import dataclass
from pathlib import Path

POS = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}
# Entries that have no place in a test set: WordNet marks slurs itself, the rest is for taste.
UNWANTED = re.compile(
    r"offensive|slur|disparag|derogat|obscen|vulgar|ethnic|racial|\brac(e|ist)\b|sex|genital|penis|vagina|prostitut|whore|"
    r"murder|kill|suicid|rape|nazi|negro|jew|muslim|islam|christ|god\b|drug|drunk|terroris|massacre|corpse|slave|naked|"
    r"nude|breast|urin|feces|excre|anus|anal\b|bastard|bitch|\bhell\b|\bdamn|stupid|fool|idiot",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class Synset:
    """One meaning. `pointers` are (kind, target key, source word, target word), words counted from 0, -1 for all."""

    key: tuple[str, str]
    words: tuple[str, ...]
    gloss: str
    pointers: tuple[tuple[str, tuple[str, str], int, int], ...]

    @property
    def definition(self) -> str:
        """The gloss up to its first example or second phrase."""
        return self.gloss.split('"')[0].split(";")[0].strip()

    @property
    def examples(self) -> list[str]:
        """Example sentences, without those that quote an author (they are followed by a dash and a name)."""
        return [text for text, name in re.findall(r'"([^"]+)"\s*(-*)', self.gloss) if not name]


def read_synsets(folder: Path) -> dict[tuple[str, str], Synset]:
    """Every synset, by part of speech and offset."""
    synsets = {}
    for name, letter in POS.items():
        for line in (folder / f"data.{name}").read_text(encoding="latin-1").splitlines():
            if not line.startswith("  "):
                synset = _parse(line, letter)
                synsets[synset.key] = synset
    return synsets


def _parse(line: str, letter: str) -> Synset:
    fields, gloss = line.split("|", 1)
    parts = fields.split()
    size = int(parts[3], 16)
    words = tuple(parts[4 + 2 * i].split("(")[0].replace("_", " ") for i in range(size))
    start = 5 + 2 * size
    pointers = []
    for i in range(int(parts[start - 1])):
        kind, offset, pos, ends = parts[start + 4 * i : start + 4 * i + 4]
        target = ("a" if pos == "s" else pos, offset)
        pointers.append((kind, target, int(ends[:2], 16) - 1, int(ends[2:], 16) - 1))
    return Synset(key=(letter, parts[0]), words=words, gloss=gloss.strip(), pointers=tuple(pointers))


def read_counts(folder: Path) -> collections.Counter[str]:
    """How often each word was met in WordNet's tagged texts, over all its meanings."""
    counts: collections.Counter[str] = collections.Counter()
    for line in (folder / "cntlist.rev").read_text(encoding="latin-1").splitlines():
        sense, _, number = line.split()
        counts[sense.split("%")[0].replace("_", " ")] += int(number)
    return counts


def read_ranks(folder: Path) -> dict[tuple[str, str, str], int]:
    """(part of speech, word, offset) -> how common that meaning of the word is, 0 the commonest."""
    ranks = {}
    for name, letter in POS.items():
        for line in (folder / f"index.{name}").read_text(encoding="latin-1").splitlines():
            if not line.startswith("  "):
                parts = line.split()
                for rank, offset in enumerate(parts[-int(parts[2]) :]):
                    ranks[letter, parts[0].replace("_", " "), offset] = rank
    return ranks


def relatives(synsets: dict[tuple[str, str], Synset]) -> dict[str, set[str]]:
    """Word -> words that share a synset with it, or that are one pointer away from one of its synsets."""
    near: dict[str, set[str]] = collections.defaultdict(set)
    for synset in synsets.values():
        around = set(synset.words)
        for _, target, _, _ in synset.pointers:
            around.update(synsets[target].words if target in synsets else ())
        for word in synset.words:
            near[word] |= around
    return near


def is_wanted(*texts: str) -> bool:
    """Whether nothing in the texts is unwanted in a test set."""
    return not any(UNWANTED.search(text) for text in texts)
