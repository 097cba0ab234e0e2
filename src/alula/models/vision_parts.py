"""Encoders and connectors out of a configuration, with the arithmetic of what does not fit. It builds; it loads no weights."""

import inspect
import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import TypeVar

import torch
from torch import Tensor, nn

from alula.errors import UserError, nearest
from alula.models.composed_config import ComposedConfig
from alula.models.composed_processor import count_image_tokens, count_views
from alula.models.connectors import CONNECTORS, Connector
from alula.models.connectors.deformable import DeformableAttention
from alula.models.encoders import ENCODERS, Encoder
from alula.models.trial import tried
from alula.models.vision_mixture import STATISTICS, EncoderGroup, InstructionRouter, JoinedGate, VisionMixture, statistics_of

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
    statistics = [statistics_of(part) for part in config.encoders]
    first = len(encoders) - config.num_joined
    is_routed = config.mixing == "router" and first > 1
    router = _router(config, num_encoders=first) if is_routed else None
    gates = [build_gate(config) for _ in range(config.num_joined)]
    return EncoderGroup(encoders, statistics=statistics), VisionMixture(connectors, router=router, gates=gates)


def start_afresh(part: nn.Module) -> None:
    """Has the last word on fresh weights. Transformers' own pass leaves out modules that hold no parameter directly."""
    for module in part.modules():
        if isinstance(module, WITH_OWN_START):
            module.reset_parameters()


def build_encoder(part: dict) -> Encoder:
    """The encoder of a configuration's entry, with fresh weights.

    Raises:
        UserError: keywords that the encoder cannot be built with, or an `image_mean` or `image_std` that pixels cannot be normalised by.
    """
    statistics_of(part)
    for key, values in ((key, part[key]) for key in STATISTICS if part.get(key) is not None):
        if not _is_statistic(values, is_deviation=key == "image_std"):
            wanted = "Three numbers above 0" if key == "image_std" else "Three numbers"
            raise UserError(
                f"Encoder '{part.get('name')}' got {key}={values!r}. {wanted} are accepted, of red, green and blue. Correct them."
            )
    keywords = {key: value for key, value in part.items() if key not in ("name", *STATISTICS)}
    return build_part(ENCODERS[str(part.get("name"))], keywords, kind=f"Encoder '{part.get('name')}'")


def _is_statistic(values: object, *, is_deviation: bool) -> bool:
    if not isinstance(values, list | tuple) or len(values) != 3:
        return False
    are_numbers = all(isinstance(one, Real) and not isinstance(one, bool) and math.isfinite(one) for one in values)
    return are_numbers and (min(values) > 0 or not is_deviation)


def build_connector(part: dict, encoder: Encoder, *, output_dim: int, encoder_name: str) -> Connector:
    """The connector of a configuration's entry between its neighbours, with fresh weights.

    Raises:
        UserError: the entry names widths that are not theirs, or keywords that the connector cannot be built with.
    """
    name = str(part.get("name"))
    for key, real, whose in zip(WIDTHS, (encoder.output_dim, output_dim), (f"the encoder '{encoder_name}'", "the backbone"), strict=True):
        if part.get(key, real) != real:
            came = part[key]
            difference = f": {came} - {real} = {came - real}" if isinstance(came, int) else ""
            raise UserError(
                f"Connector '{name}' got {key}={came!r}, but {whose} is {real} wide{difference}. "
                f"Set {key}={real}, or leave it out: it comes from the neighbour."
            )
    keywords = {key: value for key, value in part.items() if key not in ("name", *WIDTHS)}
    told = {"input_dim": encoder.output_dim, "output_dim": output_dim, "grid": encoder.grid}
    return build_part(CONNECTORS[name], keywords, kind=f"Connector '{name}'", **told)


def build_gate(config: ComposedConfig) -> JoinedGate:
    """The gate of one encoder that joins later."""
    return JoinedGate(_router(config, num_encoders=1) if config.mixing == "router" else None)


def _router(config: ComposedConfig, *, num_encoders: int) -> InstructionRouter:
    return build_part(InstructionRouter, config.router_config, kind="The router", num_encoders=num_encoders)


def check_shapes(encoder: Encoder, connector: Connector, *, output_dim: int) -> None:
    """Sends two images without values through an encoder and its connector.

    Args:
        encoder: on the meta device, as `connector`.
        output_dim: the backbone's width.

    Raises:
        UserError: they fail, or give another shape than they say.
    """
    side = encoder.image_size
    images = torch.empty(2, 3, side, side, device="meta")
    rows = _checked(encoder, images, wanted=(2, encoder.num_tokens, encoder.output_dim), said="2 images, its grid and output_dim")
    _checked(connector, rows, wanted=(2, connector.num_tokens, output_dim), said="2 images, its num_tokens and the backbone's width")


def _checked(part: nn.Module, given: Tensor, *, wanted: tuple[int, int, int], said: str) -> Tensor:
    name = type(part).__name__
    found = tried(part, given, name=name, wanted=f"{wanted} is to come out: {said}. Correct its keywords.")
    if found is not None and tuple(found.shape) != wanted:
        raise UserError(
            f"{name} makes {tuple(found.shape)} of {tuple(given.shape)}, but {wanted} is wanted: {said}. Correct its keywords or class."
        )
    return torch.empty(wanted, device="meta")


def build_part(make: Callable[..., T], keywords: Mapping[str, object], *, kind: str, **told: object) -> T:
    """A part of a user's keywords and of what its neighbours tell.

    Args:
        kind: of part, for errors.

    Raises:
        UserError: an unknown keyword; one of another type than its default's; a whole number below 1 where the default is none; what
            making raises.
    """
    accepted = [parameter for parameter in inspect.signature(make).parameters.values() if parameter.name not in told]
    takes = f"It takes {', '.join(map(str, accepted))}."
    names = [parameter.name for parameter in accepted]
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in accepted)
    for name in keywords if not takes_any else ():
        if name not in names and name not in told:
            raise UserError(f"{kind} refuses {name}={keywords[name]!r:.60}: there is no such keyword. {nearest(name, names)} {takes}")
    for parameter in accepted:
        if parameter.name in keywords:
            _check_keyword(keywords[parameter.name], parameter, kind=kind)
    try:
        return make(**told, **keywords)
    except UserError:
        raise
    except Exception as error:  # whatever the code of a part, which may be of another library, raises
        given = ", ".join(f"{name}={value!r:.60}" for name, value in keywords.items())
        raise UserError(f"{kind} refuses {given or 'no keywords'}: {error!s:.300}. {takes} Correct the keywords.") from error


def _check_keyword(came: object, parameter: inspect.Parameter, *, kind: str) -> None:
    default, may_be_none = parameter.default, parameter.annotation == int | None
    if type(default) is bool:
        is_good, wanted = type(came) is bool, "True or False"
    elif type(default) is int or may_be_none:
        is_counted = may_be_none or default > 0
        is_good = (type(came) is int and (came > 0 or not is_counted)) or (came is None and may_be_none)
        wanted = f"A whole number{' from 1 up' if is_counted else ''}{' or None' if may_be_none else ''}"
    else:
        return
    if not is_good:
        raise UserError(f"{kind} got {parameter.name}={came!r}. {wanted} is accepted. Set one, such as the default {default}.")
