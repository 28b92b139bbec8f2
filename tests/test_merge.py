"""merge.py: recorded weights, its checkpoints in transformers, its memory, and mistakes."""
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import merge
from checkpoint.adapters import load_adapter, load_with_adapters, save_adapter
from checkpoint.files import PICKLES_ARE_SAFE, tensor_files, write_tensors
from checkpoint.load import load_model
from checkpoint.read_config import model_config
from checkpoint.work_folder import write_mark
from lora import LoRAConfig, attach_lora, lora_layers
from merge import merge_checkpoint
from methods.lora_variants import variant_arguments
from methods.quant import QuantFormat, QuantLinear
from model import CausalLM
from tests import twins
from tests.common import GOLDEN, ROOT, losses_in, needs_shared, run_recorded
from tests.tiny_models import (CHECKPOINTS, IDS, TINY_LLAMA, adapter_with, base_with, checkpoint_of,
                               logits_of, perturb, tensors_in, write_quantized)

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
ADAPTERS = [p.name for p in sorted((GOLDEN / "lora").glob("*"))]


# ---- the weights ----


@needs_shared
@pytest.mark.parametrize("name", ADAPTERS)
def test_recorded_adapters_merge_to_the_recorded_weights_and_logits(name, tmp_path):
    adapter = GOLDEN / "lora" / name
    base = (
        adapter
        / json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    )
    merge_checkpoint(base, [adapter], tmp_path / "out")
    want, got = load_file(adapter / "expected.safetensors"), tensors_in(tmp_path / "out")
    recorded = [key for key in want if key.startswith("merged.")]
    assert recorded and all(
        (got[key.removeprefix("merged.")] - want[key]).abs().max() < 1e-5 for key in recorded
    )
    logits = in_transformers(tmp_path / "out")(want["input_ids"]).logits
    real = want["attention_mask"].bool()
    assert (logits - want["logits_merged"])[real].abs().max() < 1e-4
    assert (logits - want["logits"])[real].abs().max() < 1e-4
    ours = load_model(tmp_path / "out")
    assert (ours.logits(ours(want["input_ids"])) - want["logits_merged"])[real].abs().max() < 1e-4


@needs_shared
@pytest.mark.parametrize("case", ["export_float32", "export_bfloat16"])
def test_llama_factory_yaml_gives_the_same_bytes(case, tmp_path, monkeypatch):
    """Tensors and config.json are what `llamafactory-cli export` wrote, with its own yaml."""
    for part in (case, "tiny_llama3", "sft_llama3"):
        shutil.copytree(
            GOLDEN / "curves" / part, tmp_path / part, ignore=shutil.ignore_patterns("exported")
        )
    monkeypatch.chdir(tmp_path / case)
    merge.main(["--config", "config.yaml"])
    got, want = tmp_path / case / "exported", GOLDEN / "curves" / case / "exported"
    ours, theirs = load_file(got / "model.safetensors"), load_file(want / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) for name in theirs
    )
    assert json.loads((got / "config.json").read_text()) == json.loads(
        (want / "config.json").read_text()
    )
    transformers = pytest.importorskip("transformers")
    talk = [
        {"role": role, "content": role.upper()} for role in ("system", "user", "assistant", "user")
    ]
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(got)
    other = (want / "chat_template.jinja").read_text()
    rendered = [
        tokenizer.apply_chat_template(talk, chat_template=text, tokenize=False)
        for text in (None, other)
    ]
    assert rendered[0] == rendered[1] and "ASSISTANT" in rendered[0]
    settings = json.loads((want / "tokenizer_config.json").read_text())
    assert (tokenizer.eos_token, tokenizer.pad_token) == (
        settings["eos_token"],
        settings["pad_token"],
    )


def in_transformers(folder):
    """The folder loaded by transformers, without a missing or unexpected tensor."""
    transformers = pytest.importorskip("transformers")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype="auto", attn_implementation="eager"
    )
    assert not any(report.values()), report
    return model.eval().requires_grad_(False)


