"""Experts on their way out of a pool: plain PEFT folders, as PEFT reads them and as vLLM does."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from alula.errors import UserError
from alula.files import told_of
from alula.peft_format import Pairs, read_pairs, write_pairs
from alula.pool.renaming import rename

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What ``--max-lora-rank`` takes: vllm.config.lora.MaxLoRARanks, versions 0.14 to 0.23."""
OUTSIDE = ("vision_tower", "vision_model", "visual", "vision_encoder", "image_encoder", "multi_modal_projector", "connector", "projector")


@contextlib.contextmanager
def new_folder(out: Path | str) -> Iterator[Path]:
    """A folder to fill that takes the place `out` only if the block ends well.

    Raises:
        UserError: there is something at `out`, or it cannot be written.
    """
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is there already and not empty. Choose another place, or remove it first.")
    with told_of(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        filling = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
        try:
            filling.chmod(0o755)  # mkdtemp's is for its owner alone
            yield filling
            filling.replace(target)
        finally:
            shutil.rmtree(filling, ignore_errors=True)


def export_adapter(source: Path, out: Path, *, renamed: Mapping[str, str], base_name: str) -> None:
    """Writes an expert as a PEFT adapter under the model's present names."""
    pairs, scales = read_pairs(source)
    write_pairs(
        {rename(path, renamed): pair for path, pair in pairs.items()},
        {rename(path, renamed): scale for path, scale in scales.items()},
        out,
        base_name=base_name,
    )


def export_for_vllm(source: Path, out: Path, *, renamed: Mapping[str, str], base_name: str) -> int:
    """Writes an expert as vLLM reads it, and gives its largest rank.

    vLLM knows one scale per adapter and no patterns of ranks: where scales differ, ``B`` takes up the difference. Layers that
    the expert leaves alone are left out.

    Raises:
        UserError: it sits outside the decoder, where vLLM drops it, or is wider than vLLM accepts.
    """
    found, scales = read_pairs(source)
    outside = [path for path in found if set(path.split(".")) & set(OUTSIDE)]
    if outside:
        raise UserError(
            f"{source.name} has updates of {len(outside)} layers outside the decoder, first {outside[0]}. vLLM drops those, so its answers "
            "would be others than the pool's. Merge it into the base model instead: `alula merge`."
        )
    used = {path: pair for path, pair in found.items() if pair["B"].any()} or found
    rank = max(len(pair["A"]) for pair in used.values())
    if rank > VLLM_RANKS[-1]:
        raise UserError(f"{source.name} has rank {rank}; vLLM takes up to {VLLM_RANKS[-1]}. Merge it instead: `alula merge`.")
    scale = max(scales[path] for path in used)
    alike: Pairs = {
        rename(path, renamed): {"A": pair["A"], "B": pair["B"] if scales[path] == scale else pair["B"] * (scales[path] / scale)}
        for path, pair in used.items()
    }
    write_pairs(alike, dict.fromkeys(alike, scale), out, base_name=base_name)
    return rank


def vllm_command(base_name: str, folders: Mapping[str, Path], *, rank: int) -> list[str]:
    """The words of the command that serves experts of at most `rank`, each under its name."""
    accepted = next(size for size in VLLM_RANKS if size >= rank)
    modules = [f"{name}={folder}" for name, folder in folders.items()]
    sizes = ["--max-loras", str(len(folders)), "--max-lora-rank", str(accepted)]
    return ["vllm", "serve", base_name, "--enable-lora", *sizes, "--lora-modules", *modules]
