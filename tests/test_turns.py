"""text/turns.py: what the keys of a turn mean, from the rows to ids and labels."""
import json

import pytest

from data import label_turns
from runtime.build import STAGES
from tests.chats import fitted
from tests.common import SHARED, needs_shared
from tests.rows import load_rows, make_config, write_info
from text import conversations, token_cache
from text.chat_formats import TEMPLATES

CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
IGNORE = -100
OPENS = "<|im_start|>assistant\n"


def turns(*pairs, names=("role", "content")):
    """Turns of (speaker, text) or (speaker, text, further keys)."""
    return [{names[0]: pair[0], names[1]: pair[1], **(pair[2] if len(pair) > 2 else {})}
            for pair in pairs]


def convert(tmp_path, row, stage="sft"):
    """(conversation, notes) of one row in a file of its own."""
    (tmp_path / "d.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    notes = []
    rows = load_rows(tmp_path, str(tmp_path / "d.jsonl"), notes, stage=stage)
    return conversations.convert(rows[0], stage), notes


def train(tmp_path, rows, **settings):
    """[(text, text that carries loss)] and the report, of rows through Qwen3's format."""
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "dataset_info.json").unlink(missing_ok=True)
    config = make_config(tmp_path, {"template": "qwen3", "cutoff_len": 512, **settings})
    config.dataset = [str(tmp_path / "d.jsonl")]
    tokenizer = fitted("qwen3", "qwen3")
    examples, _, report = token_cache.load_examples(
        config, tokenizer, TEMPLATES["qwen3"], STAGES[config.stage].encode, keep_unlearnable=True)
    found = []
    for example in examples:
        learned = [label for label in example.labels.tolist() if label != IGNORE]
        found.append((tokenizer.decode(example.input_ids), tokenizer.decode(learned)))
    return found, report


@needs_shared
@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_a_thought_in_a_key_of_its_own_is_written_as_qwen3_does(tmp_path, key):
    """The expected text is that of shared/cases/keys_of_a_turn."""
    rows = [
        {"messages": turns(("user", "How many?"), ("assistant", "24 legs.", {key: "\n3 * 8\n"}))},
        {"messages": turns(("user", "b"), ("assistant", "c", {key: None}))},
    ]
    found, report = train(tmp_path, rows)
    assert found[0][1] == "<think>\n3 * 8\n</think>\n\n24 legs.<|im_end|>\n"
    assert found[1][1] == "<think>\n\n</think>\n\nc<|im_end|>\n"
    assert not [note for note in report.notes if "not used" in note]
    plain = [{"messages": turns(("user", "How many?"),
                                ("assistant", "<think>\n3 * 8\n</think>\n\n24 legs."))}]
    for settings in ({"enable_thinking": False}, {"enable_thinking": None}, {}):
        assert train(tmp_path, rows[:1], **settings)[0] == train(tmp_path, plain, **settings)[0]


@needs_shared
def test_the_rows_of_the_case_keep_their_thoughts(tmp_path):
    case = SHARED / "cases/keys_of_a_turn/reason.jsonl"
    rows = [json.loads(line) for line in case.read_text(encoding="utf-8").splitlines()]
    learned = [text for _, text in train(tmp_path, rows)[0]]
    assert learned == [
        "<think>\nEach spider has 8 legs; 3 * 8 = 24.\n</think>\n\n24 legs.<|im_end|>\n",
        "<think>\nSouth America, Peru, Lima.\n</think>\n\nLima.<|im_end|>\n"]


@needs_shared
def test_content_stands_before_its_tool_calls(tmp_path):
    """As in Qwen's chat template: content, a line break, the calls; after a thought, if any."""
    calls = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call><|im_end|>\n'
    for content, thought, expected in (
            ("let me see", "hm", "<think>\nhm\n</think>\n\nlet me see\n" + calls),
            ("let me see", None, "<think>\n\n</think>\n\nlet me see\n" + calls),
            ("<think>\nhm\n</think>\n\nso", None, "<think>\nhm\n</think>\n\nso\n" + calls),
            (None, "hm", "<think>\nhm\n</think>\n\n" + calls),
            ("", None, "<think>\n\n</think>\n\n" + calls)):
        answer = ("assistant", content, {"tool_calls": [CALL], "reasoning": thought})
        row = {"messages": turns(("user", "a"), answer)}
        assert train(tmp_path, [row])[0][0][1] == expected
    row = {"messages": turns(("user", "a"), ("assistant", "so", {"tool_calls": [CALL]}))}
    config = {"enable_thinking": False, "mask_history": True}
    assert train(tmp_path, [row], **config)[0][0][1] == "so\n" + calls


