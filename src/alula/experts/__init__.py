"""Small modules whose output is added to a frozen host's, exactly zero at birth; feed-forward networks made sparse.

Importing it lets `load_model` load what `upcycle` changed.
"""

from alula.experts.chosen import Chosen
from alula.experts.lora import LoRAExperts
from alula.experts.upcycling import upcycle
from alula.models import load_model

__all__ = ["Chosen", "LoRAExperts", "load_model", "upcycle"]
