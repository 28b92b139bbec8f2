"""text/vocabularies.py against sentencepiece, tiktoken and correct tokenizer.json files.

Small sentencepiece models are trained here with each switch on and off; Llama 2's and Qwen's real
vocabularies are first written in their older formats. Every check compares ids on the same page of
English, Chinese, code, emoji, spaces and special tokens.

Requires: test_tokenizer.py.
"""
import base64
import io
import json
import re
import struct
import unicodedata

import pytest
from tokenizers import Tokenizer as Core
from tokenizers import models, pre_tokenizers, trainers

from tests.common import SHARED, needs_shared
from text.tokenizer import TextStream, load_tokenizer
from text.vocabularies import VENDORS, bytes_to_unicode

PAGE = [
    "Hello there, world! It's a test, isn't IT'S?", "  two  spaces ", " leading", "trailing  ", "",
    " ", "    ", "\n", "\n\nlines\n\n\n  more\n", "tab\there\t\t", "naïve café e\u0301",
    "你好，世界！今天天气很好。", "12345 3.14 一2三", "🤗 emoji 👩‍👩‍👧 family 🇨🇳",
    "def f(x):\n    return {'a': [1, 2.5]}  # ok\n", "if a == b:\r\n\tprint('x')\r\n",
    "ｆｕｌｌ ① ㎏ ﬁ", "aaaaaaaaaaa ababababa", "<0x41> <0x0A>", "▁literal ▁▁ x",
    "\x00 \u200b \ufeff \xa0 x", "한국어 조선말", "<s>a</s> b <unk>c", "a<sep>b", "a <sep> b<sep>",
    "<sep>x", "x  <sep><user>  y", "philosophy, sop and eop", "zqx zqx zqxz",
    "[gMASK]sop<|user|>\n hi<|assistant|>",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|><|extra_7|>",
]
PAGE += ["".join(PAGE), "\n".join(PAGE)]
SENTENCES = [*"\n".join(PAGE[:16] * 5).split("\n"),
             "The philosophy of this test is to say the same thing twice.",
             "今天我们去公园，明天我们去学校。",
             "for i in range(10):  print(i, i + 1)", "    if a == b:"] * 3
SPECIAL = ["<unk>", "<s>", "</s>"]


def split_at_special_tokens(text, special):
    """A text split at its special tokens, which are kept."""
    return re.split("(" + "|".join(map(re.escape, sorted(special, key=len, reverse=True))) + ")",
                    text)


def reference(sp, text, special=SPECIAL):
    """Ids of the vendors' slow classes: sentencepiece for each text between two special tokens."""
    ids = [[sp.piece_to_id(part)] if part in special else sp.encode(part)
           for part in split_at_special_tokens(text, special)]
    return [i for part in ids for i in part]


def check_page(ours, expected, page=PAGE):
    """The same ids on the page, one by one and in a batch; streaming equals decoding."""
    assert ours.encode_batch(page) == [ours.encode(text) for text in page]
    for text in page:
        ids = ours.encode(text)
        assert ids == expected(text), (text, [ours.core.id_to_token(i) for i in ids])
        stream = TextStream(ours, skip_special_tokens=False)
        assert "".join([*map(stream.push, ids), stream.flush()]) == ours.decode(ids)


def check_saved(ours, folder, page=PAGE):
    """Saved files need nothing else, here and in transformers."""
    ours.save(folder)
    again = load_tokenizer(folder)
    assert [again.encode(text) for text in page] == [ours.encode(text) for text in page]
    assert (again.bos_id, again.eos_id, again.pad_id) == (ours.bos_id, ours.eos_id, ours.pad_id)
    assert (again.unk_id, again.vocab_size) == (ours.unk_id, ours.vocab_size)
    transformers = pytest.importorskip("transformers")
    peer = transformers.AutoTokenizer.from_pretrained(folder)
    assert [peer.encode(text, add_special_tokens=False) for text in page] == [
        ours.encode(text) for text in page
    ]
    assert (peer.eos_token_id, peer.pad_token_id, len(peer)) == (
        ours.eos_id, ours.pad_id, ours.vocab_size
    )
    return peer


# ---- sentencepiece, trained here


