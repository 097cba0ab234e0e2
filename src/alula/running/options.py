"""Which options a recipe may give a method or an addition: looked at before anything is loaded."""

from collections.abc import Iterable
from inspect import Parameter, signature

from alula.config import MethodChoice
from alula.data.checking import check
from alula.errors import UserError, nearest
from alula.methods import ADDITIONS, METHODS, Method
from alula.methods.additions import Addition

FROM_THE_RUN = ("settings", "tokenizer", "mixtures", "learners", "collator")
"""Keywords that a run gives itself."""


def check_options(choice: MethodChoice) -> None:
    """Refuses options that the method or one of its additions does not take.

    Raises:
        UserError: an unknown method, addition or option (with the nearest known), or a bad value where values are checked by a class.
    """
    kind = METHODS[choice.name]
    _refuse_unknown(choice.options, kind, f"method '{choice.name}'")
    for addition in choice.additions:
        _refuse_unknown(addition.options, ADDITIONS[addition.name], f"addition '{addition.name}'")
    if kind.further_options is not None:
        further = {name: value for name, value in choice.options.items() if name in kind.further_options.model_fields}
        check(kind.further_options, further, f"method '{choice.name}'", path=("options",))


def option_names(kind: type[Method] | type[Addition]) -> list[str]:
    """The keywords of a method's or an addition's class that a recipe may give."""
    own = [name for name, one in signature(kind).parameters.items() if one.kind is Parameter.KEYWORD_ONLY and name not in FROM_THE_RUN]
    further = kind.further_options if issubclass(kind, Method) else None
    return [*own, *(further.model_fields if further else ())]


def _refuse_unknown(options: Iterable[str], kind: type[Method] | type[Addition], what: str) -> None:
    known = option_names(kind)
    for name in options:
        if name not in known:
            raise UserError(f"Unknown option '{name}' of {what}. {nearest(name, known)}")
