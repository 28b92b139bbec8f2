"""Several hosts: a host that vanishes is noticed, hosts may join and leave a run.

A launcher of torchrun is a host. Where this process may make network namespaces, two of them are
hosts whose network is cut; elsewhere a host is suspended, which closes no connection either.
"""
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

import train
from runtime.steps import accumulation_for
from scale import heartbeat
from settings.config import Config
from tests.common import ROOT, refusal, slow
from tests.ranks import COMMON, free_port, small_world
from tests.test_parallel import assert_same

WORKER = '''
import sys, time
sys.path.insert(0, ROOT)
from tests.common import leave_with_parent
leave_with_parent()
import train
from errors import run_script
from scale import heartbeat
heartbeat.BEATS, heartbeat.LOST = 1, 6
begin_step = train.Run.begin_step

def begin(run, step):
    alone = run.ranks.world == 1
    while ELASTIC and alone and step.number == 4 and not run.stop_requested():
        time.sleep(0.05)                # until torchrun stops it, because a host has joined
    if ELASTIC and not alone and step.number == 9:
        time.sleep(99)                  # until the other host is lost
    begin_step(run, step)

train.Run.begin_step = begin
run_script(train.main)
'''
STEPS = 14


@contextmanager
def host(here, number, address, endpoint, elastic=False, inside=()):
    """A launcher with one rank; what it prints is in here/screen{number}.

    elastic: hosts may join and leave a run of STEPS steps. inside: the command that runs a program
    on that host.
    """
    settings = COMMON | dict(
        model_name_or_path=f"{here}/dense", dataset=f"{here}/rows.jsonl", output_dir=f"{here}/out",
        max_steps=STEPS if elastic else 10**6, rows_per_step=4, per_device_train_batch_size=2,
        save_strategy="steps", save_steps=6, save_total_limit=1, resume_from_checkpoint="auto",
        tokenized_path=f"{here}/tokens{number}")    # one host's name is not another's, elsewhere
    worker = WORKER.replace("ROOT", repr(str(ROOT))).replace("ELASTIC", str(elastic))
    (here / "worker.py").write_text(worker, encoding="utf-8")
    nodes = ["1:2", "--max-restarts", "3"] if elastic else ["2"]
    command = [*inside, sys.executable, "-m", "torch.distributed.run", "--nnodes", *nodes,
               "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint,
               "--local-addr", address, "--rdzv-conf",
               f"is_host={int(number == 0)},last_call_timeout=2,join_timeout=60",
               str(here / "worker.py"), *(f"{key}={value}" for key, value in settings.items())]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
           "POCKET_TRACEBACK": "0", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": str(int(elastic))}
    with open(here / f"screen{number}", "w") as screen:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=screen,
                                   stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def screen_of(here, number) -> str:
    return (here / f"screen{number}").read_text(errors="replace")


def wait_for(here, pattern, numbers=(0, 1), seconds=90):
    """Wait until one of the hosts has printed something: on one machine either may be rank 0."""
    deadline = time.monotonic() + seconds
    while not any(re.search(pattern, screen_of(here, number)) for number in numbers):
        assert time.monotonic() < deadline, screen_of(here, 0)[-3000:]
        time.sleep(0.1)


def workers_of(process) -> list[int]:
    """The ranks that a launcher has started."""
    listing = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True,
                             text=True)
    return [int(pid) for pid in listing.stdout.split()]


@pytest.fixture
def world(tmp_path):
    small_world(tmp_path)
    return tmp_path


# ---- a host that vanishes ------------------------------------------------------------------------


def test_a_lost_host_is_noticed_within_a_minute():
    assert heartbeat.LOST + 3 * heartbeat.BEATS < 60


@slow
@pytest.mark.skipif(not shutil.which("ps"), reason="needs ps")
def test_a_suspended_host_ends_the_run_with_the_cause(world):
    """It closes no connection: without beats the other would wait for ddp_timeout, years."""
    endpoint = f"localhost:{free_port()}"
    with host(world, 0, "localhost", endpoint) as first, \
            host(world, 1, "localhost", endpoint) as second:
        wait_for(world, r"\n +3 ")
        suspended = [second.pid, *workers_of(second)]
        for pid in suspended:
            os.kill(pid, signal.SIGSTOP)
        start = time.monotonic()
        assert first.wait(50) != 0
        assert time.monotonic() - start < 40        # 6 s, and what torchrun takes to end
        for pid in reversed(suspended):
            os.kill(pid, signal.SIGKILL)
    screens = screen_of(world, 0) + screen_of(world, 1)
    assert re.search(r"error: rank \d, on \S+, has not heard from (rank \d of 2, on \S+,|the first "
                     "host, .*,) for 6 s: that host is down or suspended", screens), screens[-3000:]


