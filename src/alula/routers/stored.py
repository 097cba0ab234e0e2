"""What was stored of routers, by the router it belongs to. It knows names and shapes, no file."""

from collections.abc import Mapping

from torch import Tensor

from alula.errors import UserError

Shapes = Mapping[str, tuple[int, ...]]


def by_router(tensors: Mapping[str, Tensor], known: Mapping[str, Shapes]) -> dict[str, dict[str, Tensor]]:
    """Each router's own tensors; none, or all that it stores.

    Args:
        tensors: by ``<router>.<name>``.
        known: the shapes of what each router can store.

    Raises:
        UserError: a tensor of no router, one that is missing beside others, or one that is not of the router's shape or no floating
            point.
    """
    left, found = dict(tensors), {}
    for router, shapes in known.items():
        own = {key: left.pop(f"{router}.{key}") for key in shapes if f"{router}.{key}" in left}
        for key, shape in shapes.items() if own else ():
            came = f"{own[key].dtype} of shape {tuple(own[key].shape)}" if key in own else "missing"
            if key not in own or own[key].shape != shape or not own[key].is_floating_point():
                wanted = f"this model's router wants floating point of shape {shape}"
                raise UserError(f"'{router}.{key}' is {came}; {wanted}. Take the model it was made for.")
        found[router] = own
    if left:
        raise UserError(f"'{next(iter(left))}' belongs to none of this model's routers. Take the model it was made for.")
    return found