PEFT_CASES = {  # base, settings of each adapter: as peft attaches them one after the other
    "mistral": ("mistral", [dict(target_modules="all-linear")]),
    "sharded": ("llama3_sharded", [dict(target_modules="all-linear")]),
    "ranks of their own": (
        "qwen2",
        [
            dict(
                target_modules="all-linear", rank_pattern={"q_proj": 2}, alpha_pattern={"k_proj": 3}
            )
        ],
    ),
    "three adapters": (
        "qwen3",
        [
            dict(target_modules=["q_proj"]),
            dict(target_modules="all-linear", use_rslora=True),
            dict(target_modules=["q_proj"], modules_to_save=["norm", "lm_head"]),
        ],
    ),
    "tied": ("qwen2_tied", [dict(target_modules="all-linear")]),
    "tied, head trained": (
        "llama3_tied",
        [dict(target_modules=["q_proj"], modules_to_save=["lm_head"])],
    ),
    "tied, embedding trained": (
        "qwen2_tied",
        [dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"])],
    ),
    "tied, head adapted": ("llama3_tied", [dict(target_modules=["q_proj", "lm_head"])]),
    "tied, both in turn": (
        "qwen2_tied",
        [
            dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
            dict(target_modules=["lm_head"]),
        ],
    ),
}


@needs_shared
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", PEFT_CASES)
def test_merged_equals_base_plus_adapter_in_peft(case, tmp_path):
    peft = pytest.importorskip("peft")
    name, settings = PEFT_CASES[case]
    if (
        name == "llama3_tied"
        and int(pytest.importorskip("transformers").__version__.split(".")[0]) < 5
    ):
        pytest.skip("transformers 4 does not read the rope_parameters of this config.json")
    base, adapters = GOLDEN / "models" / name, []
    model = in_transformers(base)
    ids = torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(5))
    for number, fields in enumerate(settings):
        torch.manual_seed(number)
        attached = peft.get_peft_model(
            model, peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **fields)
        )
        with torch.no_grad():
            for key, p in attached.named_parameters():
                if p.requires_grad:
                    p += 0.05 * torch.randn(p.shape)
        adapters.append(tmp_path / f"adapter{number}")
        attached.save_pretrained(adapters[-1])
        with torch.no_grad():
            want = attached(ids).logits
        model = attached.merge_and_unload()
    merge_checkpoint(base, adapters, tmp_path / "out", shard_bytes=100_000)
    assert (in_transformers(tmp_path / "out")(ids).logits - want).abs().max() < 1e-4
    ours = load_with_adapters(base, adapters)
    assert (ours.logits(ours(ids)) - want).abs().max() < 1e-4
    assert max(p.stat().st_size for p in (tmp_path / "out").glob("model-*")) <= 100_000
    names, before = set(tensor_files(tmp_path / "out")), set(tensor_files(base))
    apart = case.startswith("tied, ")
    assert names == before | ({HEAD} if apart else set())
    still_tied = json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"]
    assert still_tied == ("tied" in name and not apart)


def test_sums_are_rounded_once_and_extra_tensors_are_carried(tmp_path, monkeypatch):
    monkeypatch.setattr(merge, "BLOCK", 100)  # every tensor in several blocks
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.arange(4.0),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 3),
    }
    base = base_with(tmp_path / "base", torch.bfloat16, 20_000, extra.items())
    adapters = [adapter_with(tmp_path / f"a{seed}", base, seed=seed) for seed in (1, 2)]
    before, tensors = (
        tensors_in(base),
        [load_file(a / "adapter_model.safetensors") for a in adapters],
    )
    assert len(set(tensor_files(base).values())) > 2
    for dtype in (None, torch.float32):
        merge_checkpoint(base, adapters, tmp_path / f"out {dtype}", dtype)
        after = tensors_in(tmp_path / f"out {dtype}")
        assert after.keys() == before.keys()
        for name, weight in before.items():
            want = weight.double()
            for t in tensors:
                A = f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight"
                if A in t:
                    want = want + 2.0 * t[A.replace("lora_A", "lora_B")].double() @ t[A].double()
            kept = weight.dtype if dtype is None or name in extra else dtype
            assert after[name].dtype == kept
            rtol = 0.008 if dtype is None else 1e-6
            assert torch.allclose(
                after[name].double(), want.to(kept).double(), rtol=rtol, atol=1e-6
            )
            if name in extra:
                assert torch.equal(after[name], weight)
            elif dtype is None:  # the nearest bfloat16, almost everywhere
                assert (after[name] == want.float().bfloat16()).float().mean() > 0.99


def test_without_an_adapter_the_weights_are_converted(tmp_path):
    base = base_with(tmp_path / "base")
    merge_checkpoint(base, [], tmp_path / "out", torch.float16, shard_bytes=10_000)
    before, after = tensors_in(base), tensors_in(tmp_path / "out")
    assert all(torch.equal(after[name], before[name].half()) for name in before)
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads(
        (base / "config.json").read_text()
    ) | {"torch_dtype": "float16"}


# ---- families with names of their own ----


def random_adapter(base, folder, targets=None, size=0.05, **fields):
    """A random adapter of `base` in `folder`, and the model with it; targets: all linear layers,
    experts among them."""
    model = load_model(base, torch.float32)
    targets = targets or (["all", "experts"] if model.config.num_experts else "all")
    config = LoRAConfig(r=3, lora_alpha=6, target_modules=targets, **fields)
    attach_lora(model, config, stored_name=model.config.stored_name, **variant_arguments(config))
    perturb(model, size=size).eval()
    folder.mkdir()
    save_adapter(model, folder, config, str(base))
    return model


def merged_by_hand(name, weight, tensors):
    """The float32 sum of base and adapter by PEFT's formulas, or None where the adapter has no
    part."""
    module = f"base_model.model.{name.removesuffix('.weight')}"
    if name.endswith(
        ("experts.gate_up_proj", "experts.down_proj")
    ):  # experts.base_layer is the first of two
        module = module.rpartition(".")[0] + (
            ".base_layer" if name.endswith("gate_up_proj") else ""
        )
        A, B = (tensors[f"{module}.lora_{part}.weight"].double() for part in "AB")
        A, B = A.reshape(len(weight), -1, A.shape[-1]), B.reshape(B.shape[0], -1, len(weight))
        return weight.double() + 2 * torch.einsum("ire,ero->eio", B, A)
    if f"{module}.lora_A.weight" not in tensors:
        return None
    A, B = (tensors[f"{module}.lora_{part}.weight"].double() for part in "AB")
    return weight.double() + 2 * B @ A


