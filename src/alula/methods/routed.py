"""One expert per task and a router over them: what is stored never changes, so only the selection can drift."""

import zlib
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from alula.context import BASE, OFF, Routing
from alula.data.sample import Sample
from alula.data.stream import Task
from alula.data.tasks import general_prompts
from alula.errors import UserError, nearest
from alula.methods.base import METHODS, Arm, Method, Stage
from alula.mixture import Mixtures, attach, observe
from alula.routers.named import ROUTINGS
from alula.training.settings import TrainSettings

ORACLE, UNIFORM, GENERAL = "oracle", "uniform", "general"


@METHODS.register("routed")
class Routed(Method):
    """Per task: a LoRA expert trained alone, then what its routers need, with data and compute fixed in the number of tasks.

    Stages: ``expert`` (LoRA, the rest frozen), ``gate`` (only its gate vectors; left out if no arm uses gates),
    ``statistics`` (one forward pass over some of the task's samples, no gradient); after the first task ``general``, the
    same over general text.

    Args:
        arms: how the experts are chosen at test time; each is scored apart. Besides `ROUTINGS`: ``oracle`` (told the
            task) and ``uniform`` (all with equal weight).
        gate_steps, gate_learning_rate: optimizer steps and rate of the gate stage. PHATGOOSE: 100 steps at 5e-3.
        statistics_samples: samples; how many of the task's training samples the closed-form router sees.

    Source: arXiv 2511.01831 (*reconstructed* from PHATGOOSE, arXiv 2402.05859); the analytic router is ours.
    """

    shares_parameters = False
    can_shard = True

    def __init__(
        self,
        model: nn.Module,
        *,
        settings: TrainSettings,
        rank: int = 8,
        alpha: float | None = None,
        linears: Sequence[str] | str | None = None,
        layers: Sequence[int] | None = None,
        arms: Sequence[str] = ("analytic",),
        gate_steps: int = 100,
        gate_learning_rate: float = 5e-3,
        statistics_samples: int = 256,
        mixtures: Mixtures | None = None,
    ) -> None:
        super().__init__(model, settings=settings)
        for arm in arms:
            if arm not in (*ROUTINGS, ORACLE, UNIFORM):
                raise UserError(f"Unknown arm '{arm}'. {nearest(arm, (*ROUTINGS, ORACLE, UNIFORM))}")
        self.mixtures: Mixtures = mixtures or attach(model, linears=linears, layers=layers)
        self.rank, self.alpha = rank, alpha
        self.arm_names = tuple(arms)
        self.gate_steps, self.gate_learning_rate = gate_steps, gate_learning_rate
        self.statistics_samples = statistics_samples
        self._task, self._stage = "", ""
        self._knows_base = BASE in self.mixtures.prompt_router.names

    @property
    def _routings(self) -> list[Routing]:
        return [ROUTINGS[arm] for arm in self.arm_names if arm in ROUTINGS]

    def begin_task(self, model: nn.Module, task: Task) -> None:
        """A new, silent expert. Its first values depend on the seed and the task's name, not on the order of tasks."""
        self._task = task.name
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.settings.seed}/{task.name}".encode()))
        self.mixtures.grow(task.name, rank=self.rank, alpha=self.alpha, generator=generator)

    def stages(self, task: Task) -> tuple[Stage, ...]:
        """Expert, gate if an arm needs it, statistics if one needs them."""
        settings = self.settings
        stages = [Stage(name="expert", steps=settings.steps * task.num_merged, learning_rate=settings.rate)]
        if any(routing.router == "gate" for routing in self._routings):
            stages.append(Stage(name="gate", steps=self.gate_steps * task.num_merged, learning_rate=self.gate_learning_rate))
        if any(routing.router == "analytic" or routing.level == "combined" for routing in self._routings):
            count = min(self.statistics_samples, len(task.train))
            stages.append(self._forward_only("statistics", count))
        needs_base = any(routing.router == "analytic" or routing.null == "zero_expert" for routing in self._routings)
        if needs_base and not self._knows_base and self.mixtures.names[:1] == [task.name]:
            stages.append(self._forward_only(GENERAL, len(general_prompts())))
        return tuple(stages)

    def _forward_only(self, name: str, samples: int) -> Stage:
        return Stage(name=name, steps=-(-samples // self.settings.batch_size), learning_rate=0.0, gradient=False)

    def training_data(self, task: Task) -> Sequence[Sample]:
        """The task's samples; in the stage ``general``, once per pool, general text that belongs to no task."""
        return general_prompts() if self._stage == GENERAL else task.train

    def begin_stage(self, model: nn.Module, task: Task, stage: Stage) -> None:
        """Says what trains and which expert speaks."""
        self._task, self._stage = task.name, stage.name
        if stage.name == "expert":
            self.mixtures.train_expert(task.name)
            self.mixtures.routing = Routing(fixed={task.name: 1.0})
        elif stage.name == "gate":
            self.mixtures.train_gate(task.name)
            self.mixtures.routing = Routing(gate_of=task.name)
        else:
            self.mixtures.freeze()

    def base_model(self, model: nn.Module) -> AbstractContextManager[None]:
        """No expert speaks."""
        return self.mixtures.using(OFF)

    def observe(self, model: nn.Module, batch: dict[str, Tensor]) -> None:
        """Adds a batch to the sums of the task, or of the base model (so that prompts of no task can go there)."""
        token_level = any(routing.router == "analytic" and routing.level != "sample" for routing in self._routings)
        if self._stage == GENERAL:
            zero_expert = any(routing.null == "zero_expert" for routing in self._routings)
            observe(self.mixtures, BASE, batch, tokens=token_level or zero_expert)
        else:
            observe(self.mixtures, self._task, batch, tokens=token_level)

    def end_task(self, model: nn.Module, task: Task) -> None:
        """Freezes everything and recomputes what follows from the trained experts."""
        self.mixtures.freeze()
        self.mixtures.refresh()
        self.mixtures.routing = self._routings[0] if self._routings else Routing(fixed={})

    def arms(self) -> tuple[Arm, ...]:
        """One per way of choosing experts; with the oracle a task's score is settled once it was learnt."""
        return tuple(self._arm(name) for name in self.arm_names)

    def _arm(self, name: str) -> Arm:
        if name == ORACLE:
            return Arm(name=name, enter=lambda task: self.mixtures.using(self._oracle(task)), is_settled=True)
        if name == UNIFORM:
            return Arm(name=name, enter=lambda task: self.mixtures.using(self._uniform()))
        routing = ROUTINGS[name]
        around = self.mixtures.director.on_prompts
        return Arm(name=name, enter=lambda task: self.mixtures.using(routing), around=around, is_routed=True)

    def _oracle(self, task: Task) -> Routing:
        return Routing(fixed={task.name: 1.0} if task.name in self.mixtures.names else {})

    def _uniform(self) -> Routing:
        names = self.mixtures.names
        return Routing(fixed={name: 1.0 / len(names) for name in names})

    def state_dict(self) -> dict[str, Tensor]:
        """The routers' sums; experts and gates are parameters and saved as such."""
        return {
            f"{name}/{key}": tensor
            for name in (*self.mixtures.names, BASE)
            for key, tensor in self.mixtures.router_tensors(name).items()
            if not key.endswith(".gate")
        }

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Puts the routers' sums back."""
        for name in sorted({key.split("/", 1)[0] for key in tensors}):
            own = {key.split("/", 1)[1]: tensor for key, tensor in tensors.items() if key.startswith(f"{name}/")}
            self.mixtures.restore_router(name, own)
        self.mixtures.refresh()


@METHODS.register("specialist")
class Specialist(Routed):
    """One expert per task, told at test time which one to use: what perfect routing would give.

    Bit-identical to the experts of `routed` with the same seed, so its scores are those of the arm ``oracle``.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        settings: TrainSettings,
        rank: int = 8,
        alpha: float | None = None,
        linears: Sequence[str] | str | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__(model, settings=settings, rank=rank, alpha=alpha, linears=linears, layers=layers, arms=(ORACLE,))
