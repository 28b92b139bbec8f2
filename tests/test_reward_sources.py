"""runtime/reward_sources.py and methods/reward_model.py: an adapter, a second model, a server.

The scores are those that stage rm trains: an independent computation is at the top of each test.
"""
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from checkpoint.adapters import load_with_adapters
from checkpoint.load import load_model
from lora import LoRAConfig, attach_lora, lora_layers, trainable
from methods.rollouts import after_stop
from runtime.reward_sources import build_reward_model, reward_model_bytes
from tests.common import ROOT, load_argv, read_jsonl
from tests.rollout_runs import history, steps
from tests.test_grpo import SMALL as GRPO
from tests.test_ppo import reward_adapter, run, settings     # noqa: F401
from text.load_text import load_text

TINY = ROOT / "models/tiny"
SEQUENCES = [[1, 514, 296, 2], [1, 37], [1, 1251, 285, 577, 342, 719, 285, 319, 33, 2, 201]]


def config_of(*argv):
    return load_argv(f"model_name_or_path={TINY}", "template=chatml", "stage=ppo", *argv)


def judge_of(*argv, adapters=()):
    """The reward model of a config, beside models/tiny."""
    config = config_of(*argv)
    base = SimpleNamespace(folder=TINY, name=str(TINY), adapters=list(adapters),
                           model_config=load_model(TINY, skip_weights=True).config)
    kernels = SimpleNamespace(attention="plain", fuse=None, group_experts=None, compile=None,
                              fp8=None, matmul=torch.nn.functional.linear)
    setup = SimpleNamespace(device=torch.device("cpu"), kernels=kernels)
    tokenizer = load_text(config, TINY, [], base.model_config).tokenizer
    return build_reward_model(config, base, setup, tokenizer)


def scores_by_hand(folder, sequences):
    """By the adapter of stage rm and its value head, text by text."""
    model = load_with_adapters(TINY, [folder])
    head = load_file(folder / "value_head.safetensors")
    weight, bias = head["v_head.summary.weight"][0], head["v_head.summary.bias"]
    with torch.no_grad():
        return [float(model(torch.tensor([ids]))[0, -1] @ weight + bias) for ids in sequences]


# ---- an adapter on the same base -----------------------------------------------------------------


def test_the_adapter_scores_as_it_was_trained_and_leaves_the_model_as_it_was(
        reward_adapter):                                                            # noqa: F811
    """Also where the policy's adapter is on other layers, of another rank and trained."""
    wanted = scores_by_hand(reward_adapter, SEQUENCES)
    model = load_model(TINY)
    attach_lora(model, LoRAConfig(r=3, target_modules=["q_proj", "up_proj"]), seed=1)
    for p in trainable(model).values():
        torch.nn.init.normal_(p, std=0.1)
    with torch.no_grad():
        before = model(torch.tensor([SEQUENCES[2]]))
    modules = dict(model.named_modules())
    scores, problem = judge_of(f"reward_model={reward_adapter}").scores(model, SEQUENCES)
    assert scores == pytest.approx(wanted, abs=1e-5) and not problem
    assert dict(model.named_modules()).keys() == modules.keys()
    assert all(module is modules[name] for name, module in model.named_modules())
    with torch.no_grad():
        assert torch.equal(model(torch.tensor([SEQUENCES[2]])), before)
    assert {"q_proj", "up_proj"} == {name.split(".")[-1] for name in lora_layers(model)}


def test_the_model_is_restored_after_an_error(reward_adapter):                      # noqa: F811
    model = load_model(TINY)
    judge = judge_of(f"reward_model={reward_adapter}")
    modules = dict(model.named_modules())
    with pytest.raises(IndexError):
        judge.scores(model, [[10**6]])
    assert dict(model.named_modules()) == modules


def test_scores_are_read_behind_the_line_break_of_chatml():
    """Where stage rm reads them: a turn of chatml ends in a line break."""
    config = config_of("reward_model=here")
    text = load_text(config, TINY, [], load_model(TINY, skip_weights=True).config)
    assert after_stop(text) == text.tokenizer.encode("\n")
    llama3 = SimpleNamespace(template=text.template, tokenizer=text.tokenizer, stop_ids={-5})
    assert after_stop(llama3) == []


