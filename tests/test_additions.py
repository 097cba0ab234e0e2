"""Additions to methods: each does what its equation says, they compose in any recipe, and a resumed run is the same run."""

import math
from dataclasses import replace

import pytest
import torch
import yaml
from torch.nn import functional

from alula import Collator
from alula.config import check_recipe, write_recipe
from alula.context import Routing
from alula.data.sample import Sample
from alula.data.stream import Stream, Task
from alula.errors import UserError
from alula.files import read_jsonl
from alula.methods import ADDITIONS, METHODS, Method, compose
from alula.methods.additions.aside import evaluating, holding
from alula.methods.additions.o_lora import overlap
from alula.methods.base import plain_logits
from alula.models.anatomy import anatomy
from alula.objectives import distillation_loss, next_token_loss, soft_target_loss
from alula.running.cell import make_method
from alula.running.cells import list_cells
from alula.training import Trainer
from resume_worker import SETTINGS, collate, pictures, samples, stream, tiny_model
from test_resume import Fragile, Interrupted
from zoo import build

ONE_STEP = SETTINGS.model_copy(update={"steps": 1, "micro_batch_size": None})


def tiny(name, *additions, settings=SETTINGS, **options):
    """A method on a tiny text model without dropout, with additions: names or (name, options)."""
    model = tiny_model().eval()
    method = METHODS[name](model, settings=settings, **options)
    pairs = [(entry, {}) if isinstance(entry, str) else entry for entry in additions]
    return model, compose(model, method, pairs, collator=collate)


def learn(model, method, tasks=None, *, folder=None, collator=collate):
    trainer = Trainer(model, method, collator, settings=method.settings, folder=folder)
    return list(trainer.learn(tasks or stream()))


# --- soft targets ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def judged():
    """Logits with gradient, and labels of two rows: four targets at ten positions."""
    labels = torch.tensor([[3, -100, 2, -100, 4, 0], [-100, -100, -100, 6, -100, -100]])
    return torch.randn(2, 6, 7, requires_grad=True), labels


def test_soft_targets_without_doubt_are_cross_entropy(judged):
    torch.testing.assert_close(soft_target_loss(*judged, alpha=0.0), next_token_loss(*judged))


def test_soft_targets_are_label_smoothing(judged):
    logits, labels = judged
    vocab, alpha = logits.shape[-1], 0.03
    targets = labels[:, 1:] != -100
    smoothed = functional.cross_entropy(logits[:, :-1][targets], labels[:, 1:][targets], label_smoothing=alpha * vocab / (vocab - 1))
    torch.testing.assert_close(soft_target_loss(logits, labels, alpha=alpha), smoothed)


def test_diluted_soft_targets_are_the_authors_path(judged):
    logits, labels = judged
    expected = torch.zeros(2, 5, 7)
    for row, place in (labels[:, 1:] != -100).nonzero().tolist():
        expected[row, place] = 0.01 / 6
        expected[row, place, labels[row, place + 1]] = 0.99
    # an all-zero target where nothing is learnt, and the mean over all positions
    by_hand = functional.cross_entropy(logits[:, :-1].flatten(0, 1), expected.flatten(0, 1))
    torch.testing.assert_close(soft_target_loss(logits, labels, alpha=0.01, dilute=True), by_hand)


def test_masked_rows_get_no_gradient_from_soft_targets(judged):
    logits, labels = judged
    soft_target_loss(logits, labels).backward()
    assert (logits.grad.abs().sum(-1)[:, :-1] > 0).tolist() == (labels[:, 1:] != -100).tolist()


def test_soft_targets_replace_the_plain_loss():
    model, method = tiny("finetune_full", ("soft_targets", {"alpha": 0.1}))
    batch = collate(samples("first", 4))
    with torch.no_grad():
        parts = method.loss(model, batch)
    assert list(parts) == ["next_token"]
    assert torch.equal(parts["next_token"], soft_target_loss(plain_logits(model, batch), batch["labels"], alpha=0.1))


# --- rehearsal ------------------------------------------------------------------------------------------------------------


