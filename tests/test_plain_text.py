"""text/plain_text.py: half characters are refused wherever a text becomes ids; excerpts print."""
import json

import pytest

from errors import printable
from tests.common import ROOT
from tests.rows import load_rows, make_config, write_dataset
from text import conversations, token_cache, written_formats
from text.chat_formats import TEMPLATES
from text.plain_text import check_utf8, excerpt, why_not_utf8
from text.tokenizer import load_tokenizer

HALF = "be kind \ud83d"
SENTENCE = r"it holds \\ud83d, half of a character"


def test_the_sentence_tells_bytes_from_escapes():
    assert why_not_utf8("caf\udce9", from_bytes=True).startswith(
        "it holds bytes that are not UTF-8, the first is 0xe9")
    for text in ("caf\udce9", "\udc80"):        # 0xDC80 is also the second half of an emoji
        assert "half of a character" in why_not_utf8(text, from_bytes=False)
    assert "half of a character" in why_not_utf8("\ud83d", from_bytes=True)
    assert why_not_utf8("café 😀 \x00", from_bytes=True) == ""
    with pytest.raises(ValueError, match=f"here: {SENTENCE}"):
        check_utf8(HALF, "here")


def test_a_row_of_pure_ascii_is_no_encoding_problem(tmp_path):
    rows = ['{"messages": [{"role": "user", "content": "hi \\udce9"}, '
            '{"role": "assistant", "content": "b"}]}']
    (tmp_path / "d.jsonl").write_text("\n".join(rows))
    row = load_rows(tmp_path, str(tmp_path / "d.jsonl"))[0]
    with pytest.raises(ValueError, match=r"it holds \\udce9, half of a character"):
        conversations.convert(row)


def test_the_tokenizer_is_the_last_guard():
    tokenizer = load_tokenizer(ROOT / "models/tiny")
    for text in (HALF, "caf\udce9"):
        for call in (tokenizer.encode, lambda text: tokenizer.encode_batch(["good", text])):
            with pytest.raises(ValueError, match="a text cannot be tokenized: it holds"):
                call(text)


@pytest.mark.parametrize("settings, where", [
    ({"default_system": HALF}, "default_system"),
    ({"placeholders": {"name": HALF}}, "placeholders: name"),
])
def test_texts_of_the_config_are_checked(tmp_path, settings, where):
    write_dataset(tmp_path, [{"instruction": "who", "output": "I am {{name}}"}], {})
    config = make_config(tmp_path, {"template": "qwen", **settings})
    tokenizer = load_tokenizer(ROOT / "models/tiny")
    with pytest.raises(ValueError, match=f"{where}: {SENTENCE}"):
        token_cache.load_examples(config, tokenizer, TEMPLATES["qwen"], None)


def test_texts_of_a_template_are_checked():
    for value in ({"user": "{{content}}" + HALF}, {"user": "{{content}}", "stop": [HALF]},
                  {"user": [{"token": HALF}, "{{content}}"]}):
        with pytest.raises(ValueError, match=f"template: (user|stop): {SENTENCE}"):
            written_formats.find_template(value)


def test_a_byte_order_mark_in_the_middle_of_a_jsonl(tmp_path):
    """Files written by editors of Windows, one appended to the other."""
    rows = [{"instruction": f"ask {i}", "output": "a"} for i in range(3)]
    parts = [b"\xef\xbb\xbf" + json.dumps(row).encode() + b"\r\n" for row in rows]
    (tmp_path / "d.jsonl").write_bytes(b"".join(parts))
    found = load_rows(tmp_path, str(tmp_path / "d.jsonl"))
    assert [row.data for row in found] == rows
    for row in found:
        conversations.convert(row)


# ---- what reaches the terminal ------------------------------------------------------------------


def test_control_and_direction_characters_are_shown_escaped():
    hostile = "a\x1b[2Jb\u202ec\x07\x9b\u2066d\ufeff\ud83d"
    shown = r"a\x1b[2Jb\u202ec\x07\x9b\u2066d\ufeff\ud83d"
    assert printable(hostile) == shown
    assert excerpt(hostile) == shown and "\x1b" not in excerpt({"k\u202e": hostile})
    assert printable("two\nlines\tand 中文 é 😀") == "two\nlines\tand 中文 é 😀"
    assert excerpt("x" * 300).endswith(" … (100 more characters)")
