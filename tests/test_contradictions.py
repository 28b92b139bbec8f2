"""settings/contradictions.py: contradictory settings are errors, consistent ones are not."""
import pytest

from tests.common import load_argv, refusal

CONTRADICTORY = (
    "bf16=1 fp16=1",
    "quantization_bit=5",
    "quantization_bit=4 finetuning_type=full",
    "quantization_bit=4 fsdp=full_shard",
    "quantization_bit=8 base_precision=fp8 bf16=1", "fp8=1 quantization_bit=4 bf16=1",
    "train_on_prompt=1 mask_history=1",
    "stage=pt mask_history=1",
    "stage=pt neat_packing=1",
    "neat_packing=1 packing=0",
    "val_size=0.1 eval_dataset=a",
    "interleave_probs=0.5,0.5 dataset=a,b",
    "interleave_probs=1 dataset=a,b mix_strategy=interleave_under",
    "interleave_probs=0.5,0.4 dataset=a,b mix_strategy=interleave_under",
    "interleave_probs=1.5,-0.5 dataset=a,b mix_strategy=interleave_under",
    "interleave_probs=1,0 dataset=a,b mix_strategy=interleave_over",
    "val_size=1",
    "val_size=2.5",
    "eval_strategy=steps",
    "do_eval=1",
    "warmup_ratio=0.1 warmup_steps=5",
    "early_stopping_steps=2",
    "load_best_model_at_end=1 val_size=0.1",
    "load_best_model_at_end=1 val_size=9 eval_strategy=epoch",
    "load_best_model_at_end=1 val_size=9 eval_strategy=steps eval_steps=3 save_steps=10",
    "load_best_model_at_end=1 val_size=9 eval_strategy=steps eval_steps=0.1 save_steps=10",
    "eval_on_each_dataset=1 eval_dataset=a early_stopping_steps=2 eval_strategy=epoch",
    "eval_on_each_dataset=1 val_size=9 eval_strategy=epoch",
    "save_strategy=best",
    "lr_scheduler_type=reduce_lr_on_plateau",
    "eval_on_start=1",
    "bf16_full_eval=1", "fp16_full_eval=1 bf16=1",
    "use_apollo=1", "use_badam=1", "use_apollo=1 finetuning_type=full use_galore=1",
    "badam_switch_mode=fixed use_badam=1 finetuning_type=full",
    "badam_switch_interval=0 use_badam=1 finetuning_type=full",
    "use_badam=1 finetuning_type=full fp16=1",
    "label_smoothing_factor=0.1 use_dft_loss=1",
    "offload_activations=1 disable_gradient_checkpointing=1",
    "fsdp=full_shard mlp_tile=64", "fsdp=full_shard offload_activations=1",
    "ask=hello stage=pt",
    "train_from_scratch=1",
    "finetuning_type=full loraplus_lr_ratio=16",
    "finetuning_type=full use_rslora=1",
    "finetuning_type=full create_new_adapter=1",
    "finetuning_type=full adapter_name_or_path=a",
    "oft_rank=8 finetuning_type=oft",
    "oft_block_size=0 finetuning_type=oft",
    "oft_block_size=1 finetuning_type=oft",
    "lora_target=q_proj finetuning_type=oft oft_target=v_proj",
    *(f"{key} finetuning_type=oft" for key in (
        "loraplus_lr_ratio=16", "use_rslora=1", "use_dora=1", "pissa_init=1", "use_galore=1",
        "use_adam_mini=1", "base_precision=fp8 bf16=1", "fsdp=full_shard", "train_from_scratch=1")),
    "model_name_or_path=m output_dir=./m",
)


@pytest.mark.parametrize("keys", CONTRADICTORY)
def test_contradictions_are_errors(keys):
    message = refusal(*keys.split())
    assert (
        message.startswith("command line: ")
        and keys.split()[0].partition("=")[0].split("_")[0] in message
    )


@pytest.mark.parametrize(
    "keys",
    [
        "warmup_ratio=0.1 warmup_steps=0",
        "offload_activations=0 disable_gradient_checkpointing=1 mlp_tile=0 fsdp=full_shard",
        "offload_activations=1 mlp_tile=64",
        "val_size=0.1 eval_strategy=steps",
        "bf16=1 use_cpu=1",
        "eval_dataset=a do_eval=1",
        "fp16=1 use_cpu=1",
        "quantization_bit=4 fp16=1 quantization_type=fp4 double_quantization=0",
        "load_best_model_at_end=1 val_size=9 eval_strategy=steps eval_steps=5 save_steps=10",
        "load_best_model_at_end=1 val_size=9 eval_strategy=epoch save_strategy=epoch",
        "max_steps=3 num_train_epochs=2",
        "load_best_model_at_end=1 val_size=9 eval_strategy=steps eval_steps=0.1 save_steps=0.3",
        "finetuning_type=full train_from_scratch=1",
        "create_new_adapter=1 adapter_name_or_path=a,b",
        "finetuning_type=oft create_new_adapter=1 adapter_name_or_path=a",
        "finetuning_type=oft quantization_bit=4 oft_rank=8 oft_block_size=0",
        "finetuning_type=oft lora_target=q_proj oft_target=q_proj use_llama_pro=1",
    ],
)
def test_consistent_settings_pass(keys):
    load_argv(*keys.split())


def test_full_eval_in_half_precision():
    """train.py evaluates as it trains; eval.py takes the dtype from it."""
    trained = load_argv("bf16_full_eval=true", "bf16=true", "model_name_or_path=m", "dataset=d",
                        "output_dir=o", script="train")
    assert trained.bf16 and not trained.fp16
    evaluated = load_argv("bf16_full_eval=true", "model_name_or_path=m", "dataset=d",
                          "output_dir=o", script="eval")
    assert evaluated.bf16
