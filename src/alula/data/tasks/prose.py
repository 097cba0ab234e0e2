"""Plain English sentences to be predicted: the finest measure of what the backbone forgets.

Source: example sentences of WordNet 3.0, https://wordnet.princeton.edu, joined to passages of 200 to 400 characters.
The sentences of a passage do not follow from one another; bits per byte are to be compared between rows of a score
matrix, not with other texts.
"""

from alula.data.sample import Message, Sample
from alula.data.stream import Task
from alula.data.tasks.asset_table import read_table
from alula.data.tasks.selection import choose
from alula.data.tasks.table import INFO, TASKS, TaskInfo

NAME = "prose"
INFO.register(NAME)(
    TaskInfo(
        summary="How many bits a byte of everyday English prose costs.",
        languages=("en",),
        licence="WordNet 3.0 licence (permissive)",
        blind=None,
        held_out="a base task: there is no train split",
    )
)


@TASKS.register(NAME)
def build(*, train_size: int | None, test_size: int | None, seed: int) -> Task:
    """Each sample is one assistant message; `train_size` has no effect."""
    rows = choose(list(enumerate(read_table(NAME))), size=test_size, seed=seed, name=NAME)
    test = [
        Sample(id=f"{NAME}/test/{index}", messages=(Message(role="assistant", content=row["text"]),), origin=NAME) for index, row in rows
    ]
    return Task(name=NAME, train=[], test=test, scoring="bits_per_byte", is_base=True, description=str(INFO[NAME]))