def train(folder, kind, byte_fallback=True, prefix=True, squeeze=False, own=(), rule="identity"):
    """A small sentencepiece model in a folder; returns its sentencepiece.SentencePieceProcessor."""
    spm = pytest.importorskip("sentencepiece")
    written = io.BytesIO()
    # every real vocabulary has them
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=written, vocab_size=620, model_type=kind,
        minloglevel=2, byte_fallback=byte_fallback, add_dummy_prefix=prefix,
        remove_extra_whitespaces=squeeze, num_threads=1, user_defined_symbols=list(own),
        normalization_rule_name=rule, character_coverage=0.98, hard_vocab_limit=False,
        required_chars="<>/0123456789ABCDEFx",
    )
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    return spm.SentencePieceProcessor(model_proto=written.getvalue())


@pytest.mark.parametrize("own", [(), ("<sep>", "<user>")], ids=["", "own"])
@pytest.mark.parametrize("squeeze", [False, True], ids=["spaces", "squeeze"])
@pytest.mark.parametrize("prefix", [False, True], ids=["", "prefix"])
@pytest.mark.parametrize("byte_fallback", [False, True], ids=["unk", "bytes"])
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_ids_equal_sentencepiece(tmp_path, kind, byte_fallback, prefix, squeeze, own):
    sp = train(tmp_path / "a", kind, byte_fallback, prefix, squeeze, own)
    ours = load_tokenizer(tmp_path / "a")
    assert ours.vocab_size == sp.get_piece_size()
    assert (ours.bos_token, ours.eos_token, ours.unk_token, ours.pad_token) == (
        "<s>", "</s>", "<unk>", None
    )
    check_page(ours, lambda text: reference(sp, text))
    for text in PAGE:
        ids = ours.encode(text)
        # written differently: sentencepiece hides control pieces
        if not {0, 1, 2} & set(ids) and "▁" not in text:
            assert ours.decode(ids) == sp.decode(ids)


@pytest.mark.parametrize("prefix", [False, True])
def test_user_defined_pieces_of_spaces(tmp_path, prefix):
    """As Gemma's: ▁▁ and ▁▁▁▁ are user-defined, so runs of spaces are split before anything is
    merged."""
    sp = train(tmp_path / "a", "bpe", prefix=prefix, own=("▁▁", "▁▁▁▁", "\n\n", "\t"))
    ours = load_tokenizer(tmp_path / "a")
    # a text that is nothing but such a piece is one of the limits that sentencepiece_normalizer
    # names
    page = [text for text in PAGE if text.strip(" ")] + ["a" + " " * n + "b" for n in range(12)]
    check_page(ours, lambda text: reference(sp, text), page)
    assert ours.id_of("▁▁▁▁") in ours.encode("a    b")


@pytest.mark.parametrize("rule", ["nmt_nfkc", "nfkc", "nfkc_cf"])
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_charsmap_is_applied(tmp_path, kind, rule):
    sp = train(tmp_path / "a", kind, squeeze=True, own=("<sep>", "<user>"), rule=rule)
    ours = load_tokenizer(tmp_path / "a")
    page = [text for text in PAGE if "\r\n" not in text]  # a limit, see sentencepiece_normalizer
    check_page(ours, lambda text: reference(sp, text), page)
    assert ours.encode("ｆｕｌｌ ①") == ours.encode("full 1")


def test_special_tokens_as_text_on_request(tmp_path):
    for kind in ("bpe", "unigram"):
        sp = train(tmp_path / kind, kind)
        ours = load_tokenizer(tmp_path / kind, split_special_tokens=True)
        check_page(ours, sp.encode)
        assert ours.eos_id not in ours.encode("a</s>b")
        assert ours.split_at_special("a</s>b") == ["a", 2, "b"]


def test_saved_files_are_complete(tmp_path):
    train(tmp_path / "a", "bpe", own=("<sep>", "<user>"))
    (tmp_path / "a" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BaichuanTokenizer",
                    "auto_map": {"AutoTokenizer": ["tokenization_baichuan.X", None]}})
    )
    ours = load_tokenizer(tmp_path / "a")
    peer = check_saved(ours, tmp_path / "b")
    # the class adds bos where the config does not
    assert peer.encode("hi") == [1, *ours.encode("hi")]
    ours.add_tokens(["<|end|>"])
    ours.set_token("pad_token", "<|end|>")
    assert ours.pad_id == ours.vocab_size - 1
    check_saved(ours, tmp_path / "c")
    assert load_tokenizer(tmp_path / "c").encode("a<|end|>")[-1] == ours.pad_id


