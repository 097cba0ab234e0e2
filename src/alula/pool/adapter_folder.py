"""A model's adapters as a folder, in and out, with what a pool promises: no half of it, no other base model, no absurd size is read."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from alula.adapters import AdapterConfig, Adapters, attach_adapters
from alula.errors import UserError
from alula.files import read_tensors, write_json, write_tensors
from alula.models import base_fingerprint
from alula.models.loading import values_fingerprint
from alula.peft_format import check_shapes, few, header
from alula.pool.expert_files import digests
from alula.pool.manifest import Base, Digest, FileName, inside, read_small_json
from alula.pool.trust import check_files, largest_file

FORMAT = 1
MANIFEST, TENSORS, TRAINED = "adapters.json", "adapters.safetensors", "trained.safetensors"
"""What is there, the adapters and routers, and what else was trained with them (the connectors)."""


class AdapterManifest(BaseModel):
    """What may stand in ``adapters.json``, and nothing else."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int
    base: Base
    config: AdapterConfig
    files: dict[FileName, Digest]


def save_adapters(
    adapters: Adapters,
    folder: Path | str,
    *,
    base: str,
    trained: Mapping[str, Tensor] | None = None,
    fingerprint: str | None = None,
    values: str | None = None,
) -> Path:
    """Writes the adapters and routers of a model into a folder. The manifest comes last: a folder without it does not count.

    Args:
        base: the base model's name or path.
        trained: other parameters that were trained with them, by their path in the model that carries the adapters.
        fingerprint, values: the base model's `base_fingerprint` and `values_fingerprint`; needed with `trained`, for the model is no
            longer what it was.

    Raises:
        UserError: there are adapters in the folder already, `trained` without `fingerprint`, or the files cannot be written.
    """
    home, extra = Path(folder), {name: tensor.detach() for name, tensor in (trained or {}).items()}
    if (home / MANIFEST).exists():
        raise UserError(f"{folder} holds adapters already. Choose another folder, or delete this one.")
    if fingerprint is None:
        if extra:
            raise UserError(
                "trained came without fingerprint, and the model's own weights are no longer those of its base. Give "
                "fingerprint=base_fingerprint(model) of the base model (`alula.models`), as it was before training or as it is loaded anew."
            )
        fingerprint, values = base_fingerprint(adapters.model), values_fingerprint(adapters.model)
    (home / TRAINED).unlink(missing_ok=True)  # of a saving that was cut short
    write_tensors(home / TENSORS, adapters.tensors())
    if extra:
        write_tensors(home / TRAINED, extra)
    files = digests(home, (TENSORS, *((TRAINED,) if extra else ())))
    about = Base(name=base, fingerprint=fingerprint, values=values)
    manifest = AdapterManifest(format=FORMAT, base=about, config=adapters.config, files=files)
    write_json(home / MANIFEST, manifest.model_dump(mode="json"))
    return home


def load_adapters(model: nn.Module, folder: Path | str, *, tokenizer: Any = None, instruction: str | None = None) -> Adapters:
    """Attaches the adapters in a folder to the base model they were made for.

    What was trained with them is put in place, too; `Adapters.detach` takes it out again. What is refused leaves the model as it was.

    Args:
        tokenizer: the model's own; needed where a sentence encoder reads the instruction.
        instruction: where that sentence encoder is now; None: where it was.

    Raises:
        UserError: no adapters there, a half-written or damaged folder, another base model, files larger than the model, or a
            configuration that asks for other tensors than they hold.
    """
    home = Path(folder)
    manifest = _read_manifest(home)
    for file in manifest.files:
        inside(home / file, root=home)
    check_files(home, manifest.files, largest=largest_file(model))
    _check_base(model, manifest.base, home)
    config = manifest.config.model_copy(update={"instruction": instruction}) if instruction else manifest.config
    _check_shapes(model, config, home / TENSORS, tokenizer=tokenizer)
    adapters = attach_adapters(model, config=config, tokenizer=tokenizer)
    with ExitStack() as undo:
        undo.callback(adapters.detach)
        adapters.load(read_tensors(home / TENSORS))
        if TRAINED in manifest.files:
            adapters.exchange(read_tensors(home / TRAINED), origin=str(home / TRAINED))
        undo.pop_all()
    return adapters


def _read_manifest(home: Path) -> AdapterManifest:
    path = home / MANIFEST
    if not path.exists():
        raise UserError(f"No adapters in {home}: {MANIFEST}, which is written last, is missing. Save them again, or copy the whole folder.")
    inside(path, root=home)
    try:
        manifest = AdapterManifest.model_validate(read_small_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"{path}: {place}: {first['msg']}. No alula writes this: save the adapters again, or copy the folder.") from error
    if manifest.format != FORMAT:
        raise UserError(f"{path} has format {manifest.format}; this alula reads {FORMAT}. Install a newer alula.")
    if TENSORS not in manifest.files or not manifest.files.keys() <= {TENSORS, TRAINED}:
        raise UserError(f"{path} names the files {few(list(manifest.files))}; {TENSORS} and {TRAINED} are known. Copy the folder again.")
    return manifest


def _check_base(model: nn.Module, base: Base, home: Path) -> None:
    """Refuses another model than the one that the adapters were made for; the same weights under other names are the same."""
    found = base_fingerprint(model)
    if found != base.fingerprint and base.values != values_fingerprint(model):
        raise UserError(
            f"The adapters in {home} were made for base model '{base.name}' (fingerprint {base.fingerprint[:12]}), this model has "
            f"{found[:12]}. Load '{base.name}', or train adapters for this model."
        )


def _check_shapes(model: nn.Module, config: AdapterConfig, path: Path, *, tokenizer: Any) -> None:
    """Refuses a configuration that asks for other tensors than the file has: they are allocated before it is read.

    Two adapters of width 1 cost next to nothing and have every kind of name; only the sizes that the configuration names differ.
    """
    narrow = {"num_experts": min(config.num_experts, 2), "bottleneck": 1, "hidden_dim": 1}
    adapters = attach_adapters(model, config=config.model_copy(update=narrow), tokenizer=tokenizer)
    kinds = {name: _widened(name, list(tensor.shape), config) for name, tensor in adapters.tensors().items() if ".adapters.1." not in name}
    adapters.detach()
    of_one = sum(".adapters.0." in name for name in kinds)
    count = min(config.num_experts, len(header(path)) // of_one + 1)  # one more than the file can hold shows that too many are asked for
    asked = {name.replace(".adapters.0.", f".adapters.{number}."): shape for number in range(count) for name, shape in kinds.items()}
    check_shapes(path, asked, config=MANIFEST)


def _widened(name: str, shape: list[int], config: AdapterConfig) -> list[int]:
    sizes = {
        "down.weight": (config.bottleneck, None),
        "up.weight": (None, config.bottleneck),
        "mlp.0.weight": (config.hidden_dim, None),
        "mlp.0.bias": (config.hidden_dim,),
        "mlp.2.weight": (config.num_experts, config.hidden_dim),
        "mlp.2.bias": (config.num_experts,),
    }
    asked = next((found for end, found in sizes.items() if name.endswith(end)), (None,))  # None: as wide as it is
    return [new or old for new, old in zip(asked, shape, strict=True)]
