"""Elastic weight consolidation: what mattered for earlier tasks is held back by springs."""

import zlib

import torch
from torch import Tensor, nn

from alula.data.collate import Collator
from alula.data.stream import Task
from alula.errors import UserError
from alula.methods.additions.aside import evaluating
from alula.methods.additions.base import ADDITIONS, Addition
from alula.methods.base import METHODS, Method
from alula.objectives.next_token import next_token_loss, num_targets

FISHER, ANCHOR = "fisher", "anchor"


@ADDITIONS.register("ewc")
class EWC(Addition):
    """Adds ``weight / 2 * sum F (theta - anchor) ** 2``, with the diagonal Fisher information F of the earlier tasks.

    After each task F is estimated on some of its samples, one backward each: the squared gradient of the log-likelihood of
    the sample's targets (the data's own answers: the empirical Fisher), averaged over the samples.

    The penalties of all earlier tasks are one quadratic: their F add up, their anchors are averaged with F as the weight.
    So two tensors a parameter are kept for any number of tasks, and only a constant is lost.

    Args:
        weight: of the penalty (0 or more): the lambda of the paper, whose size depends on the loss. Default 100, ours.
        num_samples: samples (1 or more) that F is estimated on; all of them if a task has fewer. Default 64, ours.
        decay: None: every earlier task counts fully, as in the paper. A share (0-1): the online form, in which the
            former F counts so much and the anchor is the last task's values.

    Source: Kirkpatrick et al. 2017, "Overcoming catastrophic forgetting in neural networks", eq. 3 (arXiv 1612.00796);
    online form: Schwarz et al. 2018, "Progress & Compress", sec. 4 (arXiv 1805.06370).

    Raises:
        UserError: a value out of range, or a method that gives each task parameters of its own.
    """

    reads_weights = True

    def __init__(
        self,
        method: Method,
        model: nn.Module,
        *,
        collator: Collator,
        weight: float = 100.0,
        num_samples: int = 64,
        decay: float | None = None,
    ) -> None:
        super().__init__(method, model, collator=collator)
        if not method.shares_parameters:
            known = ", ".join(name for name in METHODS if METHODS[name].shares_parameters)
            raise UserError(
                f"ewc came for {method.name}, in which every task has parameters of its own, new ones without an earlier value to hold "
                f"them to. Methods that go on training the same parameters are accepted: {known}. Take ewc out, or choose one of them."
            )
        if weight < 0 or num_samples < 1 or (decay is not None and not 0 <= decay <= 1):
            wanted = "a weight from 0 up, 1 or more samples and a decay from 0 to 1 are accepted"
            raise UserError(f"weight: {weight}, num_samples: {num_samples} and decay: {decay} came; {wanted}. Correct them.")
        self.weight, self.num_samples, self.decay = float(weight), num_samples, decay
        self.fisher: dict[str, Tensor] = {}
        self.anchor: dict[str, Tensor] = {}

    def parts(self, model: nn.Module, batch: dict[str, Tensor], logits: Tensor, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """The penalty beside the other parts; none in the first task."""
        if not self.fisher:
            return parts
        # In the model's order: that of a loaded checkpoint is another, and with it the last bit of the sum.
        known = [(name, parameter) for name, parameter in model.named_parameters() if name in self.fisher]
        pulls = [(self.fisher[name] * (parameter.float() - self.anchor[name]).square()).sum() for name, parameter in known]
        return {**parts, "ewc": self.weight / 2 * torch.stack(pulls).sum()}

    def end_task(self, model: nn.Module, task: Task) -> None:
        """Adds the task's Fisher information and where its parameters are."""
        parameters = {name: parameter for name, parameter in model.named_parameters() if name in self.method.trained}
        for name, fisher in self.estimate(model, task, parameters).items():
            now = parameters[name].detach().float()
            before, anchor = self.fisher.get(name, torch.zeros_like(fisher)), self.anchor.get(name, now)
            if self.decay is not None:
                self.fisher[name], self.anchor[name] = self.decay * before + fisher, now.clone()
                continue
            total = before + fisher
            share = torch.where(total > 0, fisher / total.clamp(min=torch.finfo(total.dtype).tiny), 1.0)
            self.fisher[name], self.anchor[name] = total, anchor + share * (now - anchor)

    def estimate(self, model: nn.Module, task: Task, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        """The diagonal of the Fisher information of `task`, in fp32."""
        device = next(model.parameters()).device
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.method.settings.seed}/ewc/{task.name}".encode()))
        drawn = torch.randperm(len(task.train), generator=generator)[: self.num_samples].tolist()
        found = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in parameters.items()}
        trains = {name: parameter.requires_grad for name, parameter in parameters.items()}
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        with evaluating(model), torch.enable_grad():
            for index in drawn:
                batch = {key: value.to(device) for key, value in self.collator([task.train[index]]).items()}
                count = num_targets(batch["labels"])
                loss = next_token_loss(self.method.logits(model, batch), batch["labels"]) * count
                if count == 0 or not loss.requires_grad:  # a text-only sample knows nothing of a connector
                    continue
                gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
                for name, gradient in zip(parameters, gradients, strict=True):
                    if gradient is not None:
                        found[name] += gradient.float().square() / len(drawn)
        for name, parameter in parameters.items():
            parameter.requires_grad_(trains[name])
        return found

    def state_dict(self) -> dict[str, Tensor]:
        """Fisher information and anchors, by parameter."""
        owned = {FISHER: self.fisher, ANCHOR: self.anchor}
        return {f"{kind}/{name}": tensor for kind, tensors in owned.items() for name, tensor in tensors.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Puts them back."""
        self.fisher, self.anchor = (
            {name.removeprefix(f"{kind}/"): tensor for name, tensor in state.items() if name.startswith(f"{kind}/")}
            for kind in (FISHER, ANCHOR)
        )
