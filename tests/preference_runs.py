"""The recorded preference runs of LLaMA-Factory (recorded/preference.json), run again here.

The fixture pairs_world of conftest.py is the folder that they run in.
"""
import json
import shutil

import torch
from safetensors.torch import load_file, save_file

import train
from tests.common import CURVES, ROOT, SHARED

RECORDED = json.loads((ROOT / "tests/recorded/preference.json").read_text())


def write_pairs_world(here):
    """Models, adapters to start from and rows, as they were when the runs were recorded."""
    info = json.loads((SHARED / "data/dataset_info.json").read_text())
    (here / "data").mkdir()
    for short, name in (("dpo", "dpo_en_demo"), ("kto", "kto_en_demo")):
        rows = json.loads((SHARED / "data" / f"{name}.json").read_text())
        chosen = [rows[i] for i in RECORDED["rows"][name]]
        (here / f"data/{short}.json").write_text(json.dumps(chosen))
        info[short] = {**info[name], "file_name": f"{short}.json"}
    (here / "data/dataset_info.json").write_text(json.dumps(info))
    for name, case in (("llama3", "sft_llama3"), ("qwen2", "sft_qwen2_loraplus")):
        (here / f"tiny_{name}").symlink_to(CURVES / f"tiny_{name}")
        (here / f"init_{name}").symlink_to(CURVES / case / "adapter_init")
    for source, copy in (("tiny_llama3", "tiny_llama3_rm"), ("init_llama3", "init_rm")):
        (here / copy).mkdir()
        for file in (here / source).iterdir():
            shutil.copyfile(file, here / copy / file.name)
        weight = torch.randn(1, 64, generator=torch.Generator().manual_seed(3)) * 0.1
        head = {"v_head.summary.weight": weight, "v_head.summary.bias": torch.full((1,), 0.05)}
        save_file(head, here / copy / "value_head.safetensors")
    config = json.loads((here / "tiny_llama3/config.json").read_text())
    config["summary_dropout_prob"] = 0.0
    (here / "tiny_llama3_rm/config.json").write_text(json.dumps(config))


# the kernels of the recorded runs; others differ in the last bits, which some bounds are close to
AS_RECORDED = {"pin_kernels.attention": "sdpa-flash", "pin_kernels.matmul": "torch"}


def run_pairs(world, name, output, monkeypatch, **more):
    """Train a recorded case in the folder `world`; returns its log without times."""
    monkeypatch.chdir(world)
    settings = {"dataset": "dpo", **RECORDED["settings of all"], **AS_RECORDED}
    settings |= RECORDED["cases"][name]["settings"] | more
    argv = [f"{key}={value}" for key, value in settings.items() if value is not None]
    train.main([*argv, f"output_dir={output}", "disable_tqdm=true"])
    return history(output)


def history(folder):
    """The log of a run without times."""
    rows = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [{key: value for key, value in row.items()
             if "runtime" not in key and "per_second" not in key} for row in rows]


def weights_in(folder):
    """All tensors of the safetensors files of a folder."""
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found
