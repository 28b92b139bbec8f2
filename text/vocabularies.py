"""Vocabularies other than tokenizer.json, converted to a tokenizers.Tokenizer with the same ids.

There are two kinds of file, told apart by their first bytes:

    sentencepiece   tokenizer.model, a protobuf message: pieces with scores, and how text is
                    normalized first (Llama 2, Baichuan, ChatGLM3, InternLM 2, Yi, Gemma)
    ranks           *.tiktoken, sometimes also named tokenizer.model: lines of "base64 rank", tokens
                    in merge order (Qwen 1, the first GLM-4)

Byte-pair encoding is the same in both: among all neighbors whose concatenation is in the
vocabulary, merge the pair whose concatenation comes first, and repeat. `tokenizers` wants the list
of pairs instead; `list_merges` computes it. What only a vendor's Python code says (special tokens
after the last id, the regex that splits words) is a row of VENDORS.

Requires: nothing.
Next: text/tokenizer.py, which calls load_vocabulary where a folder has no tokenizer.json.

Sources: SentencePiece arXiv:1808.06226, its sentencepiece_model.proto and normalizer.cc; tiktoken
(github.com/openai); BPE Sennrich et al. arXiv:1508.07909; unigram Kudo arXiv:1804.10959; the
tokenization_*.py files of the vendors' repositories.
"""
import base64
import json
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tokenizers import (AddedToken, Regex, Tokenizer as Core, decoders, models, normalizers,
                        pre_tokenizers, processors)

SPACE = "▁"  # U+2581: how sentencepiece writes a space
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = range(1, 6)  # kinds of pieces; 6 is a byte
UNIGRAM, BPE = 1, 2  # kinds of sentencepiece models
VARINT, FIXED_64, LENGTH_DELIMITED, FIXED_32 = 0, 1, 2, 5  # protobuf wire types
FIXED_SIZES = {FIXED_64: 8, FIXED_32: 4}  # in bytes

# role: (field number in TrainerSpec, default)
ROLE_FIELDS = {
    "unk_token": (45, "<unk>"),
    "bos_token": (46, "<s>"),
    "eos_token": (47, "</s>"),
    "pad_token": (48, "<pad>"),
}

# the fields of a token in added_tokens_decoder
TOKEN_FIELDS = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")

GIT_LFS = b"version https://git-lfs"
RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\s")

# ChatGLM's tokens that match only as words of their own: "philosophy" must stay in one piece
SINGLE_WORDS = ("sop", "eop")


