"""lmms-eval on the live model, against a small stand-in for it: what it asks is what alula would answer, what cannot be done is refused."""

import contextlib
import sys

import pytest
from typer.testing import CliRunner

from alula.cli.app import app
from alula.context import Routing
from alula.data.sample import Sample
from alula.errors import UserError
from alula.evaluation.generation import generate_answers
from alula.files import read_json, read_jsonl
from alula.running.learn import open_model, open_pool
from lmms_eval_stand_in import TASKS, lmms, requests_of, standing_in
from taught_pool import taught_pool
from zoo.parts import picture

QUESTIONS = ("is the square red?", "what colour?", "how many red circles are there?", "yes?", "what is the star left of?")
SHORT = {"max_new_tokens": 4}


def toy(visuals, text=lambda doc: doc["question"], *, kwargs=SHORT, **more):
    docs = [{"question": question, "answer": "yes", "number": number} for number, question in enumerate(QUESTIONS)]
    return {"docs": docs, "text": text, "visuals": visuals, "target": lambda doc: doc["answer"], "generation_kwargs": kwargs, **more}


def one_image(doc):
    return [picture(doc["number"], 40 + 4 * doc["number"], 60)]


def two_images(doc):
    return [*one_image(doc), picture(9, 30, 30)]


@pytest.fixture(scope="module")
def harness():
    with standing_in() as module:
        TASKS.update(
            toy_text=toy(lambda doc: []),
            toy_image=toy(one_image),
            toy_pair=toy(two_images, lambda doc: f"this <image> and that <image>: {doc['question']}"),
            toy_marked=toy(one_image, lambda doc: f"<image> <image> {doc['question']}"),
            toy_cut=toy(lambda doc: None, kwargs={"max_new_tokens": 6, "until": ["e", "a"], "do_sample": False, "num_beams": 1}),
        )
        yield module
        TASKS.clear()


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    return taught_pool(tmp_path_factory.mktemp("lmms"))


@pytest.fixture(scope="module")
def bare(taught):
    return open_model(str(taught.model))


@pytest.fixture(scope="module")
def pooled(taught):
    return open_pool(taught.pool)


def live(harness, opened, **options):
    around = {"around": opened.mixtures.director.on_prompts} if opened.mixtures else {}
    return harness.LiveModel(opened.model, opened.processor, **around, **options)


def answers(harness, model, name):
    return model.generate_until(requests_of(model, name))


def alone(model, name, sample_of, *, max_new_tokens=4):
    """What alula says to each question by itself."""
    samples = [sample_of(doc) for doc in TASKS[name]["docs"]]
    return [
        generate_answers(model.model, model.collator, [sample], max_new_tokens=max_new_tokens, device=model.device)[0][0]
        for sample in samples
    ]


def test_each_answer_is_the_one_to_that_question_alone_in_the_order_of_the_requests(harness, bare):
    model = live(harness, bare, batch_size=3)
    said = answers(harness, model, "toy_image")
    assert said == alone(model, "toy_image", lambda doc: Sample.ask(doc["question"], "?", images=tuple(one_image(doc))))
    assert len(set(said)) > 1, "answers that are all the same show no order"
    assert answers(harness, model, "toy_text") == alone(model, "toy_text", lambda doc: Sample.ask(doc["question"], "?"))


def seen_by(harness, opened, name, **options):
    """The batches of samples that a task's requests become."""
    model = live(harness, opened, **options)
    batches, make = [], model.collator.prompts
    model.collator.prompts = lambda samples: batches.append(list(samples)) or make(samples)
    answers(harness, model, name)
    return batches


def test_images_stand_before_the_question_or_where_it_marks_them(harness, bare):
    shown = {name: seen_by(harness, bare, name, batch_size=8)[0][0] for name in ("toy_image", "toy_pair", "toy_marked", "toy_text")}
    longest = "how many red circles are there?"
    asked = {name: sample.messages[0].content.replace(longest, "Q") for name, sample in shown.items()}
    assert asked["toy_text"] == "Q" and asked["toy_image"].replace("\n", "") == "<image>Q"
    assert asked["toy_pair"] == "this <image> and that <image>: Q"
    assert asked["toy_marked"].replace("\n", "") == "<image>Q", "marks that are not as many as the images are put aright"
    assert [len(sample.images) for sample in shown.values()] == [1, 2, 1, 0]
    assert shown["toy_pair"].id == "toy_pair:2"


def test_a_batch_holds_no_more_than_its_size_and_one_kind_of_options(harness, bare):
    assert [len(batch) for batch in seen_by(harness, bare, "toy_text", batch_size=2)] == [2, 2, 1]
    model = live(harness, bare, batch_size=8)
    batches, make = [], model.collator.prompts
    model.collator.prompts = lambda samples: batches.append({sample.id.split(":")[0] for sample in samples}) or make(samples)
    model.generate_until([*requests_of(model, "toy_cut"), *requests_of(model, "toy_text")])
    assert batches == [{"toy_cut"}, {"toy_text"}] or batches == [{"toy_text"}, {"toy_cut"}]


def test_an_answer_ends_before_its_first_stop_string(harness, bare):
    model = live(harness, bare)
    whole = alone(model, "toy_cut", lambda doc: Sample.ask(doc["question"], "?"), max_new_tokens=6)
    cut = answers(harness, model, "toy_cut")
    assert cut == [min(text.split("e")[0], text.split("a")[0], key=len).strip() for text in whole]
    assert cut != whole, "no answer holds a stop string"


