"""Vocabularies that are no tokenizer.json, made into the same tokenizers.Tokenizer: same ids as the vendor's own code.

Two kinds of file, told apart by their first bytes:

    sentencepiece   tokenizer.model, a protobuf: pieces with scores, and how text is normalised first
                    (Llama 2, Baichuan, ChatGLM3, InternLM 2, Yi, Gemma)
    ranks           *.tiktoken, or again tokenizer.model: lines of "base64 rank", the tokens in order of their merging
                    (Qwen 1, the first GLM-4)

Byte-pair encoding means the same in both: of all neighbours whose concatenation is in the vocabulary, join those whose
concatenation comes first, then look again. `tokenizers` asks for the pairs instead; all_cuts lists them.
What a vendor wrote into Python code and into no file (special tokens behind the last id, the regex that cuts words) is
a row of VENDORS.

Read before: text/tokenizer.py, which calls load_vocabulary where a folder has no tokenizer.json.
Sources: SentencePiece arXiv:1808.06226, its sentencepiece_model.proto and normalizer.cc; tiktoken (github.com/openai);
BPE Sennrich et al. arXiv:1508.07909; unigram Kudo arXiv:1804.10959; the tokenization_*.py of the vendors' repositories.
"""
import base64
import json
import re
import struct
from dataclasses import dataclass, field

from tokenizers import (AddedToken, Regex, Tokenizer, decoders, models, normalizers,
                        pre_tokenizers, processors)

SPACE = "▁"     # U+2581: how sentencepiece writes a space
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = range(1, 6)    # kinds of sentencepiece pieces; 6 are the bytes
UNIGRAM, BPE = 1, 2                                             # kinds of sentencepiece models
ROLE_FIELDS = {"unk_token": (45, "<unk>"), "bos_token": (46, "<s>"),     # their numbers in TrainerSpec, and defaults
               "eos_token": (47, "</s>"), "pad_token": (48, "<pad>")}
FLAGS = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")  # of a token in added_tokens_decoder
GIT_LFS = b"version https://git-lfs"

# how a text is cut into words; {} is how many digits stay together
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{}"
         r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
GLM_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
LONE_WORDS = ("sop", "eop")     # ChatGLM's tokens that are found only as words of their own: philosophy must stay whole


@dataclass(frozen=True)
class Vendor:
    """What a vendor's tokenizer class knows and its vocabulary file does not say."""
    tokens: tuple = ()  # special tokens that take the ids behind the file's last one, in this order
    split: str = ""  # ranks only: the regex that cuts a text into words, within which bytes are merged
    nfc: bool = False  # ranks only: the text is brought into Unicode's composed form first
    begins: tuple = ()  # the tokens every text begins with, if not bos
    config: dict = field(default_factory=dict)  # what holds where tokenizer_config.json is silent


BEGINS_WITH_BOS = Vendor(config={"add_bos_token": True})
ENDS_TEXT = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}

