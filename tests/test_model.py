"""model.py and the loading half of checkpoint/load.py against the references' own logits.

Read before: model.py. Read after: test_families.py, for each family in many settings.
"""
import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from attention import PackedLayout
from checkpoint.load import load_model
from families import FAMILIES, model_config
from fast.fused_block import fuse_blocks
from losses import balance_loss
from checkpoint.show import draw
from model import CausalLM, KVCache, MoE, grouped, init_weights, one_by_one
from rope import rope_frequencies
from tests.common import GOLDEN, ROOT, needs_shared

OURS = [folder.name for folder in sorted((GOLDEN / "models").glob("*"))
        if json.loads((folder / "config.json").read_text())["model_type"] in FAMILIES]
TINY = dict(model_type="qwen3", hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, vocab_size=50, max_position_embeddings=64)


def tiny(**changes):
    model = CausalLM(model_config({**TINY, **changes}))
    init_weights(model, torch.Generator().manual_seed(0))
    return model.requires_grad_(False)


@needs_shared
@pytest.mark.parametrize("kernel", ["plain", "sdpa-math"])
@pytest.mark.parametrize("name", OURS)
def test_logits_and_loss_equal_the_reference(name, kernel):
    folder = GOLDEN / "models" / name
    want = load_file(folder / "expected.safetensors")
    model = load_model(folder, torch.float32)
    if kernel != "plain" and model.config.attn_softcap:
        pytest.skip("SDPA has no softcap")
    model.kernel = kernel
    logits = model.logits(model(want["input_ids"]))
    real = want["attention_mask"].bool()                                  # right padding: causal rows never look at it
    assert (logits - want["logits"])[real].abs().max() < 1e-4
    labels = want["labels"][:, 1:]
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=-100)
    assert abs(loss - want["loss"]) < 1e-5


@needs_shared
def test_bfloat16_checkpoint_in_bfloat16():
    folder = GOLDEN / "models" / "qwen2_bf16"
    want = load_file(folder / "expected.safetensors")
    model = load_model(folder)
    assert model.lm_head.weight.dtype == torch.bfloat16                   # the checkpoint's own dtype
    logits = model.logits(model(want["input_ids"])).float()
    assert (logits - want["logits_bf16"])[want["attention_mask"].bool()].abs().max() < 0.3


@pytest.mark.parametrize("window", [None, 5])
def test_cached_equals_uncached(window):
    model = tiny(model_type="mistral", sliding_window=window)
    ids = torch.randint(0, 50, (1, 90), generator=torch.Generator().manual_seed(3))
    whole, cache = model(ids), KVCache(2)
    parts = [model(ids[:, a:b], cache=cache) for a, b in [(0, 7), (7, 8), (8, 70), (70, 71), (71, 90)]]
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)
    cache.crop(40)
    assert torch.allclose(model(ids[:, 40:], cache=cache), whole[:, 40:], atol=1e-5)


def test_sequences_in_one_row_equal_sequences_alone():
    model = tiny()
    lengths = [1, 5, 2, 9]
    ids = torch.randint(0, 50, (1, sum(lengths)), generator=torch.Generator().manual_seed(4))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    together = model(ids, positions, PackedLayout(lengths)).split(lengths, 1)
    for part, alone in zip(together, ids.split(lengths, 1)):
        assert torch.allclose(part, model(alone), atol=1e-5)


def test_gradient_checkpointing_changes_nothing():
    model = tiny()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    ids, gradients = torch.arange(12)[None], []
    for level in ("none", "block"):
        fuse_blocks(model, "plain", [level] * 2)
        model.zero_grad()
        model(ids).square().sum().backward()
        gradients.append(model.model.layers[0].mlp.up_proj.weight.grad.clone())
    assert torch.equal(*gradients)


def test_default_frequencies_follow_the_paper():
    inv_freq, scale = rope_frequencies(model_config(TINY), 0)
    assert scale == 1.0 and torch.allclose(inv_freq, torch.tensor([10000 ** (-2 * i / 8) for i in range(4)]))


# ---- mixture of experts -----------------------------------------------------------------------------------------

MOE = dict(TINY, model_type="qwen2_moe", num_experts=6, num_experts_per_tok=3, moe_intermediate_size=20,
           shared_expert_intermediate_size=28)
