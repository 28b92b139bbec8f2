"""settings/load_config.py: values in yaml, json and on the command line; mistakes."""
import dataclasses
import json
import os
import re
import subprocess
import sys
import time
import tracemalloc

import pytest

from settings.config import KEYS, UNUSED, Config, as_dict
from settings.load_config import (COMMANDS, NEEDED, chat_command, ignored_keys, load_config,
                                 non_default)
from tests.common import GOLDEN, ROOT, SHARED, load_argv, needs_shared, refusal

PEER_OFF = {  # LLaMA-Factory's defaults of unsupported keys: they must be accepted
    "infer_backend": "huggingface",
    "ignore_pad_token_for_loss": "true",
    "num_beams": "1",
    # mcore_adapter's, with USE_MCA=1, and ours
    **dict.fromkeys(("pipeline_model_parallel_size", "context_parallel_size",
                     "expert_parallel_size", "expert_model_parallel_size"), "1"),
    "label_smoothing_factor": "0.0",
    "logging_strategy": "steps",
    "eval_delay": "0",
    "train_sampling_strategy": "random",
    "galore_proj_type": "std",
    "apollo_proj_type": "std",
    "save_safetensors": "true",
}


def write(folder, text, name="x.yaml"):
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


# ---- keys without effect, and refused ones -------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, row in UNUSED.items() if row])
def test_unsupported_keys_are_errors_only_when_on(name):
    off = PEER_OFF.get(name, "false")
    scope = UNUSED[name].scope.replace("any", "train").replace("train", "config")
    needed = ["model_name_or_path=m", "export_dir=e", "adapter_name_or_path=a"]
    assert ignored_keys(load_argv(f"{name}={off}", *needed, script=scope)) == []
    assert ignored_keys(load_argv(f"{name}=null", *needed, script=scope)) == []
    message = refusal(f"{name}=surprise", *needed, script=scope)
    assert (
        message.startswith(f"command line: {name}: surprise: ") and UNUSED[name].advice in message
    )


def test_training_keys_are_allowed_in_chat_and_merge():
    argv = [
        "model_name_or_path=m",
        "deepspeed=z3.json",
        "fp8=true",
        "stage=dpo",
        "finetuning_type=oft",
        "mixture_of_depths=convert",
        "bf16=true",
        "fp16=true",
        "eval_strategy=steps",
        "infer_backend=vllm",
    ]
    config = load_argv(*argv, "export_dir=e", "adapter_name_or_path=a", script="merge")
    assert config.stage == "dpo" and ignored_keys(config) == ["mixture_of_depths"]
    assert "infer_backend" in refusal(*argv, script="chat")
    argv.remove("finetuning_type=oft")
    assert "mixture_of_depths" in refusal(*argv, script="train")


def test_ignored_keys_are_listed():
    config = load_argv("trust_remote_code=true", "lora_rank=4", "ddp_timeout=180000000",
                       "bf16=true")
    assert ignored_keys(config) == ["trust_remote_code"]
    assert ignored_keys(load_argv("finetuning_type=full", "lora_rank=4")) == ["lora_rank"]


# ---- the shared files ----------------------------------------------------------------------------


@needs_shared
def test_published_yaml_of_a_lora_run():
    config = load_argv("--config", str(SHARED / "configs/llama3_lora_sft.yaml"), script="train")
    assert (config.dataset, config.learning_rate, config.lora_alpha) == (
        ["identity", "alpaca_en_demo"],
        1e-4,
        16,
    )
    assert (
        config.resume_from_checkpoint is None and config.bf16 is True and config.warmup_ratio == 0.1
    )
    assert ignored_keys(config) == ["trust_remote_code", "dataloader_num_workers"]
    assert (load_argv(str(SHARED / "configs/llama3_lora_sft.yaml"), script="chat").template
            == "llama3")
    merge = load_argv(str(SHARED / "configs/llama3_lora_sft.yaml"), "export_dir=out",
                      script="merge")
    assert merge.output_dir == "saves/llama3-8b/lora/sft"


