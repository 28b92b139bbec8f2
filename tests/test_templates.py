"""templates.py, text/chat_formats.py and text/jinja_sandbox.py: against the ids LLaMA-Factory recorded, against jinja, and what they refuse.

The golden rows are converted here by a few plain lines (data.py has its own, tested in test_data.py) and labelled as
the recordings' notes say, so that only rows which cutoff_len does not shorten are compared.
Read next: test_data.py.
"""
import functools
import json
import re
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from text import jinja_sandbox as sandbox
from text import template_check
from text import tool_calls as tools
from config import as_dict
from runtime.load_config import load_config
from text.chat_formats import find_template, with_overrides, written_template
from text.fit_tokenizer import fit_tokenizer, write_jinja
from templates import (BOS, EOS, Settings, Template, Token, encode_pieces, encode_prompt,
                       encode_turns, render_turns)
from text.chat_formats import TEMPLATES, stored_template
from text.template_check import CHATS, check_template, choose_template
from tests.common import GOLDEN, ROOT, SHARED, needs_shared, read_jsonl
from tests.test_tokenizer import write_byte_level
from text.tokenizer import load_tokenizer

SHAREGPT = {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt",
            "observation_tag": "observation", "function_tag": "function_call", "system_tag": "system"}
CALL = '{"name": "weather", "arguments": {"city": "Oslo"}}'
TOOL = '[{"name": "weather", "description": "d", "parameters": {"type": "object", "properties": {"city": {}}}}]'


def talk(*texts):
    """user, assistant, user, assistant, …"""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def call(text, answer="done"):
    """A user asks, the assistant calls a tool, gets its result and answers."""
    return [*talk("q"), {"role": "function", "content": text}, {"role": "observation", "content": "r"},
            {"role": "assistant", "content": answer}]


class Names:
    """A tokenizer whose ids are texts: shows what was rendered."""
    bos_id, eos_id, unk_id, split_special_tokens = "<s>", "</s>", None, False

    def id_of(self, token):
        return token


def text_of(template, messages, system=None, tools=None, only_last=False, tool_format=None,
            default_system=None, **settings):
    """-> [(source text, target text), …]"""
    template = TEMPLATES[template] if isinstance(template, str) else template
    template = with_overrides(template, tool_format, default_system)
    turns = render_turns(template, Names(), messages, system, tools, Settings(**settings), only_last)
    return [("".join(source), "".join(target)) for source, target in turns]


# ---- the golden rows


@functools.lru_cache(None)
def fitted(template, tokenizer):
    tokenizer = load_tokenizer(SHARED / "tokenizers" / tokenizer)
    fit_tokenizer(TEMPLATES[template], tokenizer)
    return tokenizer


def conversation(row, info):
    """A raw row -> (messages, system, tools)."""
    columns = info.get("columns") or {"prompt": "instruction", "query": "input", "response": "output"}
    system, tools = row.get(columns.get("system")), row.get(columns.get("tools"))
    if "messages" not in columns:
        texts = [text for pair in row.get(columns.get("history")) or [] for text in pair]
        asked = "\n".join(filter(None, (row[columns["prompt"]], row.get(columns["query"]))))
        return talk(*texts, asked, row[columns["response"]]), system, tools
    tags = info.get("tags") or SHAREGPT
    roles = {tag: key.removesuffix("_tag") for key, tag in tags.items()}
    messages = []
    for turn in row[columns["messages"]]:
        role, content = roles[turn[tags["role_tag"]]], turn[tags["content_tag"]]
        if turn.get("tool_calls"):
            role, content = "function", json.dumps([c["function"] for c in turn["tool_calls"]])
        if role == "system":
            system = content
        elif role == "observation" and messages[-1]["role"] == "observation":
            messages[-1]["content"] += "\n</tool_response>\n<tool_response>\n" + content
        else:
            messages.append({"role": role, "content": content})
    if info.get("formatting") == "openai":  # what its converter adds, see the facts
        system = "\n".join(filter(None, (system, not tools and "detailed thinking off")))
        system += "\n" * bool(system and tools)
    return messages, system, tools


def labelled(turns, template, eos, mask_history=False, train_on_prompt=False):
    """The ids of turns and their labels, by the rules in the recordings' notes. -> (input_ids, labels)"""
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
    """True if our ids are the recorded ones, None if cutoff_len cut the row."""
    template, tokenizer = TEMPLATES[case["template"]], fitted(case["template"], case["tokenizer"])
    given = case["settings"]
    settings = Settings(**{key: given[key] for key in Settings.__dataclass_fields__ if key in given})
    template = with_overrides(template, given.get("tool_format"), given.get("default_system"))
    messages, system, tools = conversation(case["row"], case["dataset_info"])
    if case["predict"]:
        prompt, answer = encode_prompt(template, tokenizer, messages, system, tools, settings)
        ours = prompt, answer + [tokenizer.eos_id] * template.efficient_eos
    else:
        turns = encode_turns(template, tokenizer, messages, system, tools, settings)
        ours = labelled(turns, template, tokenizer.eos_id, settings.mask_history, given.get("train_on_prompt"))
    if len(ours[0]) + len(ours[1]) * case["predict"] > given.get("cutoff_len", 2048):
        return None
    return ours == (case["input_ids"], case["labels"])


@needs_shared
@pytest.mark.parametrize("file, least", [
    ("templates", 234), ("templates_094", 209), ("thinking", 72), ("tools", 64), ("settings", 71), ("predict", 144),
    ("formats", 14), ("truncation", 57)])
