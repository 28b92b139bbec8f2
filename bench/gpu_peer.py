"""The peer of gpu_speed.py: the same shapes and rows in transformers + peft, in a plain loop.

    python bench/gpu_peer.py peer-8b                        beside train-8b
    python bench/gpu_peer.py peer-8b --device cpu --tiny

Where transformers and peft are not installed, the part says so. Weights are random and drawn on the
device, LoRA has rank 16 on all linear layers, every token is supervised, the loss is a sum over the
step divided by its tokens, and AdamW is torch's fused one.

    peer-8b         rows of 4096 tokens without padding or mask, nothing recomputed: the best case
    peer-8b-short   short rows padded to the longest of four, with gradient checkpointing: what
                    most scripts do; padding does not count as tokens
    peer-moe        adapters on experts, which run in transformers' loop over them
    peer-moe-fast   the same with the code for experts that transformers chooses (since 5)

Requires: gpu_speed.py, peer_hf.py.
Next: gpu.py.
Sources: the documentation of transformers and peft.
"""
import importlib.util
import itertools
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from runtime.device import pick_device
import torch

from bench.common import NotHere, run_part
from bench.gpu_speed import CASES, Case, describe, examples_of, speed_figures, timed
from checkpoint.read_config import model_config
from lora import LoRAConfig, attach_lora
from model import CausalLM
from runtime.throughput import matmul_parameters, training_flops

MICRO_BATCH = 4         # rows of a padded batch


def needed(*modules: str):
    """Raises NotHere for packages that are not installed."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise NotHere(f"{' and '.join(missing)} not installed: there is nothing to compare with")


def pick_attention(device) -> str:
    """flash_attention_2 where its package can be imported, else torch's sdpa."""
    if device.type == "cuda" and importlib.util.find_spec("flash_attn"):
        try:
            import flash_attn  # noqa: F401
            return "flash_attention_2"
        except ImportError as refusal:
            print(f"flash-attn is installed and cannot be imported: {refusal}")
    return "sdpa"


def peer_model(raw: dict, device, attention: str, experts: str, checkpointing: bool):
    """A random model of transformers with peft's adapters of rank 16.

    experts: "" for no adapters on experts, "eager" for the loop over them, or "chosen".
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM, __version__
    options = {"attn_implementation": attention}
    if experts == "eager" and int(__version__.partition(".")[0]) >= 5:  # before, always
        options["experts_implementation"] = experts
    config = AutoConfig.for_model(**raw)
    config.use_cache = False
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = AutoModelForCausalLM.from_config(config, **options)
    finally:
        torch.set_default_dtype(torch.float32)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    settings = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "task_type": "CAUSAL_LM",
                "target_modules": "all-linear"}
    if experts and not any(".experts." in name for name, module in model.named_modules()
                           if isinstance(module, torch.nn.Linear)):
        settings["target_parameters"] = [                   # stacked, since transformers 5
            name for name, p in model.named_parameters() if ".experts." in name and p.dim() == 3]
    return get_peft_model(model, LoraConfig(**settings)).to(device).train()


def batches_of(rows: list, padded: bool, device) -> list[dict]:
    """The micro-batches of a step: all rows in one, or groups of rows with padding."""
    from bench.peer_hf import inputs_of
    if padded:
        groups = [rows[i:i + MICRO_BATCH] for i in range(0, len(rows), MICRO_BATCH)]
        return [inputs_of(group, False, False, device, torch.bfloat16) for group in groups]
    ids = torch.stack([torch.as_tensor(row.input_ids) for row in rows]).long().to(device)
    return [{"input_ids": ids, "labels": ids}]


def train(asked, case: Case, padded: bool = False, experts: str = "") -> dict:
    """A part: train a case of gpu_speed.py for some seconds."""
    needed("transformers", "peft")
    device = pick_device(asked.device == "cpu")
    raw, lengths = case.raw_config(asked), case.lengths(asked)
    attention = pick_attention(device)
    model = peer_model(raw, device, attention, experts, checkpointing=padded)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, weight_decay=0.0, fused=True)
    numbers = itertools.count(1)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def one_step(over: bool) -> tuple[float, bool]:
        rows = examples_of(lengths, raw["vocab_size"], next(numbers))
        total = torch.zeros((), device=device)
        for inputs in batches_of(rows, padded, device):
            with torch.autocast(device.type, torch.bfloat16):
                loss = model(**inputs, num_items_in_batch=sum(lengths)).loss
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(total), over

    found = speed_figures(timed(one_step, device, asked.seconds), flops_of(case, asked), lengths,
                          device)
    return found | {"says": words(case, raw, lengths, padded, attention, model),
                    "trained": sum(p.numel() for p in weights)}


def flops_of(case: Case, asked) -> float:
    """Model FLOPs of a step, counted on our model, so that both are counted alike."""
    with torch.device("meta"):
        model = CausalLM(model_config(case.raw_config(asked)))
    targets = ["all", "experts"] if case.experts else "all"
    attach_lora(model, LoRAConfig(16, 32, target_modules=targets))
    return training_flops(model.config, *matmul_parameters(model), case.lengths(asked))


def words(case: Case, raw: dict, lengths: list, padded: bool, attention: str, model) -> str:
    """What the peer computed with, for the table."""
    import peft
    import transformers
    how = "padded, 4 rows a micro-batch, gradient checkpointing" if padded else "no recomputation"
    experts = getattr(model.config, "_experts_implementation", "eager")
    more = f", experts {experts}" if case.experts else ""
    return (f"{describe(lengths)} a step, {raw['num_hidden_layers']} layers, {how}, {attention}"
            f"{more}; transformers {transformers.__version__}, peft {peft.__version__}")


PARTS = {
    "peer-8b": partial(train, case=CASES["train-8b"]),
    "peer-8b-short": partial(train, case=CASES["train-8b-short"], padded=True),
    "peer-moe": partial(train, case=CASES["train-moe"], experts="eager"),
    "peer-moe-fast": partial(train, case=CASES["train-moe"], experts="chosen"),
}

if __name__ == "__main__":
    run_part(PARTS)