def long_stream():
    base = Task(name="base", train=samples("base", 50), test=[], is_base=True)
    return Stream(tasks=tuple(Task(name=name, train=samples(name, size), test=[]) for name, size in LONG.items()), base_tasks=(base,))


LONG = {"a": 200, "b": 300, "c": 100}


def mixed(options, *, name="c", seed=0):
    """The ids of what is learnt with a task besides its own samples."""
    model, method = tiny("finetune", ("rehearsal", options), settings=SETTINGS.model_copy(update={"seed": seed}))
    tasks = method.arrange(long_stream()).tasks
    task = next(task for task in tasks if task.name == name)
    method.begin_task(model, task)
    for stage in method.stages(task):
        method.begin_stage(model, task, stage)
    data = method.training_data(task)
    assert list(data[: len(task.train)]) == list(task.train)
    return [sample.id for sample in data[len(task.train) :]]


def of(ids, name):
    return [found for found in ids if found.startswith(f"{name} ")]


def test_one_percent_of_each_earlier_task_is_rehearsed_and_no_base_task():
    assert mixed({}, name="a") == []
    assert [len(of(mixed({}, name="b"), name)) for name in ("a", "b", "base")] == [2, 0, 0]
    found = mixed({})
    assert [len(of(found, name)) for name in ("a", "b", "c", "base")] == [2, 3, 0, 0]
    assert len(set(found)) == 5


def test_what_is_rehearsed_follows_from_the_seed_and_stays_in_memory():
    options = {"ratio": 0.05}
    assert mixed(options) == mixed(options)
    assert mixed(options) != mixed(options, seed=1)
    assert of(mixed(options), "a") == mixed(options, name="b")


@pytest.mark.parametrize("policy", ["per_task", "reservoir"])
def test_the_memory_has_the_size_it_was_given(policy):
    options = {"memory_size": 31, "policy": policy}
    assert len(set(mixed(options, name="b"))) == len(set(mixed(options))) == 31


def test_per_task_memory_is_shared_equally_and_only_shrinks():
    found = mixed({"memory_size": 31})
    assert [len(of(found, name)) for name in ("a", "b")] == [16, 15]
    assert set(of(found, "a")) < set(mixed({"memory_size": 31}, name="b"))


def test_a_reservoir_holds_every_sample_with_equal_probability():
    counts = [len(of(mixed({"memory_size": 100, "policy": "reservoir"}, seed=seed), "a")) for seed in range(20)]
    assert sum(counts) / 20 == pytest.approx(40, abs=4)  # 200 of 500; the mean's standard deviation is 1


def test_a_stage_for_images_rehearses_only_images():
    model, processor = build("llava")
    method = METHODS["wings"](model, settings=SETTINGS, rank=2)
    method = compose(model, method, [("rehearsal", {"ratio": 1.0})], collator=Collator(processor))
    both = Task(name="both", train=[*pictures("both", 3), *samples("both", 2)], test=[])
    tasks = method.arrange(Stream(tasks=(both, Task(name="now", train=pictures("now", 4), test=[])))).tasks
    sizes = []
    for stage in method.stages(tasks[1]):
        method.begin_stage(model, tasks[1], stage)
        sizes.append(len(method.training_data(tasks[1])))
    assert sizes == [4 + 3, 4 + 5]


def test_statistics_are_of_the_task_alone():
    model, method = tiny("routed", ("rehearsal", {"ratio": 1.0}), statistics_samples=4)
    task = method.arrange(stream()).tasks[1]
    method.begin_task(model, task)
    sizes = {}
    for stage in method.stages(task):
        method.begin_stage(model, task, stage)
        sizes[stage.name] = len(method.training_data(task))
    assert (sizes["expert"], sizes["statistics"]) == (22, 11)


# --- distillation ---------------------------------------------------------------------------------------------------------


def test_distillation_is_zero_where_student_and_teacher_agree(judged):
    logits, labels = judged
    assert distillation_loss(logits, logits.detach(), labels).item() == 0.0
    assert distillation_loss(logits, logits.detach() + 3.0, labels).item() == pytest.approx(0.0, abs=1e-6)