STACKED = dict(TINY, model_type="llama4_text", num_local_experts=6, num_experts_per_tok=3, intermediate_size_mlp=40)
CHOSEN = {       # (tokens, 3) experts
    "as routed": None, "one token": [[4, 0, 2]], "some are never chosen": [[1, 5, 2], [5, 1, 2], [2, 1, 5], [1, 2, 5]],
    "all tokens to the same": [[3, 4, 5]] * 7, "twice the same": [[0, 0, 1], [2, 2, 2]],
}


def experts_of(fields):
    """A layer of experts with weights of common size, that can be trained."""
    block = MoE(model_config(fields)).double()
    generator = torch.Generator().manual_seed(5)
    for p in block.parameters():
        p.data.normal_(0, p.shape[-1] ** -0.5, generator=generator)
    return block


@pytest.mark.parametrize("scale_input", [False, True])
@pytest.mark.parametrize("chosen", CHOSEN)
@pytest.mark.parametrize("fields", [MOE, STACKED], ids=["a module each", "stacked"])
def test_grouped_experts_equal_one_by_one(fields, chosen, scale_input):
    """Outputs, and gradients of the tokens, of their weights and of every expert."""
    generator, results = torch.Generator().manual_seed(6), []
    x = torch.randn(len(CHOSEN[chosen] or range(40)), 32, dtype=torch.float64, generator=generator)
    target = torch.randn(x.shape, dtype=torch.float64, generator=generator)
    for way in (grouped, one_by_one):
        block, x = experts_of(fields), x.detach().requires_grad_(True)
        experts, weights = block.route(block.gate(x))
        experts = torch.tensor(CHOSEN[chosen]) if CHOSEN[chosen] else experts
        y = way(x, experts, weights, block.expert, block.config.num_experts, scale_input)
        (y * target).sum().backward()
        results.append([y, x.grad, *(torch.zeros_like(p) if p.grad is None else p.grad for p in block.parameters())])
    assert results[0][0].abs().max() > 0.01
    for fast, slow in zip(*results):
        assert torch.allclose(fast, slow, atol=1e-12)


def test_experts_in_16_bits():
    """Both ways round each expert's output to 16 bits and sum k of them: they differ by less than k roundings."""
    block, x = experts_of(MOE).bfloat16(), torch.randn(40, 32, generator=torch.Generator().manual_seed(7)).bfloat16()
    chosen, weights = block.route(block.gate(x))
    assert weights.dtype == torch.bfloat16
    fast, slow = (way(x, chosen, weights, block.expert, 6, False) for way in (grouped, one_by_one))
    assert fast.dtype == torch.bfloat16
    assert ((fast - slow).abs() <= 3 * 2 ** -8 * slow.abs().amax(1, keepdim=True)).all()


@pytest.mark.parametrize("fields, want", [
    (dict(MOE, norm_topk_prob=False), [0.4, 0.3, 0.15]),
    (dict(MOE, norm_topk_prob=True), [0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85]),
    (STACKED, [0.4 / 1.4, 0.3 / 1.3, 0.15 / 1.15]),                       # sigmoid of log p is p / (1 + p)
], ids=["softmax", "normed", "sigmoid"])
def test_routing_by_hand(fields, want):
    chances = torch.tensor([[0.05, 0.3, 0.02, 0.4, 0.15, 0.08]])
    chosen, weights = MoE(model_config(fields)).route(chances.log())
    assert chosen.tolist() == [[3, 1, 4]] and torch.allclose(weights, torch.tensor([want]))


def test_balance_of_experts_by_hand():
    even = torch.eye(4) * 50                            # four tokens, each surely to an expert of its own
    assert abs(balance_loss([even], 1) - 1) < 1e-6
    assert abs(balance_loss([torch.zeros(8, 4), torch.zeros(4, 4)], 2) - 2) < 1e-6       # no preference: k
    assert abs(balance_loss([even[:1].repeat(5, 1)], 1) - 4) < 1e-6                      # all to one of four: E
    chances = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.1, 0.4]])              # shares 1, 0, 0, means 0.6, 0.15, 0.25
    assert abs(balance_loss([chances[:1].log(), chances[1:].log()], 1) - 3 * 0.6) < 1e-6
    assert abs(balance_loss([chances.log()], 2) - 3 * (0.6 + 0.5 * 0.15 + 0.5 * 0.25)) < 1e-6


