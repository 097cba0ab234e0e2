"""Claims about batches, for the real processor of every model in the zoo that has a chat template."""

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import ProcessorMixin

from alula.data.collate import Collator
from alula.data.sample import Message, Sample
from alula.errors import UserError
from zoo import BUILDERS, build
from zoo.parts import picture

# Before, Mllama's processor refuses to mix rows with and without images, and LLaVA's counts no images.
IS_NEW = Version(transformers.__version__) >= Version("5.23")
AS_NEW = pytest.mark.skipif(not IS_NEW, reason="Transformers below 5.23")
CHATS = [name for name in BUILDERS if name not in ("florence2", "blip_2", *(() if IS_NEW else ("mllama",)))]
END = "<|im_end|>"


def user(content: str) -> Message:
    return Message(role="user", content=content)


def assistant(content: str) -> Message:
    return Message(role="assistant", content=content)


ONE = Sample.ask("what colour is the square?", "red", images=(picture(0, 40, 60),), origin="data.jsonl:1")
TEXT = Sample.ask("how many circles are there?", "the red square is left", origin="data.jsonl:2")
TWO = Sample.ask("the same?", "no", images=(picture(1, 40, 60), picture(2, 50, 30)), origin="data.jsonl:3")
TURNS = Sample(
    id="turns",
    messages=(user("<image>\nwhat?"), assistant("red"), user("and this\n<image>\none?"), assistant("two circles")),
    images=(picture(3, 40, 60), picture(4, 28, 56)),
)
PROSE = Sample(id="prose", messages=(assistant("the square is red, the circle is blue"),))
ROWS = [ONE, TEXT, TWO, TURNS]
ANSWERS = [f"red{END}", f"the red square is left{END}", f"no{END}", f"red{END}two circles{END}"]


@pytest.fixture(scope="module", params=CHATS)
def zoo_processor(request: pytest.FixtureRequest) -> ProcessorMixin:
    return build(request.param)[1]


@pytest.fixture
def processor() -> ProcessorMixin:
    return build("llava")[1]


def targets(processor: ProcessorMixin, batch: dict[str, torch.Tensor]) -> list[str]:
    rows = zip(batch["input_ids"], batch["labels"], strict=True)
    return [processor.tokenizer.decode(ids[labels != -100]) for ids, labels in rows]


def test_targets_of_a_mixed_batch_are_every_answer_with_its_end_of_turn(zoo_processor: ProcessorMixin) -> None:
    batch = Collator(zoo_processor)(ROWS)
    assert targets(zoo_processor, batch) == ANSWERS
    assert batch["attention_mask"][:, 0].all()  # right padded
    assert all(isinstance(value, torch.Tensor) for value in batch.values())


def test_a_row_has_the_same_targets_alone_and_in_a_batch(zoo_processor: ProcessorMixin) -> None:
    collator = Collator(zoo_processor)
    together = collator([*ROWS, PROSE])
    for i, sample in enumerate([*ROWS, PROSE]):
        alone = collator([sample])["labels"][0]
        assert torch.equal(together["labels"][i, : len(alone)], alone)
        assert (together["labels"][i, len(alone) :] == -100).all()


def test_prompts_are_left_padded_beginnings_of_training_rows(zoo_processor: ProcessorMixin) -> None:
    collator, before = Collator(zoo_processor), zoo_processor.tokenizer.padding_side
    prompts, rows = collator.prompts(ROWS), collator(ROWS)
    assert "labels" not in prompts
    assert prompts["attention_mask"][:, -1].all()
    for i, mask in enumerate(prompts["attention_mask"]):
        prompt = prompts["input_ids"][i][mask == 1]
        assert torch.equal(prompt, rows["input_ids"][i, : len(prompt)])
        assert rows["labels"][i, len(prompt)] != -100  # the answer begins where the prompt ends
    assert zoo_processor.tokenizer.padding_side == before


def test_continuations_count_the_option_alone(zoo_processor: ProcessorMixin) -> None:
    batch = Collator(zoo_processor).continuations([ONE, TEXT], [["red", "blue circle"], ["yes", "no", "one"]])
    assert targets(zoo_processor, batch) == ["red", "blue circle", "yes", "no", "one"]


def test_running_text_is_learnt_but_for_its_first_token(zoo_processor: ProcessorMixin) -> None:
    batch = Collator(zoo_processor)([PROSE])
    opens_with_bos = batch["input_ids"][0, 0] == zoo_processor.tokenizer.bos_token_id
    assert targets(zoo_processor, batch) == [PROSE.answer if opens_with_bos else PROSE.answer.removeprefix("the")]


@pytest.mark.parametrize("name", CHATS)
def test_every_model_learns_from_a_mixed_and_from_a_text_only_batch(name: str) -> None:
    model, processor = build(name)
    model.train()
    collator = Collator(processor)
    for rows in (ROWS, [TEXT, PROSE]):
        loss = model(**collator(rows)).loss
        loss.backward()
        assert loss.isfinite()
    model.eval()
    assert len(model.generate(**collator.prompts(ROWS), max_new_tokens=2, do_sample=False)) == len(ROWS)


