"""chat.py: conversations against recorded prompts and the answers of transformers with peft."""
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch

import chat
from runtime import finished
from settings import load_config
from tests.common import GOLDEN, ROOT, needs_shared, read_jsonl, some
from text import load_text
from text import tokenizer
from text.tokenizer import load_tokenizer

pytestmark = needs_shared
CURVES = GOLDEN / "curves"
BASE, TRAINED, OTHER = (
    CURVES / "tiny_llama3",
    CURVES / "sft_llama3/final",
    CURVES / "sft_llama3/adapter_init",
)
GREEDY = [
    f"model_name_or_path={BASE}",
    "template=llama3",
    "use_cpu=true",
    "do_sample=false",
    "max_new_tokens=16",
    "flash_attn=disabled",
]
WITH_ADAPTER = [*GREEDY, f"adapter_name_or_path={TRAINED}"]


@pytest.fixture
def ask(monkeypatch, capsys):
    """ask(argv, lines) -> (stdout, stderr) of chat.py with these lines on its standard input."""

    def ask(argv, lines=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        chat.main([str(word) for word in argv])
        return capsys.readouterr()

    return ask


def start(argv, **pipes):
    """chat.py as a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "chat.py"), *map(str, argv)],
        env=environment,
        **{
            "stdin": subprocess.PIPE,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "encoding": "utf-8",
            **pipes,
        },
    )


def answers(stdout):
    """The answers in the output for piped lines."""
    return [part.partition("\nUser: ")[0] for part in stdout.split("Assistant: ")[1:]]


def transformers_answer(prompt_ids, *adapters, count=16):
    """transformers' greedy answer with adapters that peft attached one after the other; without
    special tokens."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    if transformers.__version__ < "5":
        pytest.skip("transformers before 5 passes over rope_parameters, and gets other logits")
    model = transformers.AutoModelForCausalLM.from_pretrained(BASE, torch_dtype=torch.float32)
    for adapter in adapters:
        model = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    model.generation_config = transformers.GenerationConfig()
    wanted = transformers.GenerationConfig(
        max_new_tokens=count, do_sample=False, eos_token_id=1005, pad_token_id=0
    )
    ids = torch.tensor([prompt_ids])
    new = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=wanted)[
        0, ids.shape[1] :
    ]
    return load_tokenizer(BASE).decode(new.tolist(), skip_special_tokens=True)


def recorded_prompt(row):
    """The prompt ids of a recorded row: the tokens without a label."""
    example = read_jsonl(CURVES / "sft_llama3/processed.jsonl")[row]
    return [i for i, label in zip(example["input_ids"], example["labels"]) if label == -100]


def llama3_prompt(*turns):
    """The published Llama 3 format by hand: user, assistant, user, … up to the beginning of the
    answer."""
    text = "<|begin_of_text|>"
    for i, turn in enumerate(turns):
        role = ("user", "assistant")[i % 2]
        text += f"<|start_header_id|>{role}<|end_header_id|>\n\n{turn}<|eot_id|>"
    return load_tokenizer(BASE).encode(text + "<|start_header_id|>assistant<|end_header_id|>\n\n")


# ---- conversations ----------------------------------------------------------------------------


def test_one_shot_prints_the_answer_and_nothing_else(tmp_path):
    """As a process: stdout is the answer of transformers + peft to the prompt that LLaMA-Factory
    recorded."""
    config = tmp_path / "c.yaml"
    pairs = [*WITH_ADAPTER, "default_system=Answer briefly."]
    config.write_text("\n".join(pair.replace("=", ": ", 1) for pair in pairs))
    done = start(["--config", config, "--prompt", "What is your name?"])
    out, err = done.communicate(timeout=60)
    assert done.returncode == 0, err
    assert out == transformers_answer(recorded_prompt(0), TRAINED) + "\n"
    for word in ("model", "adapter", "template", "sampling", "device", "dtype", "kernel"):
        assert len(re.findall(rf"^{word}   *\S", err, re.M)) == 1, word
    assert str(TRAINED) in err and "llama3" in err and "float32" in err and "User:" not in out + err


