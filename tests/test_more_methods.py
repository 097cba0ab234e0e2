"""Merged LoRA, (IA)^3, MoELoRA and merging: each is its equation, and leaves alone what it promises to."""

import pytest
import torch

from alula import Collator, Stream, Trainer, TrainSettings
from alula.cli.app import app
from alula.context import Context, Routing
from alula.data.stream import Task
from alula.errors import UserError
from alula.methods import METHODS
from alula.methods.merging import drop_and_rescale, ties, trim
from alula.mixture import Mixture, attach
from alula.mixture.scaling import Scaled, attach_scales
from resume_worker import pictures, tiny_model
from zoo import BUILDERS, build, example_batch

SETTINGS = TrainSettings(steps=2, batch_size=4, learning_rate=1e-2)
NO_GENERATE = ("blip_2", "florence2")


def tasks(*names):
    return tuple(Task(name=name, train=pictures(name, 6), test=[]) for name in names)


def learn(name, *names, **options):
    """A model that learnt tasks of these names, its method, and the cost of each task."""
    model, processor = build("llava")
    method = METHODS[name](model, settings=SETTINGS, **options)
    trainer = Trainer(model, method, Collator(processor), settings=SETTINGS, folder=None)
    return model, method, [learnt.cost for learnt in trainer.learn(Stream(tasks=tasks(*names)))]


def begun(name, **options):
    """A method in the first step of its first task, and something to say."""
    model, processor = build("llava")
    method = METHODS[name](model, settings=SETTINGS, **options)
    task = tasks("one")[0]
    method.begin_task(model, task)
    method.begin_stage(model, task, method.stages(task)[0])
    return model, method, task, example_batch("llava", processor)


@torch.no_grad()
def logits(model, batch):
    return model(**batch).logits


def changed(model, name="llava"):
    before = build(name)[0].state_dict()
    return {key for key, value in model.state_dict().items() if key not in before or not torch.equal(before[key], value)}


@torch.no_grad()
def teach(mixtures, *, seed=1):
    """Gives every expert something to say."""
    generator = torch.Generator().manual_seed(seed)
    for mixture in mixtures.sites.values():
        for up in mixture.experts.B:
            up.normal_(std=0.3, generator=generator)


# --- lora -----------------------------------------------------------------------------------------------------------------


def test_the_scale_of_merged_lora_is_alpha_over_the_root_of_the_rank():
    _, method, *_ = begun("lora", rank=16)
    assert {scale for mixture in method.mixtures.sites.values() for scale in mixture.experts.scales} == {8 / 16**0.5}


def test_without_a_rank_it_is_half_the_hidden_size():
    _, method, *_ = begun("lora", rank=None)
    assert method.rank == 32
    assert all(len(mixture.experts.A[0]) == 32 for mixture in method.mixtures.sites.values())


def test_merging_the_update_leaves_outputs_unchanged():
    model, method, task, batch = begun("lora", rank=4)
    base = logits(model, batch)
    teach(method.mixtures)
    before = logits(model, batch)
    assert not torch.allclose(before, base, atol=1e-2)
    method.end_task(model, task)
    torch.testing.assert_close(logits(model, batch), before, rtol=1e-4, atol=1e-4)  # W x + B A x against (W + B A) x, in fp32
    assert not any(isinstance(module, Mixture) for module in model.modules())


def test_merged_lora_changes_the_linears_of_the_decoder_and_nothing_else():
    model, method, costs = learn("lora", "one", "two", rank=2)
    assert changed(model) == {f"{path}.weight" for path in method.paths} == set(method.stored_tensors(model))
    assert len(method.paths) == 4 * 7  # layers, linears
    assert costs[0].stored_parameters == costs[1].stored_parameters == sum(model.get_parameter(f"{p}.weight").numel() for p in method.paths)


