"""Claims about few-shot evaluation: prompts are the published ones, the same for the same seed, and never hold the answer."""

from dataclasses import replace

import pytest
from typer.testing import CliRunner

from alula.cli.app import app
from alula.data.collate import Collator
from alula.data.interleaved.embedding import tf_idf
from alula.data.sample import Message, Sample
from alula.data.stream import Task
from alula.data.tasks import load_task
from alula.errors import UserError
from alula.evaluation.evaluate import evaluate_task
from alula.evaluation.few_shot import Budget, context_of, few_shot, rescore
from alula.evaluation.scores import Prediction
from alula.evaluation.vqa import cut_answer, normalise_vqa
from alula.files import read_jsonl, write_jsonl
from zoo import build
from zoo.parts import picture

WORDS = ("what colour?", "how many red circles?", "is the star left?", "what?", "red or blue?", "which square is big?")


def row(index, *, name="train", images=1, **fields):
    shown = tuple(picture(10 * index + number, 40, 60) for number in range(images))
    return Sample.ask(f"{WORDS[index % 6]}", ("red", "blue", "two")[index % 3], images=shown, id=f"{name}/{index}", **fields)


def colours(**fields):
    test = [row(index, name="test", images=index % 2, **fields) for index in range(20, 25)]
    return Task(name="colours", train=[row(index, images=index % 3, **fields) for index in range(12)], test=test, max_new_tokens=4)


@pytest.fixture(scope="module", params=["qwen2_vl", "llava"])
def collator(request):
    return Collator(build(request.param)[1])


def prompts(found, collator):
    return [collator.prompts([sample]) for sample in found.task.test]


def test_the_same_seed_gives_the_same_prompts_byte_for_byte_and_another_seed_others(collator):
    first, again, other = (prompts(few_shot(colours(), shots=4, seed=seed), collator) for seed in (3, 3, 4))
    for one, two in zip(first, again, strict=True):
        assert {name: value.numpy().tobytes() for name, value in one.items()} == {
            name: value.numpy().tobytes() for name, value in two.items()
        }
    assert [one["input_ids"].tolist() for one in first] != [one["input_ids"].tolist() for one in other]


def test_shots_do_not_depend_on_the_order_of_the_test_split_and_fewer_are_part_of_more():
    task = colours()
    found = {sample.id: sample for sample in few_shot(task, shots=4).task.test}
    turned = few_shot(replace(task, test=task.test[::-1]), shots=4, limit=2).task.test
    assert [sample.id for sample in turned] == ["test/24", "test/23"]
    assert all(sample.messages == found[sample.id].messages for sample in turned)
    for few, many in zip(few_shot(task, shots=2).task.test, few_shot(task, shots=4).task.test, strict=True):
        assert many.messages[-len(few.messages) :] == few.messages and len(many.messages) == len(few.messages) + 4


@pytest.mark.parametrize("by", ["seed", "similarity"])
def test_shots_never_contain_the_query(by):
    task = colours()
    twin = replace(task.test[0], id="another name")
    same_name = replace(task.train[1], id=task.test[1].id)
    full = replace(task, train=[twin, same_name, *task.train[:3]])
    found = few_shot(full, shots=5, by=by, embed=tf_idf)
    for number, sample in enumerate(found.task.test[:2]):
        assert found.counts[number] == 4
        assert sum(message.content == twin.messages[0].content for message in sample.messages[:-2]) == (number == 1)
    assert found.task.test[0].images.count(twin.images[0]) == 1 if twin.images else True
    alone = few_shot(replace(task, train=()), shots=9, by=by, embed=tf_idf)  # a base task: shots are its other test samples
    assert alone.counts == (4,) * 5 and alone.split == "test" and "no more" in alone.describe()


def test_a_chat_holds_each_shot_as_a_turn_with_its_images_in_reading_order(collator):
    task = Task(name="t", train=[row(1, images=2)], test=[row(6, images=1)])
    (sample,) = few_shot(task, shots=1).task.test
    assert [message.role for message in sample.messages] == ["user", "assistant", "user", "assistant"]
    assert sample.images == (*task.train[0].images, *task.test[0].images)
    system = replace(task.test[0], messages=(Message(role="system", content="Be short."), *task.test[0].messages))
    (led,) = few_shot(replace(task, test=[system]), shots=1).task.test
    assert led.messages[0].role == "system" and led.messages[1:] == sample.messages
    assert sample.id == task.test[0].id and sample.references == task.test[0].references


