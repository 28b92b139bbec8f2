"""Texts that can be printed and encoded: excerpts for messages, and what is no character.

Requires: errors.py.
Next: text/turns.py.
"""
import json

from errors import printable

ESCAPED_BYTES = ("\udc80", "\udcff")    # how Python's surrogateescape reads bytes 0x80 to 0xff


def excerpt(value, limit: int = 200) -> str:
    """A row, or a value in it, for a message: JSON, shortened, printable whatever bytes it has."""
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    except (RecursionError, ValueError):        # too deep, or a number of too many digits
        text = f"a {type(value).__name__} that is too large to show"
    shown = printable(text[:limit])
    if len(text) <= limit:
        return shown
    return f"{shown} … ({len(text) - limit} more characters)"


def why_not_utf8(text: str, from_bytes: bool) -> str:
    """Why a text cannot be written as UTF-8, and what to do; "" if it can.

    Such a text holds a surrogate, half of a pair that makes one character. from_bytes: surrogates
    between ESCAPED_BYTES stand for bytes that were read.
    """
    if text.isascii():
        return ""
    try:
        text.encode()
        return ""
    except UnicodeEncodeError as error:
        found = text[error.start]
    lowest, highest = ESCAPED_BYTES
    if from_bytes and lowest <= found <= highest:
        return (f"it holds bytes that are not UTF-8, the first is 0x{ord(found) - 0xdc00:02x} "
                "(iconv converts a file)")
    return (f"it holds \\u{ord(found):04x}, half of a character: a text was cut within an escape "
            "such as \\ud83d\\ude00. Write both halves, or neither")


def check_utf8(text: str, where: str, from_bytes: bool = False):
    """Raise ValueError for a text that cannot be written as UTF-8; see why_not_utf8."""
    if reason := why_not_utf8(text, from_bytes):
        raise ValueError(f"{where}: {reason}: {excerpt(text)}")
