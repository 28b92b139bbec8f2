"""text/conversations.py: each layout becomes a conversation, and bad rows say why."""
import json

import pytest

from tests.common import SHARED, needs_shared
from tests.rows import ALPACA, write_info, load_rows, convert_row, roles_and_texts
from text import conversations


# ---- layouts -------------------------------------------------------------------------------------


def test_alpaca(tmp_path):
    entry = {"columns": {"prompt": "instruction", "query": "input", "response": "output",
                         "history": "history", "system": "system", "tools": "tools"}}
    row = {"instruction": "a", "input": "b", "output": "c", "history": [["q", "r"]], "system": "s",
           "tools": [{"name": "t"}]}
    found = convert_row(tmp_path, row, entry)
    assert roles_and_texts(found) == [("user", "q"), ("assistant", "r"), ("user", "a\nb"),
                                      ("assistant", "c")]
    assert found.system == "s" and json.loads(found.tools) == [{"name": "t"}]
    assert roles_and_texts(convert_row(tmp_path, {"instruction": "a", "output": "c"})) == [
        ("user", "a"), ("assistant", "c")
    ]
    assert roles_and_texts(
        convert_row(tmp_path, {"text": "a"}, {"columns": {"prompt": "text"}}, stage="pt")
    ) == [("user", "a")]


PROMPTS_ALONE = {
    "no column": ({"instruction": "a"}, {}),
    "a declared prompt": ({"prompt": "a"}, {"columns": {"prompt": "prompt"}}),
    "an empty answer": ({"instruction": "a", "output": ""}, {}),
    "null": ({"instruction": "a", "output": None}, {}),
    "turns": ({"conversations": [{"from": "human", "value": "a"}]}, {"formatting": "sharegpt"}),
    "TRL's turns": ({"prompt": [{"role": "user", "content": "a"}]},
                    {"columns": {"prompt": "prompt"}}),
}


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
@pytest.mark.parametrize("name", PROMPTS_ALONE)
def test_where_the_model_answers_a_row_needs_no_answer(tmp_path, name, stage):
    row, entry = PROMPTS_ALONE[name]
    found = convert_row(tmp_path, row, entry, stage)
    assert roles_and_texts(found) == [("user", "a"), ("assistant", "")]
    with pytest.raises(ValueError, match="output|answer"):
        convert_row(tmp_path, row, entry)


def test_earlier_answers_and_misspelled_columns_are_still_errors_where_the_model_answers(tmp_path):
    with pytest.raises(ValueError, match="answer 1 is empty"):
        convert_row(tmp_path, {"conversations": [
            {"from": "human", "value": "a"}, {"from": "gpt", "value": ""},
            {"from": "human", "value": "b"}]}, {"formatting": "sharegpt"}, "grpo")
    with pytest.raises(ValueError, match="no row has the column 'anwser'"):
        convert_row(tmp_path, {"q": "a", "answer": "b"},
                    {"columns": {"prompt": "q", "response": "anwser"}}, "grpo")


def test_sharegpt(tmp_path):
    turns = chat(("system", "s"), ("human", "a"), ("function_call", "{}"), ("observation", "o"),
                 ("gpt", "b"))
    found = convert_row(tmp_path, turns, {"formatting": "sharegpt"})
    assert found.system == "s"
    assert roles_and_texts(found) == [("user", "a"), ("function", "{}"), ("observation", "o"),
                                      ("assistant", "b")]


CALL = {"type": "function", "function": {"name": "f", "arguments": "{\"x\": 1}"}}
TOOL_TURNS = [{"role": "user", "content": "a"},
              {"role": "assistant", "content": None, "tool_calls": [CALL]},
              {"role": "tool", "content": "1"}, {"role": "tool", "content": "2"},
              {"role": "assistant", "content": "b"}]


