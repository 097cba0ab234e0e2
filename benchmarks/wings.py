"""What learners cost: step time and peak memory against the host alone, LoRA of as many parameters, and an eager form.

The eager form materialises attention in every layer, as published implementations do: the router reads the weights of all
heads, and the learners' masks and softmax are written out. It gives the same outputs; this is checked before anything is
timed. All forms take turns within each repeat; the table shows medians as ratios to LoRA.

    python benchmarks/wings.py --lengths 256 512 1024 2048 --out docs/wings_speed.json
"""

import argparse
import math
import multiprocessing
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from alula import Routing, attach
from alula.files import write_json
from alula.learners import attach_learners
from alula.learners.attention import AttentionMixture
from alula.learners.features import IMAGE, KEYWORD, TEXT

FORMS = ("host", "lora", "learners", "eager")
IMAGE_TOKEN, NUM_IMAGE_TOKENS = 5, 16
RANK = 16


def make_model(*, hidden: int, num_layers: int, eager: bool) -> LlavaForConditionalGeneration:
    """A random LLaVA; at the default width its decoder is as wide as SmolLM2-135M."""
    heads = hidden // 64
    text = LlamaConfig(
        vocab_size=1024, hidden_size=hidden, intermediate_size=hidden * 8 // 3, num_hidden_layers=num_layers,
        num_attention_heads=heads, num_key_value_heads=heads // (3 if heads % 3 == 0 else 4), max_position_embeddings=8192,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=56, patch_size=14
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, vision_feature_select_strategy="default")
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    model.get_decoder().set_attn_implementation("eager" if eager else "sdpa")
    return model


class EagerMixture(nn.Module):
    """The same mixture with every matrix written out."""

    def __init__(self, mixture: AttentionMixture) -> None:
        super().__init__()
        self.mixture = mixture

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The host's output with the learners' part in it."""
        mixture, features = self.mixture, kwargs.pop(KEYWORD)
        out, weights = mixture.host(*args, **kwargs)
        hidden, layer0 = features.memo.residual[mixture.index] + out, features.memo.layer0
        marks, tokens = features.marks, hidden.shape[1]
        gate = mixture.router.gate
        scores = nn.functional.silu(weights.sum(dim=1) @ gate.weight[:, :tokens].T + gate.bias).softmax(dim=-1)
        causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        added = torch.zeros_like(hidden)
        for index, (name, column) in enumerate((("image", IMAGE), ("text", TEXT))):
            picked = marks[0, :, column].nonzero().squeeze(1)
            mask = None if name == "image" else causal[:, picked]
            rotary = kwargs["position_embeddings"]
            said = eager_learner(mixture.learners[name], hidden, layer0[:, picked], rotary, picked, mask, mixture)
            added = added + scores[..., index : index + 1] * said
        return out + added, None


def eager_learner(
    learner: Any, hidden: Tensor, x: Tensor, rotary: Any, picked: Tensor, mask: Tensor | None, mixture: AttentionMixture
) -> Tensor:
    """Equation 4 with explicit attention weights."""
    heads = lambda t: t.unflatten(-1, (-1, learner.head_dim)).transpose(1, 2)  # noqa: E731
    turn, turn_keys = mixture._rotate(rotary), mixture._rotate(tuple(part[:, picked] for part in rotary))
    queries, keys = turn(heads(hidden + learner.q(hidden))), turn_keys(heads(x + learner.k(x)))
    scores = (queries @ keys.transpose(-1, -2)).float() / math.sqrt(learner.head_dim)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = torch.nan_to_num(scores.softmax(dim=-1)).to(hidden.dtype)
    return learner.o((weights @ heads(x + learner.v(x))).transpose(1, 2).flatten(2))


def prepare(form: str, *, hidden: int, num_layers: int) -> LlavaForConditionalGeneration:
    """The model in one of the forms, its small parts trainable."""
    model = make_model(hidden=hidden, num_layers=num_layers, eager=form == "eager")
    model.requires_grad_(False)
    if form == "lora":
        parameters = num_layers * 2 * 8 * hidden * RANK
        mixtures = attach(model, routers=())
        per_rank = sum(mixture.host.in_features + mixture.host.out_features for mixture in mixtures.sites.values())
        mixtures.grow("lora", rank=round(parameters / per_rank))
        mixtures.routing = Routing(fixed={"lora": 1.0})
        mixtures.train_expert("lora")
    if form in ("learners", "eager"):
        learners = attach_learners(model, rank=RANK, router="position")
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in learners.parameters().values():
                parameter.normal_(std=0.02)
        learners.train("image", "text")
        if form == "eager":
            model.get_decoder().set_attn_implementation("eager")
            for path, mixture in learners.sites.items():
                model.set_submodule(path, EagerMixture(mixture))
    return model


def batch_of(length: int) -> dict[str, Tensor]:
    """One row: eight words, an image of 16 tokens, words."""
    ids = torch.randint(6, 1000, (1, length), generator=torch.Generator().manual_seed(2))
    ids[0, 8 : 8 + NUM_IMAGE_TOKENS] = IMAGE_TOKEN
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 56, 56)}


def step(model: nn.Module, batch: dict[str, Tensor]) -> float:
    """Seconds of forward and, where something trains, backward."""
    started = time.perf_counter()
    logits = model(**batch, use_cache=False, logits_to_keep=1).logits
    if logits.requires_grad:
        logits.sum().backward()
    return time.perf_counter() - started


def peak(form: str, length: int, hidden: int, num_layers: int, threads: int, out: Any) -> None:
    """MB above what the process had before its first step; run in a process of its own."""
    torch.set_num_threads(threads)
    model = prepare(form, hidden=hidden, num_layers=num_layers)
    step(model, batch_of(32))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = high_water_mark()
    step(model, batch_of(length))
    out.put(high_water_mark() - before)


def high_water_mark() -> float:
    """Peak resident memory of this process in MB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    size = {"hidden": options.hidden, "num_layers": options.layers}
    models = {form: prepare(form, **size) for form in FORMS}
    batch = batch_of(128)
    with torch.no_grad():
        torch.testing.assert_close(models["learners"](**batch).logits, models["eager"](**batch).logits, rtol=1e-3, atol=1e-4)
    rows = []
    spawn = multiprocessing.get_context("spawn")
    for length in options.lengths:
        batch, seconds = batch_of(length), {form: [] for form in FORMS}
        for repeat in range(options.repeats + 1):
            for form in FORMS if repeat % 2 else FORMS[::-1]:
                taken = step(models[form], batch)
                if repeat:  # the first is warm-up
                    seconds[form].append(taken)
        row: dict[str, Any] = {"length": length, "seconds": {form: statistics.median(found) for form, found in seconds.items()}}
        row["megabytes"] = {}
        for form in FORMS:
            queue = spawn.Queue()
            process = spawn.Process(target=peak, args=(form, length, *size.values(), options.threads, queue))
            process.start()
            row["megabytes"][form] = round(queue.get(), 1)
            process.join()
        lora = row["seconds"]["lora"]
        ratios = ", ".join(f"{form} {row['seconds'][form] / lora:.2f}" for form in FORMS)
        memory = ", ".join(f"{form} {row['megabytes'][form]:.0f}" for form in FORMS)
        print(f"{length:5d} tokens: step / LoRA's step: {ratios}; peak MB: {memory}", flush=True)
        rows.append(row)
    if options.out:
        write_json(
            options.out,
            {"rows": rows, **size, "rank": RANK, "repeats": options.repeats, "threads": options.threads, "torch": torch.__version__},
        )


if __name__ == "__main__":
    main()
