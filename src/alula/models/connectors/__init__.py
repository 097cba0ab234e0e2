"""Encoder features -> tokens of the backbone's width. A new connector is one file and one line below; it knows neither the
encoder nor the backbone.
"""

from alula.models.connectors.attention_pool import AttentionPoolConnector
from alula.models.connectors.average_pool import AveragePoolConnector
from alula.models.connectors.base import CONNECTORS, Connector
from alula.models.connectors.c_abstractor import CAbstractorConnector
from alula.models.connectors.deformable import DeformableConnector
from alula.models.connectors.linear import LinearConnector
from alula.models.connectors.mlp import MlpConnector

__all__ = [
    "CONNECTORS",
    "AttentionPoolConnector",
    "AveragePoolConnector",
    "CAbstractorConnector",
    "Connector",
    "DeformableConnector",
    "LinearConnector",
    "MlpConnector",
]
