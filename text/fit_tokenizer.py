"""Make a tokenizer end answers as a chat template does, and carry that template.

Requires: templates.py.
Next: text/template_check.py.
"""
from templates import BOS, EOS, Slot, Template, Token
from text.tokenizer import Tokenizer


def fit_tokenizer(template: Template, tokenizer: Tokenizer,
                  embedding_rows: int | None = None) -> list[int]:
    """Set the tokenizer's eos, pad and chat template; return the ids that end an answer, sorted.

    A stop token the vocabulary lacks is added at its end. embedding_rows: number of ids the model
    knows, None for no limit. Beyond it a stop token is left out, since the model cannot write it,
    and an eos raises ValueError.
    """
    add_stop_tokens(template, tokenizer, embedding_rows)
    if template.stop_is_eos:
        tokenizer.set_token("eos_token", template.stop[0])
    if tokenizer.eos_id is None:
        raise ValueError(f"this tokenizer names no eos_token ({tokenizer.name}), so an answer "
                         'could never end: add "eos_token" to its tokenizer_config.json')
    if tokenizer.pad_id is None:
        tokenizer.set_token("pad_token", tokenizer.eos_token)
    if template.own_jinja or not tokenizer.chat_template:
        tokenizer.chat_template = write_jinja(template, tokenizer)
    stops = {tokenizer.id_of(token) for token in template.stop} - {None}
    return sorted(stops | {tokenizer.eos_id})


def add_stop_tokens(template: Template, tokenizer: Tokenizer, embedding_rows: int | None):
    """Add the stop tokens of a template that the model has room for."""
    for token in template.stop:
        exists = tokenizer.id_of(token) is not None
        if exists or embedding_rows is None or tokenizer.vocab_size < embedding_rows:
            tokenizer.add_tokens([token])
        elif template.stop_is_eos and token == template.stop[0]:
            raise ValueError(f"this template ends answers with {token!r}, which this tokenizer "
                             f"({tokenizer.name}) lacks, and the model has no room for it "
                             f"({embedding_rows} ids). Choose another template")


# ---- the template in jinja, for other programs --------------------------------------------------


def write_jinja(template: Template, tokenizer: Tokenizer) -> str:
    """Write a template as a jinja chat template, as other programs read it. Without tools."""
    system = jinja_expression(template.system, tokenizer, "system")
    prefix = jinja_expression(template.prefix, tokenizer, "''")
    lines = [
        f"{{% set system = {jinja_quote(template.default_system)} %}}",
        "{% if messages[0]['role'] == 'system' %}",
        "{% set system = messages[0]['content'] or system %}",
        "{% set messages = messages[1:] %}{% endif %}",
        f"{{{{ {prefix} }}}}",
    ]
    if not template.system_in_user:
        lines.append(f"{{% if system %}}{{{{ {system} }}}}{{% endif %}}")
    lines.append("{% for message in messages %}{% set content = message['content'] %}")
    if template.system_in_user:
        lines.append("{% if loop.first and system %}"
                     f"{{% set content = {system} + content %}}{{% endif %}}")

    roles = {
        "user": template.user,
        "tool": template.observation or template.user,
        "assistant": template.assistant,
    }
    for role, slots in roles.items():
        turn = jinja_expression(slots, tokenizer, "content")
        lines.append(f"{{% if message['role'] == '{role}' %}}{{{{ {turn} }}}}{{% endif %}}")
    return "".join(lines) + "{% endfor %}"


def jinja_expression(slots: tuple[Slot, ...], tokenizer: Tokenizer, variable: str) -> str:
    """Slots as a jinja expression, with a variable for {{content}}."""
    names = {BOS: tokenizer.bos_token or "", EOS: tokenizer.eos_token or ""}
    texts = [names.get(slot, slot.name) if isinstance(slot, Token) else slot for slot in slots]
    around = "".join(texts).split("{{content}}")
    return f" + {variable} + ".join(jinja_quote(text) for text in around)


def jinja_quote(text: str) -> str:
    """A text as a jinja string."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"
