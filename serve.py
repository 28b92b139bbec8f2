"""Serve a model and its adapters over HTTP, as OpenAI's API, using their training yaml.

    python serve.py --config configs/tiny_lora_sft.yaml     http://127.0.0.1:8000/v1
    python serve.py my.yaml adapter_name_or_path=saves/a,saves/b    `model` chooses one of them
    API_KEY=secret python serve.py my.yaml host=0.0.0.0 port=8080

config → weights → chat template → sampling → model with every adapter beside it → engine → server.
Requests are decoded together, one token of each at a step (serving/engine.py). SIGTERM or Ctrl-C
ends the server after the answers that are being made.

Requires: chat.py (loads a model in the same way), serving/engine.py, serving/handler.py.
Next: docs/serving.md.

API_KEY, API_HOST, API_PORT and API_MODEL_NAME are those of `llamafactory-cli api`.
"""
import os
import signal
import threading
from pathlib import Path

from errors import bytes_in_words, run_script, say
from settings.config import Config
from settings.load_config import ignored_keys, load_config

if __name__ == "__main__":
    run_script(lambda argv: load_config(argv, "serve"))  # --help and mistakes do not wait for torch

from runtime.device import pick_device
import torch

from checkpoint.adapter_config import read_adapter_config
from checkpoint.adapters import layers_of_adapter, load_with_adapters
from checkpoint.read_config import read_config_json, read_model_config
from data import settings_of
from fast.attention_picker import pick_kernel
from fast.batch_decode import cache_bytes, one_at_a_time
from fast.decode import prepare
from fast.many_adapters import RowAdapters, put_beside, why_not_beside
from generate import context_length
from model import CausalLM, attention_needs
from runtime.finished import (as_trained, explained_out_of_memory, find_weights, other_bases,
                              pick_dtype, sampling_values, with_trained_settings)
from runtime.memory_advice import available_bytes
from runtime.precision import requested_format
from runtime.reward_sources import stored_head
from serving.engine import Engine
from serving.handler import Server
from serving.http_base import LOCAL
from serving.service import Service
from text.load_text import Text, eos_ids_of, load_text
from text.tokenizer import read_json

FOR_CACHE = 0.8             # share of the free memory that keys and values may take
GRACE_SECONDS = 10          # for the answers that are being made when the server ends


def main(argv):
    config = with_environment(load_config(argv, "serve"))
    key = os.environ.get("API_KEY") or None
    if config.host not in LOCAL and not key:
        raise ValueError(f"host: {config.host} can be reached from other machines: set a key that "
                         "clients must send, API_KEY=… python serve.py …, or host: 127.0.0.1")
    if ignored := ignored_keys(config):
        say(f"accepted, no effect here: {', '.join(ignored)}")

    # ---- weights: base and adapters
    base, adapters, remarks = find_weights(config)
    device = pick_device(config.use_cpu)
    dtype = pick_dtype(config, read_config_json(base), device)
    say(f"model     {base}{in_brackets(remarks[0])}")
    say(f"adapters  {', '.join(map(str, adapters)) or 'none'}{in_brackets(remarks[1])}")
    for adapter in adapters:
        for warning in other_bases(config, [adapter]):
            say(f"warning   {warning}")

    # ---- chat template
    config = with_trained_settings(config, (adapters or [base])[-1])
    text = text_of_all(config, base, adapters)
    say(f"template  {text.template.name} ({text.origin})")

    # ---- model, engine, server
    scores = as_trained(config, adapters)[2] == "rm"
    with explained_out_of_memory(device):
        make = reward_service if scores else chat_service
        service = make(config, base, adapters, text, dtype, device)
    server = Server((config.host, config.port), service, key)
    address = f"[{config.host}]" if ":" in config.host else config.host
    say(f"models    {', '.join(service.models)}")
    say(f"serving   http://{address}:{server.server_port}/v1  "
        f"({'with' if key else 'without'} a key; Ctrl-C ends)")
    serve_until_signal(server)


def with_environment(config: Config) -> Config:
    """The config, with API_HOST and API_PORT where it does not set host and port."""
    for name, variable in (("host", "API_HOST"), ("port", "API_PORT")):
        value = os.environ.get(variable)
        if value and name not in config.given:
            if name == "port" and not (value.isascii() and value.isdigit() and int(value) < 2**16):
                raise ValueError(f"API_PORT: {value!r} is no port; it must be 0 to 65535")
            setattr(config, name, int(value) if name == "port" else value)
    return config


def in_brackets(remark: str) -> str:
    return f" ({remark})" if remark else ""


def serve_until_signal(server: Server):
    """Answer until SIGTERM or SIGINT; then let the answers that are being made end."""
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    if server.service.engine:
        server.service.engine.start()
    thread = threading.Thread(target=server.serve_forever, name="server", daemon=True)
    thread.start()
    while not ended.wait(1):            # short waits: Windows sees signals between them
        pass
    say("ending: no new requests")
    server.shutdown()
    server.server_close()
    if server.service.engine:
        server.service.engine.close(GRACE_SECONDS)
    server.wait_for_answers(2)


# ---- chat template ------------------------------------------------------------------------------


def text_of_all(config: Config, base: Path, adapters: list[Path]) -> Text:
    """Tokenizer and template, which all adapters must share. Raises ValueError if they do not."""
    model_config = read_model_config(base)
    found = [load_text(config, base, [folder], model_config, overrides=True)
             for folder in adapters or [base]]
    for folder, text in zip(adapters, found):
        if text.template != found[0].template:
            raise ValueError(
                f"{folder} was trained with template {text.template.name}, {adapters[0]} with "
                f"{found[0].template.name}: serve them in two processes")
    return found[0]


# ---- models -------------------------------------------------------------------------------------


