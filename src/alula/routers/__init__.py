"""Weights over experts: a new router is one new file and one import line here."""

from alula.routers.analytic import AnalyticRouter
from alula.routers.arrow import ArrowRouter
from alula.routers.base import ROUTERS, Router
from alula.routers.dense import DenseRouter
from alula.routers.gate import GateRouter
from alula.routers.prompt import PromptRouter
from alula.routers.seen import Seen

__all__ = ["ROUTERS", "AnalyticRouter", "ArrowRouter", "DenseRouter", "GateRouter", "PromptRouter", "Router", "Seen"]
