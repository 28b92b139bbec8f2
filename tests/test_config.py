"""config.py: what people write means what they mean, what LLaMA-Factory knows is known, mistakes are named.

The names and defaults below were read from LLaMA-Factory 0.9.5 and transformers 5.6 (dataclasses.fields of their
argument classes), so they judge our table from outside.

Read next: config.py.
"""
import dataclasses
import errno
import json
import os
import re
import subprocess
import sys
import time

import pytest

import config as settings
import errors
from config import COMMANDS, Config, KEYS, UNUSED, as_dict, in_steps
from runtime.load_config import ignored_keys, load_config, non_default
from tests.common import GOLDEN, ROOT, SHARED, needs_shared

PEER_KEYS = """
    accelerator_config adam_beta1 adam_beta2 adam_epsilon adapter_folder adapter_name_or_path add_special_tokens
    add_tokens additional_target apollo_layerwise apollo_proj apollo_proj_type apollo_rank apollo_scale
    apollo_scale_front apollo_scale_type apollo_target apollo_update_interval asft_alpha audio_sampling_rate
    auto_find_batch_size average_tokens_across_devices badam_mask_mode badam_mode badam_start_block
    badam_switch_interval badam_switch_mode badam_update_ratio badam_verbose batch_eval_metrics bf16 bf16_full_eval
    buffer_size cache_dir compute_accuracy create_new_adapter crop_to_patches cutoff_len data_seed
    data_shared_file_system dataloader_drop_last dataloader_num_workers dataloader_persistent_workers
    dataloader_pin_memory dataloader_prefetch_factor dataset dataset_dir ddp_backend ddp_broadcast_buffers
    ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph ddp_timeout debug deepspeed default_system
    disable_gradient_checkpointing disable_shuffling disable_tqdm do_eval do_predict do_sample do_train
    double_quantization dpo_label_smoothing eaft_alpha early_stopping_steps enable_jit_checkpoint enable_liger_kernel
    enable_thinking enable_torch_profiler eval_accumulation_steps eval_dataset eval_delay eval_do_concat_batches
    eval_num_beams eval_on_each_dataset eval_on_start eval_steps eval_strategy eval_use_gather_object export_device
    export_dir export_hub_model_id export_legacy_format export_quantization_bit export_quantization_dataset
    export_quantization_maxlen export_quantization_nsamples export_size finetuning_type flash_attn fp16 fp16_full_eval
    fp8 fp8_backend fp8_enable_fsdp_float8_all_gather freeze_extra_modules freeze_language_model
    freeze_multi_modal_projector freeze_trainable_layers freeze_trainable_modules freeze_vision_tower fsdp fsdp_config
    full_determinism galore_layerwise galore_proj_type galore_rank galore_scale galore_target galore_update_interval
    generation_config generation_max_length generation_num_beams gradient_accumulation_steps gradient_checkpointing
    gradient_checkpointing_kwargs greater_is_better hf_hub_token hub_always_push hub_model_id hub_private_repo
    hub_revision hub_strategy hub_token hyper_parallel_args ignore_data_skip ignore_pad_token_for_loss
    image_do_pan_and_scan image_max_pixels image_min_pixels include_effective_tokens_per_second include_for_metrics
    include_num_input_tokens_seen infer_backend infer_dtype init_special_tokens interleave_probs
    kt_expert_checkpoint_path kt_lora_expert_intermediate_size kt_lora_expert_num kt_use_lora_experts kt_weight_path
    kto_chosen_weight kto_rejected_weight label_names label_smoothing_factor ld_alpha learning_rate length_column_name
    length_penalty liger_kernel_config load_best_model_at_end local_rank log_level log_level_replica log_on_each_node
    logging_dir logging_first_step logging_nan_inf_filter logging_steps logging_strategy lora_alpha lora_dropout
    lora_rank lora_target loraplus_lr_embedding loraplus_lr_ratio low_cpu_mem_usage lr_scheduler_kwargs
    lr_scheduler_type mask_history master_addr master_port max_grad_norm max_length max_new_tokens max_samples
    max_steps media_dir metric_for_best_model mix_strategy mixture_of_depths model_name_or_path model_revision
    module_dropout moe_aux_loss_coef ms_hub_token neat_packing neftune_noise_alpha new_special_tokens_config num_beams
    num_train_epochs offload_folder oft_block_size oft_rank oft_target om_hub_token optim optim_args
    optim_target_modules output_dir overwrite_cache overwrite_output_dir packing parallelism_config
    per_device_eval_batch_size per_device_train_batch_size pissa_convert pissa_init pissa_iter plot_loss
    ppo_buffer_size ppo_epochs ppo_score_norm ppo_target ppo_whiten_rewards predict_with_generate prediction_loss_only
    pref_bco_weight pref_beta pref_ftx pref_loss preprocessing_batch_size preprocessing_num_workers preserve_thinking
    print_param_status profile_modules profiler_active_steps profiler_output_dir profiler_profile_memory
    profiler_record_shapes profiler_repeat profiler_wait_steps profiler_warmup_steps profiler_with_stack project
    pure_bf16 push_to_hub quantization_bit quantization_device_map quantization_method quantization_type
    ray_init_kwargs ray_num_workers ref_model ref_model_adapters ref_model_quantization_bit remove_unused_columns
    repetition_penalty report_to resize_vocab restore_callback_states_from_checkpoint resume_from_checkpoint
    reward_model reward_model_adapters reward_model_quantization_bit reward_model_type rope_scaling run_name
    save_on_each_node save_only_model save_steps save_strategy save_total_limit seed sglang_config sglang_lora_backend
    sglang_maxlen sglang_mem_fraction sglang_tp_size shift_attn simpo_gamma skip_memory_metrics skip_special_tokens
    sortish_sampler split_special_tokens stage streaming swanlab_api_key swanlab_lark_secret swanlab_lark_webhook_url
    swanlab_logdir swanlab_mode swanlab_project swanlab_run_name swanlab_workspace temperature template tf32
    tokenized_path tool_format top_k top_p torch_compile torch_compile_backend torch_compile_mode
    torch_empty_cache_steps trackio_bucket_id trackio_space_id trackio_static_space_id train_from_scratch
    train_on_prompt train_sampling_strategy trust_remote_code upcast_layernorm upcast_lmhead_output use_adam_mini
    use_apollo use_asft_loss use_audio_in_video use_badam use_cache use_cpu use_dft_loss use_dora use_eaft_loss
    use_fast_tokenizer use_galore use_hyper_parallel use_kt use_kv_cache use_liger_kernel use_llama_pro use_mca
    use_muon use_reentrant_gc use_rslora use_swanlab use_unsloth use_unsloth_gc use_v1_kernels val_size video_fps
    video_max_pixels video_maxlen video_min_pixels vllm_config vllm_enforce_eager vllm_gpu_util vllm_max_lora_rank
    vllm_maxlen warmup_ratio warmup_steps weight_decay
    task task_dir batch_size lang n_shot save_dir
"""
PEER_DEFAULTS = (       # (default in LLaMA-Factory 0.9.5, the keys that have it)
    (None, """model_name_or_path adapter_name_or_path cache_dir export_dir template dataset eval_dataset
     max_samples packing tool_format default_system additional_target lora_alpha loraplus_lr_ratio early_stopping_steps
     output_dir neftune_noise_alpha moe_aux_loss_coef disable_tqdm eval_steps save_total_limit metric_for_best_model data_seed
     freeze_extra_modules quantization_bit
     resume_from_checkpoint warmup_ratio tokenized_path preprocessing_num_workers torch_compile ref_model
     ref_model_adapters"""),    # torch_compile: false
    (False, """disable_gradient_checkpointing train_from_scratch train_on_prompt split_special_tokens mask_history neat_packing
     preserve_thinking create_new_adapter use_rslora use_dora
     pissa_init pissa_convert pure_bf16 use_muon use_galore disable_shuffling plot_loss bf16 fp16 logging_first_step
     save_only_model load_best_model_at_end use_cpu dataloader_drop_last do_eval overwrite_output_dir overwrite_cache"""),
    (True, "enable_thinking do_sample skip_special_tokens double_quantization"), ("bnb", "quantization_method"),
    ("nf4", "quantization_type"),
    ("auto", "flash_attn infer_dtype"), ("main", "model_revision"), ("cpu", "export_device"), ("data", "dataset_dir"),
    (["all"], "lora_target freeze_trainable_modules galore_target"), (16, "galore_rank pissa_iter"),
    (200, "galore_update_interval"), (2, "galore_scale"), (2, "freeze_trainable_layers"), ("sigmoid", "pref_loss"),
    (0.1, "pref_beta"), (1.0, "kto_chosen_weight kto_rejected_weight"),
    ("sft", "stage"), ("lora", "finetuning_type"), ("linear", "lr_scheduler_type"),
    ("adamw_torch_fused", "optim"), ("no", "eval_strategy"), ("steps", "save_strategy"), ({}, "lr_scheduler_kwargs"),
    (5, "export_size"), (2048, "cutoff_len"), (1000, "preprocessing_batch_size"), (0, "val_size lora_dropout pref_ftx dpo_label_smoothing"), (0.5, "simpo_gamma"),
    (0, "weight_decay warmup_steps"), (8, "lora_rank per_device_train_batch_size per_device_eval_batch_size"),
    (0.95, "temperature"), (0.7, "top_p"), (50, "top_k"), (42, "seed"),
    (1024, "max_length max_new_tokens"), (1, "repetition_penalty max_grad_norm gradient_accumulation_steps"),
    (3, "num_train_epochs"), (-1, "max_steps"), (5e-5, "learning_rate"), (0.9, "adam_beta1"), (0.999, "adam_beta2"),
    (1e-8, "adam_epsilon"), (500, "logging_steps save_steps"), (180_000_000, "ddp_timeout"), ([], "fsdp"),
    (False, "do_predict predict_with_generate use_swanlab"), (None, "do_train"),       # the last: false
    ([], "report_to"), (None, "run_name logging_dir swanlab_workspace swanlab_run_name swanlab_logdir"),
    (None, "task save_dir"), ("evaluation", "task_dir"), ("en", "lang"), (5, "n_shot"),
    ("huggingface", "project"), ("llamafactory", "swanlab_project"), ("cloud", "swanlab_mode"),
)
PEER_OFF = {            # values of keys we refuse that are LLaMA-Factory's defaults: they must pass
    "infer_backend": "huggingface", "mix_strategy": "concat", "ignore_pad_token_for_loss": "true", "num_beams": "1",
    "label_smoothing_factor": "0.0", "logging_strategy": "steps", "eval_delay": "0",
    "train_sampling_strategy": "random", "galore_proj_type": "std", "save_safetensors": "true",
}