def chat_service(config: Config, base: Path, adapters: list[Path], text: Text,
                 dtype: torch.dtype | None, device: torch.device) -> Service:
    """A service that generates."""
    generation = read_json(base / "generation_config.json")
    defaults, description = sampling_values(config, generation, base)
    say(f"sampling  {description}; a request may set its own")
    max_new_tokens = defaults.pop("max_new_tokens")

    model, rows, models = load_models(config, base, adapters, dtype, device)
    size = 1 if one_at_a_time(model) else config.max_num_seqs
    set_attention_kernel(config, model, device)
    if config.fast_chat:
        say("\n".join(prepare(model, available_bytes(device), size)))
    max_tokens = tokens_with_room(model, size, device)
    engine = Engine(model, size, config.max_queued_requests, rows)
    return Service(engine=engine, model=model, text=text, settings=settings_of(config),
                   stop_ids=text.stop_ids | eos_ids_of(base), models=models, defaults=defaults,
                   max_new_tokens=max_new_tokens, max_length=config.max_length,
                   max_tokens=max_tokens)


def reward_service(config: Config, base: Path, adapters: list[Path], text: Text,
                   dtype: torch.dtype | None, device: torch.device) -> Service:
    """A service that scores texts by a model of stage rm."""
    folder = (adapters or [base])[-1]
    model = load_with_adapters(base, adapters, dtype, device, quant_format=requested_format(config))
    head = stored_head(folder, model.config).to(device)
    set_attention_kernel(config, model, device)
    say("scores    texts at /v1/score/evaluation; a reward model answers no conversation")
    return Service(engine=None, model=model, text=text, settings=settings_of(config),
                   stop_ids=set(), models={served_name(folder, {}): None}, defaults={},
                   max_new_tokens=0, max_length=0, max_tokens=context_length(model.config),
                   head=head)


def load_models(config: Config, base: Path, adapters: list[Path], dtype: torch.dtype | None,
                device: torch.device) -> tuple[CausalLM, RowAdapters | None, dict]:
    """(the base with every adapter beside it, the adapters of rows, {name served: adapter}).

    Adapters that adapter_name_or_path names are served each by itself. Those of output_dir were
    trained one upon the other: all but the last are part of the base. A single adapter that cannot
    share a pass with the base is merged into it, and the base is not served.
    """
    quant_format = requested_format(config)
    each = len(config.adapter_name_or_path or []) > 1
    folded = [] if each else adapters[:-1]
    if folded:
        say(f"          {', '.join(map(str, folded))}: part of the base, as in training")
    layers, models = {}, {}
    for folder in adapters[len(folded):]:
        found, reason = beside(base, folder, device, quant_format)
        if reason and each:
            raise ValueError(f"{folder} cannot be served beside other adapters: {reason}. Serve it "
                             "alone, where it is merged into the base")
        if reason:
            say(f"          merged into the base, which is not served beside it: {reason}")
            model = load_with_adapters(base, adapters, dtype, device, fold_last=True,
                                       quant_format=quant_format)
            return model, None, named_first({served_name(folder, {}): None})
        models[served_name(folder, models)] = str(folder)
        layers[str(folder)] = found
    model = load_with_adapters(base, folded, dtype, device, fold_last=True,
                               quant_format=quant_format)
    models[served_name(base, models)] = None
    if not layers:
        return model, None, named_first(models)
    rows = RowAdapters(device)
    put_beside(model, layers, rows)
    return model, rows, named_first(models)


def beside(base: Path, folder: Path, device: torch.device, quant_format) -> tuple[dict, str]:
    """(an adapter's layers, why they cannot share a pass with other rows, or "")."""
    if read_adapter_config(folder)[0].pissa:
        return {}, "pissa_init changed its base"
    layers, whole = layers_of_adapter(base, folder, device, quant_format)
    return layers, why_not_beside(layers, whole)


def served_name(folder: Path, taken: dict) -> str:
    """The name of a served model: its folder's, or the whole path where that name is taken."""
    name = folder.resolve().name
    return str(folder) if name in taken else name


def named_first(models: dict) -> dict:
    """The models, the first of them under the name API_MODEL_NAME, where that is set."""
    name = os.environ.get("API_MODEL_NAME")
    if not name:
        return models
    first, *rest = models
    return {name: models[first], **{other: models[other] for other in rest}}


def set_attention_kernel(config: Config, model: CausalLM, device: torch.device):
    """Choose the attention kernel, and print it."""
    dtype = model.model.embed_tokens.weight.dtype
    choice = pick_kernel(config.flash_attn, device=device, dtype=dtype, training=False,
                         **attention_needs(model.config))
    model.kernel = choice.kernel
    say(f"device    {device.type}, {str(dtype).removeprefix('torch.')}, kernel {choice.kernel}")


def tokens_with_room(model: CausalLM, size: int, device: torch.device) -> int:
    """The most tokens of a prompt with its answer, so that `size` of them fit into the memory.

    Raises ValueError where hardly any do.
    """
    dtype = model.model.embed_tokens.weight.dtype
    context = context_length(model.config)
    needed = cache_bytes(model.config, size, context, dtype)
    available = available_bytes(device)
    if available is not None and needed > FOR_CACHE * available:
        room = FOR_CACHE * available / cache_bytes(model.config, size, 256, dtype)
        context = int(room) * 256
        if context < 256:
            raise ValueError(f"max_num_seqs: {size} answers of 256 tokens do not fit into the "
                             f"memory ({bytes_in_words(available)} are free); set a lower one")
    size_in_words = bytes_in_words(cache_bytes(model.config, size, context, dtype))
    say(f"cache     {size} answers at a time, each with its prompt at most {context:,} tokens: up "
        f"to {size_in_words}")
    return context


if __name__ == "__main__":
    run_script(main)
