"""Learners in generation: what is cached is what a recomputation would give, whoever beams, crops or comes back for another turn."""

import pytest
import torch
from transformers import DynamicCache

from alula.errors import UserError
from learners_by_hand import ByHand
from taught_learners import built, logits, row, taught, together
from zoo import BUILDERS, example_batch

# BLIP-2's generate goes past its forward; the other two are refused.
FAMILIES = sorted(set(BUILDERS) - {"blip_2", "mllama", "florence2"})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", [{}, {"num_beams": 2}, {"num_beams": 3, "num_return_sequences": 2}], ids=str)
def test_cached_generation_equals_full_recomputation(family, how):
    _, processor = built(family)
    batch = example_batch(family, processor)
    assert batch["attention_mask"][:, 0].min() == 0, "the batch must hold a row padded on the left"
    with taught(family) as (model, learners):
        options = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": [learners.anatomy.image_token_id], **how}
        assert torch.equal(model.generate(**batch, **options), model.generate(**batch, **options, use_cache=False))


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3"])
@pytest.mark.parametrize(
    "options", [{"router": "mass", "neither": True}, {"router": "none"}, {"strict_text": True, "router": "hidden"}], ids=str
)
def test_cached_generation_equals_recomputation_for_every_router(family, options):
    _, processor = built(family)
    batch = example_batch(family, processor)
    with taught(family, **options) as (model, learners):
        greedy = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": [learners.anatomy.image_token_id]}
        assert torch.equal(model.generate(**batch, **greedy), model.generate(**batch, **greedy, use_cache=False))


@pytest.mark.parametrize("family", ["llava", "llava_next", "gemma3"])
def test_guessed_tokens_that_are_taken_back_leave_no_trace(family):
    """Prompt lookup guesses tokens and crops the cache where it guessed wrong."""
    _, processor = built(family)
    batch = example_batch(family, processor, batch=1)
    with taught(family) as (model, learners):
        greedy = {"max_new_tokens": 12, "do_sample": False, "suppress_tokens": [learners.anatomy.image_token_id]}
        plain = model.generate(**batch, **greedy)
        assert torch.equal(model.generate(**batch, **greedy, prompt_lookup_num_tokens=3), plain)


def test_a_static_cache_generates_what_a_dynamic_one_does():
    _, processor = built("llava")
    batch = example_batch("llava", processor)
    with taught("llava") as (model, _):
        greedy = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": [4]}
        static = model.generate(**batch, **greedy, cache_implementation="static", disable_compile=True)
        assert torch.equal(static, model.generate(**batch, **greedy))


@torch.no_grad()
def turns(model, *parts, cache=None):
    """The logits of a conversation whose turns come one after another to one cache."""
    cache, found = cache or DynamicCache(config=model.config), []
    for ids, pixels in parts:
        images = {"pixel_values": pixels} if len(pixels) else {}
        found.append(model(input_ids=ids[None], past_key_values=cache, use_cache=True, **images).logits)
    return torch.cat(found, dim=1), cache


@pytest.mark.parametrize("options", [{}, {"strict_text": True}, {"causal_images": True}, {"text_start": 2}], ids=str)
@pytest.mark.parametrize("first", [(3, "I", 4), (6,)], ids=["image", "text"])
def test_a_cut_cache_goes_on_as_if_nothing_had_been_there(options, first):
    start, wrong, right = row(*first, seed=1), row(2, seed=2), row(3, seed=3)
    with taught(**options) as (model, _):
        _, cache = turns(model, start, wrong)
        cache.crop(-2)
        found, _ = turns(model, right, cache=cache)
        whole = logits(model, together((torch.cat([start[0], right[0]]), start[1])))
    torch.testing.assert_close(found, whole[:, -3:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"causal_images": True}], ids=str)
