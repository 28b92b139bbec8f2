"""merge.py with export_format: gguf: the package gguf reads it, llama.cpp computes the same.

tests/recorded/llama_cpp.json holds what llama-cpp-python 0.3.36 computed with files of these very
tensors (cache in float32): `python -m tests.test_gguf_export` records it again, where that is
installed.
"""
import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import merge
from checkpoint.gguf_graphs import find_graph
from checkpoint.gguf_tensors import graph_tensors
from checkpoint.gguf_tokenizer import CASED_LETTERS as CASED_LETTERS_SUM
from checkpoint.gguf_tokenizer import PRETOKENIZERS, known_spelling, tokenizer_metadata
from checkpoint.load import load_model
from checkpoint.read_config import model_config
from checkpoint.read_gguf import load_gguf
from checkpoint.write_gguf import NUMBER_TYPES, encode_numbers, header_bytes
from evals.compare import load_exported
from families import FAMILIES
from settings.config import KEYS
from text.tokenizer import load_tokenizer
from tests.common import GOLDEN, ROOT, SHARED, losses_in, message_of, needs_shared
from tests.test_families import READABLE
from tests.tiny_models import (CHECKPOINTS, RECORDED_MODELS, TINY_LLAMA, adapter_with, base_with,
                               checkpoint_of, tensors_in)

gguf = pytest.importorskip("gguf")
RECORDED = ROOT / "tests/recorded/llama_cpp.json"
TINY_BASE = ROOT / "models/tiny"
TOKENIZERS = ("llama2", "llama2_2026", "llama3", "qwen2.5", "qwen3", "deepseek_v2", "deepseek_v3")
TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")
REFUSED = {"baichuan2_13b": "alibi: True", "llama4": "stacked_experts: in, out",
           "llama4_nested": "stacked_experts: in, out", "qwen3_moe": "layers without experts"}
OF_2026 = ("cohere2", "deepseek_v2", "deepseek_v3", "gemma3", "glm4_moe",
           "granite")                           # recorded beyond their windows
IN_LLAMA_CPP = (*sorted({*RECORDED_MODELS} - {*REFUSED}), *OF_2026)
# not copies: they may differ in the last bit elsewhere; Baichuan 2's head is normalized
COMPUTED = ("rope_freqs.weight", "baichuan2 output.weight")
QUESTIONS = ("What is 3 plus 4?", "Hello!", "What is the capital of Velmora?", "你好")
PAGE = [
    "Hello world! It's 3 o'clock, 12345678 things.",
    "  leading and   inner    spaces \t tabs\n\n\nnew lines \r\n end  ", "\n", " ", "'", " \n \n x",
    "中文字符和English混合，１２３。", "日本語テキスト カタカナ", "emoji 👩‍👩‍👧‍👦 🇩🇪 ok 😀😀",
    "Ünïcödé café naïve ß ſ ﬁ", "русский текст И ЗАГЛАВНЫЕ", "العربية ١٢٣ ، نص",
    "def f(x):\n    return x**2  # comment\n\tif x != 3: pass", "I'LL we'Ve don'T  'S",
    "URLs: https://a.b/c?d=e&f=g#h foo@bar.com", "a\u00a0b\u2003c\u200bd\ufeff",
    "<|im_start|>user\nhi<|im_end|>\n<|begin_of_text|>a", "x" * 50 + " " * 40 + "y",
    "ไทย ภาษาไทย हिन्दी नमस्ते", "$100.50 €5 50% 1,000,000", "AbcDEFghi JSONData", "1½ ² ³ Ⅷ",
]
CASED_LETTERS = (       # six escaped: composed, they would be other characters
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕ"
    "ἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭ"
    "ℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃")
