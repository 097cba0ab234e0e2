"""MoME's language experts: the equations, what is exact, whose instruction a token follows, and how adapters leave."""

import copy

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from alula import attach, attach_learners
from alula.adapters import AdapterConfig, attach_adapters
from alula.adapters.site import ALL, FIRST, AdapterMixture, Call
from alula.data.collate import IGNORED
from alula.errors import UserError
from alula.experts.adapter import Adapter
from alula.routers.instruction import READS, HardRouter
from alula.training.trainable import recompute_activations
from taught_learners import built, row, together
from zoo import BUILDERS, build, example_batch

FAMILIES = sorted(set(BUILDERS) - {"blip_2", "florence2"})  # whose decoders' layers (OPT, BART) hold their linears themselves
SMALL = {"bottleneck": 4, "hidden_dim": 8}


@torch.no_grad()
def teach(adapters, *, seed=1):
    """Adapters that say different things, and routers that choose differently."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapters.parameters().items():
        if name.endswith((".up.weight", ".down.weight")):
            parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
        elif ".router." in name:
            parameter.normal_(std=1.0, generator=generator)
        else:
            parameter.uniform_(0.5, 1.5, generator=generator)
    return adapters


@pytest.fixture
def attached():
    """Adapters on models that tests share; they leave at the end."""
    handles = []

    def make(family="llava", *, taught=True, **options):
        model, processor = built(family)
        handles.append(attach_adapters(model, **{**SMALL, **options}))
        return model, processor, teach(handles[-1]) if taught else handles[-1]

    yield make
    for handle in handles:
        handle.detach()


@torch.no_grad()
def logits(model, batch, **options):
    return model(**batch, **options).logits


def chosen(model, adapters, batch):
    """What each site's router chose."""
    found = {}
    with torch.no_grad(), adapters.recording(lambda path, choice, valid: found.update({path: choice.index})):
        model(**batch)
    return torch.stack(list(found.values()))


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


@pytest.mark.parametrize("router", READS)
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_a_batch_of_different_instructions_equals_its_rows_one_by_one(attached, router, family):
    model, processor, adapters = attached(family, router=router)
    if family == "llava":
        rows = [row(3, "I", 4, seed=seed) for seed in range(3)] + [row(2, seed=7)]
        batch, alone = together(*rows, left=True), [together(one) for one in rows]
    else:
        batch = example_batch(family, processor, text_only=True, batch=3)
        alone = [{"input_ids": ids[mask.bool()][None]} for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    whole = logits(model, batch)
    picked = chosen(model, adapters, batch)
    assert (picked != picked[:, :1]).any()
    for found, single in zip(whole, alone, strict=True):
        tokens = single["input_ids"].shape[1]
        torch.testing.assert_close(found[-tokens:], logits(model, single)[0], rtol=1e-4, atol=1e-4)


BEAMS = {"num_beams": 3, "num_return_sequences": 2}


@pytest.mark.parametrize(("family", "how"), [*((family, BEAMS) for family in FAMILIES), ("llava", {}), ("gemma3", {})], ids=str)
def test_a_generation_keeps_the_instruction_of_its_prompt(attached, family, how):
    model, processor, adapters = attached(family)
    batch = example_batch(family, processor)
    options = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": [adapters.anatomy.image_token_id], **how}
    found = model.generate(**batch, **options)
    with adapters.on_prompts(batch):
        assert torch.equal(model.generate(**batch, **options, use_cache=False), found)


@torch.no_grad()
def steps(model, ids, *, count=4):
    """The logits of a greedy generation, one at a time."""
    cache = DynamicCache(config=model.config)
    for _ in range(count):
        last = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1]
        yield last
        ids = last.argmax(-1, keepdim=True)


def test_two_interleaved_generations_do_not_disturb_each_other(attached):
    model, _, adapters = attached()
    one, two = (row(5, seed=seed)[0][None] for seed in (1, 2))
    assert (chosen(model, adapters, {"input_ids": one}) != chosen(model, adapters, {"input_ids": two})).any()
    apart = [list(steps(model, ids)) for ids in (one, two)]
    mixed = list(zip(steps(model, one), steps(model, two), strict=True))
    for number, pair in enumerate(mixed):
        assert torch.equal(pair[0], apart[0][number]) and torch.equal(pair[1], apart[1][number])


def test_a_cache_of_another_model_has_no_instruction(attached):
    model, _, adapters = attached()
    cache = DynamicCache(config=model.config)
    with adapters.using("none"):
        logits(model, {"input_ids": row(5)[0][None]}, past_key_values=cache)
    with pytest.raises(UserError, match="filled without the adapters"):
        logits(model, {"input_ids": row(1)[0][None]}, past_key_values=cache)
    assert logits(model, {"input_ids": row(1)[0][None]}).isfinite().all()  # what failed left nothing behind


def test_an_answer_is_no_part_of_the_instruction(attached):
    _, _, adapters = attached()
    question, answer = row(2, "I", 3)[0], row(4, seed=5)[0]
    ids = torch.cat([question, answer])[None]
    labels = torch.cat([torch.full_like(question, IGNORED), answer])[None]
    assert torch.equal(adapters.instructions({"input_ids": ids, "labels": labels}), adapters.instructions({"input_ids": question[None]}))
    # nor are images and padding
    padded = torch.cat([torch.zeros(3, dtype=torch.long), question[question != adapters.anatomy.image_token_id]])[None]
    mask = torch.tensor([[0] * 3 + [1] * 5])
    expected = adapters.instructions({"input_ids": question[None]})
    torch.testing.assert_close(adapters.instructions({"input_ids": padded, "attention_mask": mask}), expected)


def test_labels_given_to_forward_leave_the_route_to_the_prompt(attached):
    model, _, adapters = attached()
    question, answer = row(5, seed=1)[0], row(9, seed=2)[0]
    ids = torch.cat([question, answer])[None]
    labels = torch.cat([torch.full_like(question, IGNORED), answer])[None]
    assert torch.equal(
        chosen(model, adapters, {"input_ids": ids, "labels": labels}), chosen(model, adapters, {"input_ids": question[None]})
    )


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


def test_a_sentence_encoder_reads_the_prompt(monkeypatch):
    model, processor = build("llava")
    said = []

    class Encoder:
        def __init__(self, name):
            assert name == "minilm"

        def __call__(self, texts):
            said.extend(texts)
            return torch.tensor([[float(len(text)), 1.0] for text in texts]).numpy()

    monkeypatch.setattr("alula.adapters.instruction.InstructionEncoder", Encoder)
    adapters = teach(attach_adapters(model, instruction="minilm", tokenizer=processor.tokenizer, **SMALL))
    assert adapters.embed.width == 2
    logits(model, example_batch("llava", processor))
    assert "what colour" in said[1] and "how many red circles" in said[2] and "<image>" not in "".join(said)


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