@contextmanager
def namespaces():
    """Two network namespaces with a cable between them, as [(name, device, address)]."""
    names = [f"pocket{os.getpid()}{letter}" for letter in "ab"]

    def ip(*command):
        return subprocess.run(["ip", *command], capture_output=True, text=True).returncode == 0

    hosts = [(name, f"eth{name[-1]}", f"10.77.0.{i}") for i, name in enumerate(names, 1)]
    try:
        made = shutil.which("ip") and all([ip("netns", "add", name) for name in names]) and ip(
            "link", "add", hosts[0][1], "netns", names[0], "type", "veth",
            "peer", "name", hosts[1][1], "netns", names[1])
        if not made:
            pytest.skip("network namespaces cannot be made here (root and iproute2 can)")
        for name, device, address in hosts:
            for command in (("addr", "add", f"{address}/24", "dev", device),
                            ("link", "set", device, "up"), ("link", "set", "lo", "up")):
                assert ip("-n", name, *command)
        yield hosts, ip
    finally:
        for name in names if shutil.which("ip") else ():
            ip("netns", "del", name)


def test_a_cut_network_ends_both_hosts_with_the_cause(world):
    """Both sides say whom they miss."""
    with namespaces() as (hosts, ip):
        def start(number):
            name, device, address = hosts[number]
            inside = ["ip", "netns", "exec", name, "unshare", "-u", "env",
                      f"GLOO_SOCKET_IFNAME={device}", "sh", "-c",
                      f'hostname {address}; exec "$@"', "sh"]     # a name that resolves
            return host(world, number, address, f"{hosts[0][2]}:29500", inside=inside)

        with start(0) as first, start(1) as second:
            wait_for(world, r"\n +3 ")
            assert ip("-n", hosts[1][0], "link", "set", hosts[1][1], "down")
            begin = time.monotonic()
            assert first.wait(50) != 0
            assert time.monotonic() - begin < 40
            wait_for(world, "error: ", [1], seconds=30)
            second.kill()
    for number, missed in ((0, "rank 1 of 2, on 10.77.0.2,"), (1, "the first host, 10.77.0.1,")):
        words = f"rank {number}, on 10.77.0.{number + 1}, has not heard from {missed} for 6 s"
        assert words in screen_of(world, number), screen_of(world, number)[-3000:]


# ---- hosts that join and leave -------------------------------------------------------------------


def test_a_host_joins_and_leaves_and_the_run_is_that_of_one_process(world):
    """--nnodes 1:2: the ranks are stopped, which saves; both go on; the joined one is killed."""
    endpoint = f"localhost:{free_port()}"
    with host(world, 0, "localhost", endpoint, elastic=True) as first:
        wait_for(world, r"\n +3 ", [0])
        with host(world, 1, "localhost", endpoint, elastic=True):
            wait_for(world, r"2 x 1 x 2 ranks(.|\n)*\n +8 ")
        assert first.wait(120) == 0, screen_of(world, 0)[-3000:]
    assert "stopped by SIGTERM after step 4 of 14" in screen_of(world, 0)
    settings = COMMON | dict(model_name_or_path=f"{world}/dense", dataset=f"{world}/rows.jsonl",
                             output_dir=f"{world}/alone", max_steps=STEPS, rows_per_step=4,
                             per_device_train_batch_size=2)
    train.main([f"{key}={value}" for key, value in settings.items()])
    assert_same(world / "out", world / "alone")


def test_micro_batches_follow_from_the_rows_of_a_step():
    config = Config(rows_per_step=24, per_device_train_batch_size=2)
    assert [accumulation_for(config, world) for world in (1, 2, 3, 4, 6, 12)] == [12, 6, 4, 3, 2, 1]
    assert accumulation_for(Config(gradient_accumulation_steps=5), 7) == 5
    with pytest.raises(ValueError, match="rows_per_step: 24 is no multiple of the 10 rows that 5"):
        accumulation_for(config, 5)


@pytest.mark.parametrize("settings, words", [
    ("rows_per_step=8 gradient_accumulation_steps=2", "keep one of the two"),
    ("rows_per_step=8 token_budget=100", "rows_per_step counts rows; keep one"),
])
def test_what_rows_per_step_does_not_go_with(settings, words):
    assert words in refusal("model_name_or_path=m", "dataset=d", "output_dir=o",
                            *settings.split(), script="train")