# ---- sentencepiece, written by hand


def varint(number):
    groups = bytearray()
    while number > 127:
        groups.append(number & 127 | 128)
        number >>= 7
    return bytes([*groups, number])


def message(*fields):
    """A protobuf message from (number, value) pairs; the value is an int, a float, a text or a
    message."""
    parts = []
    for number, value in fields:
        if isinstance(value, int):
            parts.append(varint(number << 3) + varint(value))
        elif isinstance(value, float):
            parts.append(varint(number << 3 | 5) + struct.pack("<f", value))
        else:
            value = value.encode() if isinstance(value, str) else value
            parts.append(varint(number << 3 | 2) + varint(len(value)) + value)
    return b"".join(parts)


CONTROL = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
BYTES = [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]


def write_model(folder, pieces, trainer=(), normalizer=((3, 1), (4, 0)), **config):
    """tokenizer.model (BPE with byte fallback unless `trainer` says otherwise) and
    tokenizer_config.json."""
    folder.mkdir(exist_ok=True)
    fields = [(1, message((1, text), (2, score), (3, kind))) for text, score, kind in pieces]
    whole = message(*fields, (2, message((3, 2), (35, 1), *trainer)), (3, message(*normalizer)))
    (folder / "tokenizer.model").write_bytes(whole)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return whole


def hello_pieces(*more):
    """A vocabulary with hello and the letters of sop."""
    merged = [("ll", -1.0, 1), ("he", -2.0, 1), ("llo", -3.0, 1), ("hello", -4.0, 1),
              ("▁hello", -5.0, 1), *more]
    return [*CONTROL, *BYTES, *merged,
            *((letter, -99.0, 1) for letter in "▁heloabcdfgijkmnpqrstuvwxyz")]


@needs_shared
def test_llama2_from_its_model_file(tmp_path):
    spm = pytest.importorskip("sentencepiece")
    folder = SHARED / "tokenizers" / "llama2"
    stored = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    scores = {}
    for rank, pair in enumerate(stored["merges"]):
        scores.setdefault("".join(pair if isinstance(pair, list) else pair.split(" ")),
                          -float(rank))
    kinds = {0: 2, 1: 3, 2: 3, **dict.fromkeys(range(3, 259), 6)}
    texts = sorted(stored["vocab"], key=stored["vocab"].get)
    pieces = [(text, scores.get(text, -1e6), kinds.get(i, 1)) for i, text in enumerate(texts)]
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    whole = write_model(tmp_path / "a", pieces, **config)
    ours, known = load_tokenizer(tmp_path / "a"), load_tokenizer(folder)
    sp = spm.SentencePieceProcessor(model_proto=whole)
    check_page(ours, known.encode)
    check_page(ours, lambda text: reference(sp, text))
    for text in PAGE:
        assert ours.decode(ours.encode(text)) == known.decode(known.encode(text))
    peer = check_saved(ours, tmp_path / "b")
    assert peer.encode("hi") == [1, *ours.encode("hi")]
    assert ours.config["legacy"] is False and ours.bos_id == 1


def test_chatglm3(tmp_path):
    """Nine tokens after the pieces, in the order of the published ids; sop is a token, but not
    inside philosophy."""
    pieces = hello_pieces()
    write_model(tmp_path / "a", pieces, tokenizer_class="ChatGLMTokenizer")
    ours = load_tokenizer(tmp_path / "a")
    names = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "<|system|>", "<|user|>",
             "<|assistant|>", "<|observation|>"]
    assert [ours.id_of(name) for name in names] == list(range(len(pieces), len(pieces) + 9))
    assert (ours.eos_token, ours.pad_token, ours.unk_token) == ("</s>", "<unk>", "<unk>")
    assert not ours.add_bos_token
    gmask, sop, user = (ours.id_of(name) for name in ("[gMASK]", "sop", "<|user|>"))
    assert ours.encode("[gMASK]sop<|user|>hello") == [gmask, sop, user, ours.id_of("▁hello")]
    assert sop not in ours.encode("philosophy sophie, 人sop人")
    assert all(ours.is_added(name) for name in names)
    peer = check_saved(ours, tmp_path / "b")
    # the vendor's class begins every text with it
    assert peer.encode("hello") == [gmask, sop, ours.id_of("▁hello")]


