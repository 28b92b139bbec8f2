"""Chat formats beside the five in templates.py, and the reader of formats given in a config file.

    python -m text.template_check             lists them
    python -m text.template_check llama3      shows one

To add a format, add a row to TEMPLATES:

    "mychat": Template(
        prefix=(BOS,),                                # once, before everything
        system=("<sys>{{content}}</sys>",),
        user=("<user>{{content}}</user><bot>",),      # up to where the answer begins
        assistant=("{{content}}", EOS),               # the answer; all of it carries loss
    ),

docs/templates.md explains it, and shows the same format in a yaml file.

Requires: templates.py, text/tool_calls.py.
Next: text/template_check.py, which chooses the format of a checkpoint.
Sources: the vendors' chat templates, as published in their tokenizer_config.json. The names of the
formats and the borders of the slots are those of LLaMA-Factory 0.9.5 (0.9.4: baichuan, baichuan2,
belle, codegeex4, intern, orion, xverse).
"""
import json
import re
from dataclasses import fields, replace

from errors import nearest_names, unknown_name
from templates import (BOS, CHATML, EOS, GEMMA, LLAMA3, MISTRAL, QWEN, Template, Token,
                       ToolFormat)
from text.plain_text import check_utf8
from text.tokenizer import read_json
from text.tool_calls import TOOL_FORMATS


# ---- tool formats and overrides -----------------------------------------------------------------


def with_tool_functions(template: Template) -> Template:
    """The template with the functions of its tool format, which templates.py only names."""
    return replace(template, tool_format=find_tool_format(template.tool_format.name))


def find_tool_format(name: str, where: str = "") -> ToolFormat:
    """The row of TOOL_FORMATS with this name. where: for the message of the ValueError."""
    if name not in TOOL_FORMATS:
        raise ValueError(f"{where}{unknown_name('tool_format', name, TOOL_FORMATS)}")
    return TOOL_FORMATS[name]


def with_overrides(template: Template, tool_format: str | None = None,
                   default_system: str | None = None) -> Template:
    """The template with the config's tool_format and default_system instead of its own."""
    if tool_format:
        # a call in another tool format ends in the tokenizer's eos, as in LLaMA-Factory
        function = ("{{content}}",) if template.efficient_eos else ("{{content}}", EOS)
        template = replace(template, tool_format=ToolFormat(tool_format), function=function)
    if default_system is not None:
        check_utf8(default_system, "default_system")
        template = replace(template, default_system=default_system)
    return with_tool_functions(template)


# ---- formats that several rows have in common ---------------------------------------------------


PLAIN_CHATML = replace(CHATML, observation=None, stop=("<|im_end|>",), stop_is_eos=False,
                       own_jinja=False)

QWEN3 = replace(QWEN, default_system="", families=("qwen3", "qwen3_moe"))

MINISTRAL = replace(
    MISTRAL,
    user=("[INST]{{content}}[/INST]",),
    assistant=("{{content}}", EOS),
    function=("[TOOL_CALLS]{{content}}", EOS),
    observation=('[TOOL_RESULTS]{"content": {{content}}}[/TOOL_RESULTS]',),
    says=("[INST]",),
)

# from version 7 of the tokenizer on, a text may stand before the calls
MISTRAL_V7 = replace(MINISTRAL, function=("{{content}}", EOS),
                     tool_format=ToolFormat("mistral_small"))

LLAMA2 = Template(
    user=(BOS, "[INST] {{content}} [/INST]"),
    system=("<<SYS>>\n{{content}}\n<</SYS>>\n\n",),
    system_in_user=True,
    families=("llama",),
    needs=("<s>", "</s>"),
    says=("[INST]", "<<SYS>>"),
)

GLM4 = Template(
    user=("<|user|>\n{{content}}<|assistant|>",),
    assistant=("\n{{content}}",), function=("{{content}}",), efficient_eos=True,
    system=("<|system|>\n{{content}}",),
    observation=("<|observation|>\n{{content}}<|assistant|>",),
    prefix=("[gMASK]<sop>",), tool_format=ToolFormat("glm4"), stop=("<|user|>", "<|observation|>"),
    families=("glm", "glm4", "chatglm"),
    needs=("[gMASK]", "<sop>", "<|user|>", "<|assistant|>"), says=("[gMASK]", "<sop>"))

