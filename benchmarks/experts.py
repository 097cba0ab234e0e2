"""What token-routed low-rank experts cost beside one LoRA and beside every published form that installs here.

Three tables, each with its bars: one linear layer whose experts share a rank; whole models with top-2 of many experts against one
LoRA of the rank that is active; decoding one token with a large pool. All forms of a table take turns within each repeat, and only
ratios of medians are shown. Where a bar cannot be met, what the machine's operations and bytes allow stands beside it.

    python benchmarks/experts.py --out docs/experts_speed.json
    python benchmarks/experts.py --small
"""

import argparse
import copy
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from expert_tables import FEW, decode_table, layer_table, whole_table
from peers import DECODING, EVERY_EXPERT, WHOLE, layer_forms, quiet, tell
from roofline import Ceilings, layer_extra, measure, step_extra, token_extra
from torch import Tensor, nn
from wide_models import MODELS, SIZES, make_model, tokens_of

from alula.files import write_json, write_text
from alula.mixture import Mixture

Row = dict[str, Any]
NO_GRADIENTS = ("frozen base",)
ALL_PEERS = ("512 wide", "2048 wide, short", "tiny")
"""Where every peer is measured: those that write each expert's output for each token need 20 GB and more elsewhere."""


def seconds_of(runs: dict[str, Callable[[], float | None]], *, repeats: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median seconds of each run, or of what it says itself; they take turns, and every other repeat backwards."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name in list(runs) if repeat % 2 else list(runs)[::-1]:
            started = clock()
            own = runs[name]()
            if repeat:  # the first is warm-up
                found[name].append(clock() - started if own is None else own)
    return {name: statistics.median(values) for name, values in found.items()}


def bytes_saved(run: Callable[[], Tensor], module: nn.Module | None) -> int:
    """Bytes kept for backward, each storage once, without parameters."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()} if module is not None else set()
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    del out
    return sum(size for place, size in kept.items() if place not in own)


def layer_rows(options: argparse.Namespace, ceilings: Ceilings) -> list[Row]:
    """One linear layer, experts x rank constant, every expert speaking."""
    width, rows = options.layer_width, []
    x = torch.randn(1, options.layer_tokens, width)
    for experts in options.layer_experts:
        torch.manual_seed(0)
        with quiet():
            forms = layer_forms(lambda: nn.Linear(width, width, bias=False), rank=options.layer_rank, experts=experts)
        tell(next(form for form in forms.values() if isinstance(form, Mixture)), tuple(x.shape[:2]))  # type: ignore[arg-type]

        def train(form: nn.Module) -> None:
            form.zero_grad()  # as before each training step
            form(x.clone().requires_grad_()).square().mean().backward()

        def forward(form: nn.Module) -> None:
            with torch.no_grad():
                form(x)

        row: Row = {"experts": experts, "least": {}}
        repeats = options.repeats * (1 if options.small else 4)  # a layer takes milliseconds
        for what, run in (("train", train), ("forward", forward)):
            runs = {name: lambda form=form, run=run: run(form) for name, form in forms.items()}
            row[what] = seconds_of(runs, repeats=repeats, clock=options.clock)
            extra = layer_extra(width, ceilings, tokens=options.layer_tokens, experts=experts, backward=what == "train")
            row["least"][what] = 1 + extra / row[what]["PEFT LoRA"]
        row["saved"] = {name: bytes_saved(lambda form=form: form(x.clone().requires_grad_()), form) for name, form in forms.items()}
        rows.append(row)
        print("\n".join(layer_table([row])[2:]), flush=True)
    return rows


def step(call: Callable[..., Any], batch: dict[str, Tensor]) -> None:
    """Forward and, where something trains, backward, from no gradients as in training."""
    if isinstance(call, nn.Module):
        call.zero_grad()
    logits = call(**batch, use_cache=False).logits
    if logits.requires_grad:
        logits.float().square().mean().backward()


def build(name: str, model: nn.Module, *, experts: int, rank: int) -> Any:
    """A form on a copy of the model, or why it cannot be."""
    try:
        with quiet():
            return WHOLE[name](copy.deepcopy(model), experts=experts, rank=rank, slots=min(2, experts))
    except Exception as error:  # whatever keeps a peer from this model; ours has to run
        if name == "ours":
            raise
        print(f"{name} with {experts} experts does not run here: {str(error).splitlines()[0]}", flush=True)
        return None


def apart(rows: Callable[..., list[Row]], *arguments: Any) -> list[Row]:
    """The rows from a process of its own: with it goes all that the peers leave behind in memory."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(rows, *arguments).result()


def whole_rows(name: str, options: argparse.Namespace, ceilings: Ceilings) -> list[Row]:
    """A whole model, two of `experts` speaking for each token, against one LoRA of twice the rank."""
    torch.set_num_threads(options.threads)
    model, shape, rows = make_model(name), SIZES.get(name, (options.batch, options.length)), []
    batch = tokens_of(*shape)
    found = [module for path, module in model.get_decoder().named_modules() if isinstance(module, nn.Linear) and "_proj" in path]
    shapes = [(linear.in_features, linear.out_features) for linear in found]
    for experts in options.experts:
        if name.endswith("short") and experts != FEW:
            continue
        names = list(WHOLE) if name in ALL_PEERS and (experts == FEW or options.small) else ["PEFT LoRA", "ours"]
        forms = {form: call for form in names if (call := build(form, model, experts=experts, rank=options.rank)) is not None}

        def forward(call: Callable[..., Any]) -> None:
            with torch.no_grad():
                call(**batch, use_cache=False)

        row: Row = {"model": name, "experts": experts}
        with quiet():
            for what, run in (("train", lambda call: step(call, batch)), ("forward", forward)):
                runs = {form: lambda call=call, run=run: run(call) for form, call in forms.items()}
                row[what] = seconds_of(runs, repeats=options.repeats, clock=options.clock)
            row["saved"] = {form: saved_by(call, batch) for form, call in forms.items() if form not in NO_GRADIENTS}
        slots, count = min(2, experts), shape[0] * shape[1]
        extra = step_extra(shapes, ceilings, tokens=count, experts=experts, rank=options.rank, slots=slots)
        row["least"] = 1 + extra / row["train"]["PEFT LoRA"]
        del forms
        gc.collect()
        row["peak"] = {} if options.small else {form: peak_of(form, name, experts, options, shape) for form in names}
        rows.append(row)
        print("\n".join(whole_table([row])[2:]), flush=True)
    return rows


def saved_by(call: Any, batch: dict[str, Tensor]) -> int:
    return bytes_saved(lambda: call(**batch, use_cache=False).logits, call if isinstance(call, nn.Module) else None)


def peak_of(form: str, model: str, experts: int, options: argparse.Namespace, shape: tuple[int, int]) -> float | None:
    """MB that a second train step adds at its peak, measured in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    queue = spawn.Queue()
    process = spawn.Process(target=_peak, args=(form, model, experts, options.rank, shape, options.threads, queue))
    process.start()
    found = queue.get()
    process.join()
    return found


def _peak(form: str, model: str, experts: int, rank: int, shape: tuple[int, int], threads: int, out: Any) -> None:
    torch.set_num_threads(threads)
    call = build(form, make_model(model), experts=experts, rank=rank)
    if call is None:
        out.put(None)
        return
    with quiet():
        step(call, tokens_of(1, 8))  # gradients are there
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _high_water_mark()
        step(call, tokens_of(*shape))
    out.put(_high_water_mark() - before)


def _high_water_mark() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def decode_rows(name: str, options: argparse.Namespace, ceilings: Ceilings) -> list[Row]:
    """One token after the other, one answer at a time."""
    torch.set_num_threads(options.threads)
    if name.endswith("short"):  # it has the weights of another
        return []
    model, prompt, rows = make_model(name), tokens_of(1, options.prompt), []
    linears = [module for path, module in model.get_decoder().named_modules() if isinstance(module, nn.Linear) and "_proj" in path]
    shapes = [(linear.in_features, linear.out_features) for linear in linears]
    for experts in options.pools:
        runs: dict[str, Callable[[], Any]] = {}
        for form, make in DECODING.items():
            if form in EVERY_EXPERT and experts > FEW and not options.small:
                continue  # it would write every expert's output for every token of the prompt
            with quiet():
                call = make(copy.deepcopy(model), experts=experts, rank=options.rank, slots=min(2, experts))
            runs[form] = lambda call=call: answer(call, prompt, tokens=options.tokens, clock=options.clock)
        with quiet(), torch.no_grad():
            seconds = seconds_of(runs, repeats=options.repeats, clock=options.clock)
        row: Row = {"model": name, "experts": experts, "decode": {form: taken / options.tokens for form, taken in seconds.items()}}
        row["least"] = {}
        for form, slots, gated, calls in (("ours, expert told", 1, False, 2), ("ours, gates", 2, True, 8)):
            extra = token_extra(shapes, ceilings, experts=experts, rank=options.rank, slots=slots, gated=gated, calls=calls)
            row["least"][form] = 1 + extra / row["decode"]["frozen base"]
        rows.append(row)
        print("\n".join(decode_table([row])[2:]), flush=True)
    return rows


def answer(call: Callable[..., Any], prompt: dict[str, Tensor], *, tokens: int, clock: Callable[[], float]) -> float:
    """The seconds of `tokens` tokens from the cache, after a prompt of a few."""
    out = call(**prompt, use_cache=True)
    mask, started = prompt["attention_mask"], clock()
    for _ in range(tokens):
        mask = torch.cat([mask, mask[:, :1]], dim=1)
        token = out.logits[:, -1:].argmax(dim=-1)
        out = call(input_ids=token, attention_mask=mask, past_key_values=out.past_key_values, use_cache=True)
    return clock() - started


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="everything once, tiny: does it run?")
    parser.add_argument("--models", nargs="+", default=["512 wide", "2048 wide", "2048 wide, short", "smol"], choices=[*MODELS, "smol"])
    parser.add_argument("--experts", type=int, nargs="+", default=[1, 2, 8, 32, 64, 256])
    parser.add_argument("--pools", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--layer-experts", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--layer-width", type=int, default=1024)
    parser.add_argument("--layer-tokens", type=int, default=512)
    parser.add_argument("--layer-rank", type=int, default=64, help="of all experts together")
    parser.add_argument("--rank", type=int, default=16, help="of each expert of a whole model")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--cpu-time", action="store_true", help="count this process's seconds, not the wall's: for a busy machine, one thread"
    )
    parser.add_argument("--out", type=Path, default=None, help="a .json file; the tables go into the .md file beside it")
    options = parser.parse_args()
    if options.small:
        small = {"models": ["tiny"], "experts": [4], "pools": [4], "layer_experts": [2], "layer_width": 32, "layer_rank": 8, "rank": 4}
        vars(options).update({**small, "layer_tokens": 16, "batch": 1, "length": 16, "prompt": 4, "tokens": 2, "repeats": 1})
    options.clock = time.process_time if options.cpu_time else time.perf_counter
    return options


def main() -> None:
    options = read_options()
    torch.set_num_threads(options.threads)
    ceilings = measure() if not options.small else measure(size=64, megabytes=1, repeats=1)
    found: dict[str, list[Row]] = {"layer": layer_rows(options, ceilings), "whole": [], "decoding": []}
    for kind, rows in (("decoding", decode_rows), ("whole", whole_rows)):  # the shorter one first
        for name in options.models:
            found[kind] += apart(rows, name, options, ceilings)
            text = written(found, options, ceilings)
    print(text)


def written(found: dict[str, list[Row]], options: argparse.Namespace, ceilings: Ceilings) -> str:
    """The tables of what was measured so far, kept in the files that `options` name."""
    machine = f"{ceilings.flops / 1e9:.0f} GFLOP/s, {ceilings.bytes / 1e9:.1f} GB/s, {1e6 * ceilings.call:.1f} µs a call"
    parts = [
        ["## One layer, experts × rank constant, every expert speaking", "", *layer_table(found["layer"])],
        ["## Whole models, two experts of rank r per token against one LoRA of rank 2r", "", *whole_table(found["whole"])],
        ["## Decoding", "", *decode_table(found["decoding"])],
        [f"{options.threads} threads; measured ceilings: {machine}; torch {torch.__version__}."],
    ]
    text = "\n\n".join("\n".join(part) for part in parts) + "\n"
    if options.out:
        sizes = {key: value for key, value in vars(options).items() if key not in ("out", "clock")}
        write_json(options.out, {**found, "ceilings": vars(ceilings), **sizes})
        write_text(options.out.with_suffix(".md"), text)
    return text


if __name__ == "__main__":
    main()
