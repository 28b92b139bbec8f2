"""layers.py: mixers with a state of fixed size. Chunks, packed rows, caches, adapters, refusals.

test_families.py and test_families_2026.py hold their logits against transformers; here are lengths
beyond a chunk, gradients, and what cannot be cut.
"""
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import layers
from attention import PackedLayout, to_device
from checkpoint.adapter_names import module_name
from checkpoint.adapters import load_with_adapters, peft_names, save_adapter
from checkpoint.load import load_model
from checkpoint.peft_targets import why_peft_differs
from checkpoint.read_config import model_config
from fast.batch_decode import RowCache, answer_all, cache_bytes
from fast.decode import pick_step
from fast.fused_block import fuse_blocks
from generate import generate
from layers import CHUNK, StateMixer, chunked_scan, recurrent_scan
from lora import LoRAConfig, attach_lora, lora_layers
from losses import cross_entropy_sum
from merge import merge_checkpoint
from model import CausalLM, KVCache, init_weights
from runtime.precision import compute_dtype
from scale.context_parallel import check_shares
from scale.tensor_parallel import part_config
from settings.config import Config
from tests.common import needs_shared, usual
from tests.rehearsal import Fault, host, rehearse
from tests.test_families import (DELTA, FULL, MAMBA, NEMOTRON, READABLE, SHARED_EXPERT, SMALL,
                                 reference)
from tests.test_families_2026 import FOLDERS
from tests.test_memory import ALL, compare
from tests.test_rehearsal import planted
from tests.tiny_models import perturb

KINDS = {
    "delta rule": ("qwen3_5_text", dict(SMALL, **DELTA, num_hidden_layers=4)),
    "state space": ("granitemoehybrid", dict(
        SMALL, **MAMBA, num_local_experts=0, num_hidden_layers=4,
        layer_types=["mamba", "mamba", "attention", "mamba"])),
    "state space or MLP alone": ("nemotron_h", dict(
        SMALL, **NEMOTRON, hybrid_override_pattern="-M*-", num_hidden_layers=4)),
    "short convolution": ("lfm2", dict(SMALL, full_attn_idxs=[1, 3], num_hidden_layers=4,
                                       conv_L_cache=4, block_auto_adjust_ff_dim=False)),
}


def vectors(T, seed=0):
    """q, k, v, g, beta and a state, of 2 sequences and 3 heads."""
    draw = torch.Generator().manual_seed(seed)
    q, k = (torch.nn.functional.normalize(torch.randn(2, 3, T, 6, generator=draw), dim=-1)
            for _ in range(2))
    v, S = torch.randn(2, 3, T, 5, generator=draw), torch.randn(2, 3, 6, 5, generator=draw)
    g = -torch.rand(2, 3, T, generator=draw).exp() ** 3 * torch.rand(2, 3, T, generator=draw)
    beta = torch.rand(2, 3, T, generator=draw)
    return [x.double().requires_grad_() for x in (q, k, v, g, beta, S)]


@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("T", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 9])
def test_chunks_equal_token_by_token(T, corrected):
    results = []
    for scan in (recurrent_scan, chunked_scan):
        q, k, v, g, beta, S0 = vectors(T)
        out, S = scan(q, k, v, g, beta if corrected else None, S0)
        (out.square().sum() + S.sin().sum()).backward()
        results.append([out, S, *(x.grad for x in (q, k, v, g, S0))])
        results[-1] += [beta.grad] if corrected else []
    for want, got in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_a_state_that_decays_at_once_has_finite_gradients():
    inputs = vectors(70)
    with torch.no_grad():
        inputs[3].fill_(-1000.0)
    out, S = chunked_scan(*inputs)
    (out.sum() + S.sum()).backward()
    assert all(x.grad.isfinite().all() for x in inputs)


@pytest.fixture(params=KINDS)
def model(request):
    """A random model of a kind of mixer."""
    kind, fields = KINDS[request.param]
    made = CausalLM(model_config({"model_type": kind, **fields}))
    init_weights(made, torch.Generator().manual_seed(1))
    return perturb(made, size=0.2).eval().requires_grad_(False)


def some_ids(n, seed=0):
    return torch.randint(0, SMALL["vocab_size"], (1, n),
                         generator=torch.Generator().manual_seed(seed))


