"""Evaluate a tuned model beside its base: loss, perplexity, answers and their scores.

    python eval.py --config configs/tiny_lora_eval.yaml     loss, answers, BLEU and ROUGE
    python eval.py my.yaml do_eval=true                     the loss only
    python eval.py my.yaml eval_dataset=questions.json max_new_tokens=256 do_sample=false
    python eval.py my.yaml task=mmlu_test                   see evals/multiple_choice.py

config → models → chat template and rows → loss and answers of each model → files → a table. The
rows are eval_dataset, or the share val_size of dataset that training held out, or dataset itself.
The yaml of a training works unchanged: the adapter is found in its output_dir. A run that was
killed continues after its last complete answer.

Requires: chat.py (loads a model in the same way), evals/loss.py, evals/predictions.py.
Next: docs/evaluation.md.

Names and files are those of LLaMA-Factory's do_predict: generated_predictions.jsonl,
predict_results.json, eval_results.json.
"""
import math
import os
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

from errors import run_script
from settings.load_config import ignored_keys, load_config

if __name__ == "__main__":
    run_script(lambda argv: load_config(argv, "eval"))   # --help and mistakes do not wait for torch

from runtime.device import pick_device              # before torch: see guard_amdsmi there

from checkpoint.adapters import load_with_adapters
from checkpoint.files import write_json
from checkpoint.read_config import read_config_json, read_model_config
from checkpoint.value_head import VALUE_HEAD, read_value_head
from data import settings_of
from evals.bleu_rouge import NAMES, means, pick_words, score
from evals.compare import print_changed_most
from evals.loss import evaluate, evaluate_examples
from evals.multiple_choice import (accuracies, answer_subjects, find_subjects, print_task,
                                   write_choices)
from evals.predictions import (Prompt, Side, predict, process_share, progress_name, prompts_of,
                               read_prompt_rows, remove_progress, run_key, write_predictions)
from evals.vllm_answers import answers_of_vllm, check_vllm
from fast.decode import prepare
from fast.fused_block import fuse_blocks
from generate import Sampling
from lora import merge_adapters
from losses import Objective
from methods.preference import JudgedObjective, PairObjective
from methods.reward_model import RewardObjective, ValueHead
from runtime.build import STAGES
from runtime.finished import (explained_out_of_memory, find_weights, other_bases, pick_dtype,
                              with_trained_settings)
from runtime.kernels import choose_kernels, keep_kernels, kernels_of_training, use_kernels
from runtime.memory_advice import available_bytes
from runtime.named_folders import named_folder, named_folders
from runtime.precision import Precision, requested_format
from runtime.report import format_table, print_pairs
from runtime.resize_vocab import resized_in
from runtime.resume import EVAL_LOCK, lock
from runtime.show_data import print_counts
from settings.config import SAMPLED, Config
from text.load_text import Text, eos_ids_of, load_text
from text.token_cache import load_examples
from text.tokenizer import read_json

# columns of the table -> metric: of replies and text, of preferences, of reward models
COLUMNS = {"loss": "eval_token_loss", "perplexity": "eval_perplexity"}
PAIR_COLUMNS = {
    "loss": "eval_loss",
    "accuracy": "eval_rewards/accuracies",
    "margin": "eval_rewards/margins",
}
REWARD_COLUMNS = {"loss": "eval_loss", "accuracy": "eval_accuracy"}


def main(argv):
    rank, _ = process_share()
    if rank:                            # under torchrun the processes share the answers alone
        sys.stdout = open(os.devnull, "w")
    config = with_answers_of_rows(load_config(argv, "eval"))
    check_rows_and_output(config)
    if rank and (config.task or not wants_answers(config)):
        return
    if config.infer_backend == "vllm":
        check_vllm(config)

    # ---- models
    base, adapters, remarks = find_weights(config)
    model_config = read_model_config(base)
    device = pick_device(config.use_cpu)
    sides = sides_of(config, base, adapters)
    notes = [*model_config.notes, *filter(None, remarks)]
    print_models(config, sides, notes + other_bases(config, adapters))

    # ---- chat template, rows
    trained = adapters or [base]
    config = with_trained_settings(config, trained[-1])
    text = load_text(config, base, trained, model_config, overrides=True)
    if config.task:
        measure_choices(config, sides, text.template, text.tokenizer, settings_of(config),
                        device)
        return
    examples = held_out(config, text.tokenizer, text.template, model_config.vocab_size)
    prompts = []
    if wants_answers(config):
        rows = read_prompt_rows(config)
        prompts = prompts_of(rows, config, text.tokenizer, text.template)
    sampling = Sampling(**{name: value for name, value in vars(config).items()
                           if name in asdict(Sampling())})
    words, words_name = pick_words()
    print_measured(config, text, examples, prompts, sampling, words_name)

    # ---- measure
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    if not rank:
        lock(output, EVAL_LOCK)
    for side in sides:
        measure(side, config, examples, prompts, text.stop_ids | eos_ids_of(base), sampling, device)
        if rank:
            continue
        if prompts:
            score_answers(side, prompts, text.tokenizer, words, words_name)
        write_files(output, side, config, text.tokenizer, prompts, first=side is sides[0])

    # ---- the table
    if rank:
        return
    write_json(output / "comparison.json", {side.name: side.results for side in sides})
    print_metrics(config, sides, bool(prompts))
    print_changed_most(sides, examples, prompts, text.tokenizer)
    for side in sides:                                  # finished: the next run starts anew
        remove_progress(output / progress_name(side.name))
    print(f"\nwritten to {output}: {', '.join(files_of(bool(prompts)))}, comparison.json")