def load(*argv, script="config"):
    """The Config of a command line; script "config" asks for no particular key."""
    return load_config(list(argv), script)


def write(folder, text, name="x.yaml"):
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def refusal(*argv, script="config"):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load(*argv, script=script)
    return str(caught.value)


# ---- the table against LLaMA-Factory

def test_every_key_of_the_peer_is_known_and_in_one_table():
    assert [name for name in PEER_KEYS.split() if name not in KEYS and name not in UNUSED] == []
    assert [name for name in KEYS if name in UNUSED] == []
    refused = " ".join(names for _, names, _ in settings.REFUSED)
    rows = [*" ".join(settings.NO_EFFECT.values()).split(), *re.sub(r"=\S+", "", refused).split()]
    assert len(rows) == len(set(rows))
    assert set(KEYS) - set(PEER_KEYS.split()) == set(settings.OWN_KEYS)


def test_defaults_are_the_peers():
    ours = as_dict(Config())
    peers = {name: default for default, names in PEER_DEFAULTS for name in names.split()}
    assert {name: value for name, value in ours.items() if name not in settings.OWN_KEYS} == peers


@pytest.mark.parametrize("name", [name for name, row in UNUSED.items() if row])
def test_refused_keys_pass_when_they_are_off_and_stop_when_on(name):
    off = PEER_OFF.get(name, "false")
    scope = UNUSED[name][0].replace("any", "train").replace("train", "config")
    needed = ["model_name_or_path=m", "export_dir=e", "adapter_name_or_path=a"]
    assert ignored_keys(load(f"{name}={off}", *needed, script=scope)) == []
    assert ignored_keys(load(f"{name}=null", *needed, script=scope)) == []
    message = refusal(f"{name}=surprise", *needed, script=scope)
    assert message.startswith(f"command line: {name}: surprise: ") and UNUSED[name][2] in message


