"""Learners on every model that takes them: silent at birth, exact on detach, cached as uncached, trainable by anybody."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel

from alula.errors import UserError
from alula.learners import attach_learners
from alula.training.trainable import recompute_activations
from learners_by_hand import ByHand
from taught_learners import built, logits, row, taught, teach, together
from zoo import BUILDERS, NO_TEXT_ONLY, build, example_batch
from zoo.parts import TEXT

REFUSED = ("mllama", "florence2")
FAMILIES = sorted(set(BUILDERS) - set(REFUSED))
every_family = pytest.mark.parametrize("family", FAMILIES)


@every_family
def test_learners_are_silent_at_birth_and_detach_is_exact(family):
    model, processor = built(family)
    batch = example_batch(family, processor)
    base = logits(model, batch)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    learners = attach_learners(model, rank=4, positions=64)
    # wider values: on some processors the kernel may add in another order
    torch.testing.assert_close(logits(model, batch), base, rtol=0.0, atol=1e-6)
    with learners.using("image", "text", routed=False):
        assert torch.equal(logits(model, batch), base)
    teach(learners)
    assert (logits(model, batch) - base).abs().max() > 1e-2
    with learners.using():
        assert torch.equal(logits(model, batch), base)
    learners.detach()
    assert torch.equal(logits(model, batch), base)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert not any(type(module).__module__.startswith("alula") for module in model.modules())


@pytest.mark.parametrize("family", REFUSED)
def test_models_whose_images_are_no_tokens_of_the_decoder_are_refused(family):
    model, _ = built(family)
    before = [type(module) for module in model.modules()]
    with pytest.raises(UserError, match=r"Use `attach`|learners sit in decoder-only"):
        attach_learners(model)
    assert [type(module) for module in model.modules()] == before


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in NO_TEXT_ONLY])
def test_left_padding_changes_nothing_for_a_row(family):
    _, processor = built(family)
    batch = example_batch(family, processor, text_only=True)
    assert not batch["attention_mask"].all(), "the batch must hold a padded row"
    with taught(family) as (model, _):
        found = logits(model, batch)
        for index, mask in enumerate(batch["attention_mask"].bool()):
            alone = {key: value[index : index + 1, mask] for key, value in batch.items()}
            torch.testing.assert_close(found[index : index + 1, mask], logits(model, alone), rtol=1e-4, atol=1e-5)


def test_a_generate_that_goes_past_the_models_forward_is_refused():
    _, processor = built("blip_2")
    with taught("blip_2") as (model, _), pytest.raises(UserError, match="without its keyword"):
        model.generate(**example_batch("blip_2", processor), max_new_tokens=2, do_sample=False)


def fresh(family="llava", **options):
    model, processor = build(family)
    learners = teach(attach_learners(model, **{"rank": 4, "positions": 64, **options}))
    learners.train(*learners.config.modalities)
    return model.train(), learners, processor


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen3_vl"])
def test_recomputed_activations_give_the_same_loss_and_gradients(family):
    def two_losses(checkpointing):
        model, learners, processor = fresh(family)
        if checkpointing:
            recompute_activations(model)
        for path in learners.anatomy.connector:
            model.get_submodule(path).requires_grad_(True)
        batches = example_batch(family, processor), example_batch(family, processor, image_seed=1, batch=3)
        found = [model(**batch).logits.float().square().mean() for batch in batches]  # both forwards before one backward
        (found[0] + 2 * found[1]).backward()
        return torch.stack(found), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    (loss, plain), (same_loss, recomputed) = two_losses(False), two_losses(True)
    torch.testing.assert_close(same_loss, loss, rtol=1e-6, atol=1e-6)
    assert plain.keys() == recomputed.keys()
    kinds = (".learners.image.", ".learners.text.", ".router.")
    assert all(any(kind in name for name in plain) for kind in kinds) and any(".self_attn." not in name for name in plain)
    for name in plain:
        # a recomputed forward adds in another order: equal to fp32 rounding of the tensor's scale
        torch.testing.assert_close(recomputed[name], plain[name], rtol=1e-4, atol=1e-5 * float(plain[name].abs().max()) + 1e-8)


@pytest.mark.parametrize("strict_text", [False, True])
def test_bfloat16_trains_with_finite_gradients(strict_text):
    model, _ = build("llava")
    learners = teach(attach_learners(model.to(torch.bfloat16), rank=4, positions=64, strict_text=strict_text))
    learners.train("image", "text")
    model(**together(row(3, "I", 4, seed=1), row(6, seed=2), left=True)).logits.float().square().mean().backward()
    for name, parameter in learners.parameters().items():
        assert parameter.dtype == torch.float32 and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_what_is_saved_comes_back_exactly():
    batch = together(row(3, "I", 4, seed=1), row(6, seed=2))
    with taught(neither=True) as (model, learners):
        kept, expected = {name: tensor.clone() for name, tensor in learners.tensors().items()}, logits(model, batch)
    assert sum(tensor.numel() for name, tensor in kept.items() if ".image." in name) == 4 * 8 * 64 * 4
    model, _ = built("llava")
    learners = attach_learners(model, rank=4, positions=64, neither=True)
    try:
        learners.load(kept)
        assert torch.equal(logits(model, batch), expected)
        assert all(torch.equal(tensor, kept[name]) for name, tensor in learners.tensors().items())
    finally:
        learners.detach()
    for options, says in (
        ({"rank": 3}, r"came with shape \(4, \d+\), the model wants \(3,"),
        ({"router": "mass"}, "shape"),
        ({"router": "none"}, "the model wants none"),
        ({"layers": (0,)}, "the model wants none"),
    ):
        learners = attach_learners(model, **{"rank": 4, "positions": 64, "neither": True, **options})
        try:
            before = {name: tensor.clone() for name, tensor in learners.tensors().items()}
            with pytest.raises(UserError, match=says):
                learners.load(kept)
            assert all(torch.equal(tensor, before[name]) for name, tensor in learners.tensors().items()), "all or nothing"
        finally:
            learners.detach()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"modalities": ("imgae",)}, "Did you mean 'image'"),
        ({"router": "positon"}, "Did you mean 'position'"),
        ({"layers": (4,)}, "0 to 3"),
    ],
)
def test_unknown_options_are_refused_with_what_there_is(options, says):
    model, _ = built("llava")
    with pytest.raises(UserError, match=says):
        attach_learners(model, **options)
    assert not any(type(module).__module__.startswith("alula") for module in model.modules())


def test_learners_in_some_layers_only():
    _, processor = built("llava")
    batch = example_batch("llava", processor)
    with taught(layers=(1, -1)) as (model, learners):
        assert [path.split(".")[-2] for path in learners.sites] == ["1", "3"]
        same = ByHand(model, batch).logits()
        real = batch["attention_mask"].bool()
        torch.testing.assert_close(logits(model, batch)[real], same[real], rtol=1e-4, atol=1e-5)
        greedy = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": [4]}
        assert torch.equal(model.generate(**batch, **greedy), model.generate(**batch, **greedy, use_cache=False))


def test_a_refused_model_is_left_as_it_was(monkeypatch):
    monkeypatch.setattr(LlamaModel, "_can_set_attn_implementation", lambda self: False)
    model = LlamaForCausalLM(LlamaConfig(**TEXT)).eval()
    with pytest.raises(UserError, match="router='hidden'"):
        attach_learners(model, rank=2)
    attach_learners(model, rank=2, router="hidden").detach()
    assert not any(type(module).__module__.startswith("alula") for module in model.modules())


# The module whose input is the residual stream after attention.
AFTER_ATTENTION = {
    "llama": "post_attention_layernorm",
    "gemma2": "pre_feedforward_layernorm",  # the attention's output is normalised before it joins
    "olmo2": "mlp",  # so here, and nothing is normalised before
    "glm4": "post_attention_layernorm",  # so here, under another name
    "granite": "post_attention_layernorm",  # the attention's output is multiplied
}


@pytest.mark.parametrize("kind", AFTER_ATTENTION)
def test_learners_join_the_residual_stream_behind_attention_whatever_norms_there_are(kind):
    config = CONFIG_MAPPING[kind](**TEXT, head_dim=16) if kind != "granite" else CONFIG_MAPPING[kind](**TEXT, residual_multiplier=0.3)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().requires_grad_(False)
    layer, seen = model.model.layers[0], []
    layer.get_submodule(AFTER_ATTENTION[kind]).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    batch = together(row(5, seed=1), row(8, seed=2))
    logits(model, batch)
    learners = teach(attach_learners(model, rank=4, modalities=("text",), router="none"))
    asked = []
    layer.self_attn.learners["text"].register_forward_hook(lambda module, args, out: asked.append((args[0], out)))
    logits(model, batch)
    (hidden, said), real = asked[0], batch["attention_mask"].bool()
    torch.testing.assert_close(hidden[real], seen[0][real], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(seen[1][real], (seen[0] + said)[real], rtol=1e-5, atol=1e-6)
    assert said[real].abs().max() > 1e-3
    learners.detach()


def test_a_model_of_text_alone_takes_learners():
    model = LlamaForCausalLM(LlamaConfig(**TEXT)).eval().requires_grad_(False)
    teach(attach_learners(model, rank=4, positions=64))
    batch = together(row(5, seed=1), row(8, seed=2), left=True)
    greedy = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(**batch, **greedy), model.generate(**batch, **greedy, use_cache=False))
