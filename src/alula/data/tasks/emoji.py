"""Naming 62 things drawn by four vendors, in four languages: four tasks over the same pictures."""

from functools import partial

from alula.data.sample import Sample
from alula.data.stream import Task
from alula.data.tasks.asset_table import read_table
from alula.data.tasks.drawing import decode, encode, place
from alula.data.tasks.selection import answer_tokens, choose, generator
from alula.data.tasks.table import INFO, LANGUAGES, TASKS, TaskInfo

QUESTIONS = {"en": "What is this?", "ja": "これは何ですか？", "sw": "Hii ni nini?", "ur": "یہ کیا ہے؟"}
"""The tasks `animals` ask the same, on purpose: the question does not tell the task."""
COPIES = {"train": 8, "test": 5}
"""Pictures drawn from one sprite, each on another ground, at another place and size."""
SIDE = 96
"""Pixels."""


def build(*, language: str, train_size: int | None, test_size: int | None, seed: int) -> Task:
    """Names in `language`."""
    name = f"emoji_{language}"
    rows = read_table("emoji")
    splits = {}
    for split, size in (("train", train_size), ("test", test_size)):
        drawn = [(row, copy) for row in rows if row["split"] == split for copy in range(COPIES[split])]
        samples = []
        for row, copy in choose(drawn, size=size, seed=seed, name=f"{name}/{split}"):
            # The picture does not depend on the language, so that the four tasks show the same ones.
            key = f"{split}/{row['vendor']}/{row['concept']}/{copy}"
            picture = place(decode(row["image"]), side=SIDE, rng=generator("emoji", key, seed))
            samples.append(
                Sample.ask(
                    QUESTIONS[language],
                    row[language],
                    images=(encode(picture),),
                    id=f"{name}/{key}",
                    origin=name,
                    language=language,
                )
            )
        splits[split] = samples
    tokens = answer_tokens(splits["train"] + splits["test"])
    return Task(name=name, train=splits["train"], test=splits["test"], max_new_tokens=tokens, description=str(INFO[name]))


for _language in LANGUAGES:
    INFO.register(f"emoji_{_language}")(
        TaskInfo(
            summary="What thing is drawn, of 62.",
            languages=(_language,),
            licence="CC-BY-4.0, Apache-2.0 and MIT pictures, Unicode-3.0 names",
            blind=1 / 62,
            held_out="the drawings of a vendor (Noto) that is not in train",
        )
    )
    TASKS.register(f"emoji_{_language}")(partial(build, language=_language))
