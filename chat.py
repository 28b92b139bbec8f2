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
from dataclasses import dataclass, field

from config import Config, ignored_keys, load_config, run

if __name__ == "__main__":
    run(lambda argv: load_config(argv, "chat"))                 # --help and mistakes do not wait for torch

from attention import pick_device, pick_kernel                  # before torch: see guard_amdsmi there
import torch

from checkpoint import load_with_adapters
from decode import pick_step, prepare
from families import model_config, read_config_json
from generate import Sampling, common_prefix, context_length, generate, next_scores
from model import CausalLM, KVCache, attention_needs
from quant import form_asked, in_words, quantised_weights
from room import available_bytes
from templates import Settings, Template, choose_template, encode_prompt, fit_tokenizer
from tokenizer import TextStream, Tokenizer, load_tokenizer, read_json
from trained import chat_format, explained_out_of_memory, find_weights, other_bases, pick_dtype

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
    for warning in other_bases(config, adapters):
        say(f"warning   {warning}")

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
        model = load_with_adapters(base, adapters, dtype, device, config.fast_chat, form_asked(config))
        dtype = model.model.embed_tokens.weight.dtype
        if packed := quantised_weights(model):
            say(f"weights   {in_words(weight.form for weight in packed.values())}"
                + ("; the adapter stays beside them: folded in, they would take 16 bits" if adapters else "")
                + (". Adapters before the last one are folded in: what they adapt takes 16 bits"
                   if len(adapters) > 1 else ""))
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


if __name__ == "__main__":
    run(main)
