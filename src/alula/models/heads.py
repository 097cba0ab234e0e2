"""The width of one attention head, and the arithmetic that encoders and connectors refuse a bad one with."""

from alula.errors import UserError


def head_dim(dim: int, *, num_heads: int, kind: str) -> int:
    """The width of one attention head.

    Args:
        kind: of the part, for the error: `Connector 'deformable'`.

    Raises:
        UserError: `dim` is no multiple of `num_heads`.
    """
    if num_heads <= 0 or dim % num_heads:
        fitting = [count for count in range(1, min(dim, 32) + 1) if dim % count == 0]
        raise UserError(
            f"{kind} got num_heads={num_heads} for features {dim} wide: {dim} / {num_heads} is no whole number. "
            f"Accepted are divisors of {dim}. Set num_heads to one of {', '.join(map(str, fitting))}."
        )
    return dim // num_heads
