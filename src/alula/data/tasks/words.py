"""Reading a printed word in English, Japanese, Swahili or Urdu."""

from alula.data.sample import Sample
from alula.data.stream import Task
from alula.data.tasks.asset_table import read_table
from alula.data.tasks.selection import answer_tokens, choose
from alula.data.tasks.table import INFO, LANGUAGES, TASKS, TaskInfo

NAME = "words"
QUESTION = "Read the text."
INFO.register(NAME)(
    TaskInfo(
        summary="Which word is printed, in one of three scripts.",
        languages=LANGUAGES,
        licence="Unicode-3.0 words, drawn with OFL, IPA and Bitstream Vera fonts",
        blind=0.0,
        held_out="words that are not in train, in fonts that are not in train",
    )
)


@TASKS.register(NAME)
def build(*, train_size: int | None, test_size: int | None, seed: int) -> Task:
    """The four languages mixed evenly; the question is English in all, `language` is the word's."""
    rows = read_table(NAME)
    splits = {}
    for split, size in (("train", train_size), ("test", test_size)):
        found = [(index, row) for index, row in enumerate(rows) if row["split"] == split]
        splits[split] = [
            Sample.ask(
                QUESTION,
                row["word"],
                images=(row["image"],),
                id=f"{NAME}/{split}/{index}",
                origin=NAME,
                language=row["language"],
            )
            for index, row in choose(found, size=size, seed=seed, name=f"{NAME}/{split}")
        ]
    tokens = answer_tokens(splits["train"] + splits["test"])
    return Task(name=NAME, train=splits["train"], test=splits["test"], max_new_tokens=tokens, description=str(INFO[NAME]))
