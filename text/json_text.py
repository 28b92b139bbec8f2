"""JSON of strangers: every mistake in it is a ValueError that says what is wrong.

Requires: nothing.
Next: text/data_files.py.
"""
import json

TOO_DEEP = "it is nested too deep (more than about 900 levels)"
TOO_LONG = "it holds a number of more than 4,300 digits; write it as text, in quotes"


def parse(text: str):
    """The value of a JSON text. Raises ValueError if it is not JSON, or absurd."""
    return decode(json.loads, text)


def parse_first(text: str, start: int = 0, decoder=json.JSONDecoder()):
    """(value, end) of the JSON value at `start`, whatever follows it; errors as in `parse`."""
    return decode(decoder.raw_decode, text, start)


def decode(read, *arguments):
    """read(*arguments), with every error a ValueError; json.JSONDecodeError is one of these."""
    try:
        return read(*arguments)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    except json.JSONDecodeError:
        raise
    except ValueError:          # Python converts at most 4,300 digits
        raise ValueError(TOO_LONG) from None


def why_not_row(line: str) -> str:
    """Why a line of a data file is no row, and what to do."""
    try:
        parse(line)
        return "not a JSON object"
    except json.JSONDecodeError as error:
        reason = f"not a JSON object ({error.msg} at character {error.pos + 1})"
    except ValueError as error:
        return str(error)
    if line.rstrip().endswith(","):
        try:
            parse(line.rstrip().removesuffix(","))
        except ValueError:
            return reason
        return ("not a JSON object: a comma follows it. Remove the commas at the ends of lines "
                "(sed 's/,$//' FILE > NEW_FILE), or put [ and ] around the rows")
    return reason


def why_not_rows(text: str) -> str:
    """Why a file that begins with an object over several lines has no rows; "": it does not."""
    text = text.lstrip()
    try:
        data, end = parse_first(text)
    except ValueError:
        return ""
    if "\n" not in text[:end]:
        return ""
    rest = text[end:].strip()
    if rest:
        return ("its rows are spread over several lines; write one row a line (jq -c . FILE > "
                "NEW_FILE, after removing commas between rows), or a list, [{…}, {…}]")
    hint = wrapped_hint(data) if isinstance(data, dict) else ""
    return f"it holds one object; make it a list of rows, [{{…}}, {{…}}], or one row a line{hint}"


def wrapped_hint(data: dict) -> str:
    """A hint where a single object holds the rows in one of its values."""
    for key, value in data.items():
        if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            return (f". '{key}' is a list of {len(value)} objects: if these are the rows, make "
                    f"that list the file (jq '.[\"{key}\"]' FILE > NEW_FILE)")
    if len(data) > 1 and all(isinstance(value, dict) for value in data.values()):
        return (". Its values are objects: if these are the rows, make them a list "
                "(jq '[.[]]' FILE > NEW_FILE)")
    return ""
