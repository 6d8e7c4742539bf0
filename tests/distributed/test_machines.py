"""Runs on several hosts, simulated by network namespaces that a virtual Ethernet link connects, and under Slurm."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.runs import ROOT, STEPS, assert_bitwise_equal, flags, fork_ranks

from babygpt.training.log import read_log

ADDRESSES = ("10.77.0.1", "10.77.0.2")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


class Host:
    """A network namespace: its processes see only its own network interfaces."""

    def __init__(self, name: str, address: str):
        self.name, self.address, self.processes = name, address, []

    def set_link(self, state: str) -> None:
        ip("-n", self.name, "link", "set", "eth0", state)

    def start(self, rendezvous: list[str], arguments: list, log: Path) -> subprocess.Popen:
        command = ["ip", "netns", "exec", self.name, sys.executable, "-m", "torch.distributed.run", "--nnodes=2"]
        with open(log, "a") as file:
            process = subprocess.Popen(
                [*command, "--nproc_per_node=1", *rendezvous, str(ROOT / "train.py"), *map(str, arguments)],
                cwd=ROOT, env=os.environ | {"GLOO_SOCKET_IFNAME": "eth0"}, stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        self.processes.append(process)
        return process

    def kill(self) -> None:
        """Kill all processes on this host, as a power failure would."""
        pids = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True).stdout.split()
        for pid in pids:
            os.kill(int(pid), signal.SIGKILL)
        for process in self.processes:
            process.wait()


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    if shutil.which("ip") is None:
        pytest.skip("the command `ip`, which creates network namespaces, is not installed")
    hosts = [Host(f"babygpt-{os.getpid()}-{i}", address) for i, address in enumerate(ADDRESSES)]
    try:
        try:
            for host in hosts:
                ip("netns", "add", host.name)
                ip("-n", host.name, "link", "set", "lo", "up")
            link = f"link add eth0 netns {hosts[0].name} type veth peer name eth0 netns {hosts[1].name}"
            ip(*link.split())
            for host in hosts:
                ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", "eth0")
                host.set_link("up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not permitted here: {error.stderr.strip()}")
        yield hosts
    finally:
        for host in hosts:
            host.kill()
            subprocess.run(["ip", "netns", "del", host.name], capture_output=True)


def static(node: int) -> list[str]:
    return [f"--node_rank={node}", f"--master_addr={ADDRESSES[0]}", "--master_port=29500"]


def c10d(node: int) -> list[str]:
    return [
        "--rdzv-backend=c10d", f"--rdzv-endpoint={ADDRESSES[0]}:29400", "--rdzv-id=run",
        f"--local-addr={ADDRESSES[node]}", f"--rdzv-conf=is_host={node == 0}",  # both hosts have the same name
    ]  # fmt: skip


def wait_for_step(run: Path, step: int) -> None:
    for _ in range(600):
        if (run / "log.csv").exists() and len(read_log(run / "log.csv")) > step:
            return
        time.sleep(0.1)
    raise AssertionError(f"{run} did not log step {step} within a minute")


def assert_all_succeed(processes: list[subprocess.Popen], log: Path) -> None:
    for process in processes:
        assert process.wait(120) == 0, log.read_text()[-4000:]


@pytest.fixture(scope="module")
def single_host_run(dataset, tmp_path_factory) -> Path:
    """The directory of a run with two ranks on one host."""
    run = tmp_path_factory.mktemp("single") / "run"
    fork_ranks(2, *flags(dataset, run))
    return run


@pytest.mark.parametrize("rendezvous", [static, c10d])
def test_run_on_two_hosts_equals_two_ranks_on_one_host(rendezvous, hosts, single_host_run, dataset, tmp_path):
    arguments, log = flags(dataset, tmp_path / "run"), tmp_path / "log"
    assert_all_succeed([host.start(rendezvous(i), arguments, log) for i, host in enumerate(hosts)], log)
    assert_bitwise_equal(tmp_path / "run", single_host_run)


def slow_flags(dataset: Path, run: Path) -> list:
    """Return a command line whose steps take tenths of a second, because of many micro-batches, so that a fault occurs
    during the run."""
    return flags(
        dataset, run, general__init_from="resume", general__timeout_minutes=0.2, training__micro_batch_size=1,
        model__n_layer=12, model__n_embd=64, sampling__every_n_steps=0, validation__every_n_steps=0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def slow_single_host_run(dataset, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("single") / "slow"
    fork_ranks(2, *slow_flags(dataset, run))
    return run


def test_short_link_failure_delays_and_long_one_stops_the_run(hosts, slow_single_host_run, dataset, tmp_path):
    """A failure shorter than the timeout only delays the run. After a longer one all ranks exit, and a resume works."""
    log = tmp_path / "log"
    for seconds, survives in ((3, True), (20, False)):
        run = tmp_path / f"down-{seconds}"
        arguments = slow_flags(dataset, run)
        processes = [host.start(static(i), arguments, log) for i, host in enumerate(hosts)]
        wait_for_step(run, 3)
        hosts[1].set_link("down")
        time.sleep(seconds)
        hosts[1].set_link("up")
        if survives:
            assert_all_succeed(processes, log)
        else:
            assert all(process.wait(90) != 0 for process in processes)
            assert "Another rank exited, or did not respond for 0.2 minutes, during step" in log.read_text()
            assert_all_succeed([host.start(static(i), arguments, log) for i, host in enumerate(hosts)], log)
        assert_bitwise_equal(run, slow_single_host_run)


@pytest.mark.parametrize("rendezvous", [static, c10d])
def test_resume_after_a_killed_host_is_bitwise_equal(rendezvous, hosts, slow_single_host_run, dataset, tmp_path):
    """If a host is killed, the other one exits, and the same commands on both hosts resume the run."""
    arguments, log = slow_flags(dataset, tmp_path / "run"), tmp_path / "log"
    first, _ = (host.start(rendezvous(i), arguments, log) for i, host in enumerate(hosts))
    wait_for_step(tmp_path / "run", 3)
    hosts[1].kill()
    assert first.wait(120) != 0
    assert "error: Another rank exited, or did not respond for 0.2 minutes, during step" in log.read_text()
    assert_all_succeed([host.start(rendezvous(i), arguments, log) for i, host in enumerate(hosts)], log)
    assert_bitwise_equal(tmp_path / "run", slow_single_host_run)
    assert len(read_log(tmp_path / "run" / "log.csv")) == STEPS + 1


# ---------------------------------------------------------------------------------------------------------
# Slurm, simulated by two short scripts

SRUN = """#!/bin/bash
shift 2  # --kill-on-bad-exit --cpus-per-task
for rank in 0 1; do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NTASKS=2 SLURM_NTASKS_PER_NODE=2 "$@" &
    ranks[$rank]=$!
