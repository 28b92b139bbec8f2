"""The 50 text examples of LLaMA-Factory, each given to its script with only paths overridden.

STOPS is the table of those that stop, with the words that say why; all others are accepted.
"""
import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

import chat
import merge
import train
from checkpoint.read_config import model_config
from model import CausalLM
from settings.load_config import load_config
from tests.common import GOLDEN, SHARED, needs_shared
from tests.tiny_models import write_grouped

EXAMPLES = SHARED / "configs/llama_factory_examples"
SCRIPTS = {"train.py": "train", "chat.py": "chat", "eval.py": "eval", "merge.py": "merge"}
STOPS = {
    "extras/mod/llama3_full_sft.yaml": "mixture_of_depths: convert: not in this release",
    "ktransformers/train_lora/deepseek_v2_lora_sft_kt.yaml": "use_kt: true: KTransformers keeps",
    "ktransformers/train_lora/deepseek_v3_int8_lora_sft_kt.yaml": "use_kt: true: KTransformers",
    "ktransformers/train_lora/deepseek_v3_lora_sft_kt.yaml": "use_kt: true: KTransformers keeps",
    "ktransformers/train_lora/qwen3_5moe_lora_sft_kt.yaml": "use_kt: true: KTransformers keeps",
    "ktransformers/train_lora/qwen3moe_lora_sft_kt.yaml": "use_kt: true: KTransformers keeps",
}


def examples() -> dict[str, str]:
    """{file: script}; {} without the fixtures."""
    index = EXAMPLES / "index.json"
    rows = json.loads(index.read_text()) if index.is_file() else []
    return {row["file"]: row["script"] for row in rows if row["file"].endswith(".yaml")}


@needs_shared
@pytest.mark.parametrize("file", examples())
def test_an_example_is_read(file):
    script = examples()[file]
    script = SCRIPTS.get(script, script)
    argv = [str(EXAMPLES / file)]
    if file in STOPS:
        with pytest.raises(ValueError) as caught:
            load_config(argv, script)
        assert STOPS[file] in str(caught.value)
        assert f"{file} line " in str(caught.value)     # where it is
    else:
        load_config(argv, script)


@needs_shared
def test_the_table_names_only_examples():
    assert len(examples()) == 50 and STOPS.keys() <= examples().keys()


# ---- runs ---------------------------------------------------------------------------------------

# not run here: other families, and a checkpoint by AQLM
NOT_RUN = ("ascend/qwen3_5", "ascend/qwen3moe", "aqlm")
TRAINED = [file for file, script in examples().items()
           if script.startswith("train") and file not in STOPS
           and not any(part in file for part in NOT_RUN)]
# a model to train on: the words in a file's name, its sizes, its tokenizer
BASES = (("llama", "llama3", "llama3"), ("qwen2", "qwen2", "qwen2.5"), ("", "qwen3", "qwen3"))


VOCABULARY = 1000       # tokens beside the special ones: logits of 150,000 would be all of the time


def cut_tokenizer(source, folder) -> int:
    """Write a tokenizer with the first tokens of another, and all special ones; -> its size.

    The formats and special tokens are the family's own, and so are the merges that are left.
    """
    files = {name: json.loads((source / name).read_text(encoding="utf-8"))
             for name in ("tokenizer.json", "tokenizer_config.json")}
    core = files["tokenizer.json"]
    names = [name for name, i in core["model"]["vocab"].items() if i < VOCABULARY]
    special = [token["content"] for token in core["added_tokens"] if token["id"] >= VOCABULARY]
    ids = {name: i for i, name in enumerate([*names, *special])}
    core["model"]["vocab"] = {name: ids[name] for name in names}
    pairs = [pair if isinstance(pair, list) else pair.split(" ")
             for pair in core["model"]["merges"]]
    core["model"]["merges"] = [pair for pair in pairs if {*pair, "".join(pair)} <= ids.keys()]
    for token in core["added_tokens"]:
        token["id"] = ids[token["content"]]
    for processor in (core["post_processor"], *core["post_processor"].get("processors", [])):
        for name, token in processor.get("special_tokens", {}).items():
            token["ids"] = [ids[name]]
    settings = files["tokenizer_config.json"]
    settings["added_tokens_decoder"] = {
        ids[token["content"]]: token for token in settings["added_tokens_decoder"].values()}
    shutil.copytree(source, folder)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return len(ids)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """{name: (folder, its tokens)} of the families' tokenizers, cut."""
    here = tmp_path_factory.mktemp("tokenizers")
    return {name: (here / name, cut_tokenizer(SHARED / "tokenizers" / name, here / name))
            for name in ("llama2", *(row[2] for row in BASES))}


