"""Encoders weighed by the instruction read every kind of prompt: chats, published few-shot lines, documents. Never an answer."""

import pytest
import torch

from alula.data.collate import Collator
from alula.data.documents import documents
from alula.data.rendering import image_instructions
from alula.data.sample import Message, Sample
from alula.data.stream import Task
from alula.errors import UserError
from alula.evaluation.evaluate import evaluate_task
from alula.evaluation.few_shot import FORMS, few_shot
from alula.models.composed import ComposedVLM
from composed_models import loud, make_processor, mixture_config, picture, save_sentences

ASKED = ("what is this?", "how many?", "which colour?")


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory):
    return make_processor(save_sentences(tmp_path_factory.mktemp("sentences")))


@pytest.fixture
def task() -> Task:
    rows = [Sample.ask(text, "a cat", images=(picture(i),), id=str(i)) for i, text in enumerate(ASKED)]
    return Task(name="t", train=rows[1:], test=rows[:1], max_new_tokens=2)


def test_the_instruction_of_an_image_is_its_turn_or_its_line(task: Task) -> None:
    said = {form: image_instructions(few_shot(task, shots=2, form=form).task.test[0]) for form in FORMS}
    assert sorted(said["chat"]) == sorted(ASKED) and said["chat"][-1] == ASKED[0]
    assert said["vqa"][-1] == f"Question: {ASKED[0]} Short answer:"
    assert sorted(said["vqa"][:2]) == sorted(f"Question: {text} Short answer: a cat" for text in ASKED[1:])
    assert said["caption"] == ["A photo of a cat", "A photo of a cat", "A photo of"]
    two = Sample(
        id="d",
        messages=(Message(role="text", content="Two\n<image><image>and\nmore"), Message(role="assistant", content="prose")),
        images=(picture(0), picture(1)),
    )
    assert image_instructions(two) == ["and", "and"]
    assert {one for document in documents(3) for one in image_instructions(document)} == {""}


def test_a_collator_tells_chats_as_the_processor_reads_them(task: Task, processor) -> None:
    shown = few_shot(task, shots=2).task.test
    batch = Collator(processor)(shown)
    text = processor.tokenizer.decode(batch["input_ids"][0]).replace("<image>" * processor.image_seq_length, "<image>")
    alone = processor(text=[text], images=[shown[0].open_images()], return_tensors="pt")
    assert torch.equal(alone["instruction_embedding"], batch["instruction_embedding"])


@pytest.mark.parametrize("form", FORMS)
def test_a_routed_model_is_scored_with_shots_and_the_answer_does_not_choose(form: str, task: Task, processor) -> None:
    model, collator = loud(ComposedVLM(mixture_config())), Collator(processor)
    asked = few_shot(task, shots=2, form=form).task
    (prediction,) = evaluate_task(model, collator, asked, batch_size=1)
    assert prediction.output != ""
    batches = [collator.prompts(asked.test), collator.continuations(asked.test, [["red"]]), collator(asked.test)]
    assert len({tuple(batch["instruction_embedding"].flatten().tolist()) for batch in batches}) == 1


def test_a_routed_model_learns_from_documents_beside_chats(task: Task, processor) -> None:
    model = loud(ComposedVLM(mixture_config())).train()
    rows = [*documents(2), *task.train, Sample.ask("no image", "none")]
    output = model(**Collator(processor)(rows))
    output.loss.backward()
    assert model.connector.router.outer.weight.grad.abs().sum() > 0
    shares = output.encoder_weights
    neutral = model.connector.router(torch.zeros(1, 16))
    images = len(documents(2)[0].images) + len(documents(2)[1].images)
    torch.testing.assert_close(shares[:images], neutral.expand(images, -1))
    assert not torch.allclose(shares[images], neutral[0])


def test_instructions_are_counted_against_images(processor) -> None:
    with pytest.raises(UserError, match=r"\[2\] instructions came for \[1\] images"):
        processor(text=["<image>"], images=[picture(1)], instructions=[["a", "b"]])
