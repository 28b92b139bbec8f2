"""Constrained decoding to JSON: at each step only tokens that keep the answer valid are sampled.

    masks = TokenMasks(tokenizer, vocab_size, stop_ids, device)
    row.constraint = Constraint(masks, [(b"{", b"")])           # one JSON object
    row.constraint.allowed(row.answer)                          # (V,) bool

A pushdown automaton reads bytes: one of the given beginnings, which ends in `{`, the rest of that
JSON object, and the ending that belongs to the beginning. A token is allowed if the automaton
accepts all its bytes. With a beginning such as `<tool_call>\\n{"name": "f", "arguments": {` the
answer is a tool call. Schemas are not supported: an object may have any keys and values.

Requires: text/tokenizer.py.
Next: serving/service.py.
Sources: RFC 8259 (JSON); masks cached for each state of the automaton: Willard & Louf,
arXiv:2307.09702.
"""
import re
from collections import defaultdict
from typing import NamedTuple

import torch

from text.tokenizer import Tokenizer, bytes_of_tokens

JSON_OBJECT = [(b"{", b"")]
MOST_MASKS = 256        # in the cache; each has V bytes
MOST_SPACES = 2         # tokens of white space in a row
STRINGS = ("string", "key string")
OPENS = {ord("{"): "first key", ord("["): "first value"}
CLOSES = {ord("}"): b"{", ord("]"): b"["}
NUMBER_ENDS = ("zero", "digits", "fraction", "exponent")    # modes in which a number may end
MAY_CLOSE = {ord("}"): ("first key", "ended", *NUMBER_ENDS),
             ord("]"): ("first value", "ended", *NUMBER_ENDS)}


# ---- the automaton ------------------------------------------------------------------------------


def transitions() -> dict[str, dict[int, str]]:
    """{mode: {byte: next mode}} of JSON, except for brackets, which need the stack."""
    table = defaultdict(dict)

    def add(modes: str, characters: str, to: str):
        for mode in modes.split(", "):
            table[mode] |= dict.fromkeys(characters.encode(), to)

    for kind, after in (("", "ended"), ("key ", "colon")):      # strings, \u and 4 digits
        table[f"{kind}string"] = dict.fromkeys(range(0x20, 256), f"{kind}string")
        add(f"{kind}string", '"', after)
        add(f"{kind}string", "\\", f"{kind}escape")
        add(f"{kind}escape", '"\\/bfnrt', f"{kind}string")
        for mode, to in ("escape", "hex4"), ("hex4", "hex3"), ("hex3", "hex2"), ("hex2", "hex1"), (
                "hex1", "string"):
            characters = "u" if mode == "escape" else "0123456789abcdefABCDEF"
            add(kind + mode, characters, kind + to)
    add("value, first value", '"', "string")
    add("key, first key", '"', "key string")
    add("value, first value", "-", "minus")                     # numbers
    add("value, first value, minus", "0", "zero")
    add("value, first value, minus, digits", "123456789", "digits")
    add("digits", "0", "digits")
    add("zero, digits", ".", "point")
    add("point, fraction", "0123456789", "fraction")
    add("zero, digits, fraction", "eE", "power")
    add("power", "+-", "sign")
    add("power, sign, exponent", "0123456789", "exponent")
    for word in ("true", "false", "null"):                      # modes: the letters that follow
        add("value, first value", word[0], word[1:])
        for i in range(1, len(word)):
            add(word[i:], word[i], word[i + 1:] or "ended")
    add("colon", ":", "value")
    add("ended", ",", "comma")
    for mode in ("value", "first value", "key", "first key", "colon", "ended"):
        add(mode, " \t\n\r", mode)
    for mode in NUMBER_ENDS:
        table[mode] = table["ended"] | table[mode]
    return dict(table)


TABLE = transitions()


class State(NamedTuple):
    """State of the automaton before the next byte.

    mode: a key of TABLE, begin, ending or done. ends: the pairs of beginning and ending that are
    still possible; a single pair once the beginning is complete. rest: the bytes read of the
    beginning, or the bytes left of the ending. stack: the open brackets.
    """
    mode: str
    ends: tuple[tuple[bytes, bytes], ...]
    rest: bytes = b""
    stack: bytes = b""