def test_ids_equal_the_recorded_rows(file, least, monkeypatch):
    monkeypatch.setattr(tools, "today", lambda: "21 Nov 2026")  # the day of the recording
    cases = [case for case in read_jsonl(GOLDEN / "data" / f"{file}.jsonl")
             if "row" in case and "input_ids" in case and case["tokenizer_backend"] == "file"]
    same = [(compare(case), case["template"], case["tokenizer"], case["case"], case["settings"]) for case in cases]
    assert [case for case in same if case[0] is False] == []
    assert sum(case[0] is True for case in same) >= least


@needs_shared
def test_special_tokens_equal_the_recorded_ones():
    for case in read_jsonl(GOLDEN / "data" / "special_tokens.jsonl"):
        tokenizer = fitted(case["template"], case["tokenizer"])
        stops = fit_tokenizer(TEMPLATES[case["template"]], tokenizer)  # a second time changes nothing
        ours = (tokenizer.vocab_size, tokenizer.eos_token, tokenizer.eos_id, tokenizer.pad_token, tokenizer.pad_id,
                tokenizer.bos_id, stops)
        assert ours == tuple(case[key] for key in ("len", "eos_token", "eos_token_id", "pad_token", "pad_token_id",
                                                   "bos_token_id", "stop_token_ids")), case["template"]


@needs_shared
def test_what_llama_factory_refuses_in_a_tool_call_is_refused():
    cases = [case for case in read_jsonl(GOLDEN / "data" / "errors.jsonl")
             if case["case"] in ("thought_before_call", "parallel_calls", "call_not_json")]
    assert len(cases) == 3
    for case in cases:
        messages, system, tools = conversation(case["rows"][0], case["dataset_info"])
        with pytest.raises(ValueError, match="function call"):
            render_turns(TEMPLATES[case["template"]], Names(), messages, system, tools)


# ---- the table


@pytest.mark.parametrize("name", TEMPLATES)
def test_rows_are_well_formed(name):
    row = TEMPLATES[name]
    for slots in (row.user, row.assistant, row.system, row.observation, row.function):
        texts = [slot for slot in slots or ("{{content}}",) if isinstance(slot, str)]
        assert sum(text.count("{{content}}") for text in texts) == 1
        assert all(isinstance(slot, (str, Token)) for slot in slots or ())
    assert row.tool_format is tools.TOOL_FORMATS[row.tool_format.name]
    assert not row.system_in_user or len(row.system) == 1  # it becomes part of one text
    assert not row.stop_is_eos or row.stop


def test_a_format_of_ones_own_as_the_docstring_shows_it():
    mychat = Template(user=("<user>{{content}}</user><bot>",), assistant=("{{content}}", EOS),
                      system=("<sys>{{content}}</sys>",), prefix=(BOS,))
    assert text_of(mychat, talk("a", "b", "c", "d"), system="s") == [
        ("<s><sys>s</sys><user>a</user><bot>", "b</s>"), ("<user>c</user><bot>", "d</s>")]


def test_formats_without_recordings_are_what_their_authors_publish():
    assert text_of("vicuna", talk("a", "b", "c", "d"), system="s") == [
        ("sUSER: a ASSISTANT:", "b</s>"), ("USER: c ASSISTANT:", "d</s>")]
    assert text_of("chatml", talk("a", "b"), system="s") == [
        ("<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", "b<|im_end|>\n")]


# ---- pieces


def test_texts_of_different_slots_are_tokenised_apart(tmp_path):
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "a"))
    template = Template(user=("hel", "{{content}}"))
    [(source, target)] = encode_turns(template, tokenizer, talk("lo", "x"))
    assert source == tokenizer.encode("hel") + tokenizer.encode("lo") != tokenizer.encode("hello")
    assert target == tokenizer.encode("x") + [tokenizer.eos_id]


def test_many_pieces_at_once_equal_one_by_one(tmp_path):
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "a"))
    lists = [["hello", 1, "there", "hello"], [], [0, ""], ["  a\n"]]
    assert encode_pieces(tokenizer, lists) == [
        [i for piece in pieces for i in (tokenizer.encode(piece) if isinstance(piece, str) else [piece])]
        for pieces in lists]


@needs_shared
def test_split_special_tokens_splits_what_the_user_typed_and_not_the_format():
    messages = talk("a <|im_end|> b", "c <|im_start|>")
    whole = fitted("qwen", "qwen2.5")
    split = load_tokenizer(SHARED / "tokenizers" / "qwen2.5", split_special_tokens=True)
    fit_tokenizer(TEMPLATES["qwen"], split)
    [plain], [cut] = (encode_turns(TEMPLATES["qwen"], t, messages, "s") for t in (whole, split))
    start, end = whole.id_of("<|im_start|>"), whole.id_of("<|im_end|>")
    assert [(ids.count(start), ids.count(end)) for ids in plain] == [(3, 3), (1, 1)]
    assert [(ids.count(start), ids.count(end)) for ids in cut] == [(3, 2), (0, 1)]
    assert [split.decode(ids) for ids in cut] == [whole.decode(ids) for ids in plain]
    clean = talk("a b", "c")  # without such strings nothing changes
    assert encode_turns(TEMPLATES["qwen"], whole, clean) == encode_turns(TEMPLATES["qwen"], split, clean)


def test_a_named_token_that_does_not_exist_is_an_error(tmp_path):
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "a"))
    with pytest.raises(ValueError, match=r"\[gMASK\].*lacks"):
        encode_turns(TEMPLATES["chatglm3"], tokenizer, talk("a", "b"))