def test_openai_and_messages_layouts(tmp_path):
    """formatting openai, as in LLaMA-Factory: arguments stay text and the system text is extended.
    formatting messages: neither."""
    row = {"messages": TOOL_TURNS, "tools": "[]"}
    columns = {"messages": "messages", "tools": "tools"}
    openai = convert_row(
        tmp_path, row,
        {"formatting": "openai", "columns": columns, "tags": conversations.OPENAI_TAGS},
    )
    plain = convert_row(tmp_path, row, {"formatting": "messages", "columns": columns})
    assert json.loads(roles_and_texts(openai)[1][1]) == [{"name": "f", "arguments": "{\"x\": 1}"}]
    assert json.loads(roles_and_texts(plain)[1][1]) == [{"name": "f", "arguments": {"x": 1}}]
    for found in (openai, plain):
        assert roles_and_texts(found)[2] == ("observation",
                                             "1\n</tool_response>\n<tool_response>\n2")
    assert plain.system == openai.system == ""
    assert ([conversations.openai_system(*texts)
             for texts in (("", ""), ("s", ""), ("", "t"), ("s", "t"))]
            == ["detailed thinking off", "s\ndetailed thinking off", "", "s\n"])


# ---- bad rows ------------------------------------------------------------------------------------


def chat(*turns):
    return {"conversations": [{"from": role, "value": text} for role, text in turns]}


@pytest.mark.parametrize("row, entry, sentence", [
    ({"instruction": "a"}, None, "the column 'output' is missing: a row needs an answer here; "
     "stages ppo and grpo train on prompts alone, and `python chat.py CONFIG --input FILE`"),
    ({"input": "a", "output": "b"}, None, "the column 'instruction' is missing"),
    ({**ALPACA, "output": ""}, None, "answer 1 is empty"),
    ({**ALPACA, "output": None}, None, "answer 1 is empty"),
    ({**ALPACA, "output": 5}, None, "'output' must be text, not 5"),
    (["a", "b"], None, "not a JSON object"),
    (chat(("gpt", "a"), ("human", "b")), "sharegpt",
     "turn 1 is by 'gpt', expected observation or human"),
    (chat(("human", "a"), ("human", "b")), "sharegpt",
     "turn 2 is by 'human', expected function_call or gpt"),
    (chat(("human", "a"), ("assistant", "b")), "sharegpt", "turn 2 is by 'assistant', expected"),
    ({"conversations": ["human", "gpt"]}, "sharegpt",
     "turn 1 is human, not an object with 'from' and 'value'"),
    ({"instruction": "a", "output": [5, {"role": "assistant", "content": "b"}]}, None,
     "turn 1 is 5, not an object with"),
    ({"conversations": [{"role": "user", "content": "a"}]}, "sharegpt",
     "turn 1 has no 'from' .keys: role, content; role_tag and content_tag under tags"),
    ({"conversations": [None]}, "sharegpt", "turn 1 is null, not an object with"),
    (chat(("human", "a"), ("gpt", "b"), ("human", "c")), "sharegpt",
     "the last turn is not an answer: a row needs an answer here; stages ppo and grpo"),
    (chat(("human", "a"), ("gpt", " ")), "sharegpt", "answer 1 is empty"),
    ({"conversations": []}, "sharegpt", "must be a list of turns that is not empty"),
    ({"conversations": "a"}, "sharegpt", "must be a list of turns"),
])
def test_bad_rows_say_why(tmp_path, row, entry, sentence):
    good = ALPACA if entry is None else chat(("human", "a"), ("gpt", "b"))
    (tmp_path / "d.json").write_text(json.dumps([good, row]), encoding="utf-8")
    write_info(tmp_path, d={"file_name": "d.json", "formatting": entry or "alpaca"})
    found = load_rows(tmp_path)
    conversations.convert(found[0])
    with pytest.raises(ValueError, match=sentence):
        conversations.convert(found[1])
    assert found[1].where == f"dataset 'd', {tmp_path / 'd.json'} row 2"


def test_broken_lines_and_bytes_spoil_one_row_each(tmp_path):
    """A line that is no JSON, bytes of another encoding, and a lone surrogate."""
    lines = [json.dumps(ALPACA).encode(), b'{"instruction": "a", "output"',
             json.dumps({**ALPACA, "output": "caf\u00e9"}, ensure_ascii=False).encode("latin-1"),
             b'{"instruction": "a", "output": "\\ud83d"}']
    (tmp_path / "d.jsonl").write_bytes(b"\n".join(lines))
    write_info(tmp_path, d={"file_name": "d.jsonl"})
    found = load_rows(tmp_path)
    conversations.convert(found[0])
    for row, sentence in zip(found[1:], ("not a JSON object", "not UTF-8, the first is 0xe9",
                                        "half of a character")):
        with pytest.raises(ValueError, match=sentence):
            conversations.convert(row)
        row.excerpt.encode()                                       # printable, whatever it holds
    assert [row.number for row in found] == [1, 2, 3, 4]


