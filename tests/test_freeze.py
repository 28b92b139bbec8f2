"""methods/freeze.py: which layers are trained, against LLaMA-Factory 0.9.5."""
import pytest

from lora import trainable
from methods.freeze import expanded_layers, expanded_targets, unfreeze
from settings.load_config import load_config
from tests.tiny_models import tiny

FREEZE = [  # layers, modules, extra modules: the trained parameters that LLaMA-Factory 0.9.5 chose
    (1, ["all"], [], lambda name: ".1." in name),
    (-1, ["mlp", "input_layernorm"], ["lm_head"],
     lambda n: ".0.mlp" in n or ".0.input" in n or "head" in n),
    (5, ["self_attn"], ["embed_tokens"], lambda name: "self_attn" in name or "embed" in name),
    # in all layers
    (-1, ["self_attn"], ["norm"], lambda name: ".0.self_attn" in name or "norm" in name),
    (0, ["all"], ["norm"], lambda name: "norm" in name),
]


@pytest.mark.parametrize("layers, modules, extra, trained", FREEZE)
def test_layers_that_freeze_tuning_trains(layers, modules, extra, trained):
    model = unfreeze(tiny(), layers, modules, extra)
    assert (set(trainable(model)) == {name for name, _ in model.named_parameters() if trained(name)}
            != set())


@pytest.mark.parametrize("modules, extra, words", [
    (["mpl"], [],
     r"freeze_trainable_modules: 'mpl' is no .*\(did you mean 'mlp'\?\); it has "
     r"input_layernorm, mlp,"),
    (["all"], ["lm_haed"],
     r"freeze_extra_modules: 'lm_haed' .*'lm_head'\?\); it has embed_tokens, lm_head, norm$"),
])
def test_unknown_layers_are_errors(modules, extra, words):
    with pytest.raises(ValueError, match=words):
        unfreeze(tiny(), 1, modules, extra)


# ---- LLaMA-Pro ----------------------------------------------------------------------------------


def test_expanded_blocks_are_the_last_of_each_group():
    assert list(expanded_layers(40, 8)) == [4, 9, 14, 19, 24, 29, 34, 39]
    assert list(expanded_layers(6, 6)) == [0, 1, 2, 3, 4, 5]
    for inserted in (7, 0, -2):
        with pytest.raises(ValueError,
                           match=f"freeze_trainable_layers: {inserted} does not divide"):
            expanded_layers(40, inserted)


def test_expanded_blocks_are_trained_or_adapted():
    model = unfreeze(tiny(num_hidden_layers=4), 2, ["all"], [], expanded=True)
    assert {name.split(".")[2] for name in trainable(model)} == {"1", "3"}
    config = load_config(["model_name_or_path=m", "dataset=d", "template=llama3", "output_dir=o",
                          "lora_target=q_proj,up_proj", "use_llama_pro=true"], "train")
    assert expanded_targets(tiny(num_hidden_layers=4), config.lora_target,
                            config.freeze_trainable_layers) == [
        "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj",
        "model.layers.3.self_attn.q_proj", "model.layers.3.mlp.up_proj"]
