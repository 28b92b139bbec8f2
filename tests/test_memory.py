"""runtime/memory.py: memory plans against the bytes that a real step holds.

`Live` sees every tensor that torch creates and counts the storages that are alive, so the
measurement does not depend on the formula.
"""
import weakref
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attention import PackedLayout
from checkpoint.adapters import variant_of
from checkpoint.load import count_parameters, quantizable_weights, set_quantized
from checkpoint.read_config import model_config
from fast.fused_block import fuse_blocks
from fast.grouped_experts import group_experts
from fast.head_in_tiles import losses_in_tiles, tile_bytes
from lora import LoRAConfig, attach_lora, trainable
from losses import cross_entropy_sum
from methods.grouped import GroupedFormat, GroupedWeight
from methods.oft import OFTConfig
from methods.quant import QuantFormat, quantize
from model import CausalLM
from optim import make_optimizer
from parallel import Gradients, Ranks
from runtime.memory import Plan, Workload, all_in, largest_rows, memory_plan, plan_lines
from runtime.memory_advice import advice
from settings.config import Config
from tests.common import LLAMA3_8B, usual
from tests.tiny_models import SMALL_FAMILIES, small_config

ALL = LoRAConfig(r=8, lora_alpha=16)
F32, BF16 = torch.float32, torch.bfloat16


