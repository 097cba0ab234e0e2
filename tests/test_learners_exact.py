"""Learners in a whole model: equation 5 layer by layer, who sees whom, padding, packing, text left alone. On a tiny LLaVA (GQA)."""

import pytest
import torch

from alula.errors import UserError
from alula.learners import attach_learners
from learners_by_hand import ByHand
from taught_learners import built, logits, row, taught, teach, together
from zoo import build, example_batch

ROWS = (row(3, "I", 4, seed=1), row(6, seed=2), row(2, "I", 3, "I", 2, seed=3), row("I", 5, seed=4))
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
SIDES = pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
ROUTERS = ("position", "mass", "hidden", "none")


def same_where_real(found, expected, batch, **tolerance):
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], **(tolerance or CLOSE))


@SIDES
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"neither": True},
        {"positions": 5},
        {"modalities": ("image",)},
        {"modalities": ("text",)},
        {"modalities": ("image",), "neither": True},
    ],
    ids=str,
)
def test_logits_equal_equation_5_layer_by_layer(options, left):
    batch = together(*ROWS, left=left)
    base = logits(built("llava")[0], batch)
    same_where_real(base, ByHand(built("llava")[0], batch).logits(), batch)
    with taught(**options) as (model, _):
        found = logits(model, batch)
        same_where_real(found, ByHand(model, batch).logits(), batch)
    assert (found - base).abs().max() > 0.05, "the learners must say something"


@SIDES
def test_unrouted_learners_are_added_with_weight_one(left):
    batch = together(*ROWS, left=left)
    with taught() as (model, learners):
        with learners.using("image", routed=False):
            found = logits(model, batch)
        nobody = torch.zeros(*batch["input_ids"].shape, batch["input_ids"].shape[1]).bool()
        same_where_real(found, ByHand(model, batch, text_sees=nobody, routed=False).logits(), batch)
        with learners.using("text"):
            found = logits(model, batch)
        same_where_real(found, ByHand(model, batch, image_sees=nobody).logits(), batch)
    with taught(router="none") as (model, _):
        same_where_real(logits(model, batch), ByHand(model, batch, routed=False).logits(), batch)


@SIDES
def test_the_system_prompt_is_no_feature_with_text_start(left):
    batch = together(*ROWS, left=left)
    text = batch["attention_mask"].bool() & (batch["input_ids"] != 4)
    tokens = text.shape[1]
    sees = torch.ones(tokens, tokens).tril().bool() & (text & (text.cumsum(1) > 2))[:, None]
    with taught(text_start=2) as (model, _):
        same_where_real(logits(model, batch), ByHand(model, batch, text_sees=sees).logits(), batch)


def ended(image):
    """Which image tokens a token may see: those of images that are over. batch x tokens x tokens."""
    tokens = image.shape[1]
    sees = torch.zeros(len(image), tokens, tokens).bool()
    for index in range(len(image)):
        for key in torch.nonzero(image[index]).flatten().tolist():
            end = next(at for at in range(key, tokens) if at + 1 == tokens or not image[index, at + 1])
            sees[index, end:, key] = True
    return sees


@SIDES
@pytest.mark.parametrize("options", [{}, {"neither": True}], ids=str)
def test_causal_images_are_seen_from_their_last_token_on(options, left):
    batch = together(*ROWS, left=left)
    sees = ended((batch["input_ids"] == 4) & batch["attention_mask"].bool())
    with taught(causal_images=True, **options) as (model, _):
        same_where_real(logits(model, batch), ByHand(model, batch, image_sees=sees).logits(), batch)


@SIDES
def test_reference_adds_twice_and_masks_text_by_place_among_features(left):
    """As the official code: query i sees the text features 0 to i, though feature i stands behind image and system prompt."""
    batch, start = together(*ROWS, left=left), 1
    real = batch["attention_mask"].bool()
    text = real & (batch["input_ids"] != 4)
    key, query = text.cumsum(1) - 1 - start, real.cumsum(1) - 1
    sees = (key[:, None, :] <= query[:, :, None]) & (text & (key >= 0))[:, None, :]
    later = torch.ones(real.shape[1], real.shape[1]).triu(1).bool()
    assert (sees & later).any(), "it leaks"
    with taught(reference=True, text_start=start) as (model, _):
        expected = ByHand(model, batch, text_sees=sees, twice=True).logits()
        same_where_real(logits(model, batch), expected, batch)


@SIDES
@pytest.mark.parametrize("router", ROUTERS)
def test_a_later_text_token_changes_nothing_before_it(router, left):
    batch = together(row(3, "I", 4, "I", 3, seed=5), row(2, "I", 3, seed=6), row(9, seed=7), left=left)
    with taught(router=router, neither=router == "mass") as (model, _):
        before = logits(model, batch)
        for place in range(-3, 0) if left else range(4, 9):
            at = place % before.shape[1]
            other = batch["input_ids"].clone()
            is_text = (other[:, at] != 4) & batch["attention_mask"][:, at].bool()
            other[is_text, at] = (other[is_text, at] + 7) % 400 + 60
            found = logits(model, {**batch, "input_ids": other})
            torch.testing.assert_close(found[:, :at], before[:, :at], rtol=0.0, atol=1e-6)
            assert not torch.equal(found[:, at:], before[:, at:])