def test_a_piece_spelled_like_a_special_token_is_renamed(tmp_path):
    pieces = hello_pieces(("so", -6.0, 1), ("sop", -7.0, 1))
    write_model(tmp_path / "a", pieces, tokenizer_class="ChatGLMTokenizer")
    ours = load_tokenizer(tmp_path / "a")
    assert ours.id_of("sop") == len(pieces) + 3 and ours.vocab_size == len(pieces) + 9
    assert [ours.core.id_to_token(i) for i in ours.encode("sopx")] == ["▁", "so", "p", "x"]


def test_renamed_pieces_and_added_tokens(tmp_path):
    """InternLM 2 renames unused pieces; added_tokens.json and special_tokens_map.json add tokens
    after the last."""
    pieces = hello_pieces(("[UNUSED_TOKEN_145]", 0.0, 4), ("[UNUSED_TOKEN_146]", 0.0, 1),
                          ("<own>", 0.0, 4))
    first = len(CONTROL) + len(BYTES) + 5
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": True,
             "special": True}
    decoder = {str(first): {"content": "<|im_end|>", **flags},
               str(first + 1): {"content": "<|im_start|>", **flags}}
    write_model(tmp_path / "a", pieces, tokenizer_class="InternLM2Tokenizer",
                added_tokens_decoder=decoder)
    (tmp_path / "a" / "added_tokens.json").write_text(
        json.dumps({"<tool>": len(pieces), "<pad>": len(pieces) + 1})
    )
    (tmp_path / "a" / "special_tokens_map.json").write_text(
        json.dumps({"pad_token": "<pad>",
                    "additional_special_tokens": ["<|im_end|>", {"content": "<last>"}, "<own>"]})
    )
    ours = load_tokenizer(tmp_path / "a")
    assert [ours.id_of(token) for token in ("<|im_end|>", "<|im_start|>")] == [first, first + 1]
    assert [ours.id_of(token) for token in ("<tool>", "<pad>", "<last>")] == [
        len(pieces) + i for i in range(3)
    ]
    ids = ours.encode("<|im_start|>hello<tool>hello<|im_end|><last>")
    assert ids == [first + 1, ours.id_of("▁hello"), len(pieces), ours.id_of("▁hello"), first,
                   len(pieces) + 2]
    special = {i for i, token in ours.core.get_added_tokens_decoder().items() if token.special}
    assert special == {0, 1, 2, first, first + 1, first + 2, len(pieces) + 1, len(pieces) + 2}
    check_saved(ours, tmp_path / "b")


def test_add_prefix_space_false(tmp_path):
    write_model(tmp_path / "a", hello_pieces(), tokenizer_class="LlamaTokenizer",
                add_prefix_space=False)
    ours = load_tokenizer(tmp_path / "a")
    assert ours.encode("hello hello") == [ours.id_of("hello"), ours.id_of("▁hello")]
    assert ours.decode(ours.encode(" hello")) == " hello"


# ---- ranks


def write_ranks(path, ranks, tokenizer_class):
    path.parent.mkdir(exist_ok=True)
    lines = [f"{base64.b64encode(token).decode()} {ranks[token]}\n"
             for token in sorted(ranks, key=ranks.get)]
    path.write_text("".join(lines))
    (path.parent / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": tokenizer_class, "auto_map": {}})
    )
    return load_tokenizer(path.parent)


def small_ranks():
    """A few hundred byte sequences in merge order, single bytes first."""
    core = Core(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(SENTENCES, trainer)
    ranks = in_bytes(core.get_vocab())
    # not reached by merging: tiktoken uses it for a complete word
    return {**ranks, b" zqx": len(ranks)}


def in_bytes(vocab):
    """{token in byte letters: id} -> {bytes: id}."""
    back = {letter: byte for byte, letter in bytes_to_unicode().items()}
    return {bytes(back[letter] for letter in token): i for token, i in vocab.items()}


QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GLM4 = QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
QWEN_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>",
               *(f"<|extra_{i}|>" for i in range(205))]
GLM4_TOKENS = ["<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>",
               "<|user|>", "<|assistant|>", "<|observation|>", "<|begin_of_image|>",
               "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"]