DEEPSEEK3 = Template(
    user=("<｜User｜>{{content}}<｜Assistant｜>",),
    prefix=(BOS,),
    families=("deepseek_v3", "qwen2", "qwen3", "llama"),
    needs=("<｜User｜>", "<｜Assistant｜>"), says=("<｜User｜>",))

PHI = Template(
    user=("<|user|>\n{{content}}<|end|>\n<|assistant|>\n",),
    assistant=("{{content}}<|end|>\n",),
    system=("<|system|>\n{{content}}<|end|>\n",),
    stop=("<|end|>",), stop_is_eos=True,
    families=("phi3",), needs=("<|user|>", "<|assistant|>", "<|end|>"), says=("<|end|>",))

INTERNLM_SELF = (
    "You are an AI assistant whose name is InternLM (书生·浦语).\n"
    "- InternLM (书生·浦语) is a conversational language model that is developed by "
    "Shanghai AI Laboratory (上海人工智能实验室). "
    "It is designed to be helpful, honest, and harmless.\n"
    "- InternLM (书生·浦语) can understand and communicate fluently in the language "
    "chosen by the user such as English and 中文.")


# ---- the table ----------------------------------------------------------------------------------


# Where neither the config nor the checkpoint decides, the first row that fits is chosen.
TEMPLATES = {
    "deepseekr1": replace(DEEPSEEK3, reasoning=True, says=("<｜User｜>", "</think>")),
    "deepseek3": DEEPSEEK3,
    "llama3": LLAMA3,
    "llama4": Template(
        user=("<|header_start|>user<|header_end|>\n\n{{content}}<|eot|>"
              "<|header_start|>assistant<|header_end|>\n\n",),
        assistant=("{{content}}<|eot|>",),
        system=("<|header_start|>system<|header_end|>\n\n{{content}}<|eot|>",),
        observation=("<|header_start|>ipython<|header_end|>\n\n{{content}}<|eot|>"
                     "<|header_start|>assistant<|header_end|>\n\n",),
        prefix=(BOS,), tool_format=ToolFormat("llama3"),
        stop=("<|eot|>", "<|eom|>"), stop_is_eos=True,
        families=("llama4", "llama4_text"),
        needs=("<|header_start|>", "<|header_end|>", "<|eot|>"), says=("<|header_start|>",)),
    "qwen3": replace(QWEN3, reasoning=True, says=("<|im_start|>", "</think>")),
    "qwen3_nothink": QWEN3,
    "qwen": QWEN,
    "sailor": replace(  # a Qwen 1.5 body
        PLAIN_CHATML,
        user=("<|im_start|>question\n{{content}}<|im_end|>\n<|im_start|>answer\n",),
        default_system="You are an AI assistant named Sailor created by Sea AI Lab. "
                       "Your answer should be friendly, unbiased, faithful, informative and "
                       "detailed.",
        families=("qwen2",), says=("<|im_start|>", "Sailor")),
    "mistral": MISTRAL,
    "mistral_small": replace(
        MISTRAL_V7,
        system=("[SYSTEM_PROMPT]{{content}}[/SYSTEM_PROMPT]",), system_in_user=False,
        says=("[SYSTEM_PROMPT]",)),
    "ministral": MINISTRAL,  # Ministral 8B, Nemo
    "ministral3": MISTRAL_V7,
    "llama2": LLAMA2,
    "llama2_zh": replace(
        LLAMA2, default_system="You are a helpful assistant. 你是一个乐于助人的助手。"),
    "phi4": Template(
        user=("<|im_start|>user<|im_sep|>{{content}}<|im_end|><|im_start|>assistant<|im_sep|>",),
        assistant=("{{content}}<|im_end|>",),
        system=("<|im_start|>system<|im_sep|>{{content}}<|im_end|>",),
        stop=("<|im_end|>",), stop_is_eos=True,
        families=("phi3",), needs=("<|im_start|>", "<|im_sep|>", "<|im_end|>"),
        says=("<|im_sep|>",)),
    "phi4_mini": replace(
        PHI,
        user=("<|user|>{{content}}<|end|><|assistant|>",),
        assistant=("{{content}}<|end|>",),
        system=("<|system|>{{content}}<|end|>",),
        tool_format=ToolFormat("phi4_mini"), needs=(*PHI.needs, "<|tool|>")),
    "phi": PHI,  # Phi-3, Phi-3.5
    "gemma2": replace(GEMMA, stop=("<eos>", "<end_of_turn>"), stop_is_eos=False, efficient_eos=True,
                      families=("gemma2",)),
    "gemma": GEMMA,
    "glm4": GLM4,
    "glmz1": replace(
        GLM4, reasoning=True, says=("[gMASK]", "<sop>", "</think>"), families=("glm4",)),
    "codegeex4": replace(
        GLM4,
        user=("<|user|>\n{{content}}<|assistant|>\n",),
        assistant=("{{content}}",),
        observation=("<|observation|>\n{{content}}<|assistant|>\n",),
        default_system="你是一位智能编程助手，你叫CodeGeeX。"
                       "你会为用户回答关于编程、代码、计算机方面的任何问题，"
                       "并提供格式规范、可以执行、准确安全的代码，并在必要时提供详细的解释。",
        families=("chatglm",)),
    "chatglm3": Template(
        user=(Token("<|user|>"), "\n", "{{content}}", Token("<|assistant|>")),
        assistant=("\n", "{{content}}"), function=("{{content}}",), efficient_eos=True,
        system=(Token("<|system|>"), "\n", "{{content}}"),
        observation=(Token("<|observation|>"), "\n", "{{content}}", Token("<|assistant|>")),
        prefix=(Token("[gMASK]"), Token("sop")), tool_format=ToolFormat("glm4"),
        stop=("<|user|>", "<|observation|>"),
        families=("chatglm",), needs=("[gMASK]", "sop", "<|user|>", "<|assistant|>"),
        says=("[gMASK]", "sop")),
    "baichuan2": Template(
        user=("<reserved_106>{{content}}<reserved_107>",),
        assistant=("{{content}}",), efficient_eos=True,
        families=("baichuan",), needs=("<reserved_106>", "<reserved_107>"),
        says=("<reserved_106>",)),
    "baichuan": Template(
        user=(Token("<reserved_102>"), "{{content}}", Token("<reserved_103>")),
        assistant=("{{content}}",), efficient_eos=True,
        families=("baichuan",), needs=("<reserved_102>", "<reserved_103>"),
        says=("<reserved_102>",)),
    "xverse": Template(
        user=("Human: {{content}}\n\nAssistant: ",),
        families=("xverse",), says=("Human: ", "Assistant: ")),
    "intern2": replace(
        PLAIN_CHATML, prefix=(BOS,), default_system=INTERNLM_SELF, families=("internlm2",)),
    "olmo": Template(
        user=("<|user|>\n{{content}}<|assistant|>\n",),
        prefix=(EOS,),
        families=("olmo", "olmo2"), says=("<|user|>", "<|assistant|>")),
    # OLMo 2 Instruct and other Tülu models; LLaMA-Factory trains them with `olmo`
    "olmo2": Template(
        user=("<|user|>\n{{content}}\n<|assistant|>\n",),
        assistant=("{{content}}", EOS, "\n"),
        system=("<|system|>\n{{content}}\n",),
        prefix=(BOS,),
        families=("olmo2", "llama"), says=("<|user|>", "<|system|>", "bos_token")),
    "deepseekcoder": Template(
        user=("### Instruction:\n{{content}}\n### Response:",),
        assistant=("\n{{content}}\n<|EOT|>\n",),
        prefix=(BOS,),
        default_system="You are an AI programming assistant, utilizing the DeepSeek Coder model, "
                       "developed by DeepSeek Company, and you only answer questions related to "
                       "computer science. "
                       "For politically sensitive questions, security and privacy issues, "
                       "and other non-computer science questions, you will refuse to answer.\n",
        families=("llama",), needs=("<|EOT|>", "<｜begin▁of▁sentence｜>"),
        says=("### Instruction:", "<|EOT|>")),
    "deepseek": Template(
        user=("User: {{content}}\n\nAssistant:",),
        system=("{{content}}\n\n",),
        prefix=(BOS,),
        families=("llama", "deepseek_v2"), needs=("<｜begin▁of▁sentence｜>",),
        says=("User: ", "Assistant:")),
    "yi": replace(
        PLAIN_CHATML,
        families=("llama",), needs=("<|startoftext|>", "<|im_start|>", "<|im_end|>")),
    "smollm2": replace(
        PLAIN_CHATML,
        default_system="You are a helpful AI assistant named SmolLM, trained by Hugging Face.",
        families=("llama",), says=("<|im_start|>", "SmolLM")),
    "opencoder": replace(
        PLAIN_CHATML, observation=CHATML.observation,
        default_system="You are OpenCoder, created by OpenCoder Team.",
        families=("llama",), says=("<|im_start|>", "OpenCoder")),
    "smollm": replace(PLAIN_CHATML, families=("llama",)),
    "openchat-3.6": Template(  # a Llama 3 body
        user=("<|start_header_id|>GPT4 Correct User<|end_header_id|>\n\n{{content}}<|eot_id|>"
              "<|start_header_id|>GPT4 Correct Assistant<|end_header_id|>\n\n",),
        prefix=(BOS,), stop=("<|eot_id|>",),
        families=("llama",), needs=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        says=("<|start_header_id|>", "GPT4 Correct")),
    "openchat": Template(
        user=("GPT4 Correct User: {{content}}", EOS, "GPT4 Correct Assistant:"),
        prefix=(BOS,),
        families=("mistral",), says=("GPT4 Correct",)),
    "zephyr": Template(
        user=("<|user|>\n{{content}}", EOS, "<|assistant|>\n"),
        system=("<|system|>\n{{content}}", EOS),
        default_system="You are Zephyr, a helpful assistant.",
        families=("mistral", "llama"), says=("<|user|>", "<|assistant|>")),  # TinyLlama too
    "breeze": Template(
        user=("[INST] {{content}} [/INST] ",),
        assistant=("{{content}}",), efficient_eos=True,
        prefix=(BOS,),
        families=("mistral",), says=("[INST] ", " [/INST] ")),
    "solar": Template(
        user=("### User:\n{{content}}\n\n### Assistant:\n",),
        assistant=("{{content}}",), efficient_eos=True,
        system=("### System:\n{{content}}\n\n",),
        families=("llama",), says=("### User:", "### Assistant:")),
    "seed_coder": Template(
        user=(BOS, "user\n{{content}}", EOS, BOS, "assistant\n"),
        system=(BOS, "system\n{{content}}", EOS),
        default_system="You are an AI programming assistant, utilizing the Seed-Coder model, "
                       "developed by ByteDance Seed, and you only answer questions related to "
                       "computer science. For politically sensitive questions, security and "
                       "privacy issues, and other non-computer science questions, you will "
                       "refuse to answer.\n\n",
        families=("llama",), says=("Seed-Coder",)),
    "xuanyuan": Template(
        user=("Human: {{content}} Assistant:",),
        default_system="以下是用户和人工智能助手之间的对话。"
                       "用户以Human开头，人工智能助手以Assistant开头，"
                       "会对人类提出的问题给出有帮助、高质量、详细和礼貌的回答，"
                       "并且总是拒绝参与与不道德、不安全、有争议、政治敏感等相关的话题、问题和指示。\n",
        families=("llama",), says=("Human:", " Assistant:")),
    "orion": Template(
        user=("Human: {{content}}\n\nAssistant: ", EOS),
        prefix=(BOS,), families=("orion",), says=("Human: ", "Assistant: ")),
    "belle": Template(
        user=("Human: {{content}}\n\nBelle: ",),
        assistant=("{{content}}", EOS, "\n\n"),
        prefix=(BOS,), families=("llama",), says=("Belle",)),
    # Formats of networks that are not in families.py; any model can be taught them:
    "starchat": replace(
        PHI,
        user=("<|user|>\n{{content}}<|end|>\n<|assistant|>",),
        stop_is_eos=False, families=()),
    "granite3": Template(
        user=("<|start_of_role|>user<|end_of_role|>{{content}}<|end_of_text|>\n"
              "<|start_of_role|>assistant<|end_of_role|>",),
        assistant=("{{content}}<|end_of_text|>\n",),
        system=("<|start_of_role|>system<|end_of_role|>{{content}}<|end_of_text|>\n",),
        needs=("<|start_of_role|>", "<|end_of_role|>"), says=("<|start_of_role|>",)),
    "cohere": Template(
        user=("<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{{content}}<|END_OF_TURN_TOKEN|>"
              "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",),
        system=("<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>{{content}}<|END_OF_TURN_TOKEN|>",),
        prefix=(BOS,),
        needs=("<|START_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>"), says=("<|START_OF_TURN_TOKEN|>",)),
    "falcon": Template(
        user=("User: {{content}}\nFalcon:",),
        assistant=("{{content}}\n",), efficient_eos=True,
        says=("Falcon:",)),
    "exaone": Template(
        user=("[|user|]{{content}}\n[|assistant|]",),
        assistant=("{{content}}", EOS, "\n"),
        system=("[|system|]{{content}}[|endofturn|]\n",),
        needs=("[|user|]", "[|assistant|]"), says=("[|user|]",)),
    "moonlight": Template(
        user=("<|im_user|>user<|im_middle|>{{content}}<|im_end|>"
              "<|im_assistant|>assistant<|im_middle|>",),
        assistant=("{{content}}<|im_end|>",),
        system=("<|im_system|>system<|im_middle|>{{content}}<|im_end|>",),
        default_system="You are a helpful assistant provided by Moonshot-AI.",
        stop=("<|im_end|>",), stop_is_eos=True,
        needs=("<|im_user|>", "<|im_middle|>", "<|im_end|>"), says=("<|im_middle|>",)),
    "intern": Template(  # InternLM 1
        user=("<|User|>:{{content}}\n<|Bot|>:",),
        assistant=("{{content}}<eoa>\n",),
        system=("<|System|>:{{content}}\n",),
        prefix=(BOS,), default_system=INTERNLM_SELF, stop=("<eoa>",),
        needs=("<eoa>",), says=("<|User|>", "<|Bot|>")),
    "telechat2": Template(
        user=("<_user>{{content}}<_bot>",),
        system=("<_system>{{content}}",),
        default_system="你是中国电信星辰语义大模型，英文名是TeleChat，"
                       "你是由中电信人工智能科技有限公司和中国电信人工智能研究院（TeleAI）"
                       "研发的人工智能助手。",
        needs=("<_user>", "<_bot>"), says=("<_user>",)),
    "yuan": Template(
        user=("{{content}}", Token("<sep>")),
        assistant=("{{content}}<eod>\n",), stop=("<eod>",),
        needs=("<sep>", "<eod>"), says=("<sep>",)),
    "bailing": Template(
        user=("<role>HUMAN</role>{{content}}<role>ASSISTANT</role>",),
        assistant=("{{content}}",), efficient_eos=True,
        system=("<role>SYSTEM</role>{{content}}",),
        observation=("<role>OBSERVATION</role>{{content}}<role>ASSISTANT</role>",),
        stop=("<|endoftext|>",), needs=("<role>", "</role>"), says=("<role>",)),
    "cpm4": replace(
        PLAIN_CHATML, observation=CHATML.observation, prefix=(BOS,), families=("minicpm",)),
    # Formats that any model can be taught:
    "chatml": CHATML,
    "chatml_de": replace(
        CHATML, default_system="Du bist ein freundlicher und hilfsbereiter KI-Assistent."),
    "vicuna": Template(
        user=("USER: {{content}} ASSISTANT:",),
        default_system="A chat between a curious user and an artificial intelligence assistant. "
                       "The assistant gives helpful, detailed, and polite answers to the user's "
                       "questions.",
        own_jinja=True, says=("USER: ", "ASSISTANT:")),
    "alpaca": Template(
        user=("### Instruction:\n{{content}}\n\n### Response:\n",),
        assistant=("{{content}}", EOS, "\n\n"),
        default_system="Below is an instruction that describes a task. "
                       "Write a response that appropriately completes the request.\n\n",
        own_jinja=True, says=("### Instruction:", "### Response:")),
    "default": Template(
        user=("Human: {{content}}", EOS, "\nAssistant:"),
        assistant=("{{content}}", EOS, "\n"),
        system=("System: {{content}}", EOS, "\n"),
        own_jinja=True, says=("Human: ", "Assistant:")),
    "fewshot": Template(
        user=("{{content}}",), assistant=("{{content}}\n\n",), efficient_eos=True, own_jinja=True),
    "empty": Template(user=("{{content}}",), assistant=("{{content}}",)),
}
# Each row gets its name, and the functions of its tool format.
TEMPLATES = {name: with_tool_functions(replace(row, name=name)) for name, row in TEMPLATES.items()}


