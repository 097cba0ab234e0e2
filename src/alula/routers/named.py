"""The ways to choose experts that have a name, for recipes, pools and the command line."""

from alula.context import Routing

ROUTINGS = {
    "analytic": Routing(router="analytic", level="sample", top_k=1),
    "analytic_reject": Routing(router="analytic", level="sample", top_k=1, null="threshold", threshold=0.25),
    "analytic_token": Routing(router="analytic", level="token", top_k=2),
    "analytic_combined": Routing(router="analytic", level="combined", top_k=2),
    "gate": Routing(router="gate", level="token", top_k=2),
    "gate_zero_expert": Routing(router="gate", level="token", top_k=2, null="zero_expert"),
    "gate_sigmoid_keep": Routing(router="gate", level="token", top_k=2, null="sigmoid_keep"),
    "gate_combined": Routing(router="gate", level="combined", top_k=2),
    "arrow": Routing(router="arrow", level="token", top_k=3),
}
"""The ways to choose experts that a recipe can name; `gate` is the recipe of the paper, `analytic` our default for streams.

`analytic_reject`, our default for pools, is the same with prompts left to the base model that lie over four times as far (squared) from the
chosen task as its own do; the number is ours, see benchmarks/prompt_routing.py.
"""