def test_an_image_that_was_cut_off_is_forgotten(options):
    start, wrong, right = row(2, "I", 3, seed=1), row("I", 2, seed=2), row("I", 3, seed=3)
    with taught(**options) as (model, _):
        _, cache = turns(model, start, wrong)
        cache.crop(-6)
        found, _ = turns(model, right, cache=cache)
        _, cache = turns(model, start)
        expected, _ = turns(model, right, cache=cache)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_later_turn_of_text_equals_recomputation():
    parts = row(2, "I", 3, seed=1), row(4, seed=2), row(1, seed=3), row(3, seed=4)
    with taught() as (model, _):
        found, _ = turns(model, *parts)
        whole = logits(model, together((torch.cat([ids for ids, _ in parts]), parts[0][1])))
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("router", ["position", "mass", "none"])
@pytest.mark.parametrize("first", [(2, "I", 3), (5,)], ids=["image", "text"])
def test_with_causal_images_a_turn_that_brings_an_image_equals_recomputation(first, router):
    parts = row(*first, seed=1), row(4, seed=2), row(1, "I", 3, seed=3), row(2, seed=4), row("I", 1, seed=5)
    with taught(causal_images=True, router=router) as (model, _):
        found, _ = turns(model, *parts)
        whole = logits(model, together((torch.cat([ids for ids, _ in parts]), torch.cat([pixels for _, pixels in parts]))))
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("first", [(2, "I", 3), (5,)], ids=["image", "text"])
def test_each_turn_sees_the_images_of_its_own_and_earlier_turns(first):
    """Recomputed in one piece, the first turn would see the later image too: the visual learner has no mask."""
    parts = row(*first, seed=1), row(4, seed=2), row(1, "I", 3, seed=3), row(2, seed=4), row("I", 1, seed=5)
    whole = together((torch.cat([ids for ids, _ in parts]), torch.cat([pixels for _, pixels in parts])))
    turn = torch.cat([torch.full((len(ids),), index) for index, (ids, _) in enumerate(parts)])
    with taught() as (model, _):
        found, _ = turns(model, *parts)
        expected = ByHand(model, whole, image_sees=(turn[None, :, None] >= turn[None, None, :])).logits()
        assert (logits(model, whole) - expected).abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_strict_text_keeps_earlier_turns_of_text_untouched_and_remembers_them():
    parts = row(5, seed=1), row(1, "I", 3, seed=3), row(2, seed=4)
    whole = together((torch.cat([ids for ids, _ in parts]), parts[1][1]))
    turn = torch.cat([torch.full((len(ids),), index) for index, (ids, _) in enumerate(parts)])
    speaks = (turn > 0)[None, :, None].expand(1, len(turn), len(turn))
    causal = torch.ones(len(turn), len(turn)).tril().bool()
    base, _ = turns(built("llava")[0], *parts)
    with taught(strict_text=True) as (model, _):
        found, _ = turns(model, *parts)
        expected = ByHand(model, whole, text_sees=causal & speaks, image_sees=speaks).logits()
    assert torch.equal(found[:, :5], base[:, :5])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_cache_filled_without_learners_is_refused():
    start, end = row(5, seed=1), row(1, "I", 3, seed=3)
    _, cache = turns(built("llava")[0], start)
    with taught() as (model, learners):
        with pytest.raises(UserError, match="cache"):
            turns(model, end, cache=cache)
        with learners.using():
            _, cache = turns(model, start)
        with pytest.raises(UserError, match="cache"):
            turns(model, end, cache=cache)


def test_two_interleaved_generations_do_not_disturb_each_other():
    _, processor = built("llava")
    one, two = example_batch("llava", processor), example_batch("llava", processor, text_only=True)
    with taught() as (model, _):

        def steps(batch):
            out = model(**batch, use_cache=True)
            while True:
                token = out.logits[:, -1:].argmax(dim=-1)
                mask = torch.ones(len(token), out.past_key_values.get_seq_length() + 1, dtype=torch.long)
                mask[:, : batch["attention_mask"].shape[1]] = batch["attention_mask"]
                yield token
                out = model(input_ids=token, attention_mask=mask, past_key_values=out.past_key_values, use_cache=True)

        def take(*batches):
            runs = [steps(batch) for batch in batches]
            return [torch.cat(tokens, dim=1) for tokens in zip(*[[next(run) for run in runs] for _ in range(4)], strict=True)]

        with torch.no_grad():
            mixed, alone = take(one, two), [*take(one), *take(two)]
    assert all(torch.equal(a, b) for a, b in zip(mixed, alone, strict=True))