# ---- read and write: the `template` of a config -------------------------------------------------


KEYS = [field.name for field in fields(Template)]
SLOTS = ("user", "assistant", "system", "observation", "function", "prefix")
FLAGS = [field.name for field in fields(Template) if field.type is bool]
TEXTS = ("default_system", "tool_format", "name")       # the other keys are lists of texts
LIST_OF_ALL = "`python -m text.template_check` lists them all"


def find_template(value: str | dict) -> Template:
    """Find the format that a config names or describes.

    value: the name of a row, or a mapping (see docs/templates.md). Raises ValueError that says what
    is wrong, with the nearest valid spelling.
    """
    if isinstance(value, dict):
        return read_format(value)
    if not isinstance(value, str):
        raise ValueError(f"template: {value!r} is not the name of a format, as qwen; {LIST_OF_ALL}")
    if value not in TEMPLATES:
        near = nearest_names(value, TEMPLATES)
        hint = f" (did you mean {', '.join(map(repr, near))}?)" if near else ""
        raise ValueError(f"unknown template {value!r}{hint}; {LIST_OF_ALL}")
    return TEMPLATES[value]


def written_template(template: Template) -> str | dict:
    """Write a format as a config does, for find_template: the name of a row, or a mapping."""
    if TEMPLATES.get(template.name) == template:
        return template.name
    written = {}
    for field in fields(Template):
        value = getattr(template, field.name)
        # own_jinja has another default in a mapping
        if value != field.default or field.name == "own_jinja":
            written[field.name] = written_field(field.name, value)
    return written


