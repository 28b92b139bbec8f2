"""Fine-tune a language model: LoRA beside frozen weights, or all weights. One run, top to bottom.

    python train.py --config configs/tiny_lora_sft.yaml
    python train.py --config my.yaml learning_rate=2e-4 max_steps=20
    torchrun --nproc-per-node 8 train.py --config my.yaml

config → tokenizer and template → data → model and adapters → optimizer → resume → loop → save.

One loop serves all stages. `stage` is looked up in two places: how rows make a batch (data.COLLATE), and which objective
scores it (objective_for, below).

Read before: README.md, for the order of the files. Read after: data.py (what a batch is), model.py, lora.py, losses.py,
preference.py.
Papers: LoRA arXiv:2106.09685, AdamW arXiv:1711.05101; the step's loss is a sum over tokens counted beforehand
(losses.py), so it does not depend on how the step is cut into micro-batches.
"""
import itertools
import math
import os
import shlex
import sys
import time
import zlib
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from config import as_dict, has_reference, ignored_keys, in_steps, load_config, non_default, run

if __name__ == "__main__":
    run(lambda argv: load_config(argv, "train"))                # --help and mistakes do not wait for torch
if os.environ.get("RANK", "0") != "0":
    os.environ["TQDM_DISABLE"] = "1"                            # one rank draws bars; tqdm reads this when imported
from attention import pick_device, pick_kernel          # before torch: see guard_amdsmi there
import torch
from tqdm import tqdm

from checkpoint import (DTYPES, adapter_tensors, find_checkpoint, folded_under, into_folder, load_adapter, load_model,
                        load_training_state, new_folder, open_tensors, packed_weights, read_adapter_config, rng_state,
                        save_adapter, save_converted, save_model, save_pissa_start, save_training_state, stored_as,
                        tensor_files, whole, write_checksums, write_json)
from data import (COLLATE, budget_batches, epoch_order, evened, joined, kept_in, load_examples, micro_batches, on_device,
                  print_counts, print_row)
from families import model_config, read_config_json
from fp8 import pick_fp8, to_fp8, with_compiled_rounding
from generate import context_length
from linear import PRODUCTS, pick_product, torch_product
from lora import LoRAConfig, LoRALinear, attach_lora, lora_layers, merge_adapters, row_lengths, trainable, unfreeze
from losses import balance_loss, cross_entropy_sum
from model import LENGTH_DEPENDENT, CausalLM, attention_needs, compile_steps, init_weights, pick_compile
from optim import LossScale, add_neftune, make_optimizer, schedule, set_rates, warmup_steps
from parallel import Gradients, Ranks, end_ranks, start_ranks
from preference import AS_SIGMOID, Objective, logged, objective_of, value_head
from plan import SPARE, in_words, largest_rows, lightest, memory_plan, plan_lines
from quant import (EmbeddingOutside, compile_unpacking, count, embedding_may_stay_outside, empty_quantised, form_asked,
                   in_words as quantised_in_words, quantised_weights)
from report import RunLog, eval_metrics, model_card, plot_losses, print_pairs, trainer_state, versions
from resume import (STOPPED, StopSigns, changed_settings, check_rows, find_resume, note_stop, prepare_output,
                    remove_old_checkpoints, room_for, usable_best)
from room import advice, available_bytes, explain_oom, out_of_memory
from shard import CutGradients, cut, empty_model, fill, idle_batches, is_cut, print_shards, rows_of, take_part
from speed import Pace, StepProfile, forward_flops, matmul_parameters, part, speed_results, training_flops
from templates import check_template, choose_template, fit_tokenizer, stored_template, written_template
from tokenizer import load_tokenizer
from trackers import open_trackers, wanted_trackers

MOST_SKIPPED = 3                # so many steps in a row without a finite loss and gradient end the run
ENOUGH_TOKENS = {"cuda": 16_384, "mps": 2_048, "cpu": 256}    # in one pass: more make a device little faster


