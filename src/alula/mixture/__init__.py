"""The only seam into a backbone: host + experts + router in place of linear layers; attach, grow, freeze, detach, merge."""

from alula.mixture.handle import Mixtures, attach
from alula.mixture.mixture import Mixture
from alula.mixture.observing import observe

__all__ = ["Mixture", "Mixtures", "attach", "observe"]