def written_field(key: str, value):
    """Write one field of a Template as a config does; the inverse of read_field."""
    if key in FLAGS:
        return str(value).lower()
    if key == "tool_format":
        return value.name
    if key in SLOTS and value is not None:
        return [{"token": slot.name} if isinstance(slot, Token) else slot for slot in value]
    return list(value) if isinstance(value, tuple) else value


def read_format(mapping: dict) -> Template:
    """Read the mapping under `template:` in a config.

    Its keys are the fields of Template, and `based_on`, a format that gives the fields left out.
    """
    for key in mapping:
        if key not in (*KEYS, "based_on"):
            raise ValueError(f"template: {unknown_name('key', key, [*KEYS, 'based_on'])}")
    name = mapping.get("name") or "custom"
    if name in TEMPLATES:
        raise ValueError(f"template: name: {name!r} is a row of the table. Write template: {name} "
                         f"to use it unchanged, or based_on: {name} under another name to change "
                         "it")
    values = {"own_jinja": True}
    values |= {key: read_field(key, value) for key, value in mapping.items() if key != "based_on"}
    if "based_on" in mapping:
        base = find_template(mapping["based_on"])
        template = replace(base, **{"families": (), "says": (), **values})
    elif "user" in values:
        template = Template(**values)
    else:
        raise ValueError("template: 'user' is missing: the text around a user's message, up to "
                         "where the answer begins, as "
                         'user: "<user>{{content}}</user><bot>"')
    if "needs" not in mapping:      # the tokens that the base needs and that still occur
        occurs = str([getattr(template, key) for key in SLOTS])
        needs = tuple(token for token in template.needs if token in occurs)
        template = replace(template, needs=needs)
    check_format(template)
    return with_tool_functions(replace(template, name=name))


