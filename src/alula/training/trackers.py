"""The trackers (TensorBoard, Weights & Biases, Trackio ...) that losses and scores go to. It knows no model."""

from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from alula.errors import UserError, nearest
from alula.training.settings import TrainSettings


def check_trackers(given: Accelerator | None, *, trackers: Sequence[str], folder: Path | None) -> None:
    """Refuses trackers that cannot be written to.

    Raises:
        UserError: an unknown or missing tracker, or trackers without a folder or beside an accelerator of one's own.
    """
    known = {str(kind.value) for kind in LoggerType} - {"all"}
    installed = {str(getattr(kind, "value", kind)) for kind in get_available_trackers()}
    for name in trackers:
        if name not in known:
            raise UserError(f"Unknown tracker '{name}'. {nearest(name, known)}")
        if name not in installed:
            raise UserError(f"The tracker '{name}' is not installed here. Install it (pip install {name}) or take it out.")
    if trackers and given is not None:
        raise UserError("Both an accelerator and trackers came. Give the accelerator its own log_with, and no trackers.")
    if trackers and folder is None:
        raise UserError(f"Trackers ({', '.join(trackers)}) need a folder to write to. Give the trainer one.")


def begin_trackers(accelerator: Accelerator, *, settings: TrainSettings, folder: Path | None) -> None:
    """Opens the trackers, with the settings as their configuration."""
    if accelerator.log_with:
        said = {key: value for key, value in settings.model_dump().items() if value is not None}
        config = {key: value if isinstance(value, int | float | str) else str(value) for key, value in said.items()}  # TensorBoard's types
        where = {} if folder is None else {"wandb": {"dir": str(folder)}}  # else it would write below the working directory
        accelerator.init_trackers("trackers" if folder is None else folder.name, config=config, init_kwargs=where)


def end_trackers(accelerator: Accelerator) -> None:
    """Closes the trackers; unlike Accelerate's end_training it leaves the process group for the evaluation."""
    for tracker in accelerator.trackers:
        tracker.finish()
