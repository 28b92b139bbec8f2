"""templates.py: ids equal those recorded from LLaMA-Factory; texts, thoughts, and errors.

The recorded rows are converted here by a few plain lines (data.py's code is tested in
test_data.py) and labeled by the notes of the recordings; rows that cutoff_len truncates are not
compared.
"""
import json
import zlib
from array import array

import pytest

from templates import BOS, EOS, Settings, Template, encode_pieces, encode_prompt, encode_turns
from tests.chats import conversation, fitted, talk, text_of, write_byte_level
from tests.common import GOLDEN, ROOT, SHARED, needs_shared, read_jsonl
from text import tool_calls as tools
from text.chat_formats import TEMPLATES
from text.fit_tokenizer import fit_tokenizer
from text.tokenizer import load_tokenizer
from text.written_formats import with_overrides


def labeled(turns, template, eos, mask_history=False, train_on_prompt=False):
    """(input_ids, labels) of turns, by the rules in the notes of the recordings."""
    input_ids, labels, last = [], [], len(turns) - 1
    for i, (source, target) in enumerate(turns):
        hidden = list(source) if train_on_prompt else [-100] * len(source)
        if template.efficient_eos and i != (last if mask_history else 0):
            hidden[0] = eos
        input_ids += source + target
        labels += hidden + ([-100] * len(target) if mask_history and i < last else target)
    end = [eos] * template.efficient_eos
    return input_ids + end, labels + end


def compare(case):
    """True if our ids equal the recorded ones, None if cutoff_len truncated the row."""
    template, tokenizer = TEMPLATES[case["template"]], fitted(case["template"], case["tokenizer"])
    given = case["settings"]
    settings = Settings(
        **{key: given[key] for key in Settings.__dataclass_fields__ if key in given}
    )
    template = with_overrides(template, given.get("tool_format"), given.get("default_system"))
    messages, system, tools = conversation(case["row"], case["dataset_info"])
    if case["predict"]:
        prompt, answer = encode_prompt(template, tokenizer, messages, system, tools, settings)
        ours = prompt, answer + [tokenizer.eos_id] * template.efficient_eos
    else:
        turns = encode_turns(template, tokenizer, messages, system, tools, settings)
        ours = labeled(
            turns, template, tokenizer.eos_id, settings.mask_history, given.get("train_on_prompt")
        )
    if len(ours[0]) + len(ours[1]) * case["predict"] > given.get("cutoff_len", 2048):
        return None
    return ours == (case["input_ids"], case["labels"])


@needs_shared
@pytest.mark.parametrize(
    "file, least",
    [
        ("templates", 234),
        ("templates_094", 209),
        ("templates2026", 72),
        ("thinking", 72),
        ("tools", 64),
        ("settings", 71),
        ("predict", 144),
        ("formats", 14),
        ("truncation", 57),
    ],
)
def test_ids_equal_the_recorded_rows(file, least, monkeypatch):
    monkeypatch.setattr(tools, "today", lambda: "21 Nov 2026")  # the day of the recording
    cases = [
        case
        for case in read_jsonl(GOLDEN / "data" / f"{file}.jsonl")
        if "row" in case and "input_ids" in case and case["tokenizer_backend"] == "file"
    ]
    same = [
        (compare(case), case["template"], case["tokenizer"], case["case"], case["settings"])
        for case in cases
    ]
    assert [case for case in same if case[0] is False] == []
    assert sum(case[0] is True for case in same) >= least


def test_the_custom_format_of_the_docstring():
    mychat = Template(
        user=("<user>{{content}}</user><bot>",),
        assistant=("{{content}}", EOS),
        system=("<sys>{{content}}</sys>",),
        prefix=(BOS,),
    )
    assert text_of(mychat, talk("a", "b", "c", "d"), system="s") == [
        ("<s><sys>s</sys><user>a</user><bot>", "b</s>"),
        ("<user>c</user><bot>", "d</s>"),
    ]


def test_texts_of_different_slots_are_tokenized_separately(tmp_path):
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "a"))
    template = Template(user=("hel", "{{content}}"))
    [(source, target)] = encode_turns(template, tokenizer, talk("lo", "x"))
    assert source == tokenizer.encode("hel") + tokenizer.encode("lo") != tokenizer.encode("hello")
    assert target == tokenizer.encode("x") + [tokenizer.eos_id]


def test_a_batch_of_texts_equals_single_ones(tmp_path):
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "a"))
    lists = [["hello", 1, "there", "hello"], [], [0, ""], ["  a\n"]]
    assert encode_pieces(tokenizer, lists) == [
        [
            i
            for piece in pieces
            for i in (tokenizer.encode(piece) if isinstance(piece, str) else [piece])
        ]
        for pieces in lists
    ]


@needs_shared
def test_split_special_tokens_splits_what_the_user_typed_and_not_the_format():
    messages = talk("a <|im_end|> b", "c <|im_start|>")
    whole = fitted("qwen", "qwen2.5")
    split = load_tokenizer(SHARED / "tokenizers" / "qwen2.5", split_special_tokens=True)
    fit_tokenizer(TEMPLATES["qwen"], split)
    [plain], [apart] = (encode_turns(TEMPLATES["qwen"], t, messages, "s") for t in (whole, split))
    start, end = whole.id_of("<|im_start|>"), whole.id_of("<|im_end|>")
    assert [(ids.count(start), ids.count(end)) for ids in plain] == [(3, 3), (1, 1)]
    assert [(ids.count(start), ids.count(end)) for ids in apart] == [(3, 2), (0, 1)]
    assert [split.decode(ids) for ids in apart] == [whole.decode(ids) for ids in plain]
    clean = talk("a b", "c")  # texts without them do not change
    assert encode_turns(TEMPLATES["qwen"], whole, clean) == encode_turns(
        TEMPLATES["qwen"], split, clean
    )