def advance(state: State, byte: int) -> State | None:
    """The state after a byte; None if the byte is not allowed."""
    mode = state.mode
    if mode == "begin":
        return advance_beginning(state, byte)
    if mode == "ending":
        rest = state.rest[1:]
        fits = state.rest[0] == byte
        return state._replace(mode="ending" if rest else "done", rest=rest) if fits else None
    if byte in OPENS and mode in ("value", "first value"):
        return state._replace(mode=OPENS[byte], stack=state.stack + bytes([byte]))
    if byte in CLOSES and mode in MAY_CLOSE[byte] and state.stack.endswith(CLOSES[byte]):
        rest = b"" if state.stack[1:] else state.ends[0][1]
        mode = "ended" if state.stack[1:] else "ending" if rest else "done"
        return state._replace(mode=mode, rest=rest, stack=state.stack[:-1])
    to = TABLE.get(mode, {}).get(byte)
    if to == "comma":
        to = "key" if state.stack.endswith(b"{") else "value"
    return state._replace(mode=to) if to else None


def advance_beginning(state: State, byte: int) -> State | None:
    """A byte of one of the beginnings."""
    rest = state.rest + bytes([byte])
    ends = tuple(pair for pair in state.ends if pair[0].startswith(rest))
    if not ends:
        return None
    if ends[0][0] == rest:
        return State("first key", ends[:1], stack=b"{")
    return state._replace(ends=ends, rest=rest)


def read_bytes(state: State | None, text: bytes) -> State | None:
    """The state after some bytes; None if they are not allowed."""
    for byte in text:
        if state is None:
            return None
        state = advance(state, byte)
    return state


# ---- tokens -------------------------------------------------------------------------------------


class TokenMasks:
    """Which tokens may follow in each state of the automaton."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids, device):
        self.size = vocab_size
        self.device = device
        self.stop_ids = [i for i in stop_ids if i < vocab_size]
        added = tokenizer.core.get_added_tokens_decoder()
        self.bytes_of = {i: text for i, text in bytes_of_tokens(tokenizer).items()
                         if text and i < vocab_size and i not in self.stop_ids}
        self.special = {i for i, token in added.items() if token.special}
        self.by_start = defaultdict(list)           # two bytes exclude most tokens
        for i, text in self.bytes_of.items():
            self.by_start[text[:2]].append(i)
        # Inside a string only the bytes from a token's first quote, escape or control character on
        # matter; a token without any is always allowed.
        self.plain = []
        self.tails = defaultdict(list)
        for i in self.bytes_of.keys() - self.special:
            if found := re.search(rb'["\\\x00-\x1f]', self.bytes_of[i]):
                self.tails[self.bytes_of[i][found.start():]].append(i)
            else:
                self.plain.append(i)
        self.visible = torch.ones(vocab_size, dtype=torch.bool, device=device)
        self.visible[[i for i, text in self.bytes_of.items() if not text.strip()]] = False
        self.masks = {}

    def mask(self, state: State) -> torch.Tensor:
        """(V,) bool: the tokens that the state allows."""
        if state not in self.masks:
            if len(self.masks) >= MOST_MASKS:
                self.masks.clear()
            mask = torch.zeros(self.size, dtype=torch.bool)
            # if no token has the required byte, the answer ends
            mask[self.allowed(state) or self.stop_ids] = True
            self.masks[state] = mask.to(self.device)
        return self.masks[state]

    def allowed(self, state: State) -> list[int]:
        """The ids that the state allows. Special tokens occur only in beginnings and endings."""
        if state.mode == "done":
            return self.stop_ids
        if state.mode in STRINGS:
            return self.plain + [i for tail, ids in self.tails.items() if read_bytes(state, tail)
                                 for i in ids]
        tried = [i for start, ids in self.by_start.items() if read_bytes(state, start)
                 for i in ids]
        if state.mode not in ("begin", "ending"):
            tried = [i for i in tried if i not in self.special]
        return [i for i in tried if read_bytes(state, self.bytes_of[i])]


class Constraint:
    """The constraint of one answer: a beginning (its last byte is `{`), an object, the ending.

    The answer may start with a space, as sentencepiece texts do. Outside of strings at most
    MOST_SPACES tokens of white space are allowed in a row, since a weak model may write nothing
    else.
    """

    def __init__(self, masks: TokenMasks, ends: list[tuple[bytes, bytes]]):
        self.masks = masks
        spaced = [(b" " + begin, end) for begin, end in ends]
        self.state = State("begin", (*ends, *spaced))
        self.read = 0           # tokens of the answer read so far
        self.spaces = 0         # tokens of white space at its end

    def allowed(self, answer: list[int]) -> torch.Tensor:
        """(V,) bool: the tokens that may follow. answer: all tokens so far, more at each call."""
        for token in answer[self.read:]:
            text = self.masks.bytes_of.get(token, b"")
            # with scores that are not finite any token can be sampled: then the answer ends
            self.state = read_bytes(self.state, text) or State("done", ())
            self.spaces = 0 if text.strip() else self.spaces + 1
        self.read = len(answer)
        mask = self.masks.mask(self.state)
        if self.spaces >= MOST_SPACES and self.state.mode not in STRINGS:
            mask = mask & self.masks.visible
        return mask