def test_packed_equals_alone_and_cached_equals_uncached(model):
    lengths = [3, CHUNK + 1, 1, 2 * CHUNK, 30, CHUNK - 1]
    rows = [some_ids(n, seed) for seed, n in enumerate(lengths)]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = model(torch.cat(rows, 1), positions, PackedLayout(lengths))[0].split(lengths)
    for ids, got in zip(rows, packed):
        want = model(ids)[0]
        torch.testing.assert_close(got, want, rtol=0, atol=2e-4)   # of chunks cut elsewhere
        cache, cuts = KVCache(4), [cut for cut in (0, 1, 2, CHUNK - 2, CHUNK, CHUNK + 1, 999)]
        parts = [model(ids[:, a:b], cache=cache)[0] for a, b in zip(cuts, cuts[1:])
                 if a < ids.shape[1]]
        torch.testing.assert_close(torch.cat(parts), want, rtol=0, atol=2e-4)
        assert cache.length == ids.shape[1]


def test_rows_decoded_together_equal_one_row(model):
    prompts = [some_ids(n, n)[0].tolist() for n in (2, CHUNK + 3, 7, 1)]
    cache = RowCache(4, 5, "cpu")
    with torch.no_grad():
        scores = [cache.read_prompts(model, prompts[:2])]
        cache.drop(0)
        scores.append(cache.read_tokens(model, [5]))
        scores.append(cache.read_prompts(model, prompts[2:]))
        scores.append(cache.read_tokens(model, [6, 7, 8]))
    alone = [prompts[0], prompts[1], [*prompts[1], 5], prompts[2], prompts[3],
             [*prompts[1], 5, 6], [*prompts[2], 7], [*prompts[3], 8]]
    for got, ids in zip(torch.cat(scores), alone, strict=True):
        want = model.logits(model(torch.tensor([ids]))[0, -1])
        torch.testing.assert_close(got, want, rtol=0, atol=5e-5)
    held = sum(x.nbytes for state in cache.states.values() for x in state)
    held += sum(x.nbytes for pair in filter(None, cache.buffers) for x in pair)
    assert held == cache_bytes(model.config, 5, 70, torch.float32)


def test_a_cache_that_is_cropped_begins_anew(model):
    ids = some_ids(12)
    cache = KVCache(4)
    model(ids[:, :9], cache=cache)
    cache.crop(9)
    assert cache.length == 9
    cache.crop(5)                       # the state after 5 tokens is gone
    assert cache.length == 0
    torch.testing.assert_close(model(ids, cache=cache), model(ids), rtol=0, atol=1e-5)


def test_captured_steps_keep_states_in_their_place(model):
    """Several answers by one graph, over a cache that is cropped and grows; prompts of one token,
    and longer than what the graph was captured for."""
    model.config = replace(model.config, max_position_embeddings=300)
    prompts = [some_ids(length, length)[0].tolist() for length in (9, 1, 253)]
    wanted = []
    for prompt in prompts:
        plain = KVCache(4)
        wanted.append((list(generate(model, prompt, plain, max_new_tokens=5)), plain.states))
    with rehearse() as record:
        model.to("cuda")
        cache, step, line = pick_step(model, compiled=False)
        assert line == "steps     captured as a graph: one command a token"
        places = state_places(cache.state_buffers)
        for prompt, (answer, states) in zip(prompts, wanted):
            cache.crop(0)
            with record.strict([("generate.py", "generate"), ("generate.py", "check_finite")]):
                assert list(generate(model, prompt, cache, max_new_tokens=5, step=step)) == answer
            for layer, state in states.items():
                for got, want in zip(cache.states[layer], state, strict=True):
                    torch.testing.assert_close(host(got), want, rtol=1e-4, atol=1e-5)
            assert state_places(cache.states) == places
        assert set(step.recorded) == {512}                  # the keys and values have moved


