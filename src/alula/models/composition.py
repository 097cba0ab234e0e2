"""A vision-language model out of named parts: checked by arithmetic first, loaded then. It knows no data and trains nothing."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from alula.errors import UserError
from alula.models.backbones import backbone_folder, load_backbone, read_backbone
from alula.models.composed import ComposedVLM
from alula.models.composed_config import ComposedConfig, check_parts
from alula.models.composed_processor import IMAGE_TOKEN, ComposedImageProcessor, ComposedProcessor, count_image_tokens
from alula.models.instructions import EMBEDDED as EMBEDDED_SENTENCES
from alula.models.part_files import Part, Source, check_file, load_part, read_parts, sentence_dim
from alula.models.vision_mixture import EncoderGroup, VisionMixture, statistics_of
from alula.models.vision_parts import build_connector, build_encoder, build_gate, build_vision, check_shapes, plan_vision, start_afresh

PART = (str, Mapping)
"""What users give for a part: a name, or a name with keywords."""


def check_composition(
    config: ComposedConfig, *, encoder_weights: Sequence[Path | None] = (), connector_weights: Sequence[Path | None] = ()
) -> None:
    """Refuses parts that do not fit, by building them without weights and trying them on two images that have a shape, but no values.

    Args:
        encoder_weights: safetensors file of each encoder, None for fresh weights; only the shapes in its header are read.
        connector_weights: as `encoder_weights`.

    Raises:
        UserError: an unknown name or keyword, or a value that a part cannot be built with; widths that do not match; a number of tokens
            that is no square, that differs between encoders or from `image_seq_length`; another resolution with positions that cannot
            be interpolated; a part that gives another shape than it says; a file of another shape.
    """
    with torch.device("meta"):
        vision_tower, connector = build_vision(config)
    encoders, connectors = _members(vision_tower), _members(connector)
    for one, other in zip(encoders, connectors, strict=True):
        check_shapes(one, other, output_dim=config.text_config.hidden_size)  # type: ignore[arg-type]
    for members, files, root in ((encoders, encoder_weights, "vision_tower"), (connectors, connector_weights, "connector")):
        for member, file in zip(members, files, strict=False):
            if file is not None:
                check_file(member, file, root=root)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Parts that fit.

    Attributes:
        place: folder or hub name of the backbone.
        tokenizer: the backbone's, with the image placeholder.
        encoders: where the weights of each encoder are; `connectors` likewise.
    """

    config: ComposedConfig
    place: str
    tokenizer: PreTrainedTokenizerBase
    encoders: Sequence[Source]
    connectors: Sequence[Source]
    instruction_encoder: str | None


def plan_composition(
    backbone: str | Path,
    encoder: Part | Sequence[Part],
    connector: Part | Sequence[Part] = "mlp",
    *,
    crops: int = 0,
    mixing: str = "add",
    router: Mapping[str, int] | None = None,
    instruction_encoder: str | None = None,
    image_token: str = IMAGE_TOKEN,
) -> Plan:
    """What `compose` does before it loads a weight, with its arguments.

    Raises:
        UserError: as `compose`.
    """
    if not isinstance(image_token, str) or not image_token.strip():
        raise UserError(
            f"image_token={image_token!r} came. A word that stands for an image is accepted, such as the default {IMAGE_TOKEN!r}."
        )
    check_parts(encoder, what="encoder", kinds=PART)
    check_parts(connector, what="connector", kinds=PART)
    place = backbone_folder(backbone)
    encoders, encoder_sources = read_parts(encoder)
    connectors, connector_sources = read_parts(connector)
    text_config = read_backbone(place)
    tokenizer = AutoTokenizer.from_pretrained(place)
    if image_token not in tokenizer.get_vocab():
        tokenizer.add_tokens([image_token], special_tokens=True)
    if mixing == "router":
        instruction_encoder = instruction_encoder or EMBEDDED_SENTENCES
        router = {**(router or {}), "input_dim": sentence_dim(instruction_encoder, told=(router or {}).get("input_dim"))}
    config = ComposedConfig(
        text_config=text_config,
        encoder_config=encoders,
        connector_config=connectors,
        image_token_id=tokenizer.get_vocab()[image_token],
        crops=crops,
        mixing=mixing,
        router_config=dict(router or {}),
    )
    config.image_seq_length = count_image_tokens(plan_vision(config)[1].num_tokens, crops=crops)
    files = [[source.file for source in sources] for sources in (encoder_sources, connector_sources)]
    check_composition(config, encoder_weights=files[0], connector_weights=files[1])
    return Plan(
        config=config,
        place=place,
        tokenizer=tokenizer,
        encoders=encoder_sources,
        connectors=connector_sources,
        instruction_encoder=instruction_encoder,
    )


