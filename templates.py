"""Chat formats: how a conversation becomes token ids, and which of them the model learns to produce.

    python templates.py                                    lists the formats
    python templates.py llama3                             shows an example conversation, marking what carries loss
    python templates.py llama3 --tokenizer path/to/model   the same as that tokenizer cuts it, with ids counted

A format is one row of TEMPLATES, pure data. To add one, add a row:

    "mychat": Template(
        user=("<user>{{content}}</user><bot>",),      # the user's turn, up to where the answer begins
        assistant=("{{content}}", EOS),               # the answer: all of this is learned
        system=("<sys>{{content}}</sys>",),
        prefix=(BOS,),                                # once, before everything
    ),

A turn is a tuple of slots: a text, in which {{content}} stands for what was said, or BOS, EOS, Token("<name>") for one
id. Each text is tokenised on its own, so no token ever reaches across the border of two slots. The example above
therefore never merges the answer with what follows it.

A conversation is a list of {"role": ..., "content": ...}: "user" or "observation" (what a tool returned), answered in
turn by "assistant" or "function" (the assistant calls a tool; the content is JSON).

Read before: tokenizer.py. Read next: data.py, which reads rows, truncates what is rendered here, and makes labels.
Sources: the vendors' chat templates in their published tokenizer_config.json; names of the formats as LLaMA-Factory
spells them, and recorded ids of it as the judge of the slots' borders.
"""
import argparse
import difflib
import re
import sys
from dataclasses import dataclass, replace

from tokenizer import load_tokenizer, read_json
from tools import TOOL_FORMATS, read_tools, render_call


@dataclass(frozen=True)
class Token:
    """A slot that is one id: the token of this name."""

    name: str

    def __str__(self):
        return f"[{self.name}]"


BOS, EOS = Token("bos"), Token("eos")  # whichever tokens the tokenizer names for these roles


@dataclass(frozen=True)
class Template:
    """One chat format. All but `user` may be left out."""

    user: tuple
    assistant: tuple = ("{{content}}", EOS)
    system: tuple = ("{{content}}",)
    observation: tuple | None = None  # what a tool returned; None: as `user`
    function: tuple | None = None  # a tool call; None: as `assistant`
    prefix: tuple = ()
    default_system: str = ""  # where a conversation brings no system text
    tool_format: str = "default"  # a row of TOOL_FORMATS: how tools are described and called
    stop: tuple = ()  # tokens that end an answer, besides the tokenizer's eos
    stop_is_eos: bool = False  # stop[0] becomes the tokenizer's eos
    system_in_user: bool = False  # no system turn: the system text opens the first user's text
    efficient_eos: bool = False  # answers carry no eos: it is learned at the next turn's first token (data.py does it)
    thought: tuple = ("<think>\n", "\n</think>\n\n")  # what opens and closes a thought
    reasoning: bool = False  # every answer begins with a thought, if only an empty one
    own_jinja: bool = False  # replace the checkpoint's chat template: it describes another format
    # What choose_template goes by:
    families: tuple = ()  # model_type in config.json of the models that speak it; () = any model can learn it
    needs: tuple = ()  # special tokens it cannot do without
    says: tuple = ()  # texts that give it away in a checkpoint's own chat template
    name: str = ""  # its key in TEMPLATES


CHATML = Template(
    user=("<|im_start|>user\n{{content}}<|im_end|>\n<|im_start|>assistant\n",),
    assistant=("{{content}}<|im_end|>\n",),
    system=("<|im_start|>system\n{{content}}<|im_end|>\n",),
    stop=("<|im_end|>",), needs=("<|im_start|>", "<|im_end|>"), says=("<|im_start|>",))

QWEN3 = replace(
    CHATML,
    observation=("<|im_start|>user\n<tool_response>\n{{content}}\n</tool_response><|im_end|>\n"
                 "<|im_start|>assistant\n",),
    tool_format="qwen", stop_is_eos=True, families=("qwen3", "qwen3_moe"))