done
if [ -n "$TIME_LIMIT_LOG" ]; then  # after 4 lines of this log, the time limit of the job is near
    while [ ! -e "$TIME_LIMIT_LOG" ] || [ "$(wc -l < "$TIME_LIMIT_LOG")" -lt 4 ]; do sleep 0.1; done
    kill -USR1 "${ranks[@]}"
fi
wait "${ranks[0]}" && wait "${ranks[1]}"
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo localhost; else echo "$@" >> "$SCONTROL_CALLS"; fi
"""


def test_slurm_job_is_requeued_until_it_is_finished(dataset, tmp_path):
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    for name in ("runs", "assets", *(path.name for path in ROOT.glob("*.py"))):
        (tmp_path / "repository").mkdir(exist_ok=True)
        (tmp_path / "repository" / name).symlink_to(ROOT / name)
    out = tmp_path / "repository" / "out" / "gpt2"
    preset, *arguments = map(str, slow_flags(dataset, tmp_path))
    for name in ("--general.out-dir", "--general.init-from"):  # slurm.sh passes its own
        i = arguments.index(name)
        del arguments[i : i + 2]
    python = str(Path(sys.executable).parent)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{python}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "localhost",
        "SLURM_CPUS_PER_TASK": "2", "SLURM_JOB_ID": str(os.getpid()), "SCONTROL_CALLS": str(tmp_path / "calls"),
    }  # fmt: skip
    codes = []
    for time_limit in (True, False):
        done = subprocess.run(
            ["bash", "runs/slurm.sh", preset, *arguments], cwd=tmp_path / "repository", capture_output=True, text=True,
            env=environment | {"TIME_LIMIT_LOG": str(out / "log.csv") if time_limit else ""},
        )  # fmt: skip
        codes.append(done.returncode)
        assert (out / "finished").exists() != time_limit, done.stderr[-3000:]
    assert codes == [0, 0]
    assert (tmp_path / "calls").read_text() == f"requeue {os.getpid()}\n"
    assert [row["step"] for row in read_log(out / "log.csv")] == list(range(STEPS + 1))
