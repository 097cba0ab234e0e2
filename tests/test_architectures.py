"""Every family times every feature: the table of docs/architectures.md, one test per cell."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import peft
import pytest
import torch
from scripts.architecture_table import FAMILIES, FEATURES, REFUSED, render
from torch import Tensor, nn

from alula import Pool, Routing, attach, load_model
from alula.errors import UserError
from alula.learners import Learners, attach_learners
from alula.mixture import Mixtures, observe
from alula.training.trainable import recompute_activations
from taught_experts import logits, silence_dropout, speaking
from taught_learners import built, taught, teach
from zoo import BUILDERS, EVERY, NO_TEXT_ONLY, build, example_batch

PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"


@contextlib.contextmanager
def experts_on(model: nn.Module, *names: str) -> Iterator[Mixtures]:
    """Experts that say something, inside the block; the model is shared by many tests."""
    mixtures = speaking(model, *names)
    try:
        yield mixtures
    finally:
        mixtures.detach()


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_as_before(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert not any(type(module).__module__.startswith("alula") for module in model.modules())


def routed_lora(family: str, folder: Path) -> None:
    model, processor = built(family)
    batch, before = example_batch(family, processor), tensors_of(model)
    base = logits(model, batch)
    mixtures = attach(model)
    try:
        assert all(mixtures.anatomy.part_of(path) == "decoder" for path in mixtures.sites)
        assert torch.equal(logits(model, batch), base), "without experts"
        for name in ("one", "two"):
            mixtures.grow(name, rank=2)
        mixtures.routing = Routing(fixed={"one": 1.0, "two": 0.5})
        assert torch.equal(logits(model, batch), base), "silent at birth"
        mixtures.train_expert("one")
        with mixtures.using(Routing(fixed={"one": 1.0})):
            model(**batch).logits.square().mean().backward()
        reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert reached == {f"{path}.experts.{matrix}.0" for path in mixtures.sites for matrix in "AB"}
        assert all(mixture.experts.B[0].grad.any() for mixture in mixtures.sites.values())
        for mixture in mixtures.sites.values():
            nn.init.normal_(mixture.experts.B[0])
        assert not torch.equal(logits(model, batch), base), "experts that say something are heard"
    finally:
        mixtures.detach()
    assert torch.equal(logits(model, batch), base)
    assert_as_before(model, before)


def wings(family: str, folder: Path) -> None:
    model, processor = built(family)
    batch, before = example_batch(family, processor), tensors_of(model)
    text = None if family in NO_TEXT_ONLY else example_batch(family, processor, text_only=True)
    bases = [logits(model, inputs) for inputs in (batch, text) if inputs]
    learners = attach_learners(model, rank=4, positions=64, strict_text=True)
    try:
        teach(learners)
        learners.train("image", "text")
        found = model(**batch).logits
        assert (found - bases[0]).abs().max() > 1e-3
        found.square().mean().backward()
        own = {name: parameter.detach().clone() for name, parameter in learners.parameters().items()}
        torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2).step()
        moved = {name for name, parameter in learners.parameters().items() if not torch.equal(parameter, own[name])}
        kinds = (".learners.image.", ".learners.text.", ".router.")
        assert all(any(kind in name and path in name for name in moved) for kind in kinds for path in learners.sites)
        if text is not None:
            assert torch.equal(logits(model, text), bases[1])
    finally:
        learners.detach()
    assert torch.equal(logits(model, batch), bases[0])
    assert_as_before(model, before)


def cached_generate(family: str, folder: Path) -> None:
    model, processor = built(family)
    batch = example_batch(family, processor)
    with experts_on(model, "one", "two") as mixtures:
        observe(mixtures, "one", batch)
        observe(mixtures, "two", batch if family in NO_TEXT_ONLY else example_batch(family, processor, text_only=True))
        for routing in (Routing(router="gate", level="token", top_k=1), Routing(router="analytic", level="sample")):
            with mixtures.using(routing), mixtures.director.on_prompts(batch):
                cached, whole = (generate(model, batch, mixtures, use_cache=use_cache) for use_cache in (True, False))
            assert torch.equal(cached.sequences, whole.sequences), routing.router
            # one token at a time adds in another order
            torch.testing.assert_close(torch.stack(cached.logits), torch.stack(whole.logits), rtol=1e-4, atol=1e-4)


def generate(model: nn.Module, batch: dict[str, Tensor], handle: Mixtures | Learners, *, use_cache: bool):
    """Five greedy tokens and their logits; no image token, for which there would be no image."""
    return model.generate(
        **batch, max_new_tokens=5, do_sample=False, use_cache=use_cache, return_dict_in_generate=True, output_logits=True,
        suppress_tokens=[handle.anatomy.image_token_id],
    )  # fmt: skip


def activation_checkpointing(family: str, folder: Path) -> None:
    plain, recomputed = gradients(family, checkpointing=False), gradients(family, checkpointing=True)
    assert plain.keys() == recomputed.keys() and plain
    for name in plain:
        # a recomputed forward adds in another order: equal to fp32 rounding of the tensor's scale
        torch.testing.assert_close(recomputed[name], plain[name], rtol=1e-4, atol=1e-5 * float(plain[name].abs().max()) + 1e-8)


def gradients(family: str, *, checkpointing: bool) -> dict[str, Tensor]:
    model, processor = build(family)
    mixtures = speaking(model, "one", "two")
    mixtures.train_expert("one")
    mixtures.routing = Routing(fixed={"one": 1.0, "two": 0.5})
    silence_dropout(model)
    if checkpointing:
        recompute_activations(model)
    model(**example_batch(family, processor)).logits.square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def save_load(family: str, folder: Path) -> None:
    model, processor = built(family)
    batch = example_batch(family, processor)
    model.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    with pool_of(family, folder) as mixtures:
        mixtures.routing = Routing(router="gate", level="token", top_k=2)
        expected = logits(model, batch)
    fresh, its_processor = load_model(folder / "base", device="cpu")
    again = Pool.open(folder / "pool").attach(fresh)
    again.routing = Routing(router="gate", level="token", top_k=2)
    assert torch.equal(logits(fresh, example_batch(family, its_processor)), expected)


def peft_export(family: str, folder: Path) -> None:
    model, processor = built(family)
    batch = example_batch(family, processor)
    base = logits(model, batch)
    with pool_of(family, folder) as mixtures:
        mixtures.routing = Routing(fixed={"one": 1.0})
        expected = logits(model, batch)
    assert (expected - base).abs().max() > 1e-3
    theirs = peft.PeftModel.from_pretrained(model, Pool.open(folder / "pool").expert_folder("one")).eval()
    try:
        torch.testing.assert_close(logits(theirs, batch), expected, rtol=1e-5, atol=1e-5)
    finally:
        theirs.unload()


@contextlib.contextmanager
def pool_of(family: str, folder: Path) -> Iterator[Mixtures]:
    """Two experts on the shared model, saved in ``folder/pool``."""
    with experts_on(built(family)[0], "one", "two") as mixtures:
        pool = Pool.create(folder / "pool", mixtures, base="tiny")
        for name in mixtures.names:
            pool.add(mixtures, name, about={})
        yield mixtures


CHECKS: dict[str, Callable[[str, Path], None]] = dict(
    zip(FEATURES, (routed_lora, wings, cached_generate, activation_checkpointing, save_load, peft_export), strict=True)
)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_cell_of_the_table_is_what_it_says(family: str, feature: str, tmp_path: Path) -> None:
    if (family, feature) not in REFUSED:
        CHECKS[feature](family, tmp_path)
        return
    before = tensors_of(built(family)[0])
    with pytest.raises(UserError, match=REFUSED[family, feature].says):
        CHECKS[feature](family, tmp_path)
    assert_as_before(built(family)[0], before)


# The others are in tests/test_learners_cache.py.
@pytest.mark.parametrize("family", sorted(EVERY.keys() - BUILDERS.keys()))
def test_learners_generate_with_a_cache_what_they_do_without(family: str) -> None:
    _, processor = built(family)
    batch = example_batch(family, processor)
    with taught(family) as (model, learners):
        cached, whole = (generate(model, batch, learners, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached.sequences, whole.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(whole.logits), rtol=1e-4, atol=1e-4)


def test_learners_are_refused_in_a_layer_without_softmax_attention() -> None:
    with pytest.raises(UserError, match=r"no decoder layer 1 with softmax attention.*have it: 3\."):
        attach_learners(built("qwen3_5")[0], layers=(1,))


def test_a_fused_network_of_experts_is_named_when_its_linears_are_asked_for() -> None:
    model, _ = built("qwen3_vl_moe")
    with pytest.raises(UserError, match=r"called 'gate_proj'.*fused"):
        attach(model, linears=["gate_proj"])


def test_the_table_names_every_family_that_can_be_built() -> None:
    assert FAMILIES.keys() == EVERY.keys() and len(FAMILIES) >= 15
    assert {family for family, _ in REFUSED} <= FAMILIES.keys() and {feature for _, feature in REFUSED} <= FEATURES.keys()


def test_the_page_is_the_table() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), "Run `make docs`."