def test_distillation_is_the_scaled_divergence_at_the_targets(judged):
    logits, labels = judged
    teacher, targets = torch.randn(2, 6, 7), labels[:, 1:] != -100
    p, q = ((scores[:, :-1][targets] / 3.0).softmax(-1) for scores in (teacher, logits))
    by_hand = (p * (p / q).log()).sum(-1).mean() * 9.0
    torch.testing.assert_close(distillation_loss(logits, teacher, labels, temperature=3.0), by_hand)


@pytest.mark.parametrize("teacher", ["base", "previous"])
def test_at_birth_the_teacher_says_what_the_untouched_model_says(teacher):
    model, method = tiny("finetune", ("distillation", {"teacher": teacher}))
    task = stream().tasks[0]
    method.begin_task(model, task)
    method.begin_stage(model, task, method.stages(task)[0])
    batch = collate(samples("first", 4))
    model.train()  # dropout must not reach the teacher
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.experts.B[0].normal_()
        said = method.additions["distillation"].teacher_logits(model, batch)
        assert torch.equal(said, tiny_model().eval()(**{key: batch[key] for key in ("input_ids", "attention_mask")}).logits)
    assert model.training and model.model.layers[1].self_attn.training


def test_the_previous_teacher_is_the_model_after_the_last_task():
    model, method = tiny("finetune_full", ("distillation", {"teacher": "previous"}))
    batch, said = collate(samples("first", 4)), []
    trainer = Trainer(model, method, collate, settings=SETTINGS, folder=None)
    for _ in trainer.learn(stream()):
        with torch.no_grad():
            said.append((plain_logits(model, batch), method.additions["distillation"].teacher_logits(model, batch)))
    assert torch.equal(said[0][0], said[1][1])
    assert not torch.equal(said[1][0], said[1][1])


def test_a_forward_with_other_values_does_not_disturb_a_backward():
    model = tiny_model().eval()
    inputs = {key: value for key, value in collate(samples("first", 4)).items() if key != "labels"}
    wanted = torch.autograd.grad(model(**inputs).logits.square().mean(), list(model.parameters()))
    loss = model(**inputs).logits.square().mean()
    with torch.no_grad(), holding(model, {name: torch.zeros_like(value) for name, value in model.named_parameters()}):
        assert not model(**inputs).logits.any()
    for one, two in zip(torch.autograd.grad(loss, list(model.parameters())), wanted, strict=True):
        assert torch.equal(one, two)


def test_the_base_is_refused_as_teacher_where_its_weights_train():
    for name, options in (("finetune_full", {}), ("wings", {})):
        model, processor = build("llava")
        method = METHODS[name](model, settings=SETTINGS, **options)
        with pytest.raises(UserError, match="trains the model's own weights"):
            compose(model, method, [("distillation", {})], collator=Collator(processor))


# --- elastic weight consolidation -----------------------------------------------------------------------------------------


def after_one_task(**options):
    """A fully fine-tuned model with its penalty, and a batch."""
    model, method = tiny("finetune_full", ("ewc", options))
    next(iter(Trainer(model, method, collate, settings=SETTINGS, folder=None).learn(stream())))
    return model, method, method.additions["ewc"]


def test_the_penalty_is_zero_at_the_anchor_and_pulls_by_weight_fisher_and_distance():
    model, method, ewc = after_one_task(weight=7.0, num_samples=3)
    batch = collate(samples("first", 2))
    model.requires_grad_(True)
    assert method.loss(model, batch)["ewc"].item() == 0.0
    moves = {name: torch.randn_like(value) for name, value in ewc.anchor.items()}
    known = dict(model.named_parameters())
    with torch.no_grad():
        for name, move in moves.items():
            known[name] += move
    pulls = torch.autograd.grad(method.loss(model, batch)["ewc"], [known[name] for name in moves])
    for (name, anchor), pull in zip(ewc.anchor.items(), pulls, strict=True):
        torch.testing.assert_close(pull, 7.0 * ewc.fisher[name] * (known[name].detach() - anchor))


