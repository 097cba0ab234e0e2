"""What a routed update must cost at least beyond its peer on this machine: operations and bytes over measured ceilings. It times no model.

Beside the peer's measured time this is a floor that no form can go below, not one that a form must reach.
"""

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


def layer_extra(width: int, ceilings: Ceilings, *, tokens: int, experts: int, backward: bool = True) -> float:
    """Least seconds that one layer in which every expert speaks needs beyond one LoRA of the rank of all together.

    Scores; with `backward` their gradients to the tokens and to the gates, and one more gradient of the tokens to write and to add.

    Args:
        width: inputs and outputs of the layer.
    """
    scores = 2 * tokens * experts * width / ceilings.flops
    return 3 * scores + 4 * 3 * tokens * width / ceilings.bytes if backward else scores


def step_extra(shapes: list[tuple[int, int]], ceilings: Ceilings, *, tokens: int, experts: int, rank: int, slots: int) -> float:
    """Least seconds that a training step with top-k experts in these linears needs beyond one LoRA of the active rank.

    Scores; reading every expert that is chosen (all of them, from some tokens on) and writing its gradient; gathering and scattering
    tokens for each further slot. Work that a cache can hide is counted as hidden.

    Args:
        shapes: inputs and outputs of the linears.
    """
    used, passes = min(experts, tokens * slots), 3  # products of the update: forward, to the input, to the parameters
    extra = 0.0
    for inputs, outputs in shapes:
        width = inputs + outputs
        extra += 2 * tokens * experts * inputs * passes / ceilings.flops
        extra += (4 * rank * width * (used - slots) * passes + 2 * 4 * 3 * tokens * (slots - 1) * width) / ceilings.bytes
    return extra


def token_extra(
    shapes: list[tuple[int, int]], ceilings: Ceilings, *, experts: int, rank: int, slots: int, gated: bool, calls: int
) -> float:
    """Least seconds that one token with experts needs beyond the base model: bytes that must be read, and calls that must be made.

    Args:
        calls: operations per linear layer besides the host's.
    """
    read = sum(4 * rank * slots * (inputs + outputs) + (4 * experts * inputs if gated else 0) for inputs, outputs in shapes)
    return read / ceilings.bytes + calls * len(shapes) * ceilings.call
