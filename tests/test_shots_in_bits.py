"""Shots before questions that are scored in bits per byte: the right answer's alone, in the published forms."""

from dataclasses import replace

import pytest

from alula.data.choices import TaskChoice
from alula.data.collate import IGNORED, Collator
from alula.data.sample import Message, Sample
from alula.data.stream import Stream, Task
from alula.data.tasks import load_task
from alula.errors import UserError
from alula.evaluation.evaluate import evaluate_task
from alula.evaluation.few_shot import few_shot
from alula.running.choices import load_choice
from alula.running.shots import ask_with_shots, scored_names
from zoo import build


def in_bits(name):
    return load_choice(TaskChoice(name=name, scoring="bits_per_byte", train_size=8, test_size=3))


def test_the_bits_are_those_of_the_last_answer():
    model, processor = build("llava")
    collator, task = Collator(processor), in_bits("easy_vqa")
    prompted = few_shot(task, shots=2, form="vqa").task
    found = evaluate_task(model, collator, prompted, batch_size=2)
    assert [one.bytes for one in found] == [len(sample.answer.encode()) for sample in task.test]
    for sample in prompted.test:
        labels = collator([sample])["labels"][0]
        kept = processor.tokenizer.decode(labels[labels != IGNORED], skip_special_tokens=True)
        assert kept.strip() == sample.answer


def test_in_a_conversation_the_shots_answers_would_count_so_it_is_refused_and_left_out_of_runs():
    task = in_bits("easy_vqa")
    with pytest.raises(UserError, match=r"the shots' answers would count, too\. Choose form 'vqa'"):
        few_shot(task, shots=2)
    stream = Stream(
        tasks=(task,), base_tasks=(load_task("prose", test_size=2), replace(load_task("digits", train_size=8, test_size=2), is_base=True))
    )
    model, processor = build("llava")
    for form, wanted in (("chat", {"1shot_digits"}), ("vqa", {"1shot_digits", "1shot_easy_vqa"})):
        assert ask_with_shots(stream, model, Collator(processor), shots=[1], form=form).keys() == wanted
        assert set(scored_names(stream, [1], form=form)) == wanted | {"easy_vqa", "prose", "digits"}


def test_documents_ask_nothing():
    page = Sample(id="page", messages=(Message(role="text", content="A"), Message(role="assistant", content="cat.")))
    with pytest.raises(UserError, match="asks nothing"):
        few_shot(Task(name="pages", train=[page], test=[page], scoring="bits_per_byte"), shots=1, form="vqa")
