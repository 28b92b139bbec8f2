"""methods/reward_model.py: the value head after merging. test_preference.py compares whole runs."""
import torch
from safetensors.torch import load_file

import merge
from tests.preference_runs import run_pairs


def test_merging_keeps_the_trained_value_head(pairs_world, tmp_path, monkeypatch):
    run_pairs(pairs_world, "rm", tmp_path / "out", monkeypatch, max_steps=2, val_size=0,
              eval_strategy="no")
    merge.main(["model_name_or_path=tiny_llama3_rm", f"adapter_name_or_path={tmp_path / 'out'}",
                f"export_dir={tmp_path / 'merged'}", "template=llama3"])
    ours, merged = (load_file(tmp_path / name / "value_head.safetensors")
                    for name in ("out", "merged"))
    start = load_file(pairs_world / "init_rm/value_head.safetensors")
    assert all(torch.equal(ours[key], merged[key]) for key in ours) and set(ours) == set(start)
    assert not torch.equal(ours["v_head.summary.weight"], start["v_head.summary.weight"])
    # a bias does not change a comparison
    assert torch.equal(ours["v_head.summary.bias"], start["v_head.summary.bias"])