def test_a_turn_sees_earlier_turns_until_clear(ask):
    out, err = ask(
        [*WITH_ADAPTER, "--raw"], "hello\n\nAnd 你好?\nclear\nhello\nexit\nnever asked\n"
    )
    first, second, third = answers(out)
    assert first == third == transformers_answer(recorded_prompt(23), TRAINED)
    assert second == transformers_answer(llama3_prompt("hello", first, "And 你好?"), TRAINED)
    assert "never asked" not in out and out.startswith("User: hello\nAssistant: ")
    prompts = [json.loads(ids) for ids in re.findall(r"^ids +(.*)$", err, re.M)]
    assert prompts == [
        recorded_prompt(23),
        llama3_prompt("hello", first, "And 你好?"),
        recorded_prompt(23),
    ]
    kept = [int(n) for n in re.findall(r"tokens, (\d+) of them in the cache", err)]
    assert kept[0] == 0 and kept[1] > len(prompts[0]) and kept[2] == len(prompts[0])
    assert repr(load_tokenizer(BASE).decode(prompts[1])) in err


def test_an_answer_ends_at_the_stop_token(ask):
    out, err = ask([*WITH_ADAPTER, "--prompt", "hi"])  # this adapter answers with <|eot_id|> early
    assert out == transformers_answer(recorded_prompt(5), TRAINED) + "\n" and "truncated" not in err


def test_the_eos_of_the_checkpoint_also_stops_and_is_not_printed(ask, tmp_path):
    base = shutil.copytree(BASE, tmp_path / "base")
    whole = ask([*WITH_ADAPTER, f"model_name_or_path={base}", "--prompt", "hello"]).out
    ids = load_tokenizer(BASE).encode(whole.strip())
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [1001, ids[3]]}))
    out, err = ask([*WITH_ADAPTER, f"model_name_or_path={base}", "--prompt", "hello"])
    assert whole.startswith(out.strip()) and 0 < len(out) < len(whole) and "truncated" not in err
    assert load_tokenizer(BASE).decode([ids[3]]) not in out


def test_an_adapter_of_another_base_is_announced(ask):
    out, err = ask(
        [*GREEDY, f"adapter_name_or_path={CURVES / 'sft_qwen2_loraplus/final'}", "--prompt", "hi"]
    )
    assert (
        "trained on ../tiny_qwen2, not on" in err
        and "warning" not in ask([*WITH_ADAPTER, "--prompt", "hi"]).err
    )


def test_several_adapters(ask):
    out, err = ask([*GREEDY, f"adapter_name_or_path={OTHER},{TRAINED}", "--prompt", "hi"])
    assert (
        out == transformers_answer(recorded_prompt(5), OTHER, TRAINED) + "\n"
        and f"{OTHER} + {TRAINED}" in err
    )


def test_seed(ask):
    hot = [*WITH_ADAPTER, "do_sample=true", "temperature=2", "top_p=1", "--prompt", "hi"]
    one, same, other = (ask([*hot, seed]).out for seed in ("seed=1", "seed=1", "seed=2"))
    assert one == same != other


def test_temperature_zero_is_greedy(ask):
    out, err = ask([*WITH_ADAPTER, "do_sample=true", "temperature=0", "--prompt", "hi"])
    assert out == ask([*WITH_ADAPTER, "--prompt", "hi"]).out and "greedy" in err


@pytest.mark.parametrize(
    "skip, shown", [("true", "好 🌍!"), ("false", "好 🌍<|eom_id|>!<|eot_id|>")]
)
def test_no_partial_characters_and_special_tokens_on_request(ask, monkeypatch, skip, shown):
    """The tiny vocabulary splits 好 into three tokens and 🌍 into more; no printed piece may be a
    part of one."""
    ids = load_tokenizer(BASE).encode("好 🌍<|eom_id|>!<|eot_id|>")
    assert len(ids) > 8 and ids[-1] == 1005
    monkeypatch.setattr(chat, "generate", lambda *args, **kwargs: iter(ids))
    monkeypatch.setattr(tokenizer.TextStream, "push", spy := Spy(tokenizer.TextStream.push))
    monkeypatch.setattr(
        load_text, "fit_tokenizer", lambda *args: [1005]
    )  # so that an answer may contain <|eom_id|>
    out, _ = ask([*GREEDY, f"skip_special_tokens={skip}", "--prompt", "hi"])
    assert out == shown + "\n"
    assert "".join(spy.results) == shown and not any("\ufffd" in piece for piece in spy.results)


class Spy:
    """Records what a method returns."""

    def __init__(self, method):
        self.method, self.results = method, []

    def __get__(self, instance, owner):
        def call(*args):
            self.results.append(self.method(instance, *args))
            return self.results[-1]

        return call


