"""Pools of experts of any size: the form follows from sizes, what is kept for backward, frozen experts, compiled forms."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from alula.experts import Chosen, LoRAExperts, choose
from alula.experts.choose import DENSE_RANKS, form_of
from alula.experts.reference import reference
from alula.experts.stacked import can_stack, in_one_piece
from test_experts import CLOSE


def pool(count, *, rank=2, width=16, out=12, dtype=torch.float32):
    experts = LoRAExperts(in_features=width, out_features=out)
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        experts.grow(f"e{number}", rank=rank, alpha=2.0 * rank, dtype=dtype, generator=generator)
        experts.B[number].data.normal_(generator=generator)
    return experts


def choice(experts, batch, tokens, slots, *, seed=0):
    scores = torch.randn(batch, tokens, len(experts.names), generator=torch.Generator().manual_seed(seed))
    weights, index = scores.topk(slots, dim=-1)
    return Chosen(weights=weights.softmax(dim=-1), index=index, experts=len(experts.names))


def paper(experts, x, weights):
    return reference(x, weights, down=list(experts.A), up=list(experts.B), scales=experts.scales)


@pytest.mark.parametrize("count", [1, 8, 64, 256])
@pytest.mark.parametrize("tokens", [1, 2, 30])
def test_pools_of_any_size_give_the_loops_sum_with_and_without_gradients(count, tokens):
    experts = pool(count)
    x, chosen = torch.randn(2, tokens, 16), choice(experts, 2, tokens, min(2, count))
    expected = paper(experts, x, chosen.dense())
    everyone = tuple(range(count))
    torch.testing.assert_close(experts(x, chosen, active=everyone), expected, **CLOSE)
    with torch.no_grad():
        torch.testing.assert_close(experts(x, chosen, active=everyone), expected, **CLOSE)


def test_the_form_follows_from_sizes_alone():
    def form(**sizes):
        return form_of(**({"tokens": 512, "slots": 2, "ranks": [16] * 6, "decodes": False} | sizes))

    assert form() == form(slots=6) == "dense"
    assert form(ranks=[16] * 8) == form(ranks=[DENSE_RANKS] * 3) == form(ranks=[3, 1, 1]) == "grouped"
    assert form(tokens=1, decodes=True) == form(tokens=16, ranks=[16] * 256, decodes=True) == "decode"
    assert form(tokens=16, decodes=True) == "dense"


def test_samples_of_many_experts_in_one_batch_each_read_their_own():
    experts = pool(64, rank=8)
    weights = torch.zeros(3, 1, 64)
    weights[0, 0, 5], weights[1, 0, 60], weights[2, 0, [5, 7]] = 1.0, 0.5, torch.tensor([0.25, 0.75])
    x = torch.randn(3, 10, 16)
    torch.testing.assert_close(experts(x, weights, active=range(64)), paper(experts, x, weights), **CLOSE)


@pytest.mark.parametrize(("count", "slots"), [(4, 4), (64, 2)])
def test_a_frozen_expert_gets_no_gradient_and_costs_no_product_for_one(count, slots):
    experts = pool(count, rank=8, width=32, out=32)
    chosen = choice(experts, 1, 40, slots)
    x = torch.randn(1, 40, 32, requires_grad=True)

    def products(trained):
        experts.requires_grad_(False)
        for index in trained:
            experts.A[index].requires_grad_(True), experts.B[index].requires_grad_(True)
        with FlopCounterMode(display=False) as counter:
            experts(x, chosen, active=range(count)).sum().backward()
        return counter.get_total_flops()

    trained = int(chosen.index[0, 0, 0])
    nobody, one, everybody = products([]), products([trained]), products(range(count))
    share = 1 / count if slots == count else float((chosen.index == trained).sum()) / chosen.index.numel()
    assert one - nobody == pytest.approx((everybody - nobody) * share)
    experts.zero_grad()
    products([trained])
    assert [index for index, down in enumerate(experts.A) if down.grad is not None] == [trained]


def bytes_saved(run, *own):
    """Bytes kept for backward, each storage once, without those of `own`."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    return sum(size for place, size in kept.items() if place not in {t.untyped_storage().data_ptr() for t in own}), out


