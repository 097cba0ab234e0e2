"""What a routed update must cost at least on this machine: operations and bytes over measured ceilings. It times no model."""

import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What the machine can do.

    Attributes:
        flops: per second, of a large matrix product in fp32.
        bytes: per second, read and written, of a copy larger than the caches.
        call: seconds of one small operation, its dispatch from Python included.
    """

    flops: float
    bytes: float
    call: float


def measure(*, size: int = 1024, megabytes: int = 64, repeats: int = 5) -> Ceilings:
    """The ceilings here and now, the best of some repeats."""
    a, b, out = torch.randn(size, size), torch.randn(size, size), torch.empty(size, size)
    source = torch.zeros(megabytes << 18)
    target, small = torch.empty_like(source), torch.zeros(8)

    def best(run: object, count: int = 1) -> float:
        found = []
        for _ in range(repeats):
            started = time.perf_counter()
            for _ in range(count):
                run()  # type: ignore[operator]
            found.append((time.perf_counter() - started) / count)
        return min(found)

    product, copy = best(lambda: torch.mm(a, b, out=out)), best(lambda: target.copy_(source))
    return Ceilings(flops=2 * size**3 / product, bytes=2 * source.nbytes / copy, call=best(lambda: small.add_(1), 200))


def layer_ratio(width: int, ceilings: Ceilings, *, tokens: int, experts: int, rank: int) -> float:
    """Least seconds of one trained layer in which every expert speaks, over those with one LoRA of the rank of all together.

    Besides what both do: scores, their gradients to the tokens and to the gates, and one more gradient of the tokens to write and to add.

    Args:
        width: inputs and outputs of the layer.
        rank: of all experts together.
    """
    both = (2 * 2 * tokens * width**2 + 3 * 2 * tokens * rank * 2 * width) / ceilings.flops + 4 * 3 * tokens * width / ceilings.bytes
    gates = 3 * 2 * tokens * experts * width / ceilings.flops + 4 * 3 * tokens * width / ceilings.bytes
    return 1 + gates / both


def step_ratio(
    shapes: list[tuple[int, int]], ceilings: Ceilings, *, tokens: int, experts: int, rank: int, slots: int, backward: bool = True
) -> dict[str, float]:
    """Least seconds of the linears with top-k experts over those with one LoRA of the active rank.

    Counted for both: the frozen products, the low-rank products, and adding their result. For the experts besides: scores; reading every
    expert that is chosen (all of them, from some tokens on) and writing its gradient; gathering and scattering tokens per slot. Work
    that a cache can hide is counted as hidden: the real ratio is above this one.

    Args:
        shapes: inputs and outputs of the linears.
    """
    passes = 3 if backward else 1  # products of the update: forward, to the input, to the parameters
    used = min(experts, tokens * slots)
    lora = ours = 0.0
    for inputs, outputs in shapes:
        width, active = inputs + outputs, rank * slots
        frozen = 2 * tokens * inputs * outputs * (2 if backward else 1) / ceilings.flops
        update = 2 * tokens * active * width * passes / ceilings.flops
        added = 4 * 3 * tokens * outputs / ceilings.bytes
        scores = 2 * tokens * experts * inputs * passes / ceilings.flops
        parameters = 4 * rank * width * (used - slots) * passes / ceilings.bytes
        moved = 4 * 3 * tokens * (slots - 1) * width * (2 if backward else 1) / ceilings.bytes
        lora += frozen + update + added
        ours += frozen + update + added + scores + parameters + moved
    return {"ratio": ours / lora, "lora_seconds": lora, "ours_seconds": ours}


def decode_ratio(
    shapes: list[tuple[int, int]], ceilings: Ceilings, *, base_seconds: float, experts: int, rank: int, slots: int, gated: bool, calls: int
) -> dict[str, float]:
    """Least seconds of one token with experts over the base model's: bytes that must be read, and calls that must be made.

    Args:
        base_seconds: of one token of the base model, measured.
        calls: operations per linear layer besides the host's.
    """
    read = sum(4 * rank * slots * (inputs + outputs) + (4 * experts * inputs if gated else 0) for inputs, outputs in shapes)
    more = read / (ceilings.bytes / 2) + calls * len(shapes) * ceilings.call  # a copy reads half of the bytes it moves
    return {"ratio": 1 + more / base_seconds, "bytes": read, "calls": calls * len(shapes)}