MARKS = [("weight", 0, 1), ("weight", 0.0, 1.0), ("train", False, True), ("training", False, True),
         ("trainable", False, True), ("loss", False, True), ("loss_mask", 0, 1),
         ("step_loss_mask", 0, 1), ("mask", True, False), ("masked", True, False)]


@needs_shared
@pytest.mark.parametrize("key, off, on", MARKS)
def test_a_marked_answer_stays_in_the_context_and_carries_no_loss(tmp_path, key, off, on):
    for names, words, column in ((("role", "content"), ("user", "assistant"), "messages"),
                                 (("from", "value"), ("human", "gpt"), "conversations")):
        ask, say = words
        row = {column: turns((ask, "a"), (say, "one", {key: off}), (ask, "b"),
                             (say, "two", {key: on}), names=names)}
        plain = {column: turns((ask, "a"), (say, "one"), (ask, "b"), (say, "two"), names=names)}
        (text, learned), report = train(tmp_path, [row])[0][0], train(tmp_path, [row])[1]
        assert text == train(tmp_path, [plain])[0][0][0] and "one" in text
        assert learned == "<think>\n\n</think>\n\ntwo<|im_end|>\n"
        assert not [note for note in report.notes if "not used" in note]


@needs_shared
def test_marks_beside_mask_history_prompts_and_packing(tmp_path):
    marked = ("assistant", "one", {"train": False})
    row = {"messages": turns(("user", "a"), ("assistant", "zero"), ("user", "b"), marked)}
    assert train(tmp_path, [row], mask_history=True)[0][0][1] == ""
    learned = train(tmp_path, [row], train_on_prompt=True)[0][0][1]
    assert "zero" in learned and "one" not in learned and "user\nb" in learned
    packed = train(tmp_path, [row, row], packing=True)[0][0][1]
    assert packed == 2 * "<think>\n\n</think>\n\nzero<|im_end|>\n"
    row = {"messages": turns(("user", "a", {"weight": 0}), ("assistant", "b"))}
    assert "user" not in train(tmp_path, [row], train_on_prompt=True)[0][0][1]
    row = {"messages": turns(("user", "a", {"weight": 1}), ("assistant", "b"))}
    assert "marks questions as to be learned" in str(train(tmp_path, [row])[1].notes)
    assert "marks questions" not in str(train(tmp_path, [row], train_on_prompt=True)[1].notes)


def test_no_end_of_a_marked_answer_is_a_label():
    """Formats whose answers end in the label of the next turn's first token."""
    sequence = [([1, 2], [3]), ([4, 5], [6])]
    assert label_turns(sequence, 99, closing_eos=9) == (
        [1, 2, 3, 4, 5, 6, 9], [IGNORE, IGNORE, 3, 9, IGNORE, 6, 9])
    first, second = [(True, False), (True, True)], [(True, True), (True, False)]
    assert label_turns(sequence, 99, closing_eos=9, marks=first)[1] == [IGNORE] * 5 + [6, 9]
    assert label_turns(sequence, 99, closing_eos=9, marks=second)[1] == [
        IGNORE, IGNORE, 3, 9, IGNORE, IGNORE, IGNORE]
    assert label_turns(sequence, 99, marks=[(True, True)] * 2) == label_turns(sequence, 99)


def test_keys_that_nothing_reads_are_named(tmp_path):
    row = {"messages": turns(("user", "a", {"name": "x"}),
                             ("assistant", "b", {"refusal": None, "audio": {}, "weight": 1}))}
    assert convert(tmp_path, row)[1][-1].endswith("keys of turns that are not used: name, audio")
    row = {"conversations": turns(("human", "a"), ("gpt", "b", {"tool_calls": [CALL]}),
                                  names=("from", "value"))}
    (tmp_path / "d.json").write_text(json.dumps([row]), encoding="utf-8")
    write_info(tmp_path, d={"file_name": "d.json", "formatting": "sharegpt"})
    notes = []
    load_rows(tmp_path, notes=notes)
    assert notes[-1] == "dataset 'd': keys of turns that are not used: tool_calls"


@pytest.mark.parametrize("content, expected", [
    ([{"type": "text", "text": "a "}, {"type": "text", "text": "b"}], "a b"),
    (["a", {"text": "b"}, {"type": "output_text", "text": "c"}], "abc"),
])
def test_parts_of_a_content_are_joined(tmp_path, content, expected):
    row = {"messages": turns(("user", content), ("assistant", content))}
    assert [m["content"] for m in convert(tmp_path, row)[0].messages] == [expected, expected]