def test_a_system_text_needs_a_user_to_open_in():
    messages = [{"role": "observation", "content": "r"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(ValueError, match="begins with 'observation'"):
        text_of("mistral", messages, system="s")
    with pytest.raises(ValueError, match="unknown role 'usr'.*did you mean 'user'"):
        text_of("llama3", [{"role": "usr", "content": "r"}, messages[1]])


# ---- thoughts


def test_an_empty_thought_is_added_once_and_only_by_reasoning_formats():
    empty = "<think>\n\n</think>\n\n"
    assert text_of("qwen3", talk("a", "b"))[0][1] == empty + "b<|im_end|>\n"
    assert text_of("qwen3", talk("a", "<think>x</think>b"))[0][1] == "<think>x</think>b<|im_end|>\n"
    assert text_of("qwen3_nothink", talk("a", "b"))[0][1] == "b<|im_end|>\n"
    source, target = text_of("qwen3", talk("a", "b"), enable_thinking=None)[0]
    assert source.endswith("assistant\n" + empty) and target == "b<|im_end|>\n"


def test_enable_thinking_false_takes_every_thought_out_however_it_is_spaced():
    for thought in ("<think>\nx\n</think>\n\n", "<think>x</think>", "\n<think>x\ny</think>\n"):
        source, target = text_of("qwen3", talk("a", thought + "b"), enable_thinking=False)[0]
        assert target == "b<|im_end|>\n" and source.endswith("<think>\n\n</think>\n\n")


def test_chat_prompt_ends_where_the_answer_begins():
    history = talk("a", "<think>\nx\n</think>\n\nb", "c", "")
    prompt = text_of("qwen3", history, only_last=True)
    assert prompt[0][1] == "b<|im_end|>\n"  # its thought is left out
    assert prompt[1][0].endswith("<|im_start|>assistant\n")
    prompt = text_of("qwen3", history, only_last=True, enable_thinking=False, preserve_thinking=True)
    assert prompt[0][1].startswith("<think>\nx") and prompt[1][0].endswith("</think>\n\n")


# ---- tools


def test_calls_are_read_in_every_way_they_are_written():
    expected = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    for text in (CALL, f"[{CALL}]", f"  {CALL}\n", f"<tool_call>\n{CALL}\n</tool_call>"):
        assert text_of("qwen", call(text))[0][1] == expected + "<|im_end|>\n"
    for text in (f"[{CALL}, {CALL}]", f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>"):
        assert text_of("qwen", call(text))[0][1] == f"{expected}\n{expected}<|im_end|>\n"
    for lead in ("<think>\nx\n</think>\n\n", "<think>x</think>"):
        assert text_of("qwen", call(lead + CALL))[0][1] == lead + expected + "<|im_end|>\n"
    assert text_of("qwen", call(f"hm <tool_call>{CALL}</tool_call>"))[0][1] == "hm " + expected + "<|im_end|>\n"


@pytest.mark.parametrize("text, message", [
    ("weather(Oslo)", "not JSON.*weather.Oslo"), ("", "not JSON"), ("Let me look. " + CALL, "not JSON"),
    ("[]", "empty"), ('"weather"', "expected"), ('{"name": "weather"}', "arguments"), ("[1]", "expected"),
    (f"<tool_call>{CALL}</tool_call> and so on", "text after")])
def test_calls_that_cannot_be_read_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        text_of("qwen", call(text))


def test_tools_are_read_plain_wrapped_single_and_as_a_list():
    plain = json.loads(TOOL)
    texts = {text_of("llama3", talk("a", "b"), tools=tools)[0][0]
             for tools in (TOOL, plain, plain[0], [{"type": "function", "function": plain[0]}])}
    assert len(texts) == 1 and '"name": "weather"' in texts.pop()
    for bad in ("nope", "[1]", '[{"description": "no name"}]', "3"):
        with pytest.raises(ValueError, match="tools: "):
            text_of("llama3", talk("a", "b"), tools=bad)
    with pytest.raises(ValueError, match="unknown tool_format 'quen'.*did you mean 'qwen'"):
        text_of("llama3", talk("a", "b"), tool_format="quen")


def test_the_default_tool_format_takes_tools_with_little_said_about_them():
    for tool in ({"name": "w"}, {"name": "w", "parameters": {}}, {"name": "w", "parameters": {"properties": {"c": {}}}},
                 {"name": "w", "parameters": {"properties": {"c": {"enum": [1, 2], "items": {}}}}}):
        assert "> Tool Name: w\nTool Description: \n" in text_of("default", talk("a", "b"), tools=[tool])[0][0]
    for parameters in ([1], {"properties": {"c": 1}}, {"properties": {"c": {"items": [1]}}}):
        with pytest.raises(ValueError, match="'w' are not a JSON schema"):
            text_of("default", talk("a", "b"), tools=[{"name": "w", "parameters": parameters}])


def test_a_text_before_a_call_is_refused_where_the_format_has_no_place_for_it():
    with pytest.raises(ValueError, match="no text can stand before"):
        text_of("mistral", call("<think>\nx\n</think>\n\n" + CALL))
    assert text_of("mistral", call(CALL))[0][1].startswith("[TOOL_CALLS] [{")


# ---- a format and the tokenizer it is used with


def test_stop_tokens_beyond_the_embedding(tmp_path):
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "a"))
    rows = tokenizer.vocab_size
    template = Template(user=("{{content}}",), stop=("</s>", "<|more|>"), stop_is_eos=True)
    assert fit_tokenizer(template, tokenizer, embedding_rows=rows) == [tokenizer.eos_id]
    assert tokenizer.vocab_size == rows  # a text with <|more|> in it must not become an id the model lacks
    assert fit_tokenizer(template, tokenizer, embedding_rows=rows + 1) == [tokenizer.eos_id, rows]
    with pytest.raises(ValueError, match="'<.end.>'.*no room"):
        fit_tokenizer(replace(template, stop=("<|end|>",)), tokenizer, embedding_rows=rows + 1)


def test_a_tokenizer_without_eos_is_an_error(tmp_path):
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "a", eos_token=None))
    with pytest.raises(ValueError, match="names no eos_token"):
        fit_tokenizer(TEMPLATES["default"], tokenizer)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("system, default", [(None, None), ("Be 'x' \\n\n\"y\"", None), (None, "D"), ("s", "")])
