"""Where the parts of a vision-language model are, for any Hugging Face model. Knows names and shapes; changes nothing."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from alula.errors import UserError, nearest

# A decoder layer's token mixer. Order matters: a layer with several (BART) is known by the first.
ATTENTION_NAMES = ("self_attn", "cross_attn", "linear_attn", "attn", "attention", "self_attention", "mixer", "mamba", "conv")
# Those of them that weigh a layer's own tokens by softmax.
SOFTMAX_NAMES = ("self_attn", "attn", "attention", "self_attention")
MLP_NAMES = ("mlp", "feed_forward", "block_sparse_moe", "ffn")
CONNECTOR_NAMES = (
    "multi_modal_projector",
    "connector",
    "merger",
    "deepstack_merger_list",
    "language_projection",
    "qformer",
    "visual_embeddings_table",
    "embed_vision",
    "aligner",
    "projector",
)
PARTS = ("decoder", "encoder", "connector")
OF_SPARSE_EXPERT = re.compile(r"\.experts\.\d+\.")
# The attribute by which a wrapper keeps what it wraps: ours, PEFT's.
HOST_NAMES = ("host", "base_layer")


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """The parts of one model, as module paths for `model.get_submodule`.

    Attributes:
        decoder: the text stack that owns the decoder layers.
        layers: every decoder layer, in order.
        attention: each layer's self attention, or the cross or linear attention it has in its place; the layer itself
            where none of these is known.
        softmax_layers: the layers, by index, whose attention weighs their own tokens by softmax: not linear, not across, not
            by keys of an earlier layer (the last layers of small Gemma 4, which see a prompt's last token only).
        mlp: each layer's MLP; empty where the layers hold its linears themselves (OPT, BART).
        encoder: the modality encoders; empty in a text-only model.
        connector: from encoder features to tokens of the decoder's width.
        head: the output embeddings.
        image_token_id: the id of the token that stands for one image feature; None in a text-only model.
        hidden_size: width of the decoder.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        ...                                      num_attention_heads=2, num_key_value_heads=2))
        >>> parts = anatomy(model)
        >>> parts.attention
        ('model.layers.0.self_attn', 'model.layers.1.self_attn')
        >>> list(parts.linears(model, pattern=["q_proj"], layers=[1]))
        ['model.layers.1.self_attn.q_proj']
    """

    decoder: str
    layers: tuple[str, ...]
    attention: tuple[str, ...]
    softmax_layers: tuple[int, ...]
    mlp: tuple[str, ...]
    encoder: tuple[str, ...]
    connector: tuple[str, ...]
    head: str | None
    image_token_id: int | None
    hidden_size: int

    @property
    def num_layers(self) -> int:
        """The number of decoder layers."""
        return len(self.layers)

    def part_of(self, path: str) -> str:
        """The part that a module or parameter path lies in: decoder, encoder, connector, head or other.

        The innermost part counts: Qwen-VL's merger, inside its encoder, is a connector.
        """
        roots = dict.fromkeys(self.encoder, "encoder") | dict.fromkeys(self.connector, "connector")
        roots[self.decoder] = "decoder"
        if self.head is not None:
            roots[self.head] = "head"
        holding = [root for root in roots if path == root or path.startswith(f"{root}.") or root == ""]
        return roots[max(holding, key=len)] if holding else "other"

    def linears(
        self,
        model: nn.Module,
        *,
        part: str = "decoder",
        pattern: Sequence[str] | str | None = None,
        layers: slice | Sequence[int] | None = None,
    ) -> dict[str, nn.Linear]:
        """The linear layers of one part by path, never the head's.

        A path leads to what stands in the linear's place now: to its wrapper where there is one. What wrappers
        themselves bring (experts, adapters) is not listed, nor what lies in one of a feed-forward network's sparse experts:
        it sees tokens without their rows.

        Args:
            part: decoder (its layers only), encoder or connector.
            pattern: names (``["q_proj", "v_proj"]``) or one regular expression for the whole last component of the path.
                None is all.
            layers: decoder layers by index, negative from the end; None is all.

        Raises:
            UserError: an unknown part, a layer that does not exist, or a name that matches nothing.
        """
        if part not in PARTS:
            raise UserError(f"Unknown part '{part}'. {nearest(part, PARTS)}")
        if layers is not None and part != "decoder":
            raise UserError(f"Layers can be chosen in the decoder only, not in the {part}. Leave `layers` out.")
        roots = self._chosen(layers) if part == "decoder" else getattr(self, part)
        modules = {path: module for root in roots for path, module in walk(model.get_submodule(root), path=root)}
        found = {
            path: module
            for path, module in modules.items()
            if isinstance(module, nn.Linear) and self.part_of(path) == part and not OF_SPARSE_EXPERT.search(path)
        }
        return _matching(found, pattern, part=part, fused=_fused(modules))

    def image_mask(self, input_ids: Int[Tensor, "batch tokens"]) -> Bool[Tensor, "batch tokens"]:
        """True where a token stands for an image feature."""
        if self.image_token_id is None:
            return torch.zeros_like(input_ids, dtype=torch.bool)
        return input_ids == self.image_token_id

    def _chosen(self, layers: slice | Sequence[int] | None) -> tuple[str, ...]:
        if layers is None or isinstance(layers, slice):
            return self.layers[layers or slice(None)]
        missing = [index for index in layers if not -self.num_layers <= index < self.num_layers]
        if missing:
            raise UserError(
                f"There is no decoder layer {missing[0]}. The layers are 0 to {self.num_layers - 1}, "
                f"or {-self.num_layers} to -1 from the end. Correct `layers`."
            )
        return tuple(self.layers[index] for index in layers)


def anatomy(model: nn.Module) -> Anatomy:
    """The anatomy of `model`; also if submodules are wrapped, or the whole model in PEFT's `PeftModel`.

    Raises:
        UserError: there is no decoder that generates text.
    """
    base = base_model(model)
    paths = {id(module): path for path, module in model.named_modules()}
    if not (isinstance(base, PreTrainedModel) and base.can_generate()):
        raise _no_decoder(base)
    config = base.config.get_text_config(decoder=True)
    stack = _layer_list(base.get_decoder(), count=config.num_hidden_layers)
    if stack is None:
        raise _no_decoder(base)
    layers = {f"{paths[id(stack)]}.{index}": layer for index, layer in enumerate(stack)}
    decoder = paths[id(stack)].rpartition(".")[0]
    encoders = _encoders(base, stack=stack, paths=paths)
    head = base.get_output_embeddings()
    attention = tuple(_child(path, layer, names=ATTENTION_NAMES) or path for path, layer in layers.items())
    return Anatomy(
        decoder=decoder,
        layers=tuple(layers),
        attention=attention,
        softmax_layers=tuple(index for index, path in enumerate(attention) if _has_own_softmax(model, path)),
        mlp=tuple(child for path, layer in layers.items() if (child := _child(path, layer, names=MLP_NAMES))),
        encoder=encoders,
        connector=_connectors(model, decoder=decoder),
        head=paths.get(id(head)) if head is not None else None,
        image_token_id=getattr(base.config, "image_token_id", getattr(base.config, "image_token_index", None)),
        hidden_size=config.hidden_size,
    )


def base_model(model: nn.Module) -> nn.Module:
    """`model` without PEFT's outer shell."""
    unwrap: Callable[[], nn.Module] | None = getattr(model, "get_base_model", None)
    return model if unwrap is None else unwrap()