def compose(
    backbone: str | Path,
    encoder: Part | Sequence[Part],
    connector: Part | Sequence[Part] = "mlp",
    *,
    crops: int = 0,
    mixing: str = "add",
    router: Mapping[str, int] | None = None,
    instruction_encoder: str | None = None,
    image_token: str = IMAGE_TOKEN,
    chat_template: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[ComposedVLM, ComposedProcessor]:
    """A model and its processor out of parts, in evaluation mode; what does not fit is refused before any weight is loaded.

    Args:
        backbone: folder or hub name of a causal LM, or of a composed model, whose backbone is taken; `smol` is the embedded default.
        encoder: a registered name, or `{"name": ..., **its keywords}`; a list of these is mixed. `"weights"` in it is a safetensors file
            of that encoder or of a composed model; `{"name": "hf", "path": ...}` takes configuration and weights of a Hugging Face
            vision model. `image_mean` and `image_std` are what it was trained with; without them the first one's pixels are ImageNet's.
        connector: as `encoder`, one for each encoder or one for all.
        crops: n of the n x n crops beside the whole image; 0 is none.
        mixing: of several encoders: `add`, or `router`, by the instruction.
        router: keywords of `InstructionRouter`; the width of the sentence embedding comes from the instruction encoder.
        instruction_encoder: `minilm` or the folder of a sentence encoder; with `router` None is `minilm`.
        image_token: the placeholder; added to the tokenizer if it is not one token of it.
        chat_template: None is ChatML without a system prompt.
        dtype: of all parts.

    Raises:
        UserError: as `check_composition`; there is no model of that kind under a name; a router of another width than the sentences.

    Example:
        >>> model, processor = compose("smol", {"name": "vit", "image_size": 64})  # doctest: +SKIP
    """
    plan = plan_composition(
        backbone,
        encoder,
        connector,
        crops=crops,
        mixing=mixing,
        router=router,
        instruction_encoder=instruction_encoder,
        image_token=image_token,
    )
    config, tokenizer = plan.config, plan.tokenizer
    language_model = load_backbone(plan.place, rows=len(tokenizer), dtype=dtype)
    config.text_config = language_model.config  # a placeholder may have been added to its vocabulary
    model = ComposedVLM(config, language_model=language_model).to(dtype)  # type: ignore[arg-type]
    for part, sources, root in ((model.vision_tower, plan.encoders, "vision_tower"), (model.connector, plan.connectors, "connector")):
        for member, source in zip(_members(part), sources, strict=False):
            load_part(member, source, root=root)
    _set_generation(model, tokenizer)
    processor = _processor(model, tokenizer, image_token, chat_template=chat_template, instruction_encoder=plan.instruction_encoder)
    return model.eval(), processor


def add_encoder(model: ComposedVLM, encoder: Part, *, connector: Part = "mlp") -> list[str]:
    """One more encoder for a model that is there. What it answers stays exactly the same until something of the new is trained.

    The weight of the newcomer is exactly 0 at first and what was there is not touched: freeze all but the returned names to keep it so.
    The processor stays as it is, unless its image size is to grow with the new encoder's.

    Args:
        encoder: as in `compose`.
        connector: as in `compose`; must give as many tokens as those that are there.

    Returns:
        the names of the new parameters.

    Raises:
        UserError: as `check_composition`.
    """
    check_parts([encoder], what="encoder", kinds=PART)
    check_parts([connector], what="connector", kinds=PART)
    (part,), (source,) = (list(one) for one in read_parts([encoder]))
    (link,), (link_source,) = (list(one) for one in read_parts([connector]))
    config = copy.deepcopy(model.config)
    config.encoder_config = [*config.encoders, part]
    config.connector_config = [*model.config.connectors, link]
    config.num_joined += 1
    kept = len(config.encoders) - 1
    check_composition(config, encoder_weights=[None] * kept + [source.file], connector_weights=[None] * kept + [link_source.file])
    newcomer = build_encoder(part)
    linked = build_connector(link, newcomer, output_dim=config.text_config.hidden_size, encoder_name=str(part["name"]))
    gate = build_gate(config)
    for module, origin, root in ((newcomer, source, "vision_tower"), (linked, link_source, "connector"), (gate, Source(), "")):
        start_afresh(module)
        load_part(module, origin, root=root)
        module.to(device=model.device, dtype=model.dtype)
    statistics = [statistics_of(one) for one in config.encoders]
    before = {id(parameter) for parameter in model.parameters()}
    model.vision_tower = EncoderGroup([*_members(model.vision_tower), newcomer], statistics=statistics)  # type: ignore[list-item]
    old = model.connector if isinstance(model.connector, VisionMixture) else None
    model.connector = VisionMixture(
        [*_members(model.connector), linked],  # type: ignore[list-item]
        router=old.router if old else None,
        gates=[*(old.gates if old else ()), gate],  # type: ignore[list-item]
    )
    model.config = config
    model.train(model.training)
    return [name for name, parameter in model.named_parameters() if id(parameter) not in before]


def _members(part: nn.Module) -> list[nn.Module]:
    """The encoders or connectors of a model with one or with several."""
    if isinstance(part, EncoderGroup):
        return list(part.encoders)
    return list(part.connectors) if isinstance(part, VisionMixture) else [part]


def _set_generation(model: ComposedVLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """As the backbone generates, but never an image placeholder, which without an image would be an empty word."""
    own = copy.deepcopy(model.language_model.generation_config)
    own.suppress_tokens = [model.config.image_token_id]
    own.pad_token_id = tokenizer.pad_token_id if own.pad_token_id is None else own.pad_token_id
    model.generation_config = own


def _processor(
    model: ComposedVLM, tokenizer: PreTrainedTokenizerBase, image_token: str, *, chat_template: str | None, instruction_encoder: str | None
) -> ComposedProcessor:
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    side = model.vision_tower.image_size
    statistics = statistics_of(model.config.encoders[0])
    images = ComposedImageProcessor(size={"height": side, "width": side}, crops=model.config.crops, **statistics)  # type: ignore[call-arg]
    return ComposedProcessor(
        images,
        tokenizer,
        image_seq_length=model.config.image_seq_length,
        image_token=image_token,
        chat_template=chat_template,
        instruction_encoder=instruction_encoder,
    )