def test_the_written_jinja_renders_what_we_encode(tmp_path, name, system, default):
    jinja2 = pytest.importorskip("jinja2")
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "a"))
    row = with_overrides(TEMPLATES[name], default_system=default)
    fit_tokenizer(row, tokenizer)
    messages = talk("a 'q' \\n {{ x }} {% y %}", "b\n", "c", "d")
    messages += [{"role": "observation", "content": "e"}, {"role": "assistant", "content": "f"}]

    class Shown(Names):
        bos_id, eos_id = tokenizer.bos_token, tokenizer.eos_token

    row = replace(row, reasoning=False)
    ours = "".join(piece for turn in render_turns(row, Shown(), messages, system)
                   for pieces in turn for piece in pieces)
    theirs = [{"role": "system", "content": system}] * bool(system) + [
        {**message, "role": "tool" if message["role"] == "observation" else message["role"]} for message in messages]
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)  # as transformers does
    assert environment.from_string(tokenizer.chat_template).render(messages=theirs) == ours


@needs_shared
def test_a_checkpoints_own_chat_template_agrees():
    jinja2 = pytest.importorskip("jinja2")
    for name, tokenizer in (("llama3", "llama3"), ("qwen", "qwen2.5"), ("qwen3_nothink", "qwen3")):
        tokenizer = fitted(name, tokenizer)
        messages = talk("a", "b", "c", "d")
        ours = "".join(tokenizer.decode(ids) for turn in encode_turns(TEMPLATES[name], tokenizer, messages, "s")
                       for ids in turn)
        theirs = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(tokenizer.chat_template).render(
            messages=[{"role": "system", "content": "s"}, *messages], bos_token=tokenizer.bos_token)
        assert ours == theirs


@needs_shared
@pytest.mark.parametrize("tokenizer, model_type, expected", [
    ("llama3", "llama", "llama3"), ("llama2", "llama", "llama2"), ("llama2", "mistral", "mistral"),
    ("qwen2.5", "qwen2", "qwen"), ("qwen3", "qwen3", "qwen3_nothink")])  # this qwen3 folder says nothing of thoughts
def test_a_template_is_chosen_from_the_checkpoint(tokenizer, model_type, expected):
    tokenizer = load_tokenizer(SHARED / "tokenizers" / tokenizer)
    template, why = choose_template(None, tokenizer, model_type)
    assert template is TEMPLATES[expected] and model_type in why
    assert choose_template(expected, tokenizer, model_type)[0] is template


@needs_shared
def test_choosing_looks_at_the_chat_template_first():
    qwen3 = load_tokenizer(SHARED / "tokenizers" / "qwen3")
    qwen3.chat_template += "{# <think> </think> #}"
    assert choose_template(None, qwen3, "qwen3")[0].name == "qwen3"
    qwen3.chat_template = None
    assert choose_template("", qwen3, "qwen3")[0].name == "qwen3"
    assert choose_template(None, qwen3, "mistral")[0].name == "chatml"  # somebody's ChatML Mistral
    llama2 = load_tokenizer(SHARED / "tokenizers" / "llama2")
    llama2.chat_template = "{{ 'USER: ' + x + ' ASSISTANT:' }}"
    assert choose_template(None, llama2, "llama")[0].name == "vicuna"
    llama2.chat_template = "{{ '[INST]' + content + '[/INST]' }}"
    assert choose_template(None, llama2, "mistral")[0].name == "ministral"
    llama2.chat_template = "{{ '~~' + content }}"
    with pytest.raises(ValueError, match="does not show which.*llama3"):
        choose_template(None, llama2, "llama")


@needs_shared
def test_a_template_that_does_not_fit_is_refused_with_advice():
    qwen, llama3, llama2 = (load_tokenizer(SHARED / "tokenizers" / name) for name in ("qwen2.5", "llama3", "llama2"))
    with pytest.raises(ValueError, match="template 'llama3' uses '<.eot_id.>', which this tokenizer lacks .Qwen2.. "
                                         "Try template: qwen .*force_template: true"):
        choose_template("llama3", qwen, "qwen2")
    with pytest.raises(ValueError, match="'qwen' uses '<.im_end.>'.*Try template: llama3"):
        choose_template("qwen", llama3, "llama")
    with pytest.raises(ValueError, match="'llama2' uses '</s>'.*Try template: llama3"):
        choose_template("llama2", llama3, "llama")
    with pytest.raises(ValueError, match="'mistral' is the format of mistral.*this one is llama.*Try template: llama2"):
        choose_template("mistral", llama2, "llama")
    template, why = choose_template("llama3", qwen, "qwen2", force=True)
    assert template is TEMPLATES["llama3"] and "forced" in why
    for name in ("default", "alpaca", "vicuna", "empty"):  # any model can learn these
        assert choose_template(name, qwen, "qwen2")[0].name == name
    with pytest.raises(ValueError, match="unknown template 'lama3'.*did you mean 'llama3'.*Known: "):
        choose_template("lama3", llama3, "llama", force=True)


