"""The six settings of WINGS' interleaved image-text benchmark over built-in tasks: `iit_t` ... `iit_v`.

Which questions are similar was computed once with all-MiniLM-L6-v2 and is in a table, so the benchmark is the same on every
machine and needs no encoder. Over tasks of your own, see `alula.data.interleaved.iit_tasks`.
"""

from collections.abc import Sequence
from functools import partial

from alula.data.interleaved.benchmark import iit_task, last_turns
from alula.data.interleaved.retrieval import Asked
from alula.data.sample import Sample
from alula.data.stream import Task
from alula.data.tasks.asset_table import read_table
from alula.data.tasks.table import INFO, TASKS, TaskInfo
from alula.errors import UserError

TABLE = "iit"
TEXT_TASKS = ("capital", "antonym", "definition")
IMAGE_TASKS = ("animals", "charts", "easy_vqa", "emoji_en")
SIZE = 300
"""Samples of a setting."""


def build(*, name: str, train_size: int | None, test_size: int | None, seed: int) -> Task:
    """Last turns are test samples of the tasks above in equal parts; `train_size` has no effect."""
    setting = name.removeprefix("iit_").upper()
    text_tasks = [TASKS[text](train_size=0, test_size=None, seed=seed) for text in TEXT_TASKS]
    asked_tasks = text_tasks
    if setting.endswith("V"):  # always the same number of each, or a smaller choice would not open a larger one
        asked_tasks = [TASKS[image](train_size=0, test_size=SIZE // len(IMAGE_TASKS), seed=seed) for image in IMAGE_TASKS]
    asked = last_turns(asked_tasks, size=SIZE if test_size is None else min(test_size, SIZE), seed=seed)
    task = iit_task(setting, asked, _similar(asked, text_tasks), seed=seed)
    return Task(
        name=name,
        train=[],
        test=task.test,
        scoring=task.scoring,
        is_base=True,
        is_probe=True,
        max_new_tokens=task.max_new_tokens,
        description=str(INFO[name]),
    )


def _similar(asked: Sequence[Asked], text_tasks: Sequence[Task]) -> list[list[Sample]]:
    """The table's neighbours of each of `asked`, nearest first."""
    rows = read_table(TABLE)
    known = {(row["task"], row["question"]): row["similar"] for row in rows}
    samples = {(task.name, sample.question): sample for task in text_tasks for sample in task.test}
    similar = []
    for task, sample in asked:
        key = (task.name, sample.question)
        if key not in known:
            raise UserError(
                f"The table '{TABLE}.parquet' does not know the question {sample.question!r} of '{task.name}'. It wants to be "
                "made after the tables of the tasks. Run scripts/build_assets/iit.py."
            )
        similar.append([samples[rows[index]["task"], rows[index]["question"]] for index in known[key]])
    return similar


SUMMARIES = {
    "iit_t": "A capital, an opposite or a defined word, among four; no turn before it.",
    "iit_tt": "As iit_t, after one similar text turn.",
    "iit_ttt": "As iit_t, after two similar text turns.",
    "iit_ttv": "As iit_v, after two similar text turns.",
    "iit_tv": "As iit_v, after one similar text turn.",
    "iit_v": "A question about a silhouette, a chart, a shape or a drawn thing; no turn before it.",
}
for _name in SUMMARIES:
    _is_text = _name[-1] == "t"
    INFO.register(_name)(
        TaskInfo(
            summary=SUMMARIES[_name],
            languages=("en",),
            licence="Licences of capital, antonym and definition" + ("" if _is_text else ", animals, charts, easy_vqa and emoji_en"),
            blind=0.25 if _is_text else 0.13,
            held_out="a base task: the last turns are test samples of " + ("text" if _is_text else "image") + " tasks",
        )
    )
    TASKS.register(_name)(partial(build, name=_name))