@needs_shared
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_family_keeps_the_names_of_its_files(name, tmp_path):
    """Names, order, shapes and dtypes are the base's; tensors that are not adapted (of a vision
    model, buffers, the raw rows of a normalized head) are copied bit for bit."""
    base = checkpoint_of(name, tmp_path / "base")
    model = random_adapter(base, tmp_path / "adapter")
    merge_checkpoint(base, [tmp_path / "adapter"], tmp_path / "out", shard_bytes=200_000)
    before, after = tensors_in(base), tensors_in(tmp_path / "out")
    assert list(tensor_files(tmp_path / "out")) == list(tensor_files(base))
    tensors, changed = load_file(tmp_path / "adapter/adapter_model.safetensors"), 0
    for key, weight in before.items():
        want = merged_by_hand(key, weight, tensors)
        assert (after[key].shape, after[key].dtype) == (weight.shape, weight.dtype)
        if want is None:
            assert torch.equal(after[key], weight), key
        else:
            assert (after[key].double() - want).abs().max() < (
                1e-5 if weight.dtype == torch.float32 else 0.02
            ), key
            changed += 1
    assert changed == len(lora_layers(model)) and changed * 2 == len(tensors)
    if next(iter(before.values())).dtype == torch.float32:
        merged, wanted = logits_of(load_model(tmp_path / "out"), IDS), logits_of(model, IDS)
        assert (merged - wanted).abs().max() < 1e-5 * wanted.abs().max()


@needs_shared
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["chatglm3", "baichuan2_13b", "llama4", "qwen", "phi3"])
def test_sums_of_16_bit_bases_in_shards_are_rounded_once(name, dtype, tmp_path):
    base = tmp_path / "base"
    source = checkpoint_of(name, tmp_path / "source")
    base.mkdir()
    weights = {key: weight.to(dtype) for key, weight in tensors_in(source).items()}
    shapes = {key: (tuple(weight.shape), dtype) for key, weight in weights.items()}
    write_tensors(base, shapes, lambda key: [weights[key]], 150_000)
    shutil.copyfile(source / "config.json", base / "config.json")
    assert len(set(tensor_files(base).values())) > 1
    random_adapter(base, tmp_path / "adapter")
    merge_checkpoint(base, [tmp_path / "adapter"], tmp_path / "out")
    after, tensors = (
        tensors_in(tmp_path / "out"),
        load_file(tmp_path / "adapter/adapter_model.safetensors"),
    )
    assert after.keys() == weights.keys() and {t.dtype for t in after.values()} == {dtype}
    for key, weight in weights.items():
        want = merged_by_hand(key, weight, tensors)
        if want is None:
            assert torch.equal(after[key], weight)
        else:  # a sum in float32 is rounded differently at times
            assert (after[key] == want.to(dtype)).float().mean() > 0.99, key


@needs_shared
@pytest.mark.parametrize(
    "name, whole",
    [
        ("chatglm3", ["word_embeddings", "output_layer"]),
        ("qwen", ["wte"]),
        ("baichuan2_7b", ["lm_head"]),
        ("llama4", ["experts", "router"]),
    ],
)
def test_modules_to_save_replace_those_of_the_base(name, whole, tmp_path):
    base = checkpoint_of(name, tmp_path / "base")
    model = random_adapter(base, tmp_path / "adapter", ["all"], modules_to_save=whole)
    merge_checkpoint(base, [tmp_path / "adapter"], tmp_path / "out")
    tensors, after = (
        load_file(tmp_path / "adapter/adapter_model.safetensors"),
        tensors_in(tmp_path / "out"),
    )
    replaced = [key for key in tensors if ".lora_" not in key]
    assert {part for part in whole for key in replaced if part in key} == set(whole)
    assert all(
        torch.equal(after[key.removeprefix("base_model.model.")], tensors[key]) for key in replaced
    )
    assert list(after) == list(tensors_in(base))
    merged, wanted = logits_of(load_model(tmp_path / "out"), IDS), logits_of(model, IDS)
    assert (merged - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize(
    "config, head, embedding",
    [(twins.INTERNLM2, "output", "tok_embeddings"), (twins.QWEN1, "lm_head", "wte")],
)
def test_tied_heads_by_vendors_names(config, head, embedding, tmp_path):
    base, config = tmp_path / "base", {**config, "tie_word_embeddings": True}
    base.mkdir()
    shapes, _ = twins.TWINS[config["model_type"]]
    save_file(twins.random_weights(shapes(config), 0), str(base / "model.safetensors"))
    (base / "config.json").write_text(json.dumps(config))
    for number, (whole, apart) in enumerate([([], False), ([head], True), ([embedding], True)]):
        adapter, out = tmp_path / f"adapter{number}", tmp_path / f"out{number}"
        model = random_adapter(base, adapter, modules_to_save=whole)
        merge_checkpoint(base, [adapter], out)
        assert set(tensor_files(out)) - set(tensor_files(base)) == (
            {f"{head}.weight"} if apart else set()
        )
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] != apart
        merged, wanted = logits_of(load_model(out), IDS), logits_of(model, IDS)
        assert (merged - wanted).abs().max() < 1e-5 * wanted.abs().max()