def test_published_prompts_are_written_without_a_chat_template():
    text_only, shown = row(1, images=0), row(2, images=2)
    asked = row(6, images=1)
    task = Task(name="t", train=[text_only, shown], test=[asked])
    collator = Collator(build("qwen2_vl")[1])
    mark = "<|vision_start|><|image_pad|><|vision_end|>"
    for form, lines in {
        "vqa": (f"Question: {text_only.question} Short answer: blue\n", f"{mark}{mark} Question: {shown.question} Short answer: two\n"),
        "caption": ("A photo of blue\n", f"{mark}{mark} A photo of two\n"),
    }.items():
        (sample,) = few_shot(task, shots=2, form=form).task.test
        text = collator._renderer.prompt(sample)
        assert text in {"".join((*order, "")) + text.rpartition("\n")[2] for order in (lines, lines[::-1])}
        assert text.endswith(f"{mark} Question: what colour? Short answer:" if form == "vqa" else f"{mark} A photo of")
        assert collator._renderer.conversation(sample).text == f"{text} red"
        batch = collator([sample])
        assert collator.tokenizer.decode(batch["input_ids"][batch["labels"] != -100]).strip() == "red"
    (bare,) = few_shot(task, shots=0, form="vqa").task.test
    assert collator._renderer.prompt(bare) == f"{mark} Question: what colour? Short answer:"


def test_a_template_that_puts_images_first_still_tells_their_mark():
    processor = build("llava")[1]
    images = "{% for p in m.content if p.type == 'image' %}<image>\n{% endfor %}"
    texts = "{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}"
    processor.chat_template = f"{{% for m in messages %}}USER: {images}{texts}{{% endfor %}}"
    (sample,) = few_shot(Task(name="t", train=[row(2)], test=[row(6)]), shots=1, form="caption").task.test
    assert Collator(processor)._renderer.prompt(sample).endswith("<image> A photo of two\n<image> A photo of")


def test_the_budget_counts_exactly_and_says_what_it_dropped(collator):
    task = colours()
    whole = [int(batch["attention_mask"].sum()) for batch in (collator([sample]) for sample in few_shot(task, shots=8).task.test)]
    budget = Budget(collator, context=max(whole) + task.max_new_tokens)
    everything = few_shot(task, shots=8, budget=budget)
    assert everything.counts == (8,) * 5 and everything.num_dropped == 0 and everything.describe().endswith("8 for 5 samples.")
    tight = few_shot(task, shots=8, budget=Budget(collator, context=max(whole) + task.max_new_tokens - 1))
    assert min(tight.counts) == 7 and tight.counts[whole.index(max(whole))] == 7
    small = few_shot(task, shots=8, budget=Budget(collator, context=120))
    assert small.num_dropped == 40 - sum(small.counts) > 0
    assert f"{small.num_dropped} of 40 shots dropped" in small.describe() and f"{120 - 4} tokens" in small.describe()
    kept = few_shot(task, shots=8).task.test
    for sample, more, count in zip(small.task.test, kept, small.counts, strict=True):
        assert int(collator([sample])["attention_mask"].sum()) <= 116 or count == 0
        assert more.messages[-2 - 2 * count :] == sample.messages  # the nearest stay


def test_what_was_dropped_is_told_by_what_ran_out(collator):
    task = colours()
    few = replace(task, train=task.train[:2])
    wide, narrow = (few_shot(few, shots=4, budget=Budget(collator, context=size)) for size in (4096, 60))
    assert "shots dropped, the least near first: the train split has no more." in wide.describe()
    assert "a prompt has room for 56 tokens, and the train split has no more." in narrow.describe()
    none = few_shot(task, shots=0, budget=Budget(collator, context=5))
    assert none.describe().endswith("0 for 5 samples. A prompt has room for 1 tokens, and 5 of 5 are longer even without shots.")


def test_similar_shots_stand_nearest_to_the_question():
    train = [Sample.ask(text, "x", id=text) for text in ("the red square", "a blue circle", "the red square is big", "nothing like it")]
    task = Task(name="t", train=train, test=[Sample.ask("is the red square big", "y")])
    (sample,) = few_shot(task, shots=2, by="similarity", embed=tf_idf).task.test
    assert [message.content for message in sample.messages[:4:2]] == ["the red square", "the red square is big"]