def test_fisher_information_is_the_mean_squared_gradient_of_a_sample():
    model, _, ewc = after_one_task(num_samples=99)
    model.eval()
    name, parameter = next((name, value) for name, value in model.named_parameters() if name.endswith("layers.1.mlp.up_proj.weight"))
    by_hand = torch.zeros_like(parameter)
    for sample in stream().tasks[0].train:
        batch = collate([sample])
        log_likelihood = -next_token_loss(plain_logits(model, batch), batch["labels"]) * len(sample.answer)
        by_hand += torch.autograd.grad(log_likelihood, parameter)[0].square() / 11
    torch.testing.assert_close(ewc.fisher[name], by_hand)


def test_penalties_of_two_tasks_are_one_quadratic():
    model, method, ewc = after_one_task(num_samples=4)
    first = {name: (ewc.fisher[name].clone(), ewc.anchor[name].clone()) for name in ewc.fisher}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    second = stream().tasks[1]
    parameters = {name: value for name, value in model.named_parameters() if name in method.trained}
    alone = ewc.estimate(model, second, parameters)
    ewc.end_task(model, second)
    for name, parameter in parameters.items():
        place = parameter.detach() + 0.1
        (fisher, anchor), now = first[name], parameter.detach()
        pull = fisher * (place - anchor) + alone[name] * (place - now)
        torch.testing.assert_close(ewc.fisher[name] * (place - ewc.anchor[name]), pull)


def test_online_consolidation_keeps_the_last_anchor_and_decays():
    model, _, ewc = after_one_task(num_samples=2, decay=0.5)
    before = {name: value.clone() for name, value in ewc.fisher.items()}
    task = stream().tasks[0]
    ewc.end_task(model, task)
    for name, parameter in model.named_parameters():
        if name in before:
            assert torch.equal(ewc.anchor[name], parameter)
            torch.testing.assert_close(ewc.fisher[name], 1.5 * before[name])


# --- O-LoRA ---------------------------------------------------------------------------------------------------------------


def test_orthogonal_experts_do_not_overlap():
    rows = torch.linalg.qr(torch.randn(16, 6)).Q.T
    assert overlap(rows[:4], rows[4:]).item() == pytest.approx(0.0, abs=1e-10)
    assert overlap(rows[:4], rows[2:6] * 3.0).item() == pytest.approx(2 * 9.0, rel=1e-5)


def test_the_penalty_of_o_lora_is_the_sum_over_sites_and_earlier_experts():
    model, method = tiny("routed", ("o_lora", {"weight": 2.0}), arms=(), rank=2)
    mixtures = method.mixtures
    for task in (stream().tasks[0], replace(stream().tasks[0], name="between"), stream().tasks[1]):
        method.begin_task(model, task)
        method.begin_stage(model, task, method.stages(task)[0])
    assert mixtures.routing == Routing(fixed={"first": 1.0, "between": 1.0, "second": 1.0})
    by_hand = sum(
        2.0 * (mixture.experts.A[i] @ mixture.experts.A[2].T).square().sum() for mixture in mixtures.sites.values() for i in (0, 1)
    )
    parts = method.loss(model, collate(samples("second", 2)))
    torch.testing.assert_close(parts["o_lora"], by_hand)


def test_o_lora_makes_experts_more_orthogonal_and_leaves_the_earlier_ones_alone():
    found, first = [], []
    for weight in (0.0, 10.0):
        model, method = tiny("routed", ("o_lora", {"weight": weight}), arms=(), rank=2)
        learn(model, method)
        sites = method.mixtures.sites.values()
        found.append(sum(overlap(site.experts.A[0], site.experts.A[1]).item() for site in sites))
        first.append([site.experts.A[0] for site in sites])
    assert found[1] < found[0]
    assert all(torch.equal(one, two) for one, two in zip(*first, strict=True))


def test_the_arm_sum_uses_every_expert_at_once():
    model, method = tiny("specialist", "o_lora", rank=2)
    learn(model, method)
    assert [arm.name for arm in method.arms()] == ["oracle", "sum"]
    with method.arms()[1].enter(stream().tasks[0]):
        assert method.mixtures.current == Routing(fixed={"first": 1.0, "second": 1.0})


# --- freezing and replay --------------------------------------------------------------------------------------------------


