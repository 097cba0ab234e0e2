"""A feed-forward network of which each token uses a few of many copies. It knows no model and no loss.

Source: top-2 gating with capacity as in MM1 (arXiv 2403.09611), which follows GShard (Lepikhin et al. 2020, arXiv 2006.16668).
Differences: any number of choices; without capacity no token is dropped; in evaluation none ever is, because a cached decoding step
sees one token, whose capacity would be none.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from alula.experts.gated_products import can_group, grouped_outputs
from alula.models.graph import with_parameters

Scores = Float[Tensor, "groups tokens experts"]


def choose_experts(
    scores: Scores, *, top_k: int, capacity: float | None
) -> tuple[Float[Tensor, "groups tokens slots"], Int[Tensor, "groups tokens slots"]]:
    """The weights of each token's best experts, best first, and which they are. A dropped choice has weight 0.

    Weights are the probabilities of the chosen experts over their sum, so that they sum to 1 where nothing is dropped; in float64, so
    that experts that say the same in float32 are summed to just that.

    Args:
        top_k: choices of each token.
        capacity: an expert takes at most ``int(tokens * capacity / experts)`` tokens of a group, and never less than one, which is ours:
            in short rows the published number is 0. First choices in the order of the tokens, then second choices, and so on. None: no
            limit.

    Example:
        >>> weights, index = choose_experts(torch.tensor([[[2.0, 0.0, 2.0]]]), top_k=2, capacity=None)
        >>> weights.float().tolist(), index.tolist()
        ([[[0.5, 0.5]]], [[[0, 2]]])
    """
    probabilities = left = scores.float().softmax(dim=-1)
    chosen: list[Tensor] = []
    for _ in range(top_k):
        chosen.append(left.argmax(dim=-1))
        left = left.scatter(-1, chosen[-1].unsqueeze(-1), -1.0)
    index = torch.stack(chosen, dim=-1)
    weights = probabilities.gather(-1, index).to(sum_type(probabilities))
    weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-9)
    if capacity is None:
        return weights, index
    size = max(1, int(scores.shape[1] * capacity / scores.shape[-1]))
    return weights * _kept(index, experts=scores.shape[-1], size=size), index


def _kept(index: Int[Tensor, "groups tokens slots"], *, experts: int, size: int) -> Float[Tensor, "groups tokens slots"]:
    """1 for each choice that found one of the `size` places of its expert, else 0."""
    kept = []
    taken = index.new_zeros(index.shape[0], 1, experts)
    for slot in index.unbind(dim=-1):
        asks = functional.one_hot(slot, experts)
        finds = asks * (asks.cumsum(dim=1) - asks + taken < size)
        taken = taken + finds.sum(dim=1, keepdim=True)
        kept.append(finds.sum(dim=-1))
    return torch.stack(kept, dim=-1).float()


def sum_type(said: Tensor) -> torch.dtype:
    """The type in which outputs of several experts are weighted and summed: a wider one, so that what all say is rounded back to itself."""
    has_wider = said.dtype in (torch.float32, torch.float64) and said.device.type != "mps"  # Apple's GPUs have no float64
    return torch.float64 if has_wider else torch.float32


class Gate(nn.Module):
    """A score for each expert, in fp32 whatever the model's type. No `nn.Linear`: nothing is attached to it or quantises it."""

    def __init__(self, dim: int, experts: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, dim, dtype=dtype, device=device))

    def forward(self, x: Float[Tensor, "groups tokens dim"]) -> Scores:
        """The scores of each token."""
        with torch.autocast(x.device.type, enabled=False):
            return functional.linear(x.float(), self.weight.float())


