"""Runs on several ranks: rows, losses and weights equal those of one rank, and resume is bitwise exact."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.helpers import call
from support.runs import (
    STEPS,
    assert_bitwise_equal,
    copy_killed_run,
    flags,
    fork_ranks,
    load_tensors,
    read_recorded_rows,
    torchrun,
)

import train
from babygpt.errors import exit_now
from babygpt.training import optim
from babygpt.training.log import read_log
from babygpt.training.optim import Muon


def test_two_ranks_resume_bitwise_across_the_end_of_an_epoch(dataset, tmp_path):
    fork_ranks(2, *flags(dataset, tmp_path / "uninterrupted"))
    out = copy_killed_run(tmp_path / "uninterrupted", 7, tmp_path / "resumed")
    fork_ranks(2, *flags(dataset, out, general__init_from="resume"))
    assert_bitwise_equal(out, tmp_path / "uninterrupted")


@pytest.mark.parametrize("world_size", [1, 2])
def test_modern_run_resumes_bitwise(world_size, dataset, tmp_path):
    """With Muon, momentum warmup, all switches of the model, and masks of documents that cross row boundaries."""
    modern = {
        "model__value_embeddings": 1,
        "model__window": 7, "model__document_mask": [], "model__n_kv_head": 1, "model__attention_score_factor": 0.9,
        "optimizer__momentum": 0.95, "optimizer__momentum_warmup_steps": 10,
        "optimizer__weight_decay": 0.1, "optimizer__cautious": [],
    }  # fmt: skip
    fork_ranks(world_size, *flags(dataset, tmp_path / "uninterrupted", "modern", **modern))
    out = copy_killed_run(tmp_path / "uninterrupted", 7, tmp_path / "resumed")
    fork_ranks(world_size, *flags(dataset, out, "modern", general__init_from="resume", **modern))
    assert_bitwise_equal(out, tmp_path / "uninterrupted")
    rows = read_log(out / "log.csv")
    assert rows[-1]["val_loss"] < rows[0]["val_loss"] - 0.3
    assert {"momentum_buffer", "second_moment"} == load_tensors(out, STEPS)[1]["h.0.attn.c_attn.weight"].keys()


def test_modern_loss_does_not_depend_on_the_number_of_ranks(dataset, tmp_path):
    changes = {
        "model__value_embeddings": 1,
        "model__dropout": 0.0,
        "training__max_steps": 4,
        "validation__every_n_steps": 0,
        "sampling__every_n_steps": 0,
    }
    for world_size in (1, 2, 4):
        fork_ranks(world_size, *flags(dataset, tmp_path / str(world_size), "modern", **changes))
    one, two, four = (read_log(tmp_path / world_size / "log.csv") for world_size in ("1", "2", "4"))
    for other in (two, four):
        for a, b in zip(one[:-1], other[:-1], strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-3)  # orthogonalization runs in bfloat16
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=2e-2)


def collect_rows_and_losses(
    dataset: Path, out: Path, world_size: int, micro_batch_size: int
) -> tuple[list[list], list[float]]:
    """Run without dropout; return the rows of each step over all ranks, and all losses and gradient norms."""
    arguments = flags(
        dataset, out, training__micro_batch_size=micro_batch_size, model__dropout=0.0, saving__every_n_steps=0,
        sampling__every_n_steps=0,
    )  # fmt: skip
    fork_ranks(world_size, *arguments, fault="record_rows 0 0")
    return read_recorded_rows(out), [
        row[key]
        for row in read_log(out / "log.csv")
        for key in ("loss", "val_loss", "grad_norm")
        if row[key] is not None
    ]


def test_rows_and_losses_do_not_depend_on_ranks_or_micro_batch(dataset, tmp_path):
    expected_rows, expected_losses = collect_rows_and_losses(dataset, tmp_path / "1x16", 1, 16)
    assert len({tuple(row) for step in expected_rows[:8] for row in step}) == 8 * 16
    for world_size, micro_batch_size in ((1, 1), (2, 2), (4, 4)):
        rows, losses = collect_rows_and_losses(
            dataset, tmp_path / f"{world_size}x{micro_batch_size}", world_size, micro_batch_size
        )
        assert rows == expected_rows
        assert losses == pytest.approx(expected_losses, rel=1e-5)


def test_ranks_average_their_gradients(dataset, tmp_path):
    changes = {
        "model__dropout": 0.0,
        "training__max_steps": 6,
        "saving__every_n_steps": 0,
        "sampling__every_n_steps": 0,
    }
    call(train.main, *flags(dataset, tmp_path / "one", **changes))
    fork_ranks(2, *flags(dataset, tmp_path / "two", **changes))
    one, two = (read_log(tmp_path / name / "log.csv") for name in ("one", "two"))
    for key in ("loss", "grad_norm", "val_loss"):
        assert [row[key] for row in two if row[key]] == pytest.approx([row[key] for row in one if row[key]], rel=1e-5)


@pytest.mark.parametrize("change", [{"model__n_head": 3}, {"training__max_stpes": 3}, {"data__dataset": "none"}])
def test_one_rank_prints_a_user_error(change, dataset, tmp_path):
    done = torchrun(2, *flags(dataset, tmp_path / "never", **change), check=False)
    assert done.returncode != 0
    messages = ("is not divisible by --model.n-head 3", "Perhaps you meant", "There is no dataset at none")
    output, _, summary = (done.stdout + done.stderr).partition("train.py FAILED")
    assert sum(output.count(message) for message in messages) == 1
    if "model__n_head" in change or "data__dataset" in change:
        assert sum(summary.count(message) for message in messages) == 1, "torchrun's summary has the message"


def step_with_muon(rank: int, world_size: int, directory: str) -> None:
    """Make two updates; save the parameters, and how many matrices this rank orthogonalized."""
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=world_size)
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in ((24, 8), (8, 24), (16, 16), (24, 8))]
    optimizer = Muon({p: [8, 8, 8] if p.shape == (24, 8) else [p.size(0)] for p in parameters}, 0.02)
    optimizer.param_groups[0]["lr"] = 0.02
    counts, orthogonalize = [], optim.orthogonalize
    optim.orthogonalize = lambda matrices: counts.append(len(matrices)) or orthogonalize(matrices)
    for _ in range(2):
        for p in parameters:
            p.grad = torch.randn(p.shape)
        optimizer.step()
    result = {"parameters": [p.detach() for p in parameters], "orthogonalized": sum(counts)}
    torch.save(result, f"{directory}/{world_size}-{rank}.pt")
    dist.barrier()  # exit together: gloo aborts a rank whose peers close their connections
    dist.destroy_process_group()
    exit_now(0)


def test_muon_orthogonalization_is_divided_among_ranks(tmp_path):
    """Each rank orthogonalizes its share of the matrices, and the parameters are equal on all ranks."""
    for world_size in (1, 2, 4):
        directory = tmp_path / str(world_size)
        directory.mkdir()
        # forked processes start faster; with an accelerator PyTorch allows no backward pass in them
        method = "spawn" if torch.accelerator.is_available() else "fork"
        torch.multiprocessing.start_processes(
            step_with_muon, (world_size, str(directory)), world_size, start_method=method
        )
        ranks = [torch.load(directory / f"{world_size}-{rank}.pt") for rank in range(world_size)]
        for rank in ranks[1:]:
            assert all(map(torch.equal, rank["parameters"], ranks[0]["parameters"])), "equal on all ranks"
        if world_size == 1:
            single_rank = ranks[0]
        for a, b in zip(ranks[0]["parameters"], single_rank["parameters"], strict=True):
            torch.testing.assert_close(a, b, atol=2e-4, rtol=0)
        # per step, 6 matrices of (8, 8), 1 of (8, 24) and 1 of (16, 16); the share of a rank is rounded up
        assert ranks[0]["orthogonalized"] == 2 * sum(math.ceil(count / world_size) for count in (6, 1, 1))