@needs_shared
def test_all_golden_curves_fit_their_own_template():
    for model, model_type, name in (("tiny_llama3", "llama", "llama3"), ("tiny_qwen2", "qwen2", "qwen")):
        tokenizer = load_tokenizer(GOLDEN / "curves" / model)
        assert choose_template(name, tokenizer, model_type)[0].name == name
        assert choose_template(None, tokenizer, model_type)[0].name == name


NEW_FAMILIES = [  # model_type, the tokens of its vocabulary, the row
    ("gemma", "<start_of_turn> <end_of_turn>", "gemma"), ("gemma2", "<start_of_turn> <end_of_turn>", "gemma2"),
    ("glm", "[gMASK] <sop> <|user|> <|assistant|>", "glm4"), ("glm4", "[gMASK] <sop> <|user|> <|assistant|>", "glm4"),
    ("chatglm", "[gMASK] <sop> <|user|> <|assistant|>", "glm4"),
    ("baichuan", "<reserved_106> <reserved_107>", "baichuan2"),
    ("chatglm", "[gMASK] sop <|user|> <|assistant|>", "chatglm3"), ("internlm2", "<|im_start|> <|im_end|>", "intern2"),
    ("phi3", "<|user|> <|assistant|> <|end|>", "phi"), ("phi3", "<|user|> <|assistant|> <|end|> <|tool|>", "phi4_mini"),
    ("phi3", "<|im_start|> <|im_sep|> <|im_end|>", "phi4"), ("qwen", "<|im_start|> <|im_end|>", "qwen"),
    ("qwen2_moe", "<|im_start|> <|im_end|>", "qwen"), ("qwen3_moe", "<|im_start|> <|im_end|>", "qwen3"),
    ("olmo", "", "olmo"), ("olmo2", "", "olmo"), ("xverse", "", "xverse"), ("mixtral", "<s> </s>", "mistral"),
    ("llama", "<|startoftext|> <|im_start|> <|im_end|>", "yi"), ("llama", "<s> </s>", "llama2"),
    ("llama4_text", "<|header_start|> <|header_end|> <|eot|>", "llama4"),
    ("qwen2", "<｜User｜> <｜Assistant｜>", "deepseekr1"),
]


@pytest.mark.parametrize("model_type, tokens, expected", NEW_FAMILIES)
def test_a_template_is_chosen_for_a_family_without_a_chat_template(tmp_path, model_type, tokens, expected):
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "a"))
    tokenizer.add_tokens(tokens.split())
    tokenizer.chat_template = None
    assert choose_template(None, tokenizer, model_type)[0].name == expected
    with pytest.raises(ValueError, match=f"Try template: {expected} "):
        choose_template("cohere", tokenizer, model_type)


def test_a_token_that_only_slots_name_need_not_be_found_in_texts(tmp_path):
    """ChatGLM3's `sop` has an id, yet a user who types it types three letters."""
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "a"))
    tokenizer.add_tokens(["[gMASK]", "<|user|>", "<|assistant|>", "<|system|>"])
    row = replace(TEMPLATES["chatglm3"], prefix=(Token("[gMASK]"), Token("l")), needs=("[gMASK]", "l"))
    assert not tokenizer.knows("l") and template_check.misfit_reason(row, tokenizer, "chatglm") == ""
    assert "'<sop>'" in template_check.misfit_reason(TEMPLATES["glm4"], tokenizer, "chatglm")


# ---- a format in the config

PAGE = (ROOT / "docs" / "templates.md").read_text(encoding="utf-8")
MYCHAT = {"name": "mychat", "user": "<u>{{content}}</u><b>", "prefix": [{"token": "bos"}]}


def from_page(tmp_path, number):
    """The template in a yaml of docs/templates.md, as a config gives it."""
    path = tmp_path / "page.yaml"
    path.write_text(re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[number], encoding="utf-8")
    return load_config([str(path)], "config").template


def test_the_page_does_what_it_says(tmp_path):
    said = from_page(tmp_path, 0)
    assert len((tmp_path / "page.yaml").read_text().splitlines()) <= 10
    [(source, target)] = text_of(find_template(said), talk("A", "B"), "S")
    assert f"```\n{source}{target}\n```" in PAGE and f"`{target}` carries loss" in PAGE
    row = eval(re.search(r"```python\n\"mychat\": (.*?),\n```", PAGE, re.DOTALL).group(1))
    row = replace(row, name="mychat", own_jinja=True, tool_format=tools.TOOL_FORMATS["default"])
    assert row == find_template(said)
    assert text_of(row, call(CALL)) == text_of(find_template(said), call(CALL))
    changed = find_template(from_page(tmp_path, 1))
    assert text_of(changed, talk("A", "B")) == text_of("qwen", talk("A", "B"), default_system="You are Pip.")
    fields = re.findall(r"^\| `(\w+)`(?:, `(\w+)`)? \|", PAGE, re.MULTILINE)
    assert {name for pair in fields for name in pair if name} == set(Template.__dataclass_fields__) - {"name"}


def test_a_format_survives_being_stored(tmp_path):
    said = from_page(tmp_path, 0)
    template = find_template(said)
    (tmp_path / "train_config.json").write_text(json.dumps({"template": written_template(template)}))
    stored, force = stored_template([tmp_path], None, False)
    assert find_template(stored) == template and force
    assert stored_template([tmp_path], said, False) == (said, True)  # the same, written another way
    with pytest.raises(ValueError, match="template: qwen, but .* was trained with mychat"):
        stored_template([tmp_path], "qwen", False)
    with pytest.raises(ValueError, match="template: mychat, but .* mychat of another wording"):
        stored_template([tmp_path], {**said, "default_system": "You are Max."}, False)
    config = load_config([str(tmp_path / "page.yaml")], "config")
    (tmp_path / "train_config.json").write_text(json.dumps(as_dict(config)))
    assert find_template(stored_template([tmp_path], None, False)[0]) == template
    (tmp_path / "train_config.json").write_text('{"template": "llama3"}')
    with pytest.raises(ValueError, match="template: mychat, but .* was trained with llama3"):
        stored_template([tmp_path], said, False)


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_row_can_be_written_as_a_mapping(name):
    assert written_template(TEMPLATES[name]) == name
    other = replace(TEMPLATES[name], name="other")
    assert find_template(json.loads(json.dumps(written_template(other)))) == other


