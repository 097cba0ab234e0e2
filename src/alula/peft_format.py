"""One expert as a plain PEFT LoRA folder, in and out. It knows the file format, not the pool."""

from pathlib import Path

import torch

from alula.errors import UserError
from alula.files import read_json, read_tensors, write_json, write_tensors
from alula.mixture import Mixtures

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_REFUSED = ("use_dora", "modules_to_save", "layer_replication", "lora_bias", "trainable_token_indices", "target_parameters")


def write_adapter(mixtures: Mixtures, name: str, folder: Path, *, base_name: str) -> None:
    """Writes expert `name` so that ``PeftModel.from_pretrained(base, folder)`` gives the same logits."""
    index = mixtures.index(name)
    tensors, rank, scale = {}, 0, 0.0
    for path, mixture in mixtures.sites.items():
        rank, scale = len(mixture.experts.A[index]), mixture.experts.scales[index]
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = mixture.experts.A[index]
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = mixture.experts.B[index]
    write_tensors(folder / TENSORS, tensors, metadata={"format": "pt"})
    write_json(
        folder / CONFIG,
        {
            "peft_type": "LORA",
            "task_type": None,
            "base_model_name_or_path": base_name,
            "inference_mode": True,
            "r": rank,
            "lora_alpha": scale * rank,
            "lora_dropout": 0.0,
            "bias": "none",
            "use_rslora": False,
            "target_modules": sorted(mixtures.sites),
        },
    )


def read_adapter(mixtures: Mixtures, name: str, folder: Path | str) -> None:
    """Adds a PEFT LoRA adapter, made by alula or elsewhere, as expert `name`.

    Raises:
        UserError: not a LoRA adapter, a variant whose update is not ``B A``, layers that carry no mixture, or shapes of
            another base model.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{folder} holds a '{config.get('peft_type')}' adapter; LORA is accepted. Convert or retrain it.")
    odd = [key for key in _REFUSED if config.get(key)] + (["bias"] if config.get("bias", "none") != "none" else [])
    if odd:
        raise UserError(f"{folder} uses {', '.join(odd)}, which a low-rank expert cannot express. Retrain it as plain LoRA.")
    found = _by_layer(read_tensors(folder / TENSORS), folder)
    foreign = sorted(set(found) - set(mixtures.sites))
    if foreign:
        raise UserError(
            f"{folder} adapts {len(foreign)} layers that carry no mixture here, first {foreign[0]}. "
            f"Mixtures are on {len(mixtures.sites)} layers, first {next(iter(mixtures.sites))}: attach to more linears, "
            "or check that the adapter was made for this base model."
        )
    _fill(mixtures, name, found, config, folder)


def _by_layer(tensors: dict[str, torch.Tensor], folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        path, _, matrix = key.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".lora_")
        if matrix not in ("A", "B"):
            raise UserError(f"{folder / TENSORS}: unknown tensor '{key}'; lora_A and lora_B are accepted. Retrain it as plain LoRA.")
        found.setdefault(path, {})[matrix] = tensor
    return found


def _fill(mixtures: Mixtures, name: str, found: dict, config: dict, folder: Path) -> None:
    for path, pair in found.items():
        experts = mixtures.sites[path].experts
        if "A" not in pair or "B" not in pair:
            raise UserError(f"{folder / TENSORS}: {path} has only one of lora_A and lora_B. The file is damaged; copy it again.")
        if (pair["A"].shape[1], pair["B"].shape[0]) != (experts.in_features, experts.out_features):
            raise UserError(
                f"{folder}: {path} is {pair['B'].shape[0]} x {pair['A'].shape[1]} in the adapter and {experts.out_features} x "
                f"{experts.in_features} in this model. It was made for another base model; load that one."
            )
    mixtures.grow(name, rank=1)
    for path, mixture in mixtures.sites.items():
        experts = mixture.experts
        pair = found.get(path)
        if pair is None:  # a layer the adapter leaves alone: an expert of rank 1 whose B stays zero
            continue
        like, rank = experts.A[-1], pair["A"].shape[0]
        alpha = config.get("alpha_pattern", {}).get(path, config.get("lora_alpha", rank))
        experts.A[-1] = torch.nn.Parameter(pair["A"].to(like.device, like.dtype))
        experts.B[-1] = torch.nn.Parameter(pair["B"].to(like.device, like.dtype))
        experts.scales[-1] = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    mixtures.freeze()
    mixtures.refresh()
