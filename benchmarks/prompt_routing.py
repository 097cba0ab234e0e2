"""How often the analytic router finds the task of a prompt on a hard stream, and whether it leaves foreign prompts alone.

No expert is trained: the router needs only one forward pass over some training prompts of each task.

    python benchmarks/prompt_routing.py --train 64 --test 32 --out docs/prompt_routing.json
"""

import argparse
import time
from pathlib import Path

import torch

from alula import Collator, attach, load_model, load_task
from alula.context import BASE
from alula.data.stream import Task
from alula.data.tasks import general_prompts
from alula.files import write_json
from alula.mixtures import Mixtures
from alula.observe import observe

STREAM = (
    "animals", "emoji_en", "emoji_ja", "emoji_sw", "emoji_ur", "flags", "maps", "charts", "digits", "words", "scenes", "easy_vqa",
)  # fmt: skip
"""Two tasks ask "What is this?", four differ only in language, three show the same sprites."""
FOREIGN = ("capital", "antonym", "definition")
"""Text-only base tasks: they belong to no expert."""


def feed(mixtures: Mixtures, collator: Collator, name: str, samples: list, batch_size: int = 16) -> None:
    for start in range(0, len(samples), batch_size):
        observe(mixtures, name, collator(samples[start : start + batch_size]))


def decide(mixtures: Mixtures, collator: Collator, samples: list, batch_size: int = 16) -> torch.Tensor:
    found = [mixtures.director.decide(collator(samples[i : i + batch_size])).argmax(dim=-1) for i in range(0, len(samples), batch_size)]
    return torch.cat(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=int, default=64, help="prompts per task that the router learns from")
    parser.add_argument("--test", type=int, default=32, help="held-out prompts per task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("prompt_routing.json"))
    options = parser.parse_args()
    started = time.perf_counter()
    model, processor = load_model("smol")
    collator, mixtures = Collator(processor), attach(model, linears=["q_proj"], layers=[0])
    feed(mixtures, collator, BASE, general_prompts())
    sizes = {"train_size": options.train, "test_size": options.test, "seed": options.seed}
    tasks: list[Task] = [load_task(name, **sizes) for name in STREAM]
    for task in tasks:
        mixtures.grow(task.name, rank=1)
        feed(mixtures, collator, task.name, list(task.train))
    classes = [*mixtures.names, BASE]
    rows = {}
    for task in [*tasks, *(load_task(name, **sizes) for name in FOREIGN)]:
        chosen = decide(mixtures, collator, list(task.test)).tolist()
        right = task.name if task.name in mixtures.names else BASE
        counts = {name: chosen.count(index) for index, name in enumerate(classes) if index in chosen}
        rows[task.name] = {"right": right, "found": counts.get(right, 0), "of": len(chosen), "chosen": counts}
        print(f"{task.name:12s} {counts.get(right, 0):3d} of {len(chosen)}  {counts}")
    stored = sum(t.numel() * t.element_size() for t in mixtures.prompt_router.stored(tasks[0].name).values())
    write_json(
        options.out,
        {
            "model": "smol", "train_prompts": options.train, "seed": options.seed, "tasks": rows,
            "stored_bytes_per_task": stored, "seconds": round(time.perf_counter() - started, 1),
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
