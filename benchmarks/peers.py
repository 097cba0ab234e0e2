"""The forms that `experts.py` compares, each put on a copy of one model: PEFT's, CoIN's as published, and ours.

Every expert is trained, so that all do the same work; where a peer has no way to train something, its forward and the
gradients it does have are timed. Source of the loop: Chen et al. 2024, "CoIN" (arXiv 2403.08350), MoELoRA, written by us from
the equation; one product per expert and nothing fused, as in the published code.
"""

import contextlib
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import peft
import torch
from peft.tuners.lora.arrow import ArrowConfig, create_arrow_model
from torch import Tensor, nn

from alula import Routing, attach
from alula.context import Cell, Context
from alula.mixture import Mixture, Mixtures
from alula.routers.dense import DenseRouter

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DECODER = r".*(?<!visual)\.layers\.\d+\..*\.(q|k|v|o|gate|up|down)_proj"
Call = Callable[..., Any]


class MoELoRALoop(nn.Module):
    """``W x + sum_e softmax(G x)_e * scale * B_e A_e x``, one expert after the other."""

    def __init__(self, host: nn.Linear, *, experts: int, rank: int, scale: float = 2.0) -> None:
        super().__init__()
        self.host, self.scale = host, scale
        self.gate = nn.Linear(host.in_features, experts, bias=False)
        self.A = nn.ModuleList([nn.Linear(host.in_features, rank, bias=False) for _ in range(experts)])
        self.B = nn.ModuleList([nn.Linear(rank, host.out_features, bias=False) for _ in range(experts)])

    def forward(self, x: Tensor) -> Tensor:
        """The host's output and each expert's, weighted at full width."""
        out, weights = self.host(x), self.gate(x).softmax(dim=-1)
        for index, (down, up) in enumerate(zip(self.A, self.B, strict=True)):
            out = out + up(down(x)) * self.scale * weights[..., index : index + 1]
        return out


class TwoProducts(nn.Module):
    """``W x + b + 2 B A x`` and nothing else: what one expert costs in eager torch at least. For one token without gradients."""

    def __init__(self, host: nn.Linear, *, rank: int) -> None:
        super().__init__()
        self.host = host
        self.plain = (host.weight, host.bias, torch.randn(rank, host.in_features) / 10, torch.randn(host.out_features, rank) / 10)

    def forward(self, x: Tensor) -> Tensor:
        """The host alone for a prompt, both for a token."""
        weight, bias, down, up = self.plain
        out = nn.functional.linear(x, weight, bias)
        if x.numel() == x.shape[-1]:
            out.view(-1).addmv_(up, torch.mv(down, x.view(-1)), alpha=2.0)
        return out


class OneTask(nn.Module):
    """Poly asks each sample's task."""

    def __init__(self, poly: nn.Module) -> None:
        super().__init__()
        self.poly = poly

    def forward(self, **batch: Any) -> Any:
        """As the model, with every sample of the first task."""
        return self.poly(**batch, task_ids=torch.zeros(len(batch["input_ids"]), dtype=torch.long))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """PEFT warns of tied weights, configurations and shapes that do not matter here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def speaking(model: nn.Module) -> nn.Module:
    """Every matrix B of a peer drawn at random: at zero, some kernels would be spared."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name or ".B." in name or "poly_lora_B" in name:
                parameter.normal_(std=1e-2, generator=generator)
    return model


def train_adapters(model: nn.Module, *marks: str) -> nn.Module:
    """Of the model, only parameters with one of `marks` in their name train."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(mark in name for mark in marks))
    return model


def frozen_base(model: nn.Module, **sizes: int) -> Call:
    return model.requires_grad_(False)


def peft_lora(model: nn.Module, *, rank: int, slots: int, **sizes: int) -> Call:
    return speaking(peft.get_peft_model(model, peft.LoraConfig(r=rank * slots, lora_alpha=2 * rank * slots, target_modules=DECODER)))  # type: ignore[arg-type]


def peft_lora_of_one(model: nn.Module, *, rank: int, **sizes: int) -> Call:
    """Of one expert's rank, as a told expert has it."""
    return peft_lora(model, rank=rank, slots=1)


