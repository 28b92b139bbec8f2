"""Does it answer better now? Loss, perplexity, answers and their scores, of a tuned model beside its base.

    python eval.py --config configs/tiny_lora_eval.yaml             loss, answers, BLEU and ROUGE; adapter beside base
    python eval.py my.yaml do_eval=true                             the loss alone
    python eval.py my.yaml eval_dataset=questions.json max_new_tokens=256 do_sample=false
    python eval.py my.yaml task=mmlu_test                           multiple choice, see evals/multiple_choice.py

config → which models → chat format, rows → of each model its loss and its answers → files → the table. The rows are
eval_dataset, or the share val_size of dataset that training held out, or dataset itself. The yaml of the training will
do: the adapter is looked for in its output_dir. A run that was killed goes on after the answers it has.

Read before: chat.py (which loads a model likewise), fast/batch_decode.py, evals/bleu_rouge.py. Read after: docs/evaluation.md.
Sources: the rows, names and files are those of LLaMA-Factory's do_predict: generated_predictions.jsonl,
predict_results.json, eval_results.json.
"""
import json
import math
import os
import time
from dataclasses import asdict, replace
from pathlib import Path

from errors import run
from runtime.load_config import ignored_keys, load_config

if __name__ == "__main__":
    run(lambda argv: load_config(argv, "eval"))                 # --help and mistakes do not wait for torch

from runtime.device import pick_device
import numpy as np
from tqdm import tqdm

from checkpoint.adapters import load_with_adapters
from checkpoint.files import find_checkpoint, write_json
from data import Encoded, cut_pair, print_counts, settings_of
from evals.bleu_rouge import NAMES, means, pick_words, score
from evals.loss import measure_loss, measure_objective
from evals.multiple_choice import accuracies, answers_of, find_subjects
from evals.predictions import Side, predict, progress_name, run_key
from families import model_config, read_config_json
from fast.attention_picker import pick_kernel
from fast.decode import prepare
from fast.matmul import pick_product
from generate import Sampling
from lora import merge_adapters
from methods.quant import form_asked
from model import attention_needs
from runtime.finished import (chat_format, explained_out_of_memory, find_weights, other_bases,
                              pick_dtype)
from runtime.memory_advice import available_bytes
from runtime.report import print_pairs, table
from templates import encode_prompt, fit_tokenizer
from text.data_files import find_sources, rows_of
from text.template_check import choose_template
from text.token_cache import conversation_of, load_examples, refuse, split_rows
from text.tokenizer import load_tokenizer, read_json

SHOWN = 3               # rows side by side
# columns of the table: of replies and text, of preferences, of reward models
TOLD = {"loss": "eval_token_loss", "perplexity": "eval_perplexity"}
TOLD_OF_PAIRS = {"loss": "eval_loss", "accuracy": "eval_rewards/accuracies", "margin": "eval_rewards/margins"}
TOLD_OF_REWARDS = {"loss": "eval_loss", "accuracy": "eval_accuracy"}


