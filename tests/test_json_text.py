"""text/json_text.py: what is wrong with a data file, in one sentence, for files of every kind."""
import json
import os
import re

import pytest

from tests.rows import ALPACA, load_rows, write_info
from text import conversations
from text.json_text import parse, why_not_row
from text.written_formats import find_template

ROW = json.dumps(ALPACA)
PRETTY = json.dumps(ALPACA, indent=2)
MANY_DIGITS = "9" * 5000
DEEP = "[" * 100_000 + "]" * 100_000


def refuse(tmp_path, text, name="d.json"):
    """The sentence about a file with this text."""
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        for row in load_rows(tmp_path, str(tmp_path / name)):
            conversations.convert(row)
    assert len(str(caught.value)) < 1000
    return str(caught.value)


@pytest.mark.parametrize("text, sentence", [
    (ROW + ",\n" + ROW, "a comma follows it. Remove the commas at the ends of lines"),
    (ROW + ",\n" + ROW + ",\n", "row 1 is {.*: a comma follows it"),
    (PRETTY + "\n" + PRETTY, "its rows are spread over several lines; write one row a line"),
    (PRETTY + ",\n" + PRETTY, "its rows are spread over several lines; write one row a line"),
    (PRETTY, "it holds one object; make it a list"),
    ("[\n" + ROW + ",\n]", "not valid JSON at line 3, column 1 .*Remove the comma before ]"),
    (json.dumps({"data": [ALPACA, ALPACA]}), "'data' is a list of 2 objects: if these are"),
    (json.dumps({"version": 1, "data": [ALPACA]}, indent=1), "'data' is a list of 1 objects"),
    (json.dumps({"a": ALPACA, "b": ALPACA}), "Its values are objects: if these are the rows"),
    ('{"instruction": "a", "ouput": "b"}', "instruction, ouput .did you mean 'output'."),
    ('{"instrution": "a", "output": "b"}', "instrution .did you mean 'instruction'.., output"),
    ('{"conversations": 1}', "'conversations' must be a list of turns"),
    ('{"messages": 1}', "'messages' must be a list of turns"),
    (ROW + '\n{"instruction": "a", "output"', "not a JSON object .Expecting"),
    (ROW + '\n{"n": %s}' % MANY_DIGITS, "it holds a number of more than 4,300 digits"),
    ('[%s, {"n": %s}]' % (ROW, MANY_DIGITS), "row 2: it holds a number of more than 4,300"),
    (ROW + '\n{"n": %s}' % DEEP, "it is nested too deep"),
    ('[%s, {"n": %s}]' % (ROW, DEEP), "row 2: it is nested too deep"),
    (DEEP, "row 1: it is nested too deep"),
    ('{"a":' * 100_000 + "1" + "}" * 100_000, "it is nested too deep"),
])
def test_the_sentence_says_what_is_wrong(tmp_path, text, sentence):
    found = refuse(tmp_path, text)
    assert re.search(sentence, found, re.DOTALL), found


def test_rows_before_and_after_a_bad_one_are_read(tmp_path):
    lines = [ROW, '{"n": %s}' % MANY_DIGITS, '{"n": %s}' % DEEP, ROW]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    rows = load_rows(tmp_path, str(tmp_path / "d.jsonl"))
    assert [isinstance(row.data, dict) for row in rows] == [True, False, False, True]
    assert all(len(row.excerpt) < 300 for row in rows)


def test_columns_that_are_nearly_known_are_named_with_their_spelling(tmp_path):
    (tmp_path / "d.json").write_text(json.dumps([{**ALPACA, "sytem": "s", "id": 1}]))
    notes = []
    load_rows(tmp_path, str(tmp_path / "d.json"), notes)
    assert notes[-1].endswith("columns not used: sytem (did you mean 'system'?), id")


def test_dataset_info_that_is_absurd(tmp_path):
    path = tmp_path / "dataset_info.json"
    for text, sentence in (('{"d": %s}' % DEEP, "it is nested too deep"),
                           ('{"d": %s}' % MANY_DIGITS, "more than 4,300 digits")):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"dataset_info.json: not valid JSON .{sentence}|"
                                             f"dataset_info.json: .*{sentence}"):
            load_rows(tmp_path)
    (tmp_path / "d.json").write_text(f"[{ROW}, {ROW}]")
    write_info(tmp_path, d={"file_name": "d.json", "num_samples": 10**18})
    with pytest.raises(ValueError, match="num_samples: 10{18} of 2 rows; at most 100,000,000"):
        load_rows(tmp_path)
    write_info(tmp_path, d={"file_name": "d.json", "num_samples": 5})
    assert len(load_rows(tmp_path)) == 5


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes on Windows")
def test_pipes_and_devices_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "d.jsonl")
    for name in (tmp_path / "d.jsonl", "/dev/zero"):
        with pytest.raises(ValueError, match="is neither a file nor a folder but a pipe or a dev"):
            load_rows(tmp_path, str(name))


def test_a_misspelled_template_names_the_nearest_and_where_the_list_is():
    for name, sentence in (("qwen33", "did you mean 'qwen3', 'qwen'"), (5, "template: 5 is not"),
                           ([1], "template: .1. is not the name"), ("zzz", "unknown template")):
        with pytest.raises(ValueError, match=sentence) as caught:
            find_template(name)
        assert "text.template_check` lists them all" in str(caught.value)
        assert len(str(caught.value)) < 150


def test_parse_and_why_not_row():
    assert parse('{"a": 1}') == {"a": 1}
    assert why_not_row("5") == "not a JSON object"
    assert why_not_row("{").startswith("not a JSON object (Expecting property name")