class Live(TorchDispatchMode):
    """Bytes of the storages that are alive, now and at the peak, without the `known` tensors."""

    def __init__(self, known):
        super().__init__()
        self.now = self.peak = 0
        self.seen = {x.untyped_storage()._cdata: None for x in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.seen:
                storage = x.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                self.seen[key] = weakref.ref(
                    storage, lambda _, key=key, size=size: self.gone(key, size)
                )
                self.now += size
                self.peak = max(self.peak, self.now)
        return out

    def gone(self, key, size):
        del self.seen[key]
        self.now -= size


def measure(model_config, lora, dtype, kernel, recompute, rows, fast, form=None, grouped=False,
            frozen_head=None):
    """Measured bytes beside weights, gradients and optimizer state: (after the forward, peak)."""
    torch.manual_seed(0)
    model = CausalLM(model_config)
    for p in model.parameters():
        torch.nn.init.normal_(p.data, 0, 0.02)
    if lora:
        base = in_few_bits(model.to(dtype), form)
        attach_lora(base, lora, stored_name=model_config.stored_name, **variant_of(lora))
    model.kernel = kernel
    fuse_blocks(model, F.linear if fast else None, recompute)
    if grouped:
        assert group_experts(model, recompute) == ""
    model.train()
    for p in trainable(model).values():
        p.grad = torch.zeros_like(p)  # as in the second micro-batch, which finds them allocated
    lengths = [n for row in rows for n in row]
    layout = PackedLayout(lengths)
    ids = torch.randint(model_config.vocab_size, (1, sum(lengths)))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    known = [
        *model.parameters(),
        *model.buffers(),
        *(p.grad for p in trainable(model).values()),
        ids,
        positions,
        layout.gather,
        layout.scatter,
        layout.cu_seqlens,
    ]
    autocast = (
        nullcontext() if lora or dtype == F32 else torch.autocast("cpu", dtype, cache_enabled=False)
    )
    with Live(known) as live:
        with autocast:
            hidden = model(ids, positions, layout)
            loss = cross_entropy_sum(
                hidden[0], model.head_weight(), ids[0], model_config.final_softcap,
                frozen_head=frozen_head
            )
        del hidden
        kept = live.now
        loss.backward()
    return kept, live.peak


def in_few_bits(model, form):
    """The model with its linear layers quantized, as loading does it; form None: unchanged."""
    for name in quantizable_weights(model) if form else ():
        set_quantized(model, name, quantize(model.get_parameter(name).data, form))
    return model


def planned(model_config, lora, dtype, kernel, recompute, rows, **more):
    """recompute: levels of fused_block.RECOMPUTE, or whether all blocks recompute."""
    if isinstance(recompute, bool):
        recompute = ["block" if recompute else "none"] * model_config.num_hidden_layers
    return memory_plan(
        Config(),
        Workload(model_config, lora, rows, dtype, kernel, "cpu", recompute=recompute, **more),
    )


def compare(
    model_config,
    lora,
    dtype,
    kernel="sdpa-flash",
    recompute=False,
    rows=((150,), (120,)),
    close=0.1,
    fast=False,
    form=None,
    grouped=False,
    frozen_head=None,
):
    """The bytes after the forward must match activations; the peak, activations and working."""
    plan = planned(
        model_config,
        lora,
        dtype,
        kernel,
        recompute,
        rows,
        fast=fast,
        quant_formats=form and all_in(form, model_config),
        grouped=grouped,
        head_in_tiles=bool(frozen_head),
    )
    kept, most = measure(
        model_config, lora, dtype, kernel, plan.workload.recompute, rows, fast, form, grouped,
        frozen_head
    )
    if any(p.requires_grad for p in plan.workload.model.lm_head.parameters()):
        # the head's gradient, which the plan counts in `working`
        kept -= 4 * model_config.vocab_size * model_config.hidden_size
    assert plan.activations == pytest.approx(kept, rel=close)
    assert plan.activations + plan.working == pytest.approx(most, rel=0.25)
    return most


TRAINED = {"lora-float32": (ALL, F32), "lora-bfloat16": (ALL, BF16),
           "full-float32": (None, F32), "full-bfloat16": (None, BF16)}


def by_family(*kinds):
    """Cases (name, lora, dtype): every family with these kinds of TRAINED, two with all four.

    The plain path and the fast one share the four kinds of a family between them.
    """
    return [pytest.param(name, *TRAINED[kind], id=f"{name}-{kind}")
            for name in usual(list(SMALL_FAMILIES), "llama", "gemma2", "mixtral", "gpt_oss",
                              "llama4")
            for kind in (TRAINED if name in ("llama", "mixtral") else kinds)]


@pytest.mark.parametrize("name, lora, dtype", by_family("lora-float32", "full-bfloat16"))
def test_activations_of_every_kind_of_block(name, lora, dtype):
    compare(small_config(name), lora, dtype, "plain" if name == "gemma2" else "sdpa-flash")


@pytest.mark.parametrize("dtype", (F32, BF16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("kernel", ("plain", "sdpa-math", "sdpa-flash"))
def test_activations_of_the_kernels(kernel, dtype):
    for rows in ([[300]], [[20], [30], [64, 12], [100], [3]]):
        compare(small_config("llama"), ALL, dtype, kernel, rows=rows)


def test_the_plain_kernel_keeps_all_scores_block_by_block():
    compare(small_config("llama", num_hidden_layers=2), ALL, F32, "plain", rows=[[1300]])
    scores = [
        planned(small_config("llama"), ALL, F32, "plain", False, [[n]]).activations
        for n in (500, 1000)
    ]
    flash = [
        planned(small_config("llama"), ALL, F32, "sdpa-flash", False, [[n]]).activations
        for n in (500, 1000)
    ]
    assert scores[1] > 3 * scores[0] and flash[1] == pytest.approx(2 * flash[0], rel=1e-3)


@pytest.mark.parametrize("lora", (ALL, None), ids=("lora", "full"))
@pytest.mark.parametrize("name", ("llama", "qwen2_moe"))
def test_activations_with_recomputation(name, lora):
    for dtype in (F32, BF16):
        compare(small_config(name), lora, dtype, recompute=True)


@pytest.mark.parametrize(
    "lora",
    (
        LoRAConfig(target_modules=["q_proj", "v_proj"]),
        LoRAConfig(target_modules=["all", "experts"]),
        LoRAConfig(lora_dropout=0.1),
        LoRAConfig(r=64),
        LoRAConfig(modules_to_save=["embed_tokens", "lm_head"]),
        LoRAConfig(target_modules=r".*layers\.[23]\..*_proj"),
        LoRAConfig(use_dora=True),
        OFTConfig(oft_block_size=16),
        OFTConfig(r=4, oft_block_size=0, target_modules=["q_proj", "down_proj"]),
    ),
    ids=("q and v", "experts", "dropout", "r 64", "whole", "upper", "DoRA", "OFT", "OFT of two"),
)
def test_activations_of_other_adapters(lora):
    name = "mixtral" if "experts" in lora.target_modules else "llama"
    for dtype in (F32, BF16):
        compare(small_config(name), lora, dtype, close=0.15)


@pytest.mark.parametrize("name, lora, dtype", by_family("lora-bfloat16", "full-float32"))
def test_activations_of_the_fast_path(name, lora, dtype):
    compare(
        small_config(name), lora, dtype, "plain" if name == "gemma2" else "sdpa-flash", fast=True
    )
    for level in ("mlp", "block"):
        if not (
            level == "mlp"
            and name in ("mixtral", "qwen2_moe", "llama4")
            or lora is None
            and dtype == BF16
        ):
            compare(
                small_config(name),
                lora,
                dtype,
                "plain" if name == "gemma2" else "sdpa-flash",
                [level] * 4,
                fast=True,
            )


def test_activations_of_mixed_recomputation():
    for levels, lora, dtype in (
        (["mlp", "mlp", "none", "none"], ALL, F32),
        (["block", "mlp", "mlp", "mlp"], ALL, BF16),
        (["block"] + ["none"] * 3, None, F32),
    ):
        compare(small_config("llama"), lora, dtype, recompute=levels, fast=True, rows=[[150]] * 8)


@pytest.mark.parametrize("form", (QuantFormat("nf4"), QuantFormat("int8", nested=0)),
                         ids=("nf4", "int8"))
@pytest.mark.parametrize("name", usual(["llama", "gemma2", "mixtral"], "mixtral"))
def test_activations_over_a_quantized_base(name, form):
    """As over a base in 16 bits, plus one dequantized matrix: nothing of W is kept."""
    kernel = "plain" if name == "gemma2" else "sdpa-flash"
    for fast in (True, False):
        for level in ("none", "block") + (("mlp",) if fast and name != "mixtral" else ()):
            compare(small_config(name), ALL, BF16, kernel, [level] * 4, fast=fast, form=form)


@pytest.mark.parametrize("form", (QuantFormat("nf4"), QuantFormat("int8", nested=0)),
                         ids=("nf4", "int8"))
def test_a_dequantized_matrix_is_the_peak_of_short_rows(form):
    sizes = small_config("llama", hidden_size=256, intermediate_size=4096)
    compare(sizes, ALL, F32, rows=[[30]], form=form, fast=True)


@pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="this torch has no grouped product")
@pytest.mark.parametrize("form", (QuantFormat("nf4"), QuantFormat("int8", nested=0)),
                         ids=("nf4", "int8"))
def test_all_experts_of_a_layer_are_dequantized_at_once(form):
    """They are the peak where tokens are few."""
    sizes = small_config("mixtral", hidden_size=256, intermediate_size=2048, num_hidden_layers=2)
    both = [compare(sizes, ALL, BF16, rows=[[24]], form=form, fast=True, grouped=grouped)
            for grouped in (False, True)]
    one = 2 * 256 * 2048
    assert both[1] - both[0] > 3 * one          # 4 experts instead of one


def test_the_head_of_a_large_vocabulary():
    for lora in (ALL, None):
        compare(
            small_config("llama", vocab_size=60000), lora, F32, rows=[[300], [250]]
        )  # several chunks


@pytest.mark.parametrize("name", usual(["llama", "gemma2"], "gemma2"))
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_frozen_head_in_tiles(name, dtype):
    """Less than the blocks need, where scores of whole rows are more."""
    sizes = small_config(name, vocab_size=60000)
    compare(sizes, ALL, dtype, "plain", rows=[[300], [250]], frozen_head=losses_in_tiles)
    shape = (60000, sizes.hidden_size)
    plan = partial(planned, sizes, ALL, dtype, "plain", True, [[700]])
    tile = tile_bytes(700, shape, dtype.itemsize, sizes.final_softcap)
    in_tiles, in_chunks = plan(head_in_tiles=True).working, plan().working
    assert 5 * tile < in_chunks and tile <= in_tiles < in_chunks


@pytest.mark.parametrize("name", SMALL_FAMILIES)
def test_weights_gradients_and_optimizer_are_exact(name):
    model_config = small_config(name)
    whole = LoRAConfig(modules_to_save=["embed_tokens"])
    for lora, dtype in ((ALL, F32), (ALL, BF16), (whole, BF16), (None, F32), (None, BF16)):
        model = CausalLM(model_config)
        if lora:
            attach_lora(model.to(dtype), lora, stored_name=model_config.stored_name)
        weights = trainable(model)
        optimizer = make_optimizer(weights, Config(), torch.device("cpu"))
        for p in weights.values():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        held = [
            sum(p.nbytes for p in model.parameters() if not p.requires_grad),
            sum(p.nbytes for p in weights.values()),
            sum(p.grad.nbytes for p in weights.values()),
            sum(x.nbytes for state in optimizer.state.values() for x in state.values()),
        ]
        plan = planned(model_config, lora, dtype, "plain", True, [[8]])
        assert [plan.weights, plan.trained, plan.gradients, plan.optimizer] == held
        buffers = Gradients(weights, Ranks(0, 2)).buckets
        two = planned(model_config, lora, dtype, "plain", True, [[8]], world=2)
        assert two.gradients == sum(bucket.flat.nbytes for bucket in buffers)


@pytest.mark.parametrize(
    "settings, weights, trained",
    [
        (dict(finetuning_type="freeze", freeze_trainable_layers=1), 2, 4),
        (dict(finetuning_type="full"), 4, 4),
        (dict(finetuning_type="freeze", freeze_extra_modules=["lm_head"], pure_bf16=True), 2, 2),
        (dict(finetuning_type="full", pure_bf16=True), 2, 2),
    ],
)
def test_weights_of_other_methods(settings, weights, trained):
    """weights, trained: bytes per frozen and per trained number."""
    config = Config(bf16=True, **settings)
    model_config = small_config("llama")
    plan = memory_plan(config, Workload(model_config, None, [[8]], BF16, "plain", "cpu"))
    parts = [".3.", *([] if "freeze_trainable_layers" in settings else [".2.", "lm_head"])]
    parts = [""] if settings["finetuning_type"] == "full" else parts
    trained_weights = [
        p
        for name, p in CausalLM(model_config).named_parameters()
        if any(part in name for part in parts)
    ]
    count, total = (
        sum(p.numel() for p in trained_weights),
        sum(p.numel() for p in CausalLM(model_config).parameters()),
    )
    assert [plan.weights, plan.trained, plan.gradients] == [
        weights * (total - count),
        trained * count,
        trained * count,
    ]
    assert plan.optimizer == 2 * trained * count + 4 * len(trained_weights)


def test_known_sizes_of_llama_3_8b():
    """Llama 3 8B has 8,030,261,248 parameters (model card); rank 16 adds 41,943,040 (PEFT)."""
    llama = model_config(LLAMA3_8B)
    lora = LoRAConfig(r=16)
    plan = planned(llama, lora, BF16, "flash-attn", True, [[2048]])
    assert plan.weights == 2 * 8_030_261_248 and plan.trained == 4 * 41_943_040
    per_token = (plan.activations - 2048 * (2 * 128 * 2 + 4096 * 6 + 4)) / 2048
    assert per_token == 32 * 4096 * 2  # the blocks' inputs
    kept = planned(llama, lora, BF16, "flash-attn", False, [[2048]]).activations / 2048 / 32
    # residuals, q, k, v, output, gate, up
    least = 2 * (2 * 4096 + 4096 + 2 * 1024 + 4096 + 2 * 14336)
    assert least < kept < 2.5 * least


@pytest.mark.parametrize("form",
                         (QuantFormat("nf4"), QuantFormat("nf4", nested=0), QuantFormat("fp4", 128),
                          QuantFormat("int8", nested=0)), ids=str)
def test_quantized_weights_are_counted_to_the_byte(form):
    for name in ("llama", "qwen2", "qwen2_moe", "llama4"):
        model_config = small_config(name)
        model = attach_lora(in_few_bits(CausalLM(model_config).to(BF16), form), ALL,
                            stored_name=model_config.stored_name)
        held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()) if not t.requires_grad)
        plan = planned(
            model_config, ALL, BF16, "plain", True, [[8]], quant_formats=all_in(form, model_config)
        )
        assert plan.weights == held < planned(model_config, ALL, BF16, "plain", True, [[8]]).weights
        assert (
            count_parameters(plan.workload.model)
            == count_parameters(model)
            == sum(
                p.numel()
                for p in attach_lora(
                    CausalLM(model_config), ALL, stored_name=model_config.stored_name
                ).parameters()
            )
        )


