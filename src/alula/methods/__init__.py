"""Continual-learning methods, one file each: a new method is one new file and one import line here."""

from alula.methods.additions import ADDITIONS, compose
from alula.methods.align import Align
from alula.methods.base import METHODS, Arm, Method, Stage
from alula.methods.full import FinetuneFull, JointFull
from alula.methods.ia3 import IA3
from alula.methods.merged_lora import MergedLoRA
from alula.methods.merging import Merging
from alula.methods.moe_lora import MoELoRA
from alula.methods.mome import MoME
from alula.methods.one_lora import Finetune, Joint
from alula.methods.prefix import Prefix
from alula.methods.routed import Routed, Specialist
from alula.methods.wings import Wings

__all__ = [
    "ADDITIONS",
    "IA3",
    "METHODS",
    "Align",
    "Arm",
    "Finetune",
    "FinetuneFull",
    "Joint",
    "JointFull",
    "MergedLoRA",
    "Merging",
    "Method",
    "MoELoRA",
    "MoME",
    "Prefix",
    "Routed",
    "Specialist",
    "Stage",
    "Wings",
    "compose",
]
