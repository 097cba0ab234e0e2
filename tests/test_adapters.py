"""MoME's language experts: the equations, what is exact, and what adapters live beside."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from alula import attach, attach_learners
from alula.adapters import AdapterConfig, attach_adapters
from alula.adapters.site import ALL, FIRST, AdapterMixture, Call
from alula.errors import UserError
from alula.experts.adapter import Adapter
from alula.routers.instruction import READS, HardRouter
from alula.training.trainable import recompute_activations
from taught_adapters import SMALL, attached, chosen, logits, teach
from taught_learners import built, row, together
from zoo import BUILDERS, build, example_batch

__all__ = ["attached"]
FAMILIES = sorted(set(BUILDERS) - {"blip_2", "florence2"})  # whose decoders' layers (OPT, BART) hold their linears themselves

GPT = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
FALCON = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
WITHOUT_KEYWORDS = {
    "bloom": {"vocab_size": 64, "hidden_size": 16, "n_layer": 2, "n_head": 2},
    "codegen": GPT | {"rotary_dim": 4, "n_head": 4},
    "falcon": FALCON | {"new_decoder_architecture": True},
    "gpt_neo": {"vocab_size": 64, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]},
    "gptj": GPT | {"rotary_dim": 4},
    "mpt": {"vocab_size": 64, "d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 64},
    "openai-gpt": GPT,
}
"""Decoders whose layers hand no keywords to their attention; the networks of two of them add the residual themselves."""


def by_hand(x, instruction, site):
    """The definition in code of specification MoME, MoLE-I: K stacked adapters, hard top-1, p over its own constant."""
    down = torch.stack([adapter.down.weight.T for adapter in site.adapters])
    up = torch.stack([adapter.up.weight.T for adapter in site.adapters])
    scale = torch.cat([adapter.scale for adapter in site.adapters])
    p = site.router.mlp(instruction).softmax(-1)
    k = p.argmax(-1)
    pk = p.gather(1, k[:, None])[:, 0]
    y = torch.bmm(torch.relu(torch.bmm(x, down[k])), up[k])
    return (pk / pk.detach() * scale[k])[:, None, None] * y


def site_alone(reads="instance", *, experts=4, dim=6, width=5):
    adapters = [Adapter(dim, bottleneck=3) for _ in range(experts)]
    router = HardRouter(dim, num_experts=experts, instruction_dim=width, reads=reads, hidden_dim=7)
    for adapter in adapters:
        nn.init.normal_(adapter.up.weight)
        nn.init.uniform_(adapter.scale, 0.5, 2.0)
    return AdapterMixture(nn.Linear(dim, dim), adapters=adapters, router=router, path="mlp", index=0)


def ask(site, x, instruction=None, speaking=ALL):
    site.passed.call = Call(speaking=speaking, instruction=instruction, valid=torch.ones(x.shape[:2], dtype=torch.bool), recorder=None)
    return site(x)


def test_output_and_every_gradient_are_those_of_the_definition():
    site, x, instruction = site_alone(), torch.randn(8, 3, 6), torch.randn(8, 5)
    out, expected = ask(site, x, instruction), site.host(x) + by_hand(x, instruction, site)
    torch.testing.assert_close(out, expected)
    names, own = zip(*site.named_parameters(), strict=True)
    weights = torch.randn_like(out)
    found = torch.autograd.grad((out * weights).sum(), own, retain_graph=True, allow_unused=True)
    wanted = torch.autograd.grad((expected * weights).sum(), own, allow_unused=True)
    for name, one, other in zip(names, found, wanted, strict=True):
        torch.testing.assert_close(one, other, msg=name)
        assert one.any() or "adapters" in name, name  # the router learns; an adapter that nobody chose does not


@pytest.mark.parametrize("reads", ["token", "both"])
def test_tokens_choose_by_themselves_or_with_the_instruction(reads):
    site, x, instruction = site_alone(reads), torch.randn(2, 9, 6), torch.randn(2, 5)
    out, picked = ask(site, x, instruction) - site.host(x), set()
    for b in range(2):
        for t in range(9):
            seen = x[b, t] if reads == "token" else torch.cat([x[b, t], instruction[b]])
            k = int(site.router.mlp(seen).argmax())
            picked.add(k)
            torch.testing.assert_close(out[b, t], site.adapters[k](x[b, t]), rtol=1e-4, atol=1e-5)
    assert len(picked) > 1
    out.square().sum().backward()
    assert all(parameter.grad.any() for parameter in site.router.parameters())


@pytest.mark.parametrize("reads", READS)
def test_without_gradients_only_what_is_chosen_is_computed_and_the_bits_are_the_same(reads):
    site, x, instruction = site_alone(reads), torch.randn(1, 1, 6), torch.randn(1, 5)
    calls = []
    for number, adapter in enumerate(site.adapters):
        adapter.register_forward_hook(lambda *_, number=number: calls.append(number))
    with torch.enable_grad():
        out = ask(site, x, instruction)
    assert calls == [0, 1, 2, 3]
    with torch.no_grad():
        assert torch.equal(ask(site, x, instruction), out)
    assert len(calls) == 5


def test_noise_moves_choices_in_training_alone():
    router = HardRouter(6, num_experts=4, instruction_dim=5, gumbel=True)
    x, instruction = torch.randn(64, 2, 6), torch.randn(64, 5)
    plain = router.mlp(instruction).argmax(-1)
    assert len({tuple(router(x, instruction).index.tolist()) for _ in range(4)}) == 4
    assert torch.equal(router.eval()(x, instruction).index, plain)
    scores = router.mlp[2].bias.data.copy_(torch.tensor([2.0, 0.0, 1.0, -1.0])).softmax(-1)
    router.mlp[2].weight.data.zero_()
    many = router.train()(x[:1].expand(20_000, -1, -1), instruction[:1].expand(20_000, -1)).index
    # The argmax of scores with Gumbel noise is a draw from their softmax.
    torch.testing.assert_close(many.bincount(minlength=4) / 20_000, scores, rtol=0, atol=0.015)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_are_silent_at_birth_and_detach_is_exact(family, attached):
    model, processor = built(family)
    batch = example_batch(family, processor)
    base, before = logits(model, batch), dict(model.state_dict())
    adapters = attach_adapters(model, **SMALL)
    adapters.model.requires_grad_(False)  # on the CPU, torch chooses other kernels for weights that want gradients
    assert torch.equal(logits(model, batch), base)
    teach(adapters)
    spoken = logits(model, batch)
    with adapters.using("none"):
        silent = logits(model, batch)
    adapters.detach()
    assert not torch.equal(spoken, base)
    assert torch.equal(silent, base) and torch.equal(logits(model, batch), base)
    assert model.state_dict().keys() == before.keys()


def small(kind):
    config = AutoConfig.for_model(kind, **WITHOUT_KEYWORDS[kind], bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", WITHOUT_KEYWORDS)
def test_layers_that_hand_no_keywords_on_carry_adapters_too(kind):
    model, batch = small(kind).requires_grad_(False), {"input_ids": torch.randint(3, 64, (3, 7))}
    base = logits(model, batch)
    adapters = attach_adapters(model, **SMALL)
    model.requires_grad_(False)
    assert torch.equal(logits(model, batch), base)
    picked = chosen(model, teach(adapters), batch)
    by_definition = [site.router(torch.zeros(3, 7, 16), adapters.instructions(batch)).index for site in adapters.sites.values()]
    assert torch.equal(picked, torch.stack(by_definition)) and len(picked.unique()) > 1
    assert not torch.equal(logits(model, batch), base)
    with pytest.raises(UserError, match="not a part of it"):
        model.get_decoder()(**batch)
    assert torch.equal(logits(adapters.detach(), batch), base)


def test_where_no_keywords_are_handed_on_recomputing_is_refused_not_guessed():
    model = small("gptj")
    attach_adapters(model, **SMALL)
    recompute_activations(model)
    loss = model.train()(input_ids=torch.randint(3, 64, (2, 5)), labels=torch.randint(3, 64, (2, 5)), use_cache=False).loss
    with pytest.raises(UserError, match=r"activations are recomputed .* turn that off"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("router", READS)
def test_a_model_that_is_cast_takes_its_routers_along(dtype, router):
    model, _ = build("llava")
    adapters, batch = teach(attach_adapters(model, router=router, **SMALL)), together(row(4, seed=1), row(4, seed=2))
    exact = logits(model, batch)
    found = logits(model.to(dtype), batch)
    assert found.dtype == next(iter(adapters.parameters().values())).dtype == dtype
    torch.testing.assert_close(found.float(), exact, rtol=0, atol=0.05 * exact.abs().max().item())


def test_a_prompt_that_comes_in_pieces_is_refused_unless_it_was_read_before(attached):
    model, _, adapters = attached("llava")
    batch = together(row(7, seed=1), row(5, seed=2))
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    whole = model.generate(**batch, **options)
    for inputs in (batch, {"input_ids": batch["input_ids"][:1]}):
        with pytest.raises(UserError, match="comes in pieces"):
            model.generate(**inputs, **options, prefill_chunk_size=3)
    with adapters.on_prompts(batch):
        assert torch.equal(model.generate(**batch, **options, prefill_chunk_size=3), whole)
    assert torch.equal(model.generate(**batch, **options, prefill_chunk_size=9), whole)


@pytest.mark.parametrize("router", READS)
def test_stage_two_starts_exactly_where_stage_one_ended(router):
    (model, processor), (other, _) = build("llava"), build("llava")
    single = teach(attach_adapters(model, num_experts=1, **SMALL))
    grown = teach(attach_adapters(other, router=router, **SMALL), seed=2)
    grown.grow_from(single.tensors())
    for batch in (example_batch("llava", processor), example_batch("llava", processor, text_only=True, batch=5)):
        model.requires_grad_(False), other.requires_grad_(False)
        assert len(chosen(other, grown, batch).unique()) > 1, "the routers must choose differently"
        assert torch.equal(logits(other, batch), logits(model, batch))
    with pytest.raises(UserError, match="came with shape none"):
        grown.grow_from({name: tensor for name, tensor in single.tensors().items() if "layers.0" not in name})


def test_a_single_adapter_has_no_router_and_needs_no_instruction(attached):
    model, _, adapters = attached(num_experts=1)
    assert not any(".router." in name for name in adapters.parameters())
    embeds = torch.randn(1, 4, adapters.anatomy.hidden_size)
    assert logits(model, {"inputs_embeds": embeds}).isfinite().all()
    batch = together(row(4, seed=1), row(4, seed=2))
    with adapters.using(FIRST):
        first = logits(model, batch)
    assert torch.equal(logits(model, batch), first)


def test_recomputed_activations_give_the_same_gradients():
    model, _ = build("llava")
    batch = together(row(2, "I", 3), row(4, seed=3))
    adapters, found = teach(attach_adapters(model, **SMALL)), []
    for recompute in (False, True):
        if recompute:
            recompute_activations(model)
        model.train()(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        found.append({name: parameter.grad.clone() for name, parameter in adapters.parameters().items()})
        model.zero_grad()
    assert any(gradient.any() for name, gradient in found[0].items() if ".router." in name)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_adapters_learners_and_lora_experts_live_together():
    model, processor = build("llava")
    batch = example_batch("llava", processor)
    model.requires_grad_(False)
    base = logits(model, batch)
    learners = attach_learners(model, rank=2, router="mass")
    adapters = attach_adapters(model, **SMALL)
    mixtures = attach(model, linears=["gate_proj"])
    mixtures.grow("one", rank=2)
    model.requires_grad_(False)
    assert torch.equal(logits(model, batch), base)
    with pytest.raises(UserError, match="Detach what was attached last"):
        adapters.detach()
    mixtures.detach()
    learners.detach()
    spoken = logits(model, {**batch}), logits(teach(adapters).model, batch)
    assert torch.equal(spoken[0], base) and not torch.equal(spoken[1], base)
    assert torch.equal(logits(adapters.detach(), batch), base)


def test_a_copy_of_the_model_is_independent():
    model, processor = build("llava")
    adapters, batch = teach(attach_adapters(model, **SMALL)), example_batch("llava", processor)
    twin, before = copy.deepcopy(model), logits(model, batch)
    assert torch.equal(logits(twin, batch), before)
    with adapters.using("none"):
        assert torch.equal(logits(twin, batch), before)
    teach(adapters, seed=5)
    assert torch.equal(logits(twin, batch), before)


def test_what_was_saved_comes_back():
    model, processor = build("llava")
    adapters, batch = teach(attach_adapters(model, router="both", **SMALL)), example_batch("llava", processor)
    saved, before = {name: tensor.clone() for name, tensor in adapters.tensors().items()}, logits(model, batch)
    config = AdapterConfig.model_validate(adapters.config.model_dump(mode="json"))
    other = attach_adapters(build("llava")[0], config=config)
    other.load(saved)
    assert torch.equal(logits(other.model, batch), before)


@pytest.mark.parametrize(
    ("family", "options", "says"),
    [
        ("llava", {"router": "instnace"}, "Did you mean 'instance'"),
        ("llava", {"layers": (99,)}, "no decoder layer 99"),
        ("llava", {"instruction": "minilm"}, "Give the model's tokenizer"),
        ("blip_2", {}, "no feed-forward network as a module of its own"),
        ("florence2", {}, "no feed-forward network as a module of its own"),
    ],
)
def test_what_cannot_be_attached_is_refused(family, options, says):
    model, _ = built(family)
    with pytest.raises(UserError, match=says):
        attach_adapters(model, **options)


def test_a_second_attaching_and_calls_without_ids_are_refused(attached):
    model, _, adapters = attached()
    with pytest.raises(UserError, match="carries adapters already"):
        attach_adapters(model)
    with pytest.raises(UserError, match="no `input_ids`"):
        model(inputs_embeds=torch.randn(1, 4, adapters.anatomy.hidden_size))
    with pytest.raises(UserError, match="Did you mean 'first'"), adapters.using("frist"):
        pass