def read_field(key: str, value):
    """Read one value of the mapping as a field of Template."""
    where = f"template: {key}: {value!r}"
    check_utf8(json.dumps(value, ensure_ascii=False, default=str), f"template: {key}")
    if key in SLOTS:
        if key in ("observation", "function") and value in (None, "null", ""):
            return None
        slots = value if isinstance(value, list) else [value]
        return tuple(read_slot(where, slot) for slot in slots)
    if key in FLAGS:
        if str(value).lower() not in ("true", "false"):
            raise ValueError(f"{where} is not true or false")
        return str(value).lower() == "true"
    if key in TEXTS:
        if not isinstance(value, str):
            raise ValueError(f"{where} is not a text")
        return find_tool_format(value, "template: ") if key == "tool_format" else value
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f'{where} is not a list of texts, as ["<|end|>"]')
    return tuple(texts)


def read_slot(where: str, slot) -> str | Token:
    """Read a slot: a text, or {token: "<name>"} for one id, bos and eos among them."""
    if isinstance(slot, dict) and list(slot) == ["token"] and isinstance(slot["token"], str):
        return Token(slot["token"])
    if not isinstance(slot, str):
        raise ValueError(f"{where}: {slot!r} is not a slot. A slot is a text in quotes, or "
                         '{token: eos}, {token: bos} or {token: "<name>"}')
    if "\\n" in slot:
        raise ValueError(f"{where}: holds a backslash and an n, not a new line; in YAML only a "
                         "text in double quotes turns them into one")
    return slot


