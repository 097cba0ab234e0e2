"""Continual-learning methods, one file each: a new method is one new file and one import line here."""

from alula.methods.align import Align
from alula.methods.base import METHODS, Arm, Method, Stage
from alula.methods.full import FinetuneFull, JointFull
from alula.methods.one_lora import Finetune, Joint
from alula.methods.prefix import Prefix
from alula.methods.routed import Routed, Specialist
from alula.methods.wings import Wings

__all__ = [
    "METHODS",
    "Align",
    "Arm",
    "Finetune",
    "FinetuneFull",
    "Joint",
    "JointFull",
    "Method",
    "Prefix",
    "Routed",
    "Specialist",
    "Stage",
    "Wings",
]