def main(argv):
    if os.environ.get("RANK", "0") != "0":              # under torchrun one process does the work
        return
    config = load_config(argv, "eval")
    check(config)
    output = Path(config.output_dir or "")

    # ---- which models
    base, adapters, remarks = find_weights(config)
    shape = model_config(read_config_json(base), f"{base}/config.json")
    device = pick_device(config.use_cpu)
    sides = sides_of(config, base, adapters)
    print_pairs("models", {side.name: " + ".join(map(str, [side.base, *side.adapters])) for side in sides})
    for note in [*shape.notes, *(remark.strip() for remark in remarks if remark), *other_bases(config, adapters)]:
        print(f"  note: {note}")
    if ignored := ignored_keys(config):
        print(f"  accepted, no effect here: {', '.join(ignored)}")

    # ---- chat format, rows
    tokenizer = load_tokenizer(base, config.split_special_tokens)
    wanted, settings, origin, force = chat_format(config, adapters or [base])
    template, why = choose_template(wanted, tokenizer, shape.model_type, force)
    stop_ids = set(fit_tokenizer(template, tokenizer, settings, shape.vocab_size)) | own_ends(base)
    if config.task:
        return measure_choices(config, sides, template, tokenizer, settings, device)
    config = replace(config, **asdict(settings))        # said now, else said in training
    examples = held_out(config, tokenizer, template)
    if examples.largest_id >= shape.vocab_size:
        raise ValueError(f"the rows hold token id {examples.largest_id}, and the model knows ids 0 to "
                         f"{shape.vocab_size - 1}: is the tokenizer in {tokenizer.source} that of another model?")
    prompts = prompts_of(read_rows(config), config, tokenizer, template) if wants_answers(config) else []
    sampling = Sampling(*(getattr(config, name) for name in asdict(Sampling())))
    words, called = pick_words()
    print_pairs("measured", {
        "template": f"{template.name} ({origin or why})", "loss": f"of {len(examples):,} examples",
        "answers": f"to {len(prompts):,} prompts, {in_words(sampling, config)}" if prompts else "none",
        **({"scores": f"by {called}"} if prompts else {})})

    # ---- measure
    output.mkdir(parents=True, exist_ok=True)
    for side in sides:
        measure(side, config, tokenizer, examples, prompts, stop_ids, sampling, device)
        side.scores = [score(tokenizer.decode(answer, skip_special_tokens=True),
                             tokenizer.decode(label, skip_special_tokens=True), words)
                       for answer, (_, label) in zip(side.answers, prompts)]
        if prompts:
            side.results |= {f"predict_{name}": value for name, value in means(side.scores).items()}
            side.results |= {"predict_words": called} if called.startswith("plain") else {}
        write_files(output, side, config, tokenizer, prompts, first=side is sides[0])

    # ---- the table
    write_json(output / "comparison.json", {side.name: side.results for side in sides})
    columns = {"rm": TOLD_OF_REWARDS, "dpo": TOLD_OF_PAIRS, "kto": TOLD_OF_PAIRS}.get(config.stage, TOLD)
    columns = columns | ({name: f"predict_{name}" for name in NAMES} if prompts else {})
    print()
    print(table(["", *columns], [[side.name, *(in_digits(side.results.get(key)) for key in columns.values())]
                                 for side in sides]))
    others = [side for side in sides[1:] if side.name == "base" and (side.losses or prompts)]
    for text in changed_most(sides[0], others[0], examples, prompts, tokenizer) if others else []:
        print(text)
    for path in output.glob(progress_name("*")):        # all is done: the next run begins anew
        path.unlink()
    print(f"\nwritten to {output}: {', '.join(files_of(sides[0], bool(prompts)))}, comparison.json")


def check(config):
    """Raises ValueError for a config that says too little."""
    if config.task:
        return
    if not config.output_dir:
        raise ValueError(f"{config.source}: eval.py writes its files into output_dir; set it")
    if not config.eval_dataset and not config.dataset:
        raise ValueError(f"{config.source}: there are no rows to measure on; set eval_dataset")


# ---- which models, which rows -----------------------------------------------------------------------------------


def sides_of(config, base: Path, adapters: list) -> list[Side]:
    """What is measured: the tuned model, and with `compare` its base and the merged model in export_dir. A reward model
    has no base to be compared with: its value head came about in training."""
    began = find_checkpoint(config.model_name_or_path, config.model_revision, config.cache_dir)
    tuned = Side("adapter" if adapters else "base" if base == began else "tuned", base, adapters)
    sides = [tuned]
    if config.stage == "rm":
        return sides
    if config.compare and tuned.name != "base":
        sides.append(Side("base", began, []))
    if config.compare and config.export_dir and (Path(config.export_dir) / "config.json").is_file():
        sides.append(Side("merged", Path(config.export_dir), []))
    for side in sides:
        if config.ref_model:
            found = [find_checkpoint(name, cache_dir=config.cache_dir)
                     for name in (config.ref_model, *(config.ref_model_adapters or []))]
            side.reference = (found[0], found[1:])
        elif not side.adapters and side.name != "base":
            side.reference = (began, [])
    return sides


def wants_answers(config) -> bool:
    """Answers are given if they are asked for, or nothing is; the loss is told anyway. Running text asks for none, and
    a reward model gives none."""
    asked = {"do_eval", "do_predict", "predict_with_generate"} & set(config.given)
    return config.stage not in ("pt", "rm") and (config.do_predict or config.predict_with_generate or not asked)


def held_out(config, tokenizer, template):
    """The examples to measure the loss on, encoded as in training."""
    if config.eval_dataset:
        config = replace(config, dataset=config.eval_dataset, eval_dataset=None, val_size=0.0)
    elif not config.val_size:
        print("  note: measured are the rows of `dataset`. For a model trained on them the figures tell what it "
              "remembers; eval_dataset or val_size holds some out")
    train, held, counts = load_examples(config, tokenizer, template)        # what training keeps on disk stays as it is
    split = "eval" if config.val_size else "train"
    counts.datasets = {("rows of", name): found for (of, name), found in counts.datasets.items() if of == split}
    counts.examples = {"measured": len(held or train)}
    print_counts(counts)
    return held if config.val_size else train