def test_an_image_reaches_the_tokens_before_it_as_published():
    """The visual learner has no mask, so the whole prompt sees each of its images; unless asked otherwise, and text never."""
    batch = together(row(3, "I", 4, "I", 3, seed=5))
    other = {**batch, "pixel_values": torch.cat([batch["pixel_values"][:1], batch["pixel_values"][1:] + 1.0])}
    for options, reaches in (({}, True), ({"causal_images": True}, False), ({"modalities": ("text",)}, False)):
        with taught(**options) as (model, _):
            moved = (logits(model, other) - logits(model, batch)).abs().amax(dim=-1)[0]
        assert moved[11:].max() > 1e-3
        assert bool(moved[:11].max() > 1e-3) if reaches else bool(moved[:11].max() < 1e-6)


@SIDES
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("options", [{}, {"text_start": 2}, {"strict_text": True}, {"reference": True}, {"causal_images": True}], ids=str)
def test_rows_of_a_mixed_batch_have_the_logits_they_have_alone(router, options, left):
    batch = together(*ROWS, left=left)
    with taught(router=router, **options) as (model, _):
        found = logits(model, batch)
        for index, one in enumerate(ROWS):
            alone = logits(model, together(one))[0]
            torch.testing.assert_close(found[index, batch["attention_mask"][index].bool()], alone, **CLOSE)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize(
    "options",
    [{}, {"text_start": 2}, {"strict_text": True}, {"reference": True, "text_start": 1}, {"causal_images": True, "strict_text": True}],
    ids=str,
)
def test_packed_documents_have_the_logits_they_have_alone(router, options):
    documents = (ROWS[1], ROWS[0], row(7, seed=8), row(2, "I", seed=13), ROWS[3])
    ids, pixels = torch.cat([ids for ids, _ in documents])[None], torch.cat([pixels for _, pixels in documents])
    at = torch.cat([torch.arange(len(ids)) for ids, _ in documents])[None]
    with taught(router=router, **options) as (model, _):
        packed = logits(model, {"input_ids": ids, "pixel_values": pixels, "position_ids": at})[0]
        alone = torch.cat([logits(model, together(document))[0] for document in documents])
    torch.testing.assert_close(packed, alone, **CLOSE)


def test_packed_documents_are_told_apart_by_the_text_positions_of_qwen():
    ids, at = torch.cat([ROWS[1][0], row(7, seed=8)[0]])[None], torch.cat([torch.arange(6), torch.arange(7)])
    with taught("qwen2_vl") as (model, _):
        packed = logits(model, {"input_ids": ids, "position_ids": at.expand(4, 1, -1)})[0]
        alone = torch.cat([logits(model, together(document))[0] for document in (ROWS[1], row(7, seed=8))])
    torch.testing.assert_close(packed, alone, **CLOSE)


def test_positions_that_skip_masked_tokens_start_no_document():
    """A conversation whose rows were padded in between, as `generate` counts positions."""
    first, second = row(3, "I", 2, seed=9), row(4, seed=10)
    gap = torch.tensor([0, 0])
    ids = torch.cat([first[0], gap, second[0]])[None]
    mask = torch.cat([torch.ones(9), gap, torch.ones(4)]).long()[None]
    at = (mask.cumsum(1) - 1).masked_fill(mask == 0, 0)
    with taught() as (model, _):
        found = logits(model, {"input_ids": ids, "attention_mask": mask, "position_ids": at, "pixel_values": first[1]})
        joined = (torch.cat([first[0], second[0]]), first[1])
        same_where_real(found[mask.bool()][None], logits(model, together(joined)), together(joined))


@pytest.mark.parametrize("router", ROUTERS)
def test_strict_text_leaves_rows_without_image_bit_for_bit(router):
    text, images = together(ROWS[1], row(9, seed=11), left=True), together(*ROWS, left=True)
    model, _ = built("llava")
    with_cache = model(**text).logits
    alone, mixed = logits(model, text), logits(model, images)
    with taught(router=router, strict_text=True) as (model, learners):
        assert torch.equal(logits(model, text), alone)
        assert torch.equal(model(**text).logits, with_cache)
        found = logits(model, images)
        assert torch.equal(found[1], mixed[1])
        assert all((found[index] - mixed[index]).abs().max() > 0.05 for index in (0, 2, 3))
        learners.train("image", "text")
        model(**images, use_cache=False).logits.square().mean().backward()
        routing = {name: p.grad for name, p in learners.parameters().items() if ".router." in name}
        assert all(grad is not None and grad.any() for grad in routing.values())
        assert all(p.grad.any() for name, p in learners.parameters().items() if ".learners." in name)
    with taught(router=router) as (model, _):
        assert not torch.equal(logits(model, text), alone), "without strict_text the textual learner speaks"


