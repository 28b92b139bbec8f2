"""text/template_check.py: the template chosen for a checkpoint against the vendor's."""
import json
import re
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from templates import Template, Token
from tests.chats import CHATML, checked, write_byte_level
from tests.common import GOLDEN, ROOT, SHARED, needs_shared, some
from text import template_check
from text.chat_formats import TEMPLATES
from text.fit_tokenizer import write_jinja
from text.template_check import CHATS, check_template, choose_template
from text.tokenizer import load_tokenizer


@needs_shared
@pytest.mark.parametrize(
    "tokenizer, model_type, expected",
    [
        ("llama3", "llama", "llama3"),
        ("llama2", "llama", "llama2"),
        ("llama2", "mistral", "mistral"),
        ("qwen2.5", "qwen2", "qwen"),
        ("qwen3", "qwen3", "qwen3_nothink"),
    ],
)  # this qwen3 folder has no thoughts
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
    qwen, llama3, llama2 = (
        load_tokenizer(SHARED / "tokenizers" / name) for name in ("qwen2.5", "llama3", "llama2")
    )
    with pytest.raises(
        ValueError,
        match="template 'llama3' uses '<.eot_id.>', which this tokenizer lacks .Qwen2.. "
        "Try template: qwen .*force_template: true",
    ):
        choose_template("llama3", qwen, "qwen2")
    with pytest.raises(ValueError, match="'qwen' uses '<.im_end.>'.*Try template: llama3"):
        choose_template("qwen", llama3, "llama")
    with pytest.raises(ValueError, match="'llama2' uses '</s>'.*Try template: llama3"):
        choose_template("llama2", llama3, "llama")
    with pytest.raises(
        ValueError,
        match="'mistral' is the format of mistral.*this one is llama.*Try template: llama2",
    ):
        choose_template("mistral", llama2, "llama")
    template, why = choose_template("llama3", qwen, "qwen2", force=True)
    assert template is TEMPLATES["llama3"] and "forced" in why
    for name in ("default", "alpaca", "vicuna", "empty"):  # any model can learn these
        assert choose_template(name, qwen, "qwen2")[0].name == name
    with pytest.raises(
        ValueError, match="unknown template 'lama3'.*did you mean 'llama3'.*template_check"
    ):
        choose_template("lama3", llama3, "llama", force=True)


@needs_shared
def test_all_golden_curves_fit_their_own_template():
    for model, model_type, name in (
        ("tiny_llama3", "llama", "llama3"),
        ("tiny_qwen2", "qwen2", "qwen"),
    ):
        tokenizer = load_tokenizer(GOLDEN / "curves" / model)
        assert choose_template(name, tokenizer, model_type)[0].name == name
        assert choose_template(None, tokenizer, model_type)[0].name == name