DEEPSEEK_SPLITS = {     # of its tokenizer.json, where ends of lines are characters
    "deepseek_v2": ["[\r\n]", rf"\s?[{CASED_LETTERS}]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$",
                    "[一-龥\u0800-一가-\ud7ff]+", "digits"],
    "deepseek_v3": [
        r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+".replace(r"\r\n", "\r\n")]}


def export(base, out, number_type="f32", *more):
    """The GGUF file of a checkpoint."""
    merge.main([f"model_name_or_path={base}", f"export_dir={out}", "export_format=gguf",
                f"gguf_type={number_type}", *more])
    [file] = out.glob("*.gguf")
    return file


def values(file):
    """{name: tensor float32} of a file, by the package gguf."""
    found = {}
    for tensor in gguf.GGUFReader(file).tensors:
        numbers = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        found[tensor.name] = torch.from_numpy(numbers.astype("float32"))
    return found


def model_of(file, base, number_type):
    """The checkpoint's decoder with the numbers of the file in place of its own."""
    model = load_model(base, torch.float32)
    stored = values(file)
    parameters = {name: tuple(p.shape) for name, p in model.named_parameters()}
    made = graph_tensors(find_graph(model.config), model.config, parameters, number_type)
    for name, tensor in made.items():
        numbers = tensor.to_rows(stored[name])
        for i, source in enumerate(tensor.sources):
            part = numbers[i] if len(tensor.sources) > 1 else numbers
            weight = model.get_parameter(source).data
            if tensor.rows is None:
                weight.copy_(part.view(weight.shape))
            else:
                weight[tensor.rows] = part
    return model


@torch.no_grad()
def greedy(model, prompt, count):
    """The `count` most likely next tokens, one after the other."""
    ids = torch.tensor([prompt])
    for _ in range(count):
        ids = torch.cat([ids, model.logits(model(ids))[:, -1:].argmax(-1)], 1)
    return ids[0, len(prompt):].tolist()


def digest(file):
    """Of names, types and bytes of the tensors that are copies."""
    total = hashlib.sha256()
    family = file.name.partition("_")[0]
    for tensor in sorted(gguf.GGUFReader(file).tensors, key=lambda tensor: tensor.name):
        if not {tensor.name, f"{family} {tensor.name}"} & set(COMPUTED):
            total.update(f"{tensor.name} {tensor.tensor_type} {tensor.shape.tolist()}".encode())
            total.update(tensor.data.tobytes())
    return total.hexdigest()[:16]


def golden(name):
    """The folder of a recorded checkpoint."""
    return GOLDEN / ("models2026" if name in OF_2026 else "models") / name


def prompt_of(name, config):
    """Some ids, as many as every graph's context holds, and how many are generated."""
    if name in OF_2026:
        return torch.arange(3, 19).tolist(), 15
    room = min([*(size for size in config.windows if size), config.max_position_embeddings, 24])
    room = min(room, *config.attn_temperature[1:], config.rope["original_max_position_embeddings"])
    draw = torch.Generator().manual_seed(len(name))
    return torch.randint(3, config.vocab_size, (room // 2,), generator=draw).tolist(), room // 2 - 1


def questions():
    """QUESTIONS as ids of the tiny world's chat format."""
    tokenizer = load_tokenizer(TINY_BASE)
    return [tokenizer.encode(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")
            for text in QUESTIONS]


# ---- the file ----


@pytest.mark.parametrize("number_type", TYPES)
def test_numbers_are_encoded_as_the_reference_does(number_type):
    rows = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)) * 3
    rows[0] = 0
    rows[1, :32] = torch.arange(32) / 4 - 4             # halves, ties
    rows[2] = rows[2].abs()
    rows[3] *= 1e-6
    kind = gguf.GGMLQuantizationType[number_type.upper()]
    want = gguf.quants.quantize(rows.numpy(), kind).tobytes()
    assert encode_numbers(rows, number_type).numpy().tobytes() == want
    assert kind.value == NUMBER_TYPES[number_type].code
    assert gguf.GGML_QUANT_SIZES[kind] == NUMBER_TYPES[number_type][1:3]


def test_numbers_beyond_float16_are_refused():
    with pytest.raises(ValueError, match="7e.04 are beyond what f16 holds.*gguf_type: bf16"):
        encode_numbers(torch.tensor([[7e4] * 32]), "f16")


@pytest.mark.parametrize("number_type", NUMBER_TYPES)
def test_damaged_numbers_are_refused_as_such(number_type):
    for number in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="^it holds NaN or infinity: base or adapter"):
            encode_numbers(torch.tensor([[1.0] * 31 + [number]]), number_type)


def test_the_package_reads_the_metadata(tmp_path):
    metadata = {"general.architecture": "llama", "a": 7, "b": 0.5, "c": True, "d": "é",
                "e": ["x", "", "中"], "f": [1, -2], "g": [0.5, -1.5]}
    path = tmp_path / "m.gguf"
    path.write_bytes(header_bytes(metadata, {}))
    read = gguf.GGUFReader(path)
    assert {name: read.get_field(name).contents() for name in metadata} == metadata


def test_an_adapter_is_merged_into_the_file(tmp_path):
    base = base_with(tmp_path / "base", torch.bfloat16, hidden_size=64, intermediate_size=96)
    adapter = adapter_with(tmp_path / "adapter", base)
    file = export(base, tmp_path / "out", "f32", f"adapter_name_or_path={adapter}")
    merge.main([f"model_name_or_path={base}", f"adapter_name_or_path={adapter}",
                f"export_dir={tmp_path / 'plain'}", "infer_dtype=float32"])
    want = tensors_in(tmp_path / "plain")
    got = model_of(file, tmp_path / "plain", "f32")
    assert all(torch.equal(p, want[name]) for name, p in got.named_parameters())
    assert export(base, tmp_path / "auto", "bf16").name == "auto-BF16.gguf"
    merge.main([f"model_name_or_path={base}", f"export_dir={tmp_path / 'none'}",
                "export_format=gguf"])
    assert (tmp_path / "none/none-BF16.gguf").is_file()         # the base's dtype


@needs_shared
@pytest.mark.parametrize("name, targets", [
    ("llama3", ("q_proj", "k_proj", "down_proj")), ("gemma2", ("q_proj", "o_proj")),
    ("chatglm3", ("query_key_value", "dense_h_to_4h")), ("mixtral", ("q_proj", "w1", "w2"))])
def test_an_adapter_alone_added_to_the_bases_file_is_the_merged_file(name, targets, tmp_path):
    """W + alpha / r B A, as llama.cpp adds it, matrix by matrix; rows in the file's order."""
    base = GOLDEN / "models" / name
    if name == "mixtral":
        base = mixtral_in(tmp_path / "base")
    adapter = adapter_with(tmp_path / "adapter", base, targets=targets)
    named = f"adapter_name_or_path={adapter}"
    plain, merged = values(export(base, tmp_path / "plain")), values(
        export(base, tmp_path / "merged", "f32", named))
    merge.main([f"model_name_or_path={base}", f"export_dir={tmp_path / 'lora'}", named,
                "export_format=gguf-lora"])
    file = tmp_path / "lora/lora-LORA-F32.gguf"
    pairs = values(file)
    fields = {field: gguf.GGUFReader(file).get_field(field).contents()
              for field in ("general.type", "adapter.type", "adapter.lora.alpha")}
    assert fields == {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 8.0}
    for matrix, weight in plain.items():
        if f"{matrix}.lora_a" in pairs:
            A, B = pairs.pop(f"{matrix}.lora_a"), pairs.pop(f"{matrix}.lora_b")
            weight = weight + 8 / A.shape[-2] * (B @ A)
        assert torch.allclose(weight, merged[matrix], atol=1e-6, rtol=1e-5), matrix
    assert not pairs


def mixtral_in(folder):
    """A random Mixtral."""
    base_with(folder, model_type="mixtral", num_local_experts=4, num_experts_per_tok=2,
              sliding_window=None)
    tensors = tensors_in(folder)
    config = model_config(json.loads((folder / "config.json").read_text()))
    save_file({config.stored_name(name): p for name, p in tensors.items()},
              folder / "model.safetensors")
    return folder


def test_adapters_that_llama_cpp_cannot_add_are_refused(tmp_path):
    base = base_with(tmp_path / "base")
    head = ("base_model.model.lm_head.weight", torch.randn(50, 32))
    whole = adapter_with(tmp_path / "whole", base, modules_to_save=["lm_head"], add=[head])
    out = tmp_path / "out"
    arguments = [f"model_name_or_path={base}", f"export_dir={out}", "export_format=gguf-lora"]
    assert "changes lm_head.weight in another way" in message_of(
        merge.main, [*arguments, f"adapter_name_or_path={whole}"])
    assert "writes one adapter, and 0 are named" in message_of(merge.main, arguments)
    assert "has f32, f16 or bf16" in message_of(
        merge.main, [*arguments, f"adapter_name_or_path={whole}", "gguf_type=q4_0"])
    assert not out.exists()


def test_a_base_in_4_bits_is_written_dequantized(tmp_path):
    """All its matrices, with the numbers that were trained with."""
    base = base_with(tmp_path / "base", hidden_size=64, intermediate_size=96)
    merge.main([f"model_name_or_path={base}", f"export_dir={tmp_path / 'nf4'}",
                "export_format=bnb-nf4"])
    merge.main([f"model_name_or_path={tmp_path / 'nf4'}", f"export_dir={tmp_path / 'dense'}"])
    file = export(tmp_path / "nf4", tmp_path / "out")
    assert digest(file) == digest(export(tmp_path / "dense", tmp_path / "again"))
    read = load_gguf(file, tmp_path / "nf4")
    want = tensors_in(tmp_path / "dense")
    assert all(torch.equal(p, want[name]) for name, p in read.named_parameters())


@needs_shared
@pytest.mark.parametrize("name, want", [
    ("granite", {"logit_scale": 0.1, "residual_scale": 0.22, "embedding_scale": 12.0,
                 "attention.scale": 0.09}),
    ("cohere2", {"logit_scale": 0.25, "attention.sliding_window": 6}),
    ("gemma3", {"rope.freq_base_swa": 10000.0, "attention.sliding_window": 5})])
def test_factors_and_windows_are_stated(name, want, tmp_path):
    read = gguf.GGUFReader(export(golden(name), tmp_path / name))
    assert {key: read.get_field(f"{name}.{key}").contents() for key in want} == pytest.approx(want)


def test_a_norm_of_queries_takes_their_factor():
    """What multiplies the rows of q would be undone by the norm."""
    fields = dict(TINY_LLAMA, model_type="gemma3_text", sliding_window=5, head_dim=16,
                  query_pre_attn_scalar=64, tie_word_embeddings=True, num_hidden_layers=1)
    config = model_config(fields)
    made = graph_tensors(find_graph(config), config, {
        "model.layers.0.self_attn.q_norm.weight": (16,),
        "model.layers.0.self_attn.q_proj.weight": (64, 64)}, "f32")
    norm = made["blk.0.attn_q_norm.weight"]
    assert norm.factor == norm.offset == (16 / 64) ** 0.5       # (1 + w) * factor
    assert made["blk.0.attn_q.weight"].factor == 1


def test_many_blocks_give_the_same_bytes(tmp_path, monkeypatch):
    want = export(TINY_BASE, tmp_path / "a", "q4_0", "gguf_pretokenizer=qwen2").read_bytes()
    monkeypatch.setattr(merge, "BLOCK", 3000)
    shutil.rmtree(tmp_path / "a")
    got = export(TINY_BASE, tmp_path / "a", "q4_0", "gguf_pretokenizer=qwen2").read_bytes()
    assert got == want


# ---- llama.cpp ----


@pytest.mark.parametrize("number_type", ["f32", "q8_0", "q4_0"])
def test_the_tiny_model_answers_as_in_llama_cpp(number_type, tmp_path, capsys):
    file = export(TINY_BASE, tmp_path / "tiny", number_type, "gguf_pretokenizer=qwen2")
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))[f"tiny {number_type}"]
    assert digest(file) == recorded["digest"]
    model = model_of(file, TINY_BASE, number_type)
    assert [greedy(model, ids, 12) for ids in questions()] == recorded["greedy"]
    printed = capsys.readouterr().out
    assert ("llama-quantize tiny-F32.gguf tiny-Q4_K_M.gguf Q4_K_M" in printed) == (
        number_type == "f32")