def test_what_is_frozen_for_all_steps_stays_as_it_was():
    model, method = tiny("finetune", ("freezing", {"part": "model.layers.0", "share": 1.0}))
    learn(model, method)
    moved = {path: bool(mixture.experts.B[0].any()) for path, mixture in method.mixtures.sites.items()}
    assert all(trained == path.startswith("model.layers.1.") for path, trained in moved.items())


@pytest.mark.parametrize(("thaw", "starts"), [("top_down", [3, 0]), ("bottom_up", [0, 3]), ("at_once", [6, 6])])
def test_layers_thaw_one_after_another(thaw, starts):
    model, method = tiny("finetune_full", ("freezing", {"thaw": thaw, "share": 0.6}))
    names = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
    parts = method.additions["freezing"].schedule(names, anatomy(model), steps=10)
    assert list(parts.values()) == [*starts, 6]


def test_freezing_all_that_trains_is_refused():
    model, method = tiny("finetune", "freezing")
    with pytest.raises(UserError, match="leaves nothing to train"):
        learn(model, method)


def talkative():
    """A tiny model that soon comes to an end: every fifth token ends an answer."""
    model, processor = build("llava")
    model.generation_config.eos_token_id = list(range(2, 512, 5))
    method = METHODS["finetune"](model, settings=SETTINGS, rank=2)
    return model, compose(model, method, [("generative_replay", {"num_samples": 6, "max_new_tokens": 24})], collator=Collator(processor))


def test_the_base_model_writes_what_is_replayed_and_keeps_it():
    replays = []
    for change in (0.0, 1.0):
        model, method = talkative()
        with torch.no_grad():
            for mixture in method.mixtures.sites.values():
                mixture.experts.B[0] += change  # an expert must have no say in it
        task = Task(name="one", train=pictures("one", 3), test=[])
        method.begin_stage(model, task, method.stages(task)[0])
        replays.append(method.training_data(task)[3:])
        assert method.training_data(task)[3:] == replays[-1]
    assert replays[0] == replays[1] and len(replays[0]) == 6
    assert all(sample.question and sample.answer and not sample.images for sample in replays[0])
    _, other = talkative()
    other.load_state_dict(method.state_dict())
    assert other.additions["generative_replay"].samples == replays[0]


def test_replayed_samples_can_be_trained_on():
    model, method = talkative()
    tasks = Stream(tasks=(Task(name="one", train=pictures("one", 2), test=[]),))
    (learnt,) = learn(model, method, tasks, collator=method.additions["generative_replay"].collator)
    assert learnt.cost.samples_seen == SETTINGS.steps * SETTINGS.batch_size


# --- composition ----------------------------------------------------------------------------------------------------------


def test_additions_work_in_the_order_of_the_recipe():
    _, method = tiny("finetune", "ewc", "soft_targets", "rehearsal")
    assert list(method.additions) == ["ewc", "soft_targets", "rehearsal"]
    assert method.name == "Finetune + ewc + soft_targets + rehearsal"
    calls = []
    for name, addition in method.additions.items():
        addition.before_step = lambda model, name=name: calls.append(name)
    method.before_step(None)
    assert calls == list(method.additions)


def test_a_part_of_the_loss_sees_what_the_addition_before_it_gave():
    model, method = tiny("finetune", ("soft_targets", {"alpha": 0.5}), "distillation")
    seen = []
    method.additions["distillation"].parts = lambda model, batch, logits, parts: seen.append(dict(parts)) or parts
    batch = collate(samples("first", 2))
    method.loss(model, batch)
    torch.testing.assert_close(seen[0]["next_token"], soft_target_loss(plain_logits(model, batch), batch["labels"], alpha=0.5))


class Own(Method):
    """A method with a loss of its own."""

    def loss(self, model, batch):
        return {}


