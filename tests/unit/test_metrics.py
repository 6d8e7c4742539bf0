"""What a run prints: durations, the time that is left, the settings, and the summary at its end."""

import pytest
import torch
from support.helpers import call
from support.runs import flags

import train
from babygpt.console import counted, duration
from babygpt.training import run_dir
from babygpt.training.distributed import Ranks
from babygpt.training.metrics import Metrics


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (125, "2 min 5 s"), (599.4, "9 min 59 s"), (599.6, "10 min"),
        (3599, "1 h 0 min"), (3 * 3600 + 12 * 60, "3 h 12 min"), (86399, "1 d 0 h"), (51 * 3600, "2 d 3 h"),
    ],
)  # fmt: skip
def test_duration_has_two_units(seconds, text):
    assert duration(seconds) == text


def test_counted_noun_agrees_with_its_number():
    assert [counted(n, noun) for n, noun in ((1, "shard"), (1024, "shard"), (0, "batch"))] == [
        "1 shard", "1,024 shards", "0 batches",
    ]  # fmt: skip


def test_time_per_step_is_a_moving_average(tmp_path):
    """It includes the tasks between steps, adapts to a change of speed, and excludes the first step."""
    metrics = Metrics(tmp_path, Ranks(0, 0, 1, torch.device("cpu")), 0, 10_000, None, 0, 1)
    now = 0.0
    for seconds in [60.0] + [1.0] * 9 + [11.0]:  # compilation, steps, a step with an evaluation
        now += seconds
        metrics.measure_time(now)
    assert metrics.seconds_per_step == pytest.approx(2.0)
    for _ in range(5000):
        now += 3.0
        metrics.measure_time(now)
    assert metrics.seconds_per_step == pytest.approx(3.0, rel=0.01)


def test_console_shows_only_changed_settings(dataset, tmp_path, capsys):
    call(train.main, *flags(dataset, tmp_path / "run", optimizer__max_lr=0.1, training__max_steps=1))
    printed = capsys.readouterr().out
    settings = printed[: printed.index("parameters on")]
    assert "max_lr=0.1" in settings
    assert not {"muon", "embedding_lr", "momentum", "weight_decay", "n_kv_head"} & {*settings.replace("=", " ").split()}
    config = run_dir.read_config(tmp_path / "run" / "config.json")
    assert config["optimizer"]["weight_decay"] == 0.1, "config.json has all settings"
    assert "Finished 1 steps" not in printed
    assert "Finished 1 step in " in printed


def test_summary_has_scores_files_and_the_next_command(tmp_path):
    out = tmp_path / "my run"
    (out / "checkpoints" / "step_00000010").mkdir(parents=True)
    (out / "checkpoints" / "step_00000020").mkdir()
    metrics = Metrics(out, Ranks(0, 0, 1, torch.device("cpu")), 0, 20, None, 0, 1)
    for step, loss, accuracy in ((0, 5.0, 0.25), (10, 3.25, 0.5), (20, 3.5, 0.375)):
        metrics.write({"step": step, "val_loss": loss, "val_bpb": loss / 2, "hellaswag": accuracy})
    assert metrics.summary().split("\n")[1:] == [
        "  validation loss 3.5000 (best: 3.2500 at step 10), 1.7500 bits per byte",
        "  HellaSwag acc_norm 0.3750 (best: 0.5000 at step 10)",
        f"  {out}: log.csv, samples.txt, checkpoints/step_00000020",
        f"  To sample: python sample.py '{out}'",
    ]