VENDORS = {     # tokenizer_class of tokenizer_config.json, in small letters and without "Tokenizer" and "Fast"
    "llama": BEGINS_WITH_BOS, "codellama": BEGINS_WITH_BOS, "gemma": BEGINS_WITH_BOS, "baichuan": BEGINS_WITH_BOS,
    "internlm": BEGINS_WITH_BOS, "internlm2": BEGINS_WITH_BOS, "yi": BEGINS_WITH_BOS,
    "chatglm": Vendor(("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", *GLM_ROLES), begins=("[gMASK]", "sop"),
                      config={"pad_token": "<unk>"}),
    "chatglm4": Vendor(("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", *GLM_ROLES,
                        "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
                       SPLIT.replace("{}", "{1,3}"), begins=("[gMASK]", "<sop>"), config=ENDS_TEXT),
    "qwen": Vendor(("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))),
                   SPLIT.replace("{}", ""), nfc=True, config=ENDS_TEXT),
}
FILE_NAMES = {"qwen.tiktoken": "qwen"}      # names that tell the vendor where tokenizer_config.json does not


def find_vocabulary(folder):
    """The vocabulary file of a checkpoint folder that load_vocabulary can read, or None."""
    candidates = [folder / "tokenizer.model", *sorted(folder.glob("*.tiktoken"))]
    return next((path for path in candidates if path.is_file()), None)


def load_vocabulary(path, config, added=None, special=()):
    """Read a sentencepiece or rank file. -> (tokenizers.Tokenizer, tokenizer_config.json with its gaps filled).

    config:  tokenizer_config.json; its added_tokens_decoder {id: fields} names and flags tokens
    added:   added_tokens.json: {token: id}
    special: more tokens that are special; those the vocabulary lacks get the next ids
    Raises ValueError when the file is damaged, or asks for something `tokenizers` cannot do.
    """
    data = path.read_bytes()
    kind = re.sub(r"tokenizer(fast)?$", "", (config.get("tokenizer_class") or "").lower())
    vendor = VENDORS.get(kind if kind in VENDORS else FILE_NAMES.get(path.name), Vendor())
    declared = {int(i): fields for i, fields in (config.get("added_tokens_decoder") or {}).items()}
    declared = {**{i: {"content": token} for token, i in (added or {}).items()}, **declared}
    if data.startswith(GIT_LFS):
        raise ValueError(f"{path}: only a pointer of Git LFS, not the file itself. Fetch it with: git lfs pull")
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\s", data):
        vocab = read_ranks(data, path)
        core, pieces, roles = from_ranks(vocab, vendor, path), [(text, 0.0, NORMAL) for text in vocab], {}
    else:
        model = read_sentencepiece(data, path)
        model.pieces = pieces = renamed(model.pieces, {i: fields["content"] for i, fields in declared.items()}, vendor)
        core, roles = from_sentencepiece(model, config, path), model.roles
    defaults = {**roles, "clean_up_tokenization_spaces": False, **vendor.config}
    config = {**config, **{key: value for key, value in defaults.items() if config.get(key) is None}}
    special = [*special, *(config[role] for role in ROLE_FIELDS if config.get(role))]
    add_tokens(core, added_tokens(core, pieces, vendor, declared, special), path)
    set_beginning(core, vendor, config)
    tokens = core.get_added_tokens_decoder()
    config["added_tokens_decoder"] = {str(i): fields_of(tokens[i]) for i in sorted(tokens)}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # saved with a tokenizer.json, it needs no vendor's code
    config.pop("auto_map", None)
    return core, config


# ------------------------------------------------------------------------------------------------- both kinds


def all_cuts(pieces):
    """Every way to cut a piece in two other pieces, as (left, right); pieces come in the order of their merging.

    With all cuts of a piece side by side, a pair's place in the list says how early its concatenation is merged, which
    is the rule of sentencepiece and of tiktoken; one cut per piece, as trainers write it, would lose some.
    """
    known = set(pieces)
    return [(piece[:i], piece[i:]) for piece in pieces for i in range(1, len(piece))
            if piece[:i] in known and piece[i:] in known]


def added_tokens(core, pieces, vendor, declared, special):
    """The tokens that are found in a text as a whole, before anything is merged. -> {id: AddedToken}.

    Special ones (control pieces, the vendor's, the declared) are looked for in the text as it is. User-defined pieces
    are looked for in the normalised text, so that ▁▁ finds two spaces and no space is put in behind them; but where
    normalising would change such a piece, in the text as it is.
    """
    tokens = {i: token_of(text, special=kind != USER_DEFINED, normalized=kind == USER_DEFINED and stays(core, text))
              for i, (text, _, kind) in enumerate(pieces) if kind in (UNKNOWN, CONTROL, USER_DEFINED)}

    def next_id():
        return max([len(pieces) - 1, *tokens]) + 1

    for text in vendor.tokens:
        tokens[next_id()] = token_of(text)
    for i, fields in sorted(declared.items()):
        fields = {"special": False, **fields, "normalized": False}  # as the vendors' slow classes, whatever it says
        if fields["special"] or i >= len(pieces) or pieces[i][2] != USER_DEFINED:  # else it says no more than the file
            tokens[i] = token_of(**{key: fields[key] for key in FLAGS if key in fields})
    ids = {text: i for i, (text, _, _) in enumerate(pieces)} | {token.content: i for i, token in tokens.items()}
    for text in map(content_of, special):
        i = ids.setdefault(text, next_id())
        if i not in tokens or not tokens[i].special:
            tokens[i] = token_of(text)
    return tokens


def add_tokens(core, tokens, path):
    """Tell the tokenizer of these tokens. Raises ValueError where one would not get its id."""
    size = core.get_vocab_size()
    core.add_tokens([tokens[i] for i in sorted(tokens)])
    for i, token in tokens.items():
        if core.token_to_id(token.content) != i:
            raise ValueError(f"{path}: the added token {token.content!r} should have the id {i}, but would get "
                             f"{core.token_to_id(token.content)}: the file has {size} tokens, and added ones must "
                             "follow without a gap. Look at added_tokens.json and at added_tokens_decoder in "
                             "tokenizer_config.json")


def token_of(content, special=True, normalized=False, single_word=False, lstrip=False, rstrip=False):
    """An AddedToken; the flags say how it is found, see the documentation of `tokenizers`."""
    return AddedToken(content, special=special, normalized=normalized, lstrip=lstrip, rstrip=rstrip,
                      single_word=single_word or content in LONE_WORDS)


def fields_of(token):
    """An AddedToken as tokenizer_config.json writes it."""
    return {flag: getattr(token, flag) for flag in FLAGS}


def content_of(token):
    """A token is written as its text or as a dict with the text under `content`."""
    return token["content"] if isinstance(token, dict) else token


def stays(core, text):
    """Does the text come out of normalising unchanged?"""
    return core.normalizer.normalize_str(text) == text


def set_beginning(core, vendor, config):
    """Other programs put these tokens before a text when they read the tokenizer.json we write. We never ask for it."""
    bos = [content_of(config["bos_token"])] if config.get("add_bos_token") and config.get("bos_token") else []
    begins = [*vendor.begins] or bos
    if begins:
        ids = [(token, core.token_to_id(token)) for token in begins]
        core.post_processor = processors.TemplateProcessing(single=[*begins, "$A"], special_tokens=ids)


# ------------------------------------------------------------------------------------------------------ ranks


def byte_letters():
    """How byte-level vocabularies write each byte: printable Latin-1 as itself, the others as letters from U+0100 on.

    -> {byte: character}, for str.translate. (GPT-2's table.)
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return {**{byte: chr(byte) for byte in printable}, **{byte: chr(256 + i) for i, byte in enumerate(others)}}


def read_ranks(data, path):
    """The lines of a rank file. -> {token in byte letters: rank}, lowest rank first."""
    letters, vocab = byte_letters(), {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            vocab[base64.b64decode(token, validate=True).decode("latin-1").translate(letters)] = int(rank)
        except ValueError as error:  # binascii.Error is one too
            raise ValueError(f"{path} line {number}: not 'base64 rank' ({error}). The file may be cut short: "
                             "fetch it again") from error
    vocab = dict(sorted(vocab.items(), key=lambda item: item[1]))
    if list(vocab.values()) != list(range(len(vocab))) or not set(letters.values()) <= vocab.keys():
        raise ValueError(f"{path}: the ranks must be 0, 1, 2, … without a gap, with every byte among the tokens; found "
                         f"{len(vocab)} tokens. The file may be cut short: fetch it again")
    return vocab


def from_ranks(vocab, vendor, path):
    """The tokenizer of a rank file: cut by the vendor's regex, then byte-level BPE."""
    if not vendor.split:
        known = ", ".join(name for name, row in VENDORS.items() if row.split)
        raise ValueError(f"{path}: a rank file, and those do not say how a text is cut into words. The vendor is told "
                         f"by tokenizer_class in tokenizer_config.json beside it; known for rank files: {known}")
    # ignore_merges: like tiktoken, a word that is a token is taken as it stands
    core = Tokenizer(models.BPE(vocab, all_cuts(vocab), ignore_merges=True))
    if vendor.nfc:
        core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(vendor.split), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    core.decoder = decoders.ByteLevel()
    return core


# ---------------------------------------------------------------------------------------------- sentencepiece


@dataclass
class Sentencepiece:
    """What a sentencepiece file says, as far as it matters when text is encoded and decoded."""
    pieces: list  # (text, score, kind), the place in the list is the id
    algorithm: int  # UNIGRAM or BPE
    byte_fallback: bool  # characters without a piece become their UTF-8 bytes, <0xE4> and so on
    roles: dict  # bos_token and so on, those there are
    charsmap: bytes  # compiled replacements of characters (NFKC and the like), b"" for none
    add_dummy_prefix: bool  # a text gets a space in front
    remove_extra_whitespaces: bool  # spaces at both ends go, runs of spaces become one


def read_message(data):
    """A protobuf message. -> {field number: [values]}, ints where it holds varints, else the bytes of the value."""
    found, at = {}, 0
    while at < len(data):
        key, at = read_varint(data, at)
        if key & 7 == 0:
            value, at = read_varint(data, at)
        else:
            size, at = read_varint(data, at) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], at)
            value, at = data[at:at + size], at + size
        found.setdefault(key >> 3, []).append(value)
    if at > len(data):
        raise IndexError("a field is longer than the rest of the file")
    return found


