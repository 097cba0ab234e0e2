"""The seam: routing by the equation, caches, beams, removal, merging. Every architecture is in tests/test_architectures.py."""

import pytest
import torch

from alula.context import Context, Routing
from alula.errors import UserError
from alula.mixture import attach, observe
from taught_experts import logits, taught
from zoo import build, example_batch


@pytest.mark.parametrize("arm", ["fixed", "gate", "arrow", "analytic"])
@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "mllama"])
def test_cached_decoding_equals_uncached(family, arm):
    model, processor, mixtures = taught(family)
    batch = example_batch(family, processor)
    observe(mixtures, "one", batch)
    observe(mixtures, "two", example_batch(family, processor, text_only=True))
    mixtures.routing = {
        "fixed": Routing(fixed={"one": 1.0}),
        "gate": Routing(router="gate", level="token", top_k=1),
        "arrow": Routing(router="arrow", level="token", top_k=2),
        "analytic": Routing(router="analytic", level="sample"),
    }[arm]
    greedy = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": [mixtures.anatomy.image_token_id]}
    cached = model.generate(**batch, **greedy)
    with mixtures.director.deciding(mixtures.director.decide(batch)):
        uncached = model.generate(**batch, **greedy, use_cache=False)
    assert torch.equal(cached, uncached)


def test_removing_an_expert_restores_outputs_bit_for_bit():
    model, processor, mixtures = taught("llava")
    batch = example_batch("llava", processor)
    mixtures.routing = Routing(router="gate", level="token", top_k=2)
    before = logits(model, batch)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    mixtures.grow("three", rank=4)
    for mixture in mixtures.sites.values():
        torch.nn.init.normal_(mixture.routers["gate"].gates[2])
        torch.nn.init.normal_(mixture.experts.B[2])
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in tensors.items())
    assert not torch.equal(logits(model, batch), before)
    mixtures.remove("three")
    assert torch.equal(logits(model, batch), before)


def test_left_padding_changes_nothing_for_a_row():
    model, processor, mixtures = taught("llava")
    mixtures.routing = Routing(router="gate", level="token", top_k=1)
    batch = example_batch("llava", processor)
    assert not batch["attention_mask"].all(), "the batch must hold a padded row"
    together = logits(model, batch)
    for row, mask in enumerate(batch["attention_mask"].bool()):
        single = {key: value[row : row + 1] for key, value in batch.items()}
        alone = logits(model, {**single, "input_ids": single["input_ids"][:, mask], "attention_mask": single["attention_mask"][:, mask]})
        # padded positions shift nothing but the order of sums
        torch.testing.assert_close(together[row : row + 1, mask], alone, rtol=1e-4, atol=1e-5)


def test_two_interleaved_generations_do_not_disturb_each_other():
    model, processor, mixtures = taught("llava")
    one, two = example_batch("llava", processor), example_batch("llava", processor, text_only=True)
    observe(mixtures, "one", one)
    observe(mixtures, "two", two)
    mixtures.routing = Routing(router="analytic", level="sample")

    def steps(batch):
        out = model(**batch, use_cache=True)
        while True:
            token = out.logits[:, -1:].argmax(dim=-1)
            mask = torch.ones(len(token), out.past_key_values.get_seq_length() + 1, dtype=torch.long)
            mask[:, : batch["attention_mask"].shape[1]] = batch["attention_mask"]
            yield token
            out = model(input_ids=token, attention_mask=mask, past_key_values=out.past_key_values, use_cache=True)

    def take(*batches):
        with torch.no_grad():
            runs = [steps(batch) for batch in batches]
            found = [[] for _ in runs]
            for _ in range(4):
                for index, run in enumerate(runs):
                    found[index].append(next(run))
            return [torch.cat(tokens, dim=1) for tokens in found]

    assert all(torch.equal(mixed, alone) for mixed, alone in zip(take(one, two), [*take(one), *take(two)], strict=True))


def test_beam_search_keeps_each_samples_route():
    model, processor, mixtures = taught("llava")
    batch = example_batch("llava", processor)
    observe(mixtures, "one", batch)
    observe(mixtures, "two", example_batch("llava", processor, text_only=True))
    mixtures.routing = Routing(router="analytic", level="sample")
    routed = model.generate(**batch, max_new_tokens=4, num_beams=2, do_sample=False)
    with mixtures.using(Routing(fixed={"one": 1.0})):
        fixed = model.generate(**batch, max_new_tokens=4, num_beams=2, do_sample=False)
    assert torch.equal(routed, fixed)


def test_prompt_of_no_task_is_bit_identical_to_the_base_model():
    model, processor, mixtures = taught("llava")
    images, text = example_batch("llava", processor), example_batch("llava", processor, text_only=True)
    for name in mixtures.names:
        observe(mixtures, name, images)
    observe(mixtures, "base", text)
    base = logits(model, text)
    mixtures.routing = Routing(router="analytic", level="sample")
    assert torch.equal(logits(model, text), base)


