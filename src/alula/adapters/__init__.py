"""Adapters beside a model's feed-forward networks (MoME's language experts): what they see, how they join, the handle."""

from alula.adapters.attaching import attach_adapters
from alula.adapters.config import AdapterConfig
from alula.adapters.handle import Adapters

__all__ = ["AdapterConfig", "Adapters", "attach_adapters"]
