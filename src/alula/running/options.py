"""Which options a recipe may give a method or an addition: looked at before anything is loaded."""

from collections.abc import Mapping
from inspect import Parameter, signature
from typing import Any

from pydantic import ConfigDict, create_model

from alula.config import MethodChoice
from alula.data.checking import check
from alula.data.interleaved.encoder import minilm_folder
from alula.errors import UserError, nearest
from alula.methods import ADDITIONS, METHODS, Method
from alula.methods.additions import Addition
from alula.models.instructions import EMBEDDED

FROM_THE_RUN = ("settings", "tokenizer", "mixtures", "learners", "collator")
"""Keywords that a run gives itself."""


def check_options(choice: MethodChoice) -> None:
    """Refuses options that the method or one of its additions does not take, and values that are not of an option's type.

    Raises:
        UserError: an unknown method, addition or option (with the nearest known), a value of another type, a bad one where values
            are checked by a class, or ``instruction: minilm`` without its package.
    """
    kind = METHODS[choice.name]
    _check_own(choice.options, kind, f"method '{choice.name}'")
    for addition in choice.additions:
        _check_own(addition.options, ADDITIONS[addition.name], f"addition '{addition.name}'")
    if kind.further_options is not None:
        further = {name: value for name, value in choice.options.items() if name in kind.further_options.model_fields}
        check(kind.further_options, further, f"method '{choice.name}'", path=("options",))
    if choice.options.get("instruction") == EMBEDDED:
        minilm_folder()


def option_names(kind: type[Method] | type[Addition]) -> list[str]:
    """The keywords of a method's or an addition's class that a recipe may give."""
    further = kind.further_options if issubclass(kind, Method) else None
    return [*_own(kind), *(further.model_fields if further else ())]


def _own(kind: type[Method] | type[Addition]) -> dict[str, Any]:
    """The options that the class names itself, each with its type."""
    keywords = (one for one in signature(kind).parameters.values() if one.kind is Parameter.KEYWORD_ONLY)
    return {one.name: one.annotation for one in keywords if one.name not in FROM_THE_RUN}


def _check_own(options: Mapping[str, Any], kind: type[Method] | type[Addition], what: str) -> None:
    known, own = option_names(kind), _own(kind)
    for name in options:
        if name not in known:
            raise UserError(f"Unknown option '{name}' of {what}. {nearest(name, known)}")
    typed: dict[str, Any] = {name: (annotation, None) for name, annotation in own.items()}
    # Strict: the class gets what was given, so "8" is no number.
    check(create_model("Options", __config__=ConfigDict(strict=True), **typed), options, what, path=("options",))