def test_each_question_goes_to_the_expert_that_the_pool_chooses_for_it(harness, pooled):
    model = live(harness, pooled)
    for name, expert in (("toy_image", "pictures"), ("toy_text", "words")):
        routed = answers(harness, model, name)
        with pooled.mixtures.using(Routing(fixed={expert: 1.0})):
            assert answers(harness, model, name) == routed


def test_around_is_entered_around_each_batch(harness, bare):
    entered = []
    model = live(harness, bare, batch_size=2)
    model.around = lambda batch: entered.append(batch["input_ids"].shape[0]) or contextlib.nullcontext()
    answers(harness, model, "toy_text")
    assert entered == [2, 2, 1]


def asks(**changes):
    TASKS["toy_refused"] = {**toy(lambda doc: []), **changes}
    return "toy_refused"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"generation_kwargs": {"do_sample": True, "temperature": 0.5}},
            "toy_refused asks for .*do_sample.*greedy here. Change its generation_kwargs",
        ),
        ({"generation_kwargs": {"num_beams": 4}}, "num_beams.*greedy here"),
        ({"visuals": lambda doc: ["film.mp4"]}, "shows a str; images are accepted. Choose a task of images or text"),
        ({"request_type": "loglikelihood"}, "ranked tasks are not supported. Rank options with --harness lm-eval"),
        ({"request_type": "generate_until_multi_round"}, "several rounds are not supported. Choose a task of one question"),
    ],
    ids=["sampling", "beams", "films", "ranked", "rounds"],
)
def test_what_alula_does_not_do_is_refused_with_what_to_do(harness, bare, changes, says):
    try:
        with pytest.raises(UserError, match=says):
            harness.run_tasks(live(harness, bare), [asks(**changes)])
    finally:
        TASKS.pop("toy_refused")


def test_unknown_tasks_and_options_are_refused_before_anything_runs(harness, bare):
    model = live(harness, bare)
    with pytest.raises(UserError, match=r"lmms-eval knows no task 'toy_imag'\. Did you mean 'toy_image'"):
        harness.run_tasks(model, ["toy_imag"])
    with pytest.raises(UserError, match="num_fewshot came; lmms-eval has no such option here"):
        harness.run_tasks(model, ["toy_image"], num_fewshot=3, chat_template=False)


def test_the_evaluator_cleans_up_and_the_caller_keeps_the_model(harness, bare):
    before = [parameter.data_ptr() for parameter in bare.model.parameters()]
    model = live(harness, bare)
    found = harness.run_tasks(model, ["toy_text"], limit=2)
    assert model.model is bare.model and [parameter.data_ptr() for parameter in bare.model.parameters()] == before
    assert [row["doc_id"] for row in found["samples"]["toy_text"]] == [0, 1]


def test_lmms_evals_own_command_makes_a_pool_or_a_model_by_name(harness, taught, pooled):
    manifest = harness.manifests()
    module, _, kind = manifest.simple_class_path.rpartition(".")
    made = getattr(sys.modules[module], kind)
    assert manifest.model_id == "alula" and issubclass(made, lmms) and made.is_simple
    named = made(pool=str(taught.pool), batch_size="4", device="cpu", max_batch_size=None)
    assert named.batch_size_per_gpu == 4
    assert answers(harness, named, "toy_image") == answers(harness, live(harness, pooled), "toy_image")
    for arguments, says in (({}, "Give pool=FOLDER or model=NAME"), ({"pool": "x", "dtype": "auto"}, "unknown keys: dtype. Known: pool")):
        with pytest.raises(UserError, match=says):
            made(**arguments)


def run(*arguments):
    return CliRunner().invoke(app, ["eval", "--harness", "lmms-eval", *(str(argument) for argument in arguments)])


def test_the_command_keeps_results_and_samples_that_gate_reads(harness, taught, tmp_path):
    for name, where in (("before", ("--model", taught.model)), ("after", ("--pool", taught.pool))):
        result = run("--tasks", "toy_image,toy_text", *where, "--limit", 3, "--out", tmp_path / name)
        assert result.exit_code == 0, result.output
        assert "exact_match" in result.stdout and "toy_text" in result.stdout
    kept = read_json(tmp_path / "after" / "lmms-eval.json")
    assert (kept["harness"], kept["routing"], kept["n-samples"]["toy_image"]["effective"]) == ("lmms-eval", "analytic", 3)
    rows = read_jsonl(tmp_path / "after" / "toy_image.jsonl")
    assert [row["prompt"] for row in rows] == list(QUESTIONS[:3]) and all(row["reference"] == "yes" for row in rows)
    gate = CliRunner().invoke(app, ["gate", str(tmp_path / "before"), str(tmp_path / "after"), "--max-base-forgetting", "100"])
    assert gate.exit_code == 0, gate.output


def test_without_the_package_the_command_says_what_to_install(taught, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "alula.evaluation.harnesses.lmms_eval", raising=False)
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    result = run("--tasks", "mme", "--model", taught.model, "--out", tmp_path)
    assert result.exit_code == 2 and "pip install lmms-eval" in " ".join(result.output.split())
