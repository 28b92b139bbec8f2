"""The families of 2025 and 2026 against what transformers computes of the same files.

Each folder of golden/models2026 is a tiny checkpoint with the config.json and the tensor names of
the published ones, its logits, a row read with a cache, greedy tokens, and two sequences that one
packed row must give again.

Next: test_families.py, for the settings of a family; test_walk.py, for training and merging.
"""
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from attention import PackedLayout
from checkpoint.load import load_model
from checkpoint.read_config import model_config
from families import FAMILIES
from fast.fused_block import fuse_blocks
from generate import generate
from model import KVCache
from tests.common import GOLDEN, needs_shared

FOLDERS = GOLDEN / "models2026"
CLOSE = 1e-4
NAMES = [folder.parent.name for folder in sorted(FOLDERS.glob("*/config.json"))]

pytestmark = needs_shared


@pytest.fixture(scope="module", params=NAMES)
def loaded(request):
    """(model, expected tensors, name) of a folder; each is loaded once."""
    folder = FOLDERS / request.param
    tensors = load_file(folder / "expected.safetensors") | load_file(folder / "decode.safetensors")
    return load_model(folder, torch.float32), tensors, request.param


def kernels(model):
    """The kernels that a model can run with on a CPU."""
    return ["plain"] if model.config.attn_softcap else ["plain", "sdpa-math"]


@torch.no_grad()
def logits_of(model, *args, **kwargs):
    return model.logits(model(*args, **kwargs))


def test_logits_and_loss(loaded):
    model, want, _ = loaded
    real = want["attention_mask"].bool()
    for model.kernel in kernels(model):
        for matmul in (None, F.linear):                     # the blocks of model.py, and fast/
            fuse_blocks(model, matmul)
            logits = logits_of(model, want["input_ids"])
            assert (logits - want["logits"])[real].abs().max() < CLOSE, (model.kernel, matmul)
    labels = want["labels"][:, 1:].flatten()
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels, ignore_index=-100)
    assert abs(loss - want["loss"]) < 1e-5


def test_a_row_through_the_cache(loaded):
    model, want, name = loaded
    ids = want["cached_input_ids"][None]
    cuts = [0, *range(json.loads((FOLDERS / name / "expected.json").read_text())["prefill"],
                      ids.shape[1] + 1)]
    for model.kernel in kernels(model):
        cache = KVCache(len(model.model.layers))
        parts = [logits_of(model, ids[:, a:b], cache=cache) for a, b in zip(cuts, cuts[1:])]
        assert (torch.cat(parts, 1)[0] - want["cached_logits"]).abs().max() < CLOSE, model.kernel


def test_greedy_tokens(loaded):
    model, want, _ = loaded
    prompt, whole = want["greedy_prompt"].tolist(), want["greedy_output"].tolist()
    answer = generate(model, prompt, KVCache(len(model.model.layers)), (),
                      max_new_tokens=len(whole) - len(prompt))
    assert prompt + list(answer) == whole


def test_two_sequences_in_one_row(loaded):
    model, want, _ = loaded
    pairs = [want[f"pair_{letter}_input_ids"] for letter in "ab"]
    lengths = [len(ids) for ids in pairs]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    for model.kernel in kernels(model):
        logits = logits_of(model, torch.cat(pairs)[None], positions, PackedLayout(lengths))
        for letter, part in zip("ab", logits[0].split(lengths)):
            assert (part - want[f"pair_{letter}_logits"]).abs().max() < CLOSE, model.kernel


@pytest.mark.parametrize("name", ["gemma3", "mistral3", "qwen3_5"])
@pytest.mark.parametrize("top, text, own_head", [
    (True, False, False), (True, False, True), (False, True, True), (False, False, True)])
def test_the_top_level_says_whether_the_head_is_the_embedding(name, top, text, own_head, tmp_path):
    """tie_word_embeddings beside and in text_config, as transformers' classes read them."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    folder = FOLDERS / name
    weights = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": top}
    config["text_config"]["tie_word_embeddings"] = text
    (tmp_path / "config.json").write_text(json.dumps(config))
    if own_head:
        decoder = model_config(config)
        embedding = weights[decoder.stored_name("model.embed_tokens.weight")]
        weights[decoder.stored_name("lm_head.weight")] = embedding.flip(0).contiguous()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    ours = load_model(tmp_path, torch.float32)
    ids = torch.arange(20, 30)[None]
    with torch.no_grad():
        assert (logits_of(ours, ids) - theirs(input_ids=ids).logits).abs().max() < CLOSE
    assert ours.config.tie_word_embeddings != own_head
    assert any("a head of its own" in note for note in ours.config.notes) == (top and own_head)


def test_every_recorded_family_is_known():
    kinds = {json.loads((FOLDERS / name / "config.json").read_text())["model_type"]
             for name in NAMES}
    assert kinds <= set(FAMILIES)