def test_ctrl_c_stops_the_answer_and_not_the_program():
    """2000 greedy tokens take seconds; the signal arrives at the first.

    The answer to "hello" has that many; "hi" is answered in two.
    """
    talk = start([*WITH_ADAPTER, "max_new_tokens=2000"], stderr=subprocess.STDOUT)
    talk.stdin.write("hello\n")
    talk.stdin.flush()
    heard = ""
    while "Assistant: " not in heard[:-1]:
        letter = talk.stdout.read(1)
        assert letter, heard  # an empty read: the program has ended
        heard += letter
    talk.send_signal(signal.SIGINT)
    while "(stopped)" not in heard:
        letter = talk.stdout.read(1)
        assert letter, heard
        heard += letter
    rest, _ = talk.communicate("clear\nexit\n", timeout=60)
    assert talk.returncode == 0 and "(cleared)" in rest


def test_a_full_context_is_a_message_and_clear_helps(ask, tmp_path):
    base = shutil.copytree(BASE, tmp_path / "base")
    fields = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**fields, "max_position_embeddings": 24}))
    talk = [*GREEDY, f"model_name_or_path={base}"]
    out, err = ask([*talk, "--prompt", "hi"])
    assert "(the context of 24 tokens is full)" in err and out.strip()
    with pytest.raises(ValueError, match="not every line"):
        ask(talk, f"{'long ' * 30}\nclear\nhi\n")
    with pytest.raises(ValueError, match=r"reads at most 24 \(max_position_embeddings\)"):
        ask([*talk, "--prompt", "long " * 30])


def test_the_turn_after_a_failed_one_works(ask, capsys):
    with pytest.raises(ValueError, match="not every line"):
        ask([*WITH_ADAPTER], "word " * 2100 + "\nhi\n")
    out, err = capsys.readouterr()
    assert err.count("error: the prompt has") == 1 and answers(out)[1] == transformers_answer(
        recorded_prompt(5), TRAINED
    )


def test_max_length_applies_when_max_new_tokens_is_zero(ask):
    four = ["max_new_tokens=0", f"max_length={len(recorded_prompt(0)) + 4}"]
    out, err = ask(
        [*WITH_ADAPTER, *four, "default_system=Answer briefly.", "--prompt", "What is your name?"]
    )
    assert "truncated after 4 tokens: max_length" in err


# ---- which weights, which format, which settings ----------------------------------------------


def settings(*pairs):
    return load_config.load_config([f"model_name_or_path={BASE}", *map(str, pairs)], "chat")


def test_an_adapter_brings_those_that_were_merged_before_it(tmp_path, ask):
    output = shutil.copytree(TRAINED, tmp_path / "out")
    (output / "train_config.json").write_text(
        json.dumps({"adapter_name_or_path": [str(OTHER)], "create_new_adapter": True})
    )
    assert finished.find_weights(settings(f"output_dir={output}"))[1] == [OTHER, output]
    remarks = finished.find_weights(
        settings(f"output_dir={output}", f"adapter_name_or_path={OTHER}")
    )[2]
    assert f"adapter_name_or_path={OTHER},{output}" in remarks[1]
    together = ask([*GREEDY, f"adapter_name_or_path={OTHER},{output}", "prompt=hi"])
    assert (
        ask([*GREEDY, f"output_dir={output}", "prompt=hi"]).out == together.out
        and "warning" not in together.err
    )
    alone = ask([*GREEDY, f"adapter_name_or_path={output}", "prompt=hi"])
    assert f"warning   {output} was trained with {OTHER} merged into the base" in alone.err


def test_template_and_system_prompt_come_from_the_training(tmp_path, ask):
    adapter = shutil.copytree(TRAINED, tmp_path / "adapter")
    (adapter / "train_config.json").write_text(
        json.dumps({"template": "llama3", "default_system": "Answer briefly."})
    )
    untold = [pair for pair in GREEDY if not pair.startswith("template")] + [
        f"adapter_name_or_path={adapter}"
    ]
    out, err = ask([*untold, "--prompt", "What is your name?"])
    assert (
        out == transformers_answer(recorded_prompt(0), TRAINED) + "\n"
        and f"llama3 (stored in {adapter})" in err
    )
    with pytest.raises(
        ValueError, match=f"template: qwen, but {adapter} was trained with llama3.*force_template"
    ):
        ask([*untold, "template=qwen", "--prompt", "hi"])
    assert (
        "template  alpaca"
        in ask([*untold, "template=alpaca", "force_template=true", "--prompt", "hi"]).err
    )


