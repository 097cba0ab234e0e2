"""Models and their processors: loading, anatomy, and composing new ones. Knows no data, experts or methods.

Importing it makes `ComposedVLM` known to the Auto classes, so that `AutoModelForImageTextToText` loads its folders.
"""

from alula.models.anatomy import Anatomy, anatomy
from alula.models.composed import register_auto_classes
from alula.models.loading import base_fingerprint, load_model
from alula.models.processors import load_processor

register_auto_classes()

__all__ = ["Anatomy", "anatomy", "base_fingerprint", "load_model", "load_processor"]
