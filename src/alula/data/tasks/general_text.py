"""Short general requests, to fit an expert that stands for "none of the tasks". It is no task and scores nothing.

Source: words and sentences of WordNet 3.0, https://wordnet.princeton.edu; none of them is in a base task.
"""

from alula.data.sample import Sample
from alula.data.tasks.asset_table import read_table

NAME = "general_text"


def general_prompts() -> list[Sample]:
    """300 text-only requests of eight kinds with answers, always in the same order."""
    return [Sample.ask(row["question"], row["answer"], id=f"{NAME}/{index}", origin=NAME) for index, row in enumerate(read_table(NAME))]
