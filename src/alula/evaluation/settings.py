"""How a run's model is scored: one checked set of options. It knows no task and no model."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from alula.data.choices import Strict


class EvaluationSettings(Strict):
    """How the model is scored after each task."""

    batch_size: int = Field(32, ge=1)
    """Samples per forward."""

    future_tasks: bool = True
    """Also score tasks that are not learnt yet: needed for forward transfer, costs time."""

    base_row: bool = True
    """Score the untouched model too (row 0): what is learnt and what is forgotten is held against it. False saves that where it cannot
    answer yet, as with a fresh connector."""

    base_every_task: bool = True
    """Score the base tasks after each task; false: only after the last one, which saves time and leaves their curves two points."""

    attention_shift: int = Field(0, ge=0)
    """Test samples of which the attention shift is measured before and after learning; 0: none."""

    shots: list[Annotated[int, Field(ge=0)]] = Field(default_factory=list)
    """Also score every task with so many solved examples before each question, as ``4shot_<task>``; one number or several. 0 names
    the scores without examples ``0shot_<task>``, beside the others."""

    shots_by: Literal["seed", "similarity"] = "seed"
    """How examples are chosen: at random, the same in all cells, or those with the most similar questions (needs the package of minilm)."""

    shots_as: Literal["chat", "vqa", "caption"] = "chat"
    """How examples are written: as turns of the model's conversation, or as a published prompt (docs/few_shot.md)."""

    @field_validator("shots", mode="before")
    @classmethod
    def _one_alone(cls, value: Any) -> Any:
        return [value] if isinstance(value, int) else value
