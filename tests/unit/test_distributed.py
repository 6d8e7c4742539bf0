"""Ranks, devices, stop signals, and checksums of weights."""

import ctypes
import os
import re
import signal
import threading
from pathlib import Path

import pytest
import torch
import torch._inductor.config

from babygpt.errors import ConfigError, RankFailedError, UserError
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
def test_stop_signal_is_recorded_and_handlers_are_restored(number):
    before = signal.getsignal(number)
    with StopSignals() as signals:
        signals.nothing_to_save = False
        assert not signals.requested
        os.kill(os.getpid(), number)
        assert signals.requested
    assert signal.getsignal(number) is before


def exit_code_after_signals(*numbers: int, marker: Path | None = None, nothing_to_save: bool = True) -> int:
    """Return the exit code of a process that receives signals while its main thread is blocked in native code."""
    pid = os.fork()
    if pid == 0:
        with StopSignals() as signals:
            signals.marker, signals.nothing_to_save = marker, nothing_to_save
            signal.alarm(10)  # kills the process if no signal makes it exit
            for i, number in enumerate(numbers):
                threading.Timer(0.1 + 0.1 * i, os.kill, (os.getpid(), number)).start()
            library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
            library.pthread_mutex_lock(mutex)
            library.pthread_mutex_lock(mutex)  # blocks forever
        os._exit(9)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_signal_before_the_first_step_exits_with_code_0(capfd, tmp_path, monkeypatch):
    """The marker is created unless torchrun sent the signal. The process exits even if the marker cannot be created."""
    assert exit_code_after_signals(signal.SIGTERM, marker=tmp_path / "stopped") == 0
    assert "SIGTERM before the end of the first step" in capfd.readouterr().err
    assert (tmp_path / "stopped").exists()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")  # torchrun sends SIGTERM to the other ranks after one has failed
    for number, stop_requested in ((signal.SIGTERM, False), (signal.SIGINT, True)):
        (tmp_path / "stopped").unlink(missing_ok=True)
        assert exit_code_after_signals(number, marker=tmp_path / "stopped") == 0
        assert (tmp_path / "stopped").exists() == stop_requested
    assert exit_code_after_signals(signal.SIGUSR1, marker=tmp_path / "missing" / "stopped") == 0


def test_second_interrupt_exits_immediately(capfd, monkeypatch):
    """The first one is acknowledged at once, by rank 0, even if the main thread is blocked in native code."""
    assert exit_code_after_signals(signal.SIGINT, signal.SIGINT, nothing_to_save=False) == 130
    assert "Received SIGINT. The run will save a checkpoint after this step and exit. Press" in capfd.readouterr().err
    monkeypatch.setenv("RANK", "1")
    assert exit_code_after_signals(signal.SIGINT, signal.SIGTERM, signal.SIGINT, nothing_to_save=False) == 130
    assert not capfd.readouterr().err


def test_deterministic_runs_use_deterministic_algorithms(monkeypatch):
    """Before the first use of CUDA, cuBLAS gets a fixed workspace and PyTorch its deterministic algorithms."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that monkeypatch restores the original after the test
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setattr(torch._inductor.config, "deterministic", False, raising=False)
    calls = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda *a, **k: calls.append((a, k)))
    with process_group("cpu"):
        assert calls == []
        assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    with process_group("cpu", deterministic=True):
        assert calls == [((True,), {})], "warn_only would leave attention nondeterministic"
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12),
     ("NVIDIA GH200 480GB", 989e12), ("NVIDIA RTX A4000", None), ("NVIDIA A40", 149.7e12), ("NVIDIA L40S", 362e12),
     ("NVIDIA GeForce RTX 4090", 165.2e12), ("Some new GPU", None),
     ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA GeForce RTX 3080 Ti", None), ("NVIDIA H100 NVL", 835e12),
     ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None), ("NVIDIA H200 NVL", None)],
)  # fmt: skip
def test_peak_flops_are_those_of_the_exact_model_or_none(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda", 0)) == peak
    assert peak_flops(CPU) is None


def test_missing_device_is_rejected(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for rank in range(3):  # all ranks raise the error, so the rank that prints it does too
        with pytest.raises(ConfigError, match="3 processes on this node need 3 CUDA devices, but PyTorch finds 2"):
            choose_device("cuda", rank, local_world_size=3)
    assert choose_device("cuda", 1, local_world_size=2) == torch.device("cuda", 1)
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


def test_main_process_fetches_before_the_other_ranks(monkeypatch):
    """Rank 0 first, then the first rank of each node, then the others; all ranks synchronize after each turn."""
    calls = []
    monkeypatch.setattr(Ranks, "gather", lambda self, number: calls.append("sync") or [0.0])
    for rank, local_rank in ((0, 0), (4, 0), (5, 1)):
        Ranks(rank, local_rank, 8, CPU).main_process_first(lambda rank=rank: calls.append(rank))
    sync = "sync"
    assert calls == [0, sync, sync, sync, sync, 4, sync, sync, sync, sync, 5, sync]


def test_failed_fetch_of_one_rank_is_an_error_on_all_ranks(monkeypatch):
    """The failed rank raises its own error; the others name that rank."""

    def fail() -> None:
        raise UserError("no network")

    monkeypatch.setattr(Ranks, "gather", lambda self, number: [1.0, 0.0])
    with pytest.raises(UserError, match="no network"):
        Ranks(0, 0, 2, CPU).main_process_first(fail)
    with pytest.raises(RankFailedError, match="Rank 0 failed"):
        Ranks(1, 1, 2, CPU).main_process_first(lambda: None)


def test_device_events_measure_elapsed_time():
    first, second = DeviceEvent(CPU), DeviceEvent(CPU)
    second.synchronize()
    assert 0 <= second.ms_since(first) < 100


def test_checksum_depends_on_every_bit():
    weight = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    checksums = set()
    for bit in range(-1, 32):
        flipped = weight.clone()
        if bit >= 0:
            flipped.view(torch.int32)[3, 2] ^= 1 << bit if bit < 31 else -(2**31)
        checksums.add(checksum([flipped, weight]).item())
    assert len(checksums) == 33


@pytest.mark.parametrize(
    ("version", "warns"), [("2.13.0+cpu", False), ("2.11.0", False), ("2.1.0", True), ("2.14.0", True)]
)
def test_untested_torch_versions_print_a_warning(version, warns, monkeypatch):
    """Tested versions, which include the one in requirements.txt, give no warning."""
    monkeypatch.setattr(torch, "__version__", version)
    assert bool(untested_torch_warning()) == warns
    pin = re.search(r"^torch==(\d+\.\d+)", (Path(__file__).parents[2] / "requirements.txt").read_text(), re.M)
    assert pin[1] in TESTED_TORCH
