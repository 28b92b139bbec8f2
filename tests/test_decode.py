"""decode.py: joined matrices and quick products give the answers of the modules as model.py has them."""
import pytest
import torch
from torch import nn

import decode
from decode import PRODUCTS, QuickLinear, join_matrices, pick_product, prepare
from families import model_config
from generate import generate, generate_uncached
from lora import LoRAConfig, attach_lora, lora_layers
from model import CausalLM, KVCache, init_weights
from tests.test_families import CASES, load, made  # noqa: F401  a fixture
from tests.test_lora import shake

TINY = dict(model_type="qwen2", hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=50, max_position_embeddings=64, initializer_range=0.2)
PROMPT = [3, 14, 15, 9, 26, 5]


def small(dtype=torch.float32, **changes):
    model = CausalLM(model_config({**TINY, **changes}))
    init_weights(model, torch.Generator().manual_seed(0))
    for name, p in model.named_parameters():                   # biases that do something
        if name.endswith("bias"):
            torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(1))
    return model.requires_grad_(False).eval().to(dtype)


def scores(model, ids):
    return model.logits(model(ids)).float()


@pytest.fixture(params=PRODUCTS)
def forced(request, monkeypatch):
    """Every product in turn, whatever this machine would pick; those that this torch lacks are left out."""
    product, laid_out = PRODUCTS[request.param]
    try:
        product(torch.ones(1, 8), laid_out(torch.ones(4, 8)))
    except (RuntimeError, AttributeError, NotImplementedError):
        pytest.skip(f"{request.param} is not in this torch")
    monkeypatch.setattr(decode, "pick_product", lambda dtype: (request.param, "product   forced"))
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_prepared_equals_plain(forced, dtype, tied):
    plain, fast = small(dtype, tie_word_embeddings=tied), small(dtype, tie_word_embeddings=tied)
    lines = prepare(fast)
    assert "4 joined" in lines[0] and lines[-1] == "product   forced"
    assert (type(fast.lm_head) is QuickLinear) == (forced != "torch")
    ids = torch.randint(0, 50, (1, 20), generator=torch.Generator().manual_seed(2))
    for length in (20, 1):
        want, got = scores(plain, ids[:, :length]), scores(fast, ids[:, :length])
        assert want.abs().max() > 1
        assert (got - want).abs().max() < (1e-4 if dtype == torch.float32 else 0.1)
    if dtype == torch.float32:
        answers = [list(generate(m, PROMPT, KVCache(2), max_new_tokens=40)) for m in (plain, fast)]
        assert answers[0] == answers[1] == list(generate_uncached(fast, PROMPT, max_new_tokens=40))


@pytest.mark.parametrize("name", CASES)
def test_every_family_prepared_equals_transformers(made, name, forced):  # noqa: F811
    model, ids, want = load(made, name)
    prepare(model)
    assert (scores(model, ids) - want).abs().max() < 2e-4


def test_a_block_with_an_adapter_stays_as_it_is():
    model = small()
    shake(attach_lora(model, LoRAConfig(r=2, target_modules=["k_proj", "down_proj"]))).eval()
    want = scores(model, torch.tensor([PROMPT]))
    assert join_matrices(model) == 2                             # gate and up of both blocks
    assert len(lora_layers(model)) == 4
    assert (scores(model, torch.tensor([PROMPT])) - want).abs().max() < 1e-5


def test_without_room_for_copies_nothing_is_touched():
    model = small()
    lines = prepare(model, available=1000)
    assert "as they lie in the file" in lines[0] and all(type(m) is not QuickLinear for m in model.modules())
    assert hasattr(model.model.layers[0].self_attn, "q_proj")


def test_joined_rows_are_the_parts_rows():
    model, whole = small(), small()
    join_matrices(whole)
    a, b = model.model.layers[1], whole.model.layers[1]
    assert torch.equal(b.self_attn.qkv_proj.weight[32:48], a.self_attn.k_proj.weight)
    assert torch.equal(b.self_attn.qkv_proj.bias[48:], a.self_attn.v_proj.bias)
    assert torch.equal(b.mlp.gate_up_proj.weight[48:], a.mlp.up_proj.weight) and b.mlp.gate_up_proj.bias is None


def test_a_wrong_product_or_a_missing_one_is_never_taken(monkeypatch):
    def absent(x, W, bias=None):
        raise NotImplementedError
    monkeypatch.setitem(PRODUCTS, "onednn", (lambda x, W, bias=None: x[:, :1] * W[:, 0], lambda W: W))
    monkeypatch.setitem(PRODUCTS, "onednn packed", (absent, lambda W: W))
    taken, line = pick_product(torch.float32, (64, 32))
    assert taken == "torch" and "onednn (wrong)" in line and "onednn packed (not in this torch)" in line


def test_the_quickest_product_is_taken_where_it_is_clearly_quicker(monkeypatch):
    seconds = dict(zip(PRODUCTS, (10.0, 9.5, 9.4)))
    monkeypatch.setattr(decode, "PRODUCTS", {name: (nn.functional.linear, lambda W: W) for name in PRODUCTS})
    for changes, want in (({}, "torch"), ({"onednn packed": 5.0}, "onednn packed"),
                          ({"onednn packed": 5.0, "onednn": 5.2}, "onednn"), ({"onednn": 5.0}, "onednn")):
        took = iter((seconds | changes).values())
        monkeypatch.setattr(decode, "shortest", lambda call, times: next(took))
        assert pick_product(torch.float32, (64, 32))[0] == want