# ---- a second model ------------------------------------------------------------------------------


def test_a_second_model_scores_alike(reward_adapter, tmp_path):                     # noqa: F811
    """The same adapter on its own copy of the base; and in 4 bits, nearly."""
    wanted = scores_by_hand(reward_adapter, SEQUENCES)
    argv = [f"reward_model={TINY}", f"reward_model_adapters={reward_adapter}",
            "reward_model_type=full"]
    scores, _ = judge_of(*argv).scores(None, SEQUENCES)
    assert scores == pytest.approx(wanted, abs=1e-5)
    coarse, _ = judge_of(*argv, "reward_model_quantization_bit=8").scores(None, SEQUENCES)
    assert coarse != scores and coarse == pytest.approx(wanted, abs=0.3)


def test_memory_of_a_reward_model(reward_adapter):                                  # noqa: F811
    """Of an adapter its file; of a second model its weights, fewer in 4 bits."""
    adapter = (reward_adapter / "adapter_model.safetensors").stat().st_size
    as_lora = config_of(f"reward_model={reward_adapter}")
    assert reward_model_bytes(as_lora, torch.float32) == adapter
    full = [f"reward_model={TINY}", "reward_model_type=full"]
    whole = reward_model_bytes(config_of(*full), torch.float32)
    size = (TINY / "model.safetensors").stat().st_size
    assert whole == pytest.approx(size, rel=0.01)
    small = reward_model_bytes(config_of(*full, "reward_model_quantization_bit=4"), torch.float32)
    assert small < 0.5 * whole
    by_function = config_of(f"reward={ROOT / 'data/rewards.py'}:boxed")
    assert reward_model_bytes(by_function, torch.float32) == 0


@pytest.mark.parametrize("kind, change, words", [
    ("lora", "no head", "has no value_head.safetensors: it is no reward model. stage: rm"),
    ("lora", "no adapter", "holds no adapter"),
    ("full", "adapter", "is an adapter, and reward_model_type: full names a whole model. "
     "Set reward_model_type: lora"),
    ("lora", "ppo", "was written by stage: ppo, whose value head"),
], ids=str)
def test_a_folder_that_is_no_reward_model(kind, change, words, reward_adapter,      # noqa: F811
                                          tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors", "value_head.safetensors"):
        (tmp_path / name).write_bytes((reward_adapter / name).read_bytes())
    if change == "no head":
        (tmp_path / "value_head.safetensors").unlink()
    if change == "ppo":
        (tmp_path / "train_config.json").write_text('{"stage": "ppo"}')
    if change == "no adapter":
        (tmp_path / "adapter_config.json").unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        judge_of(f"reward_model={tmp_path}", f"reward_model_type={kind}")


def test_an_error_names_the_key_and_an_adapter_of_another_base_is_said(
        reward_adapter, tmp_path, capsys):                                          # noqa: F811
    with pytest.raises(FileNotFoundError, match="^reward_model: /no/where does not exist"):
        judge_of("reward_model=/no/where")
    judge_of(f"reward_model={reward_adapter}")
    assert "was trained on" not in capsys.readouterr().out
    for name in ("adapter_config.json", "adapter_model.safetensors", "value_head.safetensors"):
        (tmp_path / name).write_bytes((reward_adapter / name).read_bytes())
    described = json.loads((tmp_path / "adapter_config.json").read_text())
    described["base_model_name_or_path"] = "models/other"
    (tmp_path / "adapter_config.json").write_text(json.dumps(described))
    judge_of(f"reward_model={tmp_path}")
    said = capsys.readouterr().out
    assert "reward_model was trained on models/other, and this run starts from" in said


def test_a_score_that_is_not_finite_is_no_score(reward_adapter, tmp_path):          # noqa: F811
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((reward_adapter / name).read_bytes())
    head = load_file(reward_adapter / "value_head.safetensors")
    head["v_head.summary.bias"] = torch.tensor([float("inf")])
    save_file(head, tmp_path / "value_head.safetensors")
    scores, problem = judge_of(f"reward_model={tmp_path}").scores(load_model(TINY), SEQUENCES)
    assert all(score != score for score in scores) and problem == "3 of 3 scores are not finite"


# ---- a server ------------------------------------------------------------------------------------


@pytest.fixture
def server():
    """A server whose reply is server.reply(request); its address is server.url."""
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, body = self.server.reply(request)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *args):
            pass

    found = HTTPServer(("127.0.0.1", 0), Handler)
    found.url = f"http://127.0.0.1:{found.server_port}/score"
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield found
    found.shutdown()
    found.server_close()


