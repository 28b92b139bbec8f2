"""The models of a run and the table of stages.

Requires: model.py, lora.py, checkpoint/load.py.
Next: train.py.
"""
import math
from functools import partial

import torch

from checkpoint.adapters import load_adapter, read_adapter_config
from checkpoint.files import find_checkpoint
from checkpoint.load import load_model, whole
from config import has_reference
from data import collate_rows, encode_conversations, encode_documents
from families import model_config, read_config_json
from fast.matmul import PRODUCTS, torch_product
from lora import LoRAConfig, LoRALinear, attach_lora, lora_layers, merge_adapters, unfreeze
from losses import Objective, balance_loss, cross_entropy_sum
from methods.lora_variants import row_norms, variant_of
from methods.preference import collate_answers, encode_answers, objective_of
from methods.quant import form_asked
from model import CausalLM, init_weights
from parallel import Ranks
from runtime.precision import half_of
from runtime.throughput import part
from scale.fsdp import cut, empty_model, fill


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
        attach_lora(model, lora, config.seed, stored_name=model.config.stored_name, device=device,
                    **variant_of(lora))
    if sharded:
        cut(model, config.fsdp, ranks, device)
        fill(model, base, trained=not (resume or continued))        # the adapter's file has what learns
        if lora.use_dora and not (resume or continued):
            for layer in lora_layers(model).values():
                layer.lora_magnitude_vector.data.copy_(row_norms(whole(layer.weight).float()))
    if has_reference(config):                       # dropout would be a difference, too
        for layer in lora_layers(model).values():
            layer.dropout = torch.nn.Identity()
    return model, lora


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


def batch_loss(model, batch, device, objective: Objective, told=None):
    """(sum of the losses of a batch's rows, what is added to it undivided, what is to be logged); see Objective."""
    return objective.score(model, batch.to(device), told)


def score_tokens(balance: float, model, batch, told):
    """Stages sft and pt: the sum of the token losses of sequences laid end to end, and what the routing to experts adds."""
    routers = [] if balance and batch.n_items else None         # idle batches (scale/fsdp.py) have no labels, and add nothing
    hidden = model(batch.input_ids, batch.position_ids, batch.layout, routers=routers)       # (1, N, D)
    with part("loss"):
        loss = cross_entropy_sum(hidden[0], model.head_weight(), batch.targets, model.config.final_softcap,
                                 PRODUCTS.get(getattr(model, "product", None), torch_product))
    return loss, balance * balance_loss(routers, model.config.num_experts_per_tok) if routers else 0.0, {}


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
    watched = [(n, m) for n, m in model.named_modules() if isinstance(m, (torch.nn.Linear, LoRALinear))
               and not n.endswith((".lora_A", ".lora_B", ".base_layer"))]
    hooks = [module.register_forward_hook(watch(name)) for name, module in watched]
    model.eval()                                    # dropout would draw random numbers, and a resumed run differ
    try:
        with autocast:
            batch = batch.to(device)
            told, = objective.ask(model, [batch], Ranks())
            loss = float(batch_loss(model, batch, device, objective, told)[0])
    finally:
        for hook in hooks:
            hook.remove()
        model.train()
    if not math.isfinite(loss):
        raise ValueError(f"first batch: the head's scores overflow, the loss is {loss}. {remedy}")


ENCODERS = {"sft": encode_conversations, "pt": encode_documents, "rm": encode_answers, "dpo": encode_answers,
            "kto": encode_answers}

COLLATE = {"sft": collate_rows, "pt": collate_rows, "rm": collate_answers, "dpo": collate_answers, "kto": collate_answers}
