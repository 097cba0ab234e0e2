"""How often the analytic router finds the task of a prompt on a hard stream, and whether it leaves foreign prompts alone.

No expert is trained: the router needs only one forward pass over some training prompts of each task. The same activations
are classified from all sites and from one, in full and through random projections, to show accuracy against bytes.

    python benchmarks/prompt_routing.py --train 64 --test 32 --out docs/prompt_routing.json
"""

import argparse
import time
from pathlib import Path

import torch

from alula import Collator, attach, load_model, load_task
from alula.context import BASE
from alula.data.sample import Sample
from alula.data.tasks import general_prompts
from alula.files import write_json
from alula.routers.prompt import PromptRouter, projection

STREAM = (
    "animals", "emoji_en", "emoji_ja", "emoji_sw", "emoji_ur", "flags", "maps", "charts", "digits", "words", "scenes", "easy_vqa",
)  # fmt: skip
"""Two tasks ask "What is this?", four differ only in language, three show the same sprites."""
FOREIGN = ("capital", "antonym", "definition")
"""Text-only base tasks: they belong to no expert."""
BATCH = 16


def describe(mixtures: object, collator: Collator, samples: list[Sample]) -> list[torch.Tensor]:
    """The prompts' features, one tensor per site."""
    parts = [mixtures.director.describe(collator(samples[start : start + BATCH])) for start in range(0, len(samples), BATCH)]
    return [torch.cat(site) for site in zip(*parts, strict=True)]


def _short(features: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    return torch.cat([features[:, :-1] @ matrix, features[:, -1:]], dim=-1)


def accuracy(train: dict, test: dict, *, sites: list[int], width: int | None) -> tuple[dict, int]:
    """Per task how many prompts went where they belong, and the bytes kept per task."""
    dim = next(iter(train.values()))[0].shape[1] - 1  # the last column says whether there is an image
    router = PromptRouter(layers=sites, dim=(dim - 2) // 2, width=width)
    keep = [projection(dim, width) if width else torch.eye(dim) for _ in sites]
    for name, features in train.items():
        router.observe(name, [_short(features[site], matrix) for site, matrix in zip(sites, keep, strict=True)])
    experts = [name for name in train if name != BASE]
    rows = {}
    for name, features in test.items():
        right = name if name in experts else BASE
        shown = [_short(features[site], matrix) for site, matrix in zip(sites, keep, strict=True)]
        chosen = router.log_weights(shown, experts=experts, temperature=None).argmax(dim=-1).tolist()
        counts = {other: chosen.count(index) for index, other in enumerate([*experts, BASE]) if index in chosen}
        rows[name] = {"found": counts.get(right, 0), "of": len(chosen), "chosen": counts}
    stored = sum(t.numel() * t.element_size() for t in router.stored(experts[0]).values())
    return rows, stored


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
    mixtures.prompt_router = PromptRouter(layers=mixtures.prompt_router.layers, dim=mixtures.anatomy.hidden_size, width=None)
    sizes = {"train_size": options.train, "test_size": options.test, "seed": options.seed}
    train, test = {BASE: describe(mixtures, collator, general_prompts())}, {}
    for name in (*STREAM, *FOREIGN):
        task = load_task(name, **sizes)
        if task.train:
            train[name] = describe(mixtures, collator, list(task.train))
        test[name] = describe(mixtures, collator, list(task.test))
        print(f"described {name} after {time.perf_counter() - started:.0f} s", flush=True)
    found = []
    for sites in ([0, 1, 2], [0], [1], [2]):
        for width in (None, 512, 256, 128):
            rows, stored = accuracy(train, test, sites=sites, width=width)
            own = [rows[name]["found"] / rows[name]["of"] for name in STREAM]
            foreign = [rows[name]["found"] / rows[name]["of"] for name in FOREIGN]
            layers = [mixtures.prompt_router.layers[site] for site in sites]
            line = {"layers": layers, "width": width, "own": sum(own) / len(own), "foreign": sum(foreign) / len(foreign), "bytes": stored}
            print(line, flush=True)
            found.append({**line, "tasks": rows})
    write_json(
        options.out,
        {"model": "smol", "train_prompts": options.train, "seed": options.seed, "variants": found,
         "seconds": round(time.perf_counter() - started, 1)},
    )  # fmt: skip


if __name__ == "__main__":
    main()
