"""A train.py yaml run with transformers and peft, in a short plain loop: train.py's peer.

    python bench/peer_hf.py my.yaml                    rows packed or padded as in the yaml
    python bench/peer_hf.py my.yaml --kernels liger    with Liger's kernels, or unsloth's model

Rows, their order, the loss (a sum over the labels of a step, divided by their number) and AdamW are
those of train.py, so both print the same curve. Packed rows are one long row with positions that
restart for flash-attention, which finds the boundaries from them; for torch's SDPA they are rows of
a batch, with a mask that separates the sequences. A yaml without packing gives the padded batches
with an attention mask that most scripts use. Writes trainer_log.jsonl and all_results.json under
the names that train.py uses.

Requires: gpu_proofs.py, which runs it.
Next: data.py (what an example is).
Sources: the documentation of transformers (padding-free batches), peft, Liger-Kernel, Unsloth.
"""
import argparse
import importlib.util
import json
import sys
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from torch.nn.utils.rnn import pad_sequence

from checkpoint.adapter_config import read_adapter_config
from checkpoint.read_config import read_config_json
from data import IGNORE
from runtime.build import STAGES
from runtime.device import pick_device
from runtime.steps import epoch_order, micro_batches
from runtime.throughput import peak_memory
from settings.load_config import load_config
from text.fit_tokenizer import fit_tokenizer
from text.template_check import choose_template
from text.token_cache import load_examples
from text.tokenizer import load_tokenizer


def rows_of(config) -> list:
    """The examples that train.py would train on."""
    tokenizer = load_tokenizer(config.model_name_or_path)
    kind = read_config_json(config.model_name_or_path)["model_type"]
    template, _ = choose_template(config.template, tokenizer, kind, config.force_template)
    fit_tokenizer(template, tokenizer)
    return load_examples(config, tokenizer, template, STAGES[config.stage].encode)[0]


def load_peer(config, dtype, device, kernels: str, attention: str):
    """The checkpoint with the yaml's adapter (float32) in transformers and peft."""
    path = config.model_name_or_path
    if kernels == "unsloth":
        from unsloth import FastLanguageModel
        model, _ = FastLanguageModel.from_pretrained(
            path, max_seq_length=config.cutoff_len, dtype=dtype, load_in_4bit=False
        )
        # new adapters, as unsloth's kernels need its own
        lora = read_adapter_config(config.adapter_name_or_path[0])[0]
        checkpointing = False if config.disable_gradient_checkpointing else "unsloth"
        return FastLanguageModel.get_peft_model(
            model, r=lora.r, lora_alpha=lora.lora_alpha, target_modules=lora.target_modules,
            use_gradient_checkpointing=checkpointing,
        ).train()
    if kernels == "liger":
        from liger_kernel.transformers import AutoLigerKernelForCausalLM as Auto
    else:
        from transformers import AutoModelForCausalLM as Auto
    from peft import PeftModel
    model = Auto.from_pretrained(path, torch_dtype=dtype, attn_implementation=attention).to(device)
    model.config.use_cache = False
    if not config.disable_gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return PeftModel.from_pretrained(model, config.adapter_name_or_path[0],
                                     is_trainable=True).train()


def inputs_of(examples, packed: bool, in_one_row: bool, device, dtype) -> dict:
    """A micro-batch for a transformers model: ids, labels (B, T), and positions or a mask."""
    if packed and in_one_row:
        flat = [torch.cat([torch.as_tensor(part) for e in examples for part in parts(e)])
                for parts in (lambda e: [e.input_ids], lambda e: [e.labels],
                              lambda e: map(torch.arange, e.lengths))]
        ids, labels, positions = (values.long()[None] for values in flat)
        return {"input_ids": ids.to(device), "labels": labels.to(device),
                "position_ids": positions.to(device)}
    ids, labels = (pad_sequence([torch.as_tensor(getattr(e, name)).long() for e in examples],
                                batch_first=True, padding_value=fill)
                   for name, fill in (("input_ids", 0), ("labels", IGNORE)))
    if not packed:
        lengths = torch.tensor([len(e.input_ids) for e in examples])
        mask = torch.arange(ids.shape[1])[None] < lengths[:, None]
        return {"input_ids": ids.to(device), "labels": labels.to(device),
                "attention_mask": mask.long().to(device)}
    # the last length is that of the padding
    sizes = [torch.tensor([*e.lengths, ids.shape[1] - sum(e.lengths)]) for e in examples]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in sizes])
    # the number of each token's sequence, (B, T); then (B, 1, T, T)
    number = torch.stack([torch.arange(len(row)).repeat_interleave(row) for row in sizes])
    number = number.to(device)
    allowed = (number[:, None, :, None] == number[:, None, None, :]).tril()
    mask = torch.zeros(allowed.shape, dtype=dtype, device=device)
    mask = mask.masked_fill(~allowed, torch.finfo(dtype).min)
    return {"input_ids": ids.to(device), "labels": labels.to(device),
            "position_ids": positions.to(device), "attention_mask": mask}


def steps_of(config, examples):
    """Yield the micro-batches of each optimizer step, in train.py's order, epoch after epoch."""
    for epoch in range(10**6):
        order = epoch_order(len(examples), config.seed, epoch, shuffle=not config.disable_shuffling)
        batches = [[examples[i] for i in batch]
                   for batch in micro_batches(order, config.per_device_train_batch_size)]
        for start in range(0, len(batches), config.gradient_accumulation_steps):
            yield batches[start:start + config.gradient_accumulation_steps]


def train(config, model, examples, device, dtype, in_one_row: bool):
    """The training loop; after each step a line of trainer_log.jsonl."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=config.learning_rate, weight_decay=0.0,
                                  fused=device.type == "cuda")
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    seen, packed, log = 0, bool(config.packing), Path(config.output_dir) / "trainer_log.jsonl"
    for step, batches in enumerate(islice(steps_of(config, examples), config.max_steps), 1):
        count, total = sum(int((e.labels != IGNORE).sum()) for batch in batches for e in batch), 0.0
        for batch in batches:
            with autocast:
                loss = model(**inputs_of(batch, packed, in_one_row, device, dtype),
                             num_items_in_batch=count).loss
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(weights, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        seen += sum(len(e.input_ids) for batch in batches for e in batch)
        line = {"current_steps": step, "loss": float(total), "total_tokens": seen}
        with open(log, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", help="the yaml that train.py gets")
    parser.add_argument("--kernels", choices=("none", "liger", "unsloth"), default="none")
    parser.add_argument("--attention",
                        help="flash_attention_2 or sdpa; else the first of them that is installed")
    asked = parser.parse_args()
    config = load_config(["--config", asked.config], "train")
    Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    device, dtype = pick_device(config.use_cpu), torch.bfloat16 if config.bf16 else torch.float32
    flash = importlib.util.find_spec("flash_attn") is not None and device.type == "cuda"
    attention = asked.attention or ("flash_attention_2" if flash else "sdpa")
    examples = rows_of(config)
    model = load_peer(config, dtype, device, asked.kernels, attention)
    train(config, model, examples, device, dtype, in_one_row=attention == "flash_attention_2")
    results = {"attention": attention, "peak_memory_gib": peak_memory(device) / 2**30}
    (Path(config.output_dir) / "all_results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
