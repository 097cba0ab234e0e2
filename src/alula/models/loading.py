"""A model and its processor by name, and the fingerprint by which a pool knows its base model again."""

import hashlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from alula.errors import UserError, install_extra, nearest
from alula.models.anatomy import base_model, walk
from alula.models.processors import first_line, load_processor
from alula.registry import Registry

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ATTENTIONS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")
FOUR_BIT = "4bit"
EMBEDDED = "smol"
# 64 kB of each tensor as float32: a hash of a 2B model in about a second.
SAMPLED_VALUES = 16_384
CHANGED = "alula_"
"""How an attribute of a configuration begins that tells of a model whose modules alula changed before it was saved."""
CHANGED_CLASSES: Registry[Callable[[PreTrainedConfig], type[PreTrainedModel]]] = Registry("change of a model")
"""By such an attribute, what finds the class with the changed modules. Rooms that change models enter theirs."""
CONFIG_FIELDS = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")


def load_model(
    name_or_path: str | Path, *, dtype: str = "auto", device: str | None = None, attention: str | None = None
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A vision-language model in eval mode and its processor.

    Args:
        name_or_path: a folder, the name of a hub repository, or ``smol``: the embedded default, which needs no network.
        dtype: auto, float32, bfloat16, float16 or 4bit. auto is the checkpoint's own, and float32 on a CPU, where half
            precision is slower. 4bit: linear layers in NF4 by bitsandbytes, all but the head; the rest as auto has it. They
            cannot train or be merged, what is attached to them can train (QLoRA, arXiv 2305.14314).
        device: as torch names them (``cuda:1``); None is the accelerator if there is one, else the CPU.
        attention: sdpa, eager, flash_attention_2, flash_attention_3 or flex_attention; None is sdpa, and eager where the model (Gemma 2)
            has no sdpa.

    Raises:
        UserError: an unknown dtype, device or attention; one that the model cannot have; nothing there; no vision-language model;
            a missing package; a model that was changed by a part of alula that is not imported.
    """
    if dtype not in ("auto", *DTYPES, FOUR_BIT):
        raise UserError(f"Unknown dtype '{dtype}'. {nearest(dtype, ('auto', *DTYPES, FOUR_BIT))}")
    if attention is not None and attention not in ATTENTIONS:
        raise UserError(f"Unknown attention '{attention}'. {nearest(attention, ATTENTIONS)}")
    place = find_device(device)
    chosen = torch.float32 if dtype in ("auto", FOUR_BIT) and place.type == "cpu" else DTYPES.get(dtype, "auto")
    quantized = _four_bit(place, chosen) if dtype == FOUR_BIT else {}
    name = str(name_or_path)
    if name == EMBEDDED:
        from alula.models.smol import prepare_smol

        name = str(prepare_smol())
    try:
        model = _class_for(name).from_pretrained(name, dtype=chosen, attn_implementation=attention, **quantized)
    except UserError:
        raise
    except (OSError, ValueError, ImportError) as error:
        raise _not_loaded(name, error, attention=attention) from error
    if quantized:
        _keep_as_quantized(model)
    placed = model if quantized else model.to(place)  # type: ignore[arg-type]
    return placed.eval(), load_processor(name)


def changes_of(config: PreTrainedConfig) -> list[str]:
    """The attributes of a configuration that tell how alula changed the model's modules."""
    return [name for name in vars(config) if name.startswith(CHANGED)]


def _class_for(name: str) -> Any:
    """What loads the model of that name: Transformers' own, or the class of its changed form."""
    config = AutoConfig.from_pretrained(name)
    changes = changes_of(config)
    if not changes:
        return AutoModelForImageTextToText
    if changes[0] not in CHANGED_CLASSES:
        raise UserError(f"'{name}' was changed by alula ({changes[0]}), and what loads that is not imported. Write: import alula.experts")
    return CHANGED_CLASSES[changes[0]](config)


def _four_bit(place: torch.device, compute: torch.dtype | str) -> dict[str, Any]:
    """The keywords by which Transformers loads a model in four bits, straight to its device."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"dtype 4bit came, but bitsandbytes is not installed. {install_extra('quantization')}")
    options = {} if isinstance(compute, str) else {"bnb_4bit_compute_dtype": compute}
    chosen = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **options)
    return {"quantization_config": chosen, "device_map": {"": place}}


def _keep_as_quantized(model: nn.Module) -> None:
    """Forbids bitsandbytes to repack weights on a CPU for speed, which changes them at the first forward without gradients."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def find_device(device: str | None) -> torch.device:
    """The device of that name; for None the accelerator if there is one, else the CPU.

    Raises:
        UserError: no such device.
    """
    if device is None:
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"Device '{device}' cannot be used: {first_line(error)} "
            f"Here are: cpu{''.join(f', {name}' for name in _accelerators())}. Choose one of these, or leave it out."
        ) from error
    return place


