"""Load a tokenizer and the chat template that fits it, ready to encode and decode conversations.

    tokenizer, template, stop_ids, origin, notes = load_text(config, base, adapters, model_config)

The template is the one the config names, else the one stored with what was trained, else the one
the checkpoint is recognized by. The tokenizer is then changed to end answers as the template does.

Requires: text/tokenizer.py, text/template_check.py, text/fit_tokenizer.py.
Next: text/token_cache.py.
"""
from pathlib import Path
from typing import NamedTuple

from templates import Template
from text.fit_tokenizer import fit_tokenizer
from text.template_check import check_template, choose_template
from text.tokenizer import Tokenizer, load_tokenizer, read_json
from text.written_formats import stored_template, with_overrides


class Text(NamedTuple):
    """A tokenizer with its chat template."""
    tokenizer: Tokenizer
    template: Template
    stop_ids: set[int]      # ids that end an answer
    origin: str             # where the template comes from
    notes: list[str]        # differences between the template and the checkpoint's own


def load_text(config, folder: Path, stored: list[Path], model_config,
              overrides: bool = False, check: bool = False) -> Text:
    """Load the tokenizer of `folder` and fit it to its chat template.

    stored: folders of what was trained; their train_config.json may name a template. overrides:
    apply tool_format and default_system of the config to the template. check: compare the template
    with the checkpoint's own one (not for running text, stage pt). Raises ValueError for a template
    that does not fit.
    """
    tokenizer = load_tokenizer(folder, config.split_special_tokens)
    name, force = stored_template(stored, config.template, config.force_template)
    changes = (config.tool_format, config.default_system) if overrides else ()
    text = fit_text(tokenizer, name, force, model_config.model_type, model_config.vocab_size,
                    changes, check and config.stage != "pt")
    if name and name != config.template:
        text = text._replace(origin=f"stored in {stored[-1]}")
    return text


def fit_text(tokenizer: Tokenizer, name: str | dict | None, force: bool = False,
             model_type: str | None = None, embedding_rows: int | None = None,
             overrides: tuple = (), check: bool = False) -> Text:
    """Choose the template and change the tokenizer to end answers as it does.

    name: of a template, a mapping, or None to recognize the checkpoint. force: take a template that
    does not fit. embedding_rows: number of ids the model knows. overrides: (tool_format,
    default_system) for the template, see with_overrides.
    """
    template, reason = choose_template(name, tokenizer, model_type, force)
    notes = check_template(template, tokenizer) if check else []    # before the tokenizer changes
    template = with_overrides(template, *overrides)
    stop_ids = set(fit_tokenizer(template, tokenizer, embedding_rows))
    return Text(tokenizer, template, stop_ids, reason, notes)


def eos_ids_of(folder: Path) -> set[int]:
    """Ids that a checkpoint names as ends of an answer.

    As in transformers: those of generation_config.json or, where there is no such file, those of
    config.json. Raises ValueError for what is no token id.
    """
    path = folder / "generation_config.json"
    if path.is_file():
        ends = read_json(path).get("eos_token_id")
    else:
        path = folder / "config.json"
        fields = read_json(path)
        text_fields = fields.get("text_config")
        ends = fields.get("eos_token_id")
        if ends is None and isinstance(text_fields, dict):
            ends = text_fields.get("eos_token_id")
    found = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(end) is int for end in found):
        raise ValueError(f"{path}: eos_token_id: {ends!r:.60} is not a token id, nor a list of "
                         "them. Correct it, or take the field out")
    return set(found)
