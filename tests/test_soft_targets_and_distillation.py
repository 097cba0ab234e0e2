"""Soft targets and distillation: each is its equation, and a teacher disturbs nothing."""

import pytest
import torch
from torch.nn import functional

from alula import Collator
from alula.errors import UserError
from alula.methods import METHODS, compose
from alula.methods.additions.aside import holding
from alula.methods.base import plain_logits
from alula.objectives import distillation_loss, next_token_loss, soft_target_loss
from alula.training import Trainer
from resume_worker import SETTINGS, collate, samples, stream, tiny_model
from tiny_methods import tiny
from zoo import build


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
        assert torch.equal(said, plain_logits(tiny_model().eval(), batch))
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


@pytest.mark.parametrize(("teacher", "copies"), [("base", False), ("previous", True)])
def test_the_base_as_teacher_costs_no_second_copy(teacher, copies):
    model, method = tiny("finetune", ("distillation", {"teacher": teacher}))
    task = stream().tasks[0]
    method.begin_task(model, task)
    method.begin_stage(model, task, method.stages(task)[0])
    places = []
    hook = model.register_forward_hook(lambda *args: places.append([parameter.data_ptr() for parameter in model.parameters()]))
    method.loss(model, collate(samples("first", 2)))
    hook.remove()
    student, taught = places
    assert (student != taught) == copies
    assert bool(method.state_dict()) == copies