@needs_shared
def test_both_layouts_of_stacked_adapters_merge_alike(tmp_path):
    """PEFT 0.20 and newer swap A and B of stacks; B'[i, r, e] A'[e, r, o] is the same sum."""
    base = GOLDEN / "models" / "llama4"
    model = random_adapter(base, tmp_path / "older", ["experts"])
    shutil.copytree(tmp_path / "older", tmp_path / "newer")
    tensors = load_file(tmp_path / "older/adapter_model.safetensors")
    for key in [key for key in tensors if "lora_A" in key]:
        other = key.replace("lora_A", "lora_B")
        A, B = (
            tensors[key].reshape(4, 3, -1),
            tensors[other].reshape(-1, 3, 4),
        )  # (E, r, in), (out, r, E)
        tensors[key], tensors[other] = (
            t.contiguous()
            for t in (B.permute(2, 1, 0).reshape(12, -1), A.permute(2, 1, 0).reshape(-1, 12))
        )
    save_file(tensors, tmp_path / "newer/adapter_model.safetensors")
    for form in ("older", "newer"):
        merge_checkpoint(base, [tmp_path / form], tmp_path / f"out {form}")
    older, newer = (tensors_in(tmp_path / f"out {form}") for form in ("older", "newer"))
    assert all(torch.allclose(newer[key], older[key], atol=1e-6) for key in older)
    assert (
        logits_of(load_with_adapters(base, [tmp_path / "newer"]), IDS) - logits_of(model, IDS)
    ).abs().max() < 1e-5


@pytest.mark.skipif(not PICKLES_ARE_SAFE, reason=f"torch {torch.__version__} reads no pickles")
@pytest.mark.parametrize("shards", [1, 3])
def test_a_pickled_base_becomes_safetensors(shards, tmp_path):
    base, pickled = base_with(tmp_path / "base", torch.bfloat16), tmp_path / "pickled"
    adapter, weights = adapter_with(tmp_path / "adapter", base), tensors_in(base)
    pickled.mkdir()
    shutil.copyfile(base / "config.json", pickled / "config.json")
    where = {name: f"pytorch_model-{n % shards}.bin" for n, name in enumerate(weights)}
    for file in set(where.values()):
        held = {name: tensor for name, tensor in weights.items() if where[name] == file}
        torch.save(held, pickled / (file if shards > 1 else "pytorch_model.bin"))
    if shards > 1:
        (pickled / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    merge_checkpoint(base, [adapter], tmp_path / "want")
    merge_checkpoint(pickled, [adapter], tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    want, got = tensors_in(tmp_path / "want"), tensors_in(tmp_path / "out")
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


# ---- memory and interruption ----


def peak_of_merging(base, adapter, out, shard_bytes):
    """Bytes that merging adds to the peak of a separate process.

    VmHWM is the child's own peak; its ru_maxrss would begin at that of the process it was forked
    from, and hide everything below.
    """
    code = (
        "import sys, merge\n"
        "lines = lambda: open('/proc/self/status')\n"
        "peak = lambda: next(int(s.split()[1]) for s in lines() if s.startswith('VmHWM'))\n"
        "before = peak()\n"
        "base, adapter, out, shard_bytes = sys.argv[1:]\n"
        "merge.merge_checkpoint(base, [adapter], out, shard_bytes=int(shard_bytes))\n"
        "print((peak() - before) * 1024)"
    )
    command = [sys.executable, "-c", code, base, adapter, out, str(shard_bytes)]
    ran = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stderr
    return int(ran.stdout.split()[-1])


@pytest.mark.skipif(
    not Path("/proc/self/status").is_file(),
    reason="the peak of a process is read from /proc (Linux)",
)
@pytest.mark.parametrize(
    "suffix",
    [
        "safetensors",
        pytest.param(
            "bin",
            marks=pytest.mark.skipif(
                not PICKLES_ARE_SAFE, reason=f"torch {torch.__version__} reads no pickles"
            ),
        ),
    ],
)
def test_memory_of_merging_stacked_experts(suffix, tmp_path):
    """0.3 GB, most of it in three stacks of 67 MB and three of 34 MB, all adapted."""
    fields = dict(
        model_type="llama4_text",
        hidden_size=1024,
        intermediate_size=2048,
        intermediate_size_mlp=64,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=500,
        max_position_embeddings=64,
        num_local_experts=8,
        num_experts_per_tok=1,
        interleave_moe_layer_step=1,
    )
    with torch.device("meta"):
        model = CausalLM(model_config(fields))
    shapes = {
        model.config.stored_name(name): (tuple(p.shape), torch.bfloat16)
        for name, p in model.named_parameters()
    }
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    write_tensors(
        base, shapes, lambda name: [torch.full(shapes[name][0], 0.5, dtype=torch.bfloat16)]
    )
    (base / "config.json").write_text(json.dumps(fields))
    config = LoRAConfig(r=8, lora_alpha=8, target_modules=["experts"])
    attach_lora(model, config, stored_name=model.config.stored_name)
    adapter.mkdir()
    save_adapter(model.to_empty(device="cpu"), adapter, config, "base")
    if suffix == "bin":
        torch.save(tensors_in(base), base / "pytorch_model.bin")
        (base / "model.safetensors").unlink()
    held = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {key: torch.full_like(t, 0.25) for key, t in held.items()},
        adapter / "adapter_model.safetensors",
    )
    del model, held
    used = peak_of_merging(base, adapter, tmp_path / "out", 10**9)
    with safe_open(str(tmp_path / "out/model.safetensors"), "pt") as file:
        stack = file.get_slice("model.layers.2.feed_forward.experts.down_proj")[7:8, 2040:]
    shutil.rmtree(tmp_path)
    assert stack.unique().tolist() == [1.0] and used < 100 * 10**6, (
        f"{used / 1e6:.0f} MB"
    )  # 0.5 + 8 / 16


@pytest.mark.skipif(
    not Path("/proc/self/status").is_file(),
    reason="the peak of a process is read from /proc (Linux)",
)
def test_memory_stays_below_the_largest_tensor_plus_300_mb(tmp_path):
    """0.6 GB in four files; the largest tensor is adapted."""
    base = tmp_path / "base"
    sizes = dict(hidden_size=2048, intermediate_size=4096, num_hidden_layers=4, vocab_size=40_000)
    with torch.device("meta"):
        model = CausalLM(model_config({**TINY_LLAMA, **sizes}))
    shapes = {name: (tuple(p.shape), torch.bfloat16) for name, p in model.named_parameters()}
    base.mkdir()
    write_tensors(
        base, shapes, lambda n: [torch.full(shapes[n][0], 0.5, dtype=torch.bfloat16)], 170 * 10**6
    )
    (base / "config.json").write_text(json.dumps({**TINY_LLAMA, **sizes}))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    modules = {
        n.removesuffix(".weight"): s for n, (s, _) in shapes.items() if n == HEAD or "_proj" in n
    }
    save_file(
        {
            f"base_model.model.{n}.lora_{x}.weight": torch.full(
                (8, s[1]) if x == "A" else (s[0], 8), 0.25
            )
            for n, s in modules.items()
            for x in "AB"
        },
        str(adapter / "adapter_model.safetensors"),
    )
    (adapter / "adapter_config.json").write_text(
        json.dumps(
            {
                "r": 8,
                "lora_alpha": 8,
                "target_modules": sorted({n.rsplit(".", 1)[-1] for n in modules}),
            }
        )
    )
    used = peak_of_merging(base, adapter, tmp_path / "out", 170 * 10**6)
    largest = max(2 * math.prod(shape) for shape, _ in shapes.values())
    written = sorted((tmp_path / "out").glob("model-*"))
    assert (
        sum(p.stat().st_size for p in written) > 590 * 10**6
        and len(written) == len(list(base.glob("model-*"))) > 3
    )
    assert max(p.stat().st_size for p in written) <= 170 * 10**6
    assert used < largest + 300 * 10**6, f"{used / 1e6:.0f} MB"
    assert load_file(written[-1])[HEAD].unique().tolist() == [1.0]  # 0.5 + 8 * 0.25 * 0.25
    shutil.rmtree(tmp_path)


def test_killed_or_interrupted_in_the_middle(tmp_path, monkeypatch):
    base = base_with(tmp_path / "base")
    adapter, out = adapter_with(tmp_path / "adapter", base), tmp_path / "out"
    code = (
        "import itertools, os, sys, merge; count, add = itertools.count(), merge.merged_weight\n"
        "die = lambda: os.kill(os.getpid(), 9)\n"
        "merge.merged_weight = lambda *a: die() if next(count) == 2 else add(*a)\n"
        "merge.merge_checkpoint(sys.argv[1], [sys.argv[2]], sys.argv[3])"
    )
    killed = subprocess.run(
        [sys.executable, "-c", code, base, adapter, out], cwd=ROOT, capture_output=True
    )
    assert killed.returncode == -signal.SIGKILL and not out.exists()
    left, = tmp_path.glob("out.*.partial")
    assert (left / "new/model.safetensors").is_file()  # while it was writing

    merge_checkpoint(base, [adapter], out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "out"]
    whole = (out / "model.safetensors").read_bytes()

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(merge, "merged_weight", interrupt)
    with pytest.raises(KeyboardInterrupt):
        merge_checkpoint(base, [adapter], out, overwrite=True)
    assert (out / "model.safetensors").read_bytes() == whole  # the earlier result is kept
    left.mkdir()  # as if killed between the two renames
    os.close(write_mark(left, "out"))
    os.replace(out, left / "old")
    with pytest.raises(KeyboardInterrupt):
        merge_checkpoint(base, [adapter], out, overwrite=True)
    assert (out / "model.safetensors").read_bytes() == whole
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "out"]


