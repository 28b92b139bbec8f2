"""settings/config.py: LLaMA-Factory's keys are known, with its defaults; --keys prints the table.

The names and defaults below were read from LLaMA-Factory 0.9.5 and transformers 5.6
(dataclasses.fields of their argument classes), so the table is compared with an independent source.
"""
import re
import subprocess
import sys
import time

from settings.config import (DATA, FIXED, FREE, IGNORED, KEYS, NO_EFFECT, REFUSED, UNUSED, Config,
                            as_dict, in_steps)
from tests.common import ROOT

PEER_KEYS = """
    accelerator_config adam_beta1 adam_beta2 adam_epsilon adapter_folder adapter_name_or_path
    add_special_tokens add_tokens additional_target apollo_layerwise apollo_proj
    apollo_proj_type apollo_rank apollo_scale apollo_scale_front apollo_scale_type apollo_target
    apollo_update_interval asft_alpha audio_sampling_rate auto_find_batch_size
    average_tokens_across_devices badam_mask_mode badam_mode badam_start_block
    badam_switch_interval badam_switch_mode badam_update_ratio badam_verbose batch_eval_metrics
    bf16 bf16_full_eval buffer_size cache_dir compute_accuracy create_new_adapter
    crop_to_patches cutoff_len data_seed data_shared_file_system dataloader_drop_last
    dataloader_num_workers dataloader_persistent_workers dataloader_pin_memory
    dataloader_prefetch_factor dataset dataset_dir ddp_backend ddp_broadcast_buffers
    ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph ddp_timeout debug deepspeed
    default_system disable_gradient_checkpointing disable_shuffling disable_tqdm do_eval
    do_predict do_sample do_train double_quantization dpo_label_smoothing eaft_alpha
    early_stopping_steps enable_jit_checkpoint enable_liger_kernel enable_thinking
    enable_torch_profiler eval_accumulation_steps eval_dataset eval_delay eval_do_concat_batches
    eval_num_beams eval_on_each_dataset eval_on_start eval_steps eval_strategy
    eval_use_gather_object export_device export_dir export_hub_model_id export_legacy_format
    export_quantization_bit export_quantization_dataset export_quantization_maxlen
    export_quantization_nsamples export_size finetuning_type flash_attn fp16 fp16_full_eval fp8
    fp8_backend fp8_enable_fsdp_float8_all_gather freeze_extra_modules freeze_language_model
    freeze_multi_modal_projector freeze_trainable_layers freeze_trainable_modules
    freeze_vision_tower fsdp fsdp_config full_determinism galore_layerwise galore_proj_type
    galore_rank galore_scale galore_target galore_update_interval generation_config
    generation_max_length generation_num_beams gradient_accumulation_steps
    gradient_checkpointing gradient_checkpointing_kwargs greater_is_better hf_hub_token
    hub_always_push hub_model_id hub_private_repo hub_revision hub_strategy hub_token
    hyper_parallel_args ignore_data_skip ignore_pad_token_for_loss image_do_pan_and_scan
    image_max_pixels image_min_pixels include_effective_tokens_per_second include_for_metrics
    include_num_input_tokens_seen infer_backend infer_dtype init_special_tokens interleave_probs
    kt_expert_checkpoint_path kt_lora_expert_intermediate_size kt_lora_expert_num
    kt_use_lora_experts kt_weight_path kto_chosen_weight kto_rejected_weight label_names
    label_smoothing_factor ld_alpha learning_rate length_column_name length_penalty
    liger_kernel_config load_best_model_at_end local_rank log_level log_level_replica
    log_on_each_node logging_dir logging_first_step logging_nan_inf_filter logging_steps
    logging_strategy lora_alpha lora_dropout lora_rank lora_target loraplus_lr_embedding
    loraplus_lr_ratio low_cpu_mem_usage lr_scheduler_kwargs lr_scheduler_type mask_history
    master_addr master_port max_grad_norm max_length max_new_tokens max_samples max_steps
    media_dir metric_for_best_model mix_strategy mixture_of_depths model_name_or_path
    model_revision module_dropout moe_aux_loss_coef ms_hub_token neat_packing
    neftune_noise_alpha new_special_tokens_config num_beams num_train_epochs offload_folder
    oft_block_size oft_rank oft_target om_hub_token optim optim_args optim_target_modules
    output_dir overwrite_cache overwrite_output_dir packing parallelism_config
    per_device_eval_batch_size per_device_train_batch_size pissa_convert pissa_init pissa_iter
    plot_loss ppo_buffer_size ppo_epochs ppo_score_norm ppo_target ppo_whiten_rewards
    predict_with_generate prediction_loss_only pref_bco_weight pref_beta pref_ftx pref_loss
    preprocessing_batch_size preprocessing_num_workers preserve_thinking print_param_status
    profile_modules profiler_active_steps profiler_output_dir profiler_profile_memory
    profiler_record_shapes profiler_repeat profiler_wait_steps profiler_warmup_steps
    profiler_with_stack project pure_bf16 push_to_hub quantization_bit quantization_device_map
    quantization_method quantization_type ray_init_kwargs ray_num_workers ref_model
    ref_model_adapters ref_model_quantization_bit remove_unused_columns repetition_penalty
    report_to resize_vocab restore_callback_states_from_checkpoint resume_from_checkpoint
    reward_model reward_model_adapters reward_model_quantization_bit reward_model_type
    rope_scaling run_name save_on_each_node save_only_model save_steps save_strategy
    save_total_limit seed sglang_config sglang_lora_backend sglang_maxlen sglang_mem_fraction
    sglang_tp_size shift_attn simpo_gamma skip_memory_metrics skip_special_tokens
    sortish_sampler split_special_tokens stage streaming swanlab_api_key swanlab_lark_secret
    swanlab_lark_webhook_url swanlab_logdir swanlab_mode swanlab_project swanlab_run_name
    swanlab_workspace temperature template tf32 tokenized_path tool_format top_k top_p
    torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps
    trackio_bucket_id trackio_space_id trackio_static_space_id train_from_scratch
    train_on_prompt train_sampling_strategy trust_remote_code upcast_layernorm
    upcast_lmhead_output use_adam_mini use_apollo use_asft_loss use_audio_in_video use_badam
    use_cache use_cpu use_dft_loss use_dora use_eaft_loss use_fast_tokenizer use_galore
    use_hyper_parallel use_kt use_kv_cache use_liger_kernel use_llama_pro use_mca use_muon
    use_reentrant_gc use_rslora use_swanlab use_unsloth use_unsloth_gc use_v1_kernels val_size
    video_fps video_max_pixels video_maxlen video_min_pixels vllm_config vllm_enforce_eager
    vllm_gpu_util vllm_max_lora_rank vllm_maxlen warmup_ratio warmup_steps weight_decay task
    task_dir batch_size lang n_shot save_dir
""".split()
PEER_DEFAULTS = (       # (default in LLaMA-Factory 0.9.5, keys with this default)
    (None, """
        model_name_or_path adapter_name_or_path cache_dir export_dir template dataset
        eval_dataset max_samples packing tool_format default_system additional_target
        lora_alpha loraplus_lr_ratio early_stopping_steps output_dir neftune_noise_alpha
        moe_aux_loss_coef disable_tqdm eval_steps save_total_limit metric_for_best_model
        data_seed freeze_extra_modules quantization_bit resume_from_checkpoint warmup_ratio
        tokenized_path preprocessing_num_workers torch_compile ref_model ref_model_adapters
        deepspeed interleave_probs hyper_parallel_args
     """),
    (None, "add_tokens add_special_tokens new_special_tokens_config"),
    ("noise_init", "init_special_tokens"),
    (False, """
        resize_vocab disable_gradient_checkpointing fp8 train_from_scratch train_on_prompt
        split_special_tokens mask_history neat_packing preserve_thinking create_new_adapter
        use_rslora use_dora pissa_init pissa_convert pure_bf16 use_muon use_galore
        disable_shuffling plot_loss bf16 fp16 logging_first_step save_only_model
        load_best_model_at_end use_cpu dataloader_drop_last do_eval overwrite_output_dir
        overwrite_cache full_determinism ignore_data_skip galore_layerwise
     """),
    (True, "enable_thinking do_sample skip_special_tokens double_quantization"),
    ("bnb", "quantization_method"),
    ("concat", "mix_strategy"),
    ("nf4", "quantization_type"),
    ("auto", "flash_attn infer_dtype"),
    ("main", "model_revision"),
    ("cpu", "export_device"),
    ("data", "dataset_dir"),
    (["all"], "lora_target freeze_trainable_modules galore_target apollo_target"),
    (16, "galore_rank pissa_iter apollo_rank"),
    (200, "galore_update_interval apollo_update_interval"),
    (32, "apollo_scale"),
    ("random", "apollo_proj"),
    ("channel", "apollo_scale_type"),
    (False, "use_hyper_parallel use_apollo apollo_scale_front apollo_layerwise use_badam"),
    ("layer", "badam_mode"),
    (None, "rope_scaling badam_start_block export_quantization_bit export_quantization_dataset"),
    ("ascending", "badam_switch_mode"),
    (50, "badam_switch_interval"),
    (0.05, "badam_update_ratio"),
    ("adjacent", "badam_mask_mode"),
    (2, "galore_scale"),
    (2, "freeze_trainable_layers"),
    ("sigmoid", "pref_loss"),
    (0.1, "pref_beta asft_alpha"),
    (1.0, "kto_chosen_weight kto_rejected_weight eaft_alpha"),
    ("sft", "stage"),
    ("lora", "finetuning_type"),
    ("linear", "lr_scheduler_type"),
    ("adamw_torch_fused", "optim"),
    ("no", "eval_strategy"),
    (False, "streaming bf16_full_eval fp16_full_eval"),
    ("steps", "save_strategy logging_strategy"),
    ({}, "lr_scheduler_kwargs"),
    (5, "export_size"),
    (2048, "cutoff_len"),
    (1000, "preprocessing_batch_size"),
    (0, "eval_delay label_smoothing_factor val_size lora_dropout pref_ftx dpo_label_smoothing"),
    (0.5, "simpo_gamma"),
    (0, "weight_decay warmup_steps badam_verbose"),
    (8, "lora_rank per_device_train_batch_size per_device_eval_batch_size"),
    (0.95, "temperature"),
    (0.7, "top_p"),
    (50, "top_k"),
    (42, "seed"),
    (1024, "max_length max_new_tokens export_quantization_maxlen"),
    (128, "export_quantization_nsamples"),
    (1, "repetition_penalty max_grad_norm gradient_accumulation_steps"),
    (3, "num_train_epochs"),
    (-1, "max_steps"),
    (5e-5, "learning_rate"),
    (0.9, "adam_beta1"),
    (0.999, "adam_beta2"),
    (1e-8, "adam_epsilon"),
    (500, "logging_steps save_steps"),
    (180_000_000, "ddp_timeout"),
    ([], "fsdp"),
    (False, "do_predict predict_with_generate use_swanlab use_dft_loss use_eaft_loss"),
    (False, "use_asft_loss use_llama_pro use_adam_mini compute_accuracy eval_on_start"),
    (False, "eval_on_each_dataset"),
    (0, "oft_rank"),
    (32, "oft_block_size"),
    (["all"], "oft_target"),
    (0.0, "module_dropout"),
    (None, "do_train"),
    ([], "report_to"),
    (None, "run_name logging_dir swanlab_workspace swanlab_run_name swanlab_logdir"),
    (None, "reward_model reward_model_adapters reward_model_quantization_bit"),
    ("lora", "reward_model_type"),
    (1, "ppo_buffer_size"),
    (4, "ppo_epochs"),
    (6.0, "ppo_target"),
    (False, "ppo_score_norm ppo_whiten_rewards"),
    (None, "task save_dir"),
    ("evaluation", "task_dir"),
    ("en", "lang"),
    (5, "n_shot"),
    ("huggingface", "project infer_backend"),
    ("llamafactory", "swanlab_project"),
    ("cloud", "swanlab_mode"),
)
OWN_KEYS = [name for name, spec in KEYS.items() if spec.metadata["own"]]