@needs_shared
def test_published_json_files():
    train = load_argv("--config", str(SHARED / "configs/train_llama3_qlora.json"), script="train")
    assert (train.fp16, train.learning_rate, train.loraplus_lr_ratio, train.max_samples) == (
        True,
        5e-5,
        16.0,
        500,
    )
    chat = load_argv(str(SHARED / "configs/chat_llama3.json"), script="chat")
    assert (chat.adapter_name_or_path, chat.temperature) == (["llama3_lora"], 0.95)


@needs_shared
def test_published_merge_file():
    merge = load_argv(str(SHARED / "configs/merge_llama3_lora_sft.yaml"), script="merge")
    assert (merge.export_size, merge.export_device, merge.export_dir) == (
        4,
        "cpu",
        "models/llama3_lora_sft",
    )
    assert ignored_keys(merge) == ["export_legacy_format"]


@needs_shared
def test_published_flags_without_a_file():
    argv = (SHARED / "configs/cli_flags_llama3.txt").read_text(encoding="utf-8").split()
    config = load_argv(*argv, script="train")
    assert (config.dataset, config.num_train_epochs, config.packing, config.optim) == (
        ["identity", "fintech"],
        10.0,
        False,
        "adamw_torch",
    )
    assert (config.source, config.given["packing"], config.warmup_steps) == (
        "command line",
        False,
        0,
    )


@needs_shared
@pytest.mark.parametrize(
    "path", sorted(GOLDEN.glob("curves/*/config.yaml")), ids=lambda path: path.parent.name
)
def test_recorded_runs(path):
    script = "merge" if path.parent.name.startswith("export") else "train"
    config = load_argv(str(path), script=script)
    assert ignored_keys(config) == []
    assert config.neat_packing is (path.parent.name == "sft_packing")  # docs/differences.md
    assert config.packing is (path.parent.name in ("sft_packing", "pt"))


# ---- what was written, and what it means ---------------------------------------------------------


@pytest.mark.parametrize(
    "name, text, value",
    [
        ("learning_rate", "1e-4", 1e-4),
        ("learning_rate", "5e-05", 5e-5),
        ("learning_rate", "1", 1.0),
        ("max_samples", "1e3", 1000),
        ("max_samples", "500.0", 500),
        ("max_samples", "null", None),
        ("max_samples", "", None),
        ("cutoff_len", "null", 2048),
        ("seed", "007", 7),
        ("max_steps", "-1", -1),
        ("bf16", "True", True),
        ("bf16", "yes", True),
        ("bf16", "off", False),
        ("bf16", "1", True),
        ("enable_thinking", "none", None),
        ("enable_thinking", "false", False),
        ("max_grad_norm", "null", 0.0),
        ("save_strategy", "no", "no"),
        ("eval_strategy", "none", "no"),
        ("save_strategy", "False", "no"),
        ("lr_scheduler_type", "Cosine", "cosine"),
        ("template", "none", None),
        ("template", "qwen", "qwen"),
        ("template", '{"based_on": "qwen", "stop": ["a"]}', {"based_on": "qwen", "stop": ["a"]}),
        ("dataset", "a, b", ["a", "b"]),
        ("dataset", "[a, b]", ["a", "b"]),
        ("lora_target", "q_proj", ["q_proj"]),
        ("save_steps", "100.0", 100),
        ("save_steps", "0.1", 0.1),
        ("resume_from_checkpoint", "True", "true"),
        ("resume_from_checkpoint", "false", None),
        ("resume_from_checkpoint", "out/checkpoint-5", "out/checkpoint-5"),
        ("placeholders", '{"name": "Max", "n": 007}', {"name": "Max", "n": "007"}),
        (
            "lr_scheduler_kwargs",
            '{"min_lr": 1e-6, "decay_type": "linear"}',
            {"min_lr": 1e-6, "decay_type": "linear"},
        ),
    ],
)
def test_values_written_as_text(tmp_path, name, text, value):
    extra = "" if not text.startswith("{") else "'"
    from_file = load_argv(write(tmp_path, f"{name}: {extra}{text}{extra}\n"))
    for config in (
        from_file,
        load_argv(f"{name}={text}"),
        load_argv(f"--{name}={text}"),
        load_argv(f"--{name}", text),
    ):
        got = getattr(config, name)
        assert got == value and type(got) is type(value)


