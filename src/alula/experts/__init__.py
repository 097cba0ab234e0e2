"""Small modules whose output is added to a frozen host's, exactly zero at birth."""

from alula.experts.chosen import Chosen
from alula.experts.lora import LoRAExperts

__all__ = ["Chosen", "LoRAExperts"]
