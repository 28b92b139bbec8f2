"""runtime/long_rows.py: plans with inputs in main memory and tiles, against the bytes of a step."""
import json
import shutil
from dataclasses import replace
from functools import cache

import pytest
import torch
from safetensors.torch import load_file
import torch.nn.functional as F

from attention import PackedLayout
from bench import planned_length
from checkpoint.adapters import variant_of
from checkpoint.read_config import model_config
from errors import bytes_in_words
from fast import offload_inputs as offloading
from fast.fused_block import fuse_blocks
from lora import LoRAConfig, attach_lora, trainable
from losses import cross_entropy_sum
from methods.oft import OFTConfig
from methods.quant import QuantFormat
from model import CausalLM
from runtime.kernels import Kernels, use_kernels, use_long_rows
from runtime.memory import (PAGE_LOCKED, TILES, Workload, all_in, checkpointing_in_words, lightest,
                            memory_plan, model_without_storage, plan_ladder, plan_lines)
from runtime.memory_advice import advice
from settings.config import Config
from tests.common import LLAMA3_8B, ROOT, needs_shared, run_recorded, slow, some, usual
from tests.test_memory import ALL, BF16, F32, Live, in_few_bits
from tests.tiny_models import SMALL_FAMILIES, small_config

TOKENS = 600


def wide(name="llama", **changes):
    """Wide beside its vocabulary, as long rows are long: the loss is not the peak."""
    sizes = dict(hidden_size=128, intermediate_size=448, num_attention_heads=8,
                 num_key_value_heads=2, head_dim=16, num_hidden_layers=4, vocab_size=130)
    return small_config(name, **{**sizes, **changes})


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(offloading, "PIECE", 4096)


def plan_of(sizes, lora, dtype, fast=True, offloaded=4, tile=0, kernel="sdpa-flash", rows=(TOKENS,),
            form=None, device="cpu", **more):
    workload = Workload(sizes, lora, [[n] for n in rows], dtype, kernel, device, fast=fast,
                        recompute=["block"] * sizes.num_hidden_layers, offloaded=offloaded,
                        mlp_tile=tile, quant_formats=form and all_in(form, sizes), **more)
    return memory_plan(Config(), workload)


def measured(plan, form=None):
    """Bytes of a step of the plan's workload on the device: (kept, at the peak)."""
    work = plan.workload
    torch.manual_seed(0)
    model = CausalLM(work.model_config)
    for p in model.parameters():
        torch.nn.init.normal_(p.data, 0, 0.02)
    if work.lora:
        attach_lora(in_few_bits(model.to(work.dtype), form), work.lora,
                    stored_name=work.model_config.stored_name, **variant_of(work.lora))
    model.kernel = work.kernel
    kernels = Kernels(fuse=lambda *args: fuse_blocks(model, F.linear if work.fast else None,
                                                     work.recompute))
    kernels.fuse()
    use_long_rows(model.train(), kernels, work)
    for p in trainable(model).values():
        p.grad = torch.zeros_like(p)
    lengths = [n for row in work.rows for n in row]
    layout = PackedLayout(lengths)
    ids = torch.randint(work.model_config.vocab_size, (1, sum(lengths)))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    known = [*model.parameters(), *model.buffers(), *(p.grad for p in trainable(model).values()),
             ids, positions, layout.gather, layout.scatter, layout.cu_seqlens]
    mixed = not work.lora and work.dtype == BF16
    with Live(known) as live:
        with torch.autocast("cpu", BF16, enabled=mixed, cache_enabled=False):
            hidden = model(ids, positions, layout)
            loss = cross_entropy_sum(hidden[0], model.head_weight(), ids[0])
        del hidden
        kept = live.now
        loss.backward()
    if model.lm_head.weight.requires_grad:          # its gradient is a part of `working`
        kept -= 4 * model.lm_head.weight.numel()
    assert all_pieces(model) == plan.offloaded
    return kept - plan.offloaded, live.peak - plan.offloaded