@pytest.mark.parametrize(("count", "rank", "slots"), [(8, 8, 8), (8, 16, 2), (64, 16, 2), (256, 16, 2)])
def test_kept_for_backward_is_at_most_a_tenth_more_than_one_lora_keeps(count, rank, slots):
    width = out = 256
    experts, x = pool(count, rank=rank, width=width, out=out), torch.randn(2, 64, width)
    chosen, onto = choice(experts, 2, 64, slots), torch.randn(2, 64, out)
    active_rank = rank * slots
    lora = [torch.randn(active_rank, width, requires_grad=True), torch.randn(out, active_rank, requires_grad=True)]
    plain, _ = bytes_saved(lambda: onto + torch.nn.functional.linear(torch.nn.functional.linear(x, lora[0]), lora[1]) * 2.0, *lora)
    chosen.weights.requires_grad_()
    ours, _ = bytes_saved(lambda: experts(x, chosen, active=range(count), onto=onto), *experts.parameters())
    assert ours <= 1.1 * plain
    x.requires_grad_()
    assert ours == bytes_saved(lambda: experts(x, chosen, active=range(count), onto=onto), *experts.parameters())[0]


@pytest.mark.parametrize(("count", "slots"), [(4, 4), (64, 2)])
def test_recomputed_activations_and_autocast_give_the_same_gradients(count, slots):
    experts = pool(count, rank=8)
    chosen = choice(experts, 2, 20, slots)

    def gradients(run, *, autocast=False):
        experts.zero_grad()
        x = torch.randn(2, 20, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = run(x)
        out.square().mean().backward()
        return out.detach(), x.grad, {i: p.grad.clone() for i, p in enumerate(experts.parameters()) if p.grad is not None}

    def plain(x):
        return experts(x, chosen, active=range(count))

    out, to_x, to_parameters = gradients(plain)
    _, again, again_parameters = gradients(lambda x: checkpoint(plain, x, use_reentrant=False))
    assert torch.equal(again, to_x) and all(torch.equal(again_parameters[i], grad) for i, grad in to_parameters.items())
    short, short_x, short_parameters = gradients(plain, autocast=True)
    assert short.dtype == torch.bfloat16 and short_x.dtype == torch.float32
    assert (short - out).norm() < 2e-2 * out.norm() and (short_x - to_x).norm() < 2e-2 * to_x.norm()
    assert all(grad.dtype == torch.float32 for grad in short_parameters.values())


def test_the_dense_form_compiles_without_a_break():
    experts = pool(3)
    x, weights = torch.randn(2, 6, 16, requires_grad=True), torch.rand(2, 6, 3)
    compiled = torch.compile(lambda x: experts(x, weights, active=(0, 1, 2)), backend="eager", fullgraph=True)
    expected = paper(experts, x, weights)
    torch.testing.assert_close(compiled(x), expected, **CLOSE)
    compiled(x).sum().backward()
    found, x.grad = x.grad, None
    expected.sum().backward()
    torch.testing.assert_close(found, x.grad, **CLOSE)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own look at where a graph ends
def test_many_experts_are_sorted_outside_of_a_compiled_graph(monkeypatch):
    experts, asked = pool(80), []
    x = torch.randn(3, 20, 16, requires_grad=True)
    weights, index = torch.randn(3, 20, 80).topk(2, dim=-1)
    chosen = Chosen(weights=weights.softmax(dim=-1), index=index, experts=80)
    real = choose.grouped_update
    monkeypatch.setattr(choose, "grouped_update", lambda *inputs, **options: asked.append(1) or real(*inputs, **options))

    def say(x):
        return experts(torch.tanh(x), chosen, active=tuple(range(80))) * 2

    found, expected = torch.compile(say, backend="eager")(x), say(x)
    torch.testing.assert_close(found, expected, **CLOSE)
    used = [x, *(matrix[expert] for matrix in (experts.A, experts.B) for expert in index.unique().tolist())]
    grads = [torch.autograd.grad(out.square().sum(), used) for out in (found, expected)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
    assert len(asked) == 2


def test_parameters_move_into_one_piece_once_and_stay_the_same_parameters():
    experts = pool(5)
    before = [tensor.clone() for tensor in experts.A]
    parameters = list(experts.A)
    stack = in_one_piece(parameters)
    assert torch.equal(stack, torch.stack(before)) and all(a is b for a, b in zip(parameters, experts.A, strict=True))
    assert in_one_piece(parameters).data_ptr() == stack.data_ptr()
    with torch.no_grad():
        experts.A[3].fill_(7.0)
    assert stack[3].eq(7.0).all()
    experts.A[2] = torch.nn.Parameter(torch.full_like(before[2], 3.0))
    assert in_one_piece(list(experts.A))[2].eq(3.0).all()


def test_grouped_products_are_asked_only_for_what_they_can_do():
    x = torch.zeros(4, 16)
    assert can_stack(x, [8, 8], 32, dtype=torch.bfloat16)
    for ranks, width, dtype in (
        ([8, 16], 32, torch.bfloat16),
        ([4, 4], 32, torch.bfloat16),
        ([8, 8], 12, torch.bfloat16),
        ([8, 8], 32, torch.float64),
    ):
        assert not can_stack(x, ranks, width, dtype=dtype)
