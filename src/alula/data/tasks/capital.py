"""The capital of a country, ranked among four. Capitals that give themselves away or are disputed are left out."""

from alula.data.stream import Task
from alula.data.tasks.asset_table import read_table
from alula.data.tasks.ranked import ranked_samples
from alula.data.tasks.selection import choose
from alula.data.tasks.table import INFO, TASKS, TaskInfo

NAME = "capital"
INFO.register(NAME)(
    TaskInfo(
        summary="What the capital of a UN member is, among four capitals.",
        languages=("en",),
        licence="MIT facts, Unicode-3.0 names",
        blind=0.25,
        held_out="a base task: there is no train split",
    )
)


@TASKS.register(NAME)
def build(*, train_size: int | None, test_size: int | None, seed: int) -> Task:
    """Distractors are the same for every seed; `train_size` has no effect."""
    rows = choose(read_table(NAME), size=test_size, seed=seed, name=NAME)
    items = [(f"What is the capital of {row['country']}?", row["capital"], row["distractors"]) for row in rows]
    test = ranked_samples(items, name=NAME, seed=seed)
    return Task(name=NAME, train=[], test=test, scoring="ranked", is_base=True, description=str(INFO[NAME]))