def all_pieces(model) -> int:
    """Bytes of main memory that hold inputs."""
    stores = {layer.forward.args[2] for layer in model.model.layers
              if getattr(layer.forward, "func", None) is offloading.offloaded_forward}
    return sum(piece.nbytes for store in stores for piece in store.free)


def check(plan, form=None, close=0.05):
    kept, peak = measured(plan, form)
    assert plan.activations == pytest.approx(kept, rel=close)
    assert plan.activations + plan.working == pytest.approx(peak, rel=close)
    return kept, peak


MODES = {
    "offloaded": dict(),
    "half of them": dict(offloaded=2),
    "tiles": dict(offloaded=0, tile=64),
    "both": dict(tile=64),
    "large tiles": dict(tile=200),
}


# each pair of mode, trained weights, dtype and path
@pytest.mark.parametrize("trained, dtype, fast, mode", some([
    ("lora", F32, True, "half of them"), ("lora", F32, True, "both"),
    ("lora", BF16, True, "offloaded"), ("lora", BF16, True, "tiles"),
    ("lora", BF16, True, "large tiles"),
    ("full", F32, True, "tiles"), ("full", F32, True, "large tiles"),
    ("lora", F32, False, "offloaded"), ("lora", F32, False, "large tiles"),
    ("lora", BF16, False, "half of them"), ("lora", BF16, False, "both"),
    ("full", F32, False, "both"), ("full", F32, False, "tiles"),
    ("full", BF16, False, "offloaded"), ("full", BF16, False, "half of them"),
    ("full", BF16, False, "large tiles")]))
def test_plans_are_within_5_percent(trained, dtype, fast, mode):
    check(plan_of(wide(), ALL if trained == "lora" else None, dtype, fast, **MODES[mode]))


OTHERS = {
    "q and v": LoRAConfig(target_modules=["q_proj", "v_proj"]),
    "upper layers": LoRAConfig(target_modules=r".*layers\.[23]\..*_proj"),
    "rank 64": LoRAConfig(r=64),
    "dropout": LoRAConfig(lora_dropout=0.1),
    "DoRA": LoRAConfig(use_dora=True),
    "OFT": OFTConfig(oft_block_size=16),
}


@pytest.mark.parametrize("case, dtype", [
    ("q and v", F32), ("upper layers", BF16), ("rank 64", BF16), ("dropout", F32),
    ("DoRA", F32), ("DoRA", BF16), ("OFT", F32), ("OFT", BF16)])
def test_plans_of_other_adapters(case, dtype):
    fast = case in ("q and v", "upper layers", "rank 64")
    check(plan_of(wide(), OTHERS[case], dtype, fast, tile=64), close=0.1)


@pytest.mark.parametrize("form", (QuantFormat("nf4"), QuantFormat("int8", nested=0)),
                         ids=("nf4", "int8"))
def test_plans_over_a_quantized_base(form):
    check(plan_of(wide(), ALL, BF16, tile=64, form=form), form)


def test_plans_of_several_sequences_and_of_the_plain_kernel():
    check(plan_of(wide(), ALL, BF16, tile=64, rows=(20, 30, 640, 12, 300)))
    for tile in (0, 64):
        check(plan_of(wide(), ALL, F32, tile=tile, rows=(600,), kernel="plain"))


@pytest.mark.parametrize("name", usual(SMALL_FAMILIES, "gemma2", "olmo2", "qwen3"))
def test_plans_of_every_kind_of_block(name):
    """As close as the plans of other modes."""
    kernel = "plain" if name == "gemma2" else "sdpa-flash"
    for lora, dtype in ((ALL, BF16), (None, F32)):
        plan = plan_of(small_config(name), lora, dtype, offloaded=4, tile=64, kernel=kernel,
                       rows=(350,))
        check(plan, close=0.25)


# ---- what is chosen -----------------------------------------------------------------------------

LLAMA = model_config(LLAMA3_8B)
NF4 = all_in(QuantFormat("nf4"), LLAMA)
RANK_16 = LoRAConfig(r=16)


