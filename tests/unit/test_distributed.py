"""What ranks and devices promise."""

import ctypes
import os
import re
import signal
import threading
from pathlib import Path

import pytest
import torch
import torch._inductor.config

from babygpt.errors import ConfigError, UserError
from babygpt.training.device import (
    TESTED_TORCH,
    DeviceEvent,
    autocast,
    choose_device,
    peak_flops,
    untested_torch_warning,
)
from babygpt.training.distributed import Ranks, process_group
from babygpt.training.guard import checksum
from babygpt.training.signals import StopSignals

CPU = torch.device("cpu")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_stop_signal_is_noted_and_handlers_are_put_back(number):
    before = signal.getsignal(number)
    with StopSignals() as signals:
        signals.nothing_to_save = False
        assert not signals.requested
        os.kill(os.getpid(), number)
        assert signals.requested
    assert signal.getsignal(number) is before


def end_of_one_in_a_compiler(*numbers: int, marker: Path | None = None, nothing_to_save: bool = True) -> int:
    """The exit code of a process that gets signals while its main thread is outside Python for long."""
    pid = os.fork()
    if pid == 0:
        with StopSignals() as signals:
            signals.marker, signals.nothing_to_save = marker, nothing_to_save
            signal.alarm(10)  # kills it
            for i, number in enumerate(numbers):
                threading.Timer(0.1 + 0.1 * i, os.kill, (os.getpid(), number)).start()
            library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
            library.pthread_mutex_lock(mutex)
            library.pthread_mutex_lock(mutex)  # for ever
        os._exit(9)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_before_the_first_step_a_signal_ends_at_once_and_well(capfd, tmp_path, monkeypatch):
    assert end_of_one_in_a_compiler(signal.SIGTERM, marker=tmp_path / "stopped") == 0
    assert "SIGTERM before the end of the first step" in capfd.readouterr().err
    assert (tmp_path / "stopped").exists()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")  # which sends SIGTERM where another rank has crashed
    for number, told in ((signal.SIGTERM, False), (signal.SIGINT, True)):
        (tmp_path / "stopped").unlink(missing_ok=True)
        assert end_of_one_in_a_compiler(number, marker=tmp_path / "stopped") == 0
        assert (tmp_path / "stopped").exists() == told
    assert end_of_one_in_a_compiler(signal.SIGUSR1, marker=tmp_path / "no such folder" / "stopped") == 0


def test_a_second_interrupt_ends_at_once():
    assert end_of_one_in_a_compiler(signal.SIGINT, signal.SIGTERM, signal.SIGINT, nothing_to_save=False) == 130


def test_deterministic_runs_ask_pytorch_for_such_kernels(monkeypatch):
    """Before the first use of CUDA, cuBLAS gets a fixed workspace and PyTorch its deterministic algorithms."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "put back after the test")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setattr(torch._inductor.config, "deterministic", False, raising=False)
    asked = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda *a, **k: asked.append((a, k)))
    with process_group("cpu"):
        assert asked == []
        assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    with process_group("cpu", deterministic=True):
        assert asked == [((True,), {})], "a warning alone would leave attention nondeterministic"
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12),
     ("NVIDIA GH200 480GB", 989e12), ("NVIDIA RTX A4000", None), ("NVIDIA A40", 149.7e12), ("NVIDIA L40S", 362e12),
     ("NVIDIA GeForce RTX 4090", 165.2e12), ("Some new card", None),
     ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA GeForce RTX 3080 Ti", None), ("NVIDIA H100 NVL", 835e12),
     ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None), ("NVIDIA H200 NVL", None)],
)  # fmt: skip
def test_the_peak_is_the_devices_own_or_unknown(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda", 0)) == peak
    assert peak_flops(CPU) is None


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for rank in range(3):  # all ranks find it, so that the one that speaks does too
        with pytest.raises(ConfigError, match="3 processes on this node need 3 CUDA devices, but PyTorch finds 2"):
            choose_device("cuda", rank, local_ranks=3)
    assert choose_device("cuda", 1, local_ranks=2) == torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == CPU


@pytest.mark.parametrize(
    ("dtype", "capabilities", "expected"),
    [
        ("bfloat16", {}, torch.bfloat16), ("float32", {"amx_bf16": True}, torch.float32), ("auto", {}, torch.float32),
        ("auto", {"avx512_bf16": True}, torch.bfloat16), ("auto", {"amx_bf16": True}, torch.bfloat16),
    ],
)  # fmt: skip
def test_bfloat16_is_used_if_requested_or_supported(dtype, capabilities, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    with autocast(CPU, dtype):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == expected


def test_what_the_main_rank_fetches_the_others_find(monkeypatch):
    calls = []
    monkeypatch.setattr(Ranks, "gather", lambda self, number: calls.append("all wait") or [0.0])
    for rank, local_rank in ((0, 0), (4, 0), (5, 1)):
        Ranks(rank, local_rank, 8, CPU).main_process_first(lambda rank=rank: calls.append(rank))
    wait = "all wait"
    assert calls == [0, wait, wait, wait, wait, 4, wait, wait, wait, wait, 5, wait]


def test_where_one_rank_fails_to_fetch_all_end_and_it_says_why(monkeypatch):
    def fail() -> None:
        raise UserError("no network")

    monkeypatch.setattr(Ranks, "gather", lambda self, number: [1.0, 0.0])
    with pytest.raises(UserError, match="no network"):
        Ranks(0, 0, 2, CPU).main_process_first(fail)
    with pytest.raises(ConfigError, match="Rank 0 failed"):
        Ranks(1, 1, 2, CPU).main_process_first(lambda: None)


def test_marks_measure_time():
    first, second = DeviceEvent(CPU), DeviceEvent(CPU)
    second.synchronize()
    assert 0 <= second.ms_since(first) < 100


def test_a_checksum_sees_every_bit():
    weight = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    sums = set()
    for bit in range(-1, 32):
        flipped = weight.clone()
        if bit >= 0:
            flipped.view(torch.int32)[3, 2] ^= 1 << bit if bit < 31 else -(2**31)
        sums.add(checksum([flipped, weight]).item())
    assert len(sums) == 33


@pytest.mark.parametrize(
    ("version", "warns"), [("2.13.0+cpu", False), ("2.11.0", False), ("2.1.0", True), ("2.14.0", True)]
)
def test_untested_torch_versions_print_a_warning(version, warns, monkeypatch):
    """The versions that the tests run on, and among them the pin of requirements.txt, print none."""
    monkeypatch.setattr(torch, "__version__", version)
    assert bool(untested_torch_warning()) == warns
    pin = re.search(r"^torch==(\d+\.\d+)", (Path(__file__).parents[2] / "requirements.txt").read_text(), re.M)
    assert pin[1] in TESTED_TORCH