def test_a_server_gets_texts_with_their_special_tokens(server):
    """The request that LLaMA-Factory 0.9.5 sends, and the reply that it expects."""
    seen = []

    def reply(request):
        seen.append(request)
        return 200, json.dumps({"scores": [len(text) for text in request["messages"]]})

    server.reply = reply
    judge = judge_of(f"reward_model={server.url}", "reward_model_type=api")
    scores, problem = judge.scores(None, [[1, 514, 2], [1]])
    assert seen == [{"model": "model", "messages": ["<|im_start|>us<|im_end|>", "<|im_start|>"]}]
    assert scores == [float(len(text)) for text in seen[0]["messages"]] and not problem


@pytest.mark.parametrize("status, body, words", [
    (500, "out of memory", "status 500: out of memory"),
    (200, "hello", "the reply is not .* but hello"),
    (200, '{"scores": [1]}', r"the reply is not \{.scores.: \[2 numbers\]\}"),
    (200, '{"scores": [1, NaN]}', "1 of 2 scores are no finite numbers"),
    (200, '{"scores": [1, "high"]}', "1 of 2 scores are no finite numbers"),
], ids=str)
def test_a_server_that_fails_is_a_sentence(status, body, words, server):
    server.reply = lambda request: (status, body)
    judge = judge_of(f"reward_model={server.url}", "reward_model_type=api")
    scores, problem = judge.scores(None, [[1], [2]])
    assert len(scores) == 2 and scores[1] != scores[1]
    assert server.url in problem
    assert re.search(words, problem)


def test_a_server_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"3 rollouts in a row .*127.0.0.1:9.*refused"):
        run(tmp_path / "out", reward_model="http://127.0.0.1:9", reward_model_type="api",
            max_steps=4)


# ---- stages --------------------------------------------------------------------------------------


def test_a_run_learns_from_a_server(server, tmp_path):
    server.reply = lambda request: (200, json.dumps(
        {"scores": [text.count("1") for text in request["messages"]]}))
    logged = steps(run(tmp_path / "out", reward_model=server.url, reward_model_type="api",
                       max_steps=1))
    for sample in read_jsonl(tmp_path / "out/samples.jsonl"):
        assert sample["reward"] == (sample["prompt"] + sample["answer"]).count("1")
    assert "reward/reward_model" in logged[0]


@pytest.mark.parametrize("more", [
    {"reward_weights": "1,0.5"}, {"reward": None}, {"quantization_bit": 8, "reward": None},
], ids=str)
def test_grpo_learns_from_a_reward_model(more, reward_adapter, tmp_path):           # noqa: F811
    """Beside a function or alone; also on a base in 8 bits, which the reward model reads, too."""
    argv = {**GRPO, "max_steps": 2, "reward_model": reward_adapter, **more}
    train.main([f"{key}={value}" for key, value in argv.items() if value is not None]
               + [f"output_dir={tmp_path / 'out'}"])
    for row in steps(history(tmp_path / "out")):
        total = row["reward/reward_model"]
        if "reward_weights" in more:
            total = row["reward/arithmetic"] + 0.5 * total
        assert row["reward"] == pytest.approx(total, abs=1e-5)
        assert row["sampler_gap"] < 1e-3


def test_the_start_page_counts_the_reward_model_and_the_cache(reward_adapter,       # noqa: F811
                                                              tmp_path, capsys):
    train.main(settings(tmp_path / "out", reward_model=TINY, reward_model_type="full",
                        reward_model_adapters=reward_adapter, dry_run="true"))
    said = capsys.readouterr().out
    weights, cache = (next(line for line in said.splitlines() if name in line)
                      for name in ("frozen weights", "rollout cache"))
    assert "11.06 MiB" in weights               # twice 5.514 MiB, and the adapter
    # 4 answers x 256 slots x 4 layers x 2 (keys, values) x 2 heads x 32 numbers x 4 bytes
    assert "2 MiB" in cache
    assert "2 of 4 steps each" in said
