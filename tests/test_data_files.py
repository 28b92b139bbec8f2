"""text/data_files.py: files of every kind, entries of dataset_info.json, recognized layouts."""
import json

import numpy as np
import pytest

from tests.rows import ALPACA, write_info, load_rows, convert_row, roles_and_texts
from text import conversations

CHAT = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "answer"}]


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, content", [
    ("d.json", json.dumps([ALPACA, ALPACA])),
    ("d.json", json.dumps(ALPACA) + "\n\n" + json.dumps(ALPACA)),  # lines in a .json
    ("d.jsonl", json.dumps(ALPACA) + "\r\n" + json.dumps(ALPACA) + "\r\n"),
    ("d.jsonl", json.dumps([ALPACA, ALPACA], indent=1)),  # a list in a .jsonl
    ("d.csv", "instruction,input,output\nask,,answer\n\"ask\",\"\",\"answer\"\n"),
    ("d.json", "\ufeff" + json.dumps([ALPACA, ALPACA])),  # with a byte-order mark
])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode())
    write_info(tmp_path, d={"file_name": name})
    assert [row.data for row in load_rows(tmp_path)] == [ALPACA, ALPACA]


def test_lines_of_text_and_line_separators(tmp_path):
    """U+2028 is a character, not the end of a row; an empty line is an empty document."""
    (tmp_path / "d.txt").write_bytes("one\r\n\ntwo \u2028 three\n".encode())
    (tmp_path / "e.jsonl").write_text(json.dumps({"text": "a\u2028b"}, ensure_ascii=False),
                                      encoding="utf-8")
    write_info(tmp_path, d={"file_name": "d.txt", "columns": {"prompt": "text"}},
            e={"file_name": "e.jsonl", "columns": {"prompt": "text"}})
    found = [row.data["text"] for row in load_rows(tmp_path, "d,e", stage="pt")]
    assert found == ["one", "", "two \u2028 three", "a\u2028b"]


def test_csv_values_stay_text(tmp_path):
    (tmp_path / "d.csv").write_text('instruction,output\n1+1,2\nnothing,None\n"two\nlines","a,b"\n',
                                    encoding="utf-8")
    found = load_rows(tmp_path, str(tmp_path / "d.csv"))
    assert [row.data["output"] for row in found] == ["2", "None", "a,b"]
    assert found[2].data["instruction"] == "two\nlines"


def test_folder_is_read_in_the_order_of_names(tmp_path):
    (tmp_path / "many").mkdir()
    for name in ("b", "a"):
        (tmp_path / "many" / f"{name}.json").write_text(
            json.dumps([{**ALPACA, "output": name}]), encoding="utf-8"
        )
    write_info(tmp_path, d={"file_name": "many"})
    assert [row.data["output"] for row in load_rows(tmp_path)] == ["a", "b"]
    (tmp_path / "many" / "c.txt").write_text("x", encoding="utf-8")
    with pytest.raises(ValueError, match="one type; it has .json, .txt"):
        load_rows(tmp_path)


