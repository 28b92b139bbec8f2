"""Models side by side: the losses of a merged model and its parts, and the rows that changed most.

Requires: evals/loss.py, evals/predictions.py.
Next: merge.py, eval.py.
"""
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from checkpoint.adapters import load_adapter, load_with_adapters
from checkpoint.load import load_model, packed_weights
from checkpoint.read_config import read_model_config
from data import IGNORE
from evals.bleu_rouge import NAMES
from evals.loss import score_examples, sum_losses
from evals.predictions import Prompt, Side
from fast.attention_picker import pick_kernel
from lora import merge_adapters
from model import attention_needs
from runtime.build import STAGES
from runtime.finished import as_trained
from runtime.memory_advice import available_bytes
from settings.config import Config
from text.load_text import load_text
from text.token_cache import kept_in, load_examples

LOSS_ROWS = 32          # most rows whose losses are compared
SHOWN_ROWS = 3          # rows printed side by side


# ---- base, base with adapter, merged model ----------------------------------------------------


def compare_losses(config: Config, base: Path, adapters: list[Path], device: str,
                   folder: str) -> dict:
    """Print a table of base, base with adapters, and exported model (in folder) on some rows.

    Returns {model: (loss, share of same tokens)}, {} where they were not compared. loss: mean per
    token. same token: how often the most likely next token equals that of the base with its
    adapters (without adapters: of the base). For a quantized or GGUF export the
    table also has the merged model before rounding.
    """
    files = [*Path(folder).glob("*.safetensors"), *Path(folder).glob("*.gguf")]
    size = sum(file.stat().st_size for file in files)
    free = available_bytes(device)
    if free and size > 0.9 * free:
        print(f"losses    not compared: the exported model is larger than the free memory "
              f"({device})")
        return {}
    quant_format, half_dtype, stage = as_trained(config, adapters)
    if stage not in ("sft", "pt"):
        print(f"losses    not compared: stage {stage} has no loss per token")
        return {}

    text_folder = folder if (Path(folder) / "tokenizer.json").is_file() else base
    text = load_text(config, text_folder, adapters, read_model_config(base))
    rows, description = some_rows(replace(config, stage=stage), text.tokenizer, text.template)

    loaders = {
        "base": lambda: load_model(base, half_dtype, device, quant_format=quant_format),
        "adapter": lambda: load_with_adapters(base, adapters, half_dtype, device,
                                              quant_format=quant_format),
        "merged": lambda: load_merged(base, adapters, half_dtype, device, quant_format),
        "exported": lambda: load_exported(folder, base, half_dtype, device),
    }
    if not adapters:
        del loaders["adapter"]
    if not adapters or has_plain_weights(Path(folder)):     # the export is the merged model
        del loaders["merged"]
    table = {}
    for name, load in loaders.items():                  # one model in memory at a time
        model = load()
        table[name] = mean_loss(model, rows, device), likeliest_tokens(model, rows, device)
        del model
    return print_losses(table, "adapter" if adapters else "base", f"{len(rows)} {description}")


def has_plain_weights(folder: Path) -> bool:
    """Whether a folder has an unquantized safetensors checkpoint."""
    return not any(folder.glob("*.gguf")) and not packed_weights(folder)


def load_merged(base: Path, adapters: list[Path], dtype, device: str, quant_format):
    """The base with all adapters merged; 4- and 8-bit matrices are dequantized to 16 bits."""
    model = load_model(base, dtype, device, quant_format=quant_format)
    for adapter in adapters:
        load_adapter(model, adapter)
        merge_adapters(model)
    return model.eval()


def load_exported(folder, base: Path, dtype, device: str):
    """The model in a folder that merge.py has written. Raises ValueError for another model."""
    files = sorted(Path(folder).glob("*.gguf"))
    if not files:
        model, vocab_size = load_model(folder, dtype, device), read_model_config(base).vocab_size
        if model.config.vocab_size != vocab_size:
            raise ValueError(f"{folder} has vocab_size: {model.config.vocab_size}, and {base} "
                             f"{vocab_size}; is it another model?")
        return model
    if len(files) > 1:
        raise ValueError(f"{folder} holds several .gguf files ({files[0].name}, {files[1].name}); "
                         "move all but the one to compare into another folder")
    from checkpoint.read_gguf import load_gguf              # only where it is asked for

    return load_gguf(files[0], base, device)


def print_losses(table: dict[str, tuple], reference: str, rows: str) -> dict:
    """table: {model: (loss, most likely tokens)}; returns {model: (loss, share of same tokens)}."""
    found = {}
    tokens = table[reference][1]
    print(f"losses    per token, over {rows}; same token: how often the most likely next token "
          f"equals that of the {reference}")
    print(f"          {'':10}{'loss':>8}{'same token':>13}")
    for name, (loss, likeliest) in table.items():
        found[name] = loss, float((likeliest == tokens).float().mean())
        print(f"          {name:10}{loss:8.4f}{found[name][1]:13.1%}")
    return found