def walk(module: nn.Module, *, path: str = "", original: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """Every module of the original model below `module`, under the path of its outermost wrapper.

    A wrapper is stepped through, and what it brings beside its host is left out.

    Args:
        original: give the path that it had before anything was wrapped, which may lead nowhere now.
    """
    inner, real = _unwrap(module, path)
    yield path, inner
    above = path if original else real
    for name, child in inner.named_children():
        yield from walk(child, path=f"{above}.{name}" if above else name, original=original)


def _unwrap(module: nn.Module, path: str) -> tuple[nn.Module, str]:
    """What all wrappers around `module` hold, and its real path."""
    children = dict(module.named_children())
    for name in HOST_NAMES:
        if name in children:
            return _unwrap(children[name], f"{path}.{name}" if path else name)
    return module, path


def _layer_list(decoder: nn.Module, *, count: int) -> nn.ModuleList | None:
    """The list of decoder layers: as many as the configuration says, with attention; not a text encoder's."""
    found = {
        path: module
        for path, module in walk(decoder)
        if isinstance(module, nn.ModuleList) and len(module) == count and count > 0 and _child("", module[0], names=ATTENTION_NAMES)
    }
    candidates = [path for path in found if "encoder" not in path.split(".")] or list(found)
    return found[candidates[-1]] if candidates else None


def _child(path: str, layer: nn.Module, *, names: Sequence[str]) -> str | None:
    """The path of the layer's child with the first of `names` that it has; seen through wrappers of the layer."""
    inner, real = _unwrap(layer, path)
    children = dict(inner.named_children())
    return next((f"{real}.{name}" for name in names if name in children), None)


def _has_own_softmax(model: nn.Module, path: str) -> bool:
    attention, _ = _unwrap(model.get_submodule(path), path)
    return path.rpartition(".")[2] in SOFTMAX_NAMES and not getattr(attention, "is_kv_shared_layer", False)


def _encoders(base: PreTrainedModel, *, stack: nn.ModuleList, paths: dict[int, str]) -> tuple[str, ...]:
    """The encoders that the model names; a model without one answers with itself or with its decoder."""
    candidates = [base.get_encoder(modality) for modality in ("image", "audio")]  # None: a place for one, left empty (Gemma 4)
    own = [module for module in candidates if module is not None and all(part is not stack for part in module.modules())]
    return tuple(dict.fromkeys(paths[id(module)] for module in own))


def _connectors(model: nn.Module, *, decoder: str) -> tuple[str, ...]:
    """The outermost modules outside the decoder that bear a connector's name."""
    found: list[str] = []
    for path, _ in walk(model):
        is_inside = any(path.startswith(f"{root}.") for root in [*found, decoder])
        if path.rpartition(".")[2] in CONNECTOR_NAMES and not is_inside:
            found.append(path)
    return tuple(found)


def _fused(modules: dict[str, nn.Module]) -> str:
    """A sentence on feed-forward networks that keep the matrices of all their experts in one tensor; empty where none does."""
    fused = {
        f"experts.{name}"
        for path, module in modules.items()
        if path.endswith(".experts")
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3
    }
    return f" Its {', '.join(sorted(fused))} are fused, no linear layers: they carry no mixture." if fused else ""


def _matching(found: dict[str, nn.Linear], pattern: Sequence[str] | str | None, *, part: str, fused: str) -> dict[str, nn.Linear]:
    """Those linears whose last path component matches; each pattern must match something."""
    names = {path: path.rpartition(".")[2] for path in found}
    known = sorted(set(names.values()))
    words = [pattern] if isinstance(pattern, str) else known if pattern is None else list(pattern)
    if not words:
        raise UserError(f"No linear layer of the {part} is chosen. Known: {', '.join(known) or 'none'}. Name one or take another part.")
    wanted: set[str] = set()
    for word in words:
        hits = {name for name in known if _fits(word, name, is_expression=isinstance(pattern, str))}
        if not hits:
            raise UserError(f"No linear layer of the {part} is called '{word}'. {nearest(word, known)} Choose from these.{fused}")
        wanted |= hits
    return {path: module for path, module in found.items() if names[path] in wanted}


def _fits(word: str, name: str, *, is_expression: bool) -> bool:
    if not is_expression:
        return word == name
    try:
        return re.fullmatch(word, name) is not None
    except re.error as error:
        raise UserError(f"'{word}' is no regular expression: {error}. Correct it, or give a list of names.") from error


def _no_decoder(model: nn.Module) -> UserError:
    return UserError(
        f"{type(model).__name__} has no decoder that generates text, so there are no layers to work on. Supported are models "
        "that AutoModelForImageTextToText or AutoModelForCausalLM load, and ComposedVLM, which joins an encoder to a "
        "language model. Load the model with its language-modelling head, or compose one."
    )