REFUSED = [
    ("finetune", [("soft_target", {})], "Unknown addition 'soft_target'.*Did you mean 'soft_targets'"),
    ("finetune", [("soft_targets", {"alhpa": 1})], "Addition 'soft_targets' cannot be made.*alhpa"),
    ("finetune", [("soft_targets", {"alpha": 1.0})], "alpha: 1.0 came"),
    ("finetune", [("ewc", {}), ("ewc", {})], "comes twice"),
    ("finetune", [("ewc", {"num_samples": 0})], "num_samples: 0"),
    ("finetune", [("o_lora", {})], "no LoRA expert per task"),
    ("finetune_full", [("o_lora", {})], "no LoRA expert per task"),
    ("routed", [("ewc", {})], "every task has parameters of its own"),
    ("finetune", [("rehearsal", {"memory_size": 3, "ratio": 0.1})], "one of them is accepted"),
    ("finetune", [("rehearsal", {"policy": "reservoir"})], "without memory_size"),
    ("finetune", [("rehearsal", {"ratio": 1})], None),
    ("finetune", [("rehearsal", {"ratio": 2})], "ratio: 2 came"),
    ("finetune", [("distillation", {"teacher": "last"})], "Unknown teacher 'last'"),
    ("finetune", [("freezing", {"part": "decodr"})], "Unknown part 'decodr'.*'decoder'"),
    ("finetune", [("generative_replay", {"temperature": 0})], "temperature: 0 came"),
]


@pytest.mark.parametrize(("name", "additions", "says"), REFUSED)
def test_what_does_not_fit_is_refused_with_words(name, additions, says):
    if says is None:
        assert tiny(name, *additions)
        return
    with pytest.raises(UserError, match=says):
        tiny(name, *additions)


def test_a_method_with_a_loss_of_its_own_takes_no_additions():
    model = tiny_model()
    with pytest.raises(UserError, match="loss` of its own"):
        compose(model, Own(model, settings=SETTINGS), [], collator=collate)


def test_without_additions_a_composed_method_is_the_method(tmp_path):
    model = tiny_model()
    learn(model, METHODS["finetune"](model, settings=SETTINGS), folder=tmp_path / "plain")
    again, method = tiny("finetune")
    learn(again, method, folder=tmp_path / "composed")
    assert all(torch.equal(again.state_dict()[path], value) for path, value in model.state_dict().items())
    assert (tmp_path / "plain/losses.jsonl").read_bytes() == (tmp_path / "composed/losses.jsonl").read_bytes()


RECIPE = {
    "tasks": ["easy_vqa"],
    "methods": [
        {
            "name": "routed",
            "label": "routed_soft_rehearsal",
            "options": {"rank": 2},
            "with": [{"name": "soft_targets", "options": {"alpha": 0.1}}, {"name": "rehearsal", "options": {"ratio": 0.5}}, "distillation"],
        }
    ],
}


def test_a_recipe_says_what_is_added_and_can_be_read_again(tmp_path):
    recipe = check_recipe(RECIPE)
    assert [addition.name for addition in recipe.methods[0].additions] == ["soft_targets", "rehearsal", "distillation"]
    assert check_recipe(yaml.safe_load(write_recipe(recipe))) == recipe
    with pytest.raises(UserError, match=r"unknown key 'methods.0.with.0.option'. Known: name, options. Did you mean 'options'"):
        check_recipe({**RECIPE, "methods": [{"name": "routed", "with": [{"name": "ewc", "option": {}}]}]})
    with pytest.raises(UserError, match=r"Unknown addition 'rehersal'\..*Did you mean 'rehearsal'"):
        list_cells(check_recipe({**RECIPE, "methods": [{"name": "routed", "with": ["rehersal"]}]}), tmp_path)


def test_additions_are_part_of_what_a_cell_is(tmp_path):
    (cell,) = list_cells(check_recipe(RECIPE), tmp_path)
    bare = {**RECIPE["methods"][0], "with": []}
    (other,) = list_cells(check_recipe({**RECIPE, "methods": [bare]}), tmp_path)
    assert cell.identity != other.identity and not other.additions


def test_the_three_of_the_recipe_run_on_routed_and_keep_the_base(tmp_path):
    model, processor = build("llava")
    (cell,) = list_cells(check_recipe(RECIPE), tmp_path)
    cell = replace(cell, settings=SETTINGS, options={"rank": 2, "arms": ("oracle",), "layers": [1, 2]})
    method = make_method(cell, model, Collator(processor))
    tasks = Stream(tasks=tuple(Task(name=name, train=pictures(name, 4), test=[]) for name in ("one", "two")))
    learn(model, method, tasks, folder=tmp_path, collator=Collator(processor))
    rows = read_jsonl(tmp_path / "losses.jsonl")
    assert all(row["parts"].keys() == {"next_token", "distillation"} for row in rows) and len(rows) == 12
    method.mixtures.detach()
    before = build("llava")[0].state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


