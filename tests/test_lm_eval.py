"""lm-evaluation-harness on the live model: its own numbers, the pool's routing, images, and what is kept of it."""

import contextlib
import gc
import json
import re
from pathlib import Path

import datasets
import pytest
import torch
from lm_eval.models.hf_vlms import HFMultimodalLM
from typer.testing import CliRunner

from alula.cli.app import app
from alula.context import OFF, Routing, prompt_mask
from alula.errors import UserError
from alula.evaluation.harnesses.lm_eval import LiveModel, run_tasks
from alula.evaluation.harnesses.names import check_names
from alula.files import read_json, read_jsonl
from alula.running.learn import open_model, open_pool
from live_weights import watched
from taught_pool import taught_pool
from zoo.parts import picture

HEAD = """
dataset_path: {kind}
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
test_split: test
"""
RANKED = """
task: toy_ranked
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["yes", "no", "red"]
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
SAID = """
task: toy_said
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["e"], max_gen_toks: 4}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
PROSE = """
task: toy_prose
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} {{answer}}"
metric_list: [{metric: byte_perplexity}]
"""
SEEN = """
task: toy_seen
output_type: generate_until
doc_to_image: [image]
doc_to_text: "<image> {{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["e"], max_gen_toks: 4}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
SEEN_RANKED = SEEN.replace("toy_seen", "toy_seen_ranked").replace("generate_until", "multiple_choice").replace("exact_match", "acc")
SEEN_RANKED = SEEN_RANKED.replace('generation_kwargs: {until: ["e"], max_gen_toks: 4}', 'doc_to_choice: ["yes", "no", "red"]')
TEXT, IMAGES = ["toy_ranked", "toy_said", "toy_prose"], ["toy_seen", "toy_seen_ranked"]


@pytest.fixture(scope="module", autouse=True)
def few_objects():
    """lm-eval collects garbage after each batch of images; what torch has imported need not be looked through each time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A model, a pool and five task files over local data."""
    folder = tmp_path_factory.mktemp("desk")
    asked = ["is the square red?", "what colour?", "how many red circles are there?", "yes?", "what is the star left of?", "no?"]
    rows = [{"question": text, "answer": ("yes", "no", "red")[i % 3]} for i, text in enumerate(asked)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = datasets.Dataset.from_list([{**row, "image": picture(i, 40 + 4 * i, 60)} for i, row in enumerate(rows)])
    shown.cast_column("image", datasets.Image()).to_parquet(folder / "rows.parquet")
    (folder / "tasks").mkdir()
    for name, body in zip([*TEXT, *IMAGES], (RANKED, SAID, PROSE, SEEN, SEEN_RANKED), strict=True):
        kind, data = ("parquet", "rows.parquet") if name in IMAGES else ("json", "rows.jsonl")
        head = HEAD.format(kind=kind, data=folder / data, cache=folder / "cache")
        (folder / "tasks" / f"{name}.yaml").write_text(body + head)
    return folder, taught_pool(folder)


@pytest.fixture(scope="module")
def bare(desk):
    return open_model(str(desk[1].model))


@pytest.fixture(scope="module")
def pooled(desk):
    return open_pool(desk[1].pool)


def live(opened, **options):
    around = {"around": opened.mixtures.director.on_prompts} if opened.mixtures else {}
    return LiveModel(opened.model, opened.processor, **around, **options)


def answers(model, tasks, desk, **options):
    """Every response of each task, in the order of its samples."""
    found = run_tasks(model, tasks, include_path=desk[0] / "tasks", **options)
    return {task: [sample["resps"] for sample in found["samples"][task]] for task in tasks}


def assert_close(left, right):
    """Equal texts, and log-likelihoods as near as another padding lets them be."""
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        left, right = list(left.values()), list(right.values())
    if isinstance(left, list | tuple):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_close(one, other)
    elif isinstance(left, float):
        assert left == pytest.approx(right, abs=1e-4)
    else:
        assert left == right


def test_a_live_models_numbers_are_those_of_lm_evals_own_class(desk, bare):
    reference = HFMultimodalLM(str(desk[1].model), batch_size=2, device="cpu", dtype="float32")
    for tasks in (TEXT, ["toy_seen"]):  # its own class takes one kind in a call, and cannot rank options of images
        assert_close(answers(live(bare), tasks, desk), answers(reference, tasks, desk))


def test_the_model_is_used_where_it_is_and_no_weight_is_copied(desk, bare):
    with watched(bare.model) as weights:
        answers(live(bare), ["toy_said", "toy_seen"], desk)
    assert len(weights.forwards) > 4 and weights.stayed


def test_with_its_experts_turned_off_a_pool_has_the_bare_models_numbers(desk, bare, pooled):
    tasks = [*TEXT, *IMAGES]
    expected = answers(live(bare), tasks, desk, chat_template=True)
    with pooled.mixtures.using(OFF):
        assert answers(live(pooled), tasks, desk, chat_template=True) == expected
    assert answers(live(pooled), tasks, desk, chat_template=True) != expected


def test_each_request_is_routed_by_its_prompt_alone(desk, pooled):
    """Text goes to one expert and images to the other, in one call, as when they are fixed."""
    tasks = ["toy_ranked", "toy_said", *IMAGES]
    routed = answers(live(pooled), tasks, desk, chat_template=True)
    for expert, own in (("words", tasks[:2]), ("pictures", IMAGES)):
        with pooled.mixtures.using(Routing(fixed={expert: 1.0})):
            assert_close(answers(live(pooled), own, desk, chat_template=True), {task: routed[task] for task in own})


@pytest.mark.parametrize("task", ["toy_ranked", "toy_seen_ranked"])
def test_routing_may_see_the_prompt_of_a_ranked_request_and_not_its_option(desk, bare, task):
    prompts = set()

    def around(batch):
        mask = prompt_mask(batch["attention_mask"].bool(), batch["labels"])
        prompts.update(bare.processor.decode(ids[seen]) for ids, seen in zip(batch["input_ids"], mask, strict=True))
        return contextlib.nullcontext()

    run_tasks(LiveModel(bare.model, bare.processor, around=around), [task], include_path=desk[0] / "tasks")
    asked = {row["question"] for row in read_jsonl(desk[0] / "rows.jsonl")}
    assert {prompt.rpartition("<image>")[2].strip() for prompt in prompts} == asked


def test_options_of_an_image_are_ranked_by_their_log_likelihood(desk, bare):
    processor = bare.processor
    found = answers(live(bare, batch_size=5), ["toy_seen_ranked"], desk)["toy_seen_ranked"]
    rows = read_jsonl(desk[0] / "rows.jsonl")
    for i, responses in enumerate(found[:2]):
        prompt, image = f"<image> {rows[i]['question']}", picture(i, 40 + 4 * i, 60)
        for option, ((nats, _),) in zip(("yes", "no", "red"), responses, strict=True):
            whole = processor(text=f"{prompt} {option}", images=image, return_tensors="pt")
            count = whole["input_ids"].shape[1] - processor(text=prompt, images=image, return_tensors="pt")["input_ids"].shape[1]
            with torch.no_grad():
                logs = bare.model(**whole).logits[0, -count - 1 : -1].log_softmax(-1)
            assert nats == pytest.approx(float(logs.gather(-1, whole["input_ids"][0, -count:, None]).sum()), abs=1e-4)


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_shows_n_and_error_and_keeps_what_gate_reads(desk, tmp_path):
    folder, taught = desk
    ask = ("eval", "--harness", "lm-eval", "--tasks", "toy_ranked,toy_said", "--include-path", folder / "tasks", "--limit", 4)
    before = run(*ask, "--model", taught.model, "--out", tmp_path / "before")
    after = run(*ask, "--pool", taught.pool, "--out", tmp_path / "after")
    assert (before.exit_code, after.exit_code) == (0, 0), before.output + after.output
    assert all(word in after.stdout for word in ("toy_ranked", "acc", "stderr", "4"))
    kept = read_json(tmp_path / "after" / "lm-eval.json")
    assert kept["routing"] == "analytic"
    scores = [row["score"] for row in read_jsonl(tmp_path / "after" / "toy_ranked.jsonl")]
    assert kept["results"]["toy_ranked"]["acc,none"] == sum(scores) / len(scores)
    assert kept["n-samples"]["toy_ranked"]["effective"] == len(scores) == 4
    assert run("gate", tmp_path / "before", tmp_path / "after", "--max-base-forgetting", 100).exit_code == 0


def test_an_unknown_task_is_told_with_the_nearest_and_a_missing_folder_too(tmp_path):
    with pytest.raises(UserError, match="Did you mean 'toy_said'"):
        check_names(["toy_seen", "toy_sayd"], [*TEXT, *IMAGES], harness="lm-eval")
    with pytest.raises(UserError, match="is no folder"):
        check_names(["toy_seen"], IMAGES, harness="lm-eval", include_path=tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--harness", "lm-evil", "--tasks", "toy_said"), "Did you mean 'lm-eval'?"),
        (("--harness", "lm-eval", "--task", "capital"), "Give --task"),
        (("--tasks", "toy_said"), "Give --task"),
    ],
)
def test_what_cannot_be_run_is_said(desk, tmp_path, monkeypatch, words, said):
    folder, taught = desk
    result = run("eval", *words, "--include-path", folder / "tasks", "--model", taught.model, "--out", tmp_path)
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())


def test_the_pages_task_and_python_run(desk, tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[1] / "docs" / "evaluation_harnesses.md").read_text(encoding="utf-8")
    blocks = {kind: re.search(rf"^```{kind}\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)[1] for kind in ("yaml", "python")}
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "colours.yaml").write_text(blocks["yaml"])
    rows = [{"question": "what colour?", "answer": colour} for colour in ("red", "green", "blue")]
    (tmp_path / "colours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "my-model").symlink_to(desk[1].model)
    (tmp_path / "my-pool").symlink_to(desk[1].pool)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    exec(blocks["python"], {})
    assert float(capsys.readouterr().out) == pytest.approx(1 / 3)  # the same question each time: one colour is right
