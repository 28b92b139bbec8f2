"""Talk to a model and its adapter, with the yaml that trained it. One conversation, top to bottom.

    python chat.py --config configs/tiny_lora_sft.yaml              `clear` forgets the conversation, `exit` ends it
    python chat.py my.yaml --prompt "Who are you?"                  one answer, alone on standard output
    python chat.py my.yaml --raw                                    shows every rendered prompt as ids and text
    python chat.py my.yaml < questions.txt                          every line is a turn

config → which weights → chat format → sampling → model → turns. The chat format is the one stored with the adapter;
what was computed for the unchanged beginning of a conversation is kept from turn to turn.

Read before: templates.py (encode_prompt), generate.py (the loop over tokens), decode.py (what makes it fast).
Read after: merge.py.
Source: the prompts, the two commands and the sampling defaults are those of `llamafactory-cli chat`.
"""
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from config import Config, ignored_keys, load_config, run

if __name__ == "__main__":
    run(lambda argv: load_config(argv, "chat"))                 # --help and mistakes do not wait for torch

from attention import pick_device, pick_kernel                  # before torch: see guard_amdsmi there
import torch

from checkpoint import (DTYPES, checkpoints_in, find_checkpoint, folded_under, load_with_adapters, read_adapter_config,
                        warn_of_folded)
from decode import pick_step, prepare
from families import model_config, read_config_json
from generate import Sampling, common_prefix, context_length, generate, next_scores
from model import CausalLM, KVCache, attention_needs
from room import available_bytes
from templates import Settings, Template, choose_template, encode_prompt, fit_tokenizer, stored_template
from tokenizer import TextStream, Tokenizer, load_tokenizer, read_json

try:
    import readline  # noqa: F401  arrow keys and history in input(); Windows has no such module
except ImportError:
    pass

ENDINGS = {         # how an answer ends: what is said about it
    "stop": "",
    "interrupted": "(stopped)",
    "max_new_tokens": "(cut off after {said} tokens: max_new_tokens)",
    "max_length": "(cut off after {said} tokens: max_length)",
    "context": "(the context of {held:,} tokens is full)",
}
SAMPLED = ("do_sample", "temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens")


@dataclass
class Chat:
    """What answering a turn needs, and what is kept from turn to turn."""
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
    step: Callable                                      # reads a token: next_scores, or what decode.py has for it
    held: list[int] = field(default_factory=list)       # ids of the last prompt and answer; the cache begins so


def say(*words):
    """Everything but the conversation goes to standard error, so that answers can be piped on."""
    print(*words, file=sys.stderr, flush=True)


def main(argv):
    config = load_config(argv, "chat")
    if "prompt" in config.given and not (config.prompt or "").strip():
        raise ValueError("--prompt is empty; write what to answer, or leave it out to talk")
    if ignored := ignored_keys(config):
        say(f"accepted, no effect here: {', '.join(ignored)}")

    # ---- which weights, where
    base, adapters, remarks = find_weights(config)
    raw = read_config_json(base)
    shape = model_config(raw, f"{base}/config.json")
    device = pick_device(config.use_cpu)
    dtype = pick_dtype(config, raw, device)
    say(f"model     {base}{remarks[0]}")
    for note in shape.notes:
        say(f"          note: {note}")
    say(f"adapter   {' + '.join(map(str, adapters)) or 'none'}{remarks[1]}")
    warn_of_other_bases(config, adapters)

    # ---- chat format
    tokenizer = load_tokenizer(base, config.split_special_tokens)
    wanted, settings, origin, force = chat_format(config, adapters or [base])
    template, why = choose_template(wanted, tokenizer, shape.model_type, force)
    stop_ids = set(fit_tokenizer(template, tokenizer, settings, shape.vocab_size))
    say(f"template  {template.name} ({origin or why})")

    # ---- sampling
    published = read_json(base / "generation_config.json")
    values, described = sampling_values(config, published, base)
    max_new_tokens = values.pop("max_new_tokens")
    sampling = Sampling(**values)
    own_eos = published.get("eos_token_id")             # an end the checkpoint was made with stays an end
    stop_ids |= set(own_eos) if isinstance(own_eos, list) else {own_eos} - {None}
    say(f"sampling  {'greedy; ' if sampling.greedy else ''}{described}; seed {config.seed}")

    # ---- model
    with explained_out_of_memory(device):
        model = load_with_adapters(base, adapters, dtype, device, fold_last=config.fast_chat)
        dtype = model.lm_head.weight.dtype
        if config.fast_chat:
            say("\n".join(prepare(model, available_bytes(device))))
    choice = pick_kernel(config.flash_attn, device=device, dtype=dtype, training=False, **attention_needs(shape))
    model.kernel = choice.kernel
    say(f"device    {torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type}")
    say(f"dtype     {str(dtype).removeprefix('torch.')}")
    say("\n".join([*choice.lines[:-1], f"kernel    {choice.kernel}"]))
    cache, step = KVCache(shape.num_hidden_layers), next_scores
    if config.fast_chat:
        cache, step, line = pick_step(model)
        say(line)

    # ---- turns
    generator = torch.Generator(device).manual_seed(config.seed)
    chat = Chat(config, model, tokenizer, template, settings, stop_ids, sampling, max_new_tokens, generator, cache, step)
    if config.prompt:
        _, ended = answer(chat, [{"role": "user", "content": config.prompt}])
        if ended == "interrupted":
            raise KeyboardInterrupt
    elif talk(chat) and not sys.stdin.isatty():
        raise ValueError("not every line could be answered; see above")


