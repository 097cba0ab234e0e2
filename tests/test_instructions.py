"""Whose instruction a token follows: its row's, its generation's, and never an answer's."""

import pytest
import torch
from torch.nn import functional
from transformers import DynamicCache

from alula import attach_adapters
from alula.data.collate import IGNORED
from alula.errors import UserError
from alula.models.instructions import InstructionEncoder
from alula.routers.instruction import READS, HardRouter
from taught_adapters import SMALL, attached, chosen, logits, teach
from taught_learners import row, together
from zoo import BUILDERS, build, example_batch

__all__ = ["attached"]
FAMILIES = sorted(set(BUILDERS) - {"blip_2", "florence2"})  # whose decoders' layers (OPT, BART) hold their linears themselves
BEAMS = {"num_beams": 3, "num_return_sequences": 2}


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


def test_fresh_routers_do_not_give_every_sentence_to_one_expert(monkeypatch):
    unit = functional.normalize(torch.randn(40, 384, generator=torch.Generator().manual_seed(0)), dim=-1)
    monkeypatch.setattr(InstructionEncoder, "_read", lambda encoder: lambda texts: unit[: len(texts)].numpy())
    instruction = torch.from_numpy(InstructionEncoder("minilm")([str(number) for number in range(len(unit))]))
    for _ in range(20):
        index = HardRouter(8, num_experts=4, instruction_dim=384)(torch.zeros(len(unit), 1, 8), instruction).index
        assert index.bincount().max() < len(unit)