def test_training_and_many_rows_on_a_gpu_wait_for_nothing(model):
    """Packed rows, forward and backward; prompts and tokens of rows that are decoded together."""
    lengths, prompts = [3, CHUNK + 1, 1], [(n, some_ids(n, n)[0].tolist()) for n in (2, 5, 1)]
    limit = dict(limit=lambda length: 3)
    want = sorted(answer_all(model, prompts, 1, **limit))
    attach_lora(model, ALL, stored_name=model.config.stored_name)
    ids, positions = some_ids(69), torch.cat([torch.arange(n) for n in lengths])[None]
    with rehearse() as record:
        model.to("cuda")
        ids, positions = (to_device(x, torch.device("cuda")) for x in (ids, positions))
        layout = PackedLayout(lengths, torch.device("cuda"))
        with record.strict():
            model(ids, positions, layout).square().sum().backward()
        assert all(layer.lora_A.weight.grad is not None for layer in lora_layers(model).values())
        with record.strict([("fast/batch_decode.py", "add_tokens")]):
            assert sorted(answer_all(model, prompts, 2, **limit)) == want


@pytest.mark.parametrize("fault, message", [
    ("; torch.zeros(1, device=S.device)", "zeros: memory is allocated in a captured graph"),
    ("; S.sum().item()", "_local_scalar_dense in a captured graph"),
    (" + torch.tensor(0.0)", "add: a tensor .. of the CPU"),
])
def test_a_planted_fault_in_a_captured_state_is_caught(fault, message):
    kind, fields = KINDS["delta rule"]
    line = "S = S * g_t.exp()[..., None, None]"
    with rehearse(), planted(layers, "recurrent_scan", line, line + fault) as place:
        model = CausalLM(model_config({"model_type": kind, **fields})).requires_grad_(False)
        init_weights(model, torch.Generator().manual_seed(1))
        with pytest.raises(Fault, match=f"^{place}: {message}"):
            pick_step(model.to("cuda"), compiled=False)


def state_places(states) -> list[int]:
    """The addresses of the states of all layers."""
    return [x.inner.data_ptr() for state in states.values() for x in state]


def test_what_is_refused_says_what_works(model):
    with pytest.raises(ValueError, match="tensor_parallel_size: 2: .* state.*fsdp: full_shard"):
        part_config(model.config, 2, False)
    with pytest.raises(ValueError, match="context_parallel_size: 2: .* state.*fsdp: full_shard"):
        check_shares(model, model.config, 2)


@pytest.mark.parametrize("change, words", [
    ({"linear_num_value_heads": 3}, "3 value heads .* not a multiple of its 2 key heads"),
    ({"linear_key_head_dim": 0}, "linear_key_head_dim: 0 is not above 0"),
    ({"attn_output_gate": False}, "attn_output_gate: false is not supported, only true"),
    ({"full_attention_interval": 0}, "full_attention_interval: 0 is not above 0"),
])
def test_config_json_that_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        model_config({**READABLE["qwen3_5_text"], **change})


@pytest.mark.parametrize("change, width", [
    ({}, 256), ({"block_ff_dim": 90}, 256), ({"block_multiple_of": 8}, 32),
    ({"block_multiple_of": 8, "block_ffn_dim_multiplier": 1.5}, 48),
    ({"block_ffn_dim_multiplier": None}, 29), ({"block_auto_adjust_ff_dim": False}, 44),
])
def test_the_width_of_an_mlp_by_the_rule_of_lfm2(change, width):
    """As its MLP computes it in transformers 4.57; 5.24 refuses a null factor."""
    assert model_config({**READABLE["lfm2"], **change}).intermediate_size == width


@needs_shared
@pytest.mark.parametrize("name", ["qwen3_5_text", "granitemoehybrid"])
def test_norms_and_decays_in_float32_beside_weights_in_16_bits(name):
    """As some checkpoints are published: no further from float32 than with all in 16 bits."""
    model = load_model(FOLDERS / name, torch.bfloat16).requires_grad_(False)
    exact = load_model(FOLDERS / name, torch.float32).requires_grad_(False)
    ids = some_ids(20)
    all_half = model.logits(model(ids))
    for part in model.modules():
        if isinstance(part, StateMixer):
            part.A_log.data, part.norm.weight.data = part.A_log.float(), part.norm.weight.float()
    mixed = model.logits(model(ids))
    far = [(logits - exact.logits(exact(ids))).abs().median() for logits in (mixed, all_half)]
    assert mixed.dtype == torch.bfloat16 and far[0] < 1.25 * far[1]