# ---- the conversation -------------------------------------------------------------------------------------------


def talk(chat: Chat) -> int:
    """Read turns until `exit` or the end of the input. Returns how many could not be answered."""
    say("`clear` forgets the conversation, `exit` or Ctrl-D ends it, Ctrl-C stops an answer")
    messages, failed = [], 0
    while (line := read_line()) is not None and line.strip() != "exit":
        if line.strip() == "clear":
            messages = []
            say("(forgotten)")
        if line.strip() in ("", "clear"):
            continue
        messages.append({"role": "user", "content": line})
        print("Assistant: ", end="", flush=True)
        try:
            text, _ = answer(chat, messages)
        except ValueError as error:                     # this turn cannot be answered, the next one may
            print()
            say(f"error: {error}. `clear` starts afresh")
            text, failed = "", failed + 1
        if text:
            messages.append({"role": "assistant", "content": text})
        else:                                           # turns alternate: without an answer the question goes too
            messages.pop()
    return failed


def read_line() -> str | None:
    """One line of the user, None at the end of the input. Piped lines are shown, so that the output reads as a talk."""
    while True:
        try:
            line = input("User: ")
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
    """Print the answer to the last message as it comes. Returns its text and how it ended, a row of ENDINGS.

    Raises ValueError when the model cannot read the prompt (see generate), or the GPU's memory is full.
    """
    tokenizer, skip = chat.tokenizer, chat.config.skip_special_tokens
    prompt, _ = encode_prompt(chat.template, tokenizer, [*messages, {"role": "assistant", "content": ""}],
                              settings=chat.settings)
    chat.cache.crop(common_prefix(chat.held, prompt))
    chat.held = list(prompt)
    if chat.config.raw:
        say(f"\nprompt    {len(prompt)} tokens, {chat.cache.length} of them computed before\nids       {prompt}\n"
            f"text      {tokenizer.decode(prompt)!r}")
    limit = chat.max_new_tokens or max(0, chat.config.max_length - len(prompt))
    said, stream, ended = [], TextStream(tokenizer, skip), "max_new_tokens" if chat.max_new_tokens else "max_length"
    try:
        with explained_out_of_memory(chat.model.lm_head.weight.device):
            for token in generate(chat.model, prompt, chat.cache, chat.stop_ids, chat.sampling, max_new_tokens=limit,
                                  generator=chat.generator, step=chat.step):
                chat.held.append(token)
                if token in chat.stop_ids:
                    ended = "stop"
                else:
                    said.append(token)
                if ended != "stop" or not skip:
                    print(stream.push(token), end="", flush=True)
    except KeyboardInterrupt:
        ended = "interrupted"
    print(stream.flush(), flush=True)
    if ended.startswith("max_") and len(chat.held) >= context_length(chat.model.config):
        ended = "context"
    if ENDINGS[ended]:
        say(ENDINGS[ended].format(said=len(said), held=len(chat.held)))
    return tokenizer.decode(said, skip), ended


# ---- what the config means for a conversation -------------------------------------------------------------------


