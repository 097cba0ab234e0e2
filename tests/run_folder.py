"""A small run folder with invented answers, in the format the trainer and the evaluator write."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from alula.files import read_jsonl, write_json, write_jsonl, write_text

TASKS = ("animals", "digits", "charts", "shapes")
ANSWERS = {"animals": ("cat", "hen", "fox"), "digits": ("4", "17", "62"), "charts": ("yes", "no"), "shapes": ("blue", "circle")}
BASE_TASKS = ("antonym", "definition", "prose")
NUM_SAMPLES = 60
LEARNT = {"animals": 0.49, "digits": 0.25, "charts": 0.40, "shapes": 0.56}
KEPT = {"finetune": 0.15, "rehearsal": 0.6, "routed:analytic": 0.95, "routed:gate": 0.65, "routed:oracle": 1.0, "joint": 1.0}
BASE_LOSS = {"finetune": 0.06, "rehearsal": 0.04, "joint": 0.03}
RECIPE = """model: smol
stream: [animals, digits, charts, shapes]
base_tasks: [antonym, definition, prose]
methods: [finetune, {name: rehearsal, train: {batch_size: 8}}, routed, joint]
seeds: [0, 1, 2]
train: {steps: 50, batch_size: 16}
"""


def write_run(folder: Path, *, seeds: int = 2, with_routing: bool = True, with_failures: bool = True) -> Path:
    """Writes the run and gives its folder back: four methods, `seeds` seeds, one crashed and one unfinished cell."""
    write_text(folder / "recipe.yaml", RECIPE)
    write_json(folder / "versions.json", {"alula": "0.1.0", "torch": "2.13.0", "python": "3.11.2", "machine": "2 x x86_64"})
    for seed in range(seeds):
        for method, arms in (("finetune", ()), ("rehearsal", ()), ("joint", ()), ("routed", ("analytic", "gate", "oracle"))):
            write_cell(folder / "cells" / f"{method}-seed{seed}", method, seed, arms or ("default",), with_routing=with_routing)
    if with_failures:
        crashed = folder / "cells" / f"wings-seed{seeds}"
        write_json(crashed / "crashed.json", {"error": "UserError: the loss is not finite at step 12 of task 'digits'."})
        write_cell(folder / "cells" / f"finetune-seed{seeds}", "finetune", seeds, ("default",), stages=2)
    return folder


def write_cell(cell: Path, method: str, seed: int, arms: tuple[str, ...], *, stages: int = 4, with_routing: bool = True) -> None:
    """Writes one cell; with fewer than four `stages` it looks as if it were still running."""
    generator = np.random.default_rng([seed, len(method)])
    luck = {name: np.random.default_rng([7, i]).random(NUM_SAMPLES) for i, name in enumerate((*TASKS, *BASE_TASKS))}
    rows: list[dict] = []
    for stage in [0, 1] if method == "joint" else range(stages + 1):
        for arm in arms if stage else ("default",):
            series = method if arm == "default" else f"{method}:{arm}"
            for name in (*TASKS, *BASE_TASKS):
                noise = generator.normal(0, 0.03, NUM_SAMPLES) if stage else 0.0
                answers = predict(name, series, stage, luck[name] + noise, seed=seed, method=method)
                write_jsonl(cell / "predictions" / f"row{stage:02d}" / arm / f"{name}.jsonl", answers)
                rows.append(score_row(name, stage, arm, answers) | ({"after": "joint"} if stage and method == "joint" else {}))
    write_jsonl(cell / "scores.jsonl", rows)
    costs = [cost_row(method, i) for i in range(stages)]
    if method == "joint":
        costs = [costs[0] | {"task": "joint", "samples_seen": 3200, "steps": 200, "seconds": 466.0}]
    write_jsonl(cell / "cost.jsonl", costs)
    if method == "routed" and with_routing:
        write_json(cell / "routing.json", [routing(arm, generator) for arm in ("analytic", "gate")])
        write_json(cell / "examples.json", [example(cell, i, generator) for i in range(3)])
    if stages == 4:
        write_json(cell / "done.json", {"finished": True})


def predict(name: str, series: str, stage: int, luck: np.ndarray, *, seed: int, method: str) -> list[dict]:
    """One row for each sample; `luck` below the chance of being right means right."""
    found = []
    lost = BASE_LOSS.get(series, 0.0) * (4 if series == "joint" and stage else stage)
    learnt = name in TASKS and (stage > TASKS.index(name) or (series == "joint" and stage > 0))
    forgotten = learnt and stage > TASKS.index(name) + 1
    chance = 0.72 - lost if name in BASE_TASKS else 0.05 + learnt * LEARNT[name] * (KEPT[series] if forgotten else 1.0)
    for i, value in enumerate(luck):
        answers = ANSWERS.get(name, ("big", "old"))
        reference = answers[i % len(answers)]
        right = bool(value < chance)
        chatter = not right and value > (0.97 if series != "finetune" else 0.7)
        output = reference if right else "I cannot see any image, but" if chatter else answers[(i + 1) % len(answers)]
        row = {"id": f"{name}-{i}", "task": name, "prompt": f"<image>\nQuestion {i} of {name}?", "reference": reference,
               "output": output, "score": float(right), "parsed": not chatter, "method": method, "seed": seed}  # fmt: skip
        if name == "prose":
            size = 80 + i
            bits = round((0.9 + 2 * lost + 0.1 * value) * size, 3)
            row |= {"output": "", "score": bits / size, "parsed": True, "loss_bits": bits, "bytes": size}
        found.append(row)
    return found


def score_row(name: str, stage: int, arm: str, answers: list[dict]) -> dict:
    """The line of ``scores.jsonl`` for `answers`."""
    is_bits = name == "prose"
    total = sum(r["loss_bits"] for r in answers) / sum(r["bytes"] for r in answers) if is_bits else 0.0
    score = total if is_bits else sum(r["score"] for r in answers) / len(answers)
    return {"row": stage, "after": TASKS[stage - 1] if stage else None, "arm": arm, "task": name, "is_base": name in BASE_TASKS,
            "score": score, "num_samples": len(answers), "unparsed": sum(not r["parsed"] for r in answers),
            "metric": "bits_per_byte" if is_bits else "exact_match", "higher_is_better": not is_bits, "seconds": 3.5}  # fmt: skip


def cost_row(method: str, i: int) -> dict:
    """What learning the task number `i` cost: rehearsal sees more samples, routed experts take more room."""
    factor = 1 + 0.2 * i if method == "rehearsal" else 1.0
    stored = 2_442_240 * (i + 1 if method == "routed" else 1)
    return {"task": TASKS[i], "samples_seen": int(800 * factor), "steps": 50, "seconds": 115.0 * factor + i, "trainable_parameters":
            2_442_240, "stored_parameters": stored, "stored_bytes": 4 * stored, "optimizer_targets": int(2400 * factor)}  # fmt: skip


def routing(arm: str, generator: np.random.Generator) -> dict:
    """What one router did: weights [task][layer][expert], base tasks too."""
    experts, layers = [*TASKS, "base"], [f"model.layers.{i}.self_attn" for i in range(12)]
    sharp = 3.0 if arm == "analytic" else 0.6
    scores = generator.normal(0, 0.4, (7, len(layers), 5)) + sharp * np.array([np.eye(5)[min(task, 4)] for task in range(7)])[:, None]
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    cosines = np.eye(4) * 0.67 + 0.33
    share = {name: float(weights[i, :, i].mean()) for i, name in enumerate(TASKS)}
    return {"arm": arm, "experts": experts, "layers": layers, "tasks": [*TASKS, *BASE_TASKS], "weights": weights.round(4).tolist(),
            "right_expert_share": share, "top1_margin": {name: value - 0.1 for name, value in share.items()},
            "gate_cosines": cosines.tolist() if arm == "gate" else None,
            "false_use": {name: float(1 - weights[i + 4, :, 4].mean()) for i, name in enumerate(BASE_TASKS)}}  # fmt: skip


def example(cell: Path, i: int, generator: np.random.Generator) -> dict:
    """One picture with sixteen image tokens, a question and an answer, with the weights of the experts on each token."""
    picture = Image.new("RGB", (128, 128), (245, 240, 228))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((24 + 8 * i, 30, 84, 96), fill=(70, 110, 190))
    draw.rectangle((70, 60, 110, 110), fill=(210, 120, 60))
    path = cell / "examples" / f"{i:02d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    question = [(word, "question") for word in ("What", " colour", " is", " the", " shape", "?")]
    words = [("<image>", "image")] * 16 + question + [(" blue", "answer")]
    weights = [generator.dirichlet([0.4, 0.3, 0.3, 2.0, 0.3]).round(3).tolist() for _ in words]
    tokens = [{"text": text, "kind": kind, "weights": own} for (text, kind), own in zip(words, weights, strict=True)]
    return {"task": TASKS[3 - i], "question": "What colour is the shape?", "reference": "blue", "before": "The shape is a circle.",
            "after": "blue" if i != 1 else "circle", "image": f"examples/{i:02d}.png" if i != 2 else None, "tokens": tokens, "grid": [4, 4],
            "experts": [*TASKS, "base"]}  # fmt: skip


def rows_of(run: Path, cell: str) -> dict[tuple[int, str, str], dict]:
    """The lines of a cell's ``scores.jsonl`` by row, arm and task."""
    return {(row["row"], row["arm"], row["task"]): row for row in read_jsonl(run / "cells" / cell / "scores.jsonl")}