def test_training_keys_do_not_stop_chat_and_merge():
    argv = ["model_name_or_path=m", "deepspeed=z3.json", "stage=dpo", "finetuning_type=oft", "use_llama_pro=true",
            "bf16=true", "fp16=true", "eval_strategy=steps", "infer_backend=vllm"]
    config = load(*argv, "export_dir=e", "adapter_name_or_path=a", script="merge")
    assert config.stage == "dpo" and ignored_keys(config) == ["deepspeed", "use_llama_pro", "infer_backend"]
    assert "infer_backend" in refusal(*argv, script="chat")
    assert "deepspeed" in refusal(*argv, script="train")


def test_ignored_keys_are_listed():
    config = load("trust_remote_code=true", "lora_rank=4", "ddp_timeout=180000000", "bf16=true")
    assert ignored_keys(config) == ["trust_remote_code"]
    assert ignored_keys(load("finetuning_type=full", "lora_rank=4")) == ["lora_rank"]


def test_every_key_is_read_by_some_script():
    scripts = [path for path in [*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py")]
               if path.name not in ("config.py", "load_config.py") and path.parent.name not in ("tests", "bench")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in scripts)
    alike = {"metric_for_best_model", "optim"}          # each has values that mean the same
    assert [name for name in KEYS if name not in alike and not re.search(rf"config\.{name}\b|\"{name}\"", text)] == []


# ---- the shared files

@needs_shared
def test_published_yaml_of_a_lora_run():
    config = load("--config", str(SHARED / "configs/llama3_lora_sft.yaml"), script="train")
    assert (config.dataset, config.learning_rate, config.lora_alpha) == (["identity", "alpaca_en_demo"], 1e-4, 16)
    assert config.resume_from_checkpoint is None and config.bf16 is True and config.warmup_ratio == 0.1
    assert ignored_keys(config) == ["trust_remote_code", "dataloader_num_workers"]
    assert load(str(SHARED / "configs/llama3_lora_sft.yaml"), script="chat").template == "llama3"
    merge = load(str(SHARED / "configs/llama3_lora_sft.yaml"), "export_dir=out", script="merge")
    assert merge.output_dir == "saves/llama3-8b/lora/sft"


@needs_shared
def test_published_json_files():
    train = load("--config", str(SHARED / "configs/train_llama3_qlora.json"), script="train")
    assert (train.fp16, train.learning_rate, train.loraplus_lr_ratio, train.max_samples) == (True, 5e-5, 16.0, 500)
    chat = load(str(SHARED / "configs/chat_llama3.json"), script="chat")
    assert (chat.adapter_name_or_path, chat.temperature) == (["llama3_lora"], 0.95)


@needs_shared
def test_published_merge_file():
    merge = load(str(SHARED / "configs/merge_llama3_lora_sft.yaml"), script="merge")
    assert (merge.export_size, merge.export_device, merge.export_dir) == (4, "cpu", "models/llama3_lora_sft")
    assert ignored_keys(merge) == ["export_legacy_format"]


@needs_shared
def test_published_flags_without_a_file():
    argv = (SHARED / "configs/cli_flags_llama3.txt").read_text(encoding="utf-8").split()
    config = load(*argv, script="train")
    assert (config.dataset, config.num_train_epochs, config.packing, config.optim) == (
        ["identity", "fintech"], 10.0, False, "adamw_torch")
    assert (config.source, config.given["packing"], config.warmup_steps) == ("command line", False, 0)


@needs_shared
@pytest.mark.parametrize("path", sorted(GOLDEN.glob("curves/*/config.yaml")), ids=lambda path: path.parent.name)
def test_recorded_runs(path):
    script = "merge" if path.parent.name.startswith("export") else "train"
    config = load(str(path), script=script)
    assert ignored_keys(config) == []
    assert config.neat_packing is (path.parent.name == "sft_packing")           # docs/differences.md
    assert config.packing is (path.parent.name in ("sft_packing", "pt"))


# ---- what was written, and what it means

@pytest.mark.parametrize("name, text, value", [
    ("learning_rate", "1e-4", 1e-4), ("learning_rate", "5e-05", 5e-5), ("learning_rate", "1", 1.0),
    ("max_samples", "1e3", 1000), ("max_samples", "500.0", 500), ("max_samples", "null", None),
    ("max_samples", "", None), ("cutoff_len", "null", 2048), ("seed", "007", 7), ("max_steps", "-1", -1),
    ("bf16", "True", True), ("bf16", "yes", True), ("bf16", "off", False), ("bf16", "1", True),
    ("enable_thinking", "none", None), ("enable_thinking", "false", False), ("max_grad_norm", "null", 0.0),
    ("save_strategy", "no", "no"), ("eval_strategy", "none", "no"), ("save_strategy", "False", "no"),
    ("lr_scheduler_type", "Cosine", "cosine"), ("template", "none", None), ("template", "qwen", "qwen"),
    ("template", '{"based_on": "qwen", "stop": ["a"]}', {"based_on": "qwen", "stop": ["a"]}),
    ("dataset", "a, b", ["a", "b"]), ("dataset", "[a, b]", ["a", "b"]), ("lora_target", "q_proj", ["q_proj"]),
    ("save_steps", "100.0", 100), ("save_steps", "0.1", 0.1), ("resume_from_checkpoint", "True", "true"),
    ("resume_from_checkpoint", "false", None), ("resume_from_checkpoint", "out/checkpoint-5", "out/checkpoint-5"),
    ("placeholders", '{"name": "Max", "n": 007}', {"name": "Max", "n": "007"}),
    ("lr_scheduler_kwargs", '{"min_lr": 1e-6, "decay_type": "linear"}', {"min_lr": 1e-6, "decay_type": "linear"}),
])
def test_text_means_what_people_mean(tmp_path, name, text, value):
    extra = "" if not text.startswith("{") else "'"
    from_file = load(write(tmp_path, f"{name}: {extra}{text}{extra}\n"))
    for config in (from_file, load(f"{name}={text}"), load(f"--{name}={text}"), load(f"--{name}", text)):
        got = getattr(config, name)
        assert got == value and type(got) is type(value)


def test_json_values(tmp_path):
    text = ('\ufeff{"bf16": true, "packing": null, "learning_rate": 1e-4, "lora_rank": 4, "dataset": ["a", "b"],'
            '"placeholders": {"name": "\\ud83d\\ude00"}, "lr_scheduler_kwargs": {"min_lr": 1e-06}, "raw": "True"}')
    config = load(write(tmp_path, text, "x.json"))
    assert (config.bf16, config.learning_rate, config.lora_rank, config.dataset) == (True, 1e-4, 4, ["a", "b"])
    assert (config.placeholders, config.lr_scheduler_kwargs, config.raw) == ({"name": "😀"}, {"min_lr": 1e-6}, True)


def test_yaml_lists_and_mappings(tmp_path):
    text = "dataset: [a, b]\nplaceholders:\n  name: Pip\n  author: The Makers\neval_dataset:\n- c\n"
    config = load(write(tmp_path, text), "placeholders.name=Max")
    assert (config.dataset, config.eval_dataset) == (["a", "b"], ["c"])
    assert config.placeholders == {"name": "Max", "author": "The Makers"}
    assert load(write(tmp_path, "placeholders:\n"), "placeholders.name=Max").placeholders == {"name": "Max"}


def test_command_line_replaces_the_file(tmp_path):
    path = write(tmp_path, "seed: 1\nlora_rank: 4\n")
    for argv in (["--config", path], [f"--config={path}"], [path]):
        config = load(*argv, "seed=2", "--bf16", "--lora-dropout", "0.1", "--packing", "no", "--max_steps", "-1",
                      "--plot_loss")
        assert (config.seed, config.lora_rank, config.bf16, config.lora_dropout) == (2, 4, True, 0.1)
        assert (config.packing, config.max_steps, config.plot_loss) == (False, -1, True)
        assert config.source == path and config.given["seed"] == 2 and "cutoff_len" not in config.given


def test_a_switch_does_not_swallow_the_file(tmp_path):
    path = write(tmp_path, "seed: 1\n")
    config = load("--bf16", path)
    assert config.bf16 is True and config.seed == 1
    assert load("--prompt", "is 2=2?", "--raw").prompt == "is 2=2?"


def test_spellings_of_earlier_releases():
    assert load("evaluation_strategy=epoch", "val_size=0.1").eval_strategy == "epoch"
    assert load("no_cuda=true").use_cpu is True


# ---- what follows from other keys

def test_derived_defaults():
    assert load("lora_rank=6").lora_alpha == 12 and load("lora_rank=6", "lora_alpha=6").lora_alpha == 6
    config = load("eval_strategy=steps", "val_size=10", "logging_steps=7")
    assert (config.eval_steps, config.do_eval) == (7, True)
    assert load().packing is False and load("stage=pt").packing is True


@pytest.mark.parametrize("argv, packing, apart", [
    (["packing=true"], True, True), (["packing=true", "neat_packing=false"], True, False),
    (["neat_packing=true"], True, True), (["packing=false"], False, False),
    (["packing=true", "stage=pt"], True, False)])
def test_packing_keeps_samples_apart_unless_told(argv, packing, apart):
    config = load(*argv)
    assert (config.packing, config.neat_packing) == (packing, apart)


def test_steps_or_share_of_steps():
    assert [in_steps(value, 30) for value in (1, 500, 0.1, 0.5, 0.101)] == [1, 500, 3, 15, 4]


def test_settings_survive_a_json_file(tmp_path):
    first = load("model_name_or_path=m", "dataset=a,b", "packing=true", "warmup_ratio=0.1", "eval_strategy=epoch",
                 "val_size=0.2", "placeholders.name=Max", "lr_scheduler_kwargs.power=2", "resume_from_checkpoint=true",
                 "enable_thinking=null")
    second = load(write(tmp_path, json.dumps(as_dict(first)), "x.json"))
    assert as_dict(second) == as_dict(first)


def test_start_page_shows_only_what_differs():
    assert non_default(load()) == {}
    assert non_default(load("seed=42", "lora_rank=4")) == {"lora_rank": 4, "lora_alpha": 8}


# ---- mistakes

def test_unknown_key_names_the_nearest(tmp_path):
    path = write(tmp_path, "# comment\nlora_alfa: 3\n")
    assert refusal(path) == (f"{path} line 2: unknown key 'lora_alfa' (did you mean 'lora_alpha'?). "
                             "All keys: python config.py --keys")
    assert refusal("lora_rank.x=3").startswith("command line: unknown key 'lora_rank.x'")
    assert refusal("fsdp_config.x=3").startswith("command line: unknown key 'fsdp_config.x'")
    assert "did you mean" not in refusal("qqqqqq=3")


def test_a_chat_format_written_out_survives_the_way_through_json(tmp_path):
    path = write(tmp_path, """template:
  name: mychat
  user: "<user>{{content}}</user>\\n<bot>"
  assistant: ["{{content}}", {token: eos}]
  stop_is_eos: true
  stop: ["</bot>"]
""")
    config = load(path)
    assert config.template == {"name": "mychat", "user": "<user>{{content}}</user>\n<bot>", "stop_is_eos": "true",
                               "assistant": ["{{content}}", {"token": "eos"}], "stop": ["</bot>"]}
    again = load(write(tmp_path, json.dumps(as_dict(config)), "again.json"))
    assert again.template == config.template == non_default(config)["template"]
    assert load(path, "template=qwen").template == "qwen"  # the command line wins, as for every key
    assert "needs quotes" in refusal(write(tmp_path, "template:\n  user: {{content}}\n"))


@pytest.mark.parametrize("text, part", [
    ("lora_rank: eight", "line 1: lora_rank: 'eight' is not a whole number"),
    ("lora_rank: 2.5", "'2.5' is not a whole number"), ("lora_rank: true", "'true' is not a whole number"),
    ("lora_rank: 0", "must be at least 1"), ("cutoff_len: 0", "at least 1"), ("save_total_limit: 0", "at least 1"),
    ("learning_rate: 1,5", "'1,5' is not a number"), ("learning_rate: nan", "not a number"),
    ("learning_rate: -1e-4", "above 0"), ("num_train_epochs: 0", "must be above 0"), ("top_p: 1.5", "at most 1"),
    ("bf16: maybe", "not true or false"), ("bf16: [true]", "not true or false"),
    ("template: [a]", "not the name of a chat format"),
    ("dataset: {a: b}", "not a list of names"), ("placeholders: Max", "not a mapping"),
    ("save_steps: 1.5", "share below 1"),
    ("stage: sftt", "none of sft, pt, rm, dpo, kto (did you mean 'sft'?)"), ("stage: ppo", "not in this release yet"),
    ("finetuning_type: oft", "not in this release yet"), ("optim: adafactor", "none of adamw_torch_fused"),
    ("seed: 1\nseed: 2", "line 2: seed was already set on line 1"),
    ("lr_scheduler_kwargs:\n  power: 1\n  power: 2", "line 3: power was already set on line 2"),
    ("eval_strategy: no\nevaluation_strategy: no", "line 2: eval_strategy was already set at"),
    ("a: [1\nb: 2", "not valid YAML"), ("\tseed: 1", "line 1: not valid YAML"), ("- a", "key: value"),
    ("seed: 1\n\tbf16: true", "with spaces, not with tabs"), ("seed: 4294967296", "at most 4294967295"),
    ("adam_beta1: 1", "must be below 1"),
    ("", "key: value"), ("lr_scheduler_kwargs: {power: 1, power: 2}", "power was already set on line 1"),
    ("default_system: {{name}}", "line 1: a text with braces or brackets needs quotes"),
])
def test_mistakes_in_a_yaml_file(tmp_path, text, part):
    message = refusal(write(tmp_path, text + "\n"))
    assert message.startswith(str(tmp_path / "x.yaml")) and part in message


@pytest.mark.parametrize("text, part", [
    ('{"seed": 1, "seed": 2}', "seed is set twice"), ('{"seed": 1,\n}', "line 2: not valid JSON"),
    ("[1]", "this is a list"), ('{"lora_rank": true}', "'true' is not a whole number"),
    ('{"lora_alfa": 1}', "did you mean 'lora_alpha'?")])
def test_mistakes_in_a_json_file(tmp_path, text, part):
    assert part in refusal(write(tmp_path, text, "x.json"))


def test_mistakes_on_the_command_line(tmp_path):
    path = write(tmp_path, "seed: 1\n", "train.yaml")
    assert "no such config file (did you mean 'train.yaml'?)" in refusal(str(tmp_path / "trian.yaml"))
    assert "a folder, not a config file" in refusal(str(tmp_path))
    assert "--lora_rank needs a value" in refusal("--lora_rank", "--bf16")
    assert "'v_proj' is neither key=value" in refusal(path, "--lora_target", "q_proj", "v_proj")
    (tmp_path / "x.yaml").write_bytes(b"template: \xff\n")
    assert "not UTF-8" in refusal(str(tmp_path / "x.yaml"))


CONTRADICTORY = (
    "bf16=1 fp16=1", "quantization_bit=5", "quantization_bit=4 finetuning_type=full",
    "quantization_bit=4 fsdp=full_shard", "quantization_bit=8 base_precision=fp8 bf16=1",
    "train_on_prompt=1 mask_history=1", "stage=pt mask_history=1",
    "stage=pt neat_packing=1", "neat_packing=1 packing=0", "val_size=0.1 eval_dataset=a", "val_size=1", "val_size=2.5",
    "eval_strategy=steps", "do_eval=1", "warmup_ratio=0.1 warmup_steps=5", "early_stopping_steps=2",
    "load_best_model_at_end=1 val_size=0.1", "load_best_model_at_end=1 val_size=9 eval_strategy=epoch",
    "load_best_model_at_end=1 val_size=9 eval_strategy=steps eval_steps=3 save_steps=10",
    "load_best_model_at_end=1 val_size=9 eval_strategy=steps eval_steps=0.1 save_steps=10", "train_from_scratch=1",
    "finetuning_type=full loraplus_lr_ratio=16", "finetuning_type=full use_rslora=1",
    "finetuning_type=full create_new_adapter=1", "finetuning_type=full adapter_name_or_path=a",
    "model_name_or_path=m output_dir=./m")


@pytest.mark.parametrize("keys", CONTRADICTORY)
def test_contradictions_are_errors(keys):
    message = refusal(*keys.split())
    assert message.startswith("command line: ") and keys.split()[0].partition("=")[0].split("_")[0] in message


@pytest.mark.parametrize("keys", [
    "warmup_ratio=0.1 warmup_steps=0", "val_size=0.1 eval_strategy=steps", "bf16=1 use_cpu=1",
    "eval_dataset=a do_eval=1", "fp16=1 use_cpu=1",
    "quantization_bit=4 fp16=1 quantization_type=fp4 double_quantization=0",
    "load_best_model_at_end=1 val_size=9 eval_strategy=steps eval_steps=5 save_steps=10",
    "load_best_model_at_end=1 val_size=9 eval_strategy=epoch save_strategy=epoch", "max_steps=3 num_train_epochs=2",
    "load_best_model_at_end=1 val_size=9 eval_strategy=steps eval_steps=0.1 save_steps=0.3",
    "finetuning_type=full train_from_scratch=1", "create_new_adapter=1 adapter_name_or_path=a,b"])
def test_what_agrees_passes(keys):
    load(*keys.split())


def test_what_merge_takes_and_refuses():
    base = ["model_name_or_path=m", "export_dir=e"]
    assert load(*base, script="merge").adapter_name_or_path is None           # a conversion of dtype or shards
    assert "finetuning_type" in refusal(*base, "output_dir=o", "finetuning_type=full", script="merge")
    assert "export_dir" in refusal("model_name_or_path=m", "export_dir=m", "output_dir=o", script="merge")
    assert load(*base, "output_dir=o", script="merge").adapter_name_or_path is None


@pytest.mark.parametrize("script", ["train", "data", "chat", "eval", "merge"])
def test_missing_keys_are_named(script):
    command = COMMANDS.get(script, f"{script}.py")
    complete = [f"{name}={name}" for name in settings.SCRIPTS[script][0]] + ["adapter_name_or_path=a"]
    load(*complete, script=script)
    for i in range(len(complete) - 1):
        name = complete[i].partition("=")[0]
        message = refusal(*complete[:i], *complete[i + 1:], script=script)
        assert message.startswith(f"command line: python {command} needs '{name}'") and f"{command} --help" in message


# ---- as a program

def program(*argv):
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, cwd=ROOT, timeout=60)


