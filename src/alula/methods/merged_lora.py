"""LoRA that is merged into the backbone after every task: low-rank steps of full fine-tuning."""

from collections.abc import Sequence

from torch import Tensor, nn

from alula.context import Routing
from alula.data.stream import Task
from alula.errors import UserError
from alula.methods.base import METHODS, Stage
from alula.methods.full import FullDecoder
from alula.mixture import Mixture, attach
from alula.models.anatomy import anatomy
from alula.training.settings import TrainSettings

EXPERT = "update"


@METHODS.register("lora")
class MergedLoRA(FullDecoder):
    """Per task a fresh rank-stabilised LoRA, merged into the backbone's weights when the task ends.

    Only the linear layers of the decoder change; embeddings, head and encoder stay bit-identical. Between tasks the model is
    a plain one, without mixtures. All merged weights must be kept beside the base model: ``out * in`` numbers per linear,
    however small the rank. Merging leaves the outputs as they were, up to rounding in the weights' own type.

    Args:
        rank: width of the update (1 or more); None is half the hidden size, as published. Default 32: ours.
        alpha: the update is scaled by ``alpha / sqrt(rank)``. Default 8, as published.
        linears, layers: where the update sits (see `attach`); None is every linear of the decoder, as published.
        connector, connector_learning_rate: whether and at which peak rate the connector trains too (see `FullDecoder`); it
            does in the study.

    Source: "LoRA" of Srivastava et al. 2025 (arXiv 2410.19925, appendix B.1.2); the scale is that of Kalajdzievski 2023,
    "rsLoRA" (arXiv 2312.03732). Difference: no dropout (there 0.05).

    Raises:
        UserError: no such linear or layer, quantised ones, a rank below 1, or what `FullDecoder` refuses.
    """

    shares_parameters = False  # what an update's factors were in earlier tasks says nothing of the fresh ones

    def __init__(
        self,
        model: nn.Module,
        *,
        settings: TrainSettings,
        rank: int | None = 32,
        alpha: float = 8.0,
        linears: Sequence[str] | str | None = None,
        layers: Sequence[int] | None = None,
        connector: bool = False,
        connector_learning_rate: float | None = None,
    ) -> None:
        super().__init__(model, settings=settings, connector=connector, connector_learning_rate=connector_learning_rate)
        parts = anatomy(model)
        found = parts.linears(model, pattern=linears, layers=layers)  # what cannot be merged is refused before any training
        for path, linear in found.items():
            if not linear.weight.is_floating_point():
                kind = type(linear).__name__
                raise UserError(f"{path} is a {kind}; only plain linear layers can be merged. Load the model unquantised.")
        self.rank = parts.hidden_size // 2 if rank is None else rank
        if self.rank < 1:
            raise UserError(f"rank: {rank} came; 1 or more is accepted, or null for half the hidden size. Choose one such as 32.")
        self.paths, self.linears, self.layers, self.alpha = tuple(found), linears, layers, alpha
        self._has_merged = False

    def begin_task(self, model: nn.Module, task: Task) -> None:
        """A fresh, silent update in every linear."""
        self.mixtures = attach(model, linears=self.linears, layers=self.layers, routers=())
        # `grow` divides by the rank; the rank-stabilised scale divides by its root.
        self.mixtures.grow(EXPERT, rank=self.rank, alpha=self.alpha * self.rank**0.5)
        self.mixtures.routing = Routing(fixed={EXPERT: 1.0})

    def begin_stage(self, model: nn.Module, task: Task, stage: Stage) -> None:
        """Trains the update and, if asked, the connector."""
        assert self.mixtures is not None
        self.mixtures.train_expert(EXPERT)
        if "connector" in self.training_parts:
            for path, parameter in model.named_parameters():
                if self.mixtures.anatomy.part_of(path) == "connector":
                    parameter.requires_grad_(True)

    def end_task(self, model: nn.Module, task: Task) -> None:
        """Merges the update; the model is a plain one again."""
        assert self.mixtures is not None
        self.mixtures.merge({EXPERT: 1.0})
        model.requires_grad_(False)
        self.mixtures, self._has_merged = None, True

    def rebuild(self, model: nn.Module, task: Task) -> None:
        """A finished task leaves no structure, only weights that differ from the base."""
        self._has_merged = True

    def stored_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """What trained, and every weight that an update was merged into."""
        stored = super().stored_tensors(model)
        for path in self.paths if self._has_merged else ():
            site = model.get_submodule(path)
            assert isinstance(site, Mixture | nn.Linear)
            name = f"{path}.host.weight" if isinstance(site, Mixture) else f"{path}.weight"
            stored[name] = site.weight.detach()
        return stored
