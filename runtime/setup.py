"""What a run decides before any weight is loaded: memory, passes, and the start page that says so.

Requires: runtime/memory.py, runtime/steps.py.
Next: train.py.
"""
import itertools
import math
from contextlib import contextmanager
from dataclasses import replace

import torch

from checkpoint.files import find_checkpoint
from checkpoint.load import load_model, packed_weights
from families import model_config, read_config_json
from generate import context_length
from lora import trainable
from methods.quant import (count, empty_quantised, form_asked, in_words as quantised_in_words,
                           quantised_weights)
from model import CausalLM
from optim import warmup_steps
from parallel import Ranks
from rope import LENGTH_DEPENDENT
from runtime.build import needs_copy
from runtime.memory import checkpointing_in_words, lightest, memory_plan
from runtime.memory_advice import explain_oom, out_of_memory
from runtime.steps import batches_of, joined, rows_per_step, rows_twice

ENOUGH_TOKENS = {"cuda": 16_384, "mps": 2_048, "cpu": 256}    # in one pass: more make a device little faster


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


def tokens_at_once(config, memory, there_is, device, balance):
    """(how many tokens micro-batches that are computed as one may have together, the plan of memory with such passes).

    A step is the same sum however it is cut (losses.py), but few tokens do not keep a GPU busy. 0: each micro-batch
    alone, as where something is reckoned over a whole micro-batch: the balance of experts, or frequencies that follow
    its longest row. memory: the plan for the largest micro-batch, `there_is`: the bytes for it, or None.
    Passes in which nothing is recomputed come first, then long ones.
    """
    rows, shape, size = memory.workload.rows, memory.workload.model_config, config.gradient_accumulation_steps
    alone, found = sum(map(sum, rows)), [(0, lightest(memory, there_is, config))]
    if config.join_micro_batches and size > 1 and not balance and shape.rope["rope_type"] not in LENGTH_DEPENDENT:
        limit = min(ENOUGH_TOKENS[device.type], alone * size)
        while limit > alone:
            several = [row for row in rows for _ in range(math.ceil(limit / alone))]    # no pass needs more than these
            joint = lightest(memory_plan(config, replace(memory.workload, rows=several)), there_is, config)
            if there_is is not None and joint.fits(there_is):
                found.append((limit, joint))
            limit //= 2
    return max(found, key=lambda one: (set(one[1].workload.recompute) == {"none"}, one[0]))


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
    model = memory.workload.model
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
            "activation checkpointing": checkpointing_in_words(memory.workload.recompute)}