def test_qlora_of_an_8b_model_fits_in_six_and_a_half_gigabytes():
    llama = model_config(LLAMA3_8B)
    config = Config()
    plan = memory_plan(
        config,
        Workload(
            llama,
            ALL,
            [[2048]],
            torch.float16,
            "sdpa-flash",
            "cuda",
            fast=True,
            quant_formats=all_in(QuantFormat("nf4"), llama),
        ),
    )
    blocks = 32 * (4096 * (4096 + 1024) * 2 + 3 * 4096 * 14336)  # parameters of their matrices
    embedding = 128256 * 4096 * 2  # bytes; in main memory, as the head of the same size
    assert plan.weights == pytest.approx(blocks * 4.127 / 8 + embedding, rel=2e-3)
    assert plan.total < 6.5e9
    roomy = memory_plan(config, replace(plan.workload, recompute=["none"] * 32))
    assert roomy.weights - plan.weights == embedding  # without recomputation it is on the GPU
    assert advice(plan, 2**30, config)
    assert not any("quantization_bit" in line for line in advice(plan, 2**30, config))
    plain = memory_plan(
        config, Workload(llama, ALL, [[512]], torch.float16, "sdpa-flash", "cuda", fast=True)
    )
    assert any(line.startswith("quantization_bit: 4 (") for line in advice(plain, int(8e9), config))