@needs_shared
@pytest.mark.parametrize("name", IN_LLAMA_CPP)
def test_every_family_computes_the_same_in_llama_cpp(name, tmp_path):
    base = golden(name)
    file = export(base, tmp_path / name)
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))[name]
    assert digest(file) == recorded["digest"]
    model = load_model(base, torch.float32)
    prompt, count = prompt_of(name, model.config)
    assert greedy(model, prompt, count) == recorded["greedy"][0]
    assert recorded["logits_off"] < (5e-3 if "gelu" in model.config.hidden_act else 1e-4)


@needs_shared
@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_of_mixed_texts_are_llama_cpps(name, tmp_path):
    tokenizer = load_tokenizer(tokenizer_folder(name, tmp_path))
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))[f"tokenizer {name}"]
    section = tokenizer_metadata(tokenizer, tokenizer.vocab_size + 5, set())
    assert hashlib.sha256(repr(section).encode()).hexdigest()[:16] == recorded["digest"]
    assert [tokenizer.encode(text) for text in PAGE] == recorded["ids"]


def tokenizer_folder(name, scratch):
    """Files of a tokenizer; of DeepSeek's: Qwen 2.5's vocabulary, and the splits of its own."""
    if name not in DEEPSEEK_SPLITS:
        return SHARED / "tokenizers" / name
    folder = scratch / name
    shutil.copytree(SHARED / "tokenizers/qwen2.5", folder)
    fields = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    steps = [{"type": "Digits", "individual_digits": True} if regex == "digits" else
             {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated",
              "invert": False} for regex in DEEPSEEK_SPLITS[name]]
    steps.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": False})
    fields |= {"normalizer": {"type": "Sequence", "normalizers": []},
               "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}
    (folder / "tokenizer.json").write_text(json.dumps(fields), encoding="utf-8")
    return folder


def test_a_list_of_other_letters_is_not_taken_for_deepseeks():
    letters = DEEPSEEK_SPLITS["deepseek_v2"][1]
    assert known_spelling(letters) == CASED_LETTERS_SUM
    assert known_spelling(letters.replace("À-Ö", "")) != CASED_LETTERS_SUM


# ---- losses ----


def test_losses_of_an_exported_folder_are_compared(tmp_path, capsys):
    """--check reads the file's own numbers: those that the package gguf reads."""
    file = export(TINY_BASE, tmp_path / "out", "q4_0", "gguf_pretokenizer=qwen2")
    judge = model_of(file, TINY_BASE, "q4_0")
    ours = load_gguf(file, TINY_BASE)
    assert all(torch.equal(p, judge.get_parameter(name)) for name, p in ours.named_parameters())
    capsys.readouterr()
    merge.main([f"model_name_or_path={TINY_BASE}", "--check", str(tmp_path / "out"),
                "eval_dataset=tiny_review", "template=chatml", f"dataset_dir={ROOT / 'data'}"])
    table, title = losses_in(capsys.readouterr().out)
    assert "32 rows held out" in title and table["base"][1] == 1
    assert table["exported"][0] == pytest.approx(table["base"][0], abs=0.01)
    assert 0.98 < table["exported"][1] <= 1
    adapter_with(tmp_path / "adapter", TINY_BASE)
    merge.main([f"model_name_or_path={TINY_BASE}", "--check", str(tmp_path / "out"),
                f"adapter_name_or_path={tmp_path / 'adapter'}", "eval_dataset=tiny_review",
                "template=chatml", f"dataset_dir={ROOT / 'data'}"])
    table, _ = losses_in(capsys.readouterr().out)
    assert list(table) == ["base", "adapter", "merged", "exported"]
    assert table["merged"][0] == pytest.approx(table["adapter"][0], abs=2e-4) != table["base"][0]
    assert "no rows to compare on" in message_of(
        merge.main, [f"model_name_or_path={TINY_BASE}", "--check", str(tmp_path / "out")])
    for folder, words in ((tmp_path, "holds neither config.json nor a .gguf file"),
                          (tmp_path / "ou", "does not exist")):
        with pytest.raises((ValueError, FileNotFoundError), match=f"^check: .* {words}"):
            merge.main([f"model_name_or_path={TINY_BASE}", "--check", str(folder),
                        "eval_dataset=tiny_review"])
    other = base_with(tmp_path / "other", num_hidden_layers=7)
    assert "has no tensor blk." in message_of(load_gguf, file, other)


def test_a_head_that_an_adapter_has_untied_is_read_back(tmp_path):
    """With a graph for tied heads, too, and with one that always has its own (qwen3moe)."""
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
                   norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[])
    for kind, fields in (("llama", {}), ("qwen3_moe", experts)):
        base = base_with(tmp_path / kind / "base", model_type=kind, tie_word_embeddings=True,
                         **fields)
        head = ("base_model.model.lm_head.weight", torch.randn(50, 32))
        adapter = adapter_with(tmp_path / kind / "adapter", base, modules_to_save=["lm_head"],
                               add=[head])
        file = export(base, tmp_path / kind / "out", "f32", f"adapter_name_or_path={adapter}")
        model = load_gguf(file, base)
        assert torch.equal(model.lm_head.weight, head[1])
        assert torch.equal(model.model.embed_tokens.weight,
                           tensors_in(base)["model.embed_tokens.weight"])
        tied = export(base, tmp_path / kind / "tied", "f32")
        assert torch.equal(load_gguf(tied, base).lm_head.weight, model.model.embed_tokens.weight)