def test_each_task_gets_a_fresh_update_over_the_merged_weights():
    model, method, _ = learn("lora", "one", rank=2)
    merged = {path: model.get_parameter(f"{path}.weight").clone() for path in method.paths}
    method.begin_task(model, tasks("two")[0])
    assert method.mixtures.names == ["update"]
    for path, mixture in method.mixtures.sites.items():
        assert torch.equal(mixture.weight, merged[path])
        assert not mixture.experts.B[0].any()


def test_the_connector_trains_beside_the_update_if_asked():
    model, method, _ = learn("lora", "one", rank=2, connector=True, connector_learning_rate=1e-3)
    linears = {f"{path}.weight" for path in method.paths}
    assert linears < changed(model) == set(method.stored_tensors(model))
    assert all("multi_modal_projector" in name for name in changed(model) - linears)


@pytest.mark.parametrize("name", ["lora", "ia3", "moe_lora", "merging"])
def test_a_run_cut_between_two_tasks_goes_on_with_the_model_it_had(tmp_path, name):
    def trainer():
        model, processor = build("llava")
        return Trainer(model, METHODS[name](model, settings=SETTINGS), Collator(processor), settings=SETTINGS, folder=tmp_path)

    cut, resumed = trainer(), trainer()
    next(cut.learn(Stream(tasks=tasks("one", "two"))))
    again = next(resumed.learn(Stream(tasks=tasks("one", "two"))))
    assert again.is_resumed
    before, after = cut.model.state_dict(), resumed.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_merged_lora_refuses_to_be_the_base_model():
    model, method, *_ = begun("lora", rank=2)
    with pytest.raises(UserError, match="trains the model's own weights"):
        method.base_model(model)


# --- ia3 ------------------------------------------------------------------------------------------------------------------


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


# --- moe_lora -------------------------------------------------------------------------------------------------------------


def test_moe_lora_equals_a_loop_over_its_experts():
    """y = W u + alpha / R * sum over all e of softmax(G u)_e B_e A_e u (arXiv 2403.08350)."""
    _, method, *_ = begun("moe_lora", rank=6, alpha=9.0, num_experts=3)
    teach(method.mixtures)
    mixture = next(iter(method.mixtures.sites.values()))
    u = torch.randn(2, 5, mixture.host.in_features)
    weights = torch.softmax(u @ torch.stack(list(mixture.routers["dense"].gates)).T, dim=-1)
    expected = mixture.host(u)
    for index, (down, up) in enumerate(zip(mixture.experts.A, mixture.experts.B, strict=True)):
        assert down.shape[0] == 2
        expected = expected + 9.0 / 6 * weights[..., index : index + 1] * (u @ down.T @ up.T)
    valid = torch.ones(2, 5, dtype=torch.bool)
    mixture.cell.context = Context(shape=(2, 5), routing=method.mixtures.routing, image_mask=None, valid=valid, active=(0, 1, 2))
    torch.testing.assert_close(mixture(u), expected)


def test_the_dense_router_with_a_smaller_k_takes_the_best_experts():
    _, method, *_ = begun("moe_lora", rank=6, num_experts=3)
    router = next(iter(method.mixtures.sites.values())).routers["dense"]
    context = Context(
        shape=(1, 4), routing=Routing(router="dense", level="token", top_k=2), image_mask=None, valid=torch.ones(1, 4), active=(0, 1, 2)
    )
    weights = router(torch.randn(1, 4, router.dim), context)
    assert (weights > 0).sum(-1).eq(2).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 4))


def test_moe_lora_is_silent_at_birth_and_its_gates_are_those_of_a_linear_layer():
    base, processor = build("llava")
    batch = example_batch("llava", processor)
    base.requires_grad_(False)
    expected = logits(base, batch)
    model, _ = build("llava")
    method = METHODS["moe_lora"](model, settings=SETTINGS)
    assert torch.equal(logits(model, batch), expected)
    for mixture in method.mixtures.sites.values():
        gates = torch.stack(list(mixture.routers["dense"].gates))
        assert len(gates) == 8
        assert 0.5 < gates.abs().max() * mixture.host.in_features**0.5 <= 1
    again = METHODS["moe_lora"](build("llava")[0], settings=SETTINGS)
    assert all(torch.equal(value, again.mixtures.model.state_dict()[name]) for name, value in model.state_dict().items())


