"""The learnt gate of PHATGOOSE: one vector per expert and linear layer."""

import math
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from alula.context import BASE, Context, Routing
from alula.errors import UserError
from alula.experts import Chosen, LoRAExperts
from alula.experts.entries import entries
from alula.routers.base import ROUTERS, Router, prior_of, scaled, standardise
from alula.routers.seen import Kept, Seen


@ROUTERS.register("gate")
class GateRouter(Router):
    """Sigmoid gates trained one by one, reused together as a router.

    Stage 2 trains ``v_z`` alone: ``y = W u + s * sigmoid(v_z . u) * B_z A_z u`` (v starts at 0, raw u, no bias).
    Routing: ``a_z = LN(u) . LN(v_z) / sqrt(n)``, softmax over the top-k, in fp32. An expert whose gate was never
    trained takes no part.

    The null options are ours (*reconstructed*; the papers have none): ``zero_expert`` adds a silent expert whose vector
    is the mean standardised activation on general text, ``sigmoid_keep`` multiplies by ``sigmoid(v_z . u)``,
    ``threshold`` drops experts that score below `Routing.threshold`.

    Source: Muqeeth et al. 2024, "Learning to Route Among Specialized Experts", sec. 3 (arXiv 2402.05859), as taken up
    for multimodal models by arXiv 2511.01831 (*reconstructed*: only its abstract could be read).
    """

    needs_training = True
    null_sum: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.gates = nn.ParameterList()
        self._kept: Kept[tuple[Tensor, Tensor | None]] = Kept()
        self.register_buffer("null_sum", torch.zeros(dim, dtype=torch.float64), persistent=False)

    def grow(self, name: str, experts: LoRAExperts) -> None:
        """Adds a gate at zero, beside the expert's tensors."""
        device = experts.A[-1].device
        self.gates.append(nn.Parameter(torch.zeros(self.dim, device=device)))
        self.names.append(name)

    def remove(self, name: str) -> None:
        """Forgets a gate."""
        gone = self.names.index(name)
        self.gates = nn.ParameterList([gate for index, gate in enumerate(self.gates) if index != gone])
        self.names.pop(gone)

    def choose(self, seen: Seen, context: Context) -> Chosen:
        """Weights of the best experts (see the class)."""
        if context.gate_of is not None:
            keep = torch.sigmoid(seen.fp32 @ self.gates[context.gate_of].float()).unsqueeze(-1)
            index = torch.full_like(keep, context.gate_of, dtype=torch.long)
            return Chosen(weights=keep, index=index, experts=len(self.names))
        routing = context.routing

        def to_scores(products: Tensor) -> Tensor:
            return scaled(products * seen.inverse_spread, routing.temperature)

        chosen = self.best(seen, context, to_scores, products=lambda: self._competing(seen, routing))
        if routing.null == "sigmoid_keep":
            raw = seen.fp32 @ torch.stack(entries(self.gates)).float().T
            return replace(chosen, weights=chosen.weights * torch.sigmoid(chosen.of_slots(raw)))
        if routing.null == "threshold":
            prior = prior_of(context, seen.x)
            scores = to_scores(self._competing(seen, routing)) + (0.0 if prior is None else prior)
            return replace(chosen, weights=chosen.weights * (chosen.of_slots(scores) >= routing.threshold))
        return chosen

    def _competing(self, seen: Seen, routing: Routing) -> Float[Tensor, "batch tokens classes"]:
        """Products with `rows`, minus infinity for gates never trained, and with the null expert's where there is one."""
        products, untrained = seen.products(self), self.untrained()
        if untrained is not None:
            products = products.masked_fill(untrained, -torch.inf)
        if routing.null != "zero_expert":
            return products
        null = standardise(self.null_sum).to(seen.x.device) / math.sqrt(self.dim)
        return torch.cat([products, (seen.fp32 @ null).unsqueeze(-1)], dim=-1)

    def rows(self) -> Float[Tensor, "experts dim"]:
        """The gates standardised, over ``sqrt(n)``: with a token's `Seen.inverse_spread` they give its scores."""
        return self._derived()[0]

    def untrained(self) -> Bool[Tensor, " experts"] | None:
        """Which gates were never trained; None: all were."""
        return self._derived()[1]

    def _derived(self) -> tuple[Tensor, Tensor | None]:
        """`rows`, and which gates were never trained, if any."""
        gates = entries(self.gates)

        def derive() -> tuple[Tensor, Tensor | None]:
            stacked = torch.stack(gates).float()
            untrained = stacked.eq(0).all(dim=-1)
            if bool(untrained.all()):
                raise UserError(
                    f"None of the gates of {', '.join(self.names)} was trained, so router 'gate' cannot choose. "
                    "Train them (`alula learn --router gate`) or use router 'analytic' or 'arrow'."
                )
            return standardise(stacked) / math.sqrt(self.dim), untrained if bool(untrained.any()) else None

        return self._kept.of(gates, derive)

    def scores(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens experts"]:
        """Scaled products of the standardised token and gates; minus infinity for gates never trained.

        Raises:
            UserError: no gate of the pool was trained.
        """
        seen, (rows, untrained) = Seen(x), self._derived()
        scores = (seen.fp32 @ rows.T) * seen.inverse_spread
        return scores if untrained is None else scores.masked_fill(untrained, -torch.inf)

    def stored(self, name: str) -> dict[str, Tensor]:
        """The gate vector; for the base model, the sum of standardised activations on general text."""
        if name == BASE:
            return {"null_sum": self.null_sum} if bool(self.null_sum.any()) else {}
        return {"gate": self.gates[self.names.index(name)].detach().clone()}

    def shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        """Of the gate vector; for the base model, of the sum."""
        return {"null_sum" if name == BASE else "gate": (self.dim,)}

    def restore(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Puts back what `stored` gave."""
        if name == BASE:
            self.null_sum = tensors["null_sum"].to(self.null_sum.device)
            return
        with torch.no_grad():
            self.gates[self.names.index(name)].copy_(tensors["gate"])