def _adapters(model: Any, experts: int, rank: int) -> Any:
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=DECODER)
    model = peft.get_peft_model(model, config, adapter_name="task_0")
    for number in range(1, experts):
        model.add_adapter(f"task_{number}", config)
    return model


def peft_several(model: nn.Module, *, experts: int, rank: int, **sizes: int) -> Call:
    model = _adapters(model, experts, rank)
    model.base_model.set_adapter([f"task_{number}" for number in range(experts)])  # type: ignore[union-attr, operator]
    return train_adapters(speaking(model), "lora_")


def peft_arrow(model: nn.Module, *, experts: int, rank: int, slots: int, **sizes: int) -> Call:
    with _saved(model, experts, rank) as paths:
        arrow = create_arrow_model(model, list(paths.values()), ArrowConfig(top_k=slots))  # type: ignore[arg-type]
    return train_adapters(arrow, "lora_")


def peft_xlora(model: Any, *, experts: int, rank: int, slots: int, **sizes: int) -> Call:
    with _saved(model, experts, rank) as paths:
        model.config.use_cache = False
        hidden = model.config.get_text_config().hidden_size
        options = {"enable_softmax": False, "enable_softmax_topk": True, "top_k_lora": slots, "use_trainable_adapters": True}
        config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=hidden, adapters=paths, **options)  # type: ignore[arg-type]
        return peft.get_peft_model(model, config)