def test_keys_prints_every_key_quickly_and_without_torch():
    start = time.time()
    done = program("-X", "importtime", "config.py", "--keys")
    assert done.returncode == 0 and time.time() - start < 2         # about 0.05 s where nothing else runs
    assert "torch" not in done.stderr and "yaml" not in done.stderr
    assert [name for name in [*KEYS, *UNUSED] if not re.search(rf"(?m)(^|[\s,]){name}\b", done.stdout)] == []
    assert "learning_rate: 5e-05    (float)" in done.stdout and "stage: sft    (sft|pt|rm|dpo|kto)" in done.stdout
    assert all(spec.metadata["help"] in re.sub(r"\s+", " ", done.stdout) for spec in KEYS.values())


def test_help_of_each_script(capsys):
    for script in settings.SCRIPTS:
        with pytest.raises(SystemExit) as stopped:
            load("--help", script=script)
        text = capsys.readouterr().out
        assert stopped.value.code == 0 and f"python {COMMANDS.get(script, f'{script}.py')} " in text and "config.py --keys" in text


@pytest.mark.parametrize("script", settings.SCRIPTS)
def test_help_and_mistakes_do_not_wait_for_torch(tmp_path, script):
    """A torch that ends the program when it is imported stands before the real one; the settings that are fine meet it."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise SystemExit('torch is imported')")
    (tmp_path / "torch/version.py").touch()                         # attention.py looks into it first

    def start(*argv):
        env = {**os.environ, "PYTHONPATH": str(tmp_path)}
        return subprocess.run([sys.executable, *COMMANDS.get(script, f"{script}.py").split(), *argv], capture_output=True, text=True, cwd=ROOT, env=env,
                              timeout=60)

    begun = time.time()
    done = start("--help")
    assert done.returncode == 0 and f"python {COMMANDS.get(script, f'{script}.py')} " in done.stdout and done.stderr == ""
    assert time.time() - begun < 2                                  # about 0.1 s where nothing else runs
    done = start(write(tmp_path, "model_name_or_path: m\nlora_rnak: 4\n"))
    assert done.returncode == 1 and "line 2: unknown key 'lora_rnak' (did you mean 'lora_rank'?)" in done.stderr
    done = start(*(f"{name}={name}" for name in settings.SCRIPTS[script][0]))
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "torch is imported\n")


def test_shows_a_file_or_one_error_line(tmp_path):
    done = program("-m", "runtime.load_config", write(tmp_path, "lora_rank: 4\ntrust_remote_code: true\n"))
    assert done.stdout == "lora_rank: 4\nlora_alpha: 8\naccepted, no effect here: trust_remote_code\n"
    done = program("-m", "runtime.load_config", "lora_rank=x")
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch("error: command line: lora_rank: .*\n", done.stderr)


@pytest.mark.parametrize("argv, part", [
    (["--nobf16"], "unknown key 'nobf16' (did you mean 'bf16'?)"), (["--placeholders.name"], "--placeholders.name needs a value"),
    (["--config"], "--config needs a value"), (["default_system=\udcc3\udca4"], "not UTF-8 text; where the locale")])
def test_odd_spellings_on_the_command_line(argv, part):
    assert part in refusal(*argv)


def test_output_that_cannot_show_a_character(tmp_path):
    """A pipe, or a Windows console, in an encoding without the ellipsis: ? stands for it, and the run goes on."""
    done = subprocess.run([sys.executable, "-m", "runtime.load_config", "default_system=…"], capture_output=True, cwd=ROOT, timeout=60,
                          env={**os.environ, "PYTHONIOENCODING": "latin-1"})
    assert (done.returncode, done.stdout) == (0, b"default_system: ?\n")


def raising(error):
    def main(argv):
        raise error
    return main


@pytest.mark.parametrize("error, code, text", [
    (ValueError("x.yaml: wrong"), 1, "error: x.yaml: wrong\n"), (FileNotFoundError("no m"), 1, "error: no m\n"),
    (PermissionError(errno.EACCES, "Permission denied", "out"), 1, "error: out: Permission denied\n"),
    (PermissionError(errno.EACCES, "Permission denied", "from", None, "to"), 1, "error: to: Permission denied\n"),
    (UnicodeEncodeError("ascii", "ü.json", 0, 1, ""), 1,
     "error: 'ü.json' cannot be written in the encoding ascii: set PYTHONUTF8=1\n"),
    (KeyboardInterrupt(), 130, "\ninterrupted\n")])
def test_run_script_turns_a_users_mistake_into_a_line(capsys, monkeypatch, error, code, text):
    monkeypatch.delenv("POCKET_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as stopped:
        errors.run_script(raising(error))
    assert stopped.value.code == code and capsys.readouterr().err == text


def test_run_script_has_a_sentence_for_a_full_disk(capsys):
    with pytest.raises(SystemExit):
        errors.run_script(raising(OSError(errno.ENOSPC, "No space left on device", "out/model.safetensors")))
    message = capsys.readouterr().err
    assert message.startswith("error: out/model.safetensors: no space left on the disk") and "output_dir" in message


def test_run_script_keeps_the_traceback_of_a_bug_and_on_request(monkeypatch):
    with pytest.raises(KeyError):
        errors.run_script(raising(KeyError("bug")))
    monkeypatch.setenv("POCKET_TRACEBACK", "1")
    with pytest.raises(ValueError):
        errors.run_script(raising(ValueError("wrong")))


def test_each_run_has_its_own_lists():
    first = load("lora_target=q_proj", "placeholders.name=Max")
    first.lora_target.append("v_proj")
    assert Config().lora_target == ["all"] and Config().placeholders == {}
    assert dataclasses.replace(first).lora_target == ["q_proj", "v_proj"]