def test_every_task_trains_every_expert_and_router_of_moe_lora_and_leaves_the_base_alone():
    model, method, costs = learn("moe_lora", "one", "two", rank=4, num_experts=2)
    assert costs[0].stored_parameters == costs[1].stored_parameters == costs[0].trainable_parameters
    first = learn("moe_lora", "one", rank=4, num_experts=2)[0].state_dict()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, first[name])}
    assert moved == method.trained == set(method.stored_tensors(model))
    assert {".experts.", ".routers."} == {kind for kind in (".experts.", ".routers.") if any(kind in name for name in moved)}
    batch = example_batch("llava", build("llava")[1])
    untouched = build("llava")[0].requires_grad_(False)
    with method.base_model(model):
        method.mixtures.freeze()
        assert torch.equal(logits(model, batch), logits(untouched, batch))
    method.mixtures.detach()
    assert not changed(model)


# --- merging --------------------------------------------------------------------------------------------------------------


def test_ties_on_a_matrix_by_hand():
    one = torch.tensor([[4.0, -1.0], [2.0, 0.5]])  # trimmed: 4, 2
    two = torch.tensor([[-1.0, 3.0], [-5.0, 0.2]])  # 3, -5
    three = torch.tensor([[2.0, 1.0], [0.1, -6.0]])  # 2, -6
    assert torch.equal(trim(one, density=0.5), torch.tensor([[4.0, 0.0], [2.0, 0.0]]))
    # sums 6, 3, -3, -6; of the two that speak at the third place, the one with the elected sign stays alone
    assert torch.equal(ties(torch.stack([one, two, three]), density=0.5), torch.tensor([[3.0, 3.0], [-5.0, -6.0]]))


def test_ties_of_opposites_is_zero():
    delta = torch.randn(3, 4)
    assert not ties(torch.stack([delta, -delta]), density=1.0).any()


def test_ties_of_whole_updates_that_agree_is_their_mean():
    deltas = torch.rand(3, 4, 5) + 0.1
    torch.testing.assert_close(ties(deltas, density=1.0), deltas.mean(dim=0))


def test_ties_is_that_of_peft():
    merge_utils = pytest.importorskip("peft.utils.merge_utils")
    deltas = torch.randn(3, 10, 10)
    torch.testing.assert_close(ties(deltas, density=0.3), merge_utils.ties(list(deltas), torch.ones(3), 0.3))


def test_dare_is_right_on_average_and_drops_what_it_says():
    delta = torch.randn(4, 5)
    drawn = torch.stack([drop_and_rescale(delta, drop_ratio=0.9, generator=torch.Generator().manual_seed(seed)) for seed in range(4000)])
    error = (drawn.mean(dim=0) - delta).abs()
    assert (error < 5 * delta.abs() * (0.9 / 0.1 / 4000) ** 0.5).all()  # five standard errors
    assert drawn.eq(0).float().mean() == pytest.approx(0.9, abs=0.01)
    kept = drawn[0] != 0
    torch.testing.assert_close(drawn[0][kept], delta[kept] / 0.1)


@pytest.fixture(scope="module")
def merged():
    """Three specialists by the method `merging`, with something to say."""
    model, method, _ = learn("merging", "one", "two", "three", rank=2, density=0.5, drop_ratio=0.5)
    teach(method.specialist.mixtures)
    return model, method, example_batch("llava", build("llava")[1])