@pytest.mark.parametrize("name, content, sentence", [
    ("d.json", b'[{"instruction": "a",}]', "not valid JSON at line 1, column"),
    ("d.json", b'{\n "instruction": "a"\n}', "holds one object"),
    ("d.json", "[]".encode("utf-16"), "is UTF-16"),
    ("d.json", b"[]", "is empty"),
    ("d.txt", b"", "is empty"),
    ("d.tar.gz", b"", "'.tar.gz' cannot be read"),
    ("d.xlsx", b"PK", "'.xlsx' cannot be read"),
])
def test_unreadable_files(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    write_info(tmp_path, d={"file_name": name})
    with pytest.raises(ValueError, match=sentence):
        load_rows(tmp_path)


# ---- dataset_info.json ---------------------------------------------------------------------------


@pytest.mark.parametrize("entry, sentence", [
    ({"file_name": "e.json"}, "e.json does not exist .*did you mean 'd.json'"),
    ({"formatting": "sharegtp"}, "'sharegtp' is none of alpaca, sharegpt"),
    ({"columns": {"promt": "instruction"}}, "columns: 'promt' is unknown .*did you mean 'prompt'"),
    ({"columns": {"prompt": "instruction", "response": "ouput"}},
     "no row has the column 'ouput' .*'output'"),
    ({"columns": {"prompt": "instruction"}},
     "must name 'response' .the answer to learn.; plain text is for stage: pt"),
    ({"formatting": "sharegpt", "tags": {"role_tag": "role"}}, "tags: 'content_tag' is not named"),
    ({"ranking": True}, "preference pairs"),
    ({"columns": {"prompt": "instruction", "response": "output", "images": "i"}}, "holds images"),
    ({"split": "test"}, "a local file has no splits"),
    ({"file_name": None, "om_hub_url": "a/b"},
     "om_hub_url is given, but only file_name, hf_hub_url"),
    ({"file_name": None}, "neither file_name nor hf_hub_url is given"),
    ({"file_name": ["d.json"]}, 'file_name: \\["d.json"\\] is not a text'),
    ({"formatting": ["alpaca"]}, "formatting: .* is not a text"),
    ({"columns": ["instruction"]}, "columns: .* is not an object of texts"),
    ({"columns": {"prompt": None, "response": "output"}}, "columns: .* is not an object of texts"),
    ({"formatting": "sharegpt", "tags": 5}, "tags: 5 is not an object of texts"),
    ({"num_samples": "3"}, 'num_samples: "3" is not a whole number above 0'),
    ({"num_samples": 0}, "num_samples: 0 is not a whole number above 0"),
    ({"ranking": "yes"}, "ranking: .* is not true or false"),
])
def test_invalid_entries_are_errors(tmp_path, entry, sentence):
    (tmp_path / "d.json").write_text(json.dumps([ALPACA]), encoding="utf-8")
    write_info(tmp_path, d={"file_name": "d.json", **entry})
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        load_rows(tmp_path)


def test_null_in_an_entry_equals_a_missing_key(tmp_path):
    assert roles_and_texts(
        convert_row(tmp_path, ALPACA, {"columns": None, "num_samples": None, "subset": None})
    ) == [("user", "ask"), ("assistant", "answer")]


def test_dataset_info_with_a_byte_order_mark(tmp_path):
    (tmp_path / "d.json").write_text(json.dumps([ALPACA]), encoding="utf-8")
    (tmp_path / "dataset_info.json").write_text(
        '{"d": {"file_name": "d.json"}}', encoding="utf-8-sig"
    )
    assert len(load_rows(tmp_path)) == 1


def test_unknown_dataset_and_missing_info(tmp_path):
    with pytest.raises(FileNotFoundError,
                       match="neither .*dataset_info.json nor a file of that name"):
        load_rows(tmp_path, "identity")
    write_info(tmp_path, identity={"file_name": "i.json"})
    with pytest.raises(ValueError, match="no dataset 'identitty' .did you mean 'identity'"):
        load_rows(tmp_path, "identitty")


def test_num_samples_and_max_samples(tmp_path):
    """num_samples is numpy's global permutation at `seed`, one stream for all datasets; max_samples
    takes the first rows."""
    (tmp_path / "d.json").write_text(json.dumps([{**ALPACA, "output": str(n)} for n in range(9)]),
                                     encoding="utf-8")
    write_info(tmp_path, a={"file_name": "d.json", "num_samples": 4},
               b={"file_name": "d.json", "num_samples": 12})
    found = [int(row.data["output"]) for row in load_rows(tmp_path, "a,b", seed=7)]
    state = np.random.get_state()
    np.random.seed(7)
    first = np.random.permutation(9)[:4]
    second = np.random.permutation(9)
    again = np.random.choice(9, 3)
    np.random.set_state(state)
    assert found == [*first, *second, *again]
    assert ([int(row.data["output"]) for row in load_rows(tmp_path, "a", seed=7, max_samples=2)]
            == [*first[:2]])


def test_notes_on_unused_keys_and_columns(tmp_path):
    (tmp_path / "d.json").write_text(json.dumps([{**ALPACA, "system": "s"}]), encoding="utf-8")
    write_info(tmp_path, d={"file_name": "d.json", "colums": {}}, o={"file_name": "d.json"})
    notes = []
    assert len(load_rows(tmp_path, "d,d", notes)) == 1
    assert any("'colums' is not used (did you mean 'columns'?)" in note for note in notes)
    assert any("columns not used: system" in note for note in notes)
    assert any("named twice is read once" in note for note in notes)


# ---- layouts -------------------------------------------------------------------------------------


def test_tags_of_an_alpaca_entry_are_named_and_not_read(tmp_path):
    """Complete or not, also where a column holds turns."""
    row = {"instruction": [{"role": "user", "content": "a"}], "input": "", "output": "b"}
    (tmp_path / "d.json").write_text(json.dumps([row]), encoding="utf-8")
    write_info(tmp_path, d={"file_name": "d.json", "tags": {"user_tag": "u"}})
    notes = []
    rows = load_rows(tmp_path, notes=notes)
    assert "tags are not used: formatting alpaca has no turns" in " ".join(notes)
    assert [m["content"] for m in conversations.convert(rows[0]).messages] == ["a", "b"]



@pytest.mark.parametrize("row, layout", [
    (ALPACA, "alpaca"), ({"prompt": "ask", "completion": "answer"}, "alpaca"),
    ({"question": "ask", "answer": "answer"}, "alpaca"),
    ({"input": "ask", "output": "answer"}, "alpaca"),
    ({"messages": CHAT}, "messages"),
    ({"conversations": [{"from": "human", "value": "ask"}, {"from": "gpt", "value": "answer"}]},
     "messages"),
    ({"conversations": [{"from": "user", "value": "ask"},
                        {"from": "assistant", "value": "answer"}]}, "messages"),
])
def test_the_layout_of_a_file_is_recognized(tmp_path, row, layout):
    (tmp_path / "mine.jsonl").write_text(json.dumps(row), encoding="utf-8")
    notes = []
    found = load_rows(tmp_path, str(tmp_path / "mine.jsonl"), notes)
    assert roles_and_texts(conversations.convert(found[0])) == [
        ("user", "ask"), ("assistant", "answer")
    ]
    assert any(f"recognized as {layout}" in note for note in notes)


def test_a_file_of_prompts_alone_is_recognized_where_the_model_answers(tmp_path):
    file, notes = tmp_path / "d.jsonl", []
    file.write_text(json.dumps({"prompt": "a"}))
    row = load_rows(tmp_path, str(file), notes, stage="grpo")[0]
    assert row.source.columns == {"prompt": "prompt"}
    with pytest.raises(ValueError, match="do not show which ones to read: prompt .a row needs an "
                                         "answer here; stages ppo and grpo train on prompts"):
        load_rows(tmp_path, str(file))


def test_a_layout_that_is_not_recognized(tmp_path):
    (tmp_path / "d.jsonl").write_text(json.dumps({"text": "x"}), encoding="utf-8")
    with pytest.raises(ValueError,
                       match="do not show which ones to read: text .plain text is for stage: pt"):
        load_rows(tmp_path, str(tmp_path / "d.jsonl"))
    assert conversations.convert(load_rows(tmp_path, str(tmp_path / "d.jsonl"), stage="pt")[0],
                                 "pt").messages[0]["content"] == "x"


@pytest.mark.parametrize("content, shown",
                         [(b"[1, 2]", "row 1 is 1"), (b'["a"]', "row 1 is a"),
                          (b"null", "row 1 is null"), (b"\x93\xff\x00\x01", "row 1 is ")])
def test_a_file_without_objects(tmp_path, content, shown):
    (tmp_path / "d.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"d.json: no row is an object with columns; {shown}"):
        load_rows(tmp_path, str(tmp_path / "d.json"))


def test_questions_and_answers_in_stage_pt_are_an_error(tmp_path):
    (tmp_path / "d.json").write_text(json.dumps([ALPACA]), encoding="utf-8")
    with pytest.raises(
        ValueError,
        match="stage: pt reads one column of text; questions and answers are for stage: sft",
    ):
        load_rows(tmp_path, str(tmp_path / "d.json"), stage="pt")


# ---- bad rows ------------------------------------------------------------------------------------


def test_csv_row_with_a_field_too_many(tmp_path):
    (tmp_path / "d.csv").write_text("instruction,output\na,b,c\n", encoding="utf-8")
    write_info(tmp_path, d={"file_name": "d.csv"})
    with pytest.raises(ValueError, match="wrong number of fields"):
        conversations.convert(load_rows(tmp_path)[0])