def check_format(template: Template):
    """Raise ValueError for a format that cannot be rendered."""
    for key in SLOTS:
        check_marks(key, getattr(template, key))
    if template.stop_is_eos and not template.stop:
        raise ValueError("template: stop_is_eos: true needs stop: a list whose first token becomes "
                         "the eos")
    is_one_text = len(template.system) == 1 and isinstance(template.system[0], str)
    if template.system_in_user and not is_one_text:
        raise ValueError("template: system_in_user: true needs a system of one text, since it "
                         "opens the user's text")
    if len(template.thought) != 2:
        raise ValueError(f"template: thought: {template.thought} is not two texts, one that opens "
                         "a thought and one that closes it")


def check_marks(key: str, slots: tuple | None):
    """Raise ValueError unless {{content}} occurs once in these slots; in a prefix, never."""
    if slots is None:
        return
    text = "".join(slot for slot in slots if isinstance(slot, str))
    marks = re.findall(r"\{\{(.*?)\}\}", text)
    wanted = [] if key == "prefix" else ["content"]
    advice = "nothing is put into the prefix" if key == "prefix" else "Write {{content}}"
    for mark in marks:
        if mark not in (*wanted, "idx"):
            raise ValueError(f"template: {key}: unknown mark {{{{{mark}}}}}. {advice}")
    if [mark for mark in marks if mark != "idx"] != wanted:
        raise ValueError(f"template: {key}: {{{{content}}}} must occur once, found {len(marks)} "
                         "times")