class SparseFFN(nn.Module):
    """Several feed-forward networks and a gate that sends each token to `top_k` of them.

    Args:
        experts: networks of one form, from and to vectors of one width.
        dim: that width.
        capacity: of each expert in training, see `choose_experts`; a row of the batch is a group. None: no token is dropped.
            Padding takes places too; on the right it takes them last among equal choices.

    Example:
        >>> ffn = SparseFFN([nn.Linear(4, 4) for _ in range(3)], dim=4, top_k=2)
        >>> ffn(torch.zeros(1, 5, 4)).shape
        torch.Size([1, 5, 4])
    """

    def __init__(self, experts: Sequence[nn.Module], *, dim: int, top_k: int = 2, capacity: float | None = None) -> None:
        super().__init__()
        like = next(experts[0].parameters())
        self.gate = Gate(dim, len(experts), dtype=like.dtype, device=like.device)
        self.experts = nn.ModuleList(experts)
        self.top_k, self.capacity = top_k, capacity
        nn.init.normal_(self.gate.weight, std=0.02)

    def forward(
        self, x: Float[Tensor, "*groups tokens dim"], residual: Float[Tensor, "*groups tokens dim"] | None = None
    ) -> Float[Tensor, "*groups tokens dim"]:
        """The chosen experts' outputs, weighted and summed (see `sum_type`), rounded once.

        Args:
            residual: what the experts take as a second input and add to their output (Bloom, MPT); it is added once.
        """
        groups = x.unsqueeze(0) if x.dim() == 2 else x.flatten(0, -3)
        weights, index = self.choose(self.gate(groups))
        rows, flat = groups.flatten(0, 1), index.flatten()
        is_grouped = can_group(self.experts, rows)
        if not is_grouped:  # what was dropped is nobody's; in grouped products it is computed, and weighs nothing
            flat = flat.masked_fill(weights.flatten() == 0, len(self.experts))
        experts, order = flat.sort(stable=True)
        tokens, shares = order.div(self.top_k, rounding_mode="floor"), weights.flatten()[order].unsqueeze(1)
        if is_grouped:
            out = self._grouped(rows, experts, tokens, shares)
        else:
            out = self._looped(rows, experts, tokens, shares, adds=residual is not None)
        return out.view(x.shape) if residual is None else residual + out.view(x.shape)

    def _grouped(self, rows: Tensor, experts: Tensor, tokens: Tensor, shares: Tensor) -> Float[Tensor, "tokens dim"]:
        said = grouped_outputs(self.experts, rows[tokens], experts)
        part = said * shares.to(sum_type(said))
        return torch.zeros_like(rows, dtype=part.dtype).index_add(0, tokens, part).to(rows.dtype)

    def _looped(self, rows: Tensor, experts: Tensor, tokens: Tensor, shares: Tensor, *, adds: bool) -> Float[Tensor, "tokens dim"]:
        out, dtype, start = torch.zeros_like(rows, dtype=sum_type(rows)), rows.dtype, 0
        for expert, count in zip(self.experts, torch.bincount(experts, minlength=len(self.experts)).tolist(), strict=False):
            here = slice(start, start + count)
            if count:
                own = rows[tokens[here]]
                said = expert(own, torch.zeros_like(own)) if adds else expert(own)
                part, dtype = said * shares[here].to(sum_type(said)), said.dtype
                out = out.to(part.dtype).index_add(0, tokens[here], part)
            start += count
        # Those of experts that nobody chose, too. A copy, for the model may write into it.
        return with_parameters(out, self.experts.parameters()).to(dtype, copy=True)

    def choose(self, scores: Scores) -> tuple[Tensor, Tensor]:
        """Weights and experts of each token; capacity holds in training only."""
        return choose_experts(scores, top_k=self.top_k, capacity=self.capacity if self.training else None)


def is_sparse(model: nn.Module) -> bool:
    """Whether the model has sparse feed-forward networks."""
    return any(isinstance(module, SparseFFN) for module in model.modules())


class ScoreLog:
    """The scores of every sparse network of a model in its latest forward with gradients (or any, if asked), by path.

    Held here and not on the modules; `close` ends it.
    """

    def __init__(self, model: nn.Module, *, without_gradients: bool = False) -> None:
        self.scores: dict[str, Scores] = {}
        self.networks = {path: module for path, module in model.named_modules() if isinstance(module, SparseFFN)}
        self._always = without_gradients
        self._hooks = [module.gate.register_forward_hook(self._keeping(path)) for path, module in self.networks.items()]

    def _keeping(self, path: str) -> Callable[[nn.Module, tuple[Tensor, ...], Scores], None]:
        def keep(gate: nn.Module, inputs: tuple[Tensor, ...], scores: Scores) -> None:
            if self._always or torch.is_grad_enabled():
                self.scores[path] = scores

        return keep

    def take(self) -> dict[str, Scores]:
        """What was logged; the log is empty then."""
        found, self.scores = self.scores, {}
        return found

    def close(self) -> None:
        """Logs no more."""
        for hook in self._hooks:
            hook.remove()


@contextlib.contextmanager
def logged_scores(model: nn.Module) -> Iterator[ScoreLog]:
    """A block in which every forward of `model` is logged."""
    log = ScoreLog(model, without_gradients=True)
    try:
        yield log
    finally:
        log.close()