@cache
def qlora_model():
    """An 8B model without storage, to be trained by QLoRA."""
    workload = Workload(LLAMA, RANK_16, [[1]], BF16, "sdpa-flash", "cuda", quant_formats=NF4)
    return model_without_storage(Config(), workload)


def qlora(tokens, card, config=None, **more):
    """The plan for an 8B QLoRA with one row on a card with so many bytes."""
    config = config or Config()
    workload = Workload(LLAMA, RANK_16, [[tokens]], BF16, "sdpa-flash", "cuda", fast=True,
                        quant_formats=NF4, model=qlora_model(), **more)
    return lightest(memory_plan(config, workload), card, config)


@pytest.mark.parametrize("tokens, card", [(3_000, 8e9), (80_000, 24e9), (350_000, 80e9)])
def test_long_rows_of_an_8b_model_fit(tokens, card):
    """Planned: Unsloth publishes 2,972, 78,475 and 342,733 tokens for cards of these sizes."""
    plan = qlora(tokens, int(card))
    assert plan.fits(card), bytes_in_words(plan.total)


def test_nothing_is_moved_before_it_is_needed_and_tiles_come_last():
    """In this order: everything is kept, recomputed, moved to main memory, tiled."""
    found = []
    for gigabytes in (7, 8, 9, 9.5, 10, 11, 12, 13, 14, 16, 24, 40, 60):
        work = qlora(20_000, int(gigabytes * 1e9)).workload
        found.append((work.recompute.count("none"), -work.recompute.count("block"),
                      -work.offloaded, -(work.mlp_tile > 0), work.mlp_tile))
        if work.offloaded:
            assert set(work.recompute) == {"block"}
        if work.mlp_tile:
            assert work.offloaded == 32
    assert found == sorted(found)
    assert len({row[2] for row in found}) > 3 and {row[4] for row in found} == {0, *TILES}


def test_inputs_are_moved_only_where_main_memory_has_room():
    one = 20_000 * 4096 * 2
    roomy = qlora(20_000, int(12e9))
    count = roomy.workload.offloaded
    assert count > 25 and roomy.offloaded == pytest.approx(count * one, rel=0.1)
    narrow = qlora(20_000, int(12e9), host_bytes=int(5.5 * one / PAGE_LOCKED))
    assert narrow.workload.offloaded == 5 and narrow.workload.mlp_tile
    assert not plan_of(wide(), ALL, F32, host_bytes=1000, device="cuda").fits(10**12)


def rungs(config, device="cuda", sizes=None, **more):
    workload = Workload(sizes or wide(), ALL, [[5000]], F32, "sdpa-flash", device, fast=True,
                        **more)
    plan = memory_plan(config, workload)
    return [(rung["recompute"].count("block"), rung.get("offloaded", plan.workload.offloaded),
             rung.get("mlp_tile", plan.workload.mlp_tile)) for rung in plan_ladder(plan, config)]


def test_what_the_keys_leave_to_the_plan():
    everything = rungs(Config())
    assert everything[0] == (0, 0, 0) and everything[-3:] == [(4, 4, 0), (4, 4, 4096), (4, 4, 1024)]
    assert rungs(Config(), "cpu")[-3:] == [(4, 0, 0), (4, 0, 4096), (4, 0, 1024)]
    assert rungs(Config(), sharded=True, world=2)[-1] == (4, 0, 0)
    assert rungs(Config(offload_activations=False))[-1] == (4, 0, 1024)
    assert rungs(Config(mlp_tile=0))[-1] == (4, 4, 0)
    assert rungs(Config(mlp_tile=50, offload_activations=True), "cpu") == [(4, 4, 50)]
    assert rungs(Config(offload_activations=True, mlp_tile=0)) == [(4, 4, 0)]
    given = Config()
    given.given = {"disable_gradient_checkpointing": False}
    assert rungs(given)[0] == (4, 0, 0) and len(rungs(given)) == 7
    experts = small_config("mixtral", num_hidden_layers=3)
    assert rungs(Config(), sizes=experts)[-1][1:] == (3, 0)


