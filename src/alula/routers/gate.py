"""The learnt gate of PHATGOOSE: one vector per expert and linear layer."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from alula.context import BASE, Context
from alula.errors import UserError
from alula.experts.lora import LoRAExperts
from alula.routers.base import ROUTERS, Router, standardise, top_k_softmax


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
        self.names: list[str] = []
        self.gates = nn.ParameterList()
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

    def forward(self, x: Float[Tensor, "batch tokens dim"], context: Context) -> Float[Tensor, "batch tokens experts"]:
        """Weights over all experts (see the class)."""
        if context.gate_of is not None:
            keep = torch.sigmoid(x.float() @ self.gates[context.gate_of].float())
            weights = x.new_zeros(*x.shape[:-1], len(self.names), dtype=torch.float32)
            return weights.index_add(-1, torch.tensor([context.gate_of], device=x.device), keep.unsqueeze(-1))
        return self._routed(x, context)

    def _routed(self, x: Tensor, context: Context) -> Tensor:
        routing = context.routing
        scores = self.scores(x) * (1.0 if routing.temperature is None else routing.temperature)
        if context.prior is not None:
            scores = scores + context.per_row(context.prior, x)
        if routing.null == "zero_expert":
            null = standardise(x) @ standardise(self.null_sum).to(x.device) / math.sqrt(self.dim)
            with_null = torch.cat([scores, null.unsqueeze(-1)], dim=-1)
            return top_k_softmax(with_null, top_k=routing.top_k)[..., :-1]
        weights = top_k_softmax(scores, top_k=routing.top_k)
        if routing.null == "sigmoid_keep":
            return weights * torch.sigmoid(x.float() @ torch.stack(list(self.gates)).float().T)
        if routing.null == "threshold":
            return weights * (scores >= routing.threshold)
        return weights

    def scores(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens experts"]:
        """Scaled products of the standardised token and gates; minus infinity for gates never trained.

        Raises:
            UserError: no gate of the pool was trained.
        """
        gates = torch.stack(list(self.gates)).float()
        trained = gates.ne(0).any(dim=-1)
        if not bool(trained.any()):
            raise UserError(
                f"None of the gates of {', '.join(self.names)} was trained, so router 'gate' cannot choose. "
                "Train them (`alula learn --router gate`) or use router 'analytic' or 'arrow'."
            )
        scores = standardise(x) @ standardise(gates).T / math.sqrt(self.dim)
        return scores.masked_fill(~trained, -torch.inf)

    def stored(self, name: str) -> dict[str, Tensor]:
        """The gate vector; for the base model, the sum of standardised activations on general text."""
        if name == BASE:
            return {"null_sum": self.null_sum} if bool(self.null_sum.any()) else {}
        return {"gate": self.gates[self.names.index(name)].detach().clone()}

    def restore(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Puts back what `stored` gave."""
        if name == BASE:
            self.null_sum = tensors["null_sum"].to(self.null_sum.device)
            return
        with torch.no_grad():
            self.gates[self.names.index(name)].copy_(tensors["gate"])