def test_based_on_changes_what_is_said_and_keeps_the_rest():
    changed = find_template({"name": "q", "based_on": "qwen3", "reasoning": "false", "stop": "<|im_end|>"})
    assert text_of(changed, call(CALL), "s", TOOL) == text_of("qwen3_nothink", call(CALL), "s", TOOL)
    assert changed.families == () and changed.needs == TEMPLATES["qwen3"].needs and changed.own_jinja
    plain = find_template({"based_on": "llama3", "user": "Q: {{content}} A:", "system": "{{content}}",
                           "assistant": ["{{content}}", {"token": "eos"}], "observation": "O: {{content}} A:"})
    assert plain.needs == () and plain.name == "custom"


@pytest.mark.parametrize("said, message", [
    ({"usr": "{{content}}"}, "unknown key 'usr'.*did you mean 'user'"),
    ({"name": "a"}, "'user' is missing"),
    ({"user": "no mark"}, "user: {{content}} must occur in it once, found 0 times"),
    ({"user": "{{content}}{{content}}"}, "found 2 times"),
    ({"user": "{{query}}"}, "unknown mark {{query}}.*{{content}}"),
    ({"user": "{{ content }}"}, "unknown mark {{ content }}"), ({"user": r"a\n{{content}}"}, "double quotes"),
    ({"user": ["{{content}}", {"tokn": "eos"}]}, "is not a slot.*token: eos"), ({"user": [["{{content}}"]]}, "is not a slot"),
    ({**MYCHAT, "prefix": "{{content}}"}, "nothing is put into the prefix"),
    ({**MYCHAT, "stop_is_eos": "maybe"}, "not true or false"), ({**MYCHAT, "stop_is_eos": "true"}, "needs stop"),
    ({**MYCHAT, "system_in_user": "true", "system": ["{{content}}", {"token": "eos"}]}, "a system of one text"),
    ({**MYCHAT, "thought": ["<t>"]}, "two texts"), ({**MYCHAT, "stop": [{"token": "eos"}]}, "not a list of texts"),
    ({**MYCHAT, "default_system": ["a"]}, "not a text"),
    ({**MYCHAT, "name": "qwen"}, "based_on: qwen under another name"),
    ({"based_on": "lama3"}, "unknown template 'lama3'.*did you mean 'llama3'"),
    ({**MYCHAT, "tool_format": "quen"}, "unknown tool_format 'quen'.*did you mean 'qwen'"),
    ({**MYCHAT, "needs": ["<|no|>"]}, "template 'mychat' uses '<.no.>', which this tokenizer lacks"),
])
def test_a_format_that_cannot_be_used_is_refused(tmp_path, said, message):
    with pytest.raises(ValueError, match=message):
        choose_template(said, load_tokenizer(write_byte_level(tmp_path / "a")), "llama")


def test_a_format_of_ones_own_writes_the_chat_template(tmp_path):
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "a"))
    tokenizer.chat_template = "{{ 'something else' }}"
    template, why = choose_template(MYCHAT, tokenizer, "llama")
    assert why == "as the config says"
    fit_tokenizer(template, tokenizer)
    assert "<u>" in tokenizer.chat_template and check_template(template, tokenizer) == []


# ---- the checkpoint's own chat template

CHATML = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>"
          "\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def checked(tmp_path, jinja, name="yi", **more):
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "a"))
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.chat_template = jinja
    return check_template(replace(TEMPLATES[name], **more), tokenizer)


@needs_shared
def test_formats_agree_with_the_chat_templates_they_were_made_from():
    for name, folder in (("llama3", "llama3"), ("qwen3_nothink", "qwen3"), ("qwen", "qwen2.5")):
        tokenizer = load_tokenizer(SHARED / "tokenizers" / folder)
        lines = check_template(TEMPLATES[name], tokenizer)
        assert all(line.startswith("known: ") for line in lines), lines
        if name != "llama3":  # the templates in the folders of Qwen have this default
            row = replace(TEMPLATES[name], default_system="You are a helpful assistant.")
            assert check_template(row, tokenizer) == []
    assert [line for line in check_template(TEMPLATES["qwen"], load_tokenizer(SHARED / "tokenizers" / "llama3"))
            if "writes another text" in line]


