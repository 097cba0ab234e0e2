"""Claims about the attention shift: it is what explicit attention matrices say, on any model, and it leaves no trace."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AttentionMaskInterface

from alula import Collator, Routing, UserError, attach
from alula.data.collate import IGNORED
from alula.evaluation import attention_shift
from alula.evaluation.attention_shift import SEGMENTS, attention_shares, diagnose, measured_layers, segments, shifts_of
from alula.learners import attach_learners
from alula.models.anatomy import anatomy
from attention_matrices import explicit, from_matrices, sample, samples
from zoo import BUILDERS, build, example_batch
from zoo.parts import NUM_LAYERS

CROSSING = ("mllama", "florence2")


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3"])
def test_shares_equal_explicit_attention_matrices(name):
    model, processor = build(name)
    batch = Collator(processor)(samples())
    found = attention_shares(model, batch)
    wanted = explicit(model, batch)
    assert found.shape == (4, NUM_LAYERS, 4)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.sum(-1), torch.ones(4, NUM_LAYERS))
    torch.testing.assert_close(wanted.sum(-1), torch.ones(4, NUM_LAYERS))
    assert torch.equal(found[2, :, 0], torch.ones(NUM_LAYERS))  # text only: all is before
    assert (found[3] > 0).all()


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_every_model_with_image_tokens_can_be_diagnosed(name):
    model, processor = build(name)
    batch = example_batch(name, processor)
    if name in CROSSING:
        with pytest.raises(UserError, match="through cross-attention"):
            attention_shares(model, batch)
        return
    found = attention_shares(model, batch)
    torch.testing.assert_close(found, explicit(model, batch), atol=1e-5, rtol=0)


def test_padding_counts_nothing():
    model, processor = build("llava")
    collator = Collator(processor)
    together = attention_shares(model, collator(samples()))
    for index, one in enumerate(samples()):
        torch.testing.assert_close(together[index], attention_shares(model, collator([one]))[0], atol=1e-5, rtol=0)
    batch = collator(samples()[:1])
    padded = {
        "input_ids": torch.nn.functional.pad(batch["input_ids"], (7, 5)),
        "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (7, 5)),
        "pixel_values": batch["pixel_values"],
        "labels": torch.nn.functional.pad(batch["labels"], (7, 5), value=IGNORED),
    }
    torch.testing.assert_close(attention_shares(model, padded), attention_shares(model, batch), atol=1e-5, rtol=0)


def test_every_token_is_in_one_segment_and_padding_in_none():
    image = torch.tensor([[0, 0, 1, 1, 0, 1, 0, 1], [0, 0, 0, 0, 0, 0, 0, 0]]).bool()
    valid = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0, 0, 0]]).bool()
    found = segments(image, valid)
    assert torch.equal(found.sum(-1), valid.long())
    names = [[SEGMENTS[int(row.int().argmax())] if row.any() else "" for row in rows] for rows in found]
    assert names[0] == ["", "before", "itself", "itself", "between", "itself", "after", ""]
    assert names[1] == ["before"] * 5 + [""] * 3


def shares_of(before, after):
    rest = [1 - one - other for one, other in zip(before, after, strict=True)]
    return np.array([[[one, other, 0, third] for one, other, third in zip(before, rest, after, strict=True)]])


def test_equal_curves_shift_by_0_and_opposite_ones_by_2():
    curve = [0.1, 0.3, 0.2, 0.25]
    assert shifts_of(shares_of(curve, curve))[0] == pytest.approx(0)
    assert shifts_of(shares_of(curve, [0.4 - share for share in curve]))[0] == pytest.approx(2)
    other = [0.2, 0.1, 0.3, 0.15]
    assert shifts_of(shares_of(curve, other))[0] == pytest.approx(1 - np.corrcoef(curve, other)[0, 1])


def test_a_constant_curve_has_no_shift():
    for before in ([0.0] * 4, [0.3] * 4, [0.3, 0.3 + 1e-8, 0.3, 0.3]):
        assert math.isnan(shifts_of(shares_of(before, [0.1, 0.3, 0.2, 0.25]))[0])


class Largest(TorchDispatchMode):
    """Every result that has tokens x tokens numbers for every head."""

    def __init__(self, heads, tokens):
        super().__init__()
        self.heads, self.tokens, self.found, self.count = heads, tokens, [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else (out,):
            self.count += 1
            if isinstance(one, torch.Tensor) and one.dim() == 4 and one.shape[1] == self.heads:
                self.found += [str(function)] * (tuple(one.shape[-2:]) == (self.tokens, self.tokens))
        return out


def test_no_matrix_of_tokens_by_tokens_is_made(monkeypatch):
    model, processor = build("llava")
    batch = Collator(processor)(samples())
    tokens, kept = batch["input_ids"].shape[1], attention_shift._keep
    shapes = []

    def watched(found, layer, valid, sums):
        shapes.append(sums.shape)
        kept(found, layer, valid, sums)

    monkeypatch.setattr(attention_shift, "_keep", watched)
    with Largest(4, tokens) as fused:
        attention_shares(model, batch)
    assert shapes == [(4, tokens, 4)] * NUM_LAYERS
    assert fused.count and not fused.found
    model.set_attn_implementation("eager")
    with Largest(4, tokens) as eager:
        attention_shares(model, batch)
    assert eager.found  # the eye sees


def state(model):
    return {
        path: (
            getattr(getattr(module, "config", None), "_attn_implementation", None),
            len(module._forward_pre_hooks),
            len(module._forward_hooks),
            module.training,
        )
        for path, module in model.named_modules()
    }


@pytest.mark.parametrize("name", ["llava", "gemma3", "blip_2"])
def test_the_diagnosis_leaves_no_trace(name):
    model, processor = build(name)
    batch = example_batch(name, processor)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        logits = model(**batch).logits
        before = state(model.train())  # Transformers places hooks of its own in the first forward
        attention_shares(model, batch)
        assert state(model) == before
        with pytest.raises((ValueError, RuntimeError)):
            attention_shares(model, {**batch, "input_ids": batch["input_ids"][:, :-3].clamp(max=1)})
        assert state(model) == before
        model.eval()
        assert torch.equal(model(**batch).logits, logits)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def recorded(found):
    """An attention that computes its weights openly and puts them into `found`."""

    def attend(module, query, key, value, attention_mask, *, scaling=None, **kwargs):
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        scores = query @ key.transpose(2, 3) * (module.head_dim**-0.5 if scaling is None else scaling)
        weights = (scores + attention_mask).softmax(-1)
        found.append(weights)
        return (weights @ value).transpose(1, 2), None

    return attend


def tuned(kind, *, attention=None):
    """A model with LoRA experts, learners or both, none of them silent; the same each time."""
    model, processor = build("qwen2_vl")
    if attention:
        model.model.language_model.set_attn_implementation(attention)
    generator = torch.Generator().manual_seed(1)
    handles = SimpleNamespace(model=model, processor=processor, mixtures=None, learners=None)
    if "lora" in kind:
        handles.mixtures = attach(model)
        handles.mixtures.grow("squares", rank=2)
        handles.mixtures.routing = Routing(fixed={"squares": 1.0})
    if "learners" in kind:
        handles.learners = attach_learners(model, rank=4, router="position", neither=True, positions=512)
    for name, parameter in model.named_parameters():
        if ".experts." in name or ".learners." in name or ".router." in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return handles


@pytest.mark.parametrize("kind", ["lora", "learners", "lora and learners"])
def test_a_tuned_model_is_measured_as_it_speaks(kind):
    matrices = []
    AttentionInterface.register("recorded", recorded(matrices))
    AttentionMaskInterface.register("recorded", AttentionMaskInterface()["eager"])
    ours, plain = tuned(kind), build("qwen2_vl")[0]
    batch = Collator(ours.processor)(samples())
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    spoken = []
    hook = ours.model.lm_head.register_forward_hook(lambda module, args, output: spoken.append(output))
    with torch.no_grad():
        logits = ours.model(**inputs).logits
        found = attention_shares(ours.model, batch)
        assert torch.equal(ours.model(**inputs).logits, logits)
        tuned(kind, attention="recorded").model(**inputs, use_cache=False)
    hook.remove()
    torch.testing.assert_close(found, from_matrices(ours.model, batch, matrices[-NUM_LAYERS:]), atol=1e-5, rtol=0)
    torch.testing.assert_close(spoken[1][:, -1], logits[:, -1], atol=1e-4, rtol=1e-4)  # routers got their own sums
    assert not torch.allclose(found, attention_shares(plain, batch), atol=1e-3)
    if ours.learners:
        with ours.learners.using():
            silent = attention_shares(ours.model, batch)
        if not ours.mixtures:
            torch.testing.assert_close(silent, attention_shares(plain, batch), atol=1e-5, rtol=0)


class Cut:
    """A collator whose rows end with the image in samples that say "cut"."""

    def __init__(self, processor, token):
        self.collator, self.processor, self.token = Collator(processor), processor, token

    def __call__(self, some):
        batch = self.collator(some)
        if "cut" not in some[0].question:
            return batch
        end = int((batch["input_ids"][0] == self.token).nonzero().max()) + 1
        return {name: value[:, :end] if value.dim() == 2 else value for name, value in batch.items()}


def test_samples_without_a_comparison_are_left_out_and_counted():
    model, processor = build("llava")
    collator = Cut(processor, anatomy(model).image_token_id)
    some = [*samples(), sample("cut after <image>", number=5)]
    seen = []
    found = diagnose(model, collator, some, batch_size=1, progress=lambda done, total: seen.append((done, total)))
    assert found.left_out == {"no image": 1, "no text after the image": 1, "constant curve": 0}
    assert [math.isfinite(shift) for shift in found.shifts] == [True, True, False, True, False]
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    one_by_one = [attention_shares(model, collator([one]))[0].numpy() for one in (some[0], some[1], some[3])]
    assert found.known == pytest.approx(shifts_of(np.stack(one_by_one)), abs=1e-4)
    assert found.shift == pytest.approx(np.mean(found.known))
    assert found.interval.low <= found.shift <= found.interval.high
    for place, name in enumerate(SEGMENTS):
        assert found.curves[name] == pytest.approx(np.mean(one_by_one, axis=0)[:, place], abs=1e-6)
    row = json.loads(json.dumps(found.row(row=0, arm="default"), allow_nan=False))
    assert row["n"] == 3 and row["shifts"][2] is None and row["layers"] == [0, 1, 2, 3]
    batched = diagnose(model, Collator(processor), some[:4], batch_size=4)
    assert batched.known == pytest.approx(found.known, abs=1e-3)


def test_data_without_images_is_refused():
    model, processor = build("llava")
    with pytest.raises(UserError, match="none with an image and text after it"):
        diagnose(model, Collator(processor), [samples()[2]])


def test_a_text_only_model_is_refused():
    model = build("llava")[0].model.language_model
    from transformers import LlamaConfig, LlamaForCausalLM

    text = LlamaForCausalLM(LlamaConfig(**{**model.config.to_dict(), "num_hidden_layers": 1}))
    with pytest.raises(UserError, match="no image token"):
        measured_layers(text, anatomy(text))
