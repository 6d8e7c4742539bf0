"""finetune.py on several ranks: losses equal those of one rank, and a resume is bitwise exact."""

import pytest
from support.chat import make_base_model, save_instructions, save_preferences
from support.runs import assert_bitwise_equal, copy_killed_run, fork_ranks

import finetune
from babygpt.chat.conversations import DataSource, prepare
from babygpt.chat.dpo import COLUMNS
from babygpt.training.log import read_log

STEPS = 6


@pytest.fixture(params=["sft", "dpo"])
def arguments(request, dataset, tmp_path) -> list[object]:
    """The command line of a small run without --out-dir: an epoch has an incomplete last step."""
    make_base_model(dataset, tmp_path / "base")
    if request.param == "sft":
        data, kind, per_step = save_instructions(tmp_path / "data.jsonl", 50), "conversations", ("--rows", 5)
    else:
        data, kind, per_step = save_preferences(tmp_path / "data.jsonl", 31), "preferences", ("--pairs", 10)
    directory = prepare(DataSource(str(data)), kind, 0.1, tmp_path / "chat")
    return [
        request.param, tmp_path / "base", directory, *per_step, "--max-steps", STEPS, "--max-lr", 1e-3,
        "--micro-batch-size", 2, "--validate-every", 2, "--save-every", 1, "--keep", 0, "--device", "cpu", "--dtype",
        "float32",
    ]  # fmt: skip


def test_losses_do_not_depend_on_the_number_of_ranks(arguments, tmp_path):
    """Rows and pairs of a step are the same, also in the last step of an epoch, which has fewer."""
    logs = []
    for world_size in (1, 2, 4):
        out = tmp_path / f"ranks-{world_size}"
        fork_ranks(world_size, *arguments, "--out-dir", out, script=finetune)
        logs.append(read_log(out / "log.csv"))
    assert logs[0][-2]["epoch"] > 0
    values = ("loss", "val_loss", "grad_norm", *(COLUMNS if arguments[0] == "dpo" else ()))
    for log in logs[1:]:
        for row, expected in zip(log, logs[0], strict=True):
            assert [row["tokens"], row["epoch"]] == [expected["tokens"], expected["epoch"]]
            for name in values:
                assert row[name] == pytest.approx(expected[name], abs=1e-5), (row["step"], name)


def test_two_ranks_resume_bitwise(arguments, tmp_path):
    fork_ranks(2, *arguments, "--out-dir", tmp_path / "whole", script=finetune)
    out = copy_killed_run(tmp_path / "whole", 2, tmp_path / "resumed")
    fork_ranks(2, "resume", out, script=finetune)
    assert_bitwise_equal(out, tmp_path / "whole", STEPS)