def tiktoken_reference(ranks, regex, tokens, form=None):
    """tiktoken itself, with the special tokens after the ranks; a function from text to ids."""
    tiktoken = pytest.importorskip("tiktoken")
    special = {token: len(ranks) + i for i, token in enumerate(tokens)}
    peer = tiktoken.Encoding("peer", pat_str=regex, mergeable_ranks=ranks, special_tokens=special)
    return lambda text: peer.encode(unicodedata.normalize(form, text) if form else text,
                                    allowed_special="all")


def test_the_patterns_equal_those_of_the_table():
    assert (VENDORS["qwen"].split_regex, VENDORS["chatglm4"].split_regex) == (QWEN, GLM4)


def test_qwen_1_on_a_small_vocabulary(tmp_path):
    ranks = small_ranks()
    ours = write_ranks(tmp_path / "a" / "qwen.tiktoken", ranks, "QWenTokenizer")
    check_page(ours, tiktoken_reference(ranks, QWEN, QWEN_TOKENS, "NFC"))
    assert (ours.eos_token, ours.pad_token, ours.bos_token) == (
        "<|endoftext|>", "<|endoftext|>", None
    )
    assert ours.vocab_size == len(ranks) + 208
    check_saved(ours, tmp_path / "b")
    # the file's name also identifies the vendor
    (tmp_path / "a" / "tokenizer_config.json").unlink()
    assert load_tokenizer(tmp_path / "a").encode(PAGE[-1]) == ours.encode(PAGE[-1])


def test_the_original_glm4_on_a_small_vocabulary(tmp_path):
    ranks = small_ranks()
    ours = write_ranks(tmp_path / "a" / "tokenizer.model", ranks, "ChatGLM4Tokenizer")
    check_page(ours, tiktoken_reference(ranks, GLM4, GLM4_TOKENS))
    assert [ours.id_of(token) for token in GLM4_TOKENS] == list(range(len(ranks), len(ranks) + 14))
    peer = check_saved(ours, tmp_path / "b")
    assert peer.encode("hi") == [ours.id_of("[gMASK]"), ours.id_of("<sop>"), *ours.encode("hi")]


@needs_shared
def test_qwen_1_and_glm4_on_the_real_ranks(tmp_path):
    """Qwen 2.5 kept the 151,643 ranks of Qwen 1."""
    known = load_tokenizer(SHARED / "tokenizers" / "qwen2.5")
    stored = json.loads(
        (SHARED / "tokenizers" / "qwen2.5" / "tokenizer.json").read_text(encoding="utf-8")
    )
    ranks = in_bytes(stored["model"]["vocab"])
    qwen = write_ranks(tmp_path / "a" / "qwen.tiktoken", ranks, "QWenTokenizer")
    check_page(qwen, known.encode, [text.replace("<|extra_7|>", "") for text in PAGE])
    assert (qwen.id_of("<|im_end|>"), qwen.id_of("<|extra_204|>"), qwen.vocab_size) == (
        151645, 151850, 151851
    )
    check_page(qwen, tiktoken_reference(ranks, QWEN, QWEN_TOKENS, "NFC"))
    qwen.save(tmp_path / "b")
    assert load_tokenizer(tmp_path / "b").encode_batch(PAGE) == qwen.encode_batch(PAGE)
    glm4 = write_ranks(tmp_path / "c" / "tokenizer.model", ranks, "ChatGLM4Tokenizer")
    check_page(glm4, tiktoken_reference(ranks, GLM4, GLM4_TOKENS))


# ---- XVERSE's tokenizer.json


def write_xverse(folder):
    """A tokenizer.json built as XVERSE's: the steps and the older field that newer versions of
    `tokenizers` refuse."""
    metaspace = {"type": "Metaspace", "replacement": "▁", "add_prefix_space": False}
    vocab = {token: i
             for i, token in enumerate(["<pad>", "<unk>", "<s>", *(text for text, _, _ in BYTES)])}
    for token in [*"▁helotr人2!:", *"he ll llo hello ▁hello th re ere there ▁there".split()]:
        vocab[token] = len(vocab)
    merges = ["t h", "h e", "l l", "ll o", "he llo", "▁ hello", "r e", "e re", "th ere", "▁ there"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True,
             "special": True}
    before = [{"type": "Punctuation", "behavior": "Isolated"},
              {"type": "Digits", "individual_digits": True}, metaspace]
    whole = {"version": "1.0", "normalizer": {"type": "NFC"},
             "added_tokens": [{"id": i, "content": token, **flags}
                              for i, token in enumerate(["<pad>", "<unk>", "<s>"])],
             "pre_tokenizer": {"type": "Sequence", "pretokenizers": before},
             "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, metaspace]},
             "model": {"type": "BPE", "unk_token": "<unk>", "byte_fallback": True, "vocab": vocab,
                       "merges": merges}}
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(whole, indent=2, ensure_ascii=False),
                                           encoding="utf-8")


