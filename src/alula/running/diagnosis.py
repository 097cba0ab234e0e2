"""How a router behaved: who spoke where, how sure it was, and on which patch and word of a real image."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alula.context import BASE, Routing
from alula.data.collate import Collator
from alula.data.sample import Sample
from alula.data.stream import Stream, Task
from alula.files import read_jsonl, write_json
from alula.methods import Arm, Method
from alula.mixture import Mixtures
from alula.routers import GateRouter
from alula.running.shares import keep_shares

SAMPLES = 24
"""Test samples per task that the router's statistics are taken from."""


class WeightLog:
    """Adds up which expert got how much weight: per layer over tokens, and per token over layers."""

    def __init__(self, mixtures: Mixtures, shape: tuple[int, int], valid: Tensor) -> None:
        self.mixtures, self.shape, self.valid = mixtures, shape, valid
        self.num_experts = len(mixtures.names)
        self.by_layer: dict[int, Tensor] = {}
        self.by_token = torch.zeros(*shape, self.num_experts + 1)
        self.count = 0
        self._layer = {
            path: next(i for i, root in enumerate(mixtures.anatomy.layers) if path.startswith(f"{root}.")) for path in mixtures.sites
        }

    def __call__(self, path: str, weights: Tensor, active: tuple[int, ...]) -> None:
        """A recorder (see `Context`)."""
        if weights.shape[0] != self.shape[0]:  # keys of cross-attention are not tokens of the prompt
            return
        whole = torch.zeros(*self.shape, self.num_experts + 1)
        whole[..., list(active)] = weights.float().cpu().expand(*self.shape, len(active))
        whole[..., -1] = (1 - whole[..., :-1].sum(dim=-1)).clamp(min=0)
        layer = self._layer[path]
        mean = whole[self.valid].mean(dim=0)
        self.by_layer[layer] = self.by_layer.get(layer, torch.zeros_like(mean)) + mean
        self.by_token += whole
        self.count += 1

    @property
    def site_layers(self) -> list[int]:
        """The decoder layers that carry mixtures."""
        return sorted(set(self._layer.values()))

    def layers(self) -> Tensor:
        """Mean weight, site layers x experts (the last is the base model)."""
        if not self.by_layer:  # no expert spoke at all
            rows = torch.zeros(len(self.site_layers), self.num_experts + 1)
            rows[:, -1] = 1.0
            return rows
        return torch.stack([self.by_layer[layer] / self.by_layer[layer].sum() for layer in self.site_layers])

    def tokens(self) -> Tensor:
        """Mean weight over sites, batch x tokens x experts."""
        if not self.count:
            self.by_token[..., -1] = 1.0
            return self.by_token
        return self.by_token / self.count


@torch.no_grad()
def log_weights(mixtures: Mixtures, model: nn.Module, batch: dict[str, Tensor], arm: Arm, task: Task) -> WeightLog:
    """One forward over `batch` with the arm's routing, decided on the prompts; the weights every site gave."""
    device = next(model.parameters()).device
    batch = {key: value.to(device) for key, value in batch.items()}
    valid = batch["attention_mask"].bool().cpu()
    log = WeightLog(mixtures, (valid.shape[0], valid.shape[1]), valid)
    with arm.enter(task), arm.around(batch), mixtures.director.recording(recorder=log):
        model(**{key: value for key, value in batch.items() if key != "labels"})
    return log


def diagnose(method: Method, model: nn.Module, collator: Collator, stream: Stream, *, folder: Path, num_examples: int) -> None:
    """Writes ``routing.json`` and ``examples.json``, and ``shares.json`` of MoME's mixtures; a method without routers has none."""
    keep_shares(method, model, collator, stream, folder=folder)
    mixtures = getattr(method, "mixtures", None)
    arms = [arm for arm in method.arms() if arm.is_routed]
    if not isinstance(mixtures, Mixtures) or not arms:
        return
    model.eval()
    write_json(folder / "routing.json", [_routing(mixtures, model, collator, stream, arm) for arm in arms])
    if num_examples:
        _write_examples(mixtures, model, collator, stream, arms, folder=folder, count=num_examples)


