"""One expert as a plain PEFT LoRA folder, in and out. It knows the file format, not the pool."""

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from alula.errors import UserError
from alula.files import map_tensors, read_json, write_json, write_tensors
from alula.mixture import Mixtures

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_REFUSED = ("use_dora", "modules_to_save", "layer_replication", "lora_bias", "trainable_token_indices", "target_parameters")

Pairs = dict[str, dict[str, torch.Tensor]]
"""Per module path its ``A`` (rank x in) and ``B`` (out x rank)."""


def write_adapter(mixtures: Mixtures, name: str, folder: Path, *, base_name: str) -> None:
    """Writes expert `name` so that ``PeftModel.from_pretrained(base, folder)`` gives the same logits."""
    index = mixtures.index(name)
    pairs = {path: {"A": mixture.experts.A[index], "B": mixture.experts.B[index]} for path, mixture in mixtures.sites.items()}
    write_pairs(pairs, {path: mixture.experts.scales[index] for path, mixture in mixtures.sites.items()}, folder, base_name=base_name)


def write_pairs(pairs: Pairs, scales: Mapping[str, float], folder: Path, *, base_name: str) -> None:
    """Writes matrices as a PEFT adapter. The commonest rank and scale are its own; what differs stands in PEFT's patterns.

    Args:
        scales: what ``B A`` is multiplied by, per module path.
    """
    ranks = {path: len(pair["A"]) for path, pair in pairs.items()}
    alphas = {path: scales[path] * rank for path, rank in ranks.items()}
    (rank, alpha), _ = Counter((ranks[path], alphas[path]) for path in pairs).most_common(1)[0]
    tensors = {f"{PREFIX}{path}.lora_{matrix}.weight": tensor for path, pair in pairs.items() for matrix, tensor in pair.items()}
    write_tensors(folder / TENSORS, tensors, metadata={"format": "pt"})
    write_json(
        folder / CONFIG,
        {
            "peft_type": "LORA",
            "task_type": None,
            "base_model_name_or_path": base_name,
            "inference_mode": True,
            "r": rank,
            "lora_alpha": alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "use_rslora": False,
            "rank_pattern": {path: found for path, found in ranks.items() if found != rank},
            "alpha_pattern": {path: found for path, found in alphas.items() if found != alpha},
            "target_modules": sorted(pairs),
        },
    )


def read_pairs(folder: Path | str) -> tuple[Pairs, dict[str, float]]:
    """The matrices of a PEFT LoRA adapter, made by alula or elsewhere, and what each ``B A`` is multiplied by.

    Raises:
        UserError: not a LoRA adapter, a variant whose update is not ``B A``, or a damaged file.
    """
    folder = Path(folder)
    config = _plain_config(folder)
    scales = {path: _scale(config, path, rank, folder) for path, (rank, _, _) in _widths(folder).items()}
    pairs: Pairs = {}
    for key, tensor in map_tensors(folder / TENSORS).items():
        if not tensor.is_floating_point():
            raise UserError(f"{folder / TENSORS}: '{key}' is {tensor.dtype}; floating point is accepted. Retrain it as plain LoRA.")
        path, matrix = _place(key, folder)
        pairs.setdefault(path, {})[matrix] = tensor
    return pairs, scales


def adapted(folder: Path | str) -> list[str]:
    """The module paths that an adapter changes; no tensor is read.

    Raises:
        UserError: a damaged file.
    """
    return list(_widths(Path(folder)))


def read_adapter(mixtures: Mixtures, name: str, folder: Path | str) -> None:
    """Adds a PEFT LoRA adapter, made by alula or elsewhere, as expert `name`.

    Shapes are compared with the model's before any tensor is read.

    Raises:
        UserError: not a LoRA adapter, a variant whose update is not ``B A``, layers that carry no mixture, or shapes of
            another base model.
    """
    folder = Path(folder)
    _plain_config(folder)
    check_fit(mixtures, folder, {path: path for path in adapted(folder)})
    pairs, scales = read_pairs(folder)
    mixtures.adopt(name, pairs, scales=scales)


def check_fit(mixtures: Mixtures, folder: Path, paths: Mapping[str, str]) -> None:
    """Refuses an adapter whose layers carry no mixture or have other widths; no tensor is read.

    Args:
        paths: the layer in the model for each layer in the file.

    Raises:
        UserError: with the layers.
    """
    foreign = sorted(path for path in paths.values() if path not in mixtures.sites)
    if foreign:
        raise UserError(
            f"{folder} adapts {len(foreign)} layers that carry no mixture here: {few(foreign)}. "
            f"Mixtures are on {len(mixtures.sites)} layers, first {next(iter(mixtures.sites))}: attach to more linears, "
            "or check that the adapter was made for this base model."
        )
    for path, (rank, width_in, width_out) in _widths(folder).items():
        experts = mixtures.sites[paths[path]].experts
        if (width_in, width_out) != (experts.in_features, experts.out_features):
            raise UserError(
                f"{folder}: {path} is {width_out} x {width_in} in the adapter and {experts.out_features} x "
                f"{experts.in_features} in this model. It was made for another base model; load that one."
            )
        if rank > max(width_in, width_out):
            raise UserError(f"{folder}: {path} has rank {rank:,} in a layer of {width_out} x {width_in}. Nothing was read: do not use it.")


