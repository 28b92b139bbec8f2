"""Chat with a model and its adapter, using their training yaml.

    python chat.py --config configs/tiny_lora_sft.yaml      `clear` starts afresh, `exit` ends it
    python chat.py my.yaml --prompt "Who are you?"          one answer, alone on standard output
    python chat.py my.yaml --raw                            shows every prompt as ids and text
    python chat.py my.yaml < questions.txt                  every line is a turn
    python chat.py my.yaml --input prompts.jsonl --output answers.jsonl

config → weights → chat template → sampling → model → turns. The chat template is the one stored
with the adapter. From turn to turn the KV cache keeps the unchanged beginning of the conversation.

Requires: templates.py (encode_prompt), generate.py (the loop over tokens), fast/decode.py.
Next: merge.py.

The prompts, the two commands and the sampling defaults are those of `llamafactory-cli chat`.
"""
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from errors import run_script, say
from settings.config import Config
from settings.load_config import ignored_keys, load_config

if __name__ == "__main__":
    run_script(lambda argv: load_config(argv, "chat"))   # --help and mistakes do not wait for torch
try:
    import readline  # noqa: F401  arrow keys and history in input(); Windows has no such module
except ImportError:
    pass

from runtime.device import pick_device
import torch

from checkpoint.adapters import load_with_adapters
from checkpoint.load import formats_in_words, quantized_weights
from checkpoint.read_config import read_config_json, read_model_config
from data import settings_of
from evals.answer_file import answer_file
from evals.predictions import Side
from fast.attention_picker import pick_kernel
from fast.decode import pick_step, prepare
from generate import Sampling, common_prefix, context_length, generate, next_scores
from model import CausalLM, KVCache, attention_needs
from runtime.finished import (explained_out_of_memory, find_weights, other_bases, pick_dtype,
                              sampling_values, with_trained_settings)
from runtime.memory_advice import available_bytes
from runtime.precision import requested_format
from templates import Settings, Template, encode_prompt
from text.load_text import eos_ids_of, load_text
from text.plain_text import check_utf8, why_not_utf8
from text.read_calls import marking_tokens
from text.tokenizer import TextStream, Tokenizer, read_json

ENDINGS = {         # reason why an answer ended -> remark
    "stop": "",
    "interrupted": "(stopped)",
    "max_new_tokens": "(truncated after {new} tokens: max_new_tokens)",
    "max_length": "(truncated after {new} tokens: max_length)",
    "context": "(the context of {cached:,} tokens is full)",
}


@dataclass
class Chat:
    """What is needed to answer a turn, and the state kept from turn to turn."""
    config: Config
    model: CausalLM
    tokenizer: Tokenizer
    template: Template
    settings: Settings
    stop_ids: set[int]
    sampling: Sampling
    max_new_tokens: int
    generator: torch.Generator
    cache: KVCache
    step: Callable                  # next_scores, or its fast twin from fast/decode.py
    cached_ids: list[int] = field(default_factory=list)     # last prompt and answer


