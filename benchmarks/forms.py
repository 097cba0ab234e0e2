"""Where the two forms of a routed update meet: every expert at once (dense), and a loop over the experts that somebody chose (grouped).

One update of one layer, the top 2 of some experts, fp32. Both forms take turns, every other repeat backwards, and must agree; the
figures are medians of process time. `alula.experts.choose.DENSE_RANKS` is where one gives way to the other.

    python benchmarks/forms.py --threads 1 --out docs/forms_speed.json
    python benchmarks/forms.py --small
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alula.experts.dense import dense_update
from alula.experts.grouped import grouped_update
from alula.files import write_json

SLOTS = 2
Row = dict[str, Any]
Form = Callable[[], Tensor]


def make_forms(width: int, experts: int, *, rank: int, tokens: int, trains: bool) -> tuple[dict[str, Form], list[Tensor]]:
    """Both forms of the same update, and what they have gradients for."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    down, up = ([random(*shape) / shape[1] ** 0.5 for _ in range(experts)] for shape in ((rank, width), (width, rank)))
    weights, index = random(1, tokens, experts).topk(SLOTS, dim=-1)
    x, onto, weights = random(1, tokens, width), random(1, tokens, width), weights.softmax(dim=-1)
    leaves = [tensor.requires_grad_(trains) for tensor in (x, onto, weights, *down, *up)]
    gradient = random(1, tokens, width)
    options: dict[str, Any] = {"down": down, "up": up, "scales": [1.0] * experts, "onto": onto, "in_place": False, "dtype": x.dtype}

    def finished(out: Tensor) -> Tensor:
        if trains:
            out.backward(gradient)
        return out

    return {
        "dense": lambda: finished(dense_update(x, weights, index, **options)),
        "loop": lambda: finished(grouped_update(*(tensor.flatten(0, 1) for tensor in (x, weights, index)), **options)),
    }, leaves


def measure(forms: dict[str, Form], leaves: list[Tensor], *, repeats: int) -> dict[str, float]:
    """Median milliseconds of each form."""
    found: dict[str, list[float]] = {name: [] for name in forms}
    for repeat in range(repeats + 1):
        for name in list(forms) if repeat % 2 else list(forms)[::-1]:
            for tensor in leaves:
                tensor.grad = None
            started = time.process_time()
            forms[name]()
            if repeat:  # the first is warm-up
                found[name].append(1e3 * (time.process_time() - started))
    return {name: statistics.median(values) for name, values in found.items()}


def compare(width: int, experts: int, options: argparse.Namespace) -> Row:
    """One line of the table."""
    row: Row = {"width": width, "experts": experts, "ranks_per_slot": experts * options.rank / SLOTS}
    for name, trains in (("forward", False), ("training", True)):
        forms, leaves = make_forms(width, experts, rank=options.rank, tokens=options.tokens, trains=trains)
        results = []
        for form in forms.values():
            out = form()
            results.append([out.detach(), *(tensor.grad for tensor in leaves if tensor.grad is not None)])
            for tensor in leaves:
                tensor.grad = None
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-3)  # sums over many tokens, in another order
        row[name] = measure(forms, leaves, repeats=options.repeats)
    return row


def table(rows: list[Row]) -> str:
    """Markdown, in milliseconds."""
    names = ("width", "experts", "ranks per slot", "dense, forward", "loop", "dense, forward and backward", "loop")
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in rows:
        sizes = [f"{row[key]:g}" for key in ("width", "experts", "ranks_per_slot")]
        times = [f"{row[name][form]:.1f}" for name in ("forward", "training") for form in ("dense", "loop")]
        lines.append(f"| {' | '.join((*sizes, *times))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--experts", type=int, nargs="+", default=[4, 6, 8, 12])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--small", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    if options.small:
        options.widths, options.experts, options.rank, options.tokens, options.repeats = [16], [2, 4], 2, 8, 2
    torch.set_num_threads(options.threads)
    rows = [compare(width, experts, options) for width in options.widths for experts in options.experts]
    print(table(rows))
    if options.out:
        sizes = {key: value for key, value in vars(options).items() if key != "out"}
        write_json(options.out, {"rows": rows, "slots": SLOTS, **sizes, "torch": torch.__version__})


if __name__ == "__main__":
    main()