# ---- the other files, the template, the command line ----


def test_files_that_are_carried_along(tmp_path):
    carried = ("tokenizer.json", "special_tokens_map.json", "tokenizer_config.json",
               "generation_config.json", "merges.txt", "tokenizer.model", "LICENSE", "NOTICE.txt",
               "modeling_x.py")
    left_behind = ("README.md", "trainer_state.json", "all_results.json", "x.bin")
    base = base_with(tmp_path / "base")
    adapters = [adapter_with(tmp_path / f"a{n}", base) for n in (1, 2)]
    for name in carried + left_behind:
        (base / name).write_text("base")
    merge_checkpoint(base, adapters, tmp_path / "plain")
    found = {p.name for p in (tmp_path / "plain").iterdir()}
    assert found == {"config.json", "model.safetensors", *carried}

    of_the_adapter = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    for name in (*of_the_adapter, "README.md", "all_results.json"):
        (adapters[0] / name).write_text("adapter")
    merge_checkpoint(base, adapters, tmp_path / "tuned")
    found = {
        p.name: p.read_text()
        for p in (tmp_path / "tuned").iterdir()
        if p.suffix in (".json", ".jinja")
    }
    # the base's special_tokens_map.json would restore the old tokens
    assert {name for name, text in found.items() if text == "adapter"} == set(of_the_adapter)
    assert found["generation_config.json"] == "base" and "special_tokens_map.json" not in found


