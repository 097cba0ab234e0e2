"""Parts as users name them, and the weights that they bring along. It knows no whole model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, ImageProcessingMixin, PreTrainedModel

from alula.errors import UserError
from alula.models.vision_mixture import STATISTICS

Part = str | Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the weights of one part are: a safetensors file of it or of a whole composed model, or a Hugging Face model. Or nowhere."""

    file: Path | None = None
    hub: str | None = None


def read_parts(given: Part | Sequence[Part]) -> tuple[dict | list[dict], list[Source]]:
    """Configurations without the places of weights, a list if a list came, and those places.

    A Hugging Face model tells its configuration and, where it has a preprocessor's too, the mean and deviation of its pixels, unless
    the part names them.
    """
    is_one = isinstance(given, str | Mapping)
    listed: Sequence[Part] = [given] if is_one else given  # type: ignore[assignment, list-item]
    entries: list[dict] = [{"name": one} if isinstance(one, str) else dict(one) for one in listed]
    sources = []
    for entry in entries:
        file, hub = entry.pop("weights", None), entry.pop("path", None)
        if hub is not None:
            found = AutoConfig.from_pretrained(str(hub))
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
    try:
        with safe_open(file, "pt") as opened:
            keys = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read: {error}. A safetensors file with the weights of this part is wanted.") from error
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