def main(argv):
    config = load_config(argv, "chat")
    if "prompt" in config.given and not (config.prompt or "").strip():
        raise ValueError("--prompt is empty; give it a text, or leave it out to chat")
    check_utf8(config.prompt or "", f"{config.source}: prompt")
    if ignored := ignored_keys(config):
        say(f"accepted, no effect here: {', '.join(ignored)}")

    # ---- weights: base and adapters
    base, adapters, remarks = find_weights(config)
    on_base, on_adapters = (f" ({remark})" if remark else "" for remark in remarks)
    model_config = read_model_config(base)
    device = pick_device(config.use_cpu)
    dtype = pick_dtype(config, read_config_json(base), device)
    say(f"model     {base}{on_base}")
    for note in model_config.notes:
        say(f"          note: {note}")
    say(f"adapter   {' + '.join(map(str, adapters)) or 'none'}{on_adapters}")
    for warning in other_bases(config, adapters):
        say(f"warning   {warning}")

    # ---- chat template
    trained = adapters or [base]
    config = with_trained_settings(config, trained[-1])
    text = load_text(config, base, trained, model_config, overrides=True)
    say(f"template  {text.template.name} ({text.origin})")

    # ---- sampling
    sampling, max_new_tokens = pick_sampling(config, base)

    # ---- model
    with explained_out_of_memory(device):
        model = load_model_to_chat(config, base, adapters, dtype, device)
    cache, step = pick_kernels(config, model, device)
    stop_ids = text.stop_ids | eos_ids_of(base)
    if config.input:
        config = replace(config, max_new_tokens=max_new_tokens)
        return answer_file(config, Side("answers", base, adapters), model, text, stop_ids, sampling)

    # ---- turns
    generator = torch.Generator(device).manual_seed(config.seed)
    chat = Chat(config=config, model=model, tokenizer=text.tokenizer, template=text.template,
                settings=settings_of(config), stop_ids=stop_ids, sampling=sampling,
                max_new_tokens=max_new_tokens, generator=generator, cache=cache, step=step)
    if config.prompt:
        _, ending = answer(chat, [{"role": "user", "content": config.prompt}])
        if ending == "interrupted":
            raise KeyboardInterrupt
    elif talk(chat) and not sys.stdin.isatty():
        raise ValueError("not every line could be answered; see above")


# ---- the conversation -------------------------------------------------------------------------


def talk(chat: Chat) -> int:
    """Read turns until `exit` or the end of the input. Returns the number of failed turns."""
    say("`clear` starts afresh, `exit` or Ctrl-D ends the chat, Ctrl-C stops an answer")
    if hasattr(sys.stdin, "reconfigure"):   # bytes that are not text spoil their line, not the rest
        sys.stdin.reconfigure(errors="surrogateescape")
    messages = []
    failed = 0
    while (line := read_line()) is not None and line.strip() != "exit":
        if line.strip() == "clear":
            messages = []
            say("(cleared)")
        if line.strip() in ("", "clear"):
            continue
        if reason := why_not_utf8(line, from_bytes=True):
            say(f"error: this line is left out: {reason}")
            failed += 1
            continue

        messages.append({"role": "user", "content": line})
        print("Assistant: ", end="", flush=True)
        text = ""
        try:
            text, _ = answer(chat, messages)
        except ValueError as error:                     # the next turn may work
            print()
            say(f"error: {error}. `clear` starts afresh")
            failed += 1
        if text:
            messages.append({"role": "assistant", "content": text})
        else:                                           # turns alternate: drop the question, too
            messages.pop()
    return failed


def read_line() -> str | None:
    """Read one line of the user; None at the end of the input. Piped lines are echoed.

    A byte order mark at the beginning of a piped file is no part of its text.
    """
    while True:
        try:
            line = input("User: ").removeprefix("\ufeff")
            if not sys.stdin.isatty():
                print(line)
            return line
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            print("\n(`exit` or Ctrl-D ends)")
        except UnicodeDecodeError:
            raise ValueError("standard input is not UTF-8 text") from None


