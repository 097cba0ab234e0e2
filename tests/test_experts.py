"""Every fast form of the experts' sum against the loop on paper: values, gradients, memory, and the corners."""

import pytest
import torch

from alula.experts import Chosen, LoRAExperts
from alula.experts.decode import decode_update
from alula.experts.dense import dense_update
from alula.experts.grouped import TILE, grouped_update
from alula.experts.reference import reference
from alula.experts.stacked import stacked_update

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


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("active", [(4,), (0, 3), (0, 1, 2, 3, 4, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_told_experts_say_what_the_loop_says(samples, active, dtype):
    generator = torch.Generator().manual_seed(samples)
    experts = LoRAExperts(in_features=8, out_features=12)
    for number in range(6):
        experts.grow(f"expert{number}", rank=1 + number % 3, alpha=2.0, dtype=torch.float32, generator=generator)
        experts.B[number].data.normal_(generator=generator)
    x, onto = (torch.randn(samples, 1, width, generator=generator).to(dtype) for width in (8, 12))
    weights = torch.rand(samples, 1, len(active), generator=generator)
    weights[-1, 0, 0] = 0  # a sample that one of them leaves alone
    down, up, scales = [experts.A[i] for i in active], [experts.B[i] for i in active], [experts.scales[i] for i in active]
    with torch.no_grad():
        expected = onto + reference(x.float(), weights, down=down, up=up, scales=scales).to(dtype)
        told = [list(zip(active, row, strict=True)) for row in weights[:, 0].tolist()]
        said = experts.say(x, told, onto=onto.clone(), in_place=True)
        torch.testing.assert_close(said, expected, **(CLOSE if dtype == torch.float32 else {}))
        before = onto.clone()
        assert torch.equal(experts.say(x, told, onto=onto, in_place=False), said)
        assert torch.equal(onto, before)


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