TURNS = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
PUBLISHED = {  # what the chat templates of published models say, shortened to texts; what is known to differ
    "gemma2": ("{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
               "{% endif %}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else "
               "m.role) + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}"
               "{{ '<start_of_turn>model\n' }}{% endif %}", "refuses strips"),
    "phi": ("{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}", "ends"),
    "phi4_mini": ("{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
                  "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}", "ends"),
    "glm4": ("[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>{{ m.metadata }}\n{{ m.content }}{% endfor %}"
             "{% if add_generation_prompt %}<|assistant|>{% endif %}", ""),
    "intern2": ("{{ bos_token }}" + TURNS + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
                "has"),
    "yi": (TURNS + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}", ""),
    "olmo2": ("{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}"
              "{{ eos_token if m.role == 'assistant' }}{{ '\n' if m.role != 'assistant' or not loop.last }}"
              "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}", "ends"),
    "orion": ("{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}{% if m.role == 'user' %}"
              "{{ 'Human: ' + m.content + '\n\nAssistant: ' + eos_token }}{% elif m.role == 'assistant' %}"
              "{{ m.content + eos_token }}{% endif %}{% endfor %}", "leaves"),
    "granite3": ("{% for m in messages %}{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + "
                 "'<|end_of_text|>\n' }}{% endfor %}{% if add_generation_prompt %}"
                 "{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}", ""),
    "cohere": ("{{ bos_token }}{% for m in messages %}{{ '<|START_OF_TURN_TOKEN|>' + {'user': '<|USER_TOKEN|>', "
               "'system': '<|SYSTEM_TOKEN|>', 'assistant': '<|CHATBOT_TOKEN|>'}[m.role] + m.content.strip() + "
               "(eos_token if m.role == 'assistant' else '<|END_OF_TURN_TOKEN|>') }}{% endfor %}"
               "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}", "strips"),
    "deepseekr1": ("{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == "
                   "'user' %}{{ '<｜User｜>' + m.content }}{% else %}{{ '<｜Assistant｜>' + m.content.split('</think>')"
                   "[-1] + eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}"
                   "{{ '<｜Assistant｜><think>\n' }}{% endif %}", "disagrees opens"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_formats_without_recordings_agree_with_the_published_chat_templates(tmp_path, name):
    jinja, words = PUBLISHED[name]
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "a"))
    tokenizer.add_tokens(TEMPLATES[name].needs)
    tokenizer.chat_template = jinja
    lines = check_template(TEMPLATES[name], tokenizer)
    named = {re.match(r"known: its chat template (\w+)", line)[1] for line in lines if "other tokens" not in line}
    assert named == set(words.split()), lines
    assert choose_template(None, tokenizer, (TEMPLATES[name].families or [None])[0])[0].name == name


@needs_shared
@pytest.mark.parametrize("old, new", [
    ("<|eot_id|>", "<|eot_id|> "), ("<|end_header_id|>\n\n", "<|end_header_id|>\n"), ("bos_token + content", "content"),
    ("message['role'] +", "message['role']|upper +"), ("message['content'] | trim", "message['content'][1:]"),
    ("'<|start_header_id|>assistant", "'<|start_header_id|>Assistant"), ("<|eot_id|>", ""),
    ("message['content'] | trim", "message['content'] | trim + '.'"), ("loop.index0 == 0", "loop.index0 >= 0")])
def test_one_altered_character_is_found_and_shown(old, new):
    jinja2 = pytest.importorskip("jinja2")
    tokenizer = load_tokenizer(SHARED / "tokenizers" / "llama3")
    theirs = tokenizer.chat_template
    tokenizer.chat_template = theirs.replace(old, new)
    assert tokenizer.chat_template != theirs
    lines = check_template(TEMPLATES["llama3"], tokenizer)
    shown = re.search(r"\(in: ([\w ]+)[^)]*\), from character (\d+) on\n    ours    (.*)\n    theirs  (.*)", lines[0])
    messages, system, _ = CHATS[shown[1]]
    variables = template_check.vendor_chat(messages, system, None)
    texts = [jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(source).render(
        **variables, bos_token=tokenizer.bos_token) for source in (theirs, tokenizer.chat_template)]
    at = int(shown[2])
    assert texts[0][:at] == texts[1][:at] and texts[0][at:at + 1] != texts[1][at:at + 1]
    assert [eval(part) for part in shown.groups()[2:]] == [text[max(at - 40, 0):at + 40] for text in texts]


@pytest.mark.parametrize("jinja, expected", [
    (CHATML, []),
    (CHATML.replace("message['content']", "message['content'] | trim"),
     ["strips white space around texts (in: white space)"]),
    ("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML,
     ["refuses this: no system role (in: system text)"]),
    ("{% if messages[0]['role'] == 'system' %}{% set messages = messages[1:] %}{% endif %}" + CHATML,
     ["leaves the system text out (in: system text)"]),
    ("{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe.<|im_end|>\n' }}{% endif %}" + CHATML,
     ["says 'Be.' for the system text '' (in: one turn, two turns, prompt, later prompt, white space)"]),
    (CHATML.replace("message['content']", "('Cutting Knowledge Date: December 2023\nToday Date: ' + "
                    "strftime_now('%d %b') + '\n\n' if message['role'] == 'system' else '') + message['content']"),
     ["tells the date (in: system text)"]),
    (CHATML + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}",
     ["ends the last answer otherwise (in: one turn, two turns, system text, white space)"]),
    (CHATML.replace("{% endif %}", "{{ '<think>\n' }}{% endif %}"),
     ["opens a thought at the end of a prompt (in: prompt, later prompt)"]),
    ("{% generation %}" + CHATML + "{%- endgeneration -%}", []),
])
def test_known_differences_are_named(tmp_path, jinja, expected):
    assert checked(tmp_path, jinja) == ["known: its chat template " + line for line in expected]


def test_differences_that_matter_do_not_pass_for_known_ones(tmp_path):
    for jinja in (CHATML + "{{ '\n' }}x", "{{ '\n' }}" + CHATML, "{{ '<s>' }}" + CHATML,
                  CHATML.replace("assistant\\n", "assistant").replace("assistant\n", "assistant")):
        assert "writes another text" in checked(tmp_path, jinja)[0], jinja
    never_ends = dict(assistant=("{{content}}",))
    written = ("{% for m in messages %}{{ 'Human: ' + m.content + '\n\nAssistant: ' if m.role == 'user' else m.content "
               "}}{% endfor %}")
    ended = written.replace("else m.content", "else m.content + eos_token")
    assert "writes another text" in checked(tmp_path, ended, "xverse", **never_ends)[0]
    assert "writes another" not in str(checked(tmp_path, written, "xverse", **never_ends))
    bos_twice = checked(tmp_path, "{{ '<s>' }}" + ended, "xverse")
    assert "writes another text" in bos_twice[0] and "system text" not in bos_twice[0].split("(in:")[0]