def test_sharding_divides_weights_gradients_and_optimizer_state():
    model_config = small_config("llama", num_hidden_layers=40)
    one, four, eight = (
        planned(model_config, None, F32, "sdpa-flash", True, [[64]], world=n, sharded=n > 1)
        for n in (1, 4, 8)
    )
    assert four.optimizer == one.optimizer // 4 and eight.optimizer == one.optimizer // 8
    assert four.trained == one.trained // 4 and eight.weights == four.weights < 0.2 * one.trained
    assert eight.total < four.total < one.total


def test_the_largest_micro_batch():
    class Some(list):
        sizes = np.array([3, 9, 1, 7, 2])

    examples = Some(SimpleNamespace(lengths=n, desired=None) for n in ([3], [5, 4], [1], [7], [2]))
    assert largest_rows(examples, [[0, 1], [2, 3], [4]]) == [[3], [5, 4]]
    assert largest_rows(examples, [[4, 0], [3]]) == [[7]]
    examples[1].desired = False  # KTO: the second sequence is not trained on
    assert largest_rows(examples, [[1]]) == [[5]]


# ---- the start page ----------------------------------------------------------------------------


def long_run(**settings):
    """A plan and its config: full fine-tuning with everything that takes memory."""
    config = Config(
        **{
            **dict(
                disable_gradient_checkpointing=True,
                flash_attn="disabled",
                per_device_train_batch_size=4,
                gradient_accumulation_steps=3,
                cutoff_len=512,
                finetuning_type="full",
            ),
            **settings,
        }
    )
    lora = None if config.finetuning_type == "full" else ALL
    kernel = "plain" if config.flash_attn == "disabled" else "sdpa-flash"
    workload = Workload(small_config("llama"), lora, [[512]] * 4, F32, kernel, "cpu")
    return memory_plan(config, workload), config