# ---- the format that something was trained with -------------------------------------------------


def stored_template(folders: list, value: str | dict | None,
                    force: bool) -> tuple[str | dict | None, bool]:
    """Find the format of what was trained: the one in the config, else the stored one.

    folders: of adapters or models; their train_config.json holds the `template` of the training.
    value: the config's `template`, a name, a mapping or None. Returns (value, force): None where no
    format is set or stored; force is also true for a stored format, which the training has checked.
    Raises ValueError if the config sets another format than the stored one, and `force` is off.
    """
    stored = {}
    for folder in folders:
        stored[folder] = read_json(folder / "train_config.json").get("template")
    found = [other for other in stored.values() if other]
    value = value or (found[0] if found else None)
    for folder, other in stored.items():
        if other and not force and not is_same_format(other, value):
            trained_with = name_of(other)
            if trained_with == name_of(value):
                trained_with = f"another version of {trained_with}"
            raise ValueError(f"template: {name_of(value)}, but {folder} was trained with "
                             f"{trained_with}. Leave template out, or set force_template: true")
    return value, force or any(is_same_format(other, value) for other in found)


def is_same_format(one: str | dict, other: str | dict) -> bool:
    """Whether two values of `template` mean the same format."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one == other or find_template(one) == find_template(other)
    return one == other


def name_of(value: str | dict) -> str:
    """The name of a format as a config gives it, for messages."""
    return value.get("name", "custom") if isinstance(value, dict) else value
