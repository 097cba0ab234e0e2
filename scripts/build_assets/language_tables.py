"""Tables made from WordNet: `antonym`, `definition`, `prose` and `general_text`; no two share an entry."""

import random
import re

from sources import Sources, write_table
from wordnet import Synset, is_wanted, read_counts, read_ranks, read_synsets, relatives

DEFINITIONS, PASSAGES, PROMPTS = 800, 400, 300
STARTS = re.compile(r"^(the|a|an|he|she|they|we|it|his|her|their|our|this|these|those|there|you|i|my|[A-Z][a-z]+)\b")
VERBS = re.compile(r"\b(is|are|was|were|has|have|had|will|would|can|could|did|does|do|[a-z]{3,}(ed|ought|ood|ook|ame))\b")


def build(sources: Sources) -> None:
    """Writes the four tables."""
    folder = sources.deb("wordnet-base") / "usr/share/wordnet"
    synsets, counts = read_synsets(folder), read_counts(folder)
    ranks, near = read_ranks(folder), relatives(synsets)
    wanted = [synset for synset in synsets.values() if is_wanted(synset.gloss, *synset.words)]
    write_table("antonym", _antonyms(wanted, synsets, counts, ranks, near))
    # A word's commonest meaning only: the others ("feather: turning an oar ...") nobody would guess.
    nouns = [s for s in wanted if s.key[0] == "n" and ranks.get(("n", s.words[0], s.key[1])) == 0]
    first = [s for s in nouns if _is_plain(s.words[0]) and _is_clear(s) and counts[s.words[0]] >= 4]
    random.Random("definition").shuffle(first)
    write_table("definition", _definitions(first[:DEFINITIONS], near))
    sentences = sorted({text for s in wanted for text in s.examples if _is_sentence(text)})
    random.Random("prose").shuffle(sentences)
    passages, rest = _passages(sentences)
    write_table("prose", [{"text": passage} for passage in passages])
    write_table("general_text", _prompts(first[DEFINITIONS:], rest, synsets))


def _is_plain(word: str) -> bool:
    return word.isalpha() and word.islower() and len(word) > 2


def _is_clear(synset: Synset) -> bool:
    """A definition that neither contains its word nor is too short or long to point at it."""
    text = synset.definition
    return 20 < len(text) < 110 and "(" not in text and not any(word[:5] in text for word in synset.words)


def _antonyms(wanted: list[Synset], synsets: dict, counts: dict, ranks: dict, near: dict) -> list[dict]:
    """Pairs of common words in a common meaning of each, both ways round."""
    pairs = set()
    for synset in wanted:
        for kind, target, source_word, target_word in synset.pointers:
            if kind == "!" and source_word >= 0 and target in synsets:
                word, opposite = synset.words[source_word], synsets[target].words[target_word]
                rank = max(ranks.get((*synset.key[:1], word, synset.key[1]), 9), ranks.get((target[0], opposite, target[1]), 9))
                common = rank <= 1 and min(counts[word], counts[opposite]) >= 3
                if common and _is_plain(word) and _is_plain(opposite):
                    pairs.add((word, opposite))
    opposites: dict[str, set[str]] = {}
    for word, opposite in pairs:
        opposites.setdefault(word, set()).add(opposite)
    pool = sorted({opposite for _, opposite in pairs})
    rng = random.Random("antonym")
    rows = []
    for word in sorted(opposites):
        answer = max(sorted(opposites[word]), key=lambda opposite: counts[opposite])
        # Opposites, words near them and words near the asked word could be called right, or be given away.
        closed = near[word].union(*(near[opposite] for opposite in opposites[word]))
        others = [other for other in pool if other not in closed]
        rows.append({"word": word, "opposite": answer, "distractors": rng.sample(others, 3)})
    return rows


def _definitions(nouns: list[Synset], near: dict) -> list[dict]:
    rng = random.Random("distractors")
    words = sorted(synset.words[0] for synset in nouns)
    rows = []
    for synset in sorted(nouns, key=lambda synset: synset.words[0]):
        word = synset.words[0]
        closed = set().union(*(near[other] for other in synset.words))
        others = [other for other in words if other not in closed and other not in synset.definition]
        rows.append({"word": word, "definition": synset.definition, "distractors": rng.sample(others, 3)})
    return rows


def _is_sentence(text: str) -> bool:
    plain = re.fullmatch(r"[A-Za-z0-9 ,;:'.!?-]+", text) is not None
    return plain and 30 <= len(text) <= 140 and bool(STARTS.match(text) and VERBS.search(text)) and is_wanted(text)


def _finished(text: str) -> str:
    """The sentence with a capital and a full stop; examples in WordNet have neither."""
    text = re.sub(r"\bi\b", "I", text.strip())
    return text[0].upper() + text[1:] + ("" if text[-1] in ".!?" else ".")


def _passages(sentences: list[str]) -> tuple[list[str], list[str]]:
    """Passages of 200 to 400 characters, and the sentences that were not used."""
    passages: list[str] = []
    current = ""
    for index, sentence in enumerate(sentences):
        current = f"{current} {_finished(sentence)}".strip()
        if len(current) >= 200:
            passages.append(current)
            current = ""
        if len(passages) == PASSAGES:
            return passages, sentences[index + 1 :]
    return passages, []


def _prompts(nouns: list[Synset], sentences: list[str], synsets: dict) -> list[dict]:
    """Short requests of eight kinds, in turn."""
    rows = []
    for synset, sentence in zip(nouns, sentences, strict=False):
        word, text, definition = synset.words[0], _finished(sentence), synset.definition
        above = [synsets[target].words[0] for kind, target, _, _ in synset.pointers if kind == "@"]
        words = text.split()
        middle = len(words) // 2
        rare = max((part.strip(".,;:!?'") for part in words), key=len)
        kinds = [
            (f"Explain in a few words: {word}.", f"{definition[0].upper()}{definition[1:]}."),
            (f"{word.capitalize()} is a kind of", f"{above[0]}." if above else ""),
            (f"Finish this sentence: {' '.join(words[:middle])}", " ".join(words[middle:])),
            (f"Repeat after me: {text}", text),
            (f'Which word comes first in "{text}"?', words[0]),
            (f'How many words are in "{text}"?', str(len(words))),
            (f'Use the word "{rare}" in a sentence.', text),
            (f'Is this a question or a statement: "{text}"', "A question." if text.endswith("?") else "A statement."),
        ]
        question, answer = kinds[len(rows) % len(kinds)]
        if answer:
            rows.append({"question": question, "answer": answer})
    return list({row["question"]: row for row in rows}.values())[:PROMPTS]