def test_json_values(tmp_path):
    text = (
        '\ufeff{"bf16": true, "packing": null, "learning_rate": 1e-4, "lora_rank": 4, '
        '"dataset": ["a", "b"], "placeholders": {"name": "\\ud83d\\ude00"}, '
        '"lr_scheduler_kwargs": {"min_lr": 1e-06}, "raw": "True"}'
    )
    config = load_argv(write(tmp_path, text, "x.json"))
    assert (config.bf16, config.learning_rate, config.lora_rank, config.dataset) == (
        True,
        1e-4,
        4,
        ["a", "b"],
    )
    assert (config.placeholders, config.lr_scheduler_kwargs, config.raw) == (
        {"name": "😀"},
        {"min_lr": 1e-6},
        True,
    )


def test_yaml_lists_and_mappings(tmp_path):
    text = "dataset: [a, b]\nplaceholders:\n  name: Pip\n  author: The Makers\neval_dataset:\n- c\n"
    config = load_argv(write(tmp_path, text), "placeholders.name=Max")
    assert (config.dataset, config.eval_dataset) == (["a", "b"], ["c"])
    assert config.placeholders == {"name": "Max", "author": "The Makers"}
    assert load_argv(write(tmp_path, "placeholders:\n"), "placeholders.name=Max").placeholders == {
        "name": "Max"
    }


def test_the_command_line_overrides_the_file(tmp_path):
    path = write(tmp_path, "seed: 1\nlora_rank: 4\n")
    for argv in (["--config", path], [f"--config={path}"], [path]):
        config = load_argv(
            *argv,
            "seed=2",
            "--bf16",
            "--lora-dropout",
            "0.1",
            "--packing",
            "no",
            "--max_steps",
            "-1",
            "--plot_loss",
        )
        assert (config.seed, config.lora_rank, config.bf16, config.lora_dropout) == (
            2,
            4,
            True,
            0.1,
        )
        assert (config.packing, config.max_steps, config.plot_loss) == (False, -1, True)
        assert (
            config.source == path and config.given["seed"] == 2 and "cutoff_len" not in config.given
        )


def test_a_switch_does_not_take_the_file_as_its_value(tmp_path):
    path = write(tmp_path, "seed: 1\n")
    config = load_argv("--bf16", path)
    assert config.bf16 is True and config.seed == 1
    assert load_argv("--prompt", "is 2=2?", "--raw").prompt == "is 2=2?"


def test_spellings_of_earlier_releases():
    assert load_argv("evaluation_strategy=epoch", "val_size=0.1").eval_strategy == "epoch"
    assert load_argv("no_cuda=true").use_cpu is True


# ---- what follows from other keys ----------------------------------------------------------------


def test_derived_defaults():
    assert (load_argv("lora_rank=6").lora_alpha == 12
            and load_argv("lora_rank=6", "lora_alpha=6").lora_alpha == 6)
    config = load_argv("eval_strategy=steps", "val_size=10", "logging_steps=7")
    assert (config.eval_steps, config.do_eval) == (7, True)
    assert load_argv().packing is False and load_argv("stage=pt").packing is True


@pytest.mark.parametrize(
    "argv, packing, apart",
    [
        (["packing=true"], True, True),
        (["packing=true", "neat_packing=false"], True, False),
        (["neat_packing=true"], True, True),
        (["packing=false"], False, False),
        (["packing=true", "stage=pt"], True, False),
    ],
)
def test_packing_separates_sequences_by_default(argv, packing, apart):
    config = load_argv(*argv)
    assert (config.packing, config.neat_packing) == (packing, apart)


def test_settings_are_the_same_after_a_json_file(tmp_path):
    first = load_argv(
        "model_name_or_path=m",
        "dataset=a,b",
        "packing=true",
        "warmup_ratio=0.1",
        "eval_strategy=epoch",
        "val_size=0.2",
        "placeholders.name=Max",
        "lr_scheduler_kwargs.power=2",
        "resume_from_checkpoint=true",
        "enable_thinking=null",
    )
    second = load_argv(write(tmp_path, json.dumps(as_dict(first)), "x.json"))
    assert as_dict(second) == as_dict(first)


def test_start_page_shows_only_what_differs():
    assert non_default(load_argv()) == {}
    assert non_default(load_argv("seed=42", "lora_rank=4")) == {"lora_rank": 4, "lora_alpha": 8}


