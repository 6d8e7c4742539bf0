"""Several ranks: the same rows, losses and weights as one rank, gradients averaged, updates shared out."""

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
from babygpt.training.optim import (
    Muon,
)


def test_two_ranks_stopped_across_an_epochs_end_go_on_equal_to_the_bit(dataset, tmp_path):
    fork_ranks(2, *flags(dataset, tmp_path / "uninterrupted"))
    out = copy_killed_run(tmp_path / "uninterrupted", 7, tmp_path / "stopped")
    fork_ranks(2, *flags(dataset, out, general__init_from="resume"))
    assert_bitwise_equal(out, tmp_path / "uninterrupted")


@pytest.mark.parametrize("world", [1, 2])
def test_a_modern_run_is_the_same_stopped_and_shared_out(world, dataset, tmp_path):
    """Muon, momentum's warm-up, every switch of the model, masks over documents that rows cut."""
    modern = {
        "model__value_embeddings": 1,
        "model__window": 7, "model__document_mask": [], "model__n_kv_head": 1, "model__attention_scale": 0.3,
        "optimizer__momentum_warmup_steps": 10, "optimizer__weight_decay": 0.1, "optimizer__cautious": [],
    }  # fmt: skip
    fork_ranks(world, *flags(dataset, tmp_path / "uninterrupted", "modern", **modern))
    out = copy_killed_run(tmp_path / "uninterrupted", 7, tmp_path / "stopped")
    fork_ranks(world, *flags(dataset, out, "modern", general__init_from="resume", **modern))
    assert_bitwise_equal(out, tmp_path / "uninterrupted")
    rows = read_log(out / "log.csv")
    assert rows[-1]["val_loss"] < rows[0]["val_loss"] - 0.3
    assert {"momentum_buffer"} == load_tensors(out, STEPS)[1]["h.0.attn.c_attn.weight"].keys()


def test_a_modern_step_is_the_same_for_any_number_of_ranks(dataset, tmp_path):
    changes = {
        "model__value_embeddings": 1,
        "model__dropout": 0.0,
        "training__max_steps": 4,
        "validation__every_n_steps": 0,
        "sampling__every_n_steps": 0,
    }
    for world in (1, 2, 4):
        fork_ranks(world, *flags(dataset, tmp_path / str(world), "modern", **changes))
    one, two, four = (read_log(tmp_path / world / "log.csv") for world in ("1", "2", "4"))
    for other in (two, four):
        for a, b in zip(one[:-1], other[:-1], strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-3)  # Newton-Schulz is bfloat16
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=2e-2)


def traced(dataset: Path, out: Path, world: int, micro: int) -> tuple[list[list], list[float]]:
    """Rows of every step over all ranks, and losses, of a run without dropout."""
    line = flags(
        dataset, out, training__micro_batch_size=micro, model__dropout=0.0, saving__every_n_steps=0,
        sampling__every_n_steps=0,
    )  # fmt: skip
    fork_ranks(world, *line, fault="record_rows 0 0")
    return read_recorded_rows(out), [
        row[key]
        for row in read_log(out / "log.csv")
        for key in ("loss", "val_loss", "grad_norm")
        if row[key] is not None
    ]


def test_rows_and_losses_are_the_same_for_any_number_of_ranks_and_any_micro_batch(dataset, tmp_path):
    rows, losses = traced(dataset, tmp_path / "1x16", 1, 16)
    assert len({tuple(row) for step in rows[:8] for row in step}) == 8 * 16
    for world, micro in ((1, 1), (2, 2), (4, 4)):
        rows_too, losses_too = traced(dataset, tmp_path / f"{world}x{micro}", world, micro)
        assert rows_too == rows
        assert losses_too == pytest.approx(losses, rel=1e-5)


def test_ranks_average_their_gradients(dataset, tmp_path):
    line = {"model__dropout": 0.0, "training__max_steps": 6, "saving__every_n_steps": 0, "sampling__every_n_steps": 0}
    call(train.main, *flags(dataset, tmp_path / "one", **line))
    fork_ranks(2, *flags(dataset, tmp_path / "two", **line))
    one, two = (read_log(tmp_path / name / "log.csv") for name in ("one", "two"))
    for key in ("loss", "grad_norm", "val_loss"):
        assert [row[key] for row in two if row[key]] == pytest.approx([row[key] for row in one if row[key]], rel=1e-5)


@pytest.mark.parametrize("change", [{"model__n_head": 3}, {"training__max_stpes": 3}, {"data__dataset": "none"}])
def test_one_rank_prints_a_user_error(change, dataset, tmp_path):
    done = torchrun(2, *flags(dataset, tmp_path / "never", **change), check=False)
    assert done.returncode != 0
    messages = ("is not divisible by n_head 3", "Perhaps you meant", "There is no data set at none")
    assert sum((done.stderr + done.stdout).count(message) for message in messages) == 1


def share_the_work(rank: int, world_size: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in ((24, 8), (8, 24), (16, 16), (24, 8))]
    optimizer = Muon({p: [8, 8, 8] if p.shape == (24, 8) else [p.size(0)] for p in parameters}, 0.02)
    optimizer.param_groups[0]["lr"] = 0.02
    done, whole = [], optim.orthogonalize
    optim.orthogonalize = lambda matrices: done.append(len(matrices)) or whole(matrices)
    for _ in range(2):
        for p in parameters:
            p.grad = torch.randn(p.shape)
        optimizer.step()
    torch.save({"parameters": [p.detach() for p in parameters], "done": sum(done)}, f"{folder}/{world_size}-{rank}.pt")
    dist.barrier()  # all leave together: gloo aborts a rank whose peers hang up on it
    dist.destroy_process_group()
    exit_now(0)


def test_ranks_share_out_the_orthogonalising_and_step_alike(tmp_path):
    for world_size in (1, 2, 4):
        folder = tmp_path / str(world_size)
        folder.mkdir()
        # forked processes start faster; with an accelerator PyTorch allows no backward pass in them
        method = "spawn" if torch.accelerator.is_available() else "fork"
        torch.multiprocessing.start_processes(
            share_the_work, (world_size, str(folder)), world_size, start_method=method
        )
        ranks = [torch.load(folder / f"{world_size}-{rank}.pt") for rank in range(world_size)]
        for rank in ranks[1:]:
            assert all(map(torch.equal, rank["parameters"], ranks[0]["parameters"])), "the same on every rank"
        if world_size == 1:
            alone = ranks[0]
        for a, b in zip(ranks[0]["parameters"], alone["parameters"], strict=True):
            torch.testing.assert_close(a, b, atol=2e-4, rtol=0)
        # 6 of (8, 8), 1 of (8, 24), 1 of (16, 16) in two steps; a rank's share is rounded up
        assert ranks[0]["done"] == 2 * sum(math.ceil(count / world_size) for count in (6, 1, 1))
