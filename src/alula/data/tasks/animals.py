"""Naming ten animals from silhouettes, in four languages: `animals` (English), `animals_ja`, `animals_sw`, `animals_ur`."""

from functools import partial

from PIL import Image, ImageOps

from alula.data.sample import Sample
from alula.data.stream import Task
from alula.data.tasks.asset_table import read_table
from alula.data.tasks.drawing import Colour, decode, encode
from alula.data.tasks.emoji import QUESTIONS
from alula.data.tasks.selection import answer_tokens, choose, generator
from alula.data.tasks.table import INFO, LANGUAGES, TASKS, TaskInfo

NAMES = {
    "bear": {"ja": "クマ", "sw": "dubu", "ur": "ریچھ"},
    "bird": {"ja": "鳥", "sw": "ndege", "ur": "پرندہ"},
    "cat": {"ja": "ネコ", "sw": "paka", "ur": "بلی"},
    "cow": {"ja": "ウシ", "sw": "ng'ombe", "ur": "گائے"},
    "dog": {"ja": "イヌ", "sw": "mbwa", "ur": "کتا"},
    "elephant": {"ja": "ゾウ", "sw": "ndovu", "ur": "ہاتھی"},
    "giraffe": {"ja": "キリン", "sw": "twiga", "ur": "زرافہ"},
    "horse": {"ja": "馬", "sw": "farasi", "ur": "گھوڑا"},
    "sheep": {"ja": "ヒツジ", "sw": "kondoo", "ur": "بھیڑ"},
    "zebra": {"ja": "シマウマ", "sw": "punda milia", "ur": "زیبرا"},
}
"""Written by hand: CLDR's names are often those of faces ("bear face") or of one sex ("ewe")."""
INK: dict[str, tuple[Colour, ...]] = {
    "train": ((30, 30, 30), (120, 30, 30), (90, 60, 10), (110, 20, 90)),
    "test": ((15, 60, 130), (10, 90, 60)),
}
SIDE = 84
"""Pixels, three times the silhouette's 28."""


def build(*, language: str, train_size: int | None, test_size: int | None, seed: int) -> Task:
    """The question is that of the emoji tasks: a router that reads the question alone takes one for the other."""
    name = "animals" if language == "en" else f"animals_{language}"
    rows = list(enumerate(read_table("animals")))
    splits = {}
    for split, size in (("train", train_size), ("test", test_size)):
        found = [(index, row) for index, row in rows if row["split"] == split]
        samples = []
        for index, row in choose(found, size=size, seed=seed, name=f"{name}/{split}"):
            answer = row["animal"] if language == "en" else NAMES[row["animal"]][language]
            ink = generator("animals", split, index, seed).choice(INK[split])
            samples.append(
                Sample.ask(
                    QUESTIONS[language],
                    answer,
                    images=(encode(_draw(row["image"], ink)),),
                    id=f"{name}/{split}/{index}",
                    origin=name,
                    language=language,
                )
            )
        splits[split] = samples
    tokens = answer_tokens(splits["train"] + splits["test"])
    return Task(name=name, train=splits["train"], test=splits["test"], max_new_tokens=tokens, description=str(INFO[name]))


def _draw(content: bytes, ink: Colour) -> Image.Image:
    mask = decode(content).convert("L").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return ImageOps.colorize(mask, black=(248, 246, 240), white=ink)


for _language in LANGUAGES:
    _name = "animals" if _language == "en" else f"animals_{_language}"
    INFO.register(_name)(
        TaskInfo(
            summary="Which of ten animals a silhouette shows.",
            languages=(_language,),
            licence="MIT (as claimed by its author; where the underlying photos are from is not stated)",
            blind=0.1,
            held_out="silhouettes that are not in train, in colours that are not in train",
        )
    )
    TASKS.register(_name)(partial(build, language=_language))
