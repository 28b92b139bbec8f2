"""What a run remembers and leaves behind: where it continues, its results, its weights, its best checkpoint.

Requires: runtime/resume.py, checkpoint/training_state.py.
Next: train.py.
"""
import zlib
from pathlib import Path

import torch

from checkpoint.adapters import adapter_tensors, save_adapter
from checkpoint.files import open_tensors, write_json
from checkpoint.load import load_model, save_model
from parallel import Ranks
from runtime.report import model_card, plot_losses, print_pairs
from runtime.resume import check_rows
from runtime.throughput import total_flos
from scale.fsdp import fill, is_cut

MOST_SKIPPED = 3                # so many steps in a row without a finite loss and gradient end the run


def taken_up(config, resume, saved: dict, state: dict, total_steps: int, ranks: Ranks) -> dict:
    """What a run goes on with: `state`, what it would begin with, and what the checkpoint `resume` has saved over it.

    Raises ValueError if this run has other rows, other steps, or ended before.
    """
    check_rows(resume, saved["resume"], state["rows"], config.force_resume)
    # sums are rounded as before, unless memory has shrunk; what an older release has not written is what it did
    then = {"at_once": 0, "product": "torch", "compiled": False,
            "rows_per_step": state["rows_per_step"]} | saved["resume"]
    if then["rows_per_step"] != state["rows_per_step"]:
        what, key = ("tokens", "token_budget") if config.token_budget else ("rows", "per_device_train_batch_size")
        raise ValueError(f"{resume} was written with {then['rows_per_step']} {what} a step, and this run takes "
                         f"{state['rows_per_step']}: with {ranks.world} ranks, change gradient_accumulation_steps or {key} "
                         "so that the product is the same")
    if then["step"] > total_steps:
        raise ValueError(f"{resume} is at step {then['step']}, and this run ends at step {total_steps}: raise "
                         "max_steps or num_train_epochs, or go on from an earlier checkpoint")
    return state | then | {"history": saved["log_history"], "rows": state["rows"],
                           "at_once": min(then["at_once"], state["at_once"])}


def optimizer_names(optimizer, weights) -> list[str]:
    """Names of the trainable parameters in the optimizer's order."""
    names = {id(p): name for name, p in weights.items()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


@torch.no_grad()
def same_everywhere(ranks: Ranks, weights, rows: str):
    """Raises ValueError if ranks start from other weights or other data, as hosts with files of their own may.

    rows: a checksum, see Examples in text/token_cache.py.
    """
    if ranks.world == 1:
        return
    mine = [float(sum(p.double().abs().sum() for p in weights.values() if not is_cut(p))), zlib.crc32(rows.encode())]
    found = [other.tolist() for other in ranks.gather(torch.tensor(mine, dtype=torch.float64))]
    for what, values in zip(("trained weights", "training rows"), zip(*found)):
        if len(set(values)) > 1:
            raise ValueError(f"the ranks do not have the same {what}. Do all hosts have the same model, adapter and "
                             "data files, and the same release of this program?")


def train_results(state: dict, first_step: int, per_epoch: int, model, train_set, seconds: float) -> dict:
    """train_results.json, with LLaMA-Factory's names. seconds: of this run, evaluations and checkpoints included."""
    if state["skipped"]:
        print(f"\n{state['skipped']} steps were skipped because their loss or gradient was not finite; train_loss is "
              "the mean of the others")
    steps, seconds = state["step"] - first_step, max(seconds, 1e-9)
    return {"epoch": state["epoch"], "total_flos": total_flos(model, state["tokens_seen"]),
            "train_loss": state["loss_total"] / max(state["step"] - state["skipped"], 1),
            "train_runtime": round(seconds, 4),
            "train_samples_per_second": round(steps / per_epoch * len(train_set) / seconds, 3),
            "train_steps_per_second": round(steps / seconds, 3)}


def write_results(config, output, results: dict, template: str, history: list):
    """Show the results, and write them: train_results.json and its like, the model card, the picture."""
    for name, values in results.items():
        write_json(output / f"{name}_results.json", values)
        print_pairs(f"{name} results", values)
    everything = {key: value for name in ("train", "eval") for key, value in results.get(name, {}).items()}
    (output / "README.md").write_text(model_card(config, everything, template), encoding="utf-8")
    if config.plot_loss:
        plot_losses(output, history)
    write_json(output / "all_results.json", everything)                    # the last file: the run has come to its end


def save_weights(config, model, lora, folder, base, tokenizer, settings, head, dtype=None):
    """The adapter (or the whole model), the value head if there is one, the tokenizer, and the settings that made them.
    dtype: None writes each weight as it is held, which resuming needs; those of a finished model are of one."""
    if lora:
        save_adapter(model, folder, lora, config.model_name_or_path)
    else:
        save_model(model, folder, base, dtype)
    if head:
        head.write(folder)
    tokenizer.save(folder)
    write_json(Path(folder) / "train_config.json", settings)


@torch.no_grad()
def load_best(config, model, weights, output, best, ranks: Ranks, head):
    """Put the weights of the best checkpoint back into the model, on all ranks."""
    folder, in_parts = output / f"checkpoint-{best[0]}", any(map(is_cut, weights.values()))
    if in_parts:
        ranks.total(0)                              # rank 0 has written it by now
        fill(model, folder)
    elif ranks.main and config.finetuning_type != "lora":
        other = load_model(folder, torch.float32)
        for (_, p), (_, q) in zip(model.named_parameters(), other.named_parameters()):
            p.copy_(q)
    elif ranks.main:
        with open_tensors(folder / "adapter_model.safetensors") as tensors:
            for name, p in adapter_tensors(model).items():
                p.copy_(tensors.get_tensor(name))
    if head and ranks.main:
        head.read(folder)
    if not in_parts:
        ranks.share(weights.values())
    print(f"load_best_model_at_end: step {best[0]} with eval_loss {best[1]:.4f}")