def test_the_table_on_the_start_page():
    plan, _ = long_run()
    lines = plan_lines(plan, 2 * plan.total)
    assert "2,048 tokens (rows: 4)" in lines[0] and lines[-1].endswith("free: fits")
    assert not any("frozen" in line for line in lines)  # nothing is frozen here
    assert plan_lines(plan, plan.total)[-1].endswith("tight")
    assert plan_lines(plan, plan.total - 1)[-1].endswith("does not fit")
    assert "free" not in plan_lines(plan, None)[-1]
    assert "frozen" in plan_lines(long_run(finetuning_type="lora")[0], None)[1]
    sizes = Plan(
        weights=3 * 2**30,
        trained=2**20,
        gradients=0,
        optimizer=0,
        activations=0,
        working=0,
        workload=plan.workload,
    )
    assert "3 GiB" in plan_lines(sizes, None)[1] and "3.001 GiB" in plan_lines(sizes, None)[-1]


@pytest.mark.parametrize("size", [(256, 512), (2048, 512)])
@pytest.mark.parametrize("width, with_columns", [(4, False), (8, False), (4, True)])
def test_dequantizing_groups_takes_what_is_planned(width, with_columns, size):
    form = GroupedFormat(kind="", width=width, group_size=128, scale_dtype=torch.float16,
                         dtype=BF16, with_columns=with_columns)
    tensors = {name: torch.zeros(shape, dtype=dtype)
               for name, (shape, dtype) in form.tensors(size).items()}
    weight = GroupedWeight(form, size, **tensors)
    with Live(weight.buffers()) as live:
        weight.dequantize(BF16)
    planned = weight.dequantize_bytes(torch.device("cpu"), 2)
    assert 0.85 * planned < live.peak < 1.1 * planned