# ---- the table against LLaMA-Factory -------------------------------------------------------------


def test_every_key_of_llama_factory_is_known():
    assert [name for name in PEER_KEYS if name not in KEYS and name not in UNUSED] == []
    assert [name for name in KEYS if name in UNUSED] == []
    refused = " ".join(names for _, names, _ in REFUSED)
    rows = " ".join(NO_EFFECT.values()).split() + re.sub(r"=\S+", "", refused).split()
    assert len(rows) == len(set(rows))
    assert set(KEYS) - set(PEER_KEYS) == set(OWN_KEYS)


def test_defaults_equal_llama_factorys():
    ours = as_dict(Config())
    peers = {name: default for default, names in PEER_DEFAULTS for name in names.split()}
    assert {name: value for name, value in ours.items() if name not in OWN_KEYS} == peers


# ---- the columns ---------------------------------------------------------------------------------


def test_every_key_states_whether_resuming_allows_a_change():
    assert [name for name, spec in KEYS.items()
            if spec.metadata["on_resume"] not in (FIXED, DATA, FREE, IGNORED)] == []


def test_only_names_methods_stages_and_scripts():
    choices = KEYS["finetuning_type"].metadata["choices"] + KEYS["stage"].metadata["choices"]
    for name, spec in KEYS.items():
        for reader in spec.metadata["only"]:
            file = reader.replace(".", "/", reader.count(".") - reader.endswith(".py"))
            is_script = (ROOT / file).is_file() or (ROOT / f"{file}.py").is_file()
            assert reader in choices or is_script, (name, reader)