def answer(chat: Chat, messages: list[dict]) -> tuple[str, str]:
    """Print the answer to the last message as it is generated.

    Returns (its text, why it ended: a key of ENDINGS). Raises ValueError when the model cannot read
    the prompt (see generate), or the GPU's memory is full.
    """
    prompt = start_prompt(chat, messages)
    skip = chat.config.skip_special_tokens
    # the marks of a thought stay, so that the next prompt can leave the thought out
    keep = marking_tokens(chat.template, chat.tokenizer, tools=False)
    stream = TextStream(chat.tokenizer, skip, keep)
    new = []
    ending = "max_new_tokens" if chat.max_new_tokens else "max_length"
    limit = chat.max_new_tokens or max(0, chat.config.max_length - len(prompt))
    try:
        with explained_out_of_memory(chat.model.lm_head.weight.device):
            tokens = generate(chat.model, prompt, chat.cache, chat.stop_ids, chat.sampling,
                              max_new_tokens=limit, generator=chat.generator, step=chat.step)
            for token in tokens:
                chat.cached_ids.append(token)
                if token in chat.stop_ids:
                    ending = "stop"
                else:
                    new.append(token)
                if ending != "stop" or not skip:
                    print(stream.push(token), end="", flush=True)
    except KeyboardInterrupt:
        ending = "interrupted"
    print(stream.flush(), flush=True)

    context = context_length(chat.model.config)
    if ending.startswith("max_") and len(chat.cached_ids) >= context:
        ending = "context"
    if ENDINGS[ending]:
        say(ENDINGS[ending].format(new=len(new), cached=len(chat.cached_ids)))
    return stream.decode(new), ending


def start_prompt(chat: Chat, messages: list[dict]) -> list[int]:
    """Ids of the conversation up to the answer; the cache keeps their common prefix."""
    empty_answer = {"role": "assistant", "content": ""}
    prompt, _ = encode_prompt(chat.template, chat.tokenizer, [*messages, empty_answer],
                              settings=chat.settings)
    chat.cache.crop(common_prefix(chat.cached_ids, prompt))
    chat.cached_ids = list(prompt)
    if chat.config.raw:
        say(f"\nprompt    {len(prompt)} tokens, {chat.cache.length} of them in the cache")
        say(f"ids       {prompt}")
        say(f"text      {chat.tokenizer.decode(prompt)!r}")
    return prompt


# ---- sampling ---------------------------------------------------------------------------------


def pick_sampling(config: Config, base: Path) -> tuple[Sampling, int]:
    """(how to draw tokens, max_new_tokens)."""
    generation = read_json(base / "generation_config.json")
    values, description = sampling_values(config, generation, base)
    max_new_tokens = values.pop("max_new_tokens")
    sampling = Sampling(**values)
    greedy = "greedy; " if sampling.greedy else ""
    say(f"sampling  {greedy}{description}; seed {config.seed}")
    return sampling, max_new_tokens


# ---- model ------------------------------------------------------------------------------------


def load_model_to_chat(config: Config, base: Path, adapters: list[Path],
                       dtype: torch.dtype | None, device: torch.device) -> CausalLM:
    """Load base and adapters; with fast_chat, merge and fuse matrices for decoding."""
    quant_format = requested_format(config)
    model = load_with_adapters(base, adapters, dtype, device, config.fast_chat, quant_format)
    if packed := quantized_weights(model):
        formats = [weight.quant_format for weight in packed.values()]
        line = f"weights   {formats_in_words(formats)}"
        if adapters:
            line += "; the adapter is kept apart: merged weights would take 16 bits"
        if len(adapters) > 1:
            line += ". Adapters before the last one are merged: the layers they adapt take 16 bits"
        say(line)
    if config.fast_chat:
        say("\n".join(prepare(model, available_bytes(device))))
    return model


def pick_kernels(config: Config, model: CausalLM,
                 device: torch.device) -> tuple[KVCache, Callable]:
    """Choose the attention kernel and the decoding step; returns (cache, step)."""
    dtype = model.model.embed_tokens.weight.dtype
    choice = pick_kernel(config.flash_attn, device=device, dtype=dtype, training=False,
                         **attention_needs(model.config))
    model.kernel = choice.kernel
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    say(f"device    {name}")
    say(f"dtype     {str(dtype).removeprefix('torch.')}")
    say("\n".join([*choice.lines[:-1], f"kernel    {choice.kernel}"]))
    if not config.fast_chat:
        return KVCache(model.config.num_hidden_layers), next_scores
    cache, step, line = pick_step(model, compiled=config.torch_compile)
    say(line)
    return cache, step


if __name__ == "__main__":
    run_script(main)