# ---- mistakes ------------------------------------------------------------------------------------


def test_unknown_key_names_the_nearest(tmp_path):
    path = write(tmp_path, "# comment\nlora_alfa: 3\n")
    assert refusal(path) == (
        f"{path} line 2: unknown key 'lora_alfa' (did you mean 'lora_alpha'?). "
        "All keys: python -m settings.config --keys"
    )
    assert refusal("lora_rank.x=3").startswith("command line: unknown key 'lora_rank.x'")
    assert refusal("fsdp_config.x=3").startswith("command line: unknown key 'fsdp_config.x'")
    assert "did you mean" not in refusal("qqqqqq=3")


def test_a_chat_format_is_the_same_after_json(tmp_path):
    path = write(
        tmp_path,
        """template:
  name: mychat
  user: "<user>{{content}}</user>\\n<bot>"
  assistant: ["{{content}}", {token: eos}]
  stop_is_eos: true
  stop: ["</bot>"]
""",
    )
    config = load_argv(path)
    assert config.template == {
        "name": "mychat",
        "user": "<user>{{content}}</user>\n<bot>",
        "stop_is_eos": "true",
        "assistant": ["{{content}}", {"token": "eos"}],
        "stop": ["</bot>"],
    }
    again = load_argv(write(tmp_path, json.dumps(as_dict(config)), "again.json"))
    assert again.template == config.template == non_default(config)["template"]
    # the command line has priority, as for every key
    assert load_argv(path, "template=qwen").template == "qwen"
    assert "needs quotes" in refusal(write(tmp_path, "template:\n  user: {{content}}\n"))


@pytest.mark.parametrize(
    "text, part",
    [
        ("lora_rank: eight", "line 1: lora_rank: 'eight' is not a whole number"),
        ("lora_rank: 2.5", "'2.5' is not a whole number"),
        ("lora_rank: true", "'true' is not a whole number"),
        ("lora_rank: 0", "must be at least 1"),
        ("cutoff_len: 0", "at least 1"),
        ("save_total_limit: 0", "at least 1"),
        ("learning_rate: 1,5", "'1,5' is not a number"),
        ("learning_rate: nan", "not a number"),
        ("learning_rate: -1e-4", "above 0"),
        ("num_train_epochs: 0", "must be above 0"),
        ("top_p: 1.5", "at most 1"),
        ("bf16: maybe", "not true or false"),
        ("bf16: [true]", "not true or false"),
        ("template: [a]", "not the name of a chat format"),
        ("dataset: {a: b}", "not a list of names"),
        ("placeholders: Max", "not a mapping"),
        ("save_steps: 1.5", "share below 1"),
        ("stage: sftt", "none of sft, pt, rm, dpo, kto, ppo, grpo, distill (did you mean 'sft'?)"),
        ("quantization_method: awq", "not in this release yet"),
        ("finetuning_type: ofd", "none of lora, oft, full, freeze (did you mean 'oft'?)"),
        ("optim: adafactor", "none of adamw_torch_fused"),
        ("export_format: int8", "nf4, base. Meaning: write the merged model in another format"),
        ("seed: 1\nseed: 2", "line 2: seed was already set on line 1"),
        ("lr_scheduler_kwargs:\n  power: 1\n  power: 2", "line 3: power was already set on line 2"),
        ("eval_strategy: no\nevaluation_strategy: no", "line 2: eval_strategy was already set at"),
        ("a: [1\nb: 2", "not valid YAML"),
        ("\tseed: 1", "line 1: not valid YAML"),
        ("- a", "key: value"),
        ("seed: 1\n\tbf16: true", "with spaces, not with tabs"),
        ("seed: 4294967296", "at most 4294967295"),
        ("adam_beta1: 1", "must be below 1"),
        ("", "key: value"),
        ("lr_scheduler_kwargs: {power: 1, power: 2}", "power was already set on line 1"),
        ("default_system: {{name}}", "line 1: a text with braces or brackets needs quotes"),
    ],
)
def test_mistakes_in_a_yaml_file(tmp_path, text, part):
    message = refusal(write(tmp_path, text + "\n"))
    assert message.startswith(str(tmp_path / "x.yaml")) and part in message


