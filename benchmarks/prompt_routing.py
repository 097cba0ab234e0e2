"""How often the analytic router finds the task of a prompt on a hard stream, and whether it leaves foreign prompts alone.

No expert is trained: the router needs only one forward pass over some training prompts of each task. The same activations
are classified from all sites and from one, in full and through random projections, to show accuracy against bytes. Then
each task in turn, or a group of them, is left out of the pool: its prompts have images and belong to no task.

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
from alula.routers.named import ROUTINGS
from alula.routers.prompt import WIDTH, PromptRouter, projection

STREAM = (
    "animals", "emoji_en", "emoji_ja", "emoji_sw", "emoji_ur", "flags", "maps", "charts", "digits", "words", "scenes", "easy_vqa",
)  # fmt: skip
"""Two tasks ask "What is this?", four differ only in language, three show the same sprites."""
FOREIGN = ("capital", "antonym", "definition")
"""Text-only base tasks: they belong to no expert."""
EMOJI = ("emoji_en", "emoji_ja", "emoji_sw", "emoji_ur")
GROUPS = {"emoji": EMOJI, "sprites": (*EMOJI, "scenes")}
"""Left out together: the four languages of one task; all that show sprites of the same vendors."""
NEVER = "captions"
"""A task with images that is in no pool."""
TWINS = ("animals", "emoji_en")
"""The same question, "What is this?", of pictures of one thing each."""
CROSSED = {
    "known question, other pictures": ("What is this?", ("flags", "maps", "charts", "digits", "words", "easy_vqa")),
    "known pictures, other question": (
        "Describe this picture in one sentence.",
        ("animals", "emoji_en", "flags", "maps", "charts", "easy_vqa"),
    ),
}
"""Questions put to pictures of other tasks: the pool knows each of the two, but not together."""
EACH = 8
"""Crossed prompts per task."""
THRESHOLD = ROUTINGS["analytic_reject"].threshold
THRESHOLDS = (0.0, 0.1, 1 / 6, 0.2, THRESHOLD, 0.3, 1 / 3, 0.4, 0.5, 0.75)
FEW = 16
"""Training prompts per task in the trial of small pools."""
BATCH = 16


def describe(mixtures: object, collator: Collator, samples: list[Sample]) -> list[torch.Tensor]:
    """The prompts' features, one tensor per site."""
    parts = [mixtures.director.describe(collator(samples[start : start + BATCH])) for start in range(0, len(samples), BATCH)]
    return [torch.cat(site) for site in zip(*parts, strict=True)]