@pytest.mark.parametrize("fields", [
    {**MOE, "mlp_only_layers": [0], "num_hidden_layers": 3},
    {**TINY, "model_type": "qwen3_moe", "num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 8},
    {**TINY, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 3},
], ids=["qwen2_moe", "qwen3_moe", "mixtral"])
def test_router_logits_and_balance_loss_equal_transformers(fields, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**fields)).eval()
    theirs.save_pretrained(tmp_path)
    ours, ids = load_model(tmp_path, torch.float32), torch.arange(30)[None] % 50
    routers = []
    ours(ids, routers=routers)
    with torch.no_grad():
        want = theirs(ids, labels=ids, output_router_logits=True)
    theirs_scores = [scores.flatten(0, -2) for scores in want.router_logits if scores is not None]
    assert len(routers) == len(theirs_scores) == 2
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(routers, theirs_scores))
    assert abs(balance_loss(routers, 3) - want.aux_loss) < 1e-5


@pytest.mark.parametrize("fields", [MOE, STACKED], ids=["a module each", "stacked"])
def test_recomputing_with_router_logits_changes_no_gradient(fields):
    model, ids, results = tiny(**fields).requires_grad_(True), torch.arange(24)[None], []
    for level in ("none", "block"):
        fuse_blocks(model, "plain", [level] * 2)
        model.zero_grad()
        routers = []
        hidden = model(ids, routers=routers)
        (hidden.square().mean() + balance_loss(routers, 3)).backward()
        results.append([hidden, *routers, *(p.grad for p in model.parameters() if p.grad is not None)])
    gate = model.model.layers[0].mlp.gate.weight.grad
    assert len(routers) == 2 and gate.abs().max() > 0
    assert len(results[0]) == len(results[1]) and all(map(torch.equal, *results))


# ---- loading ----------------------------------------------------------------------------------------------------


def write(folder, model, drop=(), add=(), **changes):
    folder.mkdir(exist_ok=True)
    tensors = {n: p.clone() for n, p in model.named_parameters() if n not in drop}
    save_file({**tensors, **dict(add)}, str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps({**TINY, **changes}))
    return folder