@pytest.mark.parametrize(
    "text, part",
    [
        ('{"seed": 1, "seed": 2}', "seed is set twice"),
        ('{"seed": 1,\n}', "line 2: not valid JSON"),
        ("[1]", "this is a list"),
        ('{"lora_rank": true}', "'true' is not a whole number"),
        ('{"lora_alfa": 1}', "did you mean 'lora_alpha'?"),
    ],
)
def test_mistakes_in_a_json_file(tmp_path, text, part):
    assert part in refusal(write(tmp_path, text, "x.json"))


def test_mistakes_on_the_command_line(tmp_path):
    path = write(tmp_path, "seed: 1\n", "train.yaml")
    assert "no such config file (did you mean 'train.yaml'?)" in refusal(
        str(tmp_path / "trian.yaml")
    )
    assert "a folder, not a config file" in refusal(str(tmp_path))
    assert "--lora_rank needs a value" in refusal("--lora_rank", "--bf16")
    assert "'v_proj' is neither key=value" in refusal(path, "--lora_target", "q_proj", "v_proj")
    (tmp_path / "x.yaml").write_bytes(b"template: \xff\n")
    assert "not UTF-8" in refusal(str(tmp_path / "x.yaml"))


def test_each_run_has_its_own_lists():
    first = load_argv("lora_target=q_proj", "placeholders.name=Max")
    first.lora_target.append("v_proj")
    assert Config().lora_target == ["all"] and Config().placeholders == {}
    assert dataclasses.replace(first).lora_target == ["q_proj", "v_proj"]


def test_what_merge_takes_and_refuses():
    base = ["model_name_or_path=m", "export_dir=e"]
    assert (
        load_argv(*base, script="merge").adapter_name_or_path is None
    )  # a conversion of dtype or shards
    assert "finetuning_type" in refusal(
        *base, "output_dir=o", "finetuning_type=full", script="merge"
    )
    assert "export_dir" in refusal(
        "model_name_or_path=m", "export_dir=m", "output_dir=o", script="merge"
    )
    assert load_argv(*base, "output_dir=o", script="merge").adapter_name_or_path is None


@pytest.mark.parametrize("script", NEEDED)
def test_missing_keys_are_named(script):
    command = COMMANDS[script]
    complete = [f"{name}={name}" for name in NEEDED[script]] + ["adapter_name_or_path=a"]
    load_argv(*complete, script=script)
    for i in range(len(complete) - 1):
        name = complete[i].partition("=")[0]
        message = refusal(*complete[:i], *complete[i + 1 :], script=script)
        assert (
            message.startswith(f"command line: python {command} needs '{name}'")
            and f"{command} --help" in message
        )


# ---- as a program --------------------------------------------------------------------------------


def program(*argv):
    return subprocess.run(
        [sys.executable, *argv], capture_output=True, text=True, cwd=ROOT, timeout=60
    )


def test_help_of_each_script(capsys):
    for script in NEEDED:
        with pytest.raises(SystemExit) as stopped:
            load_argv("--help", script=script)
        text = capsys.readouterr().out
        assert stopped.value.code == 0
        assert f"python {COMMANDS[script]} " in text and "settings.config --keys" in text


