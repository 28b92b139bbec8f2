"""text/tokenizer.py against transformers on the same files; saving is lossless; no half characters.

Next: test_templates.py.
"""
import json
import random

import pytest
from tokenizers import Tokenizer as Core, decoders, models, normalizers

from tests.chats import write_byte_level
from tests.common import SHARED, needs_shared
from text.tokenizer import TextStream, load_tokenizer

TEXTS = ["Hello there", "  two  spaces ", "\n\nlines\n", "tab\there", "naïve café", "你好，世界",
         "🤗 emoji 👩‍👩‍👧 family", "a <|im_end|> b </s> c <|eot_id|>",
         "<think>\nhm\n</think>\n\nyes", "x" * 50, "ok\r\né", '{"a": [1, 2.5]}']
REAL = ["llama2", "llama3", "qwen2.5", "qwen3"]


def write_byte_fallback(folder):
    """A small tokenizer as sentencepiece makes them: spaces as ▁, bytes for unknown characters."""
    vocab = {"<unk>": 0, "▁": 1, "▁hello": 2, "▁there": 3,
             **{f"<0x{i:02X}>": i + 4 for i in range(256)}}
    core = Core(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                      decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    folder.mkdir(exist_ok=True)
    core.save(str(folder / "tokenizer.json"))
    return folder


def test_special_tokens_come_from_the_config_as_text_or_as_a_dict(tmp_path):
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "a"))
    assert (tokenizer.bos_token, tokenizer.bos_id) == ("<s>", 0)
    assert (tokenizer.eos_token, tokenizer.eos_id) == ("</s>", 1)
    assert tokenizer.pad_token is None and tokenizer.pad_id is None and tokenizer.unk_id is None
    assert tokenizer.id_of("no such token") is None


def test_special_tokens_map_counts_as_in_transformers(tmp_path):
    """It decides, unless tokenizer_config.json has an added_tokens_decoder; then it fills gaps."""
    older = {"pad_token": {"content": "</s>"}, "bos_token": "x"}
    for decoder, bos in (({}, "x"), ({"added_tokens_decoder": {}}, "<s>")):
        kind = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
        folder = write_byte_level(tmp_path / bos.strip("<>"), **kind, **decoder)
        (folder / "special_tokens_map.json").write_text(json.dumps(older))
        tokenizer = load_tokenizer(folder)
        assert (tokenizer.pad_token, tokenizer.bos_token) == ("</s>", bos)
        peer = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)
        assert (peer.bos_token, peer.bos_token_id) == (bos, tokenizer.bos_id)


def test_encode_adds_nothing_and_knows_special_tokens(tmp_path):
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "a"))
    ids = tokenizer.encode("hello</s> world")
    assert ids.count(1) == 1 and 0 not in ids
    assert tokenizer.decode(ids) == "hello</s> world"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello world"
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]


def test_stored_truncation_and_padding_are_switched_off(tmp_path):
    folder = write_byte_level(tmp_path / "a")
    core = Core.from_file(str(folder / "tokenizer.json"))
    core.enable_truncation(3)
    core.enable_padding(length=5)
    core.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder)
    assert len(tokenizer.encode("a b c d e f g")) > 5 and len(tokenizer.encode("h")) == 1


@needs_shared
@pytest.mark.parametrize("name", REAL)
def test_ids_equal_transformers(name):
    transformers = pytest.importorskip("transformers")
    peer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(SHARED / "tokenizers" / name / "tokenizer.json")
    )
    ours = load_tokenizer(SHARED / "tokenizers" / name)
    for text in TEXTS:
        assert ours.encode(text) == peer.encode(text, add_special_tokens=False), text


@needs_shared
@pytest.mark.parametrize("name", REAL)
def test_split_special_tokens_equals_transformers(name):
    transformers = pytest.importorskip("transformers")
    path = SHARED / "tokenizers" / name
    peer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(path / "tokenizer.json"), split_special_tokens=True
    )
    ours, whole = load_tokenizer(path, split_special_tokens=True), load_tokenizer(path)
    for text in TEXTS:
        assert ours.encode(text) == peer.encode(text, add_special_tokens=False), text
    assert ours.encode(f"a{ours.eos_token}b") != whole.encode(f"a{ours.eos_token}b")
    assert ours.split_at_special(f"a{ours.eos_token}b") == ["a", ours.eos_id, "b"]


# ---- saving