def with_answers_of_rows(config: Config) -> Config:
    """The config; a stage that trains on sampled answers is replaced by sft."""
    if config.stage not in SAMPLED:
        return config
    measured = "the divergence" if config.stage == "distill" else "rewards"
    print(f"stage: {config.stage} measures {measured} in training (eval_strategy); here the loss "
          "is that of the rows' own answers, as in stage: sft")
    return replace(config, stage="sft")


def check_rows_and_output(config: Config):
    """Raise ValueError unless the config names rows and an output folder, or a task."""
    if config.task:
        return
    if not config.output_dir:
        raise ValueError(f"{config.source}: eval.py writes its files into output_dir; set it")
    if not config.eval_dataset and not config.dataset:
        raise ValueError(
            f"{config.source}: there are no rows to measure on; set eval_dataset")


# ---- models and rows --------------------------------------------------------------------------


def sides_of(config: Config, base: Path, adapters: list[Path]) -> list[Side]:
    """The models to compare: the tuned one, and with `compare` its base and the merged model.

    A reward model is measured alone, since its base has no value head.
    """
    original = named_folder(config, "model_name_or_path")
    original = base if adapters else resized_in(config.output_dir) or original
    name = "tuned"
    if adapters:
        name = "adapter"
    elif base == original:
        name = "base"
    sides = [Side(name, base, adapters)]
    if config.stage == "rm":
        return sides

    if config.compare and name != "base":
        sides.append(Side("base", original, []))
    if config.compare and config.export_dir:
        if (Path(config.export_dir) / "config.json").is_file():
            sides.append(Side("merged", Path(config.export_dir), []))
    for side in sides:
        if config.ref_model:
            side.reference = (named_folder(config, "ref_model"),
                              named_folders(config, "ref_model_adapters"))
        elif not side.adapters and side.name != "base":
            side.reference = (original, [])
    return sides


def print_models(config: Config, sides: list[Side], notes: list[str]):
    """Print the folders of each model, notes, and keys without effect."""
    folders = {side.name: " + ".join(map(str, [side.base, *side.adapters])) for side in sides}
    print_pairs("models", folders)
    for note in notes:
        print(f"  note: {note}")
    if ignored := ignored_keys(config):
        print(f"  accepted, no effect here: {', '.join(ignored)}")


def wants_answers(config: Config) -> bool:
    """Whether to generate answers: if the config asks for them, or for nothing in particular.

    Stages pt and rm have none.
    """
    if config.stage in ("pt", "rm"):
        return False
    requested = {"do_eval", "do_predict", "predict_with_generate"} & set(config.given)
    return config.do_predict or config.predict_with_generate or not requested


def held_out(config: Config, tokenizer, template, vocab_size: int):
    """The examples to measure the loss on, encoded as in training.

    Raises ValueError for token ids outside the vocabulary.
    """
    if config.eval_on_each_dataset and len(config.eval_dataset or []) > 1:
        print("  note: eval_on_each_dataset is for evaluations in training; here the rows of all "
              "datasets are measured together, and with eval_dataset=NAME those of one")
    if config.eval_dataset:
        config = replace(config, dataset=config.eval_dataset, eval_dataset=None, val_size=0.0)
    elif not config.val_size:
        print("  note: the rows of `dataset` are measured. For a model trained on them the figures "
              "show memorization; eval_dataset or val_size holds rows out")
    # without a folder: the cache of the training run is not replaced
    train_set, eval_set, counts = load_examples(config, tokenizer, template,
                                                STAGES[config.stage].encode)
    split = "eval" if config.val_size else "train"
    examples = eval_set if config.val_size else train_set

    rows = {}
    for (part, name), count in counts.datasets.items():
        if part == split:
            rows["rows of", name] = count
    counts.datasets = rows
    counts.examples = {"measured": len(eval_set or train_set)}
    print_counts(counts)
    if examples.largest_id >= vocab_size:
        raise ValueError(
            f"the rows hold token id {examples.largest_id}, and the model knows ids 0 to "
            f"{vocab_size - 1}: is the tokenizer in {tokenizer.source} that of another model?")
    return examples


