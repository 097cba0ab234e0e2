"""What opening a pool of hundreds of experts costs, and how much of it is in memory after an answer.

The pool is made first, by another process, of random experts; it stays in its folder for the next time.

    python benchmarks/large_pool.py pools/large --experts 256
"""

import argparse
import multiprocessing
import re
import time
from pathlib import Path

import torch

from alula import Routing, attach
from alula.files import write_json
from alula.models import base_fingerprint, load_model
from alula.pool import Pool

KINDS = ("RssAnon", "RssFile")


def make(folder: Path, model: str, experts: int, rank: int) -> None:
    """A pool of random experts for a model, on all its linear layers."""
    base = load_model(model, dtype="float32")[0]
    mixtures, generator = attach(base, routers=()), torch.Generator().manual_seed(0)
    pool = Pool.create(folder, mixtures, base=model)
    for number in range(experts):
        name = f"expert{number}"
        mixtures.grow(name, rank=rank, generator=generator)
        with torch.no_grad():
            for mixture in mixtures.sites.values():
                mixture.experts.B[0].normal_(std=1e-2, generator=generator)
        pool.add(mixtures, name, about={})
        mixtures.remove(name)


def resident() -> dict[str, float]:
    """Megabytes of this process: of its own, and of mapped files (Linux)."""
    said = Path("/proc/self/status").read_text()
    return {kind: int(re.search(rf"{kind}:\s+(\d+)", said).group(1)) / 1024 for kind in KINDS}  # type: ignore[union-attr]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pool", type=Path)
    parser.add_argument("--model", default="smol")
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not options.pool.exists():
        maker = multiprocessing.get_context("spawn").Process(target=make, args=(options.pool, options.model, options.experts, options.rank))
        maker.start()
        maker.join()
    files = list(options.pool.rglob("*.safetensors"))
    model, processor = load_model(options.model, dtype="float32")
    base_fingerprint(model)  # reads all of the base model's own weights, so that they are not counted below
    before, started = resident(), time.perf_counter()
    pool = Pool.open(options.pool)
    mixtures = pool.attach(model)
    seconds = time.perf_counter() - started
    opened = resident()
    prompt = processor(text="The capital of France is", return_tensors="pt")
    with mixtures.using(Routing(fixed={pool.names[-1]: 1.0})):
        model.generate(**prompt, max_new_tokens=8, do_sample=False)
    answered = resident()
    found = {
        "experts": len(pool.names),
        "megabytes_on_disk": sum(path.stat().st_size for path in files) / 2**20,
        "seconds_to_open": seconds,
        "megabytes_more_when_opened": {kind: opened[kind] - before[kind] for kind in KINDS},
        "megabytes_more_after_an_answer": {kind: answered[kind] - before[kind] for kind in KINDS},
    }
    for key, value in found.items():
        print(key, value)
    if options.out:
        write_json(options.out, found)


if __name__ == "__main__":
    main()
