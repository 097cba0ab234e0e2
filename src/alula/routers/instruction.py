"""The router of MoME's language experts: one expert for a sample, by its instruction, or for a token. It knows no model."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

READS = ("instance", "token", "both")
"""What it reads: the instruction (MoLE-I, the paper's choice), each token (-T), or a token and the instruction (-IT)."""


@dataclass(frozen=True)
class Choice:
    """One expert for each sample (the axes are ``batch``) or each token (``batch tokens``).

    Attributes:
        scores: what was decided by, fp32, before the softmax; with noise, if there was any.
        factor: exactly 1; through it the router gets its gradient.
    """

    scores: Float[Tensor, "*axes experts"]
    index: Int[Tensor, "*axes"]
    factor: Float[Tensor, "*axes"]


class Float32Linear(nn.Linear):
    """A linear map in fp32, whatever the type of its weights: `model.to(torch.bfloat16)` takes routers along."""

    def forward(self, input: Float[Tensor, "*rows input"]) -> Float[Tensor, "*rows output"]:
        """The map of each row."""
        return functional.linear(input.float(), self.weight.float(), self.bias.float())


class HardRouter(nn.Module):
    """The best of ``softmax(MLP(I))``, with weight 1.

    The gradient is that of ``p / stop_gradient(p)`` with the probability p of the best: what the chosen expert says, weighted by p, as in
    Switch, but without making it smaller.

    Args:
        dim: width of the hidden state.
        instruction_dim: width of the instruction's embedding.
        reads: one of `READS`.
        hidden_dim: between the two linear maps; with a GELU between them as in the paper's other router.
        gumbel: adds Gumbel noise to the scores while it trains, drawn from torch's generator.

    Source: Shen et al., "MoME", equation 9, https://arxiv.org/abs/2407.12709. The paper says neither how the router gets a gradient nor
    how wide it is; both are ours.

    Example:
        >>> router = HardRouter(8, num_experts=4, instruction_dim=6)
        >>> choice = router(torch.randn(2, 5, 8), torch.randn(2, 6))
        >>> choice.index.shape, choice.factor.tolist()
        (torch.Size([2]), [1.0, 1.0])
    """

    def __init__(
        self, dim: int, *, num_experts: int, instruction_dim: int, reads: str = "instance", hidden_dim: int = 128, gumbel: bool = False
    ) -> None:
        super().__init__()
        width = {"instance": instruction_dim, "token": dim, "both": dim + instruction_dim}[reads]
        self.reads, self.gumbel = reads, gumbel
        self.mlp = nn.Sequential(Float32Linear(width, hidden_dim), nn.GELU(), Float32Linear(hidden_dim, num_experts))

    def forward(self, x: Float[Tensor, "batch tokens dim"], instruction: Float[Tensor, "batch width"] | None) -> Choice:
        """Who speaks.

        Args:
            instruction: needed unless the router reads tokens alone.
        """
        with torch.autocast(x.device.type, enabled=False):
            scores = self.mlp(self._seen(x, instruction))
            if self.gumbel and self.training:
                scores = scores - torch.empty_like(scores).exponential_().log()
            best, index = scores.softmax(dim=-1).max(dim=-1)
        return Choice(scores, index, best / best.detach())

    def _seen(self, x: Tensor, instruction: Tensor | None) -> Tensor:
        if self.reads == "token":
            return x
        assert instruction is not None, "a router that reads instructions is given them"
        if self.reads == "instance":
            return instruction
        return torch.cat([x.float(), instruction.float().unsqueeze(1).expand(-1, x.shape[1], -1)], dim=-1)