def test_what_cannot_be_few_shot_is_refused():
    task, animals = colours(), load_task("animals", train_size=4, test_size=2)
    two_turns = Sample(id="2", messages=(*row(1, images=0).messages, *row(2, images=0).messages))
    for given, options, words in (
        (task, {"shots": -1}, "from 0 up"),
        (task, {"shots": 1, "by": "chance"}, "Known: seed, similarity"),
        (task, {"shots": 1, "form": "vqaa"}, "Did you mean 'vqa'"),
        (task, {"shots": 1, "by": "similarity"}, "load_embedder"),
        (animals, {"shots": 1, "by": "similarity", "embed": tf_idf}, "asks one question"),
        (load_task("prose", test_size=2), {"shots": 1}, "asks nothing"),
        (replace(task, test=[two_turns]), {"shots": 1, "form": "vqa"}, "several turns"),
    ):
        with pytest.raises(UserError, match=words):
            few_shot(given, **options)


@pytest.mark.parametrize("scoring", ["exact_match", "ranked"])
def test_any_task_is_evaluated_as_it_is_and_without_shots_nothing_changes(scoring):
    model, processor = build("llava")
    collator = Collator(processor)
    task = replace(colours(options=("red", "blue", "two") if scoring == "ranked" else ()), scoring=scoring)
    plain = evaluate_task(model, collator, task, batch_size=3)
    assert evaluate_task(model, collator, few_shot(task, shots=0).task, batch_size=3) == plain
    budget = Budget(collator, context=context_of(model, collator))
    found = few_shot(task, shots=2, form="vqa", budget=budget)
    predictions = evaluate_task(model, collator, found.task, batch_size=3)
    assert [prediction.id for prediction in predictions] == [sample.id for sample in task.test]
    assert (rescore(found, predictions) == predictions) == (scoring == "ranked")


def test_answers_are_cut_and_compared_as_published():
    assert [cut_answer(text, form="vqa") for text in (" red\nblue", "red, blue", "3.14 metres. Yes", "red Question: what")] == [
        "red", "red", "3.14 metres", "red",
    ]  # fmt: skip
    assert cut_answer(" one cat, pink ground. A photo of a dog", form="caption") == "one cat, pink ground"
    for text, expected in (
        ("The Cat!", "cat"),
        ("two dogs", "2 dogs"),
        ("none", "0"),
        ("dont", "dont"),
        ("don't", "dont"),
        ("black-white", "black white"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("u.s.", "us"),
        ("its", "its"),
    ):
        assert normalise_vqa(text) == expected
    assert normalise_vqa("she's") != normalise_vqa("shes")  # not in the published table


def test_published_forms_are_scored_after_the_stop():
    found = few_shot(colours(), shots=1, form="vqa")
    said = ("Blue, I think", "The red one\n", "", "2.", "two")
    made = [
        Prediction(id=sample.id, task="colours", prompt="", reference=sample.answer, output=text, score=0.0)
        for sample, text in zip(found.task.test, said, strict=True)
    ]
    references = [sample.answer for sample in found.task.test]
    done = rescore(found, made)
    assert [prediction.output for prediction in done] == ["Blue", "The red one", "", "2", "two"]
    wanted = [
        float(normalise_vqa(text) == normalise_vqa(answer)) for text, answer in zip(("Blue", "x", "", "2", "two"), references, strict=True)
    ]
    assert [prediction.score for prediction in done] == wanted and sum(wanted) >= 1
    assert [prediction.parsed for prediction in done] == [True, True, False, True, True]
    assert rescore(replace(found, form="chat"), made) == made


def test_the_command_line_takes_shots(tmp_path, monkeypatch):
    model, processor = build("llava")
    model.generation_config.suppress_tokens = [processor.tokenizer.convert_tokens_to_ids(processor.image_token)]
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    write_jsonl(tmp_path / "rows.jsonl", [{"question": f"{WORDS[i % 6]} {i}", "answer": "red"} for i in range(20)])
    monkeypatch.chdir(tmp_path)
    words = ["eval", "--model", "model", "--task", "mine=rows.jsonl", "--out", "out", "--limit", "2", "--shots", "2", "--shots-as", "vqa"]
    result = CliRunner().invoke(app, [*words, "--seed", "5"])
    assert result.exit_code == 0 and "2 for 2 samples" in result.output
    first = read_jsonl("out/mine.jsonl")
    assert len(first) == 2 and all(row["prompt"].count("Short answer:") == 3 for row in first)
    assert CliRunner().invoke(app, [*words, "--seed", "5"]).exit_code == 0
    assert read_jsonl("out/mine.jsonl") == first


def test_budgets_measure_each_image_once():
    class Counting(Collator):
        calls = 0

        def __call__(self, samples):
            type(self).calls += 1
            return super().__call__(samples)

    collator = Counting(build("qwen2_vl")[1])
    few_shot(colours(), shots=4, budget=Budget(collator, context=4096))
    assert Counting.calls <= 17
    assert context_of(build("qwen2_vl")[0], collator) == 2048