def word_regex(digits: str) -> str:
    """The regex by which GPT-4 and its followers split words; `digits` quantifies \\p{N}."""
    return (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + digits
            + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


@dataclass(frozen=True)
class Vendor:
    """What a vendor's tokenizer class knows and its vocabulary file does not say."""

    extra_tokens: tuple = ()  # special tokens that take the ids after the file's last, in order
    split_regex: str = ""  # rank files only: splits a text into words, within which bytes merge
    nfc: bool = False  # rank files only: normalize text to Unicode's composed form first
    prefix_tokens: tuple = ()  # the tokens every text begins with, if not bos
    config: dict = field(default_factory=dict)  # defaults where tokenizer_config.json is silent


BEGINS_WITH_BOS = Vendor(config={"add_bos_token": True})
ENDS_TEXT = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
GLM_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")

# by tokenizer_class of tokenizer_config.json, in lower case, without "Tokenizer" and "Fast"
VENDORS = {
    "llama": BEGINS_WITH_BOS,
    "codellama": BEGINS_WITH_BOS,
    "gemma": BEGINS_WITH_BOS,
    "baichuan": BEGINS_WITH_BOS,
    "internlm": BEGINS_WITH_BOS,
    "internlm2": BEGINS_WITH_BOS,
    "yi": BEGINS_WITH_BOS,
    "chatglm": Vendor(
        extra_tokens=("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", *GLM_ROLES),
        prefix_tokens=("[gMASK]", "sop"),
        config={"pad_token": "<unk>"},
    ),
    "chatglm4": Vendor(
        extra_tokens=(
            "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", *GLM_ROLES,
            "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>",
        ),
        split_regex=word_regex(digits="{1,3}"),
        prefix_tokens=("[gMASK]", "<sop>"),
        config=ENDS_TEXT,
    ),
    "qwen": Vendor(
        extra_tokens=(
            "<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)),
        ),
        split_regex=word_regex(digits=""),
        nfc=True,
        config=ENDS_TEXT,
    ),
}

# file names that identify the vendor where tokenizer_config.json does not
VENDOR_OF_FILE = {"qwen.tiktoken": "qwen"}


class Piece(NamedTuple):
    """One vocabulary entry; its index in the list of pieces is its id."""

    text: str
    score: float
    kind: int  # NORMAL, UNKNOWN, ...


def find_vocabulary(folder: Path) -> Path | None:
    """The vocabulary file of a checkpoint folder that load_vocabulary can read, or None."""
    candidates = [folder / "tokenizer.model", *sorted(folder.glob("*.tiktoken"))]
    return next((path for path in candidates if path.is_file()), None)


def load_vocabulary(path: Path, config: dict, added: dict | None = None, special=()):
    """Read a sentencepiece or rank file.

    config:  tokenizer_config.json; its added_tokens_decoder {id: fields} names and flags tokens
    added:   added_tokens.json: {token: id}
    special: more tokens that are special; those missing from the vocabulary get the next ids

    Returns a tokenizers.Tokenizer and tokenizer_config.json with its gaps filled.
    Raises ValueError when the file is damaged, or needs something that `tokenizers` cannot do.
    """
    data = path.read_bytes()
    if data.startswith(GIT_LFS):
        raise ValueError(f"{path}: only a Git LFS pointer, not the file itself. "
                         "Fetch it with: git lfs pull")
    vendor = find_vendor(path, config)
    declared = declared_tokens(config, added or {})

    if RANK_LINE.match(data):
        vocab = read_ranks(data, path)
        core = build_from_ranks(vocab, vendor, path)
        pieces = [Piece(text, 0.0, NORMAL) for text in vocab]
        roles = {}
    else:
        model = read_sentencepiece(data, path)
        names = {i: fields["content"] for i, fields in declared.items()}
        model.pieces = rename_pieces(model.pieces, names, vendor)
        core = build_from_sentencepiece(model, config, path)
        pieces = model.pieces
        roles = model.roles

    defaults = {**roles, "clean_up_tokenization_spaces": False, **vendor.config}
    missing = {key: value for key, value in defaults.items() if config.get(key) is None}
    config = {**config, **missing}

    special = [*special, *(config[role] for role in ROLE_FIELDS if config.get(role))]
    add_tokens(core, collect_added_tokens(core, pieces, vendor, declared, special), path)
    set_post_processor(core, vendor, config)
    return core, config_to_save(core, config)


def find_vendor(path: Path, config: dict) -> Vendor:
    """The row of VENDORS for a vocabulary file, or an empty one."""
    kind = re.sub(r"tokenizer(fast)?$", "", (config.get("tokenizer_class") or "").lower())
    if kind not in VENDORS:
        kind = VENDOR_OF_FILE.get(path.name)
    return VENDORS.get(kind, Vendor())


def declared_tokens(config: dict, added: dict) -> dict:
    """The tokens of added_tokens_decoder and added_tokens.json as {id: fields}."""
    declared = {i: {"content": token} for token, i in added.items()}
    for i, fields in (config.get("added_tokens_decoder") or {}).items():
        declared[int(i)] = fields
    return declared


def config_to_save(core: Core, config: dict) -> dict:
    """tokenizer_config.json to write beside a tokenizer.json: it needs no code of the vendor."""
    tokens = core.get_added_tokens_decoder()
    decoder = {str(i): token_fields(tokens[i]) for i in sorted(tokens)}
    config = {**config, "added_tokens_decoder": decoder}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config.pop("auto_map", None)
    return config


# ---- both kinds ---------------------------------------------------------------------------------


def list_merges(pieces) -> list[tuple[str, str]]:
    """Every split of a piece into two other pieces, as (left, right); pieces are in merge order.

    With all splits of a piece side by side, the index of a pair says how early its concatenation
    is merged, which is the rule of sentencepiece and of tiktoken. One split per piece, as trainers
    write it, would miss some merges.
    """
    known = set(pieces)
    return [(piece[:i], piece[i:])
            for piece in pieces
            for i in range(1, len(piece))
            if piece[:i] in known and piece[i:] in known]


def collect_added_tokens(core: Core, pieces: list[Piece], vendor: Vendor, declared: dict, special):
    """The tokens that match as a whole, before anything is merged, as {id: AddedToken}.

    Special tokens (control pieces, the vendor's, declared ones) match in the raw text. User-defined
    pieces match in the normalized text, so that ▁▁ matches two spaces and no space is inserted
    after them; a piece that normalizing would change matches in the raw text.
    """
    tokens = {}
    for i, (text, _, kind) in enumerate(pieces):
        if kind == USER_DEFINED:
            normalized = core.normalizer.normalize_str(text) == text
            tokens[i] = make_token(text, special=False, normalized=normalized)
        elif kind in (UNKNOWN, CONTROL):
            tokens[i] = make_token(text)

    def next_id():
        return max([len(pieces) - 1, *tokens]) + 1

    for text in vendor.extra_tokens:
        tokens[next_id()] = make_token(text)

    for i, fields in sorted(declared.items()):
        # normalized: False as in the vendors' slow classes, whatever the file says
        fields = {"special": False, **fields, "normalized": False}
        user_defined = i < len(pieces) and pieces[i].kind == USER_DEFINED
        if fields["special"] or not user_defined:  # else it repeats the vocabulary file
            tokens[i] = make_token(**{key: fields[key] for key in TOKEN_FIELDS if key in fields})

    ids = {piece.text: i for i, piece in enumerate(pieces)}
    ids |= {token.content: i for i, token in tokens.items()}
    for text in map(token_text, special):
        i = ids.setdefault(text, next_id())
        if i not in tokens or not tokens[i].special:
            tokens[i] = make_token(text)
    return tokens


def add_tokens(core: Core, tokens: dict, path: Path):
    """Add {id: AddedToken} to a tokenizer. Raises ValueError where one would get another id."""
    size = core.get_vocab_size()
    core.add_tokens([tokens[i] for i in sorted(tokens)])
    for i, token in tokens.items():
        found = core.token_to_id(token.content)
        if found != i:
            raise ValueError(
                f"{path}: the added token {token.content!r} should have the id {i}, but would get "
                f"{found}: the file has {size} tokens, and added ones must follow without a gap. "
                "Look at added_tokens.json and at added_tokens_decoder in tokenizer_config.json")


def make_token(content: str, special=True, normalized=False, single_word=False,
               lstrip=False, rstrip=False) -> AddedToken:
    """An AddedToken; the documentation of `tokenizers` explains the flags."""
    return AddedToken(
        content,
        special=special,
        normalized=normalized,
        lstrip=lstrip,
        rstrip=rstrip,
        single_word=single_word or content in SINGLE_WORDS,
    )


def token_fields(token: AddedToken) -> dict:
    """An AddedToken as tokenizer_config.json writes it."""
    return {name: getattr(token, name) for name in TOKEN_FIELDS}


def token_text(token: str | dict | None) -> str | None:
    """The text of a token in tokenizer_config.json: the text itself, or a dict's `content`."""
    return (token.get("content") if isinstance(token, dict) else token) or None


def set_post_processor(core: Core, vendor: Vendor, config: dict):
    """Record the tokens that every text begins with.

    Other programs prepend them when they read the tokenizer.json we save; this one never does.
    """
    prefix = list(vendor.prefix_tokens)
    if not prefix and config.get("add_bos_token") and config.get("bos_token"):
        prefix = [token_text(config["bos_token"])]
    if prefix:
        ids = [(token, core.token_to_id(token)) for token in prefix]
        core.post_processor = processors.TemplateProcessing(
            single=[*prefix, "$A"], special_tokens=ids)


# ---- ranks --------------------------------------------------------------------------------------


def bytes_to_unicode() -> dict[int, str]:
    """GPT-2's table {byte: character}, with which byte-level vocabularies write bytes.

    Printable Latin-1 characters are unchanged; other bytes become letters from U+0100 on. The table
    is for str.translate.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable}
    table |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    return table


def read_ranks(data: bytes, path: Path) -> dict[str, int]:
    """The lines of a rank file as {token: rank}, lowest rank first; see bytes_to_unicode."""
    letters = bytes_to_unicode()
    vocab = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            encoded, rank = line.split()
            token = base64.b64decode(encoded, validate=True).decode("latin-1")
            vocab[token.translate(letters)] = int(rank)
        except ValueError as error:  # also binascii.Error
            raise ValueError(f"{path} line {number}: not 'base64 rank' ({error}). "
                             "The file may be truncated: fetch it again") from error

    vocab = dict(sorted(vocab.items(), key=lambda item: item[1]))
    consecutive = list(vocab.values()) == list(range(len(vocab)))
    if not consecutive or not set(letters.values()) <= vocab.keys():
        raise ValueError(f"{path}: the ranks must be 0, 1, 2, … without a gap, with every byte "
                         f"among the tokens; found {len(vocab)} tokens. "
                         "The file may be truncated: fetch it again")
    return vocab


def build_from_ranks(vocab: dict[str, int], vendor: Vendor, path: Path) -> Core:
    """The tokenizer of a rank file: split by the vendor's regex, then byte-level BPE."""
    if not vendor.split_regex:
        known = ", ".join(name for name, row in VENDORS.items() if row.split_regex)
        raise ValueError(f"{path}: a rank file, which does not say how a text is split into words. "
                         "The vendor is identified by tokenizer_class in tokenizer_config.json "
                         f"beside it; known for rank files: {known}")
    # ignore_merges: as in tiktoken, a word that is a token is that token, merges or not
    core = Core(models.BPE(vocab, list_merges(vocab), ignore_merges=True))
    if vendor.nfc:
        core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(vendor.split_regex), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    core.decoder = decoders.ByteLevel()
    return core


# ---- sentencepiece ------------------------------------------------------------------------------


@dataclass
class SentencePieceModel:
    """The content of a sentencepiece file that matters for encoding and decoding."""

    pieces: list[Piece]  # the index in the list is the id
    algorithm: int  # UNIGRAM or BPE
    byte_fallback: bool  # characters without a piece become their UTF-8 bytes, <0xE4> and so on
    roles: dict  # bos_token and so on, as far as the vocabulary has them
    charsmap: bytes  # compiled replacements of characters (NFKC and the like), b"" for none
    add_dummy_prefix: bool  # a space is put before a text
    remove_extra_whitespaces: bool  # spaces at both ends go, runs of spaces become one


def read_message(data: bytes) -> dict[int, list]:
    """Decode a protobuf message to {field number: [values]}: ints for varints, else bytes."""
    fields = {}
    position = 0
    while position < len(data):
        key, position = read_varint(data, position)
        wire_type = key & 7
        if wire_type == VARINT:
            value, position = read_varint(data, position)
        else:
            if wire_type == LENGTH_DELIMITED:
                size, position = read_varint(data, position)
            else:
                size = FIXED_SIZES[wire_type]
            value = data[position:position + size]
            position += size
        fields.setdefault(key >> 3, []).append(value)
    if position > len(data):
        raise IndexError("a field is longer than the rest of the file")
    return fields


def read_varint(data: bytes, position: int) -> tuple[int, int]:
    """Decode an integer in groups of seven bits, lowest first. Returns (value, end position)."""
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, position


def last_value(message: dict[int, list], number: int, default):
    """The value of a field of a protobuf message; of repeated ones the last counts."""
    return message.get(number, [default])[-1]


def read_piece(data: bytes) -> Piece:
    """Decode one vocabulary entry."""
    fields = read_message(data)
    score = struct.unpack("<f", fields[2][-1])[0] if 2 in fields else 0.0
    return Piece(fields[1][-1].decode("utf-8"), score, last_value(fields, 3, NORMAL))


def read_sentencepiece(data: bytes, path: Path) -> SentencePieceModel:
    """Decode a tokenizer.model; field numbers and defaults are from sentencepiece_model.proto."""
    try:
        message = read_message(data)
        pieces = [read_piece(piece) for piece in message[1]]
        trainer = read_message(last_value(message, 2, b""))
        normalizer = read_message(last_value(message, 3, b""))
        denormalizer = read_message(last_value(message, 5, b""))
        roles = read_roles(trainer, pieces)
    except (LookupError, struct.error, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: not a sentencepiece vocabulary ({type(error).__name__}: "
                         f"{error}). The file may be truncated: fetch it again") from error
    check_supported(trainer, normalizer, denormalizer, path)
    return SentencePieceModel(
        pieces=pieces,
        algorithm=last_value(trainer, 3, UNIGRAM),
        byte_fallback=bool(last_value(trainer, 35, 0)),
        roles=roles,
        charsmap=last_value(normalizer, 2, b""),
        add_dummy_prefix=bool(last_value(normalizer, 3, 1)),
        remove_extra_whitespaces=bool(last_value(normalizer, 4, 1)),
    )


def read_roles(trainer: dict, pieces: list[Piece]) -> dict[str, str]:
    """The special tokens {role: text} that TrainerSpec names and the vocabulary has."""
    special = {piece.text for piece in pieces if piece.kind in (UNKNOWN, CONTROL)}
    roles = {}
    for role, (number, default) in ROLE_FIELDS.items():
        text = last_value(trainer, number, default.encode()).decode()
        if text in special:
            roles[role] = text
    return roles


def check_supported(trainer: dict, normalizer: dict, denormalizer: dict, path: Path):
    """Raise ValueError for features of sentencepiece that no known model uses."""
    unsupported = {
        "of its kind (a word or character model)":
            last_value(trainer, 3, UNIGRAM) not in (UNIGRAM, BPE),
        "that puts spaces after words (treat_whitespace_as_suffix)": last_value(trainer, 24, 0),
        "that leaves spaces unescaped (escape_whitespaces off)": not last_value(normalizer, 5, 1),
        "with rules for decoding (denormalizer_spec)": last_value(denormalizer, 2, b""),
    }
    for feature, found in unsupported.items():
        if found:
            raise ValueError(f"{path}: a sentencepiece vocabulary {feature} is not supported; "
                             "no known model uses one")


def rename_pieces(pieces: list[Piece], names: dict[int, str], vendor: Vendor) -> list[Piece]:
    """Give pieces the checkpoint's names: InternLM 2 turns [UNUSED_TOKEN_145] into <|im_start|>.

    A piece that is spelled like one of the vendor's tokens (sop) loses its name: two ids cannot
    share one.
    """
    renamed = []
    for i, piece in enumerate(pieces):
        text = names.get(i, piece.text)
        if text in vendor.extra_tokens:
            renamed.append(Piece(f"<piece {i}>", piece.score, UNUSED))
        else:
            renamed.append(Piece(text, piece.score, piece.kind))
    return renamed


def build_from_sentencepiece(model: SentencePieceModel, config: dict, path: Path) -> Core:
    """The tokenizer of a sentencepiece file, without its added tokens."""
    unknown = next((i for i, piece in enumerate(model.pieces) if piece.kind == UNKNOWN), None)
    if unknown is None:
        raise ValueError(f"{path}: not a sentencepiece vocabulary (no piece of the kind "
                         "'unknown'): fetch it again")
    if model.algorithm == BPE:
        core = Core(bpe_model(model, unknown))
    else:
        core = Core(models.Unigram(unigram_scores(model.pieces), unknown, model.byte_fallback))

    prefix_space = model.add_dummy_prefix and config.get("add_prefix_space") is not False
    core.normalizer = sentencepiece_normalizer(model, prefix_space)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix_space:
        steps.append(decoders.Strip(" ", 1, 0))
    core.decoder = decoders.Sequence(steps)
    return core


def bpe_model(model: SentencePieceModel, unknown: int) -> models.BPE:
    """The BPE model of `tokenizers`; a higher score means an earlier merge."""
    normal = [piece for piece in model.pieces if piece.kind == NORMAL]
    normal.sort(key=lambda piece: -piece.score)
    return models.BPE(
        {piece.text: i for i, piece in enumerate(model.pieces)},
        list_merges([piece.text for piece in normal]),
        unk_token=model.pieces[unknown].text,
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
    )


def unigram_scores(pieces: list[Piece]) -> list[tuple[str, float]]:
    """Pieces of a unigram model, with scores at which only normal ones are ever chosen.

    `tokenizers` would read the letters <0x41> as one byte. With a score below that of its letters
    one by one (which every real vocabulary has) no best path takes such a piece; control and
    user-defined pieces are matched earlier, unused ones never.
    """
    lowest = min([piece.score for piece in pieces if piece.kind == NORMAL] + [0.0])
    return [(text, score if kind == NORMAL else len(text) * lowest - 1)
            for text, score, kind in pieces]


def sentencepiece_normalizer(model: SentencePieceModel, prefix_space: bool):
    """What sentencepiece does to a text before it looks for pieces (normalizer.cc).

    It runs on each span of text between two special tokens, and puts a space before each: as in
    Llama 2's published tokenizer.json (with legacy: false beside it), and in the vendors' slow
    classes, which pass each span to sentencepiece.

    Two limits: `tokenizers` applies a charsmap to grapheme clusters, so \\r\\n and decomposed
    Korean may differ; and a user-defined piece that is the whole text gets no space.
    """
    steps = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if prefix_space:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))

    user_defined = [piece.text for piece in model.pieces if piece.kind == USER_DEFINED]
    if prefix_space and user_defined:
        # `tokenizers` normalizes such a piece before it looks for it: alone, it must not change
        alternatives = "|".join(map(re.escape, user_defined))
        steps.append(normalizers.Replace(Regex(rf"\A{SPACE}(?=(?:{alternatives})\z)"), ""))
    return normalizers.Sequence(steps)


# ---- an older tokenizer.json --------------------------------------------------------------------


def repair_tokenizer_json(text: str) -> str | None:
    """A tokenizer.json that newer `tokenizers` refuse, made readable; None if that cannot be done.

    XVERSE's file sets add_prefix_space: false in its Metaspace steps. Since `tokenizers` 0.19 this
    is prepend_scheme: never, whose absence means always, and the contradiction is an error ("did
    not match any variant of untagged enum PyPreTokenizerTypeWrapper"). The versions that wrote the
    file obeyed the older field.
    """
    repaired = []

    def repair(fields):
        if fields.get("type") == "Metaspace" and fields.get("add_prefix_space") is False:
            repaired.append(fields)
            fields["prepend_scheme"] = "never"
        return fields

    try:
        content = json.loads(text, object_hook=repair)
    except ValueError:
        return None
    return json.dumps(content, ensure_ascii=False) if repaired else None
