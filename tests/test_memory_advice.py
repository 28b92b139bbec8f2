"""runtime/memory_advice.py: free memory from /proc and control groups; advice against its plan."""
from dataclasses import replace

import pytest
import torch

from runtime.device import out_of_memory
from runtime.memory import USABLE, Workload, memory_plan
from runtime.memory_advice import advice, available_bytes, explain_oom, truncate_row
from settings.config import Config
from tests.test_memory import F32, long_run
from tests.tiny_models import small_config

MEMINFO = "MemTotal:       32000000 kB\nMemFree:         100000 kB\nMemAvailable:   20000000 kB\n"


# ---- free memory ---------------------------------------------------------------------------------


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_memory_of_a_machine_and_of_containers(tmp_path):
    assert available_bytes("cpu", root=tmp_path) is None
    write(tmp_path, {"proc/meminfo": MEMINFO})
    assert available_bytes("cpu", root=tmp_path) == 20_000_000 * 1024
    assert available_bytes("cpu", sharers=4, root=tmp_path) == 5_000_000 * 1024
    job = "sys/fs/cgroup/slurm/job_7"
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/slurm/job_7/step_0\n",
            f"{job}/step_0/memory.max": "max\n",
            f"{job}/step_0/memory.current": "5\n",
            f"{job}/memory.max": "8000000000\n",
            f"{job}/memory.current": "3000000000\n",
            f"{job}/memory.stat": "anon 2000000000\ninactive_file 500000000\nactive_file 9\n",
        },
    )
    assert available_bytes("cpu", root=tmp_path) == 5_500_000_000
    write(
        tmp_path,
        {
            "proc/self/cgroup": "12:cpu,cpuacct:/docker/a\n4:memory:/docker/a\n0::/docker/a\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "4000000000\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "1000000000\n",
        },
    )
    assert available_bytes("cpu", root=tmp_path) == 3_000_000_000


def test_memory_of_this_machine():
    found = available_bytes("cpu")
    assert found is None or 2**20 < found < 2**50


# ---- advice --------------------------------------------------------------------------------------


def test_no_advice_where_it_fits_or_memory_is_unknown():
    plan, config = long_run()
    assert advice(plan, None, config) == advice(plan, 2 * plan.total, config) == []
    assert advice(plan, plan.total, config) != []  # no memory is left for temporaries


def test_advice_names_single_changes_and_their_totals():
    plan, config = long_run()
    lines = advice(plan, int(0.97 * plan.total), config)
    assert [line.partition(":")[0] for line in lines] == [
        "disable_gradient_checkpointing",
        "flash_attn",
        "per_device_train_batch_size",
        "cutoff_len",
    ]
    assert lines[2].startswith(
        "per_device_train_batch_size: 3 with gradient_accumulation_steps: 4 ("
    )
    for line, settings in zip(
        lines, (dict(disable_gradient_checkpointing=False), dict(flash_attn="auto"))
    ):
        other = long_run(**settings)[0]
        assert other.total < USABLE * plan.total
        assert line.endswith(f" ({other.total / 2**20:.4g} MiB)")


def test_following_the_advice_leads_to_a_plan_that_fits():
    plan, config = long_run(flash_attn="auto", disable_gradient_checkpointing=False)
    available = int(0.8 * plan.total)
    assert advice(plan, available, config)[0].startswith("per_device_train_batch_size: ")
    size = int(advice(plan, available, config)[0].split()[1])
    assert 12 % size == 0
    workload = Workload(small_config("llama"), None, [[512]] * size, F32, "sdpa-flash", "cpu")
    smaller = memory_plan(config, workload)
    assert advice(smaller, available, config) == []
    if size < 3:
        larger = memory_plan(config, replace(workload, rows=[[512]] * (size + 1)))
        assert advice(larger, available, config) != []


def test_adapters_are_the_advice_where_weights_take_the_memory():
    config = Config(finetuning_type="full", per_device_train_batch_size=1)
    model_config = small_config("llama", hidden_size=512, intermediate_size=1408)
    plan = memory_plan(config, Workload(model_config, None, [[64]], F32, "sdpa-flash", "cpu"))
    (line,) = advice(plan, int(0.6 * plan.total), config)
    assert line.startswith("finetuning_type: lora (")


def test_combined_changes_and_none_at_all():
    plan, config = long_run()
    least = long_run(
        finetuning_type="lora", disable_gradient_checkpointing=False, flash_attn="auto"
    )[0]
    (line,) = advice(plan, int(0.5 * least.total), config)
    assert line.startswith("combined: disable_gradient_checkpointing: false, ")
    (line,) = advice(plan, 1000, config)
    assert "no settings are enough" in line and "finetuning_type: lora" in line


def test_a_shorter_cutoff_truncates_rows_at_their_end():
    row = [5, 4, 3]
    assert truncate_row(row, 20) == row
    assert truncate_row(row, 9) == [5, 4]
    assert truncate_row(row, 7) == [5, 2]


def test_the_message_when_memory_runs_out():
    with pytest.raises(RuntimeError) as found:
        torch.empty(2**50, dtype=torch.uint8)
    assert out_of_memory(found.value)
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert out_of_memory(MemoryError())
    for words in ("CUDA error: out of memory\nCUDA kernel errors might be reported later",
                  "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
                  "HIP error: out of memory"):
        assert out_of_memory(RuntimeError(words))
    assert not out_of_memory(RuntimeError("shapes differ"))
    plan, config = long_run()
    for available in (None, plan.total // 2, 10 * plan.total):  # also where the plan was too low
        text = explain_oom(
            torch.OutOfMemoryError("CUDA out of memory. Tried.\nMore"), plan, available, config
        )
        assert text.startswith("out of memory: CUDA out of memory. Tried.\n")
        assert "disable_gradient" in text