def test_every_key_is_read_by_some_script():
    files = [path for path in [*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py")]
             if path.name not in ("config.py", "load_config.py")
             and path.parent.name not in ("tests", "bench")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    # all values of each of these mean the same
    alike = {"metric_for_best_model", "optim", "quantization_method"}
    unread = [name for name in KEYS
              if not re.search(rf"\b(config|c)\.{name}\b|\"{name}\"", text)]
    assert set(unread) <= alike


def test_steps_or_fraction_of_steps():
    assert [in_steps(value, 30) for value in (1, 500, 0.1, 0.5, 0.101)] == [1, 500, 3, 15, 4]


# ---- as a program --------------------------------------------------------------------------------


def test_keys_prints_every_key_quickly_and_without_torch():
    start = time.time()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "settings.config", "--keys"],
        capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0
    assert time.time() - start < 2      # about 0.05 s where nothing else runs
    assert "torch" not in done.stderr and "yaml" not in done.stderr
    for name in [*KEYS, *UNUSED]:
        assert re.search(rf"(?m)(^|[\s,]){name}\b", done.stdout), name
    assert "learning_rate: 5e-05    (float)" in done.stdout
    assert "stage: sft    (sft|pt|rm|dpo|kto|ppo|grpo|distill)" in done.stdout
    assert "lora_rank: 8    (int)    only lora" in done.stdout
    assert all(spec.metadata["help"] in re.sub(r"\s+", " ", done.stdout) for spec in KEYS.values())