def _short(features: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    return torch.cat([features[:, :-1] @ matrix, features[:, -1:]], dim=-1)


def crossed(tests: dict[str, list[Sample]]) -> dict[str, list[Sample]]:
    """The prompts of `CROSSED`, by its keys, from the tasks' test samples."""
    return {
        key: [Sample.ask(question, "?", images=one.images, id=f"{key}/{one.id}") for name in names for one in tests[name][:EACH]]
        for key, (question, names) in CROSSED.items()
    }


def learn(train: dict, *, sites: list[int], width: int | None) -> tuple[PromptRouter, list[torch.Tensor]]:
    """A router that saw `train`, and what shortens a description at each site."""
    dim = next(iter(train.values()))[0].shape[1] - 1  # the last column says whether there is an image
    router = PromptRouter(layers=sites, dim=(dim - 2) // 2, width=width)
    keep = [projection(dim, width) if width else torch.eye(dim) for _ in sites]
    for name, features in train.items():
        router.observe(name, [_short(features[site], matrix) for site, matrix in zip(sites, keep, strict=True)])
    return router, keep


def accuracy(train: dict, test: dict, *, sites: list[int], width: int | None) -> tuple[dict, int]:
    """Per task how many prompts went where they belong, and the bytes kept per task."""
    router, keep = learn(train, sites=sites, width=width)
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


def routed(train: dict, test: dict, pool: tuple[str, ...], names: tuple[str, ...], *, count: int | None = None) -> dict:
    """How many prompts of the tasks `names` went where they belong, per threshold, if the pool holds the tasks `pool`."""
    known = {name: [site[:count] for site in train[name]] if name != BASE else train[name] for name in (*pool, BASE)}
    router, keep = learn(known, sites=[0, 1, 2], width=WIDTH)
    found = {}
    for name in names:
        shown = [_short(site, matrix) for site, matrix in zip(test[name], keep, strict=True)]
        right = pool.index(name) if name in pool else len(pool)
        found[name] = [
            int((router.log_weights(shown, experts=pool, temperature=None, threshold=threshold).argmax(dim=-1) == right).sum())
            for threshold in THRESHOLDS
        ]
    return found


def _added(rows: list[dict]) -> list[int]:
    return [sum(column) for column in zip(*(counts for row in rows for counts in row.values()), strict=True)]


def rejection(train: dict, test: dict) -> dict:
    """Prompts at the right place per threshold: own prompts at their expert, foreign ones with images at the base model."""
    without = {name: tuple(other for other in STREAM if other != name) for name in STREAM}
    own = routed(train, test, STREAM, STREAM)
    single = {name: routed(train, test, without[name], (name,))[name] for name in STREAM}
    groups = {}
    for group, left_out in GROUPS.items():
        pool = tuple(name for name in STREAM if name not in left_out)
        groups[group] = {"foreign": _added([routed(train, test, pool, left_out)]), "own": _added([routed(train, test, pool, pool)])}
    small = {}
    for count in (None, FEW):
        alone = {name: routed(train, test, (name,), STREAM, count=count) for name in STREAM}
        apart = [{o: n for o, n in row.items() if o != name and {o, name} != set(TWINS)} for name, row in alone.items()]
        small[str(count or "all")] = {"own": _added([{name: row[name]} for name, row in alone.items()]), "foreign": _added(apart)}
        small[str(count or "all")]["foreign_of"] = sum(len(test[other][0]) for row in apart for other in row)
    texts = routed(train, test, STREAM, FOREIGN)
    others = {name: {"found": counts, "of": len(test[name][0])} for name, counts in routed(train, test, STREAM, (NEVER, *CROSSED)).items()}
    return {"thresholds": THRESHOLDS, "default": THRESHOLD, "width": WIDTH, "prompts_per_task": len(test[STREAM[0]][0]), "own": own,
            "left_out": single, "groups": groups, "others": others, "text": texts, "pools_of_one_task": small}  # fmt: skip


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
    tests = {}
    for name in (*STREAM, *FOREIGN, NEVER):
        task = load_task(name, **sizes)
        if name in STREAM:
            train[name] = describe(mixtures, collator, list(task.train))
        tests[name] = list(task.test)
        test[name] = describe(mixtures, collator, tests[name])
        print(f"described {name} after {time.perf_counter() - started:.0f} s", flush=True)
    for name, samples in crossed(tests).items():
        test[name] = describe(mixtures, collator, samples)
    found = []
    for sites in ([0, 1, 2], [0], [1], [2]):
        for width in (None, 512, 256, 128):
            rows, stored = accuracy(train, {name: test[name] for name in (*STREAM, *FOREIGN)}, sites=sites, width=width)
            own = [rows[name]["found"] / rows[name]["of"] for name in STREAM]
            foreign = [rows[name]["found"] / rows[name]["of"] for name in FOREIGN]
            layers = [mixtures.prompt_router.layers[site] for site in sites]
            line = {"layers": layers, "width": width, "own": sum(own) / len(own), "foreign": sum(foreign) / len(foreign), "bytes": stored}
            print(line, flush=True)
            found.append({**line, "tasks": rows})
    foreign = rejection(train, test)
    print({"own": _added([foreign["own"]]), "left_out": _added([foreign["left_out"]])}, flush=True)
    write_json(
        options.out,
        {"model": "smol", "train_prompts": options.train, "seed": options.seed, "variants": found, "foreign": foreign,
         "seconds": round(time.perf_counter() - started, 1)},
    )  # fmt: skip


if __name__ == "__main__":
    main()