MISTRAL = Template(
    user=("[INST] {{content}}[/INST]",),
    assistant=(" {{content}}", EOS),
    system=("{{content}}\n\n",), system_in_user=True,
    function=("[TOOL_CALLS] {{content}}", EOS),
    observation=('[TOOL_RESULTS] {"content": {{content}}}[/TOOL_RESULTS]',),
    prefix=(BOS,), tool_format="mistral",
    families=("mistral", "mixtral"), needs=("<s>", "</s>"), says=("[INST] ",))

# The order matters once: where the config names no template, the first row that fits the checkpoint is taken.
TEMPLATES = {
    "deepseekr1": Template(
        user=("<｜User｜>{{content}}<｜Assistant｜>",),
        prefix=(BOS,), reasoning=True,
        families=("deepseek_v3", "qwen2", "qwen3", "llama"),
        needs=("<｜User｜>", "<｜Assistant｜>"), says=("<｜User｜>", "</think>")),
    "llama3": Template(
        user=("<|start_header_id|>user<|end_header_id|>\n\n{{content}}<|eot_id|>"
              "<|start_header_id|>assistant<|end_header_id|>\n\n",),
        assistant=("{{content}}<|eot_id|>",),
        system=("<|start_header_id|>system<|end_header_id|>\n\n{{content}}<|eot_id|>",),
        observation=("<|start_header_id|>ipython<|end_header_id|>\n\n{{content}}<|eot_id|>"
                     "<|start_header_id|>assistant<|end_header_id|>\n\n",),
        prefix=(BOS,), tool_format="llama3", stop=("<|eot_id|>", "<|eom_id|>"), stop_is_eos=True,
        families=("llama",),
        needs=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), says=("<|start_header_id|>",)),
    "llama4": Template(
        user=("<|header_start|>user<|header_end|>\n\n{{content}}<|eot|><|header_start|>assistant<|header_end|>\n\n",),
        assistant=("{{content}}<|eot|>",),
        system=("<|header_start|>system<|header_end|>\n\n{{content}}<|eot|>",),
        observation=("<|header_start|>ipython<|header_end|>\n\n{{content}}<|eot|>"
                     "<|header_start|>assistant<|header_end|>\n\n",),
        prefix=(BOS,), tool_format="llama3", stop=("<|eot|>", "<|eom|>"), stop_is_eos=True,
        families=("llama4", "llama4_text"),
        needs=("<|header_start|>", "<|header_end|>", "<|eot|>"), says=("<|header_start|>",)),
    "qwen3": replace(QWEN3, reasoning=True, says=("<|im_start|>", "</think>")),
    "qwen3_nothink": QWEN3,
    "qwen": replace(
        QWEN3,
        default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
        families=("qwen2", "qwen2_moe", "qwen3", "qwen3_moe")),
    "mistral": MISTRAL,  # 7B v0.1 to v0.3, Mixtral
    "mistral_small": replace(
        MISTRAL,
        user=("[INST]{{content}}[/INST]",),
        assistant=("{{content}}", EOS),
        system=("[SYSTEM_PROMPT]{{content}}[/SYSTEM_PROMPT]",), system_in_user=False,
        function=("[TOOL_CALLS]{{content}}", EOS),
        observation=('[TOOL_RESULTS]{"content": {{content}}}[/TOOL_RESULTS]',),
        says=("[SYSTEM_PROMPT]",)),
    "ministral": replace(  # Ministral 8B, Nemo
        MISTRAL,
        user=("[INST]{{content}}[/INST]",),
        assistant=("{{content}}", EOS),
        function=("[TOOL_CALLS]{{content}}", EOS),
        observation=('[TOOL_RESULTS]{"content": {{content}}}[/TOOL_RESULTS]',),
        says=("[INST]",)),
    "llama2": Template(
        user=(BOS, "[INST] {{content}} [/INST]"),
        system=("<<SYS>>\n{{content}}\n<</SYS>>\n\n",), system_in_user=True,
        families=("llama",), needs=("<s>", "</s>"), says=("[INST]", "<<SYS>>")),
    "phi4": Template(
        user=("<|im_start|>user<|im_sep|>{{content}}<|im_end|><|im_start|>assistant<|im_sep|>",),
        assistant=("{{content}}<|im_end|>",),
        system=("<|im_start|>system<|im_sep|>{{content}}<|im_end|>",),
        stop=("<|im_end|>",), stop_is_eos=True,
        families=("phi3",), needs=("<|im_start|>", "<|im_sep|>", "<|im_end|>"), says=("<|im_sep|>",)),
    "gemma": Template(
        user=("<start_of_turn>user\n{{content}}<end_of_turn>\n<start_of_turn>model\n",),
        assistant=("{{content}}<end_of_turn>\n",),
        system=("{{content}}\n\n",), system_in_user=True,
        observation=("<start_of_turn>tool\n{{content}}<end_of_turn>\n<start_of_turn>model\n",),
        prefix=(BOS,), stop=("<end_of_turn>",), stop_is_eos=True,
        families=("gemma",), needs=("<start_of_turn>", "<end_of_turn>"), says=("<start_of_turn>",)),
    "glm4": Template(
        user=("<|user|>\n{{content}}<|assistant|>",),
        assistant=("\n{{content}}",), function=("{{content}}",), efficient_eos=True,
        system=("<|system|>\n{{content}}",),
        observation=("<|observation|>\n{{content}}<|assistant|>",),
        prefix=("[gMASK]<sop>",), tool_format="glm4", stop=("<|user|>", "<|observation|>"),
        families=("glm", "glm4", "chatglm"),
        needs=("[gMASK]", "<sop>", "<|user|>", "<|assistant|>"), says=("[gMASK]", "<sop>")),
    "chatglm3": Template(
        user=(Token("<|user|>"), "\n", "{{content}}", Token("<|assistant|>")),
        assistant=("\n", "{{content}}"), function=("{{content}}",), efficient_eos=True,
        system=(Token("<|system|>"), "\n", "{{content}}"),
        observation=(Token("<|observation|>"), "\n", "{{content}}", Token("<|assistant|>")),
        prefix=(Token("[gMASK]"), Token("sop")), tool_format="glm4", stop=("<|user|>", "<|observation|>"),
        families=("chatglm",), needs=("[gMASK]", "sop", "<|user|>", "<|assistant|>"), says=("[gMASK]", "sop")),
    "baichuan2": Template(
        user=("<reserved_106>{{content}}<reserved_107>",),
        assistant=("{{content}}",), efficient_eos=True,
        families=("baichuan",), needs=("<reserved_106>", "<reserved_107>"), says=("<reserved_106>",)),
    "baichuan": Template(
        user=(Token("<reserved_102>"), "{{content}}", Token("<reserved_103>")),
        assistant=("{{content}}",), efficient_eos=True,
        families=("baichuan",), needs=("<reserved_102>", "<reserved_103>"), says=("<reserved_102>",)),
    "xverse": Template(
        user=("Human: {{content}}\n\nAssistant: ",),
        families=("xverse",), says=("Human: ", "Assistant: ")),
    "deepseek": Template(
        user=("User: {{content}}\n\nAssistant:",),
        system=("{{content}}\n\n",),
        prefix=(BOS,),
        families=("llama", "deepseek_v2"), needs=("<｜begin▁of▁sentence｜>",), says=("User: ", "Assistant:")),
    "yi": replace(CHATML, families=("llama",), needs=("<|startoftext|>", "<|im_start|>", "<|im_end|>")),
    # Formats that any model can be taught:
    "chatml": replace(
        CHATML,
        observation=("<|im_start|>tool\n{{content}}<|im_end|>\n<|im_start|>assistant\n",),
        stop=("<|im_end|>", "<|im_start|>"), stop_is_eos=True, own_jinja=True),
    "vicuna": Template(
        user=("USER: {{content}} ASSISTANT:",),
        default_system="A chat between a curious user and an artificial intelligence assistant. "
                       "The assistant gives helpful, detailed, and polite answers to the user's questions.",
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
    "empty": Template(user=("{{content}}",), assistant=("{{content}}",)),
}
TEMPLATES = {name: replace(row, name=name) for name, row in TEMPLATES.items()}