def test_a_thinking_part_is_a_thought(tmp_path):
    """Anthropic's form, and Mistral's, where the thought is a list of parts itself."""
    for thought in ("hm", [{"type": "text", "text": "hm"}]):
        parts = [{"type": "thinking", "thinking": thought}, {"type": "text", "text": "b"}]
        found = convert(tmp_path, {"messages": turns(("user", "a"), ("assistant", parts))})[0]
        assert found.messages[1] == {"role": "assistant", "content": "b", "thought": "hm"}


@pytest.mark.parametrize("turn, sentence", [
    (("assistant", "b", {"weight": 0.5}), "turn 2: 'weight': 0.5 cannot be honored"),
    (("assistant", "b", {"train": "no"}), "turn 2: 'train': no cannot be honored"),
    (("assistant", "b", {"mask": 1}), "turn 2: 'mask': 1 can mean both"),
    (("assistant", "b", {"weight": 1, "loss": False}), "weight and loss contradict each other"),
    (("assistant", "b", {"thinking": ["x"]}), "'thinking' must be text"),
    (("assistant", "b", {"thinking": "x", "reasoning": "y"}), "hold different thoughts"),
    (("assistant", [{"type": "image_url", "image_url": {}}]), "images are not supported"),
    (("assistant", [{"type": "input_audio"}]), "audio are not supported"),
    (("assistant", [{"type": "video"}]), "videos are not supported"),
    (("assistant", [{"type": "tool_use"}]), "only parts of type 'text' can be read"),
    (("assistant", [5]), "'content' holds 5, expected"),
    (("assistant", ""), "answer 1 is empty"),
])
def test_what_cannot_be_honored_is_a_bad_row(tmp_path, turn, sentence):
    with pytest.raises(ValueError, match=sentence):
        convert(tmp_path, {"messages": turns(("user", "a"), turn)})


def test_bad_thoughts_and_marks_elsewhere(tmp_path):
    with pytest.raises(ValueError, match="turn 1: a thought in a turn that is no answer"):
        convert(tmp_path, {"messages": turns(("user", "a", {"thinking": "x"}), ("assistant", "b"))})
    row = {"messages": turns(("user", "a")), "chosen": turns(("assistant", "b", {"weight": 0}))[0],
           "rejected": turns(("assistant", "c"))[0]}
    with pytest.raises(ValueError, match="marked as not to be learned, but stage: dpo"):
        convert(tmp_path, row, "dpo")


def test_the_role_developer_is_a_system_turn(tmp_path):
    row = {"messages": turns(("developer", "be kind"), ("user", "a"), ("assistant", "b"))}
    assert convert(tmp_path, row)[0].system == "be kind"


# ---- columns of turns ---------------------------------------------------------------------------


def test_prompt_and_completion_as_lists_of_turns(tmp_path):
    """TRL's conversational form: the answers of the prompt are context."""
    prompt = turns(("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"))
    found = convert(tmp_path, {"prompt": prompt, "completion": turns(("assistant", "d"))})[0]
    assert found.system == "s"
    assert [message["content"] for message in found.messages] == ["a", "b", "c", "d"]
    assert [message.get("train") for message in found.messages] == [None, False, None, None]
    single = convert(tmp_path, {"prompt": "a", "completion": turns(("assistant", "d"))})[0]
    assert single.messages == [{"role": "user", "content": "a"},
                               {"role": "assistant", "content": "d"}]


def test_pairs_as_lists_of_turns(tmp_path):
    ask, good, bad = turns(("user", "a"), ("assistant", "b"), ("assistant", "c"))
    for row in ({"prompt": [ask], "chosen": [good], "rejected": [bad]},
                {"prompt": "a", "chosen": [ask, good], "rejected": [ask, bad]},
                {"messages": [ask], "chosen": [good], "rejected": [bad]}):
        found = convert(tmp_path, row, "dpo")[0]
        assert [message["content"] for message in found.messages] == ["a", "b"]
        assert found.rejected["content"] == "c"
    with pytest.raises(ValueError, match="not with the turns of 'prompt'"):
        convert(tmp_path, {"prompt": "z", "chosen": [ask, good], "rejected": [ask, bad]}, "dpo")


@needs_shared
def test_questions_without_text_are_said(tmp_path):
    row = {"messages": turns(("user", " "), ("assistant", "b"))}
    text = str(train(tmp_path, [row, row])[1].notes)
    assert "has 2 questions without text" in text and "d.jsonl row 1)" in text
    row = {"messages": turns(("user", "a"), ("assistant", "b"))}
    assert "without text" not in str(train(tmp_path, [row])[1].notes)