def read_varint(data, at):
    """An integer in groups of seven bits, lowest first. -> (value, where it ends)."""
    value = shift = 0
    while True:
        byte = data[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at


def read_piece(data):
    """One vocabulary entry. -> (text, score, kind)."""
    fields = read_message(data)
    score = struct.unpack("<f", fields[2][-1])[0] if 2 in fields else 0.0
    return fields[1][-1].decode("utf-8"), score, fields.get(3, [NORMAL])[-1]


def read_sentencepiece(data, path):
    """A tokenizer.model in protobuf form; field numbers and defaults are those of sentencepiece_model.proto."""
    try:
        whole = read_message(data)
        pieces = [read_piece(piece) for piece in whole[1]]
        trainer, normalizer, denormalizer = (read_message(whole.get(i, [b""])[-1]) for i in (2, 3, 5))
        texts = {text for text, _, kind in pieces if kind in (UNKNOWN, CONTROL)}
        roles = {role: trainer.get(i, [default.encode()])[-1].decode() for role, (i, default) in ROLE_FIELDS.items()}
    except (LookupError, struct.error, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: not a sentencepiece vocabulary ({type(error).__name__}: {error}). The file may be "
                         "cut short: fetch it again") from error
    model = Sentencepiece(
        pieces, algorithm=trainer.get(3, [UNIGRAM])[-1], byte_fallback=bool(trainer.get(35, [0])[-1]),
        roles={role: text for role, text in roles.items() if text in texts}, charsmap=normalizer.get(2, [b""])[-1],
        add_dummy_prefix=bool(normalizer.get(3, [1])[-1]), remove_extra_whitespaces=bool(normalizer.get(4, [1])[-1]))
    refused = {"of its kind (a word or character model)": model.algorithm not in (UNIGRAM, BPE),
               "that puts spaces behind words (treat_whitespace_as_suffix)": trainer.get(24, [0])[-1],
               "that leaves spaces as they are (escape_whitespaces off)": not normalizer.get(5, [1])[-1],
               "with rules for decoding (denormalizer_spec)": denormalizer.get(2, [b""])[-1]}
    for what, found in refused.items():
        if found:
            raise ValueError(f"{path}: a sentencepiece vocabulary {what} cannot be read; no known model uses one")
    return model


def renamed(pieces, names, vendor):
    """Pieces under the names the checkpoint gives them: InternLM 2 turns [UNUSED_TOKEN_145] into <|im_start|>.

    A piece that is spelled like a token of the vendor's (sop) gives up its name: two ids cannot share one.
    """
    pieces = [(names.get(i, text), score, kind) for i, (text, score, kind) in enumerate(pieces)]
    return [(f"<piece {i}>", score, UNUSED) if text in vendor.tokens else (text, score, kind)
            for i, (text, score, kind) in enumerate(pieces)]


def from_sentencepiece(model, config, path):
    """The tokenizer of a sentencepiece file, without its added tokens."""
    unknown = next((i for i, (_, _, kind) in enumerate(model.pieces) if kind == UNKNOWN), None)
    if unknown is None:
        raise ValueError(f"{path}: not a sentencepiece vocabulary (no piece of the kind 'unknown'): fetch it again")
    if model.algorithm == BPE:
        earliest_first = sorted((piece for piece in model.pieces if piece[2] == NORMAL), key=lambda piece: -piece[1])
        core = Tokenizer(models.BPE(
            {text: i for i, (text, _, _) in enumerate(model.pieces)}, all_cuts([text for text, _, _ in earliest_first]),
            unk_token=model.pieces[unknown][0], fuse_unk=True, byte_fallback=model.byte_fallback))
    else:
        core = Tokenizer(models.Unigram(priced(model.pieces), unknown, model.byte_fallback))
    prefix = model.add_dummy_prefix and config.get("add_prefix_space") is not False
    core.normalizer = sentencepiece_normalizer(model, prefix)
    core.decoder = decoders.Sequence([
        decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(),
        *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    return core


def priced(pieces):
    """Pieces of a unigram model with scores at which only normal ones are ever chosen. -> [(text, score)].

    `tokenizers` would read the letters <0x41> as one byte. At more than the price of its letters one by one (and every
    real vocabulary has these) no path through the text takes it; the other kinds are found before, or never.
    """
    lowest = min([score for _, score, kind in pieces if kind == NORMAL] + [0.0])
    return [(text, score if kind == NORMAL else len(text) * lowest - 1) for text, score, kind in pieces]


def sentencepiece_normalizer(model, prefix):
    """What sentencepiece does to a text before it looks for pieces (normalizer.cc).

    It acts on each stretch between two special tokens, and so each gets its space in front: as in Llama 2's published
    tokenizer.json (which says legacy: false beside it), and as the vendors' slow classes, which hand each stretch to
    sentencepiece. Two limits: a charsmap is applied by `tokenizers` to what a reader sees as one character, so \\r\\n
    and loose Korean letters may come out differently; and a user-defined piece that is the whole text gets no space.
    """
    steps = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if prefix:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    own = [text for text, _, kind in model.pieces if kind == USER_DEFINED]
    if prefix and own:  # `tokenizers` normalises such a piece before it looks for it: alone, it must stay as it is
        alternatives = "|".join(re.escape(text) for text in own)
        steps.append(normalizers.Replace(Regex(rf"\A{SPACE}(?=(?:{alternatives})\z)"), ""))
    return normalizers.Sequence(steps)


# ------------------------------------------------------------------------------------- an older tokenizer.json


def mend(text):
    """A tokenizer.json that newer `tokenizers` refuse, made readable. -> its text, or None if nothing can be mended.

    XVERSE's says add_prefix_space: false of its Metaspace steps. Since 0.19 that must be said as prepend_scheme: never,
    whose absence means always, and the contradiction is an error ("did not match any variant of untagged enum
    PyPreTokenizerTypeWrapper"). The older field was obeyed by the versions that wrote it.
    """
    steps = []

    def look(fields):
        if fields.get("type") == "Metaspace" and fields.get("add_prefix_space") is False:
            steps.append(fields)
            fields["prepend_scheme"] = "never"
        return fields

    try:
        whole = json.loads(text, object_hook=look)
    except ValueError:
        return None
    return json.dumps(whole, ensure_ascii=False) if steps else None