def _plain_config(folder: Path) -> dict[str, Any]:
    if not (folder / TENSORS).exists() and (folder / "adapter_model.bin").exists():
        raise UserError(
            f"{folder} holds adapter_model.bin, a pickle, which can run code when it is read; {TENSORS} is accepted. "
            "Load it with PEFT where you trust it, and save it again with save_pretrained."
        )
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise UserError(f"{folder} holds a '{kind}' adapter; LORA is accepted. Convert or retrain it.")
    odd = [key for key in _REFUSED if config.get(key)] + (["bias"] if config.get("bias", "none") != "none" else [])
    if odd:
        raise UserError(f"{folder} uses {', '.join(odd)}, which a low-rank expert cannot express. Retrain it as plain LoRA.")
    return config


def _widths(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Per module path rank, input and output width, from the file's header alone."""
    shapes: dict[str, dict[str, list[int]]] = {}
    for key, shape in header(folder / TENSORS).items():
        path, matrix = _place(key, folder)
        shapes.setdefault(path, {})[matrix] = shape
    for path, pair in shapes.items():
        if set(pair) != {"A", "B"}:
            raise UserError(f"{folder / TENSORS}: {path} has only one of lora_A and lora_B. The file is damaged; copy it again.")
        if any(len(shape) != 2 for shape in pair.values()) or pair["A"][0] != pair["B"][1] or not pair["A"][0]:
            raise UserError(f"{folder / TENSORS}: {path} has shapes {pair['A']} and {pair['B']}, which do not multiply. Copy it again.")
    return {path: (pair["A"][0], pair["A"][1], pair["B"][0]) for path, pair in shapes.items()}


def header(path: Path) -> dict[str, list[int]]:
    """The shape of every tensor in a safetensors file; none is read.

    Raises:
        UserError: no such file, or a truncated or foreign one.
    """
    try:
        with safe_open(path, framework="pt") as found:
            return {key: found.get_slice(key).get_shape() for key in found.keys()}  # noqa: SIM118 - not a dict
    except FileNotFoundError:
        raise UserError(f"No file {path}. Check the path, or copy the folder again.") from None
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}). Copy it again.") from error


def check_shapes(path: Path, asked: Mapping[str, list[int]], *, config: str) -> None:
    """Refuses a safetensors file that does not hold the tensors asked for, and no other; none is read.

    Args:
        config: the file that asks for them, for the error.

    Raises:
        UserError: with the first tensor that is missing, too many or of another shape.
    """
    found = header(path)
    for name in sorted(asked.keys() | found.keys()):
        if asked.get(name) != found.get(name):
            raise UserError(
                f"{path} holds '{name}' of shape {found.get(name, 'none')}; {config} asks for {asked.get(name, 'none')} in this model. "
                "Load the base model they were made for, or copy the folder again."
            )


def few(names: list[str]) -> str:
    """The first names of a list, for an error."""
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _place(key: str, folder: Path) -> tuple[str, str]:
    path, _, matrix = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".lora_")
    if matrix not in ("A", "B"):
        raise UserError(f"{folder / TENSORS}: unknown tensor '{key}'; lora_A and lora_B are accepted. Retrain it as plain LoRA.")
    return path, matrix


def _scale(config: Mapping[str, Any], path: str, rank: int, folder: Path) -> float:
    """``alpha / r`` of one module; the file and the configuration must agree on its rank."""
    said, alpha = (
        _own(config, "rank_pattern", path, config.get("r", rank)),
        _own(config, "alpha_pattern", path, config.get("lora_alpha", rank)),
    )
    if said != rank or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise UserError(
            f"{folder}: {path} has rank {rank} in {TENSORS}, rank {said!r:.40} and alpha {alpha!r:.40} in {CONFIG}. Copy it again."
        )
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _own(config: Mapping[str, Any], pattern: str, path: str, otherwise: Any) -> Any:
    """The value for `path` in one of PEFT's patterns: names of modules or the ends of their paths, no regular expressions."""
    patterns = config.get(pattern) or {}
    for end, value in patterns.items() if isinstance(patterns, dict) else ():
        if set(end) & set("^$*+?|()[]{}\\"):
            raise UserError(
                f"The adapter's {pattern} has the regular expression '{end:.60}'; names of modules are accepted. Write them out."
            )
        if path == end or path.endswith(f".{end}"):
            return value
    return otherwise