def test_merge_gives_the_experts_logits_without_alula():
    model, processor, mixtures = taught("llava")
    batch = example_batch("llava", processor)
    mixtures.routing = Routing(fixed={"one": 1.0, "two": 0.5})
    mixed = logits(model, batch)
    mixtures.merge({"one": 1.0, "two": 0.5})
    torch.testing.assert_close(logits(model, batch), mixed, rtol=1e-4, atol=1e-4)
    assert not any(type(module).__module__.startswith("alula") for module in model.modules())


def test_routing_equals_the_equation_token_by_token():
    """y = W u + sum over top-k of softmax(LN(u).LN(v)/sqrt(n)) * s B A u (arXiv 2402.05859)."""
    _, _, mixtures = taught("llava", experts=("a", "b", "c"))
    mixture = next(iter(mixtures.sites.values()))
    u = torch.randn(2, 5, mixture.host.in_features)
    experts, gates = mixture.experts, mixture.routers["gate"].gates
    expected = torch.empty(2, 5, mixture.host.out_features)
    for row in range(2):
        for token in range(5):
            x = u[row, token]
            norm = torch.nn.functional.layer_norm
            scores = torch.stack([norm(x, x.shape) @ norm(v, v.shape) / len(x) ** 0.5 for v in gates])
            best, chosen = scores.topk(2)
            y = mixture.host(x)
            for weight, e in zip(best.softmax(0), chosen.tolist(), strict=True):
                y = y + weight * experts.scales[e] * experts.B[e] @ (experts.A[e] @ x)
            expected[row, token] = y
    routing = Routing(router="gate", level="token", top_k=2)
    mixture.cell.context = Context(
        shape=(2, 5), routing=routing, image_mask=None, valid=torch.ones(2, 5, dtype=torch.bool), active=(0, 1, 2)
    )
    torch.testing.assert_close(mixture(u), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_experts", [2, 24])  # two forms of the computation
def test_gradients_are_those_of_the_formula_also_below_a_bias(num_experts):
    """A linear layer with a bias gives a view, and an expert may add to it in place."""
    names = [f"e{index}" for index in range(num_experts)]
    _, _, mixtures = taught("qwen2_vl", experts=names)
    mixtures.train_expert("e0")
    mixture = next(mixture for path, mixture in mixtures.sites.items() if path.endswith("q_proj"))
    assert mixture.bias is not None
    routing = Routing(router="gate", level="token", top_k=2)
    everyone = tuple(range(num_experts))
    mixture.cell.context = Context(
        shape=(2, 5), routing=routing, image_mask=None, valid=torch.ones(2, 5, dtype=torch.bool), active=everyone
    )
    before = torch.randn(2, 5, mixture.host.in_features, requires_grad=True)
    wanted = [before, mixture.experts.A[0], mixture.experts.B[0]]

    def by_hand(u):
        weights = mixture.routers["gate"](u, mixture.cell.context)
        said = [s * u @ a.T @ b.T for s, a, b in zip(mixture.experts.scales, mixture.experts.A, mixture.experts.B, strict=True)]
        return mixture.host(u) + sum(weights[..., e : e + 1] * part for e, part in enumerate(said))

    found, expected = (torch.autograd.grad(form(2 * before).square().sum(), wanted) for form in (mixture, by_hand))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


def test_one_expert_routed_equals_plain_lora():
    model, processor, mixtures = taught("llava", experts=("one",))
    batch = example_batch("llava", processor)
    mixtures.routing = Routing(fixed={"one": 1.0})
    plain = logits(model, batch)
    for routing in (Routing(router="gate", level="token", top_k=2), Routing(router="arrow", level="token")):
        with mixtures.using(routing):
            torch.testing.assert_close(logits(model, batch), plain, rtol=1e-5, atol=1e-6)


def test_arrow_prototype_is_the_top_right_singular_vector():
    from alula.routers.arrow import principal_direction

    down, up = torch.randn(3, 8), torch.randn(6, 3)
    expected = torch.linalg.svd(up @ down).Vh[0]
    found = principal_direction(down, up)
    torch.testing.assert_close((found @ expected).abs(), torch.tensor(1.0), rtol=1e-4, atol=1e-5)


def test_gate_stage_trains_gates_alone():
    model, processor, mixtures = taught("llava")
    mixtures.train_gate("one")
    mixtures.routing = Routing(gate_of="one")
    model(**example_batch("llava", processor)).logits.sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained and all(name.endswith("routers.gate.gates.0") for name in trained)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m: attach(m, linears=["qproj"]), "q_proj"),
        (lambda m: attach(m, part="tower"), "decoder"),
    ],
)
def test_attach_names_what_there_is_when_nothing_matches(call, says):
    model, _ = build("llava")
    with pytest.raises(UserError, match=says):
        call(model)


def test_unknown_names_in_a_routing_are_refused():
    _, _, mixtures = taught("llava")
    for routing, says in (
        (Routing(fixed={"oen": 1.0}), "Did you mean 'one'"),
        (Routing(router="analitic"), "Did you mean 'analytic'"),
        (Routing(router="gate", level="token", null="zero"), "zero_expert"),
        (Routing(router="gate", level="sample"), "per token"),
    ):
        with pytest.raises(UserError, match=says), mixtures.using(routing):
            pass
