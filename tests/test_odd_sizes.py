"""runtime/odd_sizes.py: sizes that do not fit are said at the start, by train.py's dry run."""
import pytest

import train
from tests.ranks import COMMON, DENSE, tiny_model
from tests.tiny_models import tiny


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    here = tmp_path_factory.mktemp("sizes")
    tiny_model(here / "dense", DENSE)
    row = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
    (here / "rows.jsonl").write_text(f"{row}\n" * 10)
    return here


def start_page(world, capsys, **more):
    values = COMMON | dict(model_name_or_path=world / "dense", dataset=world / "rows.jsonl",
                           output_dir=world / "out", dry_run=True) | more
    train.main([f"{key}={value}" for key, value in values.items()])
    return capsys.readouterr().out


OFT = {"finetuning_type": "oft"}
GALORE = {"finetuning_type": "full", "use_galore": True}
APOLLO = {"finetuning_type": "full", "use_apollo": True}
EVAL = {"val_size": 0.2, "eval_strategy": "steps", "eval_steps": 50}


@pytest.mark.parametrize("more, words", [
    (OFT | {"oft_block_size": 12}, "oft_block_size: 12 does not divide the 32 inputs of q_proj, "
                                   "k_proj, v_proj, o_proj, gate_proj, up_proj; 8 does, and"),
    (OFT | {"oft_block_size": 16}, None),
    (OFT | {"oft_block_size": 0, "oft_rank": 5},
     "oft_rank: 5 does not divide the 48 inputs of down_proj; 4 does, and is taken there"),
    (GALORE | {"galore_rank": 20}, "galore_rank: 20 is larger than the shorter side, 16 or more, "
                                   "of 4 of 14 matrices"),
    (GALORE | {"galore_rank": 16}, None),
    (APOLLO | {"apollo_rank": 999}, "apollo_rank: 999 is larger than the shorter side, 16 or more, "
                                    "of 14 of 14 matrices"),
    (EVAL | {"save_strategy": "best"}, "(eval_steps: 50, eval_delay: 0): save_strategy: best saves "
                                       "no checkpoint"),
    (EVAL, "the run ends at step 2, before its first evaluation (eval_steps: 50, eval_delay: 0)\n"),
    (EVAL | {"eval_steps": 1, "save_strategy": "best"}, None),
    (EVAL | {"eval_strategy": "epoch", "save_strategy": "best"}, None),
])
def test_what_does_not_fit_is_said(more, words, world, capsys):
    page = start_page(world, capsys, **more)
    if words:
        assert words in page
    else:
        assert "does not divide" not in page and "larger than the shorter" not in page
        assert "before its first evaluation" not in page


def test_a_block_that_the_model_lacks_is_found_before_the_rows(world, capsys):
    with pytest.raises(ValueError, match="command line: badam_start_block: 2 is none of the blocks "
                                         "0 to 1 of"):
        start_page(world, capsys, finetuning_type="full", use_badam=True, badam_start_block=2,
                   dataset=world / "missing.jsonl")


@pytest.mark.parametrize("inputs, wanted, found", [(64, 24, 16), (48, 64, 48), (48, 5, 4)])
def test_the_blocks_taken_are_pefts(inputs, wanted, found):
    peft = pytest.importorskip("peft")
    if tuple(map(int, peft.__version__.split(".")[:2])) < (0, 18):
        pytest.skip("other defaults of OFT")
    model = tiny(hidden_size=inputs, num_attention_heads=4, head_dim=inputs // 4).requires_grad_()
    layer = model.model.layers[0].self_attn
    config = peft.OFTConfig(oft_block_size=wanted, target_modules=["q_proj"])
    with pytest.warns(UserWarning, match="Adjusted `oft_block_size`"):
        theirs = peft.get_peft_model(layer, config)
    size = theirs.base_model.model.q_proj.oft_block_size["default"]
    assert size == found
