"""The recipe of `alula pretrain`: objective, encoder, pairs, settings. It opens no image and builds no model."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator

from alula.config import check_train, read_raw
from alula.data.checking import check
from alula.data.choices import Strict, TaskChoice
from alula.errors import UserError
from alula.training.settings import TrainSettings

TRAIN: dict[str, dict[str, Any]] = {
    "clip": {"steps": 800, "weight_decay": 0.2, "warmup_ratio": 0.05},
    "aim": {"steps": 600, "weight_decay": 0.05, "warmup_ratio": 0.025},
}
"""Source: MM1's encoders (rate, weight decay, AIM's warm-up). Steps and sizes are ours: about ten minutes of one CPU core."""
SHARED: dict[str, Any] = {"batch_size": 64, "learning_rate": 1e-3, "save_every": 100}
HEADS: dict[str, dict[str, int]] = {"clip": {}, "aim": {"head_dim": 256, "num_blocks": 4}}
PARTS: dict[str, dict[str, int]] = {"vit": {"image_size": 64, "patch_size": 8, "dim": 128, "num_layers": 4, "num_heads": 4}}


class PretrainRecipe(Strict):
    """How an encoder is made. What is left out has the defaults of its objective."""

    objective: Literal["clip", "aim"]
    """clip: contrast with text. aim: predict the next patch."""

    encoder: dict[str, Any]
    """A registered name and its keywords."""

    head: dict[str, int]
    """Keywords of what is trained beside it and dropped afterwards."""

    task: TaskChoice | None = None
    """Images with texts as answers; None: all built-in pairs."""

    captions: float = Field(0.5, ge=0, le=1)
    """The share of `clip`'s training texts that become captions from templates."""

    train_size: int | None = Field(None, ge=1)
    """Of the built-in pairs: training samples at most, of each source; None: 1500."""

    probe_size: int | None = Field(None, ge=0)
    """Samples a split for the linear probes; None: all, 0: no probes."""

    train: TrainSettings
    """As in a run's recipe."""

    @field_validator("task", mode="before")
    @classmethod
    def _named(cls, task: Any) -> Any:
        return {"name": task} if isinstance(task, str) else task


def read_pretraining(start: str, given: Mapping[str, Any]) -> PretrainRecipe:
    """The recipe that `start` stands for.

    Args:
        start: an objective, or a YAML file.
        given: fields over what it says; of encoder, head and train the keywords that change.

    Raises:
        UserError: no such file, an unknown key or a bad value.
    """
    is_file = start.endswith((".yaml", ".yml"))
    raw = read_raw(start) if is_file else {"objective": start}
    where, objective = start if is_file else "pretrain", raw.get("objective")
    if objective not in TRAIN:
        raise UserError(f"{where}: the objective is {objective!r}. Known: {', '.join(TRAIN)}. Choose one, or name a recipe, a .yaml file.")
    said = {key: _mapping(raw.get(key), key, where) | given.get(key, {}) for key in ("encoder", "head", "train")}
    name = said["encoder"].get("name", "vit")
    own = {
        "encoder": PARTS.get(name, {}) | said["encoder"] | {"name": name},
        "head": HEADS[objective] | said["head"],
        "train": check_train(said["train"], defaults=SHARED | TRAIN[objective]),
    }
    return check(PretrainRecipe, {**raw, **given, **own}, where)


def _mapping(value: Any, key: str, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if isinstance(value, str) and key == "encoder":
        return {"name": value}
    if not isinstance(value, dict):
        raise UserError(f"{where}: '{key}' is {value!r}; a mapping is wanted. Write `{key}: {{...}}`.")
    return value