COMPOSITIONS = {
    "full": ("finetune_full", [("distillation", {"teacher": "previous"}), ("ewc", {"num_samples": 4}), ("rehearsal", {"memory_size": 5})]),
    "lora": ("finetune", ["soft_targets", ("freezing", {"part": "model.layers.0"}), ("ewc", {"num_samples": 2, "decay": 0.9})]),
    "routed": ("routed", ["soft_targets", ("rehearsal", {"memory_size": 5, "policy": "reservoir"}), "o_lora", "distillation"]),
}
OPTIONS = {"routed": {"arms": ("gate",), "gate_steps": 4, "rank": 2}}


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_an_interrupted_composition_resumes_to_the_same_weights(tmp_path, name):
    kind, additions = COMPOSITIONS[name]

    def run(folder, calls):
        model, method = tiny(kind, *additions, **OPTIONS.get(kind, {}))
        learn(model, method, folder=folder, collator=Fragile(collate, calls))
        return model, method

    whole, kept = run(tmp_path / "whole", math.inf)
    for calls in (9, 31):  # in the first task; in the second, or (routed) later in the first
        folder = tmp_path / str(calls)
        with pytest.raises(Interrupted):
            run(folder, min(calls, 19 if kind != "routed" else calls))
        model, method = run(folder, math.inf)
        for path, value in whole.state_dict().items():
            assert torch.equal(model.state_dict()[path], value), path
        assert method.state_dict().keys() == kept.state_dict().keys()
        assert all(torch.equal(method.state_dict()[key], value) for key, value in kept.state_dict().items())
        assert (folder / "losses.jsonl").read_bytes() == (tmp_path / "whole/losses.jsonl").read_bytes()


SHORT = {"wings": {"rank": 2, "connector": False, "visual_ratio": 0.0}, "routed": {"arms": ("oracle",)}}


@pytest.mark.parametrize("name", METHODS.names())
def test_every_method_takes_additions_and_keeps_its_promise_about_the_base(name):
    model, processor = build("llava")
    collator = Collator(processor)
    method = METHODS[name](model, settings=ONE_STEP, **SHORT.get(name, {}))
    try:
        method.base_model(model)
        teacher = "base"
    except UserError:
        teacher = "previous"
    additions = [("soft_targets", {}), ("rehearsal", {"ratio": 0.5}), ("distillation", {"teacher": teacher})]
    method = compose(model, method, additions, collator=collator)
    tasks = Stream(tasks=tuple(Task(name=task, train=pictures(task, 3), test=[]) for task in ("one", "two")))
    learn(model, method, tasks, collator=collator)
    if teacher == "previous":
        return
    untouched, _ = build("llava")
    batch = collator(pictures("one", 2))
    with torch.no_grad(), evaluating(model), method.base_model(model):
        assert torch.equal(plain_logits(model, batch), plain_logits(untouched, batch))
    now = {path.replace(".host.", "."): value for path, value in model.state_dict().items()}
    for path, value in untouched.state_dict().items():
        assert torch.equal(now[path], value), path


def test_every_addition_says_what_it_is_and_lives_where_one_looks_for_it():
    for name in ADDITIONS:
        assert ADDITIONS[name].__doc__.splitlines()[0].endswith((".", ":", ";")) or len(ADDITIONS[name].__doc__.splitlines()[0]) > 20
        assert ADDITIONS[name].__module__ == f"alula.methods.additions.{name}"


def test_text_samples_are_rehearsed_too():
    earlier = Task(name="text", train=[Sample.ask("Capital of Kenya?", "Nairobi")], test=[])
    _, method = tiny("finetune", ("rehearsal", {"ratio": 1.0}))
    tasks = method.arrange(Stream(tasks=(earlier, Task(name="now", train=pictures("now", 2), test=[])))).tasks
    assert method.training_data(tasks[1])[2:] == [earlier.train[0]]