def test_the_training_yaml_and_the_stored_template(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = base_with(Path("base"))
    adapter = adapter_with(Path("saves/run"), base, base_model_name_or_path="org/other-name")
    (adapter / "train_config.json").write_text('{"template": "qwen"}')
    Path("train.yaml").write_text(
        "model_name_or_path: base\nstage: sft\ndo_train: true\ndataset: identity\n"
        "output_dir: saves/run\nlearning_rate: 1e-4\ntrust_remote_code: true\n"
    )
    merge.main(["--config", "train.yaml", "export_dir=out"])
    printed = capsys.readouterr().out
    assert "template  qwen" in printed
    assert "warning: it says it was trained on org/other-name" in printed
    assert "out: 2 files" in printed
    assert "21 tensors read back" in printed
    assert "trust_remote_code" in printed
    with pytest.raises(
        ValueError,
        match="template: llama3, but saves/run was trained with qwen.*force_template: true",
    ):
        merge.main(["train.yaml", "export_dir=out2", "template=llama3"])
    merge.main(
        [
            "train.yaml",
            "export_dir=out2",
            "template=llama3",
            "force_template=true",
            "infer_dtype=bfloat16",
        ]
    )
    assert tensors_in("out2")[HEAD].dtype == torch.bfloat16
    under = adapter_with(Path("saves/under"), base, seed=2)
    (adapter / "train_config.json").write_text(
        '{"adapter_name_or_path": ["saves/under"], "create_new_adapter": true}'
    )
    # adapters it was trained on top of are added first
    merge.main(["train.yaml", "export_dir=both"])
    merge_checkpoint(base, [under, adapter], "same")
    assert all(
        torch.equal(tensors_in("both")[name], tensor) for name, tensor in tensors_in("same").items()
    )
    assert "warning" not in capsys.readouterr().out.replace("warning: it says", "")
    merge.main(["train.yaml", "export_dir=alone", "adapter_name_or_path=saves/run"])
    assert (
        "warning   saves/run was trained with saves/under merged into the base"
        in capsys.readouterr().out
    )
    shutil.rmtree(adapter)
    with pytest.raises(FileNotFoundError, match="output_dir saves/run holds no adapter"):
        merge.main(["train.yaml", "export_dir=out3"])


@needs_shared
def test_stop_tokens_of_the_stored_template(tmp_path):
    """The base has another stop token; only the adapter's train_config.json
    names the chat format."""
    base = tmp_path / "base"
    shutil.copytree(GOLDEN / "curves/tiny_llama3", base)
    (base / "generation_config.json").write_text('{"eos_token_id": 1001}')
    (base / "tokenizer_config.json").write_text(
        '{"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}'
    )
    adapter = adapter_with(tmp_path / "adapter", base)
    (adapter / "train_config.json").write_text('{"template": "llama3", "enable_thinking": null}')
    merge_checkpoint(base, [adapter], tmp_path / "out")
    read = {p.name: json.loads(p.read_text()) for p in (tmp_path / "out").glob("*.json")}
    eot = {token["content"]: token["id"] for token in read["tokenizer.json"]["added_tokens"]}[
        "<|eot_id|>"
    ]
    assert (
        read["tokenizer_config.json"]["eos_token"] == "<|eot_id|>"
        and "special_tokens_map.json" not in read
    )
    ends = read["generation_config.json"]["eos_token_id"]
    assert ends[0] == 1001 and eot in ends
    assert (tmp_path / "out/chat_template.jinja").is_file()
    with pytest.raises(ValueError, match="template 'qwen' uses '<|im_end|>'.*Try template: llama3"):
        merge_checkpoint(base, [], tmp_path / "other", template="qwen")
    assert not (tmp_path / "other").exists()


def test_an_error_on_the_command_line_is_one_line(tmp_path):
    base = base_with(tmp_path / "base")
    settings = [
        f"model_name_or_path={base}",
        f"adapter_name_or_path={tmp_path}/none",
        f"export_dir={tmp_path}/out",
    ]
    ran = subprocess.run(
        [sys.executable, "merge.py", *settings], cwd=ROOT, capture_output=True, text=True
    )
    assert (
        ran.returncode == 1 and ran.stderr.startswith("error: ") and "Traceback" not in ran.stderr
    )
    assert len(ran.stderr.splitlines()) == 1 and not (tmp_path / "out").exists()


# ---- what a user may get wrong ----


def test_folders_that_are_not_overwritten(tmp_path, monkeypatch):
    base = base_with(tmp_path / "models/base")
    adapter, out = adapter_with(tmp_path / "adapter", base), tmp_path / "out"
    os.mkfifo(base.parent / "pipe")
    for place, words in (
        (base, "is .*stays unchanged"),
        (adapter, "is .*stays"),
        (tmp_path / "models", "holds .*stays"),
        (base / "config.json", "is a file"),
        (base / "config.json/out", "config.json is a file"),
        (base.parent / "pipe", "is a file"),            # as /dev/null would be
    ):
        with pytest.raises(ValueError, match=words):
            merge_checkpoint(base, [adapter], place, overwrite=True)
    out.mkdir()
    merge_checkpoint(base, [adapter], out)  # an empty folder is allowed
    with pytest.raises(ValueError, match="is not empty.*overwrite: true"):
        merge_checkpoint(base, [adapter], out)
    merge_checkpoint(base, [], out, overwrite=True)
    assert torch.equal(tensors_in(out)[HEAD], tensors_in(base)[HEAD])
    (out / "photos").mkdir()
    with pytest.raises(ValueError, match="holds photos, which no earlier export"):
        merge_checkpoint(base, [adapter], out, overwrite=True)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)
    )
    with pytest.raises(OSError, match="1000 bytes free. Make room"):
        merge_checkpoint(base, [adapter], tmp_path / "more")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "models", "out"]


