"""serving/constrain.py: the automaton against Python's json, and answers that are held to it."""
import json
import random

import pytest
import torch

from serving.constrain import Constraint, State, TokenMasks, read_bytes
from tests.chats import write_byte_level
from tests.common import ROOT
from text.tokenizer import bytes_of_tokens, load_tokenizer

OBJECT = State("begin", ((b"{", b""),))


def is_object(text: bytes) -> bool:
    """Whether Python reads a text as a JSON object."""
    def refuse(word):
        raise ValueError(word)

    try:
        return isinstance(json.loads(text.decode("latin-1"), parse_constant=refuse), dict)
    except ValueError:
        return False


def accepts(text: bytes) -> bool:
    state = read_bytes(OBJECT, text)
    return state is not None and state.mode == "done"


DOCUMENTS = [json.dumps(value, indent=indent).encode() for indent in (None, 2) for value in (
    {}, {"a": []}, {"a": [1, -0.5, 2e9, 1.5e-07, True, False, None, "x", {"b": {}}, [[]]]},
    {"é\n\"\\": "\u2028\t/", "": 0, "k": {"l": [{"m": "n"}, {}]}})]


@pytest.mark.parametrize("number", range(len(DOCUMENTS)))
def test_the_automaton_accepts_what_json_does(number):
    """Documents, and the same with one byte changed, taken out, doubled or put in."""
    text = DOCUMENTS[number]
    assert accepts(text)
    for end in range(len(text)):
        state = read_bytes(OBJECT, text[:end])
        assert state is not None and state.mode != "done"
    draw = random.Random(number)
    for _ in range(1500):
        at = draw.randrange(len(text))
        byte = draw.choice(b'{}[]:,"\\ \n0123456789.eE+-truefalsn/ux\t\x01\xe9')
        changed = text[:at] + draw.choice([bytes([byte]), b"", text[at:at + 1] * 2,
                                           bytes([byte]) + text[at:at + 1]]) + text[at + 1:]
        if changed == changed.strip(b" \n\t\r"):        # an answer ends with its last bracket
            assert accepts(changed) == is_object(changed), changed


@pytest.mark.parametrize("text", [
    '{"a": 01}', '{"a": 1.}', '{"a": .5}', '{"a": +1}', '{"a": 1e}', '{"a": -}', '{"a": NaN}',
    '{"a": "\\x"}', '{"a": "\\u12g4"}', '{"a" 1}', '{"a": 1,}', '{,}', '{"a": [1,]}', "[]", '"a"',
    '{"a": 1]', '{"a": [1}}', "{}{}", '{"a": tru}', '{1: 2}', '{"a": "\n"}'])
def test_the_automaton_refuses_what_is_no_object(text):
    assert not accepts(text.encode())


def folders(tmp_path):
    return [ROOT / "models/tiny", write_byte_level(tmp_path / "a")]


@pytest.mark.parametrize("which", [0, 1])
def test_a_random_writer_writes_an_object_and_stops(tmp_path, which):
    tokenizer = load_tokenizer(folders(tmp_path)[which])
    tokenizer.add_tokens(["<|mark|>"])
    size = tokenizer.vocab_size + 3             # a model may have more rows than the tokenizer
    stop = tokenizer.eos_id
    masks = TokenMasks(tokenizer, size, [stop, size + 5], torch.device("cpu"))
    for seed in range(20):
        draw = random.Random(seed)
        constraint = Constraint(masks, [(b"{", b"")])
        answer = []
        while not answer or answer[-1] != stop:
            allowed = constraint.allowed(answer).nonzero().flatten().tolist()
            ending = [i for i in allowed if masks.bytes_of.get(i, b"}")[0] in b'"}]:0']
            answer.append(draw.choice(ending if len(answer) > 10 and ending else allowed))
            assert len(answer) < 2000
        assert isinstance(json.loads(tokenizer.decode(answer[:-1]), strict=False), dict)


@pytest.mark.parametrize("which", [0, 1])
def test_the_bytes_of_tokens_are_those_of_their_text(tmp_path, which):
    tokenizer = load_tokenizer(folders(tmp_path)[which])
    found = bytes_of_tokens(tokenizer)
    text = 'Where? "été" 你好 {"a": [1.5e3, null]}\n\tEnd'
    joined = b"".join(found[i] for i in tokenizer.encode(text))
    assert joined.decode().removeprefix(" ") == text


def test_a_beginning_is_chosen_and_its_ending_follows(tmp_path):
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "a"))
    tokenizer.add_tokens(["<call>"])            # special: allowed where the text has it
    masks = TokenMasks(tokenizer, tokenizer.vocab_size, [tokenizer.eos_id], torch.device("cpu"))
    ends = [(b'<call>{"name": "add", "x": {', b"}"), (b'<call>{"name": "now", "x": {', b"}!")]
    constraint = Constraint(masks, ends)
    answer = []
    for wanted in '{"name": "now", "x": {"a": 1}}!':
        if not answer:
            answer = [tokenizer.id_of("<call>")]
            assert constraint.allowed([])[answer].all()
        token = tokenizer.encode(wanted)[0]
        assert constraint.allowed(answer)[token]
        answer.append(token)
    assert constraint.allowed(answer).nonzero().flatten().tolist() == [tokenizer.eos_id]


def test_a_token_that_was_not_allowed_ends_the_answer(tmp_path):
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "a"))
    size, stop = tokenizer.vocab_size + 1, tokenizer.eos_id
    masks = TokenMasks(tokenizer, size, [stop], torch.device("cpu"))
    for wrong in (tokenizer.encode("x"), [size - 1, *tokenizer.encode("]")]):
        allowed = Constraint(masks, [(b"{", b"")]).allowed(wrong)
        assert allowed.nonzero().flatten().tolist() == [stop]
