"""A training batch whose samples belong to different experts: each sample teaches its own expert, as if the others were not there."""

import pytest
import torch

from alula import Collator
from alula.context import Routing
from alula.objectives.next_token import IGNORED
from resume_worker import pictures
from taught_experts import speaking
from zoo import build

NAMES = ("one", "two", "three")
OWNERS = (0, 1, 0, 1)  # of each sample; the third expert is nobody's


def costs(model, batch):
    """Nats of the targets of each sample, summed."""
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    return (
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
        .view_as(labels)
        .sum(-1)
    )


@pytest.fixture(scope="module")
def mixed():
    """A model with three experts that train, a batch, and the gradients that each sample of it gives to all of them."""
    model, processor = build("llava")
    mixtures = speaking(model, *NAMES)
    parameters = {}
    for path, mixture in mixtures.sites.items():
        for index, name in enumerate(NAMES):
            parameters |= {(name, path, kind): getattr(mixture.experts, kind)[index].requires_grad_() for kind in "AB"}
    batch = Collator(processor)([*pictures("red or not", 2), *pictures("and which colour is this", 2)])
    decision = torch.full((len(OWNERS), len(NAMES)), -torch.inf)
    decision[range(len(OWNERS)), OWNERS] = 0.0
    with mixtures.using(Routing(router="analytic", level="sample", top_k=1)), mixtures.director.deciding(decision):
        losses = costs(model, batch)
        found = [
            dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True), strict=True))
            for loss in losses
        ]
    return model, mixtures, batch, parameters, losses.detach(), found


def test_the_gradient_of_a_sample_reaches_its_own_expert_and_no_other(mixed):
    *_, found = mixed
    for owner, gradients in zip(OWNERS, found, strict=True):
        for (name, path, kind), gradient in gradients.items():
            if name == NAMES[owner]:
                assert gradient is not None and gradient.any(), (name, path, kind)
            else:
                assert gradient is None or not gradient.any(), (name, path, kind)


def test_losses_and_gradients_are_those_of_a_loop_over_the_experts(mixed):
    """Each expert alone on the rows that are its own, as PEFT would train it."""
    model, mixtures, batch, parameters, losses, found = mixed
    for index, name in enumerate(NAMES[:2]):
        rows = [row for row, owner in enumerate(OWNERS) if owner == index]
        own = {key: parameter for key, parameter in parameters.items() if key[0] == name}
        with mixtures.using(Routing(fixed={name: 1.0})):
            alone = costs(model, {key: value[rows] for key, value in batch.items()})
            expected = torch.autograd.grad(alone.sum(), list(own.values()))
        torch.testing.assert_close(losses[rows], alone.detach(), rtol=1e-6, atol=1e-5)
        for key, one in zip(own, expected, strict=True):
            torch.testing.assert_close(sum(found[row][key] for row in rows), one, rtol=1e-5, atol=1e-6 * max(1.0, float(one.abs().max())))


def test_an_expert_that_no_sample_asks_for_stays_bit_identical_after_a_step(mixed):
    *_, parameters, _, found = mixed
    before = {key: parameter.detach().clone() for key, parameter in parameters.items()}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
    for key, parameter in parameters.items():
        gradients = [gradients[key] for gradients in found if gradients[key] is not None]
        parameter.grad = sum(gradients) if gradients else None
    optimizer.step()
    after = {key: parameter.detach().clone() for key, parameter in parameters.items()}
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(before[key])
            parameter.grad = None
    changed = {key[0] for key, value in after.items() if not torch.equal(value, before[key])}
    assert changed == {"one", "two"}