def find_weights(config) -> tuple[Path, list[Path], tuple[str, str]]:
    """(base folder, adapter folders, remarks on the two): what is named, else what the training of this yaml left."""
    full, output = config.finetuning_type != "lora", Path(config.output_dir or "")
    trained = config.output_dir and (output / ("config.json" if full else "adapter_config.json")).is_file()
    if full and trained:
        return output, [], (f" (finetuning_type: {config.finetuning_type}; the output_dir of this config)", "")
    base = find_checkpoint(config.model_name_or_path, config.model_revision, config.cache_dir)
    named = [find_checkpoint(name, cache_dir=config.cache_dir) for name in config.adapter_name_or_path or []]
    result = [*folded_under(output), str(output)] if trained else []
    if trained and not named:
        return base, [find_checkpoint(name) for name in result], ("", " (the output_dir of this config)")
    if trained and output.resolve() not in [folder.resolve() for folder in named]:
        return base, named, ("", f" (as named; output_dir holds another one: adapter_name_or_path={','.join(result)})")
    if named or not config.output_dir:
        return base, named, ("", "")
    key, halfway = ("model_name_or_path" if full else "adapter_name_or_path"), checkpoints_in(output, resumable=False)
    hint = f"; its newest checkpoint: {key}={halfway[-1]}" if halfway else ""
    return base, [], (f" (the base: {output} holds no finished training{hint})", "")


def warn_of_other_bases(config, adapters):
    """Say it when an adapter was trained on a model of another name: its shapes may fit and its answers be nonsense."""
    for folder in adapters:
        trained_on = read_adapter_config(folder)[1].get("base_model_name_or_path")
        if trained_on and Path(trained_on).name != Path(config.model_name_or_path).name:
            say(f"warning   {folder} says it was trained on {trained_on}, not on {config.model_name_or_path}")
    if warning := warn_of_folded(adapters):
        say(f"warning   {warning}")


def chat_format(config, folders) -> tuple[str | dict | None, Settings, str, bool]:
    """(template or None, rendering settings, where the name comes from, force) from the config and train_config.json."""
    name, force = stored_template(folders, config.template, config.force_template)
    stored = read_json(folders[-1] / "train_config.json")
    origin = f"stored in {folders[-1]}" if name and name != config.template else ""
    known = {**vars(config), **stored, **config.given}  # said now, else said in training, else the default
    return name, Settings(**{key: known[key] for key in asdict(Settings())}), origin, force


def sampling_values(config, published: dict, base) -> tuple[dict, str]:
    """({key: value}, the same in words): from the config, else generation_config.json, else LLaMA-Factory's default."""
    values, words = {}, {}
    for name in SAMPLED:
        tables = {"config": config.given, "generation_config.json": published, "default": vars(config)}
        origin = next(where for where, table in tables.items() if table.get(name) is not None)
        values[name] = tables[origin][name]
        if not isinstance(values[name], (int, float)):
            raise ValueError(f"{base}/generation_config.json: {name}: {values[name]!r} is not a number; mend the file, "
                             f"or set {name} in the config")
        words.setdefault(origin, []).append(f"{name} {values[name]}".lower())
    return values, "; ".join(f"{', '.join(pairs)} ({origin})" for origin, pairs in words.items())


def pick_dtype(config, raw, device) -> torch.dtype | None:
    """infer_dtype, else bf16 / fp16, else None: the checkpoint's. Raises ValueError for what the GPU lacks."""
    asked = config.infer_dtype if config.infer_dtype != "auto" else \
        "bfloat16" if config.bf16 else "float16" if config.fp16 else None
    dtype = asked or raw.get("dtype") or raw.get("torch_dtype")
    if dtype == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(f"{'the config asks for' if asked else 'the checkpoint has'} bfloat16, which "
                         f"{torch.cuda.get_device_name(device)} lacks: set infer_dtype: float16 (or float32)")
    return DTYPES.get(asked)


@contextmanager
def explained_out_of_memory(device):
    """Turn torch's error for a full GPU into a sentence."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        free, total = (amount / 2**30 for amount in torch.cuda.mem_get_info(device))
        raise ValueError(f"the GPU's memory is full ({free:.1f} of {total:.1f} GiB free): close what else uses it, "
                         "take a shorter conversation or a smaller dtype (infer_dtype), or set use_cpu: true") from None


if __name__ == "__main__":
    run(main)