def print_measured(config: Config, text: Text, examples, prompts: list[Prompt],
                   sampling: Sampling, words_name: str):
    """Print the template, and what is measured."""
    lines = {
        "template": f"{text.template.name} ({text.origin})",
        "loss": f"of {len(examples):,} examples",
        "answers": "none",
    }
    if prompts:
        lines["answers"] = f"to {len(prompts):,} prompts, {describe_sampling(sampling, config)}"
        lines["scores"] = f"by {words_name}"
    print_pairs("measured", lines)


def describe_sampling(sampling: Sampling, config: Config) -> str:
    """How the answers are generated, for the start page."""
    length = f"to {config.max_length} tokens with the prompt"
    if config.max_new_tokens:
        length = f"at most {config.max_new_tokens} tokens"
    if sampling.greedy:
        return f"greedy, {length}"
    values = [f"{name} {value}" for name, value in asdict(sampling).items()
              if name in vars(config) and name != "do_sample"]
    return f"sampled ({', '.join(values)}; seed {config.seed}), {length}"


# ---- one model --------------------------------------------------------------------------------


def quant_format_of(side: Side, config: Config) -> object | None:
    """The QuantFormat of quantization on load; a merged model has none."""
    return None if side.name == "merged" else requested_format(config)


def load_side(side: Side, config: Config, device) -> tuple:
    """Load the model of one side, adapters not merged, with the kernels of its training."""
    print(f"\n{side.name}", flush=True)
    dtype = pick_dtype(config, read_config_json(side.base), device)
    quant_format = quant_format_of(side, config)
    model = load_with_adapters(side.base, side.adapters, dtype, device, quant_format=quant_format)
    dtype = model.model.embed_tokens.weight.dtype
    kernels = choose_kernels(config, model.config, device, dtype, training=False)
    trained = (side.adapters or [side.base])[-1]
    keep_kernels(kernels, config, kernels_of_training(trained, device))
    use_kernels(model, kernels)
    return model, kernels.matmul


def measure_rows(side: Side, config: Config, model, examples, device, matmul) -> dict:
    """The metrics of the rows under the objective of the stage; for sft and pt each row's loss
    goes into side."""
    if config.stage in ("sft", "pt"):
        metrics, side.losses = evaluate_examples(config, model, examples, device, matmul)
        return metrics
    objective = objective_of_side(config, side, model, device, matmul)
    precision = Precision(model.model.embed_tokens.weight.dtype, device, model, adapters_only=True)
    return evaluate(model, examples, objective, config, precision)


def measure(side: Side, config: Config, examples, prompts: list[Prompt], stop_ids: set[int],
            sampling: Sampling, device):
    """Loss and answers of one model, and their speed, into side."""
    with explained_out_of_memory(device):
        start_time = time.monotonic()
        model, matmul = load_side(side, config, device)
        load_seconds = time.monotonic() - start_time
        rank, _ = process_share()
        if not rank:                                # the other processes share the answers alone
            side.results |= measure_rows(side, config, model, examples, device, matmul)
        side.results["eval_model_preparation_time"] = round(load_seconds, 4)
        if not prompts:
            return

        start_time = time.monotonic()
        generate_rows = None
        if config.infer_backend == "vllm":
            generate_rows = answers_of_vllm(side)
        else:
            prepare_answers(config, model, device)
        load_seconds += time.monotonic() - start_time
        key = run_key(side, config, prompts, stop_ids, sampling,
                      model.model.embed_tokens.weight.dtype)
        if quant_format := quant_format_of(side, config):
            key["form"] = str(quant_format)
        if generate_rows:
            key["infer_backend"] = config.infer_backend
            model = None                            # its memory is vLLM's from here on
        path = Path(config.output_dir) / progress_name(side.name)
        side.answers, seconds = predict(path, config, model, prompts, stop_ids, sampling, key,
                                        generate_rows)

    steps = math.ceil(len(prompts) / config.per_device_eval_batch_size)
    side.results["predict_model_preparation_time"] = round(load_seconds, 4)
    side.results["predict_runtime"] = round(seconds, 4)
    side.results["predict_samples_per_second"] = round(len(prompts) / seconds, 3)
    side.results["predict_steps_per_second"] = round(steps / seconds, 3)


