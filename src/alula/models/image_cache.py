"""What a frozen image encoder makes of an image, kept on disk: with a large encoder most of a forward. It knows no connector and no text.

What is kept is the encoder's output, so a connector may train, be mixed or be exchanged beside it.
"""

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from alula.errors import UserError
from alula.files import read_tensors, write_tensors
from alula.models.anatomy import base_model, walk

GIGABYTES = 20.0
CHECK = "sha256"
"""The name under which a file keeps the digest of its tensors; they are "0", "1" and so on, one for each encoder."""
FROZEN = "Take cache_images out, or use methods that leave the encoder frozen."

logger = logging.getLogger(__name__)


class ImageCache:
    """A folder of features, one file for each image and encoder; several processes may share it, and it may be deleted at any time.

    A hit equals a miss bit for bit: an image is encoded alone, and found again only by the same pixels, encoder (every weight), kind
    of device, precision, number of threads and version of torch. Encoders that see a whole batch at once may differ from that in the
    last bits. A file that is not whole is made anew.

    Args:
        gigabytes: the most that the folder may hold; after that nothing new is kept.

    Attributes:
        hits, misses: images that were read, and encoded.
    """

    def __init__(self, folder: Path | str, *, gigabytes: float = GIGABYTES) -> None:
        self.folder = Path(folder)
        self.hits = self.misses = 0
        held = sum(file.stat().st_size for file in self.folder.glob("*/*.safetensors"))
        self._room = gigabytes * 1e9 - held
        self._known: tuple[object, object, str] = (None, None, "")

    def __call__(self, encoder: nn.Module, pixels: Float[Tensor, "images 3 height width"]) -> Any:
        """What `encoder` gives for `pixels`, a tensor or a list of one for each encoder, without gradients.

        Raises:
            UserError: the encoder trains, carries something that was attached, or is spread over processes.
        """
        folder = self.folder / self._digest(encoder, pixels.device)
        found = [self._one(encoder, image, folder / f"{_hash([image])}.safetensors") for image in pixels.split(1)]
        whole = [torch.cat(parts) for parts in zip(*found, strict=True)]
        return whole if _is_group(encoder) else whole[0]

    def _one(self, encoder: nn.Module, image: Float[Tensor, "1 3 height width"], path: Path) -> list[Tensor]:
        """The features of one image, from disk if they are there."""
        kept = _read(path)
        if kept is not None:
            self.hits += 1
            return [part.to(image.device) for part in kept]
        self.misses += 1
        with torch.no_grad():
            made = encoder(image)
        parts = list(made) if _is_group(encoder) else [made]
        size = sum(part.numel() * part.element_size() for part in parts)
        if size <= self._room:
            check = torch.frombuffer(bytearray.fromhex(_hash(parts)), dtype=torch.uint8)
            write_tensors(path, {str(number): part for number, part in enumerate(parts)} | {CHECK: check})
            self._room -= path.stat().st_size
        elif self._room > 0:
            logger.warning(
                "%s is full: images that are not in it are encoded each time. Delete old folders in it to make room.", self.folder
            )
            self._room = 0
        return parts

    def _digest(self, encoder: nn.Module, device: torch.device) -> str:
        """Everything but the pixels that the features follow from. The weights are read again only when one of them has changed."""
        _refuse_changing(encoder)
        state = [*encoder.named_parameters(), *encoder.named_buffers()]
        now = [(id(value), value.data_ptr(), value._version) for _, value in state]
        if self._known[0] != now:  # the tensors are held, so that no other one gets their identity
            names, values = [name for name, _ in state], [value for _, value in state]
            self._known = (now, values, _hash(values, names, repr(encoder), _settings(encoder)))
        is_cast = torch.is_autocast_enabled(device.type)
        about = (device.type, torch.get_autocast_dtype(device.type) if is_cast else None, torch.get_num_threads())
        return _hash([], self._known[2], about, torch.__version__, torch.backends.cpu.get_cpu_capability())[:32]


def cache_images(model: nn.Module, folder: Path | str, *, gigabytes: float = GIGABYTES) -> ImageCache:
    """Makes a `ComposedVLM` keep what its image encoder says in `folder` from now on, until its `image_cache` is None again.

    Raises:
        UserError: a model of another class.
    """
    base = base_model(model)
    if not hasattr(type(base), "image_cache"):
        raise UserError(
            f"cache_images came for {type(base).__name__}; only a ComposedVLM (smol, or a model out of parts), whose encoder sees each "
            "image alone, is accepted. Take it out, or compose the model out of parts."
        )
    cache = ImageCache(folder, gigabytes=gigabytes)
    base.image_cache = cache  # type: ignore[assignment]
    return cache


def _refuse_changing(encoder: nn.Module) -> None:
    has_gradient = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in encoder.parameters())
    # with activation checkpointing a frozen layer is in training mode; its dropout is not
    is_random = any(module.training and not getattr(module, "gradient_checkpointing", False) for module in encoder.modules())
    if has_gradient or is_random:
        raise UserError(f"cache_images came, but the image encoder trains, so its features change with every step. {FROZEN}")
    if len(list(walk(encoder))) < len(list(encoder.modules())):
        raise UserError(f"cache_images came, but something is attached to the image encoder that may change from call to call. {FROZEN}")
    if any(isinstance(parameter, DTensor) for parameter in encoder.parameters()):
        raise UserError("cache_images came, but the image encoder is spread over processes. Take it or train.shard out.")


def _settings(encoder: nn.Module) -> list[dict[str, Any]]:
    """What is in no weight: strides, the layer that is read, how pixels are normalised, the kind of attention."""
    found = []
    for module in encoder.modules():
        plain = {name: _plain(value) for name, value in vars(module).items() if name[0] != "_" and name != "training"}
        config = getattr(module, "config", None)
        found.append(
            {**plain, "config": config.to_json_string() if config else "", "attention": getattr(config, "_attn_implementation", "")}
        )
    return found


def _plain(value: object) -> object:
    """Numbers and words, in lists and mappings however deep; of anything else its class, as its repr may name a place in memory."""
    if isinstance(value, Mapping):
        return {repr(_plain(key)): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value if isinstance(value, bool | int | float | str | None) else type(value).__qualname__


def _is_group(encoder: nn.Module) -> bool:
    """Several encoders in one, which give a list."""
    return hasattr(encoder, "encoders")


def _hash(tensors: list[Tensor], *words: object) -> str:
    """64 hexadecimal digits over values, dtypes and shapes of `tensors`, and over `words`."""
    digest = hashlib.sha256(repr(words).encode())
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(path: Path) -> list[Tensor] | None:
    """The tensors of a file, if it is there and whole."""
    if not path.exists():
        return None
    try:
        kept = read_tensors(path)
    except UserError:
        return None
    check = kept.pop(CHECK, None)
    parts = [kept[name] for name in sorted(kept)]
    return parts if check is not None and bytes(check.tolist()).hex() == _hash(parts) else None