def add_probes(cell: Path, scores: dict[int, float]) -> None:
    """Two probe tasks of the family ``iit`` in each row of the cell."""
    rows = read_jsonl(cell / "scores.jsonl")
    for stage, chance in scores.items():
        after = next(row["after"] for row in rows if row["row"] == stage)
        for name in ("iit_t", "iit_tv"):
            values = np.arange(20) < chance * 20
            lines = [{"id": f"{name}-{i}", "task": name, "score": float(value), "parsed": True} for i, value in enumerate(values)]
            write_jsonl(cell / "predictions" / f"row{stage:02d}" / "default" / f"{name}.jsonl", lines)
            rows.append({"row": stage, "after": after, "arm": "default", "task": name, "is_base": True, "is_probe": True, "score":
                         float(values.mean()), "num_samples": 20, "unparsed": 0, "metric": "ranked", "higher_is_better": True})  # fmt: skip
    write_jsonl(cell / "scores.jsonl", rows)


def attention_rows(before: list[float | None], after: list[float | None]) -> list[dict]:
    """What ``attention_shift.json`` holds of a cell, before and after learning."""
    curves = {"before": [0.2, 0.3], "itself": [0.5, 0.4], "between": [0.0, 0.0], "after": [0.3, 0.3]}
    return [
        {"row": row, "arm": "default", "layers": [0, 1], "curves": curves, "shift": 0.5, "interval": [0.1, 0.9], "n": len(shifts),
         "left_out": {}, "ids": [str(i) for i in range(len(shifts))], "shifts": shifts}
        for row, shifts in enumerate((before, after))
    ]  # fmt: skip
