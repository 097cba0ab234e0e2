"""How many of the exact top-k a two-level choice finds, and how many products it takes, for pools of thousands of vectors.

python benchmarks/two_level.py --pools 256 1024 4096
"""

import argparse

import torch
from torch import Tensor

from alula.routers.groups import Groups


def clustered(count: int, *, dim: int, clusters: int, spread: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Vectors around some directions, as gates of related tasks are, and tokens that each suit one of the vectors."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.nn.functional.normalize(torch.randn(clusters, dim, generator=generator), dim=-1)
    rows = (
        centres[torch.randint(clusters, (count,), generator=generator)] + spread * torch.randn(count, dim, generator=generator) / dim**0.5
    )
    tokens = rows[torch.randint(count, (512,), generator=generator)] + 0.5 * torch.randn(512, dim, generator=generator) / dim**0.5
    return rows, tokens.unsqueeze(0)


def recall(rows: Tensor, tokens: Tensor, *, top_k: int, groups: int) -> float:
    """The share of the exact top-k that is found."""
    exact = (tokens @ rows.T).topk(top_k, dim=-1).indices
    _, found = Groups(rows).best(tokens, top_k=top_k, groups=groups)
    return float((exact.unsqueeze(-1) == found.unsqueeze(-2)).any(dim=-1).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pools", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(
        "| experts | spread within clusters | groups looked into | recall of the exact top-k | products per token / all |\n"
        + "|---" * 5
        + "|"
    )
    for count in options.pools:
        for spread in (0.5, 1.0, 4.0):  # the last: hardly any clusters
            rows, tokens = clustered(count, dim=options.dim, clusters=max(4, count // 16), spread=spread)
            made = Groups(rows)
            for groups in options.groups:
                found = recall(rows, tokens, top_k=options.top_k, groups=groups)
                share = (len(made.sizes) + groups * count / len(made.sizes)) / count
                print(f"| {count} | {spread:g} | {groups} | {found:.3f} | {share:.3f} |")


if __name__ == "__main__":
    main()