def read_rows(config):
    """The rows to answer: those of held_out, before they were encoded."""
    sampler = np.random.RandomState(config.seed)
    rows = rows_of(find_sources(config.eval_dataset or config.dataset, config, []), config, sampler, [])
    return split_rows(rows, config.val_size, config.seed)[1] if config.val_size and not config.eval_dataset else rows


def prompts_of(rows, config, tokenizer, template) -> list[tuple[list, list]]:
    """(ids of the prompt, ids of the answer it should get) of each row; the two share cutoff_len as in training."""
    part, found = Encoded(), []
    for row in rows:
        conversation = conversation_of(row, config, part)
        if conversation is None or conversation.desired is False:       # to an answer judged bad none should come close
            continue
        try:
            prompt, answer = encode_prompt(template, tokenizer, *conversation[:3], settings=settings_of(config))
        except ValueError as error:                     # a tool call or a tool description that cannot be read
            part.reject(row, error)
            continue
        answer = answer + [tokenizer.eos_id] * template.efficient_eos
        keep_prompt, keep_answer = cut_pair(len(prompt), len(answer), config.cutoff_len)
        found.append((prompt[:keep_prompt], answer[:keep_answer]))
    if part.bad and not config.skip_bad_rows:
        refuse(part.bad)
    return found


def own_ends(base: Path) -> set[int]:
    """The ends of an answer that the checkpoint was made with."""
    ends = read_json(base / "generation_config.json").get("eos_token_id")
    return set(ends) if isinstance(ends, list) else {ends} - {None}


# ---- one model --------------------------------------------------------------------------------------------------


def form_of(side: Side, config):
    """What its weights are quantised to on load, or None; a merged model is one in 16 bits."""
    return None if side.name == "merged" else form_asked(config)


def load(side: Side, config, device):
    """The model of one side, adapters apart, with the kernels of this machine."""
    print(f"\n{side.name}", flush=True)
    dtype = pick_dtype(config, read_config_json(side.base), device)
    model = load_with_adapters(side.base, side.adapters, dtype, device, form=form_of(side, config))
    dtype = model.model.embed_tokens.weight.dtype
    choice = pick_kernel(config.flash_attn, device=device, dtype=dtype, training=False, **attention_needs(model.config))
    model.kernel, model.product = choice.kernel, pick_product(device, dtype).taken
    return model


def measure(side: Side, config, tokenizer, examples, prompts, stop_ids, sampling, device):
    """Load one model, and fill in its losses and answers. It is gone when this returns."""
    with explained_out_of_memory(device):
        begun = time.time()
        model = load(side, config, device)
        prepared = time.time() - begun
        if config.stage in ("sft", "pt"):
            metrics, side.losses = measure_loss(config, model, examples, device)
        else:
            metrics = measure_objective(config, side, model, examples, device)
        side.results |= metrics | {"eval_model_preparation_time": round(prepared, 4)}
        if not prompts:
            return
        begun = time.time()
        if config.fast_chat:                            # the loss is that of adapter and base apart, as in training
            merge_adapters(model, quantised=False)
        model.product = "plain"
        lines = prepare(model, available_bytes(device), config.per_device_eval_batch_size) if config.fast_chat else []
        print("  " + "\n  ".join([*lines, f"kernel    {model.kernel}"]), flush=True)
        prepared += time.time() - begun
        form = form_of(side, config)
        key = run_key(side, config, prompts, stop_ids, sampling, model.model.embed_tokens.weight.dtype)
        key |= {"form": str(form)} if form else {}
        side.answers, seconds = predict(side, config, model, prompts, stop_ids, sampling, key)
    steps = math.ceil(len(prompts) / config.per_device_eval_batch_size)
    side.results |= {"predict_model_preparation_time": round(prepared, 4), "predict_runtime": round(seconds, 4),
                     "predict_samples_per_second": round(len(prompts) / seconds, 3),
                     "predict_steps_per_second": round(steps / seconds, 3)}


# ---- multiple choice --------------------------------------------------------------------------------------------


