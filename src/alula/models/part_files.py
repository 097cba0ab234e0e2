"""Parts as users name them, and the weights that they bring along. It knows no whole model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, ImageProcessingMixin, PreTrainedConfig, PreTrainedModel

from alula.data.interleaved.encoder import minilm_folder
from alula.errors import UserError
from alula.models.instructions import EMBEDDED
from alula.models.loading import EMBEDDED as EMBEDDED_MODEL
from alula.models.vision_mixture import STATISTICS

Part = str | Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the weights of one part are: a safetensors file of it or of a whole composed model, or a Hugging Face model. Or nowhere."""

    file: Path | None = None
    hub: str | None = None


def config_of(place: str | Path, *, what: str, wanted: str) -> PreTrainedConfig:
    """The configuration of a Hugging Face model.

    Args:
        place: its folder, or its name on the hub.
        what: it is to be, for the error; `wanted`: what to give.

    Raises:
        UserError: there is none.
    """
    try:
        return AutoConfig.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise UserError(f"There is no {what} in '{place}': {str(error).splitlines()[0]} Give {wanted}.") from error


def sentence_dim(name: str, *, told: object) -> int:
    """How wide the sentences of an instruction encoder are.

    Args:
        told: what the router's `input_dim` is to be; None: nothing was said.

    Raises:
        UserError: there is no such encoder, its package is not installed, or it has another width than was told.
    """
    wanted = "as instruction_encoder the folder or hub name of a sentence encoder, or `minilm`"
    found = config_of(minilm_folder() if name == EMBEDDED else name, what="sentence encoder", wanted=wanted)
    real: int = found.get_text_config().hidden_size
    if told not in (None, real):
        raise UserError(
            f"The router got input_dim={told!r}, but the sentences of '{name}' are {real} wide. Set input_dim={real}, or leave it out: it "
            "comes from the instruction encoder."
        )
    return real


def read_parts(given: Part | Sequence[Part]) -> tuple[dict | list[dict], list[Source]]:
    """Configurations without the places of weights, a list if a list came, and those places.

    A Hugging Face model tells its configuration and, where it has a preprocessor's too, the mean and deviation of its pixels, unless
    the part names them.

    ``weights: smol`` are those of that part of the embedded default.

    Raises:
        UserError: there is no such model, or none is named.
    """
    is_one = isinstance(given, str | Mapping)
    listed: Sequence[Part] = [given] if is_one else given  # type: ignore[assignment, list-item]
    entries: list[dict] = [{"name": one} if isinstance(one, str) else dict(one) for one in listed]
    sources = []
    for entry in entries:
        file, hub = entry.pop("weights", None), entry.pop("path", None)
        if entry.get("name") == "hf" and hub is None and "config" not in entry:
            raise UserError("Encoder 'hf' came without a path. Give the folder or hub name of a vision model, or its configuration.")
        if file == EMBEDDED_MODEL:
            from alula.models.smol import prepare_smol

            file = prepare_smol() / "model.safetensors"
        if hub is not None:
            wanted = "as path the folder or hub name of a vision model, such as openai/clip-vit-base-patch32"
            found: Any = config_of(str(hub), what="vision model", wanted=wanted)
            entry["config"] = (getattr(found, "vision_config", None) or getattr(found, "image_config", found)).to_dict()
            if not any(entry.get(key) for key in STATISTICS):
                entry.update(_statistics(str(hub)))
        sources.append(Source(file=None if file is None else Path(str(file)), hub=None if hub is None else str(hub)))
    return (entries[0] if is_one else entries), sources


def _statistics(hub: str) -> dict[str, list[float]]:
    """What the preprocessor of a Hugging Face model normalises pixels with; nothing where there is none."""
    try:
        found, _ = ImageProcessingMixin.get_image_processor_dict(hub)
    except OSError:
        return {}
    if not found.get("do_normalize", True):
        return {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    return {key: found[key] for key in STATISTICS if found.get(key)}


def _shapes(file: Path, *, root: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (key in the file, shape): from the header of the file of one part, or of a composed model with it under `root`."""
    if file.is_dir():
        raise UserError(f"{file} is a folder, the weights of a part are one file. Give the safetensors file in it.")
    try:
        with safe_open(file, "pt") as opened:
            keys = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{file} cannot be read: {error}. A safetensors file with the weights of this part is wanted: give one, or make "
            "one with `alula pretrain`."
        ) from error
    inside = {key: shape for key, shape in keys.items() if key.startswith(f"{root}.")} if root else {}
    return {key.removeprefix(f"{root}."): (key, shape) for key, shape in (inside or keys).items()}


def check_file(member: nn.Module, file: Path, *, root: str) -> None:
    """Compares names and shapes in the header of `file` with those of `member`.

    Args:
        root: the part's name in a composed model.

    Raises:
        UserError: they differ, or the file cannot be read.
    """
    wanted = {name: tuple(value.shape) for name, value in member.state_dict().items()}
    found = {name: shape for name, (_, shape) in _shapes(file, root=root).items()}
    for name in sorted(wanted.keys() & found.keys()):
        if wanted[name] != found[name]:
            raise UserError(
                f"{file} holds '{name}' of shape {found[name]}, but {type(member).__name__} has {wanted[name]} here: the widths, the grid "
                "or the number of tokens differ. Give the keywords with which the file was made, or leave its weights out."
            )
    if wanted.keys() != found.keys():
        missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
        raise UserError(
            f"{file} lacks {len(missing)} tensors of {type(member).__name__} (such as {missing[:2]}) and has {len(extra)} that it does not "
            f"know ({extra[:2]}). Give the file of a {type(member).__name__} of the same keywords."
        )


def load_part(member: nn.Module, source: Source, *, root: str) -> None:
    """The weights of one part, from where they are; nothing if they are nowhere.

    Raises:
        UserError: the Hugging Face model has others. Those of a pooler, which reads the features and makes none, may be missing.
    """
    if source.hub is not None:
        inner: PreTrainedModel = member.model  # type: ignore[assignment]
        both: tuple = type(inner).from_pretrained(source.hub, config=inner.config, output_loading_info=True)  # type: ignore[assignment]
        found, report = both
        if missing := sorted(name for name in report["missing_keys"] if "pooler" not in name):
            raise UserError(
                f"'{source.hub}' lacks {len(missing)} tensors of {type(inner).__name__} (such as {missing[:2]}). Give the folder of that "
                "model alone: load the whole model, and save_pretrained its vision part."
            )
        inner.load_state_dict(found.state_dict())
    if source.file is not None:
        with safe_open(source.file, "pt") as opened:
            values: dict[str, Tensor] = {name: opened.get_tensor(key) for name, (key, _) in _shapes(source.file, root=root).items()}
        member.load_state_dict(values)