def test_merging_trains_the_experts_of_specialist():
    merging = learn("merging", "one", "two", rank=2)[1]
    specialist = learn("specialist", "one", "two", rank=2)[1]
    for path, mixture in specialist.mixtures.sites.items():
        own = merging.sites[path].experts
        assert own.names == ["one", "two"]
        assert all(torch.equal(left, right) for left, right in zip([*mixture.experts.A, *mixture.experts.B], [*own.A, *own.B], strict=True))
    assert merging.mixtures is None


@pytest.mark.parametrize("way", ["linear", "ties", "dare"])
def test_an_arm_leaves_no_trace(merged, way):
    model, method, batch = merged
    before = {name: value.clone() for name, value in model.state_dict().items()}
    arm = next(arm for arm in method.arms() if arm.name == way)
    base = build("llava")[0].requires_grad_(False)
    with arm.enter(tasks("one")[0]):
        inside = logits(model, batch)
    with pytest.raises(KeyError), arm.enter(tasks("one")[0]):
        raise KeyError
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert not torch.allclose(inside, logits(base, batch), atol=1e-2)
    with method.base_model(model):
        assert torch.equal(logits(model, batch), logits(base, batch))


def test_the_linear_arm_is_the_mean_of_the_experts(merged):
    model, method, batch = merged
    with method.using("linear"):
        found = logits(model, batch)
    names = method.specialist.mixtures.names
    with method.specialist.mixtures.using(Routing(fixed=dict.fromkeys(names, 1 / 3))):
        torch.testing.assert_close(found, logits(model, batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", ["ties", "dare"])
def test_an_arm_is_its_equation_in_every_linear(merged, way):
    _, method, _ = merged
    plain = {path: mixture.weight.clone() for path, mixture in method.sites.items()}
    expected = {}
    for path, mixture in method.sites.items():
        deltas = [mixture.experts.delta(name) for name in mixture.experts.names]
        if way == "ties":
            expected[path] = ties(torch.stack(deltas), density=0.5)
        else:
            generators = [method._generator(name, path) for name in mixture.experts.names]
            pairs = zip(deltas, generators, strict=True)
            expected[path] = sum(drop_and_rescale(delta, drop_ratio=0.5, generator=generator) for delta, generator in pairs) / 3
    with method.using(way):
        for path, mixture in method.sites.items():
            torch.testing.assert_close(mixture.weight, plain[path] + expected[path])


def test_a_merged_model_is_made_anew_after_each_task(monkeypatch):
    model, method, task, batch = begun("merging", rank=2, arms=("linear",))
    teach(method.specialist.mixtures)
    method.end_task(model, task)
    made = []
    monkeypatch.setattr(method, "_weight", lambda path, way, make=method._weight: made.append(path) or make(path, way))
    for _ in range(2):
        with method.using("linear"):
            one = logits(model, batch)
    assert len(made) == len(method.sites)  # once for all tasks that are scored
    method.begin_task(model, tasks("two")[0])
    with method.using("linear"):
        assert not torch.equal(logits(model, batch), one)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("lora", {"rank": 0}, "rank: 0 came; 1 or more"),
        ("lora", {"linears": ["qproj"]}, "q_proj"),
        ("lora", {"connector_learning_rate": 1e-3}, "connector: false"),
        ("moe_lora", {"rank": 8, "num_experts": 3}, "multiple of the number of experts"),
        ("moe_lora", {"num_experts": 0}, "1 or more"),
        ("merging", {"arms": ("linaer",)}, "Did you mean 'linear'"),
        ("merging", {"density": 0.0}, "density is above 0"),
        ("merging", {"drop_ratio": 1.0}, "below 1"),
    ],
)
def test_options_out_of_range_are_refused(name, options, says):
    with pytest.raises(UserError, match=says):
        METHODS[name](build("llava")[0], settings=SETTINGS, **options)


def test_alula_list_shows_the_new_methods():
    from typer.testing import CliRunner

    said = CliRunner().invoke(app, ["list"]).stdout
    assert all(name in METHODS and f" {name} " in said for name in ("lora", "ia3", "moe_lora", "merging"))