@needs_shared
@pytest.mark.parametrize(
    "name", ["identity", "alpaca_en_demo", "alpaca_zh_demo", "glaive_toolcall_en_demo"]
)
def test_real_datasets_have_no_bad_row(name):
    found = load_rows(SHARED / "data", name)
    assert len(found) > 90
    assert all(len(conversations.convert(row).messages) % 2 == 0 for row in found)


# ---- pairs that are whole conversations ----------------------------------------------------------

BEFORE = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c")]


def turns_of(*pairs, names=("role", "content"), words={}):
    return [{names[0]: words.get(role, role), names[1]: text} for role, text in pairs]


PAIR = {"ranking": True, "columns": {"chosen": "chosen", "rejected": "rejected"}}


@pytest.mark.parametrize("entry, form", [
    (PAIR, {}), (PAIR | {"formatting": "messages"}, {}),
    (PAIR | {"columns": PAIR["columns"] | {"prompt": "prompt"}}, {}),
    (PAIR | {"formatting": "sharegpt"},
     {"names": ("from", "value"), "words": {"user": "human", "assistant": "gpt"}}),
])
def test_the_prompt_of_a_pair_is_what_both_answers_begin_with(entry, form, tmp_path):
    """As TRL's extract_prompt takes it; equal to a row whose prompt has a column."""
    row = {"chosen": turns_of(*BEFORE, ("assistant", "good"), **form),
           "rejected": turns_of(*BEFORE, ("assistant", "bad"), **form)}
    found = convert_row(tmp_path, row, entry, stage="dpo")
    columns = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
    explicit = {"prompt": turns_of(*BEFORE), "chosen": turns_of(("assistant", "good")),
                "rejected": turns_of(("assistant", "bad"))}
    wanted = convert_row(tmp_path, explicit, {"ranking": True, "columns": columns}, stage="dpo")
    assert roles_and_texts(found) == roles_and_texts(wanted)
    assert found.system == wanted.system == "s"
    assert found.rejected["content"] == wanted.rejected["content"] == "bad"


def test_pairs_without_a_prompt_are_recognized_by_their_path(tmp_path):
    row = {"chosen": turns_of(*BEFORE, ("assistant", "good")),
           "rejected": turns_of(*BEFORE, ("assistant", "bad")), "score": 1}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row))
    notes = []
    rows = load_rows(tmp_path, str(tmp_path / "pairs.jsonl"), notes, stage="rm")
    found = conversations.convert(rows[0], "rm")
    assert found.messages[-1]["content"] == "good" and found.rejected["content"] == "bad"
    assert any("no column holds the prompt: it is what chosen and rejected" in n for n in notes)
    with pytest.raises(ValueError, match="pairs of chosen and rejected are for stages rm and dpo"):
        load_rows(tmp_path, str(tmp_path / "pairs.jsonl"))


@pytest.mark.parametrize("chosen, rejected, words", [
    ([("user", "a"), ("assistant", "b")], [("user", "x"), ("assistant", "c")],
     "'chosen' and 'rejected' differ before their last answers"),
    ([("user", "a"), ("assistant", "b")],
     [("user", "a"), ("assistant", "c"), ("user", "d"), ("assistant", "e")], "differ before"),
    ([("system", "s"), *BEFORE[1:], ("assistant", "b")], [*BEFORE[1:], ("assistant", "c")],
     "differ before"),
    ([("assistant", "b")], [("assistant", "c")], "turn 1 is by 'assistant'"),
    (BEFORE, BEFORE, "'chosen' must end with an answer: without a column of the prompt"),
])
def test_pairs_whose_prompt_is_not_clear(chosen, rejected, words, tmp_path):
    row = {"chosen": turns_of(*chosen), "rejected": turns_of(*rejected)}
    with pytest.raises(ValueError, match=words):
        convert_row(tmp_path, row, PAIR, stage="dpo")


def test_texts_without_a_prompt_have_none(tmp_path):
    with pytest.raises(ValueError, match="columns in dataset_info.json must name 'prompt'"):
        convert_row(tmp_path, {"chosen": "a", "rejected": "b"}, PAIR, stage="dpo")
