"""model.py against the references' own logits.

Next: test_families.py, for each family in many settings.
"""
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from attention import PackedLayout
from checkpoint.load import load_model
from checkpoint.read_config import model_config
from fast.fused_block import fuse_blocks
from losses import balance_loss
from layers import MoE, grouped, one_by_one
from model import MLP, KVCache
from rope import rope_frequencies
from tests.common import GOLDEN, needs_shared
from tests.tiny_models import RECORDED_MODELS, STACKED, TINY, tiny


@needs_shared
@pytest.mark.parametrize("kernel", ["plain", "sdpa-math"])
@pytest.mark.parametrize("name", RECORDED_MODELS)
def test_logits_and_loss_equal_the_reference(name, kernel):
    folder = GOLDEN / "models" / name
    want = load_file(folder / "expected.safetensors")
    model = load_model(folder, torch.float32)
    if kernel != "plain" and model.config.attn_softcap:
        pytest.skip("SDPA has no softcap")
    model.kernel = kernel
    logits = model.logits(model(want["input_ids"]))
    real = want["attention_mask"].bool()  # right padding: causal rows do not attend to it
    assert (logits - want["logits"])[real].abs().max() < 1e-4
    labels = want["labels"][:, 1:]
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=-100)
    assert abs(loss - want["loss"]) < 1e-5


@needs_shared
def test_bfloat16_checkpoint_in_bfloat16():
    folder = GOLDEN / "models" / "qwen2_bf16"
    want = load_file(folder / "expected.safetensors")
    model = load_model(folder)
    assert model.lm_head.weight.dtype == torch.bfloat16  # the checkpoint's own dtype
    logits = model.logits(model(want["input_ids"])).float()
    assert (logits - want["logits_bf16"])[want["attention_mask"].bool()].abs().max() < 0.3


@pytest.mark.parametrize("window", [None, 5])
def test_cached_equals_uncached(window):
    model = tiny(model_type="mistral", sliding_window=window)
    ids = torch.randint(0, 50, (1, 90), generator=torch.Generator().manual_seed(3))
    whole, cache = model(ids), KVCache(2)
    parts = [model(ids[:, a:b], cache=cache)
             for a, b in [(0, 7), (7, 8), (8, 70), (70, 71), (71, 90)]]
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
        fuse_blocks(model, None, [level] * 2)
        model.zero_grad()
        model(ids).square().sum().backward()
        gradients.append(model.model.layers[0].mlp.up_proj.weight.grad.clone())
    assert torch.equal(*gradients)


def test_default_frequencies_follow_the_paper():
    inv_freq, scale = rope_frequencies(model_config(TINY), 0)
    assert scale == 1.0
    assert torch.allclose(inv_freq, torch.tensor([10000 ** (-2 * i / 8) for i in range(4)]))


# ---- mixture of experts --------------------------------------------------------------------------

MOE = dict(TINY, model_type="qwen2_moe", num_experts=6, num_experts_per_tok=3,
           moe_intermediate_size=20, shared_expert_intermediate_size=28)
CHOSEN = {  # (tokens, 3) experts
    "as routed": None, "one token": [[4, 0, 2]],
    "some are never chosen": [[1, 5, 2], [5, 1, 2], [2, 1, 5], [1, 2, 5]],
    "all tokens to the same": [[3, 4, 5]] * 7, "twice the same": [[0, 0, 1], [2, 2, 2]],
}


def experts_of(fields):
    """A layer of experts with weights of ordinary size, all trainable."""
    block = MoE(model_config(fields), MLP).double()
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
        results.append([
            y, x.grad,
            *(torch.zeros_like(p) if p.grad is None else p.grad for p in block.parameters()),
        ])
    assert results[0][0].abs().max() > 0.01
    for fast, slow in zip(*results):
        assert torch.allclose(fast, slow, atol=1e-12)


def test_experts_in_16_bits():
    """Both ways round each expert's output to 16 bits and sum k of them: they differ by less than k
    roundings."""
    block = experts_of(MOE).bfloat16()
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(7)).bfloat16()
    chosen, weights = block.route(block.gate(x))
    assert weights.dtype == torch.bfloat16
    fast, slow = (way(x, chosen, weights, block.expert, 6, False) for way in (grouped, one_by_one))
    assert fast.dtype == torch.bfloat16
    assert ((fast - slow).abs() <= 3 * 2 ** -8 * slow.abs().amax(1, keepdim=True)).all()


@pytest.mark.parametrize("fields, want", [
    (dict(MOE, norm_topk_prob=False), [0.4, 0.3, 0.15]),
    (dict(MOE, norm_topk_prob=True), [0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85]),
    (STACKED, [0.4 / 1.4, 0.3 / 1.3, 0.15 / 1.15]),  # sigmoid of log p is p / (1 + p)
], ids=["softmax", "normed", "sigmoid"])
def test_routing_by_hand(fields, want):
    chances = torch.tensor([[0.05, 0.3, 0.02, 0.4, 0.15, 0.08]])
    chosen, weights = MoE(model_config(fields), MLP).route(chances.log())
    assert chosen.tolist() == [[3, 1, 4]] and torch.allclose(weights, torch.tensor([want]))


def test_balance_loss_by_hand():
    even = torch.eye(4) * 50                            # four tokens, each routed to another expert
    assert abs(balance_loss([even], 1) - 1) < 1e-6
    # no preference: k
    assert abs(balance_loss([torch.zeros(8, 4), torch.zeros(4, 4)], 2) - 2) < 1e-6
    assert abs(balance_loss([even[:1].repeat(5, 1)], 1) - 4) < 1e-6  # all to one of four: E
    # shares 1, 0, 0, means 0.6, 0.15, 0.25
    chances = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.1, 0.4]])
    assert abs(balance_loss([chances[:1].log(), chances[1:].log()], 1) - 3 * 0.6) < 1e-6
    assert abs(balance_loss([chances.log()], 2) - 3 * (0.6 + 0.5 * 0.15 + 0.5 * 0.25)) < 1e-6


@pytest.mark.parametrize("fields", [
    {**MOE, "mlp_only_layers": [0], "num_hidden_layers": 3},
    {**TINY, "model_type": "qwen3_moe", "num_experts": 5, "num_experts_per_tok": 3,
     "moe_intermediate_size": 8},
    {**TINY, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 3},
], ids=["qwen2_moe", "qwen3_moe", "mixtral"])
def test_router_logits_and_balance_loss_equal_transformers(fields, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**fields)
    ).eval()
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
        fuse_blocks(model, None, [level] * 2)
        model.zero_grad()
        routers = []
        hidden = model(ids, routers=routers)
        (hidden.square().mean() + balance_loss(routers, 3)).backward()
        results.append([hidden, *routers,
                        *(p.grad for p in model.parameters() if p.grad is not None)])
    gate = model.model.layers[0].mlp.gate.weight.grad
    assert len(routers) == 2 and gate.abs().max() > 0
    assert len(results[0]) == len(results[1]) and all(map(torch.equal, *results))