@pytest.mark.parametrize("script", NEEDED)
def test_help_and_mistakes_do_not_wait_for_torch(tmp_path, script):
    """A torch that ends the program is imported instead of the real one, by valid settings only."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise SystemExit('torch is imported')")
    (tmp_path / "torch/version.py").touch()  # attention.py looks into it first

    def start(*argv):
        env = {**os.environ, "PYTHONPATH": str(tmp_path)}
        command = [sys.executable, *COMMANDS[script].split(), *argv]
        return subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=60
        )

    start_time = time.time()
    done = start("--help")
    assert done.returncode == 0 and done.stderr == ""
    assert f"python {COMMANDS[script]} " in done.stdout
    assert time.time() - start_time < 2  # about 0.1 s where nothing else runs
    done = start(write(tmp_path, "model_name_or_path: m\nlora_rnak: 4\n"))
    assert (
        done.returncode == 1
        and "line 2: unknown key 'lora_rnak' (did you mean 'lora_rank'?)" in done.stderr
    )
    done = start(*(f"{name}={name}" for name in NEEDED[script]))
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "torch is imported\n")


def test_shows_a_file_or_one_error_line(tmp_path):
    done = program(
        "-m", "settings.load_config", write(tmp_path, "lora_rank: 4\ntrust_remote_code: true\n")
    )
    assert (
        done.stdout == "lora_rank: 4\nlora_alpha: 8\naccepted, no effect here: trust_remote_code\n"
    )
    done = program("-m", "settings.load_config", "lora_rank=x")
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch("error: command line: lora_rank: .*\n", done.stderr)


@pytest.mark.parametrize(
    "argv, part",
    [
        (["--nobf16"], "unknown key 'nobf16' (did you mean 'bf16'?)"),
        (["--placeholders.name"], "--placeholders.name needs a value"),
        (["--config"], "--config needs a value"),
        (["default_system=\udcc3\udca4"], "not UTF-8 text; if the locale"),
    ],
)
def test_unusual_spellings_on_the_command_line(argv, part):
    assert part in refusal(*argv)


def test_output_that_cannot_show_a_character(tmp_path):
    """A pipe or a Windows console whose encoding lacks the ellipsis shows ? instead."""
    done = subprocess.run(
        [sys.executable, "-m", "settings.load_config", "default_system=…"],
        capture_output=True,
        cwd=ROOT,
        timeout=60,
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
    )
    assert (done.returncode, done.stdout) == (0, b"default_system: ?\n")


# ---- what outsiders typed -----------------------------------------------------------------------

TRAIN = ("model_name_or_path=m", "dataset=d", "output_dir=o")


@pytest.mark.parametrize("argv, words", [
    (["train", "x.yaml"], "'train' is a command of llamafactory-cli, and no file: python train.py "
     "x.yaml, or python cli.py train x.yaml"),
    (["export", "x.yaml"], "python merge.py x.yaml, or python cli.py export x.yaml"),
    (["-learning_rate", "1"], "-learning_rate: settings have two dashes or none: --learning_rate "
     "1, or learning_rate=1"),
    (["-learning_rate=1"], "settings have two dashes or none: --learning_rate 1, or learning_rate"),
    ([*TRAIN, "do_predict=true"], "python eval.py with these settings. Add do_train: true"),
    ([*TRAIN, "max_steps=1e300"], "max_steps: '1e300' is out of range: it must be at most 1000"),
    ([*TRAIN, "lora_rank=1e18"], "lora_rank: '1e18' is out of range: it must be at most 1000000"),
    ([*TRAIN, "num_train_epochs=1e308"], "num_train_epochs: '1e308' is out of range"),
    ([*TRAIN, "save_steps=1e300"], "save_steps: '1e300' is out of range"),
    (["export_size=1e300"], "export_size: '1e300' is out of range: it must be at most 1000000"),
])
def test_what_outsiders_typed(argv, words):
    assert words in refusal(*argv, script="train")


def test_a_negative_value_is_no_setting_with_one_dash():
    assert load_argv("--max_steps", "-1", "max_steps=-1").max_steps == -1


def test_an_evaluation_is_named_with_its_file(tmp_path):
    (tmp_path / "p.yaml").write_text("do_predict: true\n" + "\n".join(
        setting.replace("=", ": ") for setting in TRAIN))
    message = refusal(str(tmp_path / "p.yaml"), script="train")
    assert f"python eval.py --config {tmp_path}/p.yaml. Add" in message


def test_keys_about_images_have_a_note():
    vision = ["image_max_pixels=262144", "freeze_vision_tower=true"]
    assert load_argv(*TRAIN, *vision, script="train").notes == [
        "image_max_pixels, freeze_vision_tower: images, video and sound are not supported; the "
        "models here read text only"]


def test_the_command_for_chat_has_only_what_chat_reads():
    argv = ["--config", "my run.yaml", "learning_rate=1", "--max_steps", "-1", "--bf16",
            "template=qwen", "output_dir=o", "lora_rank=2", "plot_loss=false"]
    assert chat_command(argv) == ("python chat.py 'my run.yaml' bf16=true template=qwen "
                                  "output_dir=o")
    config = load_argv(*chat_command(argv).split()[4:], "model_name_or_path=m", script="chat")
    assert config.bf16 and config.template == "qwen" and config.output_dir == "o"


BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))
HOSTILE = {     # file: (content, words)
    "bomb.yaml": (BOMB, "a value has more than 100,000 values"),
    "itself.yaml": ("dataset: &a [*a]\n", "a value has more than 50 levels (does an alias"),
    "root.yaml": ("&a {dataset: *a}\n", "a value has more than 50 levels"),
    "mapping.yaml": ("lr_scheduler_kwargs: &a {b: *a}\n", "a value has more than 50 levels"),
    "deep.yaml": ("dataset: " + "[" * 100_000, "nested too deeply"),
    "closed.yaml": ("dataset: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
    "indented.yaml": ("".join(" " * i + "a:\n" for i in range(1300)), "nested too deeply"),
    "deep.json": ('{"dataset": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
    "long.yaml": ("dataset: " + "x" * 3_000_000, "3,000,009 characters are too many for a config"),
    "null.yaml": ("dataset: a\0b", "not valid YAML: unacceptable character"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_in_little_memory(name, tmp_path):
    content, words = HOSTILE[name]
    (tmp_path / name).write_text(content)
    if words != "nested too deeply":        # these would take 100 times as long
        tracemalloc.start()
    message = refusal(str(tmp_path / name))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert f"{tmp_path / name}" in message and words in message and "\n" not in message
    assert peak < 150e6


def test_aliases_that_are_few_are_read(tmp_path):
    (tmp_path / "a.yaml").write_text("dataset: &names [a, b]\neval_dataset: *names\n")
    assert load_argv(str(tmp_path / "a.yaml")).eval_dataset == ["a", "b"]


def test_a_list_of_lists_for_a_key_without_effect(tmp_path):
    file = write(tmp_path, "mixture_of_depths: [[1]]")
    with pytest.raises(ValueError, match="mixture_of_depths: .*not in this release"):
        load_argv(file)


@pytest.mark.parametrize("name, words", [
    ("resume", "unknown key 'resume' (here that is resume_from_checkpoint)"),
    ("lr", "(here that is learning_rate)"), ("max_seq_length", "(here that is cutoff_len)"),
    ("learning_rat", "(did you mean 'learning_rate'?)"),
])
def test_words_of_other_programs_for_a_key(name, words):
    assert words in refusal(f"{name}=1")
    assert name not in KEYS


def test_the_words_of_other_programs_name_keys():
    from settings.load_config import OTHER_WORDS
    assert OTHER_WORDS.keys().isdisjoint([*KEYS, *UNUSED])
    assert {word for name, word in OTHER_WORDS.items() if name != "gpus"} <= KEYS.keys()


@pytest.mark.parametrize("words, note", [
    ("compute_accuracy=true", "compute_accuracy: nothing is evaluated"),
    ("compute_accuracy=true do_eval=true val_size=0.1", ""),
    ("plot_loss=true logging_strategy=no", "plot_loss: with logging_strategy: no"),
    ("plot_loss=true logging_strategy=epoch", ""),
    ("eval_delay=5", "eval_delay: eval_strategy: no"),
    ("eval_delay=5 eval_strategy=steps val_size=0.1 max_steps=4", "after the end (max_steps: 4)"),
    ("eval_delay=5 eval_strategy=steps val_size=0.1", ""),
    ("eval_delay=5 eval_strategy=epoch val_size=0.1", "after the end (num_train_epochs: 3)"),
    ("eval_delay=5 eval_strategy=epoch val_size=0.1 max_steps=900", ""),
])
def test_keys_that_do_nothing_beside_others_are_said(words, note):
    config = load_config(["model_name_or_path=m", "dataset=d", "output_dir=o", "template=qwen",
                          *words.split()], "train")
    assert len(config.notes) == bool(note) and note in "".join(config.notes)


def test_a_record_of_a_run_is_no_config(tmp_path):
    path = tmp_path / "train_config.json"
    path.write_text('{"lora_rank": 4, "versions": {"torch": "2"}}')
    with pytest.raises(ValueError, match="'versions' .a train_config.json records a run: give"):
        load_config([str(path)], "train")