def test_loading_is_strict_both_ways(tmp_path):
    model = tiny()
    assert torch.equal(load_model(write(tmp_path, model)).lm_head.weight, model.lm_head.weight)
    with pytest.raises(ValueError, match="missing: 1, such as lm_head.weight(.|\n)*tie_word_embeddings"):
        load_model(write(tmp_path, model, drop=["lm_head.weight"]))
    with pytest.raises(ValueError, match="not used: 1, such as model.extra.weight"):
        load_model(write(tmp_path, model, add=[("model.extra.weight", torch.ones(1))]))
    with pytest.raises(ValueError, match=r"down_proj.weight has shape \[32, 48\], config.json makes it \[32, 40\]"):
        load_model(write(tmp_path, model, intermediate_size=40))
    load_model(write(tmp_path, model, add=[("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(4))]))


def test_damaged_and_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        load_model(tmp_path)
    folder = write(tmp_path, tiny())
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(ValueError, match="model.safetensors is damaged or incomplete.*fetch it again"):
        load_model(folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="pytorch_model.bin is"):
        load_model(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(FileNotFoundError, match="names 1 file.*model-1.safetensors"):
        load_model(folder)


def test_tied_head_stored_twice(tmp_path):
    model = tiny(tie_word_embeddings=True)
    same = {"lm_head.weight": model.model.embed_tokens.weight.clone()}
    loaded = load_model(write(tmp_path, model, add=same.items(), tie_word_embeddings=True))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    with pytest.raises(ValueError, match="lm_head.weight differs"):
        load_model(write(tmp_path, model, add=[("lm_head.weight", torch.zeros(50, 32))], tie_word_embeddings=True))


def test_memory_of_loading_stays_below_the_checkpoint_plus_300_mb(tmp_path):
    """A checkpoint of 0.5 GB in two dtypes of the model; the child reports its own peak."""
    big = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, num_attention_heads=8, head_dim=128,
               vocab_size=4000)
    with torch.device("meta"):
        model = CausalLM(model_config({**TINY, **big}))
    save_file({n: torch.zeros(p.shape, dtype=torch.float32) for n, p in model.named_parameters()},
              str(tmp_path / "model.safetensors"))
    (tmp_path / "config.json").write_text(json.dumps({**TINY, **big}))
    code = ("import resource, sys; from checkpoint.load import load_model; import torch\n"
            "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
            "before = peak(); m = load_model(sys.argv[1], torch.float32); sum(p.sum() for p in m.parameters())\n"
            "print(peak() - before)")
    used = float(subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True,
                                cwd=ROOT).stdout)
    size = os.path.getsize(tmp_path / "model.safetensors") / 2**20
    assert size > 400 and used < size + 300


# ---- python -m checkpoint.show DIR ----------------------------------------------------------------------------------------


# a line of the drawing: name, shape, bias, parameters, experts
ROW = re.compile(r"  (\S+) +(\d+(?: x \d+)*|no weights)( \+ bias)?(?: +([\d,]+)(?: x (\d+) experts)?"
                 r"| the embedding's)?")


@needs_shared
@pytest.mark.parametrize("name", OURS)
def test_drawing_has_the_names_and_shapes_of_the_file(name):
    folder = GOLDEN / "models" / name
    config = model_config(json.loads((folder / "config.json").read_text()))
    stored = {}
    for file in folder.glob("model*.safetensors"):
        stored |= {name: list(tensor.shape) for name, tensor in load_file(file).items()}
    stored = {name: shape for name, shape in stored.items() if not re.search("inv_freq", name)
              and not name.startswith(config.skips or "-")}
    text, total, blocks = draw(config), 0, 1
    for line in text.split("parameters: ")[0].splitlines():
        if found := re.match(r"  (\d+) blocks? \((.*)\) such as", line):
            blocks = int(found[1])
        if found := ROW.fullmatch(line):
            tensor, shape, bias, count, experts = found.groups()
            if "layers" not in tensor:
                blocks = 1
            if shape != "no weights":
                shape = [int(n) for n in shape.split(" x ")]
                if line.endswith("the embedding's"):
                    assert config.tie_word_embeddings
                    continue
                held = [n for n in (tensor, tensor + ".weight", tensor + ".bias") if n in stored]
                assert stored[held[0]] == shape and len(held) == (2 if bias else 1), (line, held)
                assert int(count.replace(",", "")) == sum(math.prod(stored[n]) for n in held), line
                total += blocks * int(count.replace(",", "")) * int(experts or 1)
    assert total == sum(math.prod(shape) for shape in stored.values()) > 10000
    assert f"  {total:,} parameters" in text


def test_drawing_of_llama_and_of_what_differs():
    text = draw(model_config({**TINY, "model_type": "llama"}))
    assert "llama: 2 blocks, hidden_size 32" in text and "nothing: this is plain Llama" in text
    assert "4 heads on 2 key/value heads, head_dim 8" in text and "rope default, theta 10000" in text
    text = draw(model_config({**STACKED, "num_hidden_layers": 4, "interleave_moe_layer_step": 2,
                              "num_experts_per_tok": 2, "attention_chunk_size": 8, "no_rope_layers": [1, 1, 1, 0]}))
    assert "2 blocks (0, 2) such as" in text and "2 blocks (1, 3) such as" in text
    assert "chunks of 8 tokens in blocks 0-2" in text and "blocks 3 without rotation" in text
    assert "router sigmoid" in text and "scale_input" in text and "qk_norm unit" in text
    per_expert, total = 3 * 32 * 48, int(re.search(r"  ([\d,]+) parameters,", text)[1].replace(",", ""))
    assert f"{total - 2 * 4 * per_expert:,} of them used by a token" in text            # 2 layers, 4 of 6 experts idle


def test_the_command(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    run = subprocess.run([sys.executable, "-m", "checkpoint.show", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.strip() == draw(model_config(TINY)).strip(), run.stderr
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "model_type": "qwen9"}))
    run = subprocess.run([sys.executable, "-m", "checkpoint.show", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr.startswith("error: ") and "qwen9" in run.stderr