NEW_FAMILIES = [  # model_type, the tokens of its vocabulary, the row
    ("gemma", "<start_of_turn> <end_of_turn>", "gemma"),
    ("gemma2", "<start_of_turn> <end_of_turn>", "gemma2"),
    ("glm", "[gMASK] <sop> <|user|> <|assistant|>", "glm4"),
    ("glm4", "[gMASK] <sop> <|user|> <|assistant|>", "glm4"),
    ("chatglm", "[gMASK] <sop> <|user|> <|assistant|>", "glm4"),
    ("baichuan", "<reserved_106> <reserved_107>", "baichuan2"),
    ("chatglm", "[gMASK] sop <|user|> <|assistant|>", "chatglm3"),
    ("internlm2", "<|im_start|> <|im_end|>", "intern2"),
    ("internlm3", "<|im_start|> <|im_end|>", "intern2"),
    ("phi3", "<|user|> <|assistant|> <|end|>", "phi"),
    ("phi3", "<|user|> <|assistant|> <|end|> <|tool|>", "phi4_mini"),
    ("phi3", "<|im_start|> <|im_sep|> <|im_end|>", "phi4"),
    ("qwen", "<|im_start|> <|im_end|>", "qwen"),
    ("qwen2_moe", "<|im_start|> <|im_end|>", "qwen"),
    ("qwen3_moe", "<|im_start|> <|im_end|>", "qwen3"),
    ("olmo", "", "olmo"),
    ("olmo2", "", "olmo"),
    ("xverse", "", "xverse"),
    ("mixtral", "<s> </s>", "mistral"),
    ("llama", "<|startoftext|> <|im_start|> <|im_end|>", "yi"),
    ("llama", "<s> </s>", "llama2"),
    ("llama4_text", "<|header_start|> <|header_end|> <|eot|>", "llama4"),
    ("qwen2", "<｜User｜> <｜Assistant｜>", "deepseekr1"),
    ("qwen3_5_moe", "<|im_start|> <|im_end|>", "qwen3_5"),
    ("gemma3_text", "<start_of_turn> <end_of_turn>", "gemma3"),
    ("gemma4", "<|turn> <turn|>", "gemma4"),
    ("glm4_moe", "[gMASK] <sop> <|user|> <|assistant|>", "glm4_moe"),
    ("gpt_oss", "<|start|> <|message|> <|channel|>", "gpt_oss"),
    ("seed_oss", "<seed:think> </seed:think>", "seed_oss"),
    ("lfm2", "<|im_start|> <|im_end|>", "lfm2"),
    ("ernie4_5", "<|begin_of_sentence|> <|end_of_sentence|>", "ernie_nothink"),
    ("hunyuan_v1_dense", "<|startoftext|> <|extra_0|> <|eos|>", "hunyuan"),
    ("hunyuan_v1_dense", "<｜hy_User｜> <｜hy_place▁holder▁no▁2｜>", "hunyuan_small"),
    ("minimax_m2", "]~b] [e~[", "minimax2"),
]


@pytest.mark.parametrize("model_type, tokens, expected", NEW_FAMILIES)
def test_a_template_is_chosen_for_a_family_without_a_chat_template(
    tmp_path, model_type, tokens, expected
):
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "a"))
    tokenizer.add_tokens(tokens.split())
    tokenizer.chat_template = None
    assert choose_template(None, tokenizer, model_type)[0].name == expected
    with pytest.raises(ValueError, match=f"Try template: {expected} "):
        choose_template("cohere", tokenizer, model_type)


@pytest.mark.parametrize("model_type, tokens, words, expected", [
    ("glm4_moe", "[gMASK] <sop> <|user|> <|assistant|>", "<arg_key> /nothink", "glm4_moe"),
    ("glm4_moe_lite", "[gMASK] <sop> <|user|> <|assistant|>", "<arg_key>", "glm4_7"),
    ("qwen3_5", "<|im_start|> <|im_end|>", "<function= </think>", "qwen3_5"),
    ("qwen3_5", "<|im_start|> <|im_end|>", "<function=", "qwen3_5_nothink"),
    ("granitemoehybrid", "<|start_of_role|> <|end_of_role|>", "g4_default_system_message",
     "granite4"),
    ("granite", "<|start_of_role|> <|end_of_role|>", "", "granite3"),
    ("ernie4_5_moe", "<|im_start|> <|im_end|>", "think_mode", "ernie"),
    ("smollm3", "<|im_start|> <|im_end|>", "named SmolLM", "smollm2"),
    ("mistral3", "<s> </s>", "[SYSTEM_PROMPT] [INST]", "mistral_small"),
    ("ministral3", "<s> </s>", "[INST]", "ministral3"),
])
def test_a_template_is_chosen_by_words_of_the_chat_template(tmp_path, model_type, tokens, words,
                                                            expected):
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "a"))
    tokenizer.add_tokens(tokens.split())
    tokenizer.chat_template = "{{ bos_token }}{# " + f"{tokens} {words} #}}"
    assert choose_template(None, tokenizer, model_type)[0].name == expected