def test_a_named_token_that_does_not_exist_is_an_error(tmp_path):
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "a"))
    with pytest.raises(ValueError, match=r"\[gMASK\].*lacks"):
        encode_turns(TEMPLATES["chatglm3"], tokenizer, talk("a", "b"))


def test_a_system_text_needs_a_user_turn():
    messages = [{"role": "observation", "content": "r"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(ValueError, match="begins with 'observation'"):
        text_of("mistral", messages, system="s")
    with pytest.raises(ValueError, match="unknown role 'usr'.*did you mean 'user'"):
        text_of("llama3", [{"role": "usr", "content": "r"}, messages[1]])


def test_an_empty_thought_is_added_once_by_reasoning_formats():
    empty = "<think>\n\n</think>\n\n"
    assert text_of("qwen3", talk("a", "b"))[0][1] == empty + "b<|im_end|>\n"
    assert text_of("qwen3", talk("a", "<think>x</think>b"))[0][1] == "<think>x</think>b<|im_end|>\n"
    assert text_of("qwen3_nothink", talk("a", "b"))[0][1] == "b<|im_end|>\n"
    source, target = text_of("qwen3", talk("a", "b"), enable_thinking=None)[0]
    assert source.endswith("assistant\n" + empty) and target == "b<|im_end|>\n"


def test_enable_thinking_false_removes_thoughts_with_any_spacing():
    for thought in ("<think>\nx\n</think>\n\n", "<think>x</think>", "\n<think>x\ny</think>\n"):
        source, target = text_of("qwen3", talk("a", thought + "b"), enable_thinking=False)[0]
        assert target == "b<|im_end|>\n" and source.endswith("<think>\n\n</think>\n\n")


def crc(ids, labels):
    """The checksum of tests/recorded/thoughts.json."""
    return zlib.crc32(array("i", ids).tobytes() + array("i", labels).tobytes())


@needs_shared
def test_the_marks_of_a_thought_are_words_anywhere_but_at_the_beginning():
    """LLaMA-Factory's ids and labels of answers that talk about the tags, in rows and prompts."""
    recorded = json.loads((ROOT / "tests/recorded/thoughts.json").read_text(encoding="utf-8"))
    for run in recorded["runs"]:
        template = with_overrides(TEMPLATES[run["template"]])
        tokenizer = fitted(run["template"], recorded["tokenizer"])
        history = run["mask_history"]
        settings = Settings(enable_thinking=run["enable_thinking"], mask_history=history)
        rows, prompts = [], []
        for chat in recorded["chats"]:
            messages = [{"role": role, "content": text} for role, text in chat]
            turns = encode_turns(template, tokenizer, messages, "", "", settings)
            rows.append(crc(*labeled(turns, template, tokenizer.eos_id, history)))
            prompts.append(crc(*encode_prompt(template, tokenizer, messages, "", "", settings)))
        assert (rows, prompts) == (run["rows"], run["prompts"]), run


def test_a_thought_is_cut_once_and_the_words_after_it_stay():
    answer = "\n<think>\na </think> b\n</think>\n\nUse <think>\nx\n</think>\n\nlast."
    cut = text_of("qwen3", talk("q", answer), enable_thinking=False)[0][1]
    assert cut == "Use <think>\nx\n</think>\n\nlast.<|im_end|>\n"
    own = Template(user=("{{content}}",), thought=("[T]", "[/T]"), reasoning=True)
    told = text_of(own, talk("q", "say [T] and [/T]", "q", ""), only_last=True)
    assert told[0][1] == "say [T] and [/T]</s>"


def test_chat_prompt_ends_where_the_answer_begins():
    history = talk("a", "<think>\nx\n</think>\n\nb", "c", "")
    prompt = text_of("qwen3", history, only_last=True)
    assert prompt[0][1] == "b<|im_end|>\n"  # its thought is removed
    assert prompt[1][0].endswith("<|im_start|>assistant\n")
    prompt = text_of(
        "qwen3", history, only_last=True, enable_thinking=False, preserve_thinking=True
    )
    assert prompt[0][1].startswith("<think>\nx") and prompt[1][0].endswith("</think>\n\n")


@needs_shared
def test_a_checkpoints_own_chat_template_agrees():
    jinja2 = pytest.importorskip("jinja2")
    for name, tokenizer in (("llama3", "llama3"), ("qwen", "qwen2.5"), ("qwen3_nothink", "qwen3")):
        tokenizer = fitted(name, tokenizer)
        messages = talk("a", "b", "c", "d")
        ours = "".join(
            tokenizer.decode(ids)
            for turn in encode_turns(TEMPLATES[name], tokenizer, messages, "s")
            for ids in turn
        )
        theirs = (
            jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
            .from_string(tokenizer.chat_template)
            .render(
                messages=[{"role": "system", "content": "s"}, *messages],
                bos_token=tokenizer.bos_token,
            )
        )
        assert ours == theirs
