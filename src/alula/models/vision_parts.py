"""Encoders and connectors out of a configuration, with the arithmetic of what does not fit. It builds; it loads no weights."""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from torch import nn

from alula.errors import UserError
from alula.models.composed_config import ComposedConfig
from alula.models.composed_processor import count_image_tokens, count_views
from alula.models.connectors import CONNECTORS, Connector
from alula.models.connectors.deformable import DeformableAttention
from alula.models.encoders import ENCODERS, Encoder
from alula.models.vision_mixture import STATISTICS, EncoderGroup, InstructionRouter, JoinedGate, VisionMixture

WIDTHS = ("input_dim", "output_dim")
WITH_OWN_START = (Encoder, Connector, DeformableAttention, JoinedGate)
"""What says itself which fresh weights it has."""

T = TypeVar("T")


def build_vision(config: ComposedConfig) -> tuple[Encoder | EncoderGroup, Connector | VisionMixture]:
    """`vision_tower` and `connector` of a `ComposedVLM`.

    Raises:
        UserError: an unknown name, a part that refuses its keywords, widths or numbers of tokens that do not match.
    """
    vision_tower, connector = _parts(config)
    tokens = count_image_tokens(connector.num_tokens, crops=config.crops)
    if tokens != config.image_seq_length:
        cut = f" in each of {count_views(config.crops)} views of {connector.num_tokens}" if config.crops else ""
        names = " and ".join(repr(part["name"]) for part in config.encoders)
        raise UserError(
            f"image_seq_length={config.image_seq_length} came, but the encoder {names} with its connector gives {tokens} tokens for an "
            f"image{cut}. Set image_seq_length={tokens}."
        )
    return vision_tower, connector


def plan_vision(config: ComposedConfig) -> tuple[Encoder | EncoderGroup, Connector | VisionMixture]:
    """As `build_vision`, without weights and without a look at `image_seq_length`: quick for encoders of any size."""
    with torch.device("meta"):
        return _parts(config)


def _parts(config: ComposedConfig) -> tuple[Encoder | EncoderGroup, Connector | VisionMixture]:
    encoders = [build_encoder(part) for part in config.encoders]
    width = config.text_config.hidden_size
    connectors = [
        build_connector(part, encoder, output_dim=width, encoder_name=str(own["name"]))
        for part, own, encoder in zip(config.connectors, config.encoders, encoders, strict=True)
    ]
    if not isinstance(config.encoder_config, list):
        return encoders[0], connectors[0]
    statistics = [{key: part[key] for key in STATISTICS if part.get(key)} for part in config.encoders]
    first = len(encoders) - config.num_joined
    is_routed = config.mixing == "router" and first > 1
    router = InstructionRouter(num_encoders=first, **config.router_config) if is_routed else None
    gates = [build_gate(config) for _ in range(config.num_joined)]
    return EncoderGroup(encoders, statistics=statistics), VisionMixture(connectors, router=router, gates=gates)


def start_afresh(part: nn.Module) -> None:
    """Has the last word on fresh weights. Transformers' own pass leaves out modules that hold no parameter directly."""
    for module in part.modules():
        if isinstance(module, WITH_OWN_START):
            module.reset_parameters()


def build_encoder(part: dict) -> Encoder:
    """The encoder of a configuration's entry, with fresh weights."""
    keywords = {key: value for key, value in part.items() if key not in ("name", *STATISTICS)}
    return _built(ENCODERS[str(part.get("name"))], keywords, kind=f"Encoder '{part.get('name')}'")


def build_connector(part: dict, encoder: Encoder, *, output_dim: int, encoder_name: str) -> Connector:
    """The connector of a configuration's entry between its neighbours, with fresh weights.

    Raises:
        UserError: the entry names widths that are not theirs, or keywords that the connector does not know.
    """
    name = str(part.get("name"))
    for key, real, whose in zip(WIDTHS, (encoder.output_dim, output_dim), (f"the encoder '{encoder_name}'", "the backbone"), strict=True):
        if part.get(key, real) != real:
            raise UserError(
                f"Connector '{name}' got {key}={part[key]}, but {whose} is {real} wide: {part[key]} - {real} = {part[key] - real}. "
                f"Set {key}={real}, or leave it out: it comes from the neighbour."
            )
    keywords = {key: value for key, value in part.items() if key not in ("name", *WIDTHS)}
    build = partial(CONNECTORS[name], encoder.output_dim, output_dim, grid=encoder.grid)
    return _built(build, keywords, kind=f"Connector '{name}'")


def build_gate(config: ComposedConfig) -> JoinedGate:
    """The gate of one encoder that joins later."""
    return JoinedGate(InstructionRouter(num_encoders=1, **config.router_config) if config.mixing == "router" else None)


def _built(make: Callable[..., T], keywords: dict, *, kind: str) -> T:
    try:
        return make(**keywords)
    except TypeError as error:
        if "unexpected keyword" not in str(error) and "required keyword" not in str(error):
            raise
        raise UserError(f"{kind} refuses {', '.join(keywords) or 'no keywords'}: {error}. Correct the keywords.") from error