def test_a_token_that_is_not_found_in_texts(tmp_path):
    """ChatGLM3's `sop` has an id, yet a user who types it types three letters."""
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "a"))
    tokenizer.add_tokens(["[gMASK]", "<|user|>", "<|assistant|>", "<|system|>"])
    row = replace(
        TEMPLATES["chatglm3"], prefix=(Token("[gMASK]"), Token("l")), needs=("[gMASK]", "l")
    )
    assert not tokenizer.is_added("l")
    assert template_check.misfit_reason(row, tokenizer, "chatglm") == ""
    assert "'<sop>'" in template_check.misfit_reason(TEMPLATES["glm4"], tokenizer, "chatglm")


@needs_shared
def test_formats_agree_with_the_chat_templates_they_were_made_from():
    for name, folder in (("llama3", "llama3"), ("qwen3_nothink", "qwen3"), ("qwen", "qwen2.5")):
        tokenizer = load_tokenizer(SHARED / "tokenizers" / folder)
        lines = check_template(TEMPLATES[name], tokenizer)
        assert all(line.startswith("known: ") for line in lines), lines
        if name != "llama3":  # the templates in the folders of Qwen have this default
            row = replace(TEMPLATES[name], default_system="You are a helpful assistant.")
            assert check_template(row, tokenizer) == []
    assert [
        line
        for line in check_template(
            TEMPLATES["qwen"], load_tokenizer(SHARED / "tokenizers" / "llama3")
        )
        if "writes another text" in line
    ]


TURNS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}"
)
# the chat templates of published models, shortened to texts; the differences that are known
PUBLISHED = {
    "gemma2": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role "
        "not supported') }}"
        "{% endif %}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == "
        "'assistant' else "
        "m.role) + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}{% if "
        "add_generation_prompt %}"
        "{{ '<start_of_turn>model\n' }}{% endif %}",
        "refuses strips",
    ),
    "phi": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        "ends",
    ),
    "phi4_mini": (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}",
        "ends",
    ),
    "glm4": (
        "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>{{ m.metadata }}\n{{ m.content }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        "",
    ),
    "intern2": (
        "{{ bos_token }}"
        + TURNS
        + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "has",
    ),
    "yi": (TURNS + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}", ""),
    "olmo2": (
        "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}"
        "{{ eos_token if m.role == 'assistant' }}{{ '\n' if m.role != 'assistant' or not "
        "loop.last }}"
        "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% "
        "endfor %}",
        "ends",
    ),
    "orion": (
        "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}{% if m.role == "
        "'user' %}"
        "{{ 'Human: ' + m.content + '\n\nAssistant: ' + eos_token }}{% elif m.role == "
        "'assistant' %}"
        "{{ m.content + eos_token }}{% endif %}{% endfor %}",
        "leaves",
    ),
    "granite3": (
        "{% for m in messages %}{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + "
        "'<|end_of_text|>\n' }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}",
        "",
    ),
    "cohere": (
        "{{ bos_token }}{% for m in messages %}{{ '<|START_OF_TURN_TOKEN|>' + {'user': "
        "'<|USER_TOKEN|>', "
        "'system': '<|SYSTEM_TOKEN|>', 'assistant': '<|CHATBOT_TOKEN|>'}[m.role] + "
        "m.content.strip() + "
        "(eos_token if m.role == 'assistant' else '<|END_OF_TURN_TOKEN|>') }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}",
        "strips",
    ),
    "deepseekr1": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% "
        "elif m.role == "
        "'user' %}{{ '<｜User｜>' + m.content }}{% else %}{{ '<｜Assistant｜>' + "
        "m.content.split('</think>')"
        "[-1] + eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<｜Assistant｜><think>\n' }}{% endif %}",
        "disagrees opens",
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_formats_without_recordings_agree_with_the_published_chat_templates(tmp_path, name):
    jinja, words = PUBLISHED[name]
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "a"))
    tokenizer.add_tokens(TEMPLATES[name].needs)
    tokenizer.chat_template = jinja
    lines = check_template(TEMPLATES[name], tokenizer)
    named = {
        re.match(r"known: its chat template (\w+)", line)[1]
        for line in lines
        if "other tokens" not in line
    }
    assert named == set(words.split()), lines
    assert choose_template(None, tokenizer, (TEMPLATES[name].families or [None])[0])[0].name == name