def test_a_damaged_file_or_one_of_another_model_is_not_compared(tmp_path):
    base = base_with(tmp_path / "base")
    file = export(base, tmp_path / "out", "f32")
    whole = file.read_bytes()
    for size in (0, 3, 6, 100, len(whole) // 3, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=f"{file.name} is (damaged or incomplete|no GGUF)"):
            load_gguf(file, base)
    value = 24 + 8 + len("pocket_factory.written_by")       # the type of the first value
    for place, number in ((value, 99), (value, 9), (value + 4, 2**31)):
        file.write_bytes(whole[:place] + number.to_bytes(4, "little") + whole[place + 4:])
        with pytest.raises(ValueError, match="is damaged or incomplete"):
            load_gguf(file, base)
    file.write_bytes(whole)
    wide = base_with(tmp_path / "wide", intermediate_size=80)
    with pytest.raises(ValueError, match="has shape .* is it another model"):
        load_gguf(file, wide)
    merge.main([f"model_name_or_path={base}", f"export_dir={tmp_path / 'copy'}"])
    with pytest.raises(ValueError, match="vocab_size: 50, and .* 60; is it another model"):
        load_exported(tmp_path / "copy", base_with(tmp_path / "more", vocab_size=60), None, "cpu")
    shutil.copy(file, file.with_name("b.gguf"))
    with pytest.raises(ValueError, match="several .gguf files .b.gguf, out-F32.gguf."):
        load_exported(tmp_path / "out", base, None, "cpu")


@needs_shared
@pytest.mark.parametrize("name", ["chatglm3", "deepseek_v3", "gemma2", "llama3", "qwen2_moe"])
def test_a_file_is_read_back_as_the_decoder_it_was_made_of(name, tmp_path):
    base = golden(name)
    model, read = load_model(base, torch.float32), load_gguf(export(base, tmp_path / name), base)
    for parameter, p in model.named_parameters():
        assert torch.allclose(read.get_parameter(parameter), p, atol=1e-6), parameter


# ---- refusals ----


@needs_shared
@pytest.mark.parametrize("name", REFUSED)
def test_what_no_graph_computes_is_refused_by_name(name, tmp_path):
    base = GOLDEN / "models" / name
    kind = json.loads((base / "config.json").read_text())["model_type"]
    message = message_of(export, base, tmp_path / "out")
    assert f"no graph of llama.cpp computes this {kind} model" in message
    assert REFUSED[name] in message and not (tmp_path / "out").exists()


@needs_shared
def test_latent_attention_that_the_graph_lacks_is_refused(tmp_path):
    best = GOLDEN / "models2026/deepseek_v2_qlora"
    assert "deepseek2, lacks group_score: best." in message_of(export, best, tmp_path / "out")
    fields = json.loads((golden("deepseek_v3") / "config.json").read_text())
    yarn = fields["rope_scaling"]
    for changes, want in [
            ({"rope_interleave": False}, "lacks rotary_pairs: halves."),
            ({"num_hidden_layers": 26}, "lacks q_lora_rank in a model of 26 layers."),
            ({"rope_scaling": yarn | {"mscale": 0.5}}, "mscale 0.5 and mscale_all_dim 1.0."),
            ({"n_shared_experts": 0}, "lacks a mixture without shared experts.")]:
        assert want in message_of(find_graph, model_config(fields | changes))


@needs_shared
@pytest.mark.parametrize("target, refused", [("kv_b_proj", True), ("o_proj", False)])
def test_an_adapter_that_the_graph_does_not_add_is_refused(target, refused, tmp_path):
    base = golden("deepseek_v2")
    adapter = adapter_with(tmp_path / "adapter", base, targets=(target,))
    arguments = [f"model_name_or_path={base}", f"adapter_name_or_path={adapter}",
                 f"export_dir={tmp_path / 'lora'}", "export_format=gguf-lora"]
    if refused:
        message = message_of(merge.main, arguments)
        assert "graph deepseek2 does not add an adapter to model.layers.0.self_attn.kv" in message
    else:
        merge.main(arguments)


def test_every_family_is_written_or_refused_in_words(tmp_path):
    graphs = {}
    for name in CHECKPOINTS:
        if (GOLDEN / "models" / name).exists() or name in ("qwen", "internlm2", "baichuan1_7b"):
            config = load_model(checkpoint_of(name, tmp_path / name), skip_weights=True).config
            try:
                graphs[config.model_type] = find_graph(config).arch
            except ValueError as error:
                graphs[config.model_type] = str(error)
    assert graphs["qwen"] == graphs["internlm2"] == "llama" and graphs.keys() <= FAMILIES.keys()
    unusual = model_config({**TINY_LLAMA, "model_type": "llama", "rope_scaling": {
        "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}})
    assert "rope type longrope" in message_of(find_graph, unusual)
    assert "layers of short convolution" in message_of(find_graph, model_config(READABLE["lfm2"]))


def test_an_unknown_pretokenizer_is_refused_by_name(tmp_path):
    message = message_of(export, TINY_BASE, tmp_path / "out")
    assert "no tokenizer like tiny's and would split texts into other ids: it splits" in message
    assert ("nearest (gguf_pretokenizer: dbrx, qwen2, gpt-2, smollm, deepseek-v3, deepseek-llm)"
            in message)
    assert not any(tmp_path.iterdir())                  # nothing half-written
    choices = KEYS["gguf_pretokenizer"].metadata["choices"]
    assert set(choices) == set(PRETOKENIZERS.values())  # what is advised can be given


def test_an_older_file_is_replaced_on_demand_and_a_stranger_is_kept(tmp_path):
    base = base_with(tmp_path / "base")
    export(base, tmp_path / "out", "f16")
    assert "is not empty" in message_of(export, base, tmp_path / "out")
    file = export(base, tmp_path / "out", "f32", "overwrite=true")
    assert sorted(item.name for item in (tmp_path / "out").iterdir()) == [
        "README.md", "out-F32.gguf"]
    file.write_bytes(b"GGUF of somebody else")
    assert "which no earlier export" in message_of(export, base, tmp_path / "out", "f32",
                                                "overwrite=true")


def test_contradictions_are_named(tmp_path):
    base = base_with(tmp_path / "base")
    assert "set gguf_type: bf16" in message_of(export, base, tmp_path / "out", "q8_0",
                                            "infer_dtype=bfloat16")
    assert "set export_format: gguf, too" in message_of(
        merge.main, [f"model_name_or_path={base}", f"export_dir={tmp_path / 'out'}",
                     "gguf_type=q8_0"])


# ---- python -m tests.test_gguf_export: record what llama.cpp computes ----


def record(folder: Path):
    """Write RECORDED, with files in this folder."""
    found = {}
    for number_type in ("f32", "q8_0", "q4_0"):
        file = export(TINY_BASE, folder / f"tiny_{number_type}", number_type,
                      "gguf_pretokenizer=qwen2")
        found[f"tiny {number_type}"] = judged(file, questions(), 12)[0]
    for name in IN_LLAMA_CPP:
        base = golden(name)
        file = export(base, folder / name)
        model = load_model(base, torch.float32)
        prompt, count = prompt_of(name, model.config)
        found[name], logits = judged(file, [prompt], count)
        ours = model.logits(model(torch.tensor([prompt])))[0]
        found[name]["logits_off"] = float((ours - logits).abs().max())
    for name in TOKENIZERS:
        files = tokenizer_folder(name, folder)
        rows = load_tokenizer(files).vocab_size + 5
        base = base_with(folder / f"base_{name}", vocab_size=rows)
        for file in files.glob("*token*.json"):
            shutil.copyfile(file, base / file.name)
        file = export(base, folder / f"text_{name}", "f16")
        section = tokenizer_metadata(load_tokenizer(base), rows, set())
        found[f"tokenizer {name}"] = {
            "digest": hashlib.sha256(repr(section).encode()).hexdigest()[:16],
            "ids": opened(file).tokenize_all(PAGE)}
    RECORDED.write_text(json.dumps(found, ensure_ascii=False) + "\n", encoding="utf-8")


def opened(file):
    """A file in llama.cpp, with its cache in float32."""
    from llama_cpp import Llama

    class Judge(Llama):
        def tokenize_all(self, texts):
            return [self.tokenize(text.encode(), add_bos=False, special=True) for text in texts]

    return Judge(str(file), n_ctx=256, n_threads=1, verbose=False, logits_all=True, type_k=0,
                 type_v=0)


def judged(file, prompts, count):
    """({digest, greedy}, logits of the last prompt) by llama.cpp."""
    program = opened(file)
    answers = []
    for prompt in prompts:
        program.reset()
        program.eval(prompt)
        logits = torch.tensor(program.scores[:len(prompt)].copy())
        answers.append([])
        for _ in range(count):
            answers[-1].append(int(program.scores[program.n_tokens - 1].argmax()))
            program.eval(answers[-1][-1:])
    return {"digest": digest(file), "greedy": answers}, logits


if __name__ == "__main__":
    with torch.no_grad():
        record(Path(sys.argv[1]))