def base_for(file, tokenizers, parent):
    """A random tiny model of the example's family, with the family's own tokenizer, cut."""
    name, tokenizer = next(row[1:] for row in BASES if row[0] in file)
    if "llama2" in file:
        tokenizer = "llama2"
    source, vocabulary = tokenizers[tokenizer]
    folder = parent / tokenizer
    shutil.copytree(source, folder)
    fields = json.loads((GOLDEN / "models" / name / "config.json").read_text())
    fields |= {"vocab_size": vocabulary, "hidden_size": 16, "intermediate_size": 24,
               "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
               "num_hidden_layers": 8 if "llama_pro" in file else 2}
    (folder / "config.json").write_text(json.dumps(fields))
    torch.manual_seed(0)
    model = CausalLM(model_config(fields))
    save_file({name: 0.02 * torch.randn(p.shape) if p.dim() > 1 else torch.ones_like(p)
               for name, p in model.named_parameters()}, folder / "model.safetensors")
    for method in ("gptq", "awq"):
        if method in file:
            write_grouped(folder, parent / method, method, group_size=8)
            return parent / method
    return folder


def paths(file, tokenizers, tmp_path) -> list[str]:
    """The example's arguments: its file, our paths, and what makes it short."""
    argv = [
        str(EXAMPLES / file), f"model_name_or_path={base_for(file, tokenizers, tmp_path)}",
        f"dataset_dir={SHARED}/data", f"output_dir={tmp_path}/out", "use_cpu=true", "max_steps=2",
        "max_samples=4", "cutoff_len=128", "logging_steps=1", "plot_loss=false", "report_to=none",
        "disable_tqdm=true", "preprocessing_num_workers=1", "tokenized_path=null"]
    if "asft" in file or "eaft" in file:        # whose data are not LLaMA-Factory's own
        argv.append("dataset=alpaca_en_demo")
    return argv


@needs_shared
@pytest.mark.parametrize("file", TRAINED)
def test_an_example_trains(file, tokenizers, tmp_path):
    train.main(paths(file, tokenizers, tmp_path))
    results = json.loads((tmp_path / "out/all_results.json").read_text())
    assert 0 < results["train_loss"] < 30           # of DFT tiny: weighted by the probabilities


PPO = """
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
reward_model: saves/llama3-8b/lora/reward
stage: ppo
do_train: true
finetuning_type: lora
lora_target: all
dataset: identity,alpaca_en_demo
template: llama3
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
output_dir: saves/llama3-8b/lora/ppo
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-5
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
max_new_tokens: 512
top_k: 0
top_p: 0.9
"""         # the keys of its examples/train_lora/llama3_lora_ppo.yaml


@needs_shared
def test_the_ppo_example_learns_from_a_reward_model_of_ours(tokenizers, tmp_path):
    """The reward model is the one that the reward example trains here, on the same base."""
    reward = paths("train_lora/qwen3_lora_reward.yaml", tokenizers, tmp_path)
    base = base_for("llama3", tokenizers, tmp_path)
    train.main([*reward, f"model_name_or_path={base}", "template=llama3",
                f"output_dir={tmp_path}/reward"])
    (tmp_path / "ppo.yaml").write_text(PPO)
    train.main([
        str(tmp_path / "ppo.yaml"), f"model_name_or_path={base}",
        f"reward_model={tmp_path}/reward", f"dataset_dir={SHARED}/data",
        f"output_dir={tmp_path}/ppo", "use_cpu=true", "disable_tqdm=true", "max_samples=4",
        "max_steps=2", "logging_steps=1", "max_new_tokens=6", "preprocessing_num_workers=1",
        "plot_loss=false", "placeholders.name=A", "placeholders.author=B"])
    history = json.loads((tmp_path / "ppo/trainer_state.json").read_text())["log_history"]
    logged = [row for row in history if "reward" in row]
    assert [row["step"] for row in logged] == [4, 8]        # two rollouts of four steps
    assert (tmp_path / "ppo/value_head.safetensors").is_file()


@needs_shared
def test_an_adapter_goes_from_example_to_example(tokenizers, tmp_path):
    argv = paths("train_lora/qwen3_lora_sft.yaml", tokenizers, tmp_path)
    train.main(argv)
    own = [argv[1], f"adapter_name_or_path={tmp_path}/out"]
    merge.main([str(EXAMPLES / "merge_lora/qwen3_lora_sft.yaml"), *own,
                f"export_dir={tmp_path}/merged"])
    assert (tmp_path / "merged/model.safetensors").is_file()
    chat.main([str(EXAMPLES / "inference/qwen3_lora_sft.yaml"), *own, "use_cpu=true",
               "prompt=Hello", "max_new_tokens=2"])
    chat.main([str(EXAMPLES / "inference/qwen3.yaml"), f"model_name_or_path={tmp_path}/merged",
               "use_cpu=true", "prompt=Hello", "max_new_tokens=2"])