@needs_shared
@pytest.mark.parametrize(
    "old, new",
    [
        ("<|eot_id|>", "<|eot_id|> "),
        ("<|end_header_id|>\n\n", "<|end_header_id|>\n"),
        ("bos_token + content", "content"),
        ("message['role'] +", "message['role']|upper +"),
        ("message['content'] | trim", "message['content'][1:]"),
        ("'<|start_header_id|>assistant", "'<|start_header_id|>Assistant"),
        ("<|eot_id|>", ""),
        ("message['content'] | trim", "message['content'] | trim + '.'"),
        ("loop.index0 == 0", "loop.index0 >= 0"),
    ],
)
def test_one_altered_character_is_found_and_shown(old, new):
    jinja2 = pytest.importorskip("jinja2")
    tokenizer = load_tokenizer(SHARED / "tokenizers" / "llama3")
    theirs = tokenizer.chat_template
    tokenizer.chat_template = theirs.replace(old, new)
    assert tokenizer.chat_template != theirs
    lines = check_template(TEMPLATES["llama3"], tokenizer)
    shown = re.search(
        r"\(in: ([\w ]+)[^)]*\), from character (\d+) on\n    ours    (.*)\n    theirs  (.*)",
        lines[0],
    )
    messages, system, _ = CHATS[shown[1]]
    variables = template_check.vendor_chat(messages, system, None)
    texts = [
        jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
        .from_string(source)
        .render(**variables, bos_token=tokenizer.bos_token)
        for source in (theirs, tokenizer.chat_template)
    ]
    at = int(shown[2])
    assert texts[0][:at] == texts[1][:at] and texts[0][at : at + 1] != texts[1][at : at + 1]
    assert [eval(part) for part in shown.groups()[2:]] == [
        text[max(at - 40, 0) : at + 40] for text in texts
    ]


@pytest.mark.parametrize(
    "jinja, expected",
    [
        (CHATML, []),
        (
            CHATML.replace("message['content']", "message['content'] | trim"),
            ["strips white space around texts (in: white space)"],
        ),
        (
            "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}"
            "{% endif %}"
            + CHATML,
            ["refuses this: no system role (in: system text)"],
        ),
        (
            "{% if messages[0]['role'] == 'system' %}{% set messages = messages[1:] %}{% endif %}"
            + CHATML,
            ["leaves the system text out (in: system text)"],
        ),
        (
            "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe.<|im_end|>\n' "
            "}}{% endif %}"
            + CHATML,
            [
                "says 'Be.' for the system text '' (in: one turn, two turns, prompt, later "
                "prompt, white space)"
            ],
        ),
        (
            CHATML.replace(
                "message['content']",
                "('Cutting Knowledge Date: December 2023\nToday Date: ' + "
                "strftime_now('%d %b') + '\n\n' if message['role'] == 'system' else '') + "
                "message['content']",
            ),
            ["tells the date (in: system text)"],
        ),
        (
            CHATML + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}",
            ["ends the last answer otherwise (in: one turn, two turns, system text, white space)"],
        ),
        (
            CHATML.replace("{% endif %}", "{{ '<think>\n' }}{% endif %}"),
            ["opens a thought at the end of a prompt (in: prompt, later prompt)"],
        ),
        ("{% generation %}" + CHATML + "{%- endgeneration -%}", []),
    ],
)
def test_known_differences_are_named(tmp_path, jinja, expected):
    assert checked(tmp_path, jinja) == ["known: its chat template " + line for line in expected]


