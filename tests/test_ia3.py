"""(IA)^3: learnt scales are the equation, silent at birth and PEFT's; caches and detaching are exact."""

import pytest
import torch

from alula.errors import UserError
from alula.mixture import attach
from alula.mixture.scaling import Scaled, attach_scales
from methods_at_work import changed, learn, logits
from resume_worker import tiny_model
from zoo import BUILDERS, build, example_batch

NO_GENERATE = ("blip_2", "florence2")


def scaled_at_random(model, *, seed=2):
    scales = attach_scales(model)
    generator = torch.Generator().manual_seed(seed)
    for scaled in scales.sites.values():
        scaled.scale.data.uniform_(0.5, 1.5, generator=generator)
    return scales


@pytest.mark.parametrize("family", sorted(BUILDERS))
def test_scales_are_silent_at_birth_and_detach_is_exact(family):
    model, processor = build(family)
    model.requires_grad_(False)  # on the CPU, torch chooses other kernels for weights that want gradients
    batch = example_batch(family, processor)
    base, before = logits(model, batch), dict(model.state_dict())
    attach_scales(model)
    assert torch.equal(logits(model, batch), base)
    model, _ = build(family)
    model.requires_grad_(False)
    scales = scaled_at_random(model)
    assert not torch.equal(logits(model, batch), base)
    with scales.silent():
        assert torch.equal(logits(model, batch), base)
    scales.detach()
    assert torch.equal(logits(model, batch), base)
    assert model.state_dict().keys() == before.keys()


def test_scaled_linears_are_the_equation():
    """l * (W x + b) for keys and values, W2 (l * h) for the inner activation (arXiv 2205.05638, sec. 3.3)."""
    host, x = torch.nn.Linear(3, 5), torch.randn(2, 4, 3)
    out, inner = Scaled(host, scales_input=False), Scaled(host, scales_input=True)
    out.scale.data, inner.scale.data = torch.randn(5), torch.randn(3)
    torch.testing.assert_close(out(x), torch.einsum("o,bto->bto", out.scale, x @ host.weight.T + host.bias))
    torch.testing.assert_close(inner(x), torch.einsum("i,bti,oi->bto", inner.scale, x, host.weight) + host.bias)


def test_a_step_too_small_for_bf16_is_not_lost():
    scaled = Scaled(torch.nn.Linear(64, 64).bfloat16(), scales_input=False)
    scaled.scale.data.fill_(1.003)  # rounds to 1 in bf16
    x = torch.randn(8, 64).bfloat16()
    assert not torch.equal(scaled(x), scaled.host(x))
    assert scaled(x).dtype == torch.bfloat16


def test_ia3_gives_the_logits_of_peft():
    peft = pytest.importorskip("peft")
    model, processor = build("llava_onevision")  # its keys have a bias
    batch = example_batch("llava_onevision", processor)
    vectors = {path: scaled.scale for path, scaled in scaled_at_random(model).sites.items()}
    found = logits(model, batch)
    plain, _ = build("llava_onevision")
    config = peft.IA3Config(target_modules=list(vectors), feedforward_modules=[path for path in vectors if path.endswith("down_proj")])
    other = peft.get_peft_model(plain, config)
    for path, vector in vectors.items():
        learnt = other.get_submodule(f"base_model.model.{path}").ia3_l["default"]
        learnt.data = vector.detach().reshape(learnt.shape)
    torch.testing.assert_close(logits(other, batch), found)


@pytest.mark.parametrize("family", [name for name in sorted(BUILDERS) if name not in NO_GENERATE])
def test_cached_decoding_with_scales_equals_uncached(family):
    model, processor = build(family)
    scaled_at_random(model)
    batch = example_batch(family, processor)
    greedy = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [model.config.image_token_id]}
    assert torch.equal(model.generate(**batch, **greedy), model.generate(**batch, **greedy, use_cache=False))


def test_ia3_trains_its_vectors_alone_and_the_second_task_goes_on_with_them():
    model, method, costs = learn("ia3", "one", "two")
    sizes = 4 * (32 + 32 + 128)  # layers; keys, values, inner activations
    assert [cost.stored_parameters for cost in costs] == [cost.trainable_parameters for cost in costs] == [sizes, sizes]
    assert set(method.stored_tensors(model)) == {f"{path}.scale" for path in method.scales.sites}
    first = learn("ia3", "one")[1].scales.sites
    for path, scaled in method.scales.sites.items():
        assert 0 < (scaled.scale - first[path].scale).abs().max() < 0.1  # a few steps further, not anew
    method.scales.detach()
    assert not changed(model)


def test_a_model_whose_keys_are_fused_is_refused_by_ia3():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(UserError, match=r"gives keys by name; there are .*query_key_value.*use a LoRA method"):
        attach_scales(GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=32, **sizes)))


@pytest.mark.parametrize("first", [attach, attach_scales])
def test_scales_on_a_wrapped_model_are_refused(first):
    model = tiny_model()
    first(model)
    with pytest.raises(UserError, match="is wrapped already"):
        attach_scales(model)