@torch.no_grad()
def likeliest_tokens(model, examples, device) -> torch.Tensor:
    """The likeliest token at each label, (labels,) int64."""
    found = []
    for example in examples:
        labels = torch.tensor(example.labels != IGNORE)[1:]
        if labels.any():
            ids = torch.tensor(example.input_ids, dtype=torch.int64, device=device)[None]
            hidden = model(ids)[0, :-1][labels.to(device)]
            found.append(model.logits(hidden).argmax(-1).cpu())
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64)


def mean_loss(model, examples, device) -> float:
    """Mean loss per label, in nats; chooses the attention kernel."""
    device = torch.device(device)
    dtype = model.model.embed_tokens.weight.dtype
    choice = pick_kernel("auto", device=device, dtype=dtype, training=False,
                         **attention_needs(model.config))
    model.kernel = choice.kernel
    score = partial(score_examples, balance=0.0, device=device)
    sums = sum_losses(model, examples, score, size=1, disable_tqdm=True)
    labels = sum(int((example.labels != IGNORE).sum()) for example in examples)
    return sums.total / max(labels, 1)


def some_rows(config: Config, tokenizer, template):
    """(first examples held out for evaluation, description); without such, training examples."""
    if config.eval_dataset or not config.val_size:      # else the split is made of all rows
        limit = min(config.max_samples or LOSS_ROWS, LOSS_ROWS)
        config = replace(config, max_samples=limit)
    if not config.dataset:                              # nothing is trained, all rows are held out
        config = replace(config, dataset=config.eval_dataset, eval_dataset=None, val_size=0)
        rows, _ = some_rows(config, tokenizer, template)
        return rows, "rows held out"
    folder = kept_in(config) if config.output_dir or config.tokenized_path else None
    train_set, eval_set, _ = load_examples(config, tokenizer, template, STAGES[config.stage].encode,
                                           folder=folder, writes=False)
    if eval_set:
        return eval_set[:LOSS_ROWS], "rows held out"
    return train_set[:LOSS_ROWS], "training rows; eval_dataset or val_size would hold some out"


# ---- a tuned model and its base ---------------------------------------------------------------


def print_changed_most(sides: list[Side], examples, prompts: list[Prompt], tokenizer):
    """Print the rows that differ most between the first model and its base, side by side."""
    tuned = sides[0]
    base = next((side for side in sides[1:] if side.name == "base"), None)
    if base is None or not (base.losses or prompts):
        return
    change = changes_of_rows(tuned, base, bool(prompts))
    changed = [i for i, value in enumerate(change) if abs(value) > 0]
    order = sorted(changed, key=lambda i: -abs(change[i]))[:SHOWN_ROWS]
    better = sum(value > 0 for value in change)
    worse = sum(value < 0 for value in change)
    same = len(change) - better - worse
    most = ". Those that changed most:" if order else ""
    print(f"\n{tuned.name} against base: {better} rows better, {worse} worse, {same} alike{most}")
    for i in order:
        if prompts:
            print_answers(i, tuned, base, prompts[i], tokenizer)
        else:
            text = one_line(tokenizer.decode(examples[i].input_ids.tolist()))
            print(f"  example {i + 1}: loss {base.losses[i]:.4f} -> {tuned.losses[i]:.4f}   {text}")


def changes_of_rows(tuned: Side, base: Side, answered: bool) -> list[float]:
    """Improvement of each row: of the mean score, or else of the loss."""
    if not answered:
        return [b - a for a, b in zip(tuned.losses, base.losses)]
    return [sum(a[name] - b[name] for name in NAMES) / len(NAMES)
            for a, b in zip(tuned.scores, base.scores)]


def print_answers(i: int, tuned: Side, base: Side, prompt: Prompt, tokenizer):
    """Print prompt, label and both answers of row i."""
    print(f"\nrow {i + 1}")
    print(f"  {'prompt':8}{one_line(tokenizer.decode(prompt[0]))}")
    print(f"  {'label':8}{one_line(tokenizer.decode(prompt[1], True).rstrip())}")
    for side in (base, tuned):
        mean = sum(side.scores[i].values()) / len(NAMES)
        text = one_line(tokenizer.decode(side.answers[i], True))
        print(f"  {side.name:8}{text} (mean of the scores {mean:.1f})")


def one_line(text: str, limit: int = 300) -> str:
    """The text with its middle left out if it is long, newlines escaped."""
    if len(text) > limit:
        text = f"{text[:limit // 2]} … {text[-limit // 2:]}"
    return text.replace("\n", "\\n")
