"""All experts of a gated feed-forward network (Llama's form) in three grouped products, on a GPU. On a CPU a loop is faster."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from alula.experts.stacked import can_stack, in_one_piece

LINEARS = ("gate_proj", "up_proj", "down_proj")


def can_group(experts: nn.ModuleList, rows: Float[Tensor, "tokens dim"]) -> bool:
    """Whether `grouped_outputs` is right and fast for these experts: plain linears without biases, bf16, on a GPU."""
    return rows.is_cuda and is_gated(experts[0]) and can_stack(rows, _widths(experts), rows.shape[1], dtype=rows.dtype)


def is_gated(expert: nn.Module) -> bool:
    """Whether `expert` is ``down(act(gate(x)) * up(x))`` of plain linear layers without biases and nothing else."""
    linears = [getattr(expert, name, None) for name in LINEARS]
    is_plain = all(type(linear) is nn.Linear and linear.bias is None for linear in linears)
    return is_plain and hasattr(expert, "act_fn") and sum(1 for _ in expert.parameters()) == len(LINEARS)


def _widths(experts: nn.ModuleList) -> list[int]:
    return [len(expert.get_parameter("up_proj.weight")) for expert in experts]


def grouped_outputs(experts: nn.ModuleList, rows: Float[Tensor, "slots dim"], index: Int[Tensor, " slots"]) -> Float[Tensor, "slots dim"]:
    """Each row's expert's output.

    Args:
        rows: sorted by expert.
        index: the expert of each row.
    """
    gate, up, down = (_OnePiece.apply(*(expert.get_parameter(f"{name}.weight") for expert in experts)) for name in LINEARS)
    ends = torch.searchsorted(index, torch.arange(len(experts), device=index.device), right=True).to(torch.int32)
    act: Any = experts[0].act_fn
    hidden = act(functional.grouped_mm(rows, gate.transpose(1, 2), offs=ends)) * functional.grouped_mm(rows, up.transpose(1, 2), offs=ends)
    return functional.grouped_mm(hidden, down.transpose(1, 2), offs=ends)


class _OnePiece(torch.autograd.Function):
    """The experts' matrices as one tensor, without a copy."""

    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> Tensor:
        return in_one_piece(parameters)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return grad.unbind()