# ------------------------------------------------------------------------------------------------- a conversation


@dataclass(frozen=True)
class Settings:
    """The keys of the config that change how a conversation is rendered, under their names there."""

    enable_thinking: bool | None = True  # formats with `reasoning` only: see settle_thought
    preserve_thinking: bool = False
    mask_history: bool = False
    tool_format: str | None = None  # in place of the template's
    default_system: str | None = None  # in place of the template's


def encode_turns(template, tokenizer, messages, system=None, tools=None, settings=Settings()):
    """A whole conversation as ids.

    messages: user|observation and assistant|function alternating, an even number of them.
    system:   the system text or None. tools: JSON text (or its list) describing tools, or None.
    -> one (source_ids, target_ids) for each pair of messages; the target is what the model learns to write.
    Raises ValueError for a tool call or a tool description that cannot be read.
    """
    turns = render_turns(template, tokenizer, messages, system, tools, settings)
    ids = encode_pieces(tokenizer, [pieces for turn in turns for pieces in turn])
    return list(zip(ids[0::2], ids[1::2]))


def encode_prompt(template, tokenizer, messages, system=None, tools=None, settings=Settings()):
    """A conversation of which only the last message is an answer to be given ("" in chat), the rest is prompt.

    -> (prompt_ids, answer_ids). The same pieces as encode_turns, but thoughts of earlier answers are left out.
    """
    turns = render_turns(template, tokenizer, messages, system, tools, settings, only_last=True)
    prompt = [piece for source, target in turns for piece in source + target]
    answer = turns[-1][1]
    prompt_ids, answer_ids = encode_pieces(tokenizer, [prompt[:len(prompt) - len(answer)], answer])
    return prompt_ids, answer_ids