def measure_choices(config, sides: list[Side], template, tokenizer, settings, device):
    """Accuracy of each model on the questions of `task`; results.json and results.log into save_dir, or output_dir."""
    folder = Path(config.save_dir or config.output_dir) if config.save_dir or config.output_dir else None
    if config.save_dir and folder.exists():
        raise ValueError(f"save_dir: {folder} exists already; name another one")
    subjects = find_subjects(config.task, config.task_dir)
    lone = [subject.name for subject in subjects if len(subject.shots) < config.n_shot]
    print_pairs("questions", {
        "task": f"{config.task}: {sum(len(subject.questions) for subject in subjects):,} in {len(subjects)} subjects",
        "examples": f"{config.n_shot} each" + (f"; fewer in {len(lone)} subjects, such as {lone[0]}" if lone else ""),
        "template": template.name})
    found, chosen = {}, {}
    for side in sides:
        with explained_out_of_memory(device):
            model, said = load(side, config, device), {}
            for subject in tqdm(subjects, desc="subjects", leave=False, disable=bool(config.disable_tqdm) or None):
                said[subject.name], cut = answers_of(model, subject, config, template, tokenizer, settings)
                if cut:
                    tqdm.write(f"  {subject.name}: examples left out of {cut} questions, to fit the model's context")
        found[side.name], chosen[side.name] = accuracies(subjects, said), said
        del model
    text = table(["percent right", *found],
                 [[name, *(f"{of[name]:.2f}" for of in found.values())] for name in found[sides[0].name]])
    print(f"\n{text}")
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "results.json", {name: {str(i): letter for i, letter in enumerate(letters)}
                                             for name, letters in chosen[sides[0].name].items()})
        write_json(folder / "accuracy.json", found)
        (folder / "results.log").write_text(text + "\n", encoding="utf-8")
        print(f"\nwritten to {folder}: results.json, accuracy.json, results.log")


# ---- what is told -----------------------------------------------------------------------------------------------


def files_of(side: Side, answered: bool) -> list[str]:
    return ["eval_results.json", *(["generated_predictions.jsonl", "predict_results.json"] if answered else [])]


def write_files(output: Path, side: Side, config, tokenizer, prompts, first: bool):
    """The files LLaMA-Factory writes; of what the first model is compared with, the answers alone."""
    predictions = output / ("generated_predictions.jsonl" if first else f"generated_predictions.{side.name}.jsonl")
    if prompts:
        with open(predictions, "w", encoding="utf-8") as file:
            for answer, (prompt, label) in zip(side.answers, prompts):
                row = {"prompt": tokenizer.decode(prompt)}
                row |= {name: tokenizer.decode(ids, config.skip_special_tokens)
                        for name, ids in (("predict", answer), ("label", label))}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    if not first:
        return
    for kind in ("eval", "predict"):
        if found := {key: value for key, value in sorted(side.results.items()) if key.startswith(f"{kind}_")}:
            write_json(output / f"{kind}_results.json", found)
    write_json(output / "all_results.json", read_json(output / "all_results.json") | side.results)


def changed_most(tuned: Side, base: Side, examples, prompts, tokenizer) -> list[str]:
    """The rows whose scores, or where there are no answers losses, differ most between the two, side by side."""
    if prompts:
        change = [sum(a[name] - b[name] for name in NAMES) / len(NAMES) for a, b in zip(tuned.scores, base.scores)]
    else:
        change = [b - a for a, b in zip(tuned.losses, base.losses)]
    order = sorted((i for i in range(len(change)) if abs(change[i]) > 0), key=lambda i: -abs(change[i]))[:SHOWN]
    better, worse = sum(value > 0 for value in change), sum(value < 0 for value in change)
    texts = [f"\n{tuned.name} against base: {better} rows better, {worse} worse, {len(change) - better - worse} alike"
             + (". Those that changed most:" if order else "")]
    for i in order:
        if prompts:
            said = {"prompt": prompts[i][0], "label": prompts[i][1], base.name: base.answers[i],
                    tuned.name: tuned.answers[i]}
            marks = {side.name: f" (mean of the scores {sum(side.scores[i].values()) / len(NAMES):.1f})"
                     for side in (tuned, base)}
            texts.append(f"\nrow {i + 1}")
            texts += [f"  {name:8}{one_line(tokenizer.decode(ids, name != 'prompt'))}{marks.get(name, '')}"
                      for name, ids in said.items()]
        else:
            texts.append(f"  example {i + 1}: loss {base.losses[i]:.4f} -> {tuned.losses[i]:.4f}   "
                         f"{one_line(tokenizer.decode(examples[i].input_ids.tolist()))}")
    return texts


def one_line(text: str, limit: int = 300) -> str:
    shown = text if len(text) <= limit else f"{text[:limit // 2]} … {text[-limit // 2:]}"
    return shown.replace("\n", "\\n")


def in_digits(value) -> str:
    return "" if value is None else f"{value:.4g}"


def in_words(sampling: Sampling, config) -> str:
    """How the answers are chosen."""
    length = f"at most {config.max_new_tokens} tokens" if config.max_new_tokens else \
        f"to {config.max_length} tokens with the prompt"
    if sampling.greedy:
        return f"the likeliest tokens, {length}"
    changed = ", ".join(f"{name} {value}" for name, value in asdict(sampling).items() if name != "do_sample")
    return f"drawn ({changed}; seed {config.seed}), {length}"


if __name__ == "__main__":
    run(main)
