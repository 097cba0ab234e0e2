"""Every fast form of the experts' sum against the loop on paper: values, gradients, memory, and the corners."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from alula.experts import Chosen, LoRAExperts
from alula.experts.choose import DENSE_RANKS, form_of
from alula.experts.decode import decode_update
from alula.experts.dense import dense_update
from alula.experts.grouped import TILE, grouped_update
from alula.experts.reference import reference
from alula.experts.stacked import can_stack, in_one_piece, stacked_update

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def draw(seed, *, dtype=torch.float32, equal_ranks=False):
    """A random case: sizes, experts, and who is chosen; some experts by nobody, some slots of nobody."""
    generator = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    batch, tokens, width, out, count = number(1, 3), number(1, 9), 4 * number(1, 5), 4 * number(1, 5), number(1, 7)
    ranks = [4] * count if equal_ranks else [number(1, 5) for _ in range(count)]
    down, up = [normal(r, width) / width**0.5 for r in ranks], [normal(out, r) / r**0.5 for r in ranks]
    scores = normal(batch, tokens, count).float()
    scores[..., number(0, count - 1)] = -9.0  # an expert that nobody wants
    weights, index = scores.topk(number(1, min(count, 3)), dim=-1)
    weights = weights.softmax(dim=-1)
    if seed % 3 == 0:
        index[0, 0, -1] = count
    chosen = Chosen(weights=weights, index=index, experts=count)
    scales = [0.5 + number(0, 3) for _ in ranks]
    return normal(batch, tokens, width), chosen, down, up, scales, normal(batch, tokens, out)


def leaves(x, chosen, down, up, onto):
    """The case with every tensor a leaf that wants a gradient."""
    x, onto, weights = (tensor.clone().requires_grad_() for tensor in (x, onto, chosen.weights))
    down, up = ([tensor.clone().requires_grad_() for tensor in part] for part in (down, up))
    return x, Chosen(weights=weights, index=chosen.index, experts=chosen.experts), down, up, onto


def on_paper(x, chosen, down, up, scales, onto):
    return onto + reference(x, chosen.dense(), down=down, up=up, scales=scales).to(onto.dtype)


def dense(x, chosen, down, up, scales, onto, in_place=False):
    options = {"onto": onto, "in_place": in_place, "dtype": down[0].dtype}
    return dense_update(x, chosen.dense(), down=down, up=up, scales=scales, **options)


def picked(x, chosen, down, up, scales, onto, in_place=False):
    """The dense form that keeps the chosen slots alone."""
    options = {"onto": onto, "in_place": in_place, "dtype": down[0].dtype}
    return dense_update(x, chosen.weights, chosen.index, down=down, up=up, scales=scales, **options)


def by_token(form):
    def run(x, chosen, down, up, scales, onto, in_place=False):
        rows, weights = x.flatten(0, 1), chosen.weights.flatten(0, 1)
        options = {"down": down, "up": up, "scales": scales, "onto": onto, "in_place": in_place, "dtype": down[0].dtype}
        return form(rows, weights, chosen.index.flatten(0, 1), **options)

    return run


def decoded(rows, weights, index, **options):
    return decode_update(rows, weights.tolist(), index.tolist(), **options)


grouped, stacked, decode = by_token(grouped_update), by_token(stacked_update), by_token(decoded)


def results(form, case, *, seed=0):
    """Value and gradients of everything; a parameter without a gradient counts as zero."""
    x, chosen, down, up, onto = leaves(*case[:4], case[5])
    out = form(x, chosen, down, up, case[4], onto)
    weigh = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out.dtype)
    out.backward(weigh)
    named = {"x": x, "weights": chosen.weights, "onto": onto}
    named |= {f"A{i}": a for i, a in enumerate(down)} | {f"B{i}": b for i, b in enumerate(up)}
    return {"out": out.detach()} | {name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in named.items()}


def assert_same(found, expected, **tolerance):
    for name in expected:
        assert found[name].dtype == expected[name].dtype, name
        torch.testing.assert_close(found[name], expected[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.mark.parametrize("form", [dense, grouped])
@pytest.mark.parametrize("seed", range(25))
def test_every_form_equals_the_loop_over_experts_with_all_gradients(form, seed):
    case = draw(seed)
    assert_same(results(form, case), results(on_paper, case), **CLOSE)


@pytest.mark.parametrize("form", [picked, stacked])
@pytest.mark.parametrize("seed", range(8))
def test_forms_for_equal_ranks_equal_the_loop_with_all_gradients(form, seed):
    case = draw(seed, equal_ranks=True)
    assert_same(results(form, case), results(on_paper, case), **CLOSE)


@pytest.mark.parametrize("seed", range(10))
def test_matrix_vector_products_equal_the_loop(seed):
    x, chosen, down, up, scales, onto = draw(seed)
    with torch.no_grad():
        found = decode(x, chosen, down, up, scales, onto)
        torch.testing.assert_close(found, on_paper(x, chosen, down, up, scales, onto), **CLOSE)
        overwritten = onto.clone()
        assert decode(x, chosen, down, up, scales, overwritten, in_place=True) is overwritten
        assert torch.equal(overwritten, found)


@pytest.mark.parametrize("form", [dense, picked, grouped])
def test_derivatives_hold_numerically_in_double_precision(form):
    x, chosen, down, up, scales, onto = draw(3, dtype=torch.float64, equal_ranks=form is picked)
    x, onto, chosen = x[:1, :2], onto[:1, :2], Chosen(weights=chosen.weights[:1, :2], index=chosen.index[:1, :2], experts=chosen.experts)
    chosen = Chosen(weights=chosen.weights.double(), index=chosen.index, experts=chosen.experts)
    x, chosen, down, up, onto = leaves(x, chosen, down, up, onto)

    def run(x, weights, onto, *pairs):
        half = len(pairs) // 2
        picked = Chosen(weights=weights, index=chosen.index, experts=chosen.experts)
        return form(x, picked, pairs[:half], pairs[half:], scales, onto)

    assert torch.autograd.gradcheck(run, (x, chosen.weights, onto, *down, *up))


@pytest.mark.parametrize("form", [dense, picked, grouped, stacked])
def test_bf16_is_right_to_its_own_rounding(form):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    weights, index = normal(2, 9, 5).topk(2, dim=-1)
    chosen = Chosen(weights=weights.softmax(dim=-1), index=index, experts=5)
    down, up = [normal(8, 16) / 4 for _ in range(5)], [normal(24, 8) / 3 for _ in range(5)]
    case = (normal(2, 9, 16), chosen, down, up, [2.0] * 5, normal(2, 9, 24))
    short = (case[0].bfloat16(), chosen, [a.bfloat16() for a in down], [b.bfloat16() for b in up], case[4], case[5].bfloat16())
    expected, found = results(on_paper, case), results(form, short)
    for name in ("out", "x", "weights", "A0", "B0"):
        assert (found[name].float() - expected[name]).norm() < 2e-2 * expected[name].norm(), name  # some roundings of 2^-9


@pytest.mark.parametrize("form", [dense, grouped])
def test_overwriting_gives_the_same_values_and_gradients(form):
    def run(*case):
        *most, onto = case
        return form(*most, onto * 1.0, in_place=True)

    case = draw(4)
    assert_same(results(run, case), results(form, case), rtol=0, atol=0)


@pytest.mark.parametrize("form", [dense, grouped])
def test_inputs_and_gradients_of_any_strides_are_taken(form):
    x, chosen, down, up, scales, onto = draw(5)
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    across = [b.T.contiguous().T for b in up]
    sideways = onto.transpose(1, 2).contiguous().transpose(1, 2)
    x2, chosen2, down2, up2, onto2 = leaves(turned, chosen, down, across, sideways)
    form(x2, chosen2, down2, up2, scales, onto2).sum().backward()  # the gradient of a sum has strides of zero
    x1, chosen1, down1, up1, onto1 = leaves(x, chosen, down, up, onto)
    on_paper(x1, chosen1, down1, up1, scales, onto1).sum().backward()
    torch.testing.assert_close(x2.grad, x1.grad, **CLOSE)
    torch.testing.assert_close(chosen2.weights.grad, chosen1.weights.grad, **CLOSE)


@pytest.mark.parametrize("form", [dense, grouped])
def test_no_tokens_are_no_error(form):
    _, chosen, down, up, scales, _ = draw(1)
    none = Chosen(weights=chosen.weights[:, :0], index=chosen.index[:, :0], experts=chosen.experts)
    case = (torch.zeros(len(chosen.weights), 0, down[0].shape[1]), none, down, up, scales, torch.zeros(len(chosen.weights), 0, len(up[0])))
    found = results(form, case)
    assert found["out"].shape == case[5].shape
    assert not found["A0"].any()


def test_more_tokens_than_a_tile_are_taken_piece_by_piece():
    tokens = 2 * TILE + 3
    generator = torch.Generator().manual_seed(0)
    x, onto = torch.randn(1, tokens, 4, generator=generator), torch.zeros(1, tokens, 4)
    chosen = Chosen(weights=torch.rand(1, tokens, 1, generator=generator), index=torch.ones(1, tokens, 1, dtype=torch.long), experts=3)
    down, up = ([torch.randn(2, 4, generator=generator) / 50 for _ in range(3)], [torch.randn(4, 2, generator=generator) for _ in range(3)])
    case = (x, chosen, down, up, [1.0] * 3, onto)
    assert_same(results(grouped, case), results(on_paper, case), **CLOSE)


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
        return form_of(**({"tokens": 512, "slots": 2, "ranks": [16] * 8, "decodes": False} | sizes))

    assert form() == form(slots=8) == "dense"
    assert form(ranks=[16] * 256) == form(ranks=[DENSE_RANKS] * 3) == form(ranks=[3, 1, 1]) == "grouped"
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
