"""templates.py against the ids LLaMA-Factory recorded, against jinja, and on what it must refuse.

The golden rows are converted here by a few plain lines (data.py has its own, tested in test_data.py) and labelled as
the recordings' notes say, so that only rows which cutoff_len does not shorten are compared.
Read next: test_data.py.
"""
import functools
import json
import subprocess
import sys
from dataclasses import replace

import pytest

import templates
import tools
from templates import (BOS, EOS, TEMPLATES, Settings, Template, Token, choose_template, encode_pieces, encode_prompt,
                       encode_turns, fit_tokenizer, render_turns)
from tests.common import GOLDEN, ROOT, SHARED, needs_shared, read_jsonl
from tests.test_tokenizer import write_byte_level
from tokenizer import load_tokenizer

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


def text_of(template, messages, system=None, tools=None, only_last=False, **settings):
    """-> [(source text, target text), …]"""
    template = TEMPLATES[template] if isinstance(template, str) else template
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
    assert row.tool_format in tools.TOOL_FORMATS
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
    settings = Settings(default_system=default)
    fit_tokenizer(TEMPLATES[name], tokenizer, settings)
    messages = talk("a 'q' \\n {{ x }} {% y %}", "b\n", "c", "d")
    messages += [{"role": "observation", "content": "e"}, {"role": "assistant", "content": "f"}]

    class Shown(Names):
        bos_id, eos_id = tokenizer.bos_token, tokenizer.eos_token

    row = replace(TEMPLATES[name], reasoning=False)
    ours = "".join(piece for turn in render_turns(row, Shown(), messages, system, None, settings)
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


# ---- as a script


def test_the_script_lists_and_shows(tmp_path):
    def run(*arguments):
        return subprocess.run([sys.executable, "templates.py", *arguments], cwd=ROOT, capture_output=True, text=True)

    assert all(name in run().stdout for name in TEMPLATES)
    shown = run("llama3").stdout.splitlines()
    assert [line.split()[0] == "LOSS" for line in shown] == [False, True] * 3 and "2 + 3 = 5.<|eot_id|>" in shown[1]
    assert " tokens " in run("default", "--tokenizer", str(write_byte_level(tmp_path / "a"))).stdout
    wrong = run("lama3")
    assert wrong.returncode == 1 and "did you mean 'llama3'" in wrong.stderr and "Traceback" not in wrong.stderr