def main(argv):
    begun = time.time()
    config = load_config(argv, "train")
    device = pick_device(config.use_cpu)
    check_dtype(config, device)
    ranks = start_ranks(device, config.ddp_timeout)
    if not ranks.main:                              # one rank prints and writes
        sys.stdout = open(os.devnull, "w")
    resume = ranks.from_main(lambda: find_resume(config))
    wanted_trackers(config)                         # one that is not installed ends the run now, not after the data
    torch.manual_seed(config.seed + ranks.rank)     # dropout; all else has generators of its own

    # ---- tokenizer, chat format, data
    with ranks.one_per_host_first():
        base = find_checkpoint(config.model_name_or_path, config.model_revision, config.cache_dir)
        adapters = [find_checkpoint(name, cache_dir=config.cache_dir) for name in config.adapter_name_or_path or []]
    shape = model_config(read_config_json(base), f"{base}/config.json")
    forms = forms_of_base(config, base, adapters)
    tokenizer = load_tokenizer(base, config.split_special_tokens)
    name, force = stored_template([resume] if resume else adapters, config.template, config.force_template)
    template, why = choose_template(name, tokenizer, shape.model_type, force)
    remarks = check_template(template, tokenizer) if config.stage != "pt" else []       # before the latter is changed
    fit_tokenizer(template, tokenizer, embedding_rows=shape.vocab_size)
    settings = {**as_dict(config), "template": written_template(template), "versions": versions()}
    print_pairs("settings that differ from the defaults", non_default(config))
    if ignored := ignored_keys(config):
        print(f"  accepted, no effect here: {', '.join(ignored)}")
    if resume and (changed := changed_settings(resume, settings, config.force_resume)):
        print_pairs(f"settings changed since {resume}", changed)
    print_pairs("environment", {**versions(), "device": device_name(device), "template": f"{template.name} ({why})"})
    for note in [*shape.notes, *(f"template {template.name}: {remark}" for remark in remarks)]:
        print(f"  note: {note}")
    with ranks.one_per_host_first():                # it tokenises; the others find what it has written
        train_set, eval_set, counts = load_examples(config, tokenizer, template, folder=kept_in(config),
                                                    writes=ranks.local_rank == 0)
    print_counts(counts)
    if eval_set and not config.do_eval:
        print(f"  note: the {len(eval_set)} rows for evaluation are not used; eval_strategy: epoch would use them")
    check_examples([train_set, eval_set], shape, tokenizer)
    print_row(tokenizer, train_set[0], config.stage, "first example")
    if config.stage == "dpo" and config.pref_loss in AS_SIGMOID and not config.paper_losses:
        print(f"  note: pref_loss: {config.pref_loss} is computed as LLaMA-Factory 0.9.5 does, with the loss of sigmoid; "
              "paper_losses: true takes that of its paper")

    # ---- the plan: steps and memory, before anything is loaded
    per_epoch = steps_per_epoch(config, train_set, ranks)
    if per_epoch == 0:
        raise ValueError(f"{len(train_set)} rows make no batch of {config.per_device_train_batch_size} "
                         "(dataloader_drop_last: true leaves out the incomplete one)")
    total_steps = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * per_epoch)
    factor = schedule(config, total_steps)
    dtype = compute_dtype(config, base, shape, forms)
    choice = pick_kernel(config.flash_attn, device=device, dtype=dtype, **attention_needs(shape))
    products = pick_product(device, dtype)
    compiled, compile_line = pick_compile(config.torch_compile, device, dtype, shape.hidden_act)
    fp8, fp8_line = pick_fp8(device, dtype) if config.base_precision else (None, None)
    dealt = (batch for epoch in range(math.ceil(total_steps / per_epoch))
             for batch in batches_of(config, train_set, epoch, Ranks()))
    adapted = lora_settings(config, adapters, resume)
    memory = memory_plan(config, shape, adapted, largest_rows(train_set, dealt),
                         dtype, choice.kernel, device, ranks.world, sharded=bool(config.fsdp) and ranks.world > 1,
                         fast=True, fp8=bool(config.base_precision), forms=forms,
                         beside=reference_bytes(config, adapted, shape, dtype, forms))
    there_is = available_bytes(device, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    there_is = min(map(int, ranks.gather(torch.tensor([there_is or 0])))) or None       # blocks do the same on all ranks
    balance = (config.moe_aux_loss_coef or shape.router_aux_loss_coef) if config.stage in ("sft", "pt") else 0.0
    at_once, memory = tokens_at_once(config, memory, there_is, device, balance)
    print_pairs("plan", plan(config, memory, dtype, train_set, per_epoch, total_steps, ranks, at_once))
    print("\n".join([*choice.lines, *products.lines, compile_line, *filter(None, [fp8_line]), "",
                     *plan_lines(memory, there_is)]))
    for line in advice(memory, there_is, config):
        print(f"  would fit: {line}")
    sys.stdout.flush()
    if config.dry_run:
        end_ranks()
        return print("\ndry_run: nothing was loaded, nothing written")

    # ---- model, adapters
    with memory_advice(memory, there_is, config):
        model, lora = build_model(config, base, adapters, device, resume, ranks)
        reference = build_reference(config, base, adapters, device, ranks, lora)
        head = value_head(config, shape, base, adapters, device, resume) if config.stage == "rm" else None
        objective = objective_for(config, reference, head, balance)
    weights = trainable(model) | (head.weights() if head else {})
    sharded = any(map(is_cut, model.parameters()))
    counted = matmul_parameters(model)
    asked = sum(matmul_parameters(reference)) if reference else counted[0] if has_reference(config) else 0
    flops_of = partial(flops_of_batch, shape, *counted, asked)
    in_parts = sharded and not lora                 # what learns is cut, too
    if config.fsdp:
        print_shards(model, ranks)
    model.recompute = memory.asked["recompute"]
    if embedding_may_stay_outside(model, device, model.recompute):
        model.model.embed_tokens = EmbeddingOutside(model.model.embed_tokens)
        print("embedding: in the machine's memory, its rows are sent when they are read")
    # no cache: it would hold 16-bit copies of all matrices through the forward pass
    held = {p.dtype for p in ([model.model.embed_tokens.weight] if lora else model.parameters())}   # adapters see to it
    autocast = torch.autocast(device.type, dtype, cache_enabled=False) if held != {dtype} else nullcontext()
    current = []                                    # the batch that is computed on, for NEFTune
    if config.neftune_noise_alpha:
        add_neftune(model.model.embed_tokens, config.neftune_noise_alpha, lambda: current[0].layout.cu_seqlens.diff())

    # ---- optimizer and the plan of steps
    gradients = CutGradients(model, weights, ranks) if in_parts else Gradients(list(weights.values()), ranks)
    learnt = gradients.parts if in_parts else weights
    optimizer = make_optimizer(learnt, config, next(iter(learnt.values())).device)
    scale = LossScale() if dtype == torch.float16 else None

    # ---- where to begin
    output = Path(config.output_dir)
    state = {"step": 0, "epoch": 0.0, "kernel": ranks.from_main(lambda: choice.kernel),
             "product": ranks.from_main(lambda: products.taken), "compiled": ranks.from_main(lambda: compiled),
             "loss_total": 0.0, "tokens_seen": 0, "window": [0.0, 0], "seen": {}, "lowest": None, "waited": 0, "best": None,
             "history": [], "skipped": 0, "rows_per_step": rows_per_step(config, ranks), "rows": train_set.sign, "at_once": at_once}
    # window: loss and steps since the last logged line; seen: what else is logged of them; lowest: eval_loss; best: [step, eval_loss] of a checkpoint
    names = optimizer_names(optimizer, learnt)
    if resume:
        saved = load_training_state(resume, optimizer, names, ranks.rank,
                                    {name: (p.shape, rows_of(p)) for name, p in weights.items()})
        state = taken_up(config, resume, saved, state, total_steps, ranks)
        if scale and "loss_scale" in state:
            scale.value, scale.good_steps = state["loss_scale"]
        state["best"] = ranks.from_main(lambda: usable_best(output, state["best"]))
        print(f"resumed from {resume}, step {state['step']} of {total_steps}", flush=True)
    # ranks, and a run and its continuation, compute alike: two kernels, or products, differ in the last bit
    model.kernel = state["kernel"] if state["kernel"] in choice.timings else choice.kernel
    model.product = state["product"] if state["product"] in products.rates else products.taken
    for other in filter(None, [reference]):
        other.kernel, other.product = model.kernel, model.product
    if state["compiled"] and compiled:
        for one in filter(None, [model, reference]):
            compile_steps(one)
        fp8 = fp8 and with_compiled_rounding(fp8)
        if device.type == "cuda" and (line := compile_unpacking(model)):        # on a CPU it is slower than without
            print(line)
    if fp8:
        to_fp8([layer for layer in lora_layers(model).values() if isinstance(layer, LoRALinear)], fp8)
    same_everywhere(ranks, weights, state["rows"])
    if ranks.main:
        prepare_output(config, resume, weights)
        write_json(output / "train_config.json", settings)
        if lora and lora.pissa and not resume:
            save_pissa_start(model, output / "pissa_init", lora, config.model_name_or_path)
    log = RunLog(output, total_steps, state["step"], state.pop("history"), disabled=bool(config.disable_tqdm),
                 writes=ranks.main, trackers=open_trackers(config, settings, state["step"]) if ranks.main else [])
    log_every, save_every = in_steps(config.logging_steps, total_steps), in_steps(config.save_steps, total_steps)
    eval_every = in_steps(config.eval_steps, total_steps) if config.eval_steps else 0
    started, pace = time.time(), Pace()
    first_step, (window_loss, window_steps), window_seen = state["step"], state["window"], state["seen"]
    stop, skipped = StopSigns(config.time_limit, begun), 0                        # skipped: steps in a row

    def save(step, epoch, stateful=not config.save_only_model):
        rng = {f"{device}.{rank}": state for device, mine in rng_state().items()
               for rank, state in enumerate(ranks.gather(mine))}
        if not ranks.main:
            if in_parts:
                take_part(model, optimizer if stateful else None, names, gradients)
            return
        room_for(output, sum(p.nbytes for p in weights.values()) * (3 if stateful else 1), f"checkpoint-{step}")
        with new_folder(output / f"checkpoint-{step}") as folder:
            save_weights(config, model, lora, folder, base, tokenizer, settings, head)
            if stateful:
                kept = state | {"window": [window_loss, window_steps], "seen": window_seen}
                kept |= ({"loss_scale": [scale.value, scale.good_steps]} if scale else {})
                save_training_state(folder, optimizer, names, trainer_state(config, log, step, epoch, resume=kept), rng,
                                    **({"whole": gradients.whole} if in_parts else {}))
            write_checksums(folder)
        remove_old_checkpoints(config, output, state["best"])

    # ---- the loop
    model.train()
    profile = StepProfile(output if config.profile and ranks.main else None, device)
    steps = steps_of(config, train_set, device, ranks, range(first_step + 1, total_steps + 1), per_epoch,
                     state["at_once"], sharded, flops_of)
    ahead = next(steps, None)
    while ahead:
        this, step = ahead, ahead.number
        if config.early_stopping_steps and state["waited"] >= config.early_stopping_steps:
            tqdm.write(f"{step - 1:>7} stopped early: eval_loss has not improved for {state['waited']} evaluations")
            break
        profile.step(step - first_step, total_steps - first_step)
        rate = set_rates(optimizer, factor(step - 1))
        if step == first_step + 1 and dtype != torch.float32 and this.passes:
            check_first_batch(model, this.passes[0], device, autocast, objective)
        pace.begin()
        loss, seen = torch.zeros((), device=device), objective.nothing_seen(device)
        gradients.clear()
        with memory_advice(memory, there_is, config):
            with autocast, part("reference"):
                told = objective.ask(model, this.passes, ranks)
            for number, (batch, known) in enumerate(zip(this.passes, told), 1):
                current[:] = [batch]
                if number == len(this.passes) and not sharded:  # gathering comes between, in one order on all ranks
                    gradients.send_early()
                with autocast, part("forward"):
                    loss_sum, routing, shown = batch_loss(model, batch, device, objective, known)
                    micro_loss = loss_sum / this.n_items + routing      # the latter undivided, as LLaMA-Factory has it
                with part("backward"):
                    (micro_loss * scale.value if scale else micro_loss).backward()
                loss += micro_loss.detach()
                seen = {name: total + shown[name] for name, total in seen.items()}
                if number == this.idle:
                    gradients.forget_use()
            with part("communication"):
                gradients.sum()
            with part("optimizer"):
                if scale:
                    scale.unscale(learnt.values())
                grad_norm = gradients.clip(config.max_grad_norm or math.inf)
        with part("data"):                              # a GPU is still at work: meanwhile the next rows are sent to it
            ahead = next(steps, None)
        asked = stop.asked()
        with part("waiting"):                           # for the device: here, and only here
            loss, grad_norm, stops, seen = ranks.read(loss, grad_norm, bool(asked), seen)
        overflow = scale is not None and not scale.update(math.isfinite(grad_norm))
        finite = math.isfinite(loss) and (math.isfinite(grad_norm) or overflow)
        skipped = 0 if finite else skipped + 1
        if not finite:
            tqdm.write(f"{step:>7} skipped: loss {loss}, gradient norm {grad_norm}; nothing is learnt from it. Rows of "
                       f"this step{', on rank 0' if ranks.world > 1 else ''}: {this.rows}")
        elif overflow:
            tqdm.write(f"{step:>7} gradients overflowed in float16; step skipped, loss scale now {scale.value:g}")
        else:
            with memory_advice(memory, there_is, config), part("optimizer"):
                optimizer.step()
        if skipped == MOST_SKIPPED:
            raise ValueError(f"step {step}: loss {loss}, gradient norm {grad_norm}, for the {skipped}rd time in a row. "
                             f"Nothing was learnt from these steps and the checkpoints in {output} are whole. A lower "
                             f"learning_rate (now {rate:.2e}), or bf16 in place of fp16, usually helps")

        # ---- what the step leaves behind
        pace.end(this.tokens, this.flops)
        done = this.epoch
        state.update(step=step, epoch=done, loss_total=state["loss_total"] + (loss if finite else 0.0),
                     tokens_seen=state["tokens_seen"] + int(this.tokens), skipped=state["skipped"] + (not finite))
        if finite:
            window_loss, window_steps = window_loss + loss, window_steps + 1
            window_seen = {name: [a + b for a, b in zip(pair, window_seen.get(name, (0.0, 0.0)))]
                           for name, pair in {**window_seen, **seen}.items()}
        ends_epoch = step % per_epoch == 0 or step == total_steps
        saves = (config.save_strategy == "steps" and (step % save_every == 0 or step == total_steps)
                 or config.save_strategy == "epoch" and ends_epoch)
        log.advance(loss, rate, pace.tokens_per_second)
        if step % log_every == 0 or (step == 1 and config.logging_first_step):
            mean = window_loss / window_steps if window_steps else math.nan
            log.train(step, done, mean, rate, grad_norm, pace.tokens_per_second, state["tokens_seen"], logged(window_seen))
            window_loss, window_steps, window_seen = 0.0, 0, {}
            pace.new_window()
        if eval_set and ((config.eval_strategy == "steps" and step % eval_every == 0)
                         or (config.eval_strategy == "epoch" and ends_epoch)):
            metrics = evaluate(config, model, eval_set, device, autocast, objective, ranks)
            log.eval(step, done, metrics)
            eval_loss = metrics["eval_loss"]
            better = state["lowest"] is None or eval_loss < state["lowest"]
            state["lowest"], state["waited"] = (eval_loss, 0) if better else (state["lowest"], state["waited"] + 1)
            if saves and (state["best"] is None or eval_loss < state["best"][1]):
                state["best"] = [step, eval_loss]
        if saves or stops:
            save(step, done, stateful=not config.save_only_model or stops)
        if stops:
            if ranks.main:
                note_stop(output, asked or "another rank")
            log.close()
            end_ranks()
            print(f"\nstopped by {asked or 'another rank'} after step {step} of {total_steps}, which is saved. "
                  "resume_from_checkpoint: true goes on", file=sys.stderr if ranks.main else sys.stdout, flush=True)
            raise SystemExit(STOPPED)

    # ---- the end: the best or the last weights, results, pictures
    stop.restore()
    profile.finish()
    seconds = time.time() - started
    log.write(state["step"], state["epoch"])
    log.close()
    if config.load_best_model_at_end and (best := ranks.from_main(lambda: usable_best(output, state["best"]))):
        load_best(config, model, weights, output, best, ranks, head)
    results = {"train": train_results(state, first_step, per_epoch, model, train_set, seconds)}
    log.history.append(results["train"] | {"step": state["step"]})
    if eval_set and config.do_eval:
        metrics = evaluate(config, model, eval_set, device, autocast, objective, ranks)
        results["eval"] = {"epoch": state["epoch"], **metrics}
    if not in_parts:
        end_ranks()                                 # the others have nothing left to do
    elif not ranks.main:
        take_part(model, None, names, gradients)
    if not ranks.main:
        return end_ranks()
    remove_old_checkpoints(config, output, state["best"])   # also where the run was killed just before it could
    with into_folder(output) as folder:
        save_weights(config, model, lora, folder, base, tokenizer, settings, head,
                     dtype if config.finetuning_type == "freeze" else None)
    if config.pissa_convert:
        save_converted(model, output / "pissa_converted", lora, config.model_name_or_path)
        write_json(output / "pissa_converted/train_config.json", settings)
    end_ranks()
    results["speed"] = speed_results(pace, device, dtype, ranks.world, PRODUCTS.get(model.product, torch_product))
    write_json(output / "trainer_state.json", trainer_state(config, log, state["step"], state["epoch"]))
    write_results(config, output, results, template.name, log.history)
    print(f"\nsaved to {output}. Next: python chat.py {shlex.join(map(str, argv))}", flush=True)
    if config.do_predict:                           # in place of this process, whose memory is free then
        result = ",".join([*folded_under(output), str(output)])
        more = [f"adapter_name_or_path={result}"] if lora and config.adapter_name_or_path else []
        os.execv(sys.executable, [sys.executable, str(Path(__file__).with_name("eval.py")), *map(str, argv), *more])


# ---- device and data --------------------------------------------------------------------------------------------


def check_dtype(config, device):
    """Refuse a 16-bit dtype that the device cannot compute in, before anything is loaded."""
    if config.fp16 and device.type == "cpu":
        print("note: float16 is slow on a CPU, and this run computes on one; bf16: true or neither is faster")
    if config.bf16 and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(f"bf16: {torch.cuda.get_device_name(device)} has no bfloat16; set fp16: true instead")


def check_examples(splits, shape, tokenizer):
    """Raises ValueError for a token id that the model lacks; prints a note for examples longer than its context."""
    largest = max(examples.largest_id for examples in splits)
    if largest >= shape.vocab_size:
        raise ValueError(f"the data hold token id {largest} ({tokenizer.decode([largest])!r}), and the model knows ids 0 "
                         f"to {shape.vocab_size - 1}: is the tokenizer in {tokenizer.source} that of another model?")
    longest, made_for = max(examples.longest for examples in splits), context_length(shape)
    if longest > made_for:
        print(f"  note: rows have up to {longest:,} tokens, and the model was made for {made_for:,} "
              "(max_position_embeddings)")


def device_name(device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else \
        f"{device} ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)


# ---- model ------------------------------------------------------------------------------------------------------


def build_model(config, base, adapters, device, resume, ranks):
    """The model on its device with what learns unfrozen, and its LoRAConfig (None for full fine-tuning).

    Trained weights are float32. A frozen base takes the dtype of bf16 / fp16, or keeps the checkpoint's.
    """
    sharded = bool(config.fsdp) and ranks.world > 1
    if config.finetuning_type == "freeze":
        return part_that_learns(config, load_model(resume or base, None, device)), None
    if config.finetuning_type == "full":
        if sharded:
            model = empty_model(resume or base, torch.float32).requires_grad_(True)
            cut(model, config.fsdp, ranks, device)
            fill(model, resume or base)
        elif config.train_from_scratch and not resume:
            model = CausalLM(model_config(read_config_json(base)))
            init_weights(model, torch.Generator().manual_seed(config.seed))
            model.to(device)
        else:
            model = load_model(resume or base, torch.bfloat16 if config.pure_bf16 else torch.float32, device)
        model.requires_grad_(True)
        if config.stage == "rm" and model.lm_head.weight is not model.model.embed_tokens.weight:
            model.lm_head.requires_grad_(False)     # nothing is scored over the vocabulary
        return model, None
    half = half_of(config)
    model = empty_model(base, half) if sharded else load_model(base, half, device, form=form_asked(config))
    continued = adapters[-1] if adapters and not config.create_new_adapter else None
    for adapter in adapters[:-1] if continued else adapters:
        if sharded:
            raise ValueError(f"fsdp: {adapter} would have to be folded into weights that are cut; fold it first: "
                             "python merge.py, then take the merged model as model_name_or_path")
        load_adapter(model, adapter)
        merge_adapters(model)
    if resume or continued:
        lora = load_adapter(model, resume or continued, device=device)
        told = {"lora_rank": lora.r, "lora_alpha": lora.lora_alpha, "lora_dropout": lora.lora_dropout, "use_rslora":
                lora.use_rslora, "use_dora": lora.use_dora, "lora_target": lora.target_modules,
                "additional_target": lora.modules_to_save}
        for key, value in told.items():
            given = config.given.get(key)
            if given not in (None, value, ["all"]) and not (isinstance(given, list) and set(given) == set(value)):
                print(f"note: {key} {given} is not used; the adapter has {value}, and goes on with it")
    else:
        lora = lora_settings(config, adapters, resume)
        attach_lora(model, lora, config.seed, called=model.config.stored_name, device=device)
    if sharded:
        cut(model, config.fsdp, ranks, device)
        fill(model, base, trained=not (resume or continued))        # the adapter's file has what learns
        if lora.use_dora and not (resume or continued):
            for layer in lora_layers(model).values():
                layer.lora_magnitude_vector.data.copy_(row_lengths(whole(layer.weight).float()))
    if has_reference(config):                       # dropout would be a difference, too
        for layer in lora_layers(model).values():
            layer.dropout = torch.nn.Identity()
    return model, lora


def half_of(config) -> torch.dtype | None:
    """The 16-bit dtype that the config asks for, or None."""
    return torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else None


def part_that_learns(config, model):
    """The model with what finetuning_type: freeze trains unfrozen, in float32, and the rest in 16 bits if asked."""
    unfreeze(model, config.freeze_trainable_layers, config.freeze_trainable_modules, config.freeze_extra_modules or [],
             model.config.stored_name)
    half = half_of(config) or torch.float32
    for p in model.parameters():
        p.data = p.data.to(torch.float32 if p.requires_grad and not config.pure_bf16 else half)
    return model


def needs_copy(config, lora) -> bool:
    """Does this run compare with a second model? Not where the one that learns serves, its adapters off: then these, and
    no weights of the base, must be all that learns."""
    return has_reference(config) and bool(config.ref_model or not lora or lora.modules_to_save)


def reference_bytes(config, lora, shape, dtype, forms) -> int:
    """What build_reference will take."""
    if not needs_copy(config, lora):
        return 0
    if config.ref_model:
        folder = find_checkpoint(config.ref_model, cache_dir=config.cache_dir)
        shape, forms = model_config(read_config_json(folder), f"{folder}/config.json"), {}
    with torch.device("meta"):
        model = empty_quantised(CausalLM(shape), forms)
    return sum(p.numel() * dtype.itemsize for p in model.parameters()) + sum(
        weight.nbytes for weight in quantised_weights(model).values())


def build_reference(config, base, adapters, device, ranks, lora):
    """The second model of stages dpo and kto, which does not learn; None: see needs_copy."""
    if not needs_copy(config, lora):
        return None
    half = half_of(config) or (torch.bfloat16 if config.pure_bf16 else None if lora else torch.float32)
    folder, folded = base, [] if not lora else adapters if config.create_new_adapter else adapters[:-1]
    if config.ref_model:
        folder = find_checkpoint(config.ref_model, cache_dir=config.cache_dir)
        folded = [find_checkpoint(name, cache_dir=config.cache_dir) for name in config.ref_model_adapters or []]
    if config.fsdp and ranks.world > 1:
        if folded:
            raise ValueError("fsdp: the reference model's adapters would have to be folded into weights that are cut; "
                             "fold them first: python merge.py, then take the merged model as ref_model")
        reference = empty_model(folder, half)
        cut(reference.requires_grad_(False), config.fsdp, ranks, device)
        fill(reference, folder)
    else:
        reference = load_model(folder, half, device, form=None if config.ref_model else form_asked(config))
        for adapter in folded:
            load_adapter(reference, adapter)
            merge_adapters(reference)
    return reference.requires_grad_(False)


def objective_for(config, reference, head, balance: float) -> Objective:
    """The second place where `stage` is looked up: which objective scores a batch."""
    if config.stage in ("sft", "pt"):
        return Objective(partial(score_tokens, balance))
    return objective_of(config, reference, head)


def lora_settings(config, adapters, resume) -> LoRAConfig | None:
    """What is adapted in this run, or None for full fine-tuning."""
    if config.finetuning_type != "lora":
        return None
    continued = resume or (adapters[-1] if adapters and not config.create_new_adapter else None)
    if continued:
        return read_adapter_config(continued)[0]
    pissa = f"pissa_niter_{config.pissa_iter}" if config.pissa_iter >= 0 else "pissa"
    return LoRAConfig(config.lora_rank, config.lora_alpha, config.lora_dropout, config.use_rslora, config.use_dora,
                      config.lora_target, config.additional_target or [],
                      init_lora_weights=pissa if config.pissa_init else True)


@contextmanager
def memory_advice(memory, there_is, config):
    """If memory runs out in this block, say what would fit."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise ValueError(explain_oom(error, memory, there_is, config)) from None


def forms_of_base(config, base, adapters) -> dict:
    """{name of a weight: Form} of what is in 4 or 8 bits, in the files or by quantization_bit. Raises ValueError for
    what cannot be done with such a base; says what is not quantised and might be expected to be."""
    skeleton = load_model(base, skip_weights=True, form=form_asked(config))
    forms = {name: weight.form for name, weight in quantised_weights(skeleton).items()}
    if not forms:
        return {}
    if config.finetuning_type != "lora" or config.fsdp or config.base_precision:
        raise ValueError(f"{base} holds weights in 4 or 8 bits ({quantised_in_words(forms.values())}): only adapters "
                         "learn beside them (finetuning_type: lora), without fsdp and base_precision")
    if adapters and (len(adapters) > 1 or config.create_new_adapter):
        raise ValueError("adapter_name_or_path: a base in 4 or 8 bits takes one adapter in training, and goes on with "
                         "it; folding others in would round them to so few bits. Fold them first: python merge.py "
                         "writes a 16-bit model, which quantization_bit: 4 trains upon")
    if packed_weights(base) and config.quantization_bit:
        print(f"  note: quantization_bit: {config.quantization_bit} changes nothing, the files are quantised already")
    if stacks := sum(p.numel() for p in skeleton.parameters() if p.dim() == 3):
        print(f"  note: stacked experts are not quantised: {stacks:,} of the parameters stay in 16 or 32 bits")
    return forms


def compute_dtype(config, base, shape, forms) -> torch.dtype:
    """What products are computed in: bf16 / fp16 if asked, else the dtype of the weights; known before they are loaded,
    from their file or, where there is none yet, from config.json."""
    if half_of(config):
        return half_of(config)
    if config.finetuning_type != "lora":
        return torch.float32
    ours = "model.layers.0.self_attn.o_proj.weight"
    name = shape.stored_name(ours)
    try:
        stored = stored_as(tensor_files(base)[name], name)[1]
        return stored if stored.is_floating_point else forms[ours].dtype
    except (FileNotFoundError, KeyError):
        raw = read_config_json(base)
        raw |= raw.get("text_config", {})
        return DTYPES.get(raw.get("dtype") or raw.get("torch_dtype"), torch.float32)


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


def tokens_at_once(config, memory, there_is, device, balance):
    """(how many tokens micro-batches that are computed as one may have together, the plan of memory with such passes).

    A step is the same sum however it is cut (losses.py), but few tokens do not keep a GPU busy. 0: each micro-batch
    alone, as where something is reckoned over a whole micro-batch: the balance of experts, or frequencies that follow
    its longest row. memory: the plan for the largest micro-batch, `there_is`: the bytes for it, or None.
    Passes in which nothing is recomputed come first, then long ones.
    """
    rows, shape, size = memory.asked["rows"], memory.asked["shape"], config.gradient_accumulation_steps
    alone, found = sum(map(sum, rows)), [(0, lightest(memory, there_is, config))]
    if config.join_micro_batches and size > 1 and not balance and shape.rope["rope_type"] not in LENGTH_DEPENDENT:
        limit = min(ENOUGH_TOKENS[device.type], alone * size)
        while limit > alone:
            several = [row for row in rows for _ in range(math.ceil(limit / alone))]    # no pass needs more than these
            joint = lightest(memory_plan(config, **memory.asked | {"rows": several}), there_is, config)
            if there_is is not None and joint.total <= SPARE * there_is:
                found.append((limit, joint))
            limit //= 2
    return max(found, key=lambda one: (set(one[1].asked["recompute"]) == {"nothing"}, one[0]))


def passes_in_words(config, train_set, ranks: Ranks, at_once: int) -> dict:
    """What the start page says of micro-batches that are computed together, looking at the first steps."""
    size, rows = config.gradient_accumulation_steps, batches_of(config, train_set, 0, ranks)[:1000]
    length = train_set.sizes.tolist().__getitem__
    passes = [batch for start in range(0, len(rows), size) for batch in joined(rows[start:start + size], length, at_once)]
    if len(passes) == len(rows):
        return {}
    tokens = sum(map(length, itertools.chain(*rows)))
    return {"passes": f"{len(rows) / len(passes):.1f} micro-batches run as one pass of about "
                      f"{tokens / len(passes):,.0f} tokens, at most {at_once:,} (join_micro_batches: false: each alone)"}


def plan(config, memory, dtype, train_set, per_epoch, total_steps, ranks, at_once) -> dict:
    """The start page's figures; `memory` holds the model without its weights."""
    model = memory.asked["model"]
    trained, total = sum(p.numel() for p in trainable(model).values()), count(model)
    tokens = int(train_set.sizes.sum())
    rows, size = rows_per_step(config, ranks), f"{config.per_device_train_batch_size}"
    if config.token_budget:
        rows, size = round(len(train_set) / per_epoch), f"as many as have {config.token_budget:,} tokens"
    again = rows_twice(config, train_set, ranks)
    base = model.model.embed_tokens.weight.dtype
    forms = [weight.form for weight in quantised_weights(model).values()]
    return {"parameters": f"{trained:,} of {total:,} learn ({100 * trained / total:.4f}%)",
            **({"base": f"{quantised_in_words(forms)}; all else {base}".replace("torch.", "")} if forms else {}),
            "dtype": f"weights {base}, trained ones torch.float32, products {dtype}".replace("torch.", ""),
            "steps": f"{total_steps}, {per_epoch} an epoch, {warmup_steps(config, total_steps)} of warm-up",
            "a step": f"{rows} rows ({size} x {config.gradient_accumulation_steps} x "
                      f"{ranks.world} ranks), about {tokens / len(train_set) * rows:,.0f} tokens",
            **passes_in_words(config, train_set, ranks, at_once),
            **({"ranks": f"{ranks.world}, gradients summed once a step" + (
                f"; {again} rows of an epoch are trained twice, so that all ranks have full batches (even_batches: false "
                "would not)" if again else "")} if ranks.world > 1 else {}),
            "activation checkpointing": in_words(memory.asked["recompute"])}


def total_flos(model, tokens: int) -> float:
    """6 x parameters (without the embedding) x tokens: the convention of total_flos in LLaMA-Factory's results."""
    return 6.0 * (count(model) - model.model.embed_tokens.weight.numel()) * tokens


# ---- one step ---------------------------------------------------------------------------------------------------


def batches_of(config, train_set, epoch, ranks: Ranks) -> list[list[int]]:
    """This rank's micro-batches of an epoch, lists of row numbers, dealt to the ranks in turn: in LLaMA-Factory's order
    or, with token_budget, rows of similar length; then every row comes once, and ranks may have one batch less."""
    seed = config.seed if config.data_seed is None else config.data_seed
    shuffle = not config.disable_shuffling
    if config.token_budget:         # made once, so that all epochs have as many of them; their order is another each time
        batches = budget_batches(epoch_order(len(train_set), seed, 0, shuffle),
                                 train_set.sizes.tolist().__getitem__, config.token_budget, alike=shuffle)
        return [batches[i] for i in epoch_order(len(batches), seed, epoch, shuffle)][ranks.rank::ranks.world]
    order = epoch_order(len(train_set), seed, epoch, shuffle)
    batches = micro_batches(order, config.per_device_train_batch_size, config.dataloader_drop_last)
    if ranks.world > 1 and config.even_batches:
        batches = evened(batches, config.per_device_train_batch_size, ranks.world, config.dataloader_drop_last)
    return batches[ranks.rank::ranks.world]


def rows_twice(config, train_set, ranks: Ranks) -> int:
    """How many rows an epoch has more than there are, on all ranks together."""
    dealt = sum(len(batch) for rank in range(ranks.world)
                for batch in batches_of(config, train_set, 0, Ranks(rank, ranks.world)))
    return max(0, dealt - len(train_set))


def steps_per_epoch(config, train_set, ranks: Ranks) -> int:
    """Optimizer steps of an epoch, the same number on all ranks: rank 0 is dealt the most micro-batches."""
    most = len(batches_of(config, train_set, 0, Ranks(0, ranks.world)))
    return math.ceil(most / config.gradient_accumulation_steps)


def rows_per_step(config, ranks: Ranks) -> int:
    """The rows of an optimizer step, over all ranks; with token_budget, the most tokens of one."""
    size = config.token_budget or config.per_device_train_batch_size
    return size * config.gradient_accumulation_steps * ranks.world


@dataclass
class Step:
    """What this rank learns from in an optimizer step."""
    number: int                 # counted from 1
    epoch: float                # passes over the data when it is done
    rows: list                  # numbers of its examples
    passes: list                # Batches, on the device
    idle: int                   # the first of them have no labels: they keep other ranks company (shard.py)
    n_items: float              # labels, on all ranks together: counted first, divided by once
    tokens: float               # on all ranks together
    flops: float                # the same, as speed.py counts them


def steps_of(config, train_set, device, ranks: Ranks, numbers, per_epoch, at_once, sharded, flops_of):
    """Yields the Steps of these numbers. The loop asks for the next one while the device works at the one before."""
    size, of_epoch, length = config.gradient_accumulation_steps, None, lambda row: int(train_set.sizes[row])
    make = partial(COLLATE[config.stage], alike=bool(config.token_budget))
    for number in numbers:
        epoch, nth = divmod(number - 1, per_epoch)                         # both 0-based
        if epoch != of_epoch:
            batches, of_epoch = batches_of(config, train_set, epoch, ranks), epoch
        micro = batches[nth * size:(nth + 1) * size]
        passes = [make([[train_set[i] for i in rows] for rows in group]) for group in joined(micro, length, at_once)]
        n_items, tokens, flops = ranks.total(*(sum(values) for values in (
            [batch.n_items for batch in passes], [len(batch.targets) for batch in passes],
            [flops_of(batch) for batch in passes])))
        idle = idle_batches(len(passes), make([[train_set[0]]]), ranks) if sharded else []
        yield Step(number, epoch + min(1.0, (nth + 1) * size / max(len(batches), 1)), [i for rows in micro for i in rows],
                   [on_device(batch, device) for batch in idle + passes], len(idle), n_items, tokens, flops)


def flops_of_batch(shape, frozen: float, trained: float, asked: float, batch) -> float:
    """Model FLOPs of a batch: of learning from it and, where a reference with so many weights is asked, of that."""
    flops = training_flops(shape, frozen, trained, batch.lengths)
    if asked:
        flops += forward_flops(shape, asked, batch.lengths)
    if batch.other is not None:
        flops += sum(forward_flops(shape, weights, batch.other.lengths) for weights in (frozen + trained, asked))
    return flops


@torch.no_grad()
def same_everywhere(ranks: Ranks, weights, rows: str):
    """Raises ValueError if ranks start from other weights or other data, as hosts with files of their own may.

    rows: a checksum, see Examples in store.py.
    """
    if ranks.world == 1:
        return
    mine = [float(sum(p.double().abs().sum() for p in weights.values() if not is_cut(p))), zlib.crc32(rows.encode())]
    found = [other.tolist() for other in ranks.gather(torch.tensor(mine, dtype=torch.float64))]
    for what, values in zip(("trained weights", "training rows"), zip(*found)):
        if len(set(values)) > 1:
            raise ValueError(f"the ranks do not have the same {what}. Do all hosts have the same model, adapter and "
                             "data files, and the same release of this program?")


def batch_loss(model, batch, device, objective: Objective, told=None):
    """(sum of the losses of a batch's rows, what is added to it undivided, what is to be logged); see Objective."""
    return objective.score(model, on_device(batch, device), told)


def score_tokens(balance: float, model, batch, told):
    """Stages sft and pt: the sum of the token losses of sequences laid end to end, and what the routing to experts adds."""
    routers = [] if balance and batch.n_items else None         # idle batches (shard.py) have no labels, and add nothing
    hidden = model(batch.input_ids, batch.position_ids, batch.layout, routers=routers)       # (1, N, D)
    with part("loss"):
        loss = cross_entropy_sum(hidden[0], model.head_weight(), batch.targets, model.config.final_softcap,
                                 PRODUCTS.get(model.product, torch_product))
    return loss, balance * balance_loss(routers, model.config.num_experts_per_tok) if routers else 0.0, {}


@torch.no_grad()
def evaluate(config, model, examples, device, autocast, objective: Objective, ranks: Ranks) -> dict:
    """eval_loss as LLaMA-Factory counts it (mean over batches of each batch's mean, all batches alike), what the objective
    has to show, and in stages sft and pt the loss over all tokens alike under its own name, and its perplexity. The ranks
    share the batches; each counts once."""
    model.eval()
    start, size = time.time(), config.per_device_eval_batch_size
    means, total, count, empty, seen = [], 0.0, 0, 0, objective.nothing_seen(device)
    batches, sharded = math.ceil(len(examples) / size), hasattr(model, "reshard")
    # weights that are cut are gathered by all ranks: one that has a batch less than others keeps them company
    rounded = math.ceil(batches / ranks.world) * ranks.world if sharded else batches
    for number in tqdm(range(ranks.rank, rounded, ranks.world), desc="evaluating", leave=False,
                       disable=bool(config.disable_tqdm) or None):
        first = size * min(number, batches - 1)
        batch = on_device(COLLATE[config.stage]([examples[first:first + size]]), device)
        items = batch.n_items if batch.groups else int((batch.targets != -100).sum())
        if items == 0 and not sharded:
            empty += 1
            continue
        with autocast:
            told, = objective.ask(model, [batch], Ranks())
            loss, routing, shown = batch_loss(model, batch, device, objective, told)
        if items == 0 or number >= batches:
            empty += number < batches
            continue
        means.append(float(loss) / items + float(routing))
        total, count = total + float(loss), count + items
        seen = {name: pair + shown[name] for name, pair in seen.items()}
    model.train()
    if sharded:                                     # what the last forward pass has gathered
        model.reshard()
    mean, batches, total, count, empty = ranks.total(math.fsum(means), len(means), total, count, empty)
    if empty:
        tqdm.write(f"evaluation: {empty:.0f} batches without a supervised token were left out")
    metrics = eval_metrics(mean, batches, total, count, len(examples), time.time() - start)
    if objective.shows:                             # the loss is of answers, not of tokens
        del metrics["eval_token_loss"], metrics["eval_perplexity"]
    shown = {name: ranks.total(*pair.tolist()) for name, pair in seen.items()}
    return metrics | {f"eval_{name}": value for name, value in logged(shown).items()}


@torch.no_grad()
def check_first_batch(model, batch, device, autocast, objective: Objective):
    """One forward pass that stops at the first layer whose output is not finite, and says which, and what to do.

    16-bit overflow otherwise shows as a loss of nan thousands of samples later (float16 ends at 65,504).
    """
    largest = {}                                    # the largest |value| each layer put out

    def watch(name):
        def hook(module, args, out):
            if any(a.is_floating_point() and not a.isfinite().all() for a in args if torch.is_tensor(a)):
                block = name.rpartition(".")[0]
                seen = ", ".join(f"{n.rpartition('.')[2]} {v:.3g}" for n, v in largest.items() if n.startswith(block))
                raise ValueError(f"first batch: what enters {name} is not finite, with attention kernel {model.kernel} "
                                 f"in {str(dtype_of(args))} (largest values before it: {seen}). {remedy}")
            if not out.isfinite().all():
                peak = max(float(a.abs().max()) for a in args if torch.is_tensor(a))
                raise ValueError(f"first batch: {name} overflows in {out.dtype} (its input reaches {peak:.3g}). "
                                 f"{remedy}")
            largest[name] = float(out.abs().max())
        return hook

    def dtype_of(args):
        return next(a.dtype for a in args if torch.is_tensor(a))

    remedy = "Train with bf16: true, which has the range of float32, or without fp16"
    watched = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".lora_" not in n]
    hooks = [module.register_forward_hook(watch(name)) for name, module in watched]
    model.eval()                                    # dropout would draw random numbers, and a resumed run differ
    try:
        with autocast:
            batch = on_device(batch, device)
            told, = objective.ask(model, [batch], Ranks())
            loss = float(batch_loss(model, batch, device, objective, told)[0])
    finally:
        for hook in hooks:
            hook.remove()
        model.train()
    if not math.isfinite(loss):
        raise ValueError(f"first batch: the head's scores overflow, the loss is {loss}. {remedy}")


# ---- results and saving -----------------------------------------------------------------------------------------


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


if __name__ == "__main__":
    run(main)