@needs_shared
def test_the_dtype_of_a_run_is_that_of_the_first_mixer(tmp_path):
    """Whatever config.json says: here nothing."""
    tensors = load_file(FOLDERS / "qwen3_5_text/model.safetensors")
    half = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(half, tmp_path / "model.safetensors")
    fields = json.loads((FOLDERS / "qwen3_5_text/config.json").read_text())
    fields.pop("torch_dtype", None)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    base = SimpleNamespace(folder=tmp_path, model_config=model_config(fields))
    assert compute_dtype(Config(finetuning_type="lora"), base, {}) == torch.bfloat16


# ---- training ----


@pytest.mark.parametrize("kind", usual(KINDS, "delta rule", "state space"))
@pytest.mark.parametrize("fast", [False, True])
def test_the_memory_plan_counts_a_state_and_its_chunks(kind, fast):
    name, fields = KINDS[kind]
    larger = dict(hidden_size=256, intermediate_size=512, head_dim=64, linear_key_head_dim=32,
                  linear_value_head_dim=48, max_position_embeddings=4096)
    larger |= dict(mamba_d_head=64, mamba_d_state=32, shared_intermediate_size=512,
                   mamba_head_dim=64, ssm_state_size=32)
    sizes = {key: size for key, size in larger.items() if key in fields}
    config = model_config({"model_type": name, **fields, **sizes})
    alike, unlike = ((150,), (120,)), ((280,), (20,))
    # half of all combinations, so that any three of the four are seen together
    for dtype, rows, recompute in ((torch.float32, alike, fast), (torch.float32, unlike, not fast),
                                   (torch.bfloat16, alike, not fast),
                                   (torch.bfloat16, unlike, fast)):
        compare(config, ALL, dtype, rows=rows, fast=fast, recompute=recompute)


def adapted(base, folder, targets):
    """Our model with a random adapter, which is saved in a folder."""
    model = load_model(base, torch.float32)
    config = LoRAConfig(r=3, lora_alpha=6, target_modules=targets)
    attach_lora(model, config, seed=0, stored_name=model.config.stored_name)
    perturb(model, size=0.1)
    folder.mkdir()
    save_adapter(model, folder, config, str(base))
    return model


def by_peft(base, folder, monkeypatch):
    """transformers' model with that adapter, trainable, as PEFT opens it.

    PEFT refuses out_proj of Nemotron-H, since kernels for CUDA would read past its adapter; its
    mathematics are the same.
    """
    transformers = pytest.importorskip("transformers", minversion="5.0")
    peft = pytest.importorskip("peft")
    monkeypatch.setattr(peft.tuners.tuners_utils, "_check_lora_target_modules_mamba",
                        lambda *args: None, raising=False)
    nested = "text_config" in json.loads((base / "config.json").read_text())
    auto = transformers.AutoModelForImageTextToText if nested else transformers.AutoModelForCausalLM
    theirs = auto.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    return peft.PeftModel.from_pretrained(theirs, folder, is_trainable=True)


@pytest.fixture(params=KINDS)
def base(request, tmp_path):
    pytest.importorskip("transformers", minversion="5.0")
    kind, fields = KINDS[request.param]
    reference(kind, fields, seed=3).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def check_gradients(base, tmp_path, monkeypatch, vocab, fast, targets=("all",)):
    """A step's loss and the gradient of every adapter equal PEFT's."""
    ours = adapted(base, tmp_path / "adapter", list(targets))
    theirs = by_peft(base, tmp_path / "adapter", monkeypatch)
    lengths = [CHUNK + 8, 9]
    rows = [torch.randint(0, vocab, (n,), generator=torch.Generator().manual_seed(n))
            for n in lengths]
    losses = [torch.nn.functional.cross_entropy(theirs(input_ids=ids[None]).logits[0, :-1], ids[1:],
                                                reduction="sum") for ids in rows]
    sum(losses).backward()
    ids, labels = torch.cat(rows), torch.cat([torch.cat((x[1:], x.new_tensor([-100])))
                                              for x in rows])
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    fuse_blocks(ours, torch.nn.functional.linear if fast else None)
    hidden = ours(ids[None], positions, PackedLayout(lengths))[0]
    kept = labels >= 0
    loss = cross_entropy_sum(hidden[kept], ours.head_weight(), labels[kept])
    loss.backward()
    assert abs(loss.item() - sum(losses).item()) < 1e-4 * loss.item()

    found = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    names = peft_names(ours)
    for name, layer in lora_layers(ours).items():
        for part in ("lora_A", "lora_B"):
            key = module_name(names[name], ours.config)
            want = found.pop(f"{key}.{part}.default.weight")
            got = getattr(layer, part).weight.grad
            assert (got - want).abs().max() < 1e-3 * want.abs().max() + 1e-5, (name, part)
    assert not found


