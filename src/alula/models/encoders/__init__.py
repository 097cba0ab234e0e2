"""Image encoders by name. A new one is one file here and one import line below."""

from alula.models.encoders.base import ENCODERS, Encoder
from alula.models.encoders.efficientnet_lite0 import EfficientNetLite0, convert_efficientnet_lite0
from alula.models.encoders.hf import HfEncoder
from alula.models.encoders.patch import PatchEncoder
from alula.models.encoders.vit import VitEncoder

__all__ = ["ENCODERS", "EfficientNetLite0", "Encoder", "HfEncoder", "PatchEncoder", "VitEncoder", "convert_efficientnet_lite0"]