def test_nothing_beside_an_export_is_touched(tmp_path):
    """Backups and bases whose names are the export's with an ending; files and other models in the
    folder of an export."""
    models = tmp_path / "models"
    base = base_with(models / "q.partial")
    old = base_with(models / "q.old")
    adapter = adapter_with(tmp_path / "adapter", base)
    merge_checkpoint(base, [adapter], models / "q")
    merge_checkpoint(old, [adapter], models / "q", overwrite=True)
    assert sorted(p.name for p in models.iterdir()) == ["q", "q.old", "q.partial"]
    for folder in (base, old):
        assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]

    for name in ("notes.txt", "README.md", "adapter_model.safetensors"):
        save_file({"a": torch.ones(2)}, models / "q" / name)
        with pytest.raises(ValueError, match=f"holds {name}, which no earlier export"):
            merge_checkpoint(base, [adapter], models / "q", overwrite=True)
        assert (models / "q" / name).is_file()
        (models / "q" / name).unlink()
    other = base_with(models / "other")
    with pytest.raises(ValueError, match="holds model.safetensors, which no earlier export"):
        merge_checkpoint(base, [adapter], other, overwrite=True)
    merge_checkpoint(base, [adapter], models / "q", shard_bytes=20_000, overwrite=True)
    merge_checkpoint(base, [adapter], models / "q", overwrite=True)
    assert sorted(p.name for p in (models / "q").iterdir()) == ["config.json", "model.safetensors"]


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
BAD = {  # changes of the adapter: words of the message
    "a tensor too many": (
        dict(
            add=[("base_model.model.model.layers.9.mlp.up_proj.lora_A.weight", torch.ones(4, 32))]
        ),
        "not used: 1, such as .*layers.9",
    ),
    "a tensor too few": (dict(drop=[Q]), "missing: 1, such as .*q_proj.lora_A"),
    "another rank": (
        dict(add=[(Q, torch.ones(5, 32))]),
        r"q_proj.lora_A.weight has shape \[5, 32\].*r is 4.*another",
    ),
    "another model's names": (dict(target_modules=["c_attn"]), "made for another model.*c_attn"),
    "another base's head": (
        dict(
            targets=["lm_head"],
            add=[("base_model.model.lm_head.base_layer.weight", torch.ones(50, 32))],
        ),
        "trained on a model whose lm_head.weight has other values",
    ),
    "NaN": (dict(add=[(Q, torch.full((4, 32), math.nan))]), "q_proj.weight: the sum is not finite"),
    "DoRA without lengths": (dict(use_dora=True), "missing: 4, such as .*lora_magnitude_vector"),
}


@pytest.mark.parametrize("case", BAD)
def test_adapters_that_do_not_fit_are_refused(case, tmp_path):
    base, (changes, words) = base_with(tmp_path / "base"), BAD[case]
    with pytest.raises(ValueError, match=f"(?s){words}"):
        merge_checkpoint(
            base, [adapter_with(tmp_path / "adapter", base, **changes)], tmp_path / "out"
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


def test_damaged_and_missing_files(tmp_path):
    base = base_with(tmp_path / "base", shard_bytes=20_000)
    adapter, out = adapter_with(tmp_path / "adapter", base), tmp_path / "out"
    other = base_with(tmp_path / "other", hidden_size=40, intermediate_size=48)
    with pytest.raises(ValueError, match="has shape .*is this another model"):
        merge_checkpoint(other, [adapter], out)
    with pytest.raises(ValueError, match="beyond float16.*infer_dtype: bfloat16"):
        huge = adapter_with(tmp_path / "huge", base, alpha=10**7)
        merge_checkpoint(base, [huge], out, torch.float16)
    damaged = base_with(tmp_path / "nan", extra={"model.norm.weight": torch.full((32,), torch.nan)})
    with pytest.raises(ValueError, match="model.norm.weight holds NaN or infinity: the base is"):
        merge_checkpoint(damaged, [], out, torch.float16)
    for file, words in (
        (
            adapter / "adapter_model.safetensors",
            "adapter_model.safetensors is damaged or incomplete",
        ),
        (
            sorted(base.glob("model-*"))[1],
            "model-00002-.* is damaged or incomplete.*fetch it again",
        ),
    ):
        whole = file.read_bytes()
        file.write_bytes(whole[:-50])
        with pytest.raises(ValueError, match=words):
            merge_checkpoint(base, [adapter], out)
        file.write_bytes(whole)
    config = (base / "config.json").read_text()
    (base / "config.json").write_text(
        config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
    )
    with pytest.raises(
        ValueError, match="9 tensors that config.json describes are not in .*layers.2"
    ):
        merge_checkpoint(base, [], out)
    (base / "config.json").write_text(config.replace('"vocab_size": 50', '"vocab_size": 51'))
    with pytest.raises(
        ValueError, match=rf"{EMBEDDING} has shape \[50, 32\], config.json makes it \[51, 32\]"
    ):
        merge_checkpoint(base, [], out)
    (base / "config.json").write_text(config)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="adapter_model.safetensors is missing"):
        merge_checkpoint(base, [adapter], out)
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="adapter_config.json is missing"):
        merge_checkpoint(base, [adapter], out)
    assert not out.exists()