def test_other_differences_are_not_taken_for_known_ones(tmp_path):
    for jinja in (
        CHATML + "{{ '\n' }}x",
        "{{ '\n' }}" + CHATML,
        "{{ '<s>' }}" + CHATML,
        CHATML.replace("assistant\\n", "assistant").replace("assistant\n", "assistant"),
    ):
        assert "writes another text" in checked(tmp_path, jinja)[0], jinja
    never_ends = dict(assistant=("{{content}}",))
    written = (
        "{% for m in messages %}{{ 'Human: ' + m.content + '\n\nAssistant: ' if m.role == "
        "'user' else m.content "
        "}}{% endfor %}"
    )
    ended = written.replace("else m.content", "else m.content + eos_token")
    assert "writes another text" in checked(tmp_path, ended, "xverse", **never_ends)[0]
    assert "writes another" not in str(checked(tmp_path, written, "xverse", **never_ends))
    bos_twice = checked(tmp_path, "{{ '<s>' }}" + ended, "xverse")
    assert (
        "writes another text" in bos_twice[0] and "system text" not in bos_twice[0].split("(in:")[0]
    )


def test_the_same_text_in_other_tokens_is_reported(tmp_path):
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "a"))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'hello' if m.role == 'user' else '' }}{{ m.content }}"
        "{% endfor %}"
    )
    lines = check_template(
        Template(user=("hel", "lo", "{{content}}"), assistant=("{{content}}",)), tokenizer
    )
    assert lines[0].startswith(
        "known: the same text in other tokens, since slots are tokenized one by one (in: "
    )


@pytest.mark.parametrize("name", some(TEMPLATES))
def test_every_row_agrees_with_the_chat_template_written_for_it(tmp_path, name):
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "a"))
    row = TEMPLATES[name]
    named = [
        slot.name
        for slots in (row.user, row.system, row.prefix)
        for slot in slots
        if isinstance(slot, Token)
    ]
    tokenizer.add_tokens([*row.needs, *row.stop, *named])
    tokenizer.chat_template = write_jinja(row, tokenizer)
    lines = check_template(row, tokenizer)
    assert all(line.startswith("known: ") for line in lines), lines


def test_chat_templates_may_print_anything(tmp_path):
    for jinja in (
        "{{ '\\ud800' }}",
        "{{ '\\x00' }}",
        " ",
        "{{ messages | tojson(indent=2) }}{{ tools | tojson }}",
    ):
        assert any(
            "writes another text" in line or "leaves" in line or "cannot be compared" in line
            for line in checked(tmp_path, jinja)
        ), jinja
    assert checked(tmp_path, None) == []


def test_a_check_is_fast(tmp_path):
    pytest.importorskip("jinja2")
    checked(tmp_path, CHATML)
    began = time.monotonic()
    checked(tmp_path, CHATML)
    assert time.monotonic() - began < 2  # 0.06 s on an idle core


def test_the_script_lists_and_shows(tmp_path):
    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "text.template_check", *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )

    listed = run().stdout
    assert all(name in listed for name in TEMPLATES)
    shown = run("llama3").stdout.splitlines()
    assert [line.split()[0] == "LOSS" for line in shown] == [
        False,
        True,
    ] * 3 and "2 + 3 = 5.<|eot_id|>" in shown[1]
    assert " tokens " in run("default", "--tokenizer", str(write_byte_level(tmp_path / "a"))).stdout
    wrong = run("lama3")
    assert (
        wrong.returncode == 1
        and "did you mean 'llama3'" in wrong.stderr
        and "Traceback" not in wrong.stderr
    )


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
    (folder / "train_config.json").write_text(
        json.dumps(
            {
                "template": {
                    "name": "mine",
                    "user": "<im_start>user\n{{content}}<im_end>\n<im_start>assistant\n",
                    "assistant": "{{content}}<im_end>\n",
                    "system": "<im_start>system\n{{content}}<im_end>\n",
                }
            }
        )
    )
    printed = check("--check", folder)
    assert "template  mine" in printed and "(in: one turn" not in printed