@contextlib.contextmanager
def _saved(model: Any, experts: int, rank: int) -> Iterator[dict[str, str]]:
    """Folders of `experts` adapters for this model, which is plain again afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        adapters = speaking(_adapters(model, experts, rank))
        adapters.save_pretrained(folder)  # type: ignore[operator]
        adapters.unload()  # type: ignore[operator]
        yield {str(number): f"{folder}/task_{number}" for number in range(experts)}


def peft_poly(model: nn.Module, *, experts: int, rank: int, slots: int, **sizes: int) -> Call:
    config = peft.PolyConfig(r=rank * slots, n_tasks=1, n_skills=experts, n_splits=1, target_modules=DECODER)
    poly = speaking(peft.get_peft_model(model, config))  # type: ignore[arg-type]
    return OneTask(poly.base_model)  # type: ignore[arg-type]


def coin_loop(model: nn.Module, *, experts: int, rank: int, slots: int, **sizes: int) -> Call:
    """CoIN's experts share the rank that is active elsewhere."""
    in_place_of_linears(model, lambda host: MoELoRALoop(host, experts=experts, rank=max(1, rank * slots // experts)))
    speaking(model)
    return train_adapters(model, ".A.", ".B.", ".gate.")


def two_products(model: nn.Module, *, rank: int, **sizes: int) -> Call:
    """No router, no pool, no choice: the floor below every told expert."""
    return in_place_of_linears(model, lambda host: TwoProducts(host, rank=rank))


def in_place_of_linears(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """The frozen model with something else in place of the decoder's linears."""
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "visual" not in name and name.rpartition(".")[2] in LINEARS:
            model.set_submodule(name, make(module))
    return model


def mixtures_on(model: nn.Module, *, experts: int, rank: int, routers: tuple[str, ...]) -> Mixtures:
    """Ours with random experts and random gates."""
    mixtures, generator = attach(model, routers=routers), torch.Generator().manual_seed(0)
    for number in range(experts):
        mixtures.grow(f"expert{number}", rank=rank, generator=generator)
    with torch.no_grad():
        for mixture in mixtures.sites.values():
            for up in mixture.experts.B:
                up.normal_(std=1e-2, generator=generator)
            for router in mixture.named_routers().values():
                for gate in router.parameters():
                    gate.normal_(std=0.02, generator=generator)
    return mixtures


def ours(model: nn.Module, *, experts: int, rank: int, slots: int, **sizes: int) -> Call:
    """Trained rows choose `slots` experts per token and linear layer; experts and rows train."""
    mixtures = mixtures_on(model, experts=experts, rank=rank, routers=("dense",))
    mixtures.routing = Routing(router="dense", level="token", top_k=slots)
    for mixture in mixtures.sites.values():
        mixture.experts.requires_grad_(True)
        mixture.routers.requires_grad_(True)
    return model


def ours_decoding(arm: str) -> Callable[..., Call]:
    """A frozen pool: the expert is told (as after a decision on the prompt), or each gate chooses for each token."""

    def build(model: nn.Module, *, experts: int, rank: int, slots: int, **sizes: int) -> Call:
        mixtures = mixtures_on(model, experts=experts, rank=rank, routers=("gate",))
        told, gated = Routing(fixed={f"expert{experts - 1}": 1.0}), Routing(router="gate", level="token", top_k=slots)
        mixtures.routing = told if arm == "told" else gated
        mixtures.freeze()
        return model

    return build


WHOLE: dict[str, Callable[..., Call]] = {
    "frozen base": frozen_base,
    "PEFT LoRA": peft_lora,
    "PEFT, all adapters active": peft_several,
    "PEFT Arrow": peft_arrow,
    "PEFT X-LoRA": peft_xlora,
    "PEFT Poly": peft_poly,
    "CoIN's loop": coin_loop,
    "ours": ours,
}
DECODING: dict[str, Callable[..., Call]] = {
    "frozen base": frozen_base,
    "two products alone": two_products,
    "PEFT LoRA": peft_lora_of_one,
    "PEFT, all adapters active": peft_several,
    "PEFT Arrow": peft_arrow,
    "CoIN's loop": coin_loop,
    "ours, expert told": ours_decoding("told"),
    "ours, gates": ours_decoding("gates"),
}


EVERY_EXPERT = ("PEFT, all adapters active", "PEFT Arrow", "CoIN's loop")
"""Forms that compute all experts for each token."""


def layer_forms(host: Callable[[], nn.Linear], *, rank: int, experts: int) -> dict[str, nn.Module]:
    """One linear layer in each form, the experts sharing `rank`, all of them speaking for every token."""
    plain = nn.Sequential(host())
    lora = peft.get_peft_model(plain, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["0"]))  # type: ignore[arg-type]
    loop = train_adapters(MoELoRALoop(host(), experts=experts, rank=rank // experts), "A.", "B.", "gate.")
    return {"PEFT LoRA": speaking(lora), "CoIN's loop": speaking(loop), "ours": mixed(host(), rank=rank // experts, experts=experts)}


def mixed(host: nn.Linear, *, rank: int, experts: int) -> Mixture:
    """Our mixture on a layer outside of any model, with what it learns of a forward written by hand."""
    mixture = Mixture(host.requires_grad_(False), path="layer.q_proj", block="layer", cell=Cell())
    router = mixture.routers["dense"] = DenseRouter(host.in_features)
    generator = torch.Generator().manual_seed(0)
    for number in range(experts):
        mixture.experts.grow(f"expert{number}", rank=rank, alpha=2.0 * rank, dtype=torch.float32, generator=generator)
        mixture.experts.B[number].data.normal_(std=1e-2, generator=generator)
        router.grow(f"expert{number}", mixture.experts)
    router.draw(generator=generator)
    return mixture


def tell(mixture: Mixture, shape: tuple[int, int]) -> None:
    """Every expert may speak, by the dense router."""
    experts = len(mixture.experts.names)
    routing, everyone = Routing(router="dense", level="token", top_k=experts), tuple(range(experts))
    valid = torch.ones(shape, dtype=torch.bool)
    mixture.cell.enter(Context(shape=shape, routing=routing, image_mask=None, valid=valid, active=everyone))
