"""Country and continent of a flag, in four languages: `flags` (English), `flags_ja`, `flags_sw`, `flags_ur`."""

from functools import partial

from alula.data.sample import Sample
from alula.data.stream import Task
from alula.data.tasks.asset_table import read_table
from alula.data.tasks.drawing import decode, encode, place
from alula.data.tasks.selection import answer_tokens, choose, generator
from alula.data.tasks.table import INFO, LANGUAGES, TASKS, TaskInfo

QUESTIONS = {
    "en": ("Which country has this flag?", "On which continent is the country of this flag?"),
    "ja": ("これはどの国の旗ですか？", "この旗の国はどの大陸にありますか？"),
    "sw": ("Bendera hii ni ya nchi gani?", "Nchi ya bendera hii iko bara gani?"),
    "ur": ("یہ کس ملک کا پرچم ہے؟", "اس پرچم کا ملک کس براعظم میں ہے؟"),
}
COPIES = {"train": 2, "test": 1}
SIDE = 96
"""Pixels."""


def build(*, language: str, train_size: int | None, test_size: int | None, seed: int) -> Task:
    """Both questions about each drawing of each flag; the continent only where there is one answer."""
    name = "flags" if language == "en" else f"flags_{language}"
    rows = read_table("flags")
    splits = {}
    for split, size in (("train", train_size), ("test", test_size)):
        asked = [
            (row, copy, question, row[column])
            for row in rows
            if row["split"] == split
            for copy in range(COPIES[split])
            for question, column in zip(QUESTIONS[language], (language, f"continent_{language}"), strict=True)
            if row[column]
        ]
        samples = []
        for row, copy, question, answer in choose(asked, size=size, seed=seed, name=f"{name}/{split}"):
            key = f"{split}/{row['style']}/{row['code']}/{copy}"
            picture = place(decode(row["image"]), side=SIDE, rng=generator("flags", key, seed), smallest=0.75, flip=False)
            kind = QUESTIONS[language].index(question)
            samples.append(
                Sample.ask(question, answer, images=(encode(picture),), id=f"{name}/{key}/{kind}", origin=name, language=language)
            )
        splits[split] = samples
    tokens = answer_tokens(splits["train"] + splits["test"])
    return Task(name=name, train=splits["train"], test=splits["test"], max_new_tokens=tokens, description=str(INFO[name]))


for _language in LANGUAGES:
    _name = "flags" if _language == "en" else f"flags_{_language}"
    INFO.register(_name)(
        TaskInfo(
            summary="Which UN member has this flag, and on which continent it is; flags alike are left out.",
            languages=(_language,),
            licence="MIT and public-domain drawings, Unicode-3.0 names, MIT facts",
            blind=0.15,
            held_out="a drawing style (public-domain set) that is not in train",
        )
    )
    TASKS.register(_name)(partial(build, language=_language))
