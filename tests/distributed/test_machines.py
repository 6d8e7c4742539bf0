"""Several machines: hosts in network namespaces of this one, each with an address of its own, joined by a cable."""

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
    """A namespace of the network; what runs in it sees its own interfaces alone."""

    def __init__(self, name: str, address: str):
        self.name, self.address, self.running = name, address, []

    def cable(self, state: str) -> None:
        ip("-n", self.name, "link", "set", "eth0", state)

    def start(self, rendezvous: list[str], arguments: list, log: Path) -> subprocess.Popen:
        command = ["ip", "netns", "exec", self.name, sys.executable, "-m", "torch.distributed.run", "--nnodes=2"]
        with open(log, "a") as file:
            process = subprocess.Popen(
                [*command, "--nproc_per_node=1", *rendezvous, str(ROOT / "train.py"), *map(str, arguments)],
                cwd=ROOT, env=os.environ | {"GLOO_SOCKET_IFNAME": "eth0"}, stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        self.running.append(process)
        return process

    def kill(self) -> None:
        """All that runs in it, as a power cut does."""
        pids = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True).stdout.split()
        for pid in pids:
            os.kill(int(pid), signal.SIGKILL)
        for process in self.running:
            process.wait()


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    if shutil.which("ip") is None:
        pytest.skip("there is no `ip` to make network namespaces with")
    made = [Host(f"babygpt-{os.getpid()}-{i}", address) for i, address in enumerate(ADDRESSES)]
    try:
        try:
            for host in made:
                ip("netns", "add", host.name)
                ip("-n", host.name, "link", "set", "lo", "up")
            ip(
                "link",
                "add",
                "eth0",
                "netns",
                made[0].name,
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                made[1].name,
            )
            for host in made:
                ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", "eth0")
                host.cable("up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not permitted here: {error.stderr.strip()}")
        yield made
    finally:
        for host in made:
            host.kill()
            subprocess.run(["ip", "netns", "del", host.name], capture_output=True)


def static(node: int) -> list[str]:
    return [f"--node_rank={node}", f"--master_addr={ADDRESSES[0]}", "--master_port=29500"]


def c10d(node: int) -> list[str]:
    return [
        "--rdzv-backend=c10d", f"--rdzv-endpoint={ADDRESSES[0]}:29400", "--rdzv-id=run",
        f"--local-addr={ADDRESSES[node]}", f"--rdzv-conf=is_host={node == 0}",  # these hosts have one name
    ]  # fmt: skip


def wait_for_step(run: Path, step: int) -> None:
    for _ in range(600):
        if (run / "log.csv").exists() and len(read_log(run / "log.csv")) > step:
            return
        time.sleep(0.1)
    raise AssertionError(f"no step {step} in a minute")


def ends_well(processes: list[subprocess.Popen], log: Path) -> None:
    for process in processes:
        assert process.wait(120) == 0, log.read_text()[-4000:]