def encode_pieces(tokenizer, piece_lists):
    """Tokenise many lists of pieces in one batch, on all cores. -> one list of ids per list of pieces.

    For a whole dataset, gather the pieces of thousands of turns (render_turns) and call this once: texts that come
    again and again (the system text, the borders of turns) are then tokenised once.
    """
    texts = list({piece: None for pieces in piece_lists for piece in pieces if isinstance(piece, str)})
    ids = dict(zip(texts, tokenizer.encode_batch(texts)))
    return [[i for piece in pieces for i in (ids[piece] if isinstance(piece, str) else (piece,))]
            for pieces in piece_lists]


def render_turns(template, tokenizer, messages, system=None, tools=None, settings=Settings(), only_last=False):
    """A conversation as pieces, before tokenisation: a piece is a str, to be tokenised on its own, or an int, an id.

    -> one (source_pieces, target_pieces) for each pair of messages. only_last: just the last answer counts.
    """
    assert len(messages) % 2 == 0 and messages, f"{len(messages)} messages: turns and answers must alternate"
    template = with_overrides(template, settings)
    opening, system_text = render_opening(template, tokenizer, system, tools)
    if system_text and messages[0]["role"] != "user":
        raise ValueError("this format puts the system text into the first user's text, but the conversation begins "
                         f"with {messages[0]['role']!r}. Leave the system text out, or begin with a user")
    turns = []
    for i in range(0, len(messages), 2):
        said, answer = messages[i:i + 2]
        text = (system_text if i == 0 else "") + said["content"]
        # {{idx}} in a user slot is the turn's number, and so it is where a user has typed it: as LLaMA-Factory has it.
        number = str(i // 2) if said["role"] == "user" and not template.system_in_user else None
        source = (opening if i == 0 else []) + fill(turn_slots(template, said["role"]), tokenizer, text, number)

        text, thought = settle_thought(template, answer["content"], i + 2 == len(messages), only_last, settings)
        if answer["role"] == "function":
            text = render_call(template, text)
        target = fill(turn_slots(template, answer["role"]), tokenizer, text)
        if thought and settings.enable_thinking:
            target = [thought] + target
        elif thought:
            source = source + [thought]
        turns.append((source, target))
    return turns


def with_overrides(template, settings):
    """The template with the config's tool_format and default_system in place of its own."""
    if settings.tool_format and settings.tool_format not in TOOL_FORMATS:
        raise ValueError(unknown("tool_format", settings.tool_format, TOOL_FORMATS))
    if settings.tool_format:  # a foreign call ends in the tokenizer's eos, as LLaMA-Factory has it
        function = ("{{content}}",) if template.efficient_eos else ("{{content}}", EOS)
        template = replace(template, tool_format=settings.tool_format, function=function)
    if settings.default_system is not None:
        template = replace(template, default_system=settings.default_system)
    return template


def render_opening(template, tokenizer, system, tools):
    """What stands before the first turn. -> (pieces, text that the first user's text begins with)."""
    opening = fill(template.prefix, tokenizer, "")
    system = system or template.default_system
    if not system and not tools:
        return opening, ""
    if tools:
        listed = read_tools(tools)
        system += TOOL_FORMATS[template.tool_format].describe(listed) if listed else ""
    if template.system_in_user:
        return opening, template.system[0].replace("{{content}}", system, 1)
    return opening + fill(template.system, tokenizer, system), ""


def turn_slots(template, role):
    """The slots for a message of this role."""
    slots = {
        "user": template.user,
        "observation": template.observation or template.user,
        "assistant": template.assistant,
        "function": template.function or template.assistant,
    }
    if role not in slots:
        raise ValueError(unknown("role", role, slots))
    return slots[role]


def fill(slots, tokenizer, content, number=None):
    """Slots with a text put in. -> list of pieces, each a str or an id."""
    pieces = []
    for slot in slots:
        if slot in (BOS, EOS):  # a tokenizer without bos (Qwen's) simply has none
            pieces.append(tokenizer.bos_id if slot == BOS else tokenizer.eos_id)
        elif isinstance(slot, Token):
            pieces.append(require_id(tokenizer, slot.name))
        else:
            for part in tokenizer.marked(slot) if tokenizer.split_special_tokens else [slot]:
                if isinstance(part, str):
                    part = part.replace("{{content}}", content, 1)
                    part = part if number is None else part.replace("{{idx}}", number, 1)
                pieces.append(part)
    return [piece for piece in pieces if piece is not None and piece != ""]


def require_id(tokenizer, token):
    """The id of a token that a format names, or of the unknown token where the tokenizer has one."""
    found = tokenizer.id_of(token)
    found = tokenizer.unk_id if found is None else found
    if found is None:
        raise ValueError(f"the template uses the token {token!r}, which this tokenizer lacks ({tokenizer.name})")
    return found


# ------------------------------------------------------------------------------------------------------- thoughts


def settle_thought(template, text, is_last, only_last, settings):
    """Apply the thinking rules of a reasoning format to one answer. -> (its text, an empty thought to add or "").

    enable_thinking true:  an answer without a thought gets an empty one, and learns to write it.
                    null:  the same, but the empty thought belongs to the prompt.
                    false: thoughts are taken out of all answers first.
    Thoughts of earlier answers are taken out, as the vendors do in chat, where only the last answer counts
    (only_last, mask_history) and preserve_thinking is off.
    """
    if not template.reasoning:
        return text, ""
    opens, closes = (word.strip() for word in template.thought)
    drop_history = (only_last or settings.mask_history) and not settings.preserve_thinking
    unwanted = settings.enable_thinking is False and (is_last or not only_last)
    if unwanted or drop_history and not is_last:
        thought = re.escape(opens) + ".*?" + re.escape(closes) + "\n*"
        text = re.sub(thought, "", text, flags=re.DOTALL).lstrip("\n")
    lacks_one = opens not in text and closes not in text
    wants_one = is_last or not (only_last or drop_history)
    return text, "".join(template.thought) if lacks_one and wants_one else ""


# ------------------------------------------------------------------- a format and the tokenizer it is used with


def fit_tokenizer(template, tokenizer, settings=Settings(), embedding_rows=None):
    """Make the tokenizer end answers as the template does: eos, pad, chat template. -> ids that end an answer, sorted.

    A stop token the vocabulary lacks is added at its end. embedding_rows: how many ids the model knows, if that is
    to be respected; a stop token beyond it is left out (the model can never write it), an eos beyond it is an error.
    """
    template = with_overrides(template, settings)
    for place, token in enumerate(template.stop):
        fits = embedding_rows is None or tokenizer.id_of(token) is not None or tokenizer.vocab_size < embedding_rows
        if fits:
            tokenizer.add_tokens([token])
        elif place == 0 and template.stop_is_eos:
            raise ValueError(f"this template ends answers with {token!r}, which this tokenizer ({tokenizer.name}) "
                             f"lacks, and the model has no room for it ({embedding_rows} ids). Choose another template")
    if template.stop_is_eos:
        tokenizer.set_token("eos_token", template.stop[0])
    if tokenizer.eos_id is None:
        raise ValueError(f"this tokenizer names no eos_token ({tokenizer.name}), so an answer could never end: "
                         'add "eos_token" to its tokenizer_config.json')
    if tokenizer.pad_id is None:
        tokenizer.set_token("pad_token", tokenizer.eos_token)
    if template.own_jinja or not tokenizer.chat_template:
        tokenizer.chat_template = write_jinja(template, tokenizer)
    stops = {tokenizer.id_of(token) for token in template.stop} - {None}
    return sorted(stops | {tokenizer.eos_id})


def write_jinja(template, tokenizer):
    """The format as a jinja chat template, for the programs that read one from the checkpoint. Text only, no tools."""
    names = {BOS: tokenizer.bos_token or "", EOS: tokenizer.eos_token or ""}

    def quote(text):
        return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"

    def expression(slots, variable):
        text = "".join(names.get(slot, slot.name) if isinstance(slot, Token) else slot for slot in slots)
        return f" + {variable} + ".join(map(quote, text.split("{{content}}")))

    system = expression(template.system, "system")
    roles = {"user": template.user, "tool": template.observation or template.user, "assistant": template.assistant}
    turns = "".join("{% if message['role'] == '" + role + "' %}{{ " + expression(slots, "content") + " }}{% endif %}"
                    for role, slots in roles.items())
    return (
        "{% set system = " + quote(template.default_system) + " %}"
        "{% if messages[0]['role'] == 'system' %}"
        "{% set system = messages[0]['content'] or system %}{% set messages = messages[1:] %}{% endif %}"
        "{{ " + expression(template.prefix, "''") + " }}"
        + ("" if template.system_in_user else "{% if system %}{{ " + system + " }}{% endif %}")
        + "{% for message in messages %}{% set content = message['content'] %}"
        + ("{% if loop.first and system %}{% set content = " + system + " + content %}{% endif %}"
           if template.system_in_user else "")
        + turns + "{% endfor %}")


def choose_template(name, tokenizer, model_type=None, force=False):
    """Check the template the config names, or find one where it names none. -> (Template, why); why: to be announced.

    model_type: as in config.json. force: take a template that does not fit all the same.
    Raises ValueError naming a template that fits when this one does not, or when none can be found.
    """
    if name and name not in TEMPLATES:
        raise ValueError(unknown("template", name, TEMPLATES))
    fitting = [row for row in TEMPLATES.values() if not misfit(row, tokenizer, model_type)]
    own = tokenizer.chat_template
    if own:  # what the checkpoint says of itself goes before what its vocabulary suggests
        fitting = [row for row in fitting if row.says and all(text in own for text in row.says)]
    else:
        fitting = [row for row in fitting if row.families or row.needs]
    who = f"{tokenizer.name}, model_type {model_type}"
    if name:
        wrong = misfit(TEMPLATES[name], tokenizer, model_type)
        if wrong and not force:
            raise ValueError(f"template {name!r} {wrong}. Try template: {fitting[0].name if fitting else 'default'} "
                             "(or force_template: true to use this one all the same)")
        return TEMPLATES[name], f"forced: it {wrong}" if wrong else "as the config says"
    if not fitting:
        raise ValueError(f"no template is set, and this checkpoint ({who}) does not show which one it was made for. "
                         f"Set template: to one of {', '.join(TEMPLATES)}")
    sign = "its chat template has " + " and ".join(map(repr, fitting[0].says)) if own else "by the tokens it has"
    return fitting[0], f"chosen for {who}: {sign}"


def stored_template(folders, asked, force):
    """The format to use with what was trained: the one asked for, else the one training stored beside it. -> (name, force)

    folders: of adapters or models; train_config.json in them says what they were trained with. The name is None when
    nothing is asked for or stored. force: take a stored format without checking that it fits; training has done so.
    Raises ValueError when the one asked for is another than the one stored, and `force` is off.
    """
    stored = {folder: read_json(folder / "train_config.json").get("template") for folder in folders}
    found = [name for name in stored.values() if name]
    name = asked or (found[0] if found else None)
    for folder, other in stored.items():
        if other and other != name and not force:
            raise ValueError(f"template: {name}, but {folder} was trained with {other}. Leave template out, or set "
                             "force_template: true")
    return name, force or name in found


def misfit(template, tokenizer, model_type):
    """Why this template does not suit this tokenizer and model, or "" if it does."""
    lacking = [token for token in template.needs if not tokenizer.knows(token)]
    if lacking:
        return f"uses {lacking[-1]!r}, which this tokenizer lacks ({tokenizer.name})"
    if model_type and template.families and model_type not in template.families:
        return f"is the format of {', '.join(template.families)} models, and this one is {model_type}"
    return ""


def unknown(what, found, known):
    """The message for a name that is not in a table: the nearest one, and all of them."""
    near = difflib.get_close_matches(str(found), known, 1)
    return f"unknown {what} {found!r}{f' (did you mean {near[0]!r}?)' if near else ''}. Known: {', '.join(known)}"


# ------------------------------------------------------------------------------------------------- as a script

EXAMPLE = [
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": "2 + 3 = 5."},
    {"role": "user", "content": "And the weather in Oslo?"},
    {"role": "function", "content": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
    {"role": "observation", "content": '{"celsius": -3}'},
    {"role": "assistant", "content": "It is -3 °C."},
]


class NoTokenizer:
    """Stands in for a tokenizer where only the text of a format is wanted: a token is its own name."""

    bos_id, eos_id, unk_id, split_special_tokens = "<bos>", "<eos>", None, False

    def id_of(self, token):
        return token


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("template", nargs="?", help="a row of the table")
    parser.add_argument("--tokenizer", help="folder of a checkpoint, to see ids too")
    options = parser.parse_args(arguments)
    if options.template is None:
        for name, row in TEMPLATES.items():
            print(f"{name:15s} {', '.join(row.families) or 'any model':35s} {''.join(map(str, row.user))!r}")
        return
    if options.template not in TEMPLATES:
        raise ValueError(unknown("template", options.template, TEMPLATES))
    template, tokenizer = TEMPLATES[options.template], NoTokenizer()
    if options.tokenizer:
        tokenizer = load_tokenizer(options.tokenizer)
        print(f"ends an answer: {fit_tokenizer(template, tokenizer)}")
    for source, target in render_turns(template, tokenizer, EXAMPLE, "You are a helpful assistant."):
        for mark, pieces in (("    ", source), ("LOSS", target)):
            count = f"{len(encode_pieces(tokenizer, [pieces])[0]):4d} tokens " if options.tokenizer else ""
            shown = [tokenizer.decode([p]) if isinstance(p, int) else p for p in pieces]
            print(mark, count, *map(repr, shown))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
