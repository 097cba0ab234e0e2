"""The opposite of a common word, ranked among four. Source: WordNet 3.0, https://wordnet.princeton.edu."""

from alula.data.stream import Task
from alula.data.tasks.asset_table import read_table
from alula.data.tasks.ranked import ranked_samples
from alula.data.tasks.selection import choose
from alula.data.tasks.table import INFO, TASKS, TaskInfo

NAME = "antonym"
INFO.register(NAME)(
    TaskInfo(
        summary="What the opposite of a common word is, among four.",
        languages=("en",),
        licence="WordNet 3.0 licence (permissive)",
        blind=0.25,
        held_out="a base task: there is no train split",
    )
)


@TASKS.register(NAME)
def build(*, train_size: int | None, test_size: int | None, seed: int) -> Task:
    """Distractors are the same for every seed; `train_size` has no effect."""
    rows = choose(read_table(NAME), size=test_size, seed=seed, name=NAME)
    items = [(f'What is the opposite of "{row["word"]}"?', row["opposite"], row["distractors"]) for row in rows]
    test = ranked_samples(items, name=NAME, seed=seed)
    return Task(name=NAME, train=[], test=test, scoring="ranked", is_base=True, description=str(INFO[NAME]))
