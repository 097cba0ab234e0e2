"""Processors for machines without torchvision. Knows file formats and processors; knows no model.

Every video processor of transformers needs torchvision, and a processor that *has* one builds it at once, even for
images. Here a placeholder takes its seat: it carries the saved video entry along, so that a folder written here is
complete for a machine with torchvision, and says what to do when a video comes.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import transformers
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    ImageProcessingMixin,
    ProcessorMixin,
)
from transformers.video_processing_utils import VideoProcessorMixin

from alula.errors import UserError

PARTS: dict[str, Any] = {"tokenizer": AutoTokenizer, "image_processor": AutoImageProcessor, "feature_extractor": AutoFeatureExtractor}


class MissingVideo(VideoProcessorMixin):
    """The seat of a video processor that this machine cannot build.

    Args:
        entry: the video processor's saved configuration; written back as it came.
    """

    num_frames = None
    fps = None

    def __init__(self, entry: Mapping[str, Any]) -> None:
        super().__init__(**entry)
        self.entry = dict(entry)

    def __call__(self, *videos: Any, **options: Any) -> Any:
        """Refuses.

        Raises:
            UserError: always.
        """
        kind = self.entry.get("video_processor_type", "a video processor")
        raise UserError(
            f"A video came, but {kind} needs torchvision, which is not installed. Images and text work. "
            "Install torchvision in the version that fits your torch, or drop the videos."
        )

    def to_dict(self) -> dict[str, Any]:
        """The entry as it was read."""
        return dict(self.entry)


def images_only(kind: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """The processor class `kind` that also takes a `MissingVideo` as its video processor; saved under its own name."""

    class ImagesOnly(kind):  # type: ignore[valid-type, misc]
        def check_argument_for_proper_class(self, argument_name: str, argument: object) -> Any:
            if isinstance(argument, MissingVideo):
                return MissingVideo
            return super().check_argument_for_proper_class(argument_name, argument)

        def __reduce__(self) -> Any:  # the class is made at run time, so pickle cannot find it by name
            return _restore, (kind, self.__dict__)

    # The class name is what save_pretrained writes and what other machines look up.
    ImagesOnly.__name__ = kind.__name__
    ImagesOnly.__qualname__ = kind.__qualname__
    return ImagesOnly


def _restore(kind: type[ProcessorMixin], state: dict[str, Any]) -> ProcessorMixin:
    made = images_only(kind)
    processor = made.__new__(made)
    processor.__dict__.update(state)
    return processor


def load_processor(path: str | Path) -> ProcessorMixin:
    """The processor saved in a folder or hub repository; without torchvision, one for images and text.

    Args:
        path: folder or hub name.

    Raises:
        UserError: there is no processor there, or it needs a package that is missing.
    """
    name = str(path)
    try:
        if find_spec("torchvision") is None and (kind := _class_with_video(name)) is not None:
            return _load_without_video(name, kind)
        return AutoProcessor.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        if isinstance(error, ImportError) or "torchvision" in str(error):
            raise UserError(
                f"The processor in '{name}' needs a package that is missing here: {first_line(error)} ... Most families need none; "
                "docs/architectures.md names them. Install it in the version that fits your torch."
            ) from error
        raise UserError(
            f"No processor can be loaded from '{name}': {first_line(error)} "
            "A folder written by processor.save_pretrained or the name of a hub repository is accepted. "
            "Save the model's processor next to it, or check the name and the network."
        ) from error


def _class_with_video(name: str) -> type[ProcessorMixin] | None:
    """The processor class recorded under `name`, if it has a video processor; None otherwise or if nothing is found."""
    try:
        recorded, _ = ProcessorMixin.get_processor_dict(name)
    except (OSError, ValueError):
        recorded = {}
    class_name = recorded.get("processor_class") or _image_entry(name).get("processor_class")
    kind = getattr(transformers, class_name, None) if class_name else None
    return kind if kind is not None and "video_processor" in kind.get_attributes() else None


def _load_without_video(name: str, kind: type[ProcessorMixin]) -> ProcessorMixin:
    recorded, _ = kind.get_processor_dict(name)
    parts = []
    for attribute in kind.get_attributes():
        if attribute == "video_processor":
            parts.append(MissingVideo(_video_entry(name)))
        else:
            parts.append(PARTS[attribute].from_pretrained(name))
    return images_only(kind).from_args_and_dict(parts, recorded)


def _video_entry(name: str) -> dict[str, Any]:
    """The saved configuration of the video processor, with its class name."""
    entry, _ = VideoProcessorMixin.get_video_processor_dict(name)
    entry.pop("processor_class", None)
    # Older folders describe images and videos by one file that names the image class only.
    image_class = entry.pop("image_processor_type", None)
    if "video_processor_type" not in entry and image_class:
        stem = image_class.removesuffix("Fast").removesuffix("Pil").removesuffix("ImageProcessor")
        entry["video_processor_type"] = f"{stem}VideoProcessor"
    return entry


def _image_entry(name: str) -> dict[str, Any]:
    """The saved configuration of the image processor; empty if there is none."""
    try:
        entry, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except (OSError, ValueError):
        return {}
    return entry


def first_line(error: Exception) -> str:
    """What an error says, without its explanations."""
    return str(error).strip().split("\n")[0]