def _routing(mixtures: Mixtures, model: nn.Module, collator: Collator, stream: Stream, arm: Arm) -> dict[str, Any]:
    experts = [*mixtures.names, BASE]
    weights, share, margin, false_use = [], {}, {}, {}
    tasks = [*stream.tasks, *(task for task in stream.base_tasks if task.scoring == "ranked")]
    for task in tasks:
        log = log_weights(mixtures, model, collator(list(task.test[:SAMPLES])), arm, task)
        layers = log.site_layers
        by_layer, by_token = log.layers(), log.tokens()[log.valid]
        weights.append(by_layer.tolist())
        best = by_token.topk(2, dim=-1).values
        margin[task.name] = float((best[:, 0] - best[:, 1]).mean())
        if task.is_base:
            false_use[task.name] = float(1 - by_token[:, -1].mean())
        elif task.name in mixtures.names:
            share[task.name] = float(by_token[:, mixtures.index(task.name)].mean())
    return {
        "arm": arm.name,
        "experts": experts,
        "layers": layers,
        "tasks": [task.name for task in tasks],
        "weights": weights,
        "right_expert_share": share,
        "top1_margin": margin,
        "gate_cosines": _gate_cosines(mixtures) if arm.name.startswith("gate") else None,
        "false_use": false_use,
        "samples_per_task": SAMPLES,
    }


def _gate_cosines(mixtures: Mixtures) -> list[list[float]]:
    """Mean over sites of the cosine between centred gates."""
    total = torch.zeros(len(mixtures.names), len(mixtures.names))
    for mixture in mixtures.sites.values():
        router = mixture.named_routers()["gate"]
        assert isinstance(router, GateRouter)
        gates = torch.stack([gate.detach().float().cpu() for gate in router.gates])
        unit = nn.functional.normalize(gates - gates.mean(dim=-1, keepdim=True), dim=-1)
        total += unit @ unit.T
    return (total / len(mixtures.sites)).tolist()


def _write_examples(
    mixtures: Mixtures, model: nn.Module, collator: Collator, stream: Stream, arms: Sequence[Arm], *, folder: Path, count: int
) -> None:
    token_arms = [arm for arm in arms if _level(mixtures, arm, stream.tasks[0]) != "sample"]
    found = []
    for number in range(count):
        task = stream.tasks[number % len(stream.tasks)]
        position = number // len(stream.tasks)
        arm = (token_arms or list(arms))[0] if position % 2 == 0 else arms[0]
        if position >= len(task.test):
            continue
        found.append(_example(mixtures, model, collator, task, position, arm, folder=folder, number=number))
    write_json(folder / "examples.json", found)


def _level(mixtures: Mixtures, arm: Arm, task: Task) -> str:
    with contextlib.ExitStack() as stack:
        stack.enter_context(arm.enter(task))
        routing: Routing = mixtures.current
    return routing.level


def _example(
    mixtures: Mixtures, model: nn.Module, collator: Collator, task: Task, position: int, arm: Arm, *, folder: Path, number: int
) -> dict[str, Any]:
    sample: Sample = task.test[position]
    batch = collator([sample])
    weights = log_weights(mixtures, model, batch, arm, task).tokens()[0]
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    image = mixtures.anatomy.image_mask(batch["input_ids"])[0]
    tokens = []
    for index, (token, label) in enumerate(zip(ids.tolist(), labels.tolist(), strict=True)):
        kind = "image" if bool(image[index]) else "answer" if label != -100 else "question"
        text = "" if kind == "image" else collator.tokenizer.decode([token])
        tokens.append({"text": text, "kind": kind, "weights": [round(value, 4) for value in weights[index].tolist()]})
    picture = None
    images = sample.open_images()
    if images:
        picture = f"examples/{number:02d}.png"
        (folder / "examples").mkdir(parents=True, exist_ok=True)
        images[0].save(folder / picture)
    side = round(int(image.sum()) ** 0.5)
    return {
        "task": task.name,
        "arm": arm.name,
        "question": sample.question,
        "reference": sample.answer,
        "before": _said(folder, 0, "default", task, position),
        "after": _said(folder, None, arm.name, task, position),
        "image": picture,
        "tokens": tokens,
        "grid": [side, side] if side and side * side == int(image.sum()) else [1, int(image.sum())],
        "experts": [*mixtures.names, BASE],
    }


def _said(folder: Path, row: int | None, arm: str, task: Task, position: int) -> str:
    rows = sorted((folder / "predictions").glob(f"row*/{arm}/{task.name}.jsonl"))
    wanted = [path for path in rows if row is None or path.parts[-3] == f"row{row:02d}"]
    return read_jsonl(wanted[-1])[position]["output"] if wanted else ""