@SIDES
@pytest.mark.parametrize("router", ROUTERS)
def test_a_row_without_image_knows_nothing_of_the_visual_learner(router, left):
    """Alone or beside images: in its logits, and in the gradients that it gives."""
    batch = together(*ROWS, left=left)
    real = batch["attention_mask"][1].bool()
    with taught(router=router) as (model, learners):
        before = logits(model, batch)
        learners.train("image", "text")
        model(**batch, use_cache=False).logits[1, real].square().mean().backward()
        grads = {name: p.grad for name, p in learners.parameters().items()}
        assert all(grad is None or not grad.any() for name, grad in grads.items() if ".learners.image." in name)
        assert all(grad.any() for name, grad in grads.items() if ".learners.text." in name)
        with torch.no_grad():
            for name, parameter in learners.parameters().items():
                if ".learners.image." in name:
                    parameter.add_(1.0)
        after = logits(model, batch)
        assert torch.equal(after[1, real], before[1, real]) and not torch.allclose(after[0], before[0])


def test_learners_see_no_image_through_padding():
    """An image token that the mask hides is neither feature nor place."""
    full = together(row("I", 3, "I", 4, seed=12))
    full["attention_mask"][:, :4] = 0
    hidden = {**full, "pixel_values": torch.cat([full["pixel_values"][:1] + 5.0, full["pixel_values"][1:]])}
    with taught() as (model, _):
        assert torch.equal(logits(model, full)[:, 4:], logits(model, hidden)[:, 4:])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_sums_do_not_depend_on_the_hosts_attention_kernel(attention):
    model, processor = build("llava")
    model.set_attn_implementation(attention)
    batch = example_batch("llava", processor)
    teach(attach_learners(model, rank=4, positions=64))
    same_where_real(logits(model, batch), ByHand(model, batch).logits(), batch)


@pytest.mark.parametrize("positions", [64, 5])
@SIDES
def test_sums_carried_through_fused_attention_equal_those_of_eager_weights(left, positions):
    """Of layer 0, whose input the learners do not change; grouped-query attention, to 1e-6 of sums that are at most a few units."""
    batch = together(*ROWS, left=left)
    real = batch["attention_mask"].bool()
    eager, _ = build("llava")
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        weights = eager(**batch, use_cache=False, output_attentions=True).attentions[0]
    with taught(positions=positions) as (model, _):
        router, seen = model.model.language_model.layers[0].self_attn.router, []
        hook = router.register_forward_hook(lambda module, args, out: seen.append((args[1], out)))
        logits(model, batch)
        hook.remove()
        place = real.cumsum(1) - 1
        columns = router.gate.weight.T[place.clamp(0, positions - 1)] * (real & (place < positions))[..., None]
        (sums, shares), expected = seen[0], weights.sum(dim=1) @ columns
    torch.testing.assert_close(sums[real], expected[real], rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(shares[real].sum(dim=-1), torch.ones(int(real.sum())))


@pytest.mark.parametrize("family", ["llava", "gemma3"])
@pytest.mark.parametrize("router", ["position", "mass", "hidden"])
def test_attention_weights_that_are_asked_for_are_the_hosts(family, router):
    model, processor = build(family)
    model.requires_grad_(False).set_attn_implementation("eager")
    batch = example_batch(family, processor)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        base = model(**batch, use_cache=False, output_attentions=True)
        learners = teach(attach_learners(model, rank=4, positions=64, router=router))
        found = model(**batch, use_cache=False, output_attentions=True)
    torch.testing.assert_close(found.logits[real], logits(model, batch)[real], **CLOSE)
    assert torch.equal(found.attentions[0], base.attentions[0]), "the learners do not change what goes into layer 0"
    assert [weights.shape for weights in found.attentions] == [weights.shape for weights in base.attentions]
    assert not torch.allclose(found.attentions[1], base.attentions[1])
    greedy = {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": [learners.anatomy.image_token_id]}
    written = model.generate(**batch, **greedy, output_attentions=True, return_dict_in_generate=True)
    assert torch.equal(written.sequences, model.generate(**batch, **greedy))
    assert [step[0].shape[-1] for step in written.attentions] == [real.shape[1] + step for step in range(3)]


def test_attention_weights_that_are_never_in_memory_are_refused_when_asked_for():
    _, processor = built("llava")
    batch = example_batch("llava", processor)
    with taught() as (model, learners):
        with pytest.raises(UserError, match=r"set_attn_implementation\('eager'\)"):
            model(**batch, output_attentions=True)
        with learners.using():
            model(**batch, output_attentions=True)
