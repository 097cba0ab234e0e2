"""What can be added to any method, one file each: a new addition is one new file and one import line here."""

from alula.methods.additions.balance import Balance
from alula.methods.additions.base import ADDITIONS, Addition
from alula.methods.additions.composed import Composed, compose
from alula.methods.additions.distillation import Distillation
from alula.methods.additions.ewc import EWC
from alula.methods.additions.freezing import Freezing
from alula.methods.additions.generative_replay import GenerativeReplay
from alula.methods.additions.o_lora import OLoRA
from alula.methods.additions.rehearsal import Rehearsal
from alula.methods.additions.soft_targets import SoftTargets

__all__ = [
    "ADDITIONS",
    "EWC",
    "Addition",
    "Balance",
    "Composed",
    "Distillation",
    "Freezing",
    "GenerativeReplay",
    "OLoRA",
    "Rehearsal",
    "SoftTargets",
    "compose",
]