def test_saving_keeps_the_files(tmp_path):
    folder = write_byte_level(tmp_path / "a", chat_template="{{ messages }}",
                              tokenizer_class="PreTrainedTokenizerFast")
    load_tokenizer(folder).save(tmp_path / "b")
    assert ((tmp_path / "b" / "tokenizer.json").read_bytes()
            == (folder / "tokenizer.json").read_bytes())
    assert json.loads((tmp_path / "b" / "tokenizer_config.json").read_text()) \
        == json.loads((folder / "tokenizer_config.json").read_text())
    assert (tmp_path / "b" / "chat_template.jinja").read_text() == "{{ messages }}"
    load_tokenizer(tmp_path / "b").save(tmp_path / "b")  # onto itself


def test_added_tokens_and_new_roles_are_saved_and_transformers_reads_them(tmp_path):
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "a", added_tokens_decoder={}))
    size = tokenizer.vocab_size
    tokenizer.add_tokens(["<|end|>", "</s>"])
    tokenizer.set_token("eos_token", "<|end|>")
    tokenizer.set_token("pad_token", "<|end|>")
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (size + 1, size)
    tokenizer.save(tmp_path / "b")
    again = load_tokenizer(tmp_path / "b")
    assert again.encode("hello<|end|>") == tokenizer.encode("hello<|end|>") and again.eos_id == size
    transformers = pytest.importorskip("transformers")
    peer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "b")
    assert (peer.eos_token_id, peer.pad_token, len(peer)) == (size, "<|end|>", size + 1)
    assert (peer.encode("hello<|end|> there", add_special_tokens=False)
            == again.encode("hello<|end|> there"))


def test_the_chat_template_file_has_priority(tmp_path):
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    folder = write_byte_level(tmp_path / "a", chat_template=named)
    assert load_tokenizer(folder).chat_template == "D"
    (folder / "chat_template.jinja").write_text("J")
    assert load_tokenizer(folder).chat_template == "J"


# ---- what is missing or damaged


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "a").mkdir()
    with pytest.raises(FileNotFoundError, match="no tokenizer.json"):
        load_tokenizer(tmp_path / "a")
    (tmp_path / "a" / "vocab.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="vocab.json.*save_pretrained"):
        load_tokenizer(tmp_path / "a")
    folder = write_byte_level(tmp_path / "b")
    (folder / "tokenizer_config.json").write_text('{"bos_token": ')
    with pytest.raises(ValueError, match="tokenizer_config.json: not JSON"):
        load_tokenizer(folder)
    whole = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match="tokenizer.json: not a tokenizer"):
        load_tokenizer(folder)


# ---- streaming


def stream(tokenizer, ids, **options):
    """All pieces that TextStream returns for these ids."""
    text = TextStream(tokenizer, **options)
    return [text.push(i) for i in ids] + [text.flush()]


def check_stream(tokenizer, text):
    ids = tokenizer.encode(text)
    pieces = stream(tokenizer, ids, skip_special_tokens=False)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces), pieces


@pytest.mark.parametrize("write", [write_byte_level, write_byte_fallback])
def test_stream_never_shows_half_a_character(tmp_path, write):
    tokenizer = load_tokenizer(write(tmp_path / "a"))
    for text in TEXTS:
        check_stream(tokenizer, text)
    # long: decoding restarts in between
    check_stream(tokenizer, " hello there 你 hello 🤗好 there" * 40)


@needs_shared
@pytest.mark.parametrize("name", REAL)
def test_stream_on_real_vocabularies(name):
    tokenizer = load_tokenizer(SHARED / "tokenizers" / name)
    for text in [*TEXTS, "".join(TEXTS * 5)]:
        check_stream(tokenizer, text)


def test_stream_with_bytes_that_are_no_text(tmp_path):
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "a"))
    rng = random.Random(0)
    for _ in range(20):  # random tokens: mostly no UTF-8
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(60)]
        text = TextStream(tokenizer)
        held = 0
        for i in ids:
            held = 0 if text.push(i) or i < 2 else held + 1
            assert held < 5
    lead = tokenizer.encode("é")[0]
    assert "".join(stream(tokenizer, [lead])) == "\ufffd"  # the text ends within a character


def test_stream_leaves_special_tokens_out(tmp_path):
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "a"))
    assert "".join(stream(tokenizer, [0, *tokenizer.encode("hello"), 1])) == "hello"
