"""The only seam into a backbone: host + experts + router in place of linear layers; attach, grow, freeze, detach, merge."""

from alula.mixture.attaching import attach
from alula.mixture.handle import ExpertState, Mixtures
from alula.mixture.mixture import Mixture
from alula.mixture.observing import observe

__all__ = ["ExpertState", "Mixture", "Mixtures", "attach", "observe"]
