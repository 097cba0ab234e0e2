"""The published easy-VQA benchmark, cut to the questions that need the picture.

Source: Victor Zhou, "Easy Visual Question Answering" (2019), https://victorzhou.com/blog/easy-vqa/.
Difference: only questions that start with "what"; the yes/no questions are answered right in 0.67 of cases without looking.
"""

from alula.data.sample import Sample
from alula.data.stream import Task
from alula.data.tasks.asset_table import read_table
from alula.data.tasks.selection import answer_tokens, choose
from alula.data.tasks.table import INFO, TASKS, TaskInfo

NAME = "easy_vqa"
INFO.register(NAME)(
    TaskInfo(
        summary="What shape is in the image, or what colour has it.",
        languages=("en",),
        licence="MIT",
        blind=0.26,
        held_out="the published test images",
    )
)


@TASKS.register(NAME)
def build(*, train_size: int | None, test_size: int | None, seed: int) -> Task:
    """Questions of the published splits on a choice of their images."""
    rows = read_table(NAME)
    splits = {}
    for split, size in (("train", train_size), ("test", test_size)):
        found = [(index, row) for index, row in enumerate(rows) if row["split"] == split]
        splits[split] = [
            Sample.ask(row["question"], row["answer"], images=(row["image"],), id=f"{NAME}/{split}/{index}", origin=NAME)
            for index, row in choose(found, size=size, seed=seed, name=f"{NAME}/{split}")
        ]
    tokens = answer_tokens(splits["train"] + splits["test"])
    return Task(name=NAME, train=splits["train"], test=splits["test"], max_new_tokens=tokens, description=str(INFO[NAME]))