def test_an_answer_does_not_see_itself_in_paligemma() -> None:
    model, processor = build("paligemma")
    batch = Collator(processor)([ONE])
    first = int((batch["labels"][0] != -100).nonzero()[0])
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][0, first] = batch["input_ids"][0, 0] + 7  # another first answer token
    with torch.no_grad():
        left, right = model(**batch).logits[0, first - 1], model(**other).logits[0, first - 1]
    assert torch.equal(left, right)


SPACED = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] | capitalize }}:{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<image>{% else %} {{ p['text'] }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
UNCLOSED = (
    "{% for m in messages %}{{ m['role'] | upper }}: {% for p in m['content'] %}{% if p['type'] == 'image' %}<image>\n"
    "{% else %}{{ p['text'] }} {% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
STRICT = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>{% else %}"
    "{{ p['text'] | trim }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and loop.last %}<think>\n\n"
    "</think>\n\n{% endif %}{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (SPACED, [" red<end_of_utterance>", " red<end_of_utterance> two circles<end_of_utterance>"]),
        (UNCLOSED, [" red</s>", " red two circles</s>"]),
        (STRICT, ["red<|im_end|>", "red<|im_end|>two circles<|im_end|>"]),
        (THINKING, ["red<|im_end|>", "red<|im_end|>two circles<|im_end|>"]),
    ],
    ids=["spaced", "unclosed", "strict", "thinking"],
)
def test_targets_follow_the_template_of_the_model(processor: ProcessorMixin, template: str, expected: list[str]) -> None:
    processor.chat_template = template
    assert targets(processor, Collator(processor)([ONE, TURNS])) == expected


def test_a_beginning_of_sequence_token_comes_once(processor: ProcessorMixin) -> None:
    from tokenizers.processors import TemplateProcessing

    bos = processor.tokenizer.bos_token_id
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    for template in (processor.chat_template, SPACED):
        processor.chat_template = template
        collator = Collator(processor)
        for batch in (collator([ONE, PROSE]), collator.prompts([ONE])):
            assert ((batch["input_ids"] == bos).sum(-1) == 1).all()
        assert targets(processor, collator([PROSE])) == [PROSE.answer]


def test_a_refused_system_message_goes_into_the_first_question(processor: ProcessorMixin) -> None:
    processor.chat_template = STRICT
    told = Sample(id="told", messages=(Message(role="system", content="be short"), *ONE.messages), images=ONE.images)
    batch = Collator(processor)([told])
    text = processor.tokenizer.decode(batch["input_ids"][0]).replace("<image>", "")
    assert text.startswith("<|im_start|>user\nbe shortwhat colour")  # the template trims the line breaks between them
    assert targets(processor, batch) == [ANSWERS[0]]


def test_the_same_words_in_a_question_are_no_target(processor: ProcessorMixin) -> None:
    sample = Sample(
        id="echo",
        messages=(user("red<|im_end|> <image>"), assistant("red"), user("red <image>red"), assistant("red")),
        images=TWO.images,
    )
    labels = Collator(processor)([sample])["labels"][0]
    ids = Collator(processor)([sample])["input_ids"][0]
    starts = [i for i in range(1, len(labels)) if labels[i] != -100 and labels[i - 1] == -100]
    header = processor.tokenizer("<|im_start|>assistant\n")["input_ids"]
    assert len(starts) == 2
    assert all(ids[start - len(header) : start].tolist() == header for start in starts)


def test_too_long_rows_are_named_and_not_cut(processor: ProcessorMixin) -> None:
    length = len(Collator(processor)([ONE])["input_ids"][0])
    assert Collator(processor, max_length=length)([ONE])
    with pytest.raises(UserError, match=rf"data.jsonl:1: {length} tokens, but max_length is {length - 1}.*Raise"):
        Collator(processor, max_length=length - 1)([ONE])


def test_a_processor_that_cannot_collate_is_refused_with_a_remedy(processor: ProcessorMixin) -> None:
    for name in ("florence2", "blip_2"):
        with pytest.raises(UserError, match=r"Set processor\.chat_template"):
            Collator(build(name)[1])
    processor.tokenizer.pad_token = None
    with pytest.raises(UserError, match=r"Set processor\.tokenizer\.pad_token"):
        Collator(processor)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m['role'] }}{% endfor %}", r"data.jsonl:1: the chat template does not write"),
        ("{{ raise_exception('never') }}", r"data.jsonl:1: the chat template refuses the messages \(user, assistant\)"),
        pytest.param(UNCLOSED.replace("<image>", ""), r"refuses the rows data.jsonl:1", marks=AS_NEW),
    ],
)
def test_a_template_that_does_not_fit_is_refused_with_the_row(processor: ProcessorMixin, template: str, message: str) -> None:
    processor.chat_template = template
    with pytest.raises(UserError, match=message):
        Collator(processor)([ONE])


def test_rows_that_cannot_be_asked_are_refused(processor: ProcessorMixin) -> None:
    collator = Collator(processor)
    with pytest.raises(UserError, match="prose: running text has no prompt"):
        collator.prompts([PROSE])
    with pytest.raises(UserError, match="1 lists of options came for 2 samples"):
        collator.continuations([ONE, TEXT], [["red"]])
    shown = Sample(id="shown", messages=(user("draw"), assistant("<image> here")), images=ONE.images)
    with pytest.raises(UserError, match="shown: an assistant message holds an image"):
        collator([shown])