def test_the_xverse_file_is_repaired_with_a_note(tmp_path, capsys):
    write_xverse(tmp_path / "a")
    with pytest.raises(Exception,
                       match="PyPreTokenizerTypeWrapper|add_prefix_space does not match"):
        Core.from_file(str(tmp_path / "a" / "tokenizer.json"))
    ours = load_tokenizer(tmp_path / "a")
    note = capsys.readouterr().out
    assert note.count("\n") == 1
    assert "prepend_scheme: never" in note
    assert str(tmp_path / "a" / "tokenizer.json") in note
    # what tokenizers 0.13.3 and 0.15.2 give, which read the file as it is
    expected = {"hello": ["hello"], "hello<s>hello": ["hello", "<s>", "hello"],
                "  hello  there": ["▁", "▁hello", "▁", "▁there"],
                "人: hello22!": ["人", ":", "▁hello", "2", "2", "!"]}
    assert ({text: [ours.core.id_to_token(i) for i in ours.encode(text)] for text in expected}
            == expected)
    assert ours.decode(ours.encode("  hello  there 你")) == "  hello  there 你"
    ours.save(tmp_path / "b")
    assert load_tokenizer(tmp_path / "b").encode(PAGE[-1]) == ours.encode(PAGE[-1])
    assert capsys.readouterr().out == ""


# ---- what is missing, damaged or not understood


def test_damaged_files_are_named(tmp_path):
    whole = write_model(tmp_path / "a", hello_pieces())
    model = tmp_path / "a" / "tokenizer.model"
    for damaged in (b"", b"x", whole[:1000], whole[:-1], b"\n\x00" + whole[:50],
                    b"<html>not found</html>"):
        model.write_bytes(damaged)
        with pytest.raises(
            ValueError, match=r"tokenizer.model: not a sentencepiece vocabulary .*fetch it again"
        ):
            load_tokenizer(tmp_path / "a")
    model.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 499723\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        load_tokenizer(tmp_path / "a")
    for damaged in ("IQ== 0\nIg=", "IQ== 0\nIg== x\n"):
        model.write_text(damaged)
        with pytest.raises(ValueError, match="tokenizer.model line 2: not 'base64 rank'"):
            load_tokenizer(tmp_path / "a")
    for damaged in ("IQ== 0\n", "IQ== 0\nIg== 2\n"):
        model.write_text(damaged)
        with pytest.raises(ValueError, match="without a gap"):
            load_tokenizer(tmp_path / "a")


@pytest.mark.parametrize("trainer, normalizer, what", [
    (((3, 3),), (), "word or character"), (((24, 1),), (), "treat_whitespace_as_suffix"),
    ((), ((5, 0),), "escape_whitespaces")])
def test_unsupported_vocabularies_are_refused(tmp_path, trainer, normalizer, what):
    write_model(tmp_path / "a", hello_pieces(), trainer, normalizer)
    with pytest.raises(ValueError, match=what):
        load_tokenizer(tmp_path / "a")


def test_unknown_rank_files_and_gaps_in_ids_are_errors(tmp_path):
    with pytest.raises(ValueError,
                       match="tokenizer_class in tokenizer_config.json.*chatglm4, qwen"):
        write_ranks(tmp_path / "a" / "other.tiktoken", small_ranks(), "OtherTokenizer")
    pieces = hello_pieces()
    write_model(tmp_path / "b", pieces)
    (tmp_path / "b" / "added_tokens.json").write_text(json.dumps({"<far>": len(pieces) + 5}))
    with pytest.raises(
        ValueError,
        match=f"'<far>' should have the id {len(pieces) + 5}, but would get {len(pieces)}",
    ):
        load_tokenizer(tmp_path / "b")