@pytest.fixture(scope="module")
def on_one_machine(dataset, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("one") / "machine"
    fork_ranks(2, *flags(dataset, run))
    return run


@pytest.mark.parametrize("rendezvous", [static, c10d])
def test_a_run_on_two_hosts_is_the_run_of_one_with_two_ranks(rendezvous, hosts, on_one_machine, dataset, tmp_path):
    line = flags(dataset, tmp_path / "run")
    ends_well([host.start(rendezvous(i), line, tmp_path / "log") for i, host in enumerate(hosts)], tmp_path / "log")
    assert_bitwise_equal(tmp_path / "run", on_one_machine)


def slow(dataset: Path, run: Path) -> list:
    """Some tenths of a second a step, by many micro-batches, so that faults fall into the middle."""
    return flags(
        dataset, run, general__init_from="resume", general__timeout_minutes=0.2, training__micro_batch_size=1,
        model__n_layer=12, model__n_embd=64, sampling__every_n_steps=0, validation__every_n_steps=0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def slow_on_one_machine(dataset, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("one") / "slow"
    fork_ranks(2, *slow(dataset, run))
    return run


def test_a_cable_that_is_out_for_seconds_delays_and_one_out_for_longer_ends_all(
    hosts, slow_on_one_machine, dataset, tmp_path
):
    line, log = slow(dataset, tmp_path / "run"), tmp_path / "log"
    for seconds, ends in ((3, True), (20, False)):
        run = tmp_path / f"out-{seconds}"
        line = slow(dataset, run)
        processes = [host.start(static(i), line, log) for i, host in enumerate(hosts)]
        wait_for_step(run, 3)
        hosts[1].cable("down")
        time.sleep(seconds)
        hosts[1].cable("up")
        if ends:
            ends_well(processes, log)
        else:
            assert all(process.wait(90) != 0 for process in processes)
            assert "Another rank exited, or did not respond for 0.2 minutes, in step" in log.read_text()
            ends_well([host.start(static(i), line, log) for i, host in enumerate(hosts)], log)
        assert_bitwise_equal(run, slow_on_one_machine)


@pytest.mark.parametrize("rendezvous", [static, c10d])
def test_where_a_host_is_killed_the_other_ends_and_the_same_commands_go_on(
    rendezvous, hosts, slow_on_one_machine, dataset, tmp_path
):
    line, log = slow(dataset, tmp_path / "run"), tmp_path / "log"
    first, _ = (host.start(rendezvous(i), line, log) for i, host in enumerate(hosts))
    wait_for_step(tmp_path / "run", 3)
    hosts[1].kill()
    assert first.wait(120) != 0
    assert "error: Another rank exited, or did not respond for 0.2 minutes, in step" in log.read_text()
    ends_well([host.start(rendezvous(i), line, log) for i, host in enumerate(hosts)], log)
    assert_bitwise_equal(tmp_path / "run", slow_on_one_machine)
    assert len(read_log(tmp_path / "run" / "log.csv")) == STEPS + 1


# ---------------------------------------------------------------------------------------------------------
# Slurm, played by two short scripts

SRUN = """#!/bin/bash
shift 2  # --kill-on-bad-exit --cpus-per-task
for rank in 0 1; do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NTASKS=2 SLURM_NTASKS_PER_NODE=2 "$@" &
    ranks[$rank]=$!
done
if [ -n "$EARLY" ]; then  # the end of the job's time is near
    while [ ! -e "$EARLY" ] || [ "$(wc -l < "$EARLY")" -lt 4 ]; do sleep 0.1; done
    kill -USR1 "${ranks[@]}"
fi
wait "${ranks[0]}" && wait "${ranks[1]}"
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo localhost; else echo "$@" >> "$CALLS"; fi
"""


def test_a_slurm_job_is_queued_again_until_it_is_done(dataset, tmp_path):
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    for name in ("runs", "assets", *(path.name for path in ROOT.glob("*.py"))):
        (tmp_path / "repository").mkdir(exist_ok=True)
        (tmp_path / "repository" / name).symlink_to(ROOT / name)
    out = tmp_path / "repository" / "out" / "gpt2"
    preset, *line = map(str, slow(dataset, tmp_path))
    for name in ("--general.out-dir", "--general.init-from"):  # the script's own
        at = line.index(name)
        del line[at : at + 2]
    python = str(Path(sys.executable).parent)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{python}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "localhost",
        "SLURM_CPUS_PER_TASK": "2",
        "SLURM_JOB_ID": str(os.getpid()), "CALLS": str(tmp_path / "calls"), "EARLY": str(out / "log.csv"),
    }  # fmt: skip
    codes = []
    for early in (True, False):
        done = subprocess.run(
            ["bash", "runs/slurm.sh", preset, *line], cwd=tmp_path / "repository", capture_output=True, text=True,
            env=environment | ({} if early else {"EARLY": ""}),
        )  # fmt: skip
        codes.append(done.returncode)
        assert (out / "finished").exists() != early, done.stderr[-3000:]
    assert codes == [0, 0]
    assert (tmp_path / "calls").read_text() == f"requeue {os.getpid()}\n"
    assert [row["step"] for row in read_log(out / "log.csv")] == list(range(STEPS + 1))
