"""Continual-learning methods, one file each: a new method is one new file and one import line here."""

from alula.methods.align import Align
from alula.methods.base import METHODS, Arm, Method, Stage
from alula.methods.full import FinetuneFull, JointFull
from alula.methods.one_lora import Finetune, Joint
from alula.methods.routed import Routed, Specialist

__all__ = ["METHODS", "Align", "Arm", "Finetune", "FinetuneFull", "Joint", "JointFull", "Method", "Routed", "Specialist", "Stage"]