def test_the_same_text_in_other_tokens_is_said(tmp_path):
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "a"))
    tokenizer.chat_template = ("{% for m in messages %}{{ 'hello' if m.role == 'user' else '' }}{{ m.content }}"
                               "{% endfor %}")
    lines = check_template(Template(user=("hel", "lo", "{{content}}"), assistant=("{{content}}",)), tokenizer)
    assert lines[0].startswith("known: the same text in other tokens, since slots are tokenized one by one (in: ")


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_row_agrees_with_the_chat_template_written_for_it(tmp_path, name):
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "a"))
    row = TEMPLATES[name]
    named = [slot.name for slots in (row.user, row.system, row.prefix) for slot in slots if isinstance(slot, Token)]
    tokenizer.add_tokens([*row.needs, *row.stop, *named])
    tokenizer.chat_template = write_jinja(row, tokenizer)
    lines = check_template(row, tokenizer)
    assert all(line.startswith("known: ") for line in lines), lines


# ---- a chat template is a stranger's program


@pytest.mark.parametrize("jinja, message", [
    ("{% for", "it is not a jinja template"), ("{{ other + 'x' }}", "'other' is undefined"),
    ("{{ 1 / 0 }}", "division"),
    ("{{ 'a' * 10 ** 11 }}", "memory"), ("{{ 'a' * 10 ** 6 }}", "more than 20000 characters"),
    ("{{ ''.__class__.__mro__ }}", "unsafe"), ("{{ cycler.__init__.__globals__.os.system('x') }}", "unsafe"),
    ("{{ messages.append(1) }}", "unsafe"), ("{% include 'x' %}", "no loader"), ("{{ raise_exception('no') }}", "^no$"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "stopped after 2 seconds"),
])
def test_a_chat_template_that_cannot_be_rendered_is_a_sentence(tmp_path, jinja, message):
    pytest.importorskip("jinja2")
    began = time.monotonic()
    [(text, why), second] = sandbox.render_chats(jinja, {}, [{"messages": []}] * 2)
    assert text is None and re.search(message, why) and "\n" not in why and second == (text, why)
    assert time.monotonic() - began < 15
    if "stopped" not in message:  # once is slow enough
        assert all("chat template refuses this: " in line for line in checked(tmp_path, jinja))


def test_what_a_chat_template_writes_may_be_anything(tmp_path):
    for jinja in ("{{ '\\ud800' }}", "{{ '\\x00' }}", " ", "{{ messages | tojson(indent=2) }}{{ tools | tojson }}"):
        assert any("writes another text" in line or "leaves" in line or "cannot be compared" in line
                   for line in checked(tmp_path, jinja)), jinja
    assert checked(tmp_path, None) == []


def test_without_jinja2_there_is_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "jinja2.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    [(text, why)] = sandbox.render_chats(CHATML, {}, [{"messages": []}])
    assert text is None and why == "jinja2 is not installed, so chat templates cannot be read: pip install jinja2"


def test_a_check_is_quick(tmp_path):
    pytest.importorskip("jinja2")
    checked(tmp_path, CHATML)
    began = time.monotonic()
    checked(tmp_path, CHATML)
    assert time.monotonic() - began < 2  # 0.06 s on an idle core


# ---- as a script


def test_the_script_lists_and_shows(tmp_path):
    def run(*arguments):
        return subprocess.run([sys.executable, "-m", "text.template_check", *arguments], cwd=ROOT, capture_output=True, text=True)

    listed = run().stdout
    assert all(name in listed for name in TEMPLATES)
    shown = run("llama3").stdout.splitlines()
    assert [line.split()[0] == "LOSS" for line in shown] == [False, True] * 3 and "2 + 3 = 5.<|eot_id|>" in shown[1]
    assert " tokens " in run("default", "--tokenizer", str(write_byte_level(tmp_path / "a"))).stdout
    wrong = run("lama3")
    assert wrong.returncode == 1 and "did you mean 'llama3'" in wrong.stderr and "Traceback" not in wrong.stderr


@needs_shared
def test_the_script_checks_a_checkpoint(tmp_path):
    def check(*arguments):
        command = [sys.executable, "-m", "text.template_check", *map(str, arguments)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    llama3 = SHARED / "tokenizers" / "llama3"
    assert "template  llama3 (chosen" in check("--check", llama3)
    assert "leaves the tool call out (in: tool call)" in check("--check", llama3)
    assert "writes another text (in: one turn, two turns" in check("alpaca", "--check", llama3)
    assert "no chat template to compare with" in check("--check", SHARED / "tokenizers" / "llama2")
    folder = write_byte_level(tmp_path / "a", eos_token="</s>")
    (folder / "chat_template.jinja").write_text(CHATML.replace("<|im_", "<im_").replace("|>", ">"))
    (folder / "train_config.json").write_text(json.dumps({"template": {
        "name": "mine", "user": "<im_start>user\n{{content}}<im_end>\n<im_start>assistant\n",
        "assistant": "{{content}}<im_end>\n", "system": "<im_start>system\n{{content}}<im_end>\n"}}))
    said = check("--check", folder)
    assert "template  mine" in said and "(in: one turn" not in said