# ---- adapters of a base in 4 or 8 bits ----------------------------------------


QUANT = GOLDEN / "quant"


@needs_shared
@pytest.mark.parametrize("name", [p.name for p in sorted(QUANT.glob("lora_*"))])
def test_recorded_adapters_of_4_bit_bases_merge_into_dequantized_weights(name, tmp_path):
    adapter, want = QUANT / name, load_file(QUANT / name / "expected.safetensors")
    base = (
        adapter
        / json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    )
    merge_checkpoint(base, [adapter], tmp_path / "out", torch.float32)
    got, recorded = tensors_in(tmp_path / "out"), [key for key in want if key.startswith("merged.")]
    assert recorded and all(
        (got[key.removeprefix("merged.")] - want[key]).abs().max() < 1e-6 for key in recorded
    )
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    real = want["attention_mask"].bool()
    theirs = in_transformers(tmp_path / "out")(want["input_ids"]).logits
    assert (theirs - want["logits_merged_float32"])[real].abs().max() < 1e-4
    if "logits_merged_bfloat16" in want:
        merge_checkpoint(base, [adapter], tmp_path / "half")
        ours = load_model(tmp_path / "half")
        assert ours.lm_head.weight.dtype == torch.bfloat16
        with torch.no_grad():
            assert (ours.logits(ours(want["input_ids"])) - want["logits_merged_bfloat16"])[
                real
            ].abs().max() < 0.2


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_base_quantized_on_load_is_merged_dequantized_or_original(kind, tmp_path, capsys):
    """The adapter's train_config.json tells which; every linear layer but the head is as in
    training, adapted or not."""
    base = base_with(tmp_path / "base", torch.bfloat16)
    adapter, bits = adapter_with(tmp_path / "adapter", base), 4 if kind == "nf4" else 8
    (adapter / "train_config.json").write_text(json.dumps({"quantization_bit": bits, "bf16": True}))
    argv = [f"model_name_or_path={base}", f"adapter_name_or_path={adapter}"]
    merge.main([*argv, f"export_dir={tmp_path / 'dense'}", "infer_dtype=float32"])
    merge.main(
        [*argv, f"export_dir={tmp_path / 'original'}", "infer_dtype=float32", "merge_base=original"]
    )
    assert (
        "rounded to " + kind in (out := capsys.readouterr().out)
        and "another model than was trained" in out
    )
    plain = load_model(base, torch.float32)
    seen = load_model(base, quant_format=QuantFormat(kind, nested=256 if kind == "nf4" else 0))
    for folder, model in (("dense", seen), ("original", plain)):
        got = tensors_in(tmp_path / folder)
        want = {
            f"{name}.weight": module.weight.dequantize(torch.float32)
            if isinstance(module, QuantLinear)
            else module.weight
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear)
        }
        load_adapter(model, adapter)
        for name, layer in lora_layers(model).items():
            want[f"{name}.weight"] = (
                want[f"{name}.weight"] + layer.lora_B.weight @ layer.lora_A.weight * layer.scale
            )
        assert all((got[name] - weight).abs().max() < 1e-6 for name, weight in want.items())
    assert not torch.equal(
        tensors_in(tmp_path / "dense")["model.layers.0.mlp.up_proj.weight"],
        tensors_in(tmp_path / "original")["model.layers.0.mlp.up_proj.weight"],
    )


def test_a_quantized_checkpoint_is_dequantized_and_has_no_original(tmp_path):

    folder = write_quantized(base_with(tmp_path / "base"), tmp_path / "packed",
                             QuantFormat("fp4", 128))
    merge_checkpoint(folder, [], tmp_path / "plain")
    want, got = load_model(folder), load_model(tmp_path / "plain")
    ids = torch.arange(9)[None]
    assert torch.allclose(got.logits(got(ids)), want.logits(want(ids)), atol=1e-6)
    assert got.model.layers[0].mlp.up_proj.weight.dtype == torch.float32
    with pytest.raises(
        ValueError,
        match="merge_base: original: .* itself is stored quantized .*name the 16-bit check",
    ):
        merge.main(
            [f"model_name_or_path={folder}", f"export_dir={tmp_path / 'no'}", "merge_base=original"]
        )


@needs_shared
def test_losses_of_base_adapter_and_merged_are_shown(tmp_path, monkeypatch, capsys):
    """Against the losses of evaluation during training on the same rows."""
    run_recorded(
        "sft_llama3",
        tmp_path / "out",
        monkeypatch,
        "quantization_bit=4",
        "val_size=0.2",
        "do_eval=true",
        "per_device_eval_batch_size=1",
    )
    trained = json.loads((tmp_path / "out/eval_results.json").read_text())["eval_token_loss"]
    capsys.readouterr()
    merge.main(
        [
            "config.yaml",
            "adapter_name_or_path=",
            f"output_dir={tmp_path / 'out'}",
            "val_size=0.2",
            f"export_dir={tmp_path / 'merged'}",
        ]
    )
    table, title = losses_in(capsys.readouterr().out)
    base, adapted, merged = (table[name][0] for name in ("base", "adapter", "exported"))
    assert "rows held out" in title and adapted == pytest.approx(trained, abs=2e-4)
    assert merged == pytest.approx(adapted, abs=1e-3) and base > adapted + 0.05
    assert table["base"][1] < 0.9 < table["exported"][1] and table["adapter"][1] == 1