def objective_of_side(config: Config, side: Side, model, device, matmul) -> Objective:
    """Objective of stages dpo, kto and rm for a model, with its reference or value head."""
    if config.stage == "rm":
        folder = (side.adapters or [side.base])[-1]
        head = ValueHead(model.config.hidden_size, 0.0, config.seed, model.config.logit_scale)
        if not read_value_head(folder, head.weights()):
            raise ValueError(f"{folder} holds no {VALUE_HEAD}: it is no reward model")
        return RewardObjective(head.to(device))
    reference = None
    if side.reference and config.has_reference:
        quant_format = None if config.ref_model else requested_format(config)
        dtype = model.model.embed_tokens.weight.dtype
        reference = load_with_adapters(*side.reference, dtype, device, quant_format=quant_format)
    objective = PairObjective if config.stage == "dpo" else JudgedObjective
    return objective(config, reference, matmul=matmul)


def prepare_answers(config: Config, model, device):
    """Prepare the model to generate fast, and print how. The loss was measured without merging."""
    lines = []
    if config.fast_chat:
        merge_adapters(model, quantized=False)
    fuse_blocks(model, matmul=None)
    if config.fast_chat:
        size = config.per_device_eval_batch_size
        lines = prepare(model, available_bytes(device), size)
    print("  " + "\n  ".join([*lines, f"kernel    {model.kernel}"]), flush=True)


def score_answers(side: Side, prompts: list[Prompt], tokenizer, words, words_name: str):
    """BLEU and ROUGE of each answer, and their means, into side."""
    for answer, (_, label) in zip(side.answers, prompts):
        side.scores.append(score(tokenizer.decode(answer, skip_special_tokens=True),
                                 tokenizer.decode(label, skip_special_tokens=True), words))
    for name, value in means(side.scores).items():
        side.results[f"predict_{name}"] = value
    if words_name.startswith("plain"):
        side.results["predict_words"] = words_name


# ---- multiple choice --------------------------------------------------------------------------


def measure_choices(config: Config, sides: list[Side], template, tokenizer, settings, device):
    """Print each model's accuracy on `task`; write results into save_dir, or else output_dir."""
    folder = config.save_dir or config.output_dir
    if config.save_dir and Path(folder).exists():
        raise ValueError(f"save_dir: {folder} exists already; name another one")
    subjects = find_subjects(config.task, config.task_dir)
    print_task(config, subjects, template.name)

    percents, answers = {}, {}
    for side in sides:
        with explained_out_of_memory(device):
            model, matmul = load_side(side, config, device)
            answers[side.name] = answer_subjects(model, subjects, config, template, tokenizer,
                                                 settings)
        percents[side.name] = accuracies(subjects, answers[side.name])
        del model

    rows = []
    for name in percents[sides[0].name]:
        rows.append([name, *(f"{percent[name]:.2f}" for percent in percents.values())])
    text = format_table(["percent right", *percents], rows)
    print(f"\n{text}")
    if folder:
        write_choices(Path(folder), answers[sides[0].name], percents, text)


# ---- files and printing -----------------------------------------------------------------------


def files_of(answered: bool) -> list[str]:
    """The files written for the first model."""
    files = ["eval_results.json"]
    if answered:
        files += ["generated_predictions.jsonl", "predict_results.json"]
    return files


def write_files(output: Path, side: Side, config: Config, tokenizer, prompts: list[Prompt],
                first: bool):
    """Write LLaMA-Factory's files for the first model, and only the answers for the others."""
    if prompts:
        name = "generated_predictions.jsonl"
        if not first:
            name = f"generated_predictions.{side.name}.jsonl"
        write_predictions(output / name, side, prompts, tokenizer, config.skip_special_tokens)
    if not first:
        return
    for kind in ("eval", "predict"):
        results = {key: value for key, value in sorted(side.results.items())
                   if key.startswith(f"{kind}_")}
        if results:
            write_json(output / f"{kind}_results.json", results)
    all_results = read_json(output / "all_results.json") | side.results
    write_json(output / "all_results.json", all_results)


def print_metrics(config: Config, sides: list[Side], answered: bool):
    """One row for each model, one column for each metric."""
    columns = COLUMNS
    if config.stage == "rm":
        columns = REWARD_COLUMNS
    elif config.stage in ("dpo", "kto"):
        columns = PAIR_COLUMNS
    if answered:
        columns = columns | {name: f"predict_{name}" for name in NAMES}
    rows = []
    for side in sides:
        values = [side.results.get(key) for key in columns.values()]
        rows.append([side.name, *("" if value is None else f"{value:.4g}" for value in values)])
    print()
    print(format_table(["", *columns], rows))


if __name__ == "__main__":
    run_script(main)