def test_sampling_values_and_their_sources():
    published = {
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 20,
        "do_sample": True,
        "eos_token_id": 7,
    }
    values, words = chat.sampling_values(
        settings("temperature=0.3", "max_new_tokens=50"), published, "dir"
    )
    assert values == {
        "do_sample": True,
        "temperature": 0.3,
        "top_p": 0.9,
        "top_k": 20,
        "repetition_penalty": 1.0,
        "max_new_tokens": 50,
    }
    assert (
        "temperature 0.3, max_new_tokens 50 (config)" in words
        and "top_k 20 (generation_config.json)" in words
    )
    assert "repetition_penalty 1.0 (default)" in words
    values, _ = chat.sampling_values(settings(), {}, "dir")  # LLaMA-Factory's
    assert values == {
        "do_sample": True,
        "temperature": 0.95,
        "top_p": 0.7,
        "top_k": 50,
        "repetition_penalty": 1.0,
        "max_new_tokens": 1024,
    }
    with pytest.raises(
        ValueError, match="dir/generation_config.json: top_p: 'high' is not a number"
    ):
        chat.sampling_values(settings(), {"top_p": "high"}, "dir")


def test_bfloat16_answers(ask):
    out, err = ask([*WITH_ADAPTER, "infer_dtype=bfloat16", "--prompt", "hi"])
    assert out.strip() and "dtype     bfloat16" in err


# ---- what a user may get wrong ----


@pytest.mark.parametrize(
    "wrong, words",
    [
        (["template=llama33"], "unknown template 'llama33'.*llama3"),
        (["template=qwen"], r"uses '<\|im_\w+\|>', which this tokenizer lacks"),
        (
            ["template=qwen", "force_template=true"],
            r"ends answers with '<\|im_end\|>'.*no room for it \(1006 ids\)",
        ),
        ([f"adapter_name_or_path={BASE}"], "adapter_config.json is missing"),
        (["adapter_name_or_path=./no/such/folder"], "^adapter_name_or_path: .*folder does not"),
        ([f"adapter_name_or_path={GOLDEN / 'lora/qwen3_r8'}"], "another model, or another rank"),
        ([f"model_name_or_path={TRAINED}"], "is an adapter"),
        (["--prompt", " "], "--prompt is empty"),
        (["top_p=2"], "top_p.*at most 1"),
    ],
)
def test_mistakes_have_clear_messages(ask, wrong, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        ask([*GREEDY, *wrong], "hi\n")


def test_an_error_is_one_line_and_exit_code_1():
    done = start([*GREEDY, "template=qwen", "--prompt", "hi"])
    out, err = done.communicate(timeout=60)
    assert (done.returncode, out) == (1, "") and err.strip().splitlines()[-1].startswith(
        "error: template 'qwen'"
    )
    assert "Traceback" not in err


@pytest.mark.parametrize("locale", some(
    [{}, {"LC_ALL": "C.UTF-8"}, {"LC_ALL": "POSIX"}]))
def test_a_line_that_is_not_utf8_is_refused_and_the_next_one_answered(locale):
    """Also without a locale, where Python reads such bytes as surrogates."""
    environment = {key: value for key, value in os.environ.items()
                   if key not in ("LANG", "LC_ALL", "LC_CTYPE", "PYTHONIOENCODING", "PYTHONUTF8")}
    done = subprocess.run(
        [sys.executable, str(ROOT / "chat.py"), *map(str, WITH_ADAPTER), "raw=true"],
        capture_output=True,
        input=b"\xef\xbb\xbfWhat is 1 + 2?\ncaf\xe9 hello\nclear\nWhat is 1 + 2?\n",
        env={**environment, **locale, "OMP_NUM_THREADS": "1"}, timeout=60)
    assert done.returncode == 1 and b"Traceback" not in done.stderr
    assert b"error: this line is left out: it holds bytes that are not UTF-8" in done.stderr
    prompts = re.findall(rb"^ids +(.*)$", done.stderr, re.MULTILINE)
    assert len(prompts) == 2 and prompts[0] == prompts[1]       # the mark is no part of the text