def test_the_start_page():
    plan = plan_of(wide(), ALL, F32, tile=64, device="cuda", host_bytes=2**30)
    lines = plan_lines(plan, 2**30)
    line = next(line for line in lines if "block inputs" in line)
    assert "page-locked, not in the total (1 GiB free there)" in line
    assert bytes_in_words(plan.offloaded) in line
    assert lines[-1].split(";")[0].endswith(bytes_in_words(plan.total))
    words = checkpointing_in_words(plan.workload)
    assert words == ("everything in 4 of 4 blocks, inputs of 4 in main memory, MLPs in tiles of 64 "
                     "tokens")
    on_cpu = plan_of(wide(), ALL, F32, tile=64)
    assert on_cpu.total - on_cpu.offloaded == replace(on_cpu, offloaded=0).total
    assert "the same here" in "".join(plan_lines(on_cpu, None))


def test_the_advice_after_out_of_memory_names_both():
    """Where the keys have left them out: each with its plan."""
    config = Config(offload_activations=False, mlp_tile=0)
    plan = qlora(20_000, int(15e9), config)
    lines = advice(plan, int(15e9), config)
    assert not plan.fits(int(15e9))
    for key in ("mlp_tile: 4096 (", "offload_activations: true ("):
        assert any(line.startswith(key) for line in lines), lines


@slow
def test_the_table_of_planned_lengths(capsys, monkeypatch):
    monkeypatch.setattr(offloading, "PIECE", 2**24)         # as it is
    planned_length.main(["--cards", "8,24"])
    page = capsys.readouterr().out
    written = (ROOT / "docs/speed.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if " GB" in line]
    assert len(rows) == 2 and "24 GB" in rows[1]
    for row in rows:
        assert " ".join(row.split()) in " ".join(written.split()), row


def test_without_fused_blocks_it_is_said_that_nothing_is_moved(capsys):
    """fast/fused_block.py sets activation checkpointing; its line may be deleted."""
    plan = plan_of(wide(), ALL, F32, offloaded=2)
    model = CausalLM(wide())
    use_kernels(model, Kernels(), plan.workload.recompute)
    use_long_rows(model, Kernels(), plan.workload)
    page = capsys.readouterr().out
    assert "no activation checkpointing" in page and "more memory than planned" in page
    assert "inputs of 2 blocks stay on the device" in page
    use_kernels(model, Kernels(), ["none"] * 4)
    assert not capsys.readouterr().out


@needs_shared
def test_a_run_with_inputs_in_main_memory_and_tiles_learns_the_same(tmp_path, monkeypatch):
    """train.py, from its keys: the losses of a run that keeps everything."""
    losses = []
    for settings in (["disable_gradient_checkpointing=true"],
                     ["offload_activations=true", "mlp_tile=8"]):
        run_recorded("sft_llama3", tmp_path / str(len(losses)), monkeypatch, "max_steps=4",
                     *settings)
        state = json.loads((tmp_path / str(len(losses)) / "trainer_state.json").read_text())
        losses.append([row["loss"] for row in state["log_history"] if "loss" in row])
    assert len(losses[0]) == 4 and losses[1] == pytest.approx(losses[0], rel=1e-5)


@needs_shared
def test_a_resumed_run_keeps_its_tile(tmp_path, monkeypatch):
    """Whatever the plan would choose now: bit for bit, with the masks of dropout."""
    settings = ["adapter_name_or_path=null", "lora_dropout=0.1", "max_steps=4",
                "save_strategy=steps", "save_steps=2"]
    run_recorded("sft_llama3", tmp_path / "a", monkeypatch, *settings, "mlp_tile=8")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b/checkpoint-4")
    state = run_recorded("sft_llama3", tmp_path / "b", monkeypatch, *settings,
                         "resume_from_checkpoint=true")
    a, b = (load_file(tmp_path / run / "adapter_model.safetensors") for run in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert state["log_history"][-1]["step"] == 4
    saved = json.loads((tmp_path / "b/checkpoint-4/trainer_state.json").read_text())["resume"]
    assert saved["mlp_tile"] == 8