def base_fingerprint(model: nn.Module) -> str:
    """64 hexadecimal digits that say which base model this is; the same with and without experts or adapters attached.

    Covers the configuration's sizes and the name, shape and values of every parameter. Values count as float32, so that a
    bfloat16 and a float32 copy of one checkpoint agree where the values are exact in both. Of a parameter of more than
    16,384 values an evenly spaced sample is read: a change of a few single values may go unseen, training does not.
    """
    base = base_model(model)
    digest = hashlib.sha256(json.dumps(_essentials(base), sort_keys=True).encode())
    for name, parameter in sorted(_base_parameters(base)):
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(_sample(parameter))
    return digest.hexdigest()


def values_fingerprint(model: nn.Module) -> str:
    """64 hexadecimal digits over the shapes and values of all parameters, without their names and order.

    A model that another version of Transformers builds of other classes keeps it. Values are read as in `base_fingerprint`.
    """
    found = (str(tuple(value.shape)).encode() + _sample(value) for _, value in _base_parameters(base_model(model)))
    return hashlib.sha256(b"".join(sorted(hashlib.sha256(each).digest() for each in found))).hexdigest()


def _essentials(base: nn.Module) -> dict[str, object]:
    config = getattr(base, "config", None)
    if config is None:
        return {}
    configs = {"model": config, "decoder": config.get_text_config(decoder=True)}
    return {part: {name: getattr(found, name, None) for name in CONFIG_FIELDS} for part, found in configs.items()}


def _base_parameters(base: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters of the original model under their original names: wrappers are stepped through."""
    return [
        (f"{path}.{name}" if path else name, parameter)
        for path, module in walk(base, original=True)
        for name, parameter in module.named_parameters(recurse=False)
    ]


def _sample(parameter: nn.Parameter) -> bytes:
    values = parameter.detach().reshape(-1)
    stride = max(1, -(-values.numel() // SAMPLED_VALUES))
    return values[::stride].to("cpu", torch.float32).numpy().tobytes()


def _accelerators() -> list[str]:
    kind = torch.accelerator.current_accelerator()
    return [f"{kind.type}:{index}" for index in range(torch.accelerator.device_count())] if kind is not None else []


def _not_loaded(name: str, error: Exception, *, attention: str | None) -> UserError:
    if "Unrecognized configuration class" in str(error):
        return UserError(
            f"'{name}' is no vision-language model that transformers knows. Models that AutoModelForImageTextToText loads "
            "are accepted. For a text-only language model, join it to an image encoder with ComposedVLM first."
        )
    if attention is not None and not isinstance(error, OSError) and "attention" in str(error).lower():
        return UserError(
            f"attention '{attention}' came, but '{name}' cannot be loaded with it: {first_line(error).partition('. ')[0].rstrip('.')}. "
            "Leave it out, or take 'eager', which every model has."
        )
    what = "is a folder, but no model can be loaded from it" if Path(name).is_dir() else "could not be loaded"
    return UserError(
        f"'{name}' {what}: {first_line(error)} A folder written by save_pretrained, the name of a hub repository or "
        f"'{EMBEDDED}' is accepted. Check the path; for a hub name check the network, or download it before going offline."
    )
