"""Counting and placing drawn things on a grid of nine cells."""

import random

from alula.data.sample import Sample
from alula.data.stream import Task
from alula.data.tasks.drawing import encode
from alula.data.tasks.grid_scene import Sprites, draw_scene, read_sprites
from alula.data.tasks.selection import answer_tokens, draw_splits
from alula.data.tasks.table import INFO, TASKS, TaskInfo

NAME = "scenes"
PLACES = [f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "center", "right")]
INFO.register(NAME)(
    TaskInfo(
        summary="How many of a thing there are (1 to 5), where it is (nine places), or what is at a place.",
        languages=("en",),
        licence="CC-BY-4.0, Apache-2.0 and MIT pictures, Unicode-3.0 names",
        blind=0.13,
        held_out="the drawings of a vendor (Noto) that is not in train; the things are among those of emoji_en",
    )
)


@TASKS.register(NAME)
def build(*, train_size: int | None, test_size: int | None, seed: int) -> Task:
    """Scenes drawn anew for each seed; all sprites of a scene are one vendor's."""
    splits = draw_splits(NAME, read_sprites, _sample, train_size=train_size, test_size=test_size, seed=seed)
    tokens = answer_tokens(splits["train"] + splits["test"])
    return Task(name=NAME, train=splits["train"], test=splits["test"], max_new_tokens=tokens, description=str(INFO[NAME]))


def _sample(sprites: Sprites, split: str, index: int, rng: random.Random) -> Sample:
    """Asks the three kinds in turn, and draws the answer first so that every answer is as likely."""
    vendor = rng.choice(sorted(sprites))
    things = rng.sample(range(len(sprites[vendor])), 3)
    asked = ("count", "where", "what")[index % 3]
    copies = rng.randint(1, 5) if asked == "count" else 1
    cells = rng.sample(range(9), copies + rng.randint(2, 4))
    kinds = [things[0]] * copies + [rng.choice(things[1:]) for _ in cells[copies:]]
    picture, _ = draw_scene([sprites[vendor][kind][0] for kind in kinds], cells, rng)
    _, name, plural = sprites[vendor][things[0]]
    place = PLACES[cells[0]]
    question, answer = {
        "count": (f"How many {plural} are there?", str(copies)),
        "where": (f"Where is the {name}?", place),
        "what": (f"What is at the {place}?", name),
    }[asked]
    return Sample.ask(question, answer, images=(encode(picture),), id=f"{NAME}/{split}/{index}", origin=NAME)
