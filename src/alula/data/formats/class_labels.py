"""Class labels of the ``datasets`` library: its files keep a label's number, and the name beside the rows."""

from typing import Any


def with_names(value: Any, described: Any) -> Any:
    """`value` with the name of each class label in place of its number, or None for a number without one (-1: not labelled).

    Args:
        value: a row, or what is in one.
        described: its type as ``Features.to_dict`` writes it; None: nothing is known.

    Example:
        >>> animal = {"names": ["cat", "dog"], "_type": "ClassLabel"}
        >>> with_names({"question": "Which?", "answer": [1, 0]}, {"answer": {"feature": animal, "_type": "List"}})
        {'question': 'Which?', 'answer': ['dog', 'cat']}
    """
    if not isinstance(described, dict):
        return value
    if described.get("_type") == "ClassLabel" and isinstance(value, int):
        names = described["names"]
        return names[value] if 0 <= value < len(names) else None
    if isinstance(value, list):
        return [with_names(item, described.get("feature")) for item in value]
    if isinstance(value, dict):
        return {key: with_names(item, described.get(key)) for key, item in value.items()}
    return value
