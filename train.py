"""Fine-tune a language model: LoRA beside frozen weights, or all weights. One run, top to bottom.

    python train.py --config configs/tiny_lora_sft.yaml
    python train.py --config my.yaml learning_rate=2e-4 max_steps=20
    torchrun --nproc-per-node 8 train.py --config my.yaml

config → tokenizer and template → data → model and adapters → optimizer → resume → loop → save.

One loop serves all stages. `stage` is looked up in two places: how rows make a batch (data.COLLATE), and which objective
scores it (objective_for, below).

Read before: README.md, for the order of the files. Read after: data.py (what a batch is), model.py, lora.py, losses.py,
methods/preference.py.
Papers: LoRA arXiv:2106.09685, AdamW arXiv:1711.05101; the step's loss is a sum over tokens counted beforehand
(losses.py), so it does not depend on how the step is cut into micro-batches.
"""
import math
import os
import shlex
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from config import as_dict, has_reference, in_steps
from errors import run_script
from runtime.load_config import ignored_keys, load_config, non_default

if __name__ == "__main__":
    run_script(lambda argv: load_config(argv, "train"))   # --help and mistakes do not wait for torch
if os.environ.get("RANK", "0") != "0":
    os.environ["TQDM_DISABLE"] = "1"                            # one rank draws bars; tqdm reads this when imported

from runtime.device import pick_device
import torch
from tqdm import tqdm

from checkpoint.adapters import folded_under, save_converted, save_pissa_start
from checkpoint.files import find_checkpoint, into_folder, new_folder, write_json
from checkpoint.training_state import (load_training_state, rng_state, save_training_state,
                                       write_checksums)
from evals.loss import evaluate
from families import model_config, read_config_json
from fast.attention_picker import pick_kernel
from fast.compile import compile_steps, compile_unpacking, pick_compile
from fast.fused_block import fuse_blocks
from fast.matmul import PRODUCTS, pick_product, torch_product
from lora import LoRALinear, lora_layers, trainable
from losses import logged
from methods.fp8 import pick_fp8, to_fp8, with_compiled_rounding
from methods.preference import AS_SIGMOID, value_head
from methods.quant import EmbeddingOutside, embedding_may_stay_outside
from model import attention_needs
from optim import add_neftune, make_optimizer, schedule, set_rates
from parallel import Gradients, Ranks, end_ranks, start_ranks
from runtime.build import (ENCODERS, batch_loss, build_model, build_reference, check_first_batch,
                           lora_settings, objective_for)
from runtime.memory import Workload, largest_rows, memory_plan, plan_lines
from runtime.memory_advice import advice, available_bytes
from runtime.precision import LossScale, check_dtype, compute_dtype
from runtime.preview import print_counts, print_example
from runtime.report import RunLog, print_pairs, trainer_state, versions
from runtime.resume import (STOPPED, StopSignals, changed_settings, find_resume, record_stop,
                            prepare_output, remove_old_checkpoints, check_disk_space, usable_best)
from runtime.run import (MOST_SKIPPED, load_best, optimizer_names, same_everywhere, save_weights,
                         taken_up, train_results, write_results)
from runtime.setup import (check_examples, device_name, forms_of_base, memory_advice, plan,
                           reference_bytes, tokens_at_once)
from runtime.steps import batches_of, rows_per_step, steps_of, steps_per_epoch
from runtime.throughput import (Pace, StepProfile, flops_of_batch, matmul_parameters, part,
                                speed_results)
from runtime.trackers import open_trackers, wanted_trackers
from scale.fsdp import CutGradients, is_cut, print_shards, rows_of, take_part
from text.chat_formats import stored_template, written_template
from text.fit_tokenizer import fit_tokenizer
from text.template_check import check_template, choose_template
from text.token_cache import kept_in, load_examples
from text.tokenizer import load_tokenizer


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
        train_set, eval_set, counts = load_examples(config, tokenizer, template, ENCODERS[config.stage],
                                                    folder=kept_in(config), writes=ranks.local_rank == 0)
    print_counts(counts)
    if eval_set and not config.do_eval:
        print(f"  note: the {len(eval_set)} rows for evaluation are not used; eval_strategy: epoch would use them")
    check_examples([train_set, eval_set], shape, tokenizer)
    print_example(tokenizer, train_set[0], config.stage)
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
    memory = memory_plan(config, Workload(
        model_config=shape,
        lora=adapted,
        rows=largest_rows(train_set, dealt),
        dtype=dtype,
        kernel=choice.kernel,
        device=device,
        world=ranks.world,
        sharded=bool(config.fsdp) and ranks.world > 1,
        fast=True,
        fp8=bool(config.base_precision),
        quant_formats=forms,
        other_bytes=reference_bytes(config, adapted, shape, dtype, forms),
    ))
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
    recompute = memory.workload.recompute
    if embedding_may_stay_outside(model, device, recompute):
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
        fuse_blocks(other, model.product)
    fuse_blocks(model, model.product, recompute)
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
    stop, skipped = StopSignals(config.time_limit, begun), 0                        # skipped: steps in a row

    def save(step, epoch, stateful=not config.save_only_model):
        rng = {f"{device}.{rank}": state for device, mine in rng_state().items()
               for rank, state in enumerate(ranks.gather(mine))}
        if not ranks.main:
            if in_parts:
                take_part(model, optimizer if stateful else None, names, gradients)
            return
        check_disk_space(output, sum(p.nbytes for p in weights.values()) * (3 if stateful else 1), f"checkpoint-{step}")
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
        asked = stop.reason()
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
                record_stop(output, asked or "another rank")
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


# ---- results and saving -----------------------------------------------------------------------------------------


if __name__ == "__main__":
    run_script(main)