@pytest.mark.parametrize("fast", [False, True])
def test_gradients_of_adapters_equal_peft(base, tmp_path, monkeypatch, fast):
    check_gradients(base, tmp_path, monkeypatch, SMALL["vocab_size"], fast)


@needs_shared
@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe_text", "qwen3_next", "nemotron_h"])
def test_gradients_of_recorded_checkpoints_equal_peft(name, tmp_path, monkeypatch):
    # 301 stands for an image in qwen3_5
    check_gradients(FOLDERS / name, tmp_path, monkeypatch, 300, True)


def stacked_as_published(folder):
    """Write the experts of a checkpoint as two tensors a layer, (E, 2 I, D) and (E, D, I)."""
    tensors = load_file(folder / "model.safetensors")
    experts = {}
    for name in [name for name in tensors if ".experts." in name]:
        block, number, part, _ = re.fullmatch(r"(.*)\.(\d+)\.(\w+)\.(weight)", name).groups()
        experts.setdefault(block, {})[part, int(number)] = tensors.pop(name)
    for block, found in experts.items():
        numbers = sorted({number for _, number in found})
        down = [found["down_proj", n] for n in numbers]
        both = [torch.cat((found["gate_proj", n], found["up_proj", n])) for n in numbers]
        tensors[f"{block}.down_proj"] = torch.stack(down)
        tensors[f"{block}.gate_up_proj"] = torch.stack(both)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "one by one"])
@pytest.mark.parametrize("targets", [("all",), ("all", "experts"), ("gate",)], ids=str)
def test_both_layouts_of_the_experts_of_qwen3_5_moe(tmp_path, monkeypatch, targets, stacked):
    """Its text part as published, and as transformers 5 saves it: logits of transformers,
    gradients of PEFT, and a merge in the layout of the base."""
    pytest.importorskip("transformers", minversion="5.0")
    text = dict(SMALL, **DELTA, **SHARED_EXPERT,
                layer_types=["linear_attention", FULL, "linear_attention"])
    eyes = dict(hidden_size=32, intermediate_size=48, depth=1, num_heads=2, patch_size=4,
                out_hidden_size=32, num_position_embeddings=16)
    theirs = reference("qwen3_5_moe", dict(text_config=text, vision_config=eyes), seed=5)
    theirs.save_pretrained(tmp_path / "base")
    if stacked:
        stacked_as_published(tmp_path / "base")
    model = load_model(tmp_path / "base")
    ids = some_ids(CHUNK + 5)
    with torch.no_grad():
        assert (model.logits(model(ids)) - theirs(ids).logits).abs().max() < 1e-4
    if stacked or "experts" not in targets:
        check_gradients(tmp_path / "base", tmp_path, monkeypatch, SMALL["vocab_size"], True,
                        targets)
    else:
        ours = adapted(tmp_path / "base", tmp_path / "adapter", list(targets))
        assert "it has stacks of experts" in why_peft_differs(ours, LoRAConfig())
        ours.logits(ours(ids)).square().mean().backward()
        assert any(layer.lora_B.weight.grad.any() for name, layer in lora_layers(ours).items()
                   if ".experts." in name)

    merge_checkpoint(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    both = load_with_adapters(tmp_path / "base", [tmp_path / "adapter"])
    merged = load_model(tmp_path / "merged")
    with torch.no_grad():
        assert (merged.logits(merged(ids)) - both.logits(both(ids))).abs().max() < 1e-4
    before, after = (load_file(tmp_path / name / "model.safetensors")
                     for name in ("base", "merged"))
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}
    visual = [name for name in before if name.startswith("model.visual.")]
    assert visual and all(torch.equal(before[name], after[name]) for name in visual)
