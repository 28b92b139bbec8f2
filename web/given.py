"""Checked values from a query or a JSON body.

Requires: serving/schema.py (BadRequest).
Next: board.py.
"""
import re

from serving.schema import BadRequest


def given_text(values: dict, name: str, default: str | None = None, empty: bool = False) -> str:
    """A text of a query or a body. Raises BadRequest if it is not a text, or is missing and
    has no default."""
    value = values.get(name, "" if empty else default)
    if value is None or not value and not empty:
        raise BadRequest(f"{name} is missing", name)
    if not isinstance(value, str) or "\0" in value:
        raise BadRequest(f"{name}: expected a text", name)
    return value


def given_number(values: dict, name: str, default: int | None = None) -> int:
    """A whole number, 0 or more, of a query or a body. Raises BadRequest for other values."""
    value = values.get(name, default)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,15}", value):
        return int(value)
    raise BadRequest(f"{name}: expected a whole number, 0 or more", name)
