"""Image encoders by name. A new one is one file here and one import line below."""

from alula.models.encoders.base import ENCODERS, Encoder
from alula.models.encoders.efficientnet_lite0 import EfficientNetLite0, convert_efficientnet_lite0
from alula.models.encoders.hf import HfEncoder

__all__ = ["ENCODERS", "EfficientNetLite0", "Encoder", "HfEncoder", "convert_efficientnet_lite0"]
