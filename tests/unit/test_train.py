"""Test runs of train.py: results, resume, micro-batches, periodic tasks, non-finite values, modes, user errors."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.helpers import call, save_hellaswag
from support.runs import (
    ROOT,
    STEPS,
    assert_bitwise_equal,
    copy_killed_run,
    flags,
    load_tensors,
    read_log_without_timing,
)

import train
import train_config
from babygpt.errors import ConfigError, UserError, run
from babygpt.training import checkpoint, run_dir
from babygpt.training.distributed import Ranks
from babygpt.training.log import COLUMNS, read_log, read_samples

# ---------------------------------------------------------------------------------------------------------
# results of a run


def test_run_reduces_the_loss_and_writes_its_files(uninterrupted_run):
    rows = read_log(uninterrupted_run / "log.csv")
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    assert [row["tokens"] for row in rows] == [256 * step for step in range(STEPS + 1)]
    assert (uninterrupted_run / "log.csv").read_text().splitlines()[0] == ",".join(COLUMNS)
    assert [row["step"] for row in rows if row["val_loss"]] == [0, 4, 8, 12, STEPS]
    assert rows[-1]["val_loss"] < rows[0]["val_loss"] - 0.3
    assert rows[-1]["loss"] is None
    assert rows[-1]["val_bpb"]
    assert {rows[0]["epoch"], rows[-2]["epoch"]} == {0, 1}, "the run crosses the end of an epoch"
    assert (uninterrupted_run / "plot.png").stat().st_size > 10_000
    assert f"step {STEPS} of {STEPS}" in (uninterrupted_run / "report.html").read_text()
    assert json.loads((uninterrupted_run / "config.json").read_text())["model"]["n_embd"] == 16
    samples = read_samples(uninterrupted_run / "samples.txt")
    assert [step for step, _ in samples] == [step for step in (5, 10, STEPS) for _ in range(4)]
    assert all(text.startswith("Hello, I'm a language model,") for _, text in samples)
    names = load_file(uninterrupted_run / "checkpoints" / f"step_{STEPS:08d}" / "model.safetensors").keys()
    assert not [name for name in names if "_orig_mod" in name or name.startswith("module.")]


def test_run_uses_the_compiled_model_and_the_bf16_flags(dataset, tmp_path, monkeypatch):
    """Training and validation call the compiled model, and the bfloat16 flags reach the model and DDP."""
    forwards, ddp_bf16 = [], []

    class Compiled(torch.nn.Module):
        def __init__(self, model: torch.nn.Module, dynamic: bool):
            super().__init__()
            self.model, self.config = model, model.config

        def forward(self, idx: torch.Tensor, targets: torch.Tensor, reduction: str) -> torch.Tensor:
            assert self.model.training == self.training
            assert self.model.bf16_activations
            forwards.append("training" if self.training else "validation")
            return self.model(idx, targets, reduction=reduction)

    monkeypatch.setattr(torch, "compile", Compiled)
    monkeypatch.setattr(Ranks, "data_parallel", lambda self, model, bf16: ddp_bf16.append(bf16) or model)
    changes = {"training__max_steps": 4, "sampling__every_n_steps": 0, "training__compile": "on"}
    changes |= {"training__bf16_activations": [], "training__bf16_gradients": []}
    call(train.main, *flags(dataset, tmp_path / "run", **changes))
    assert forwards.count("training") == 4 * 256 // 16 // 4
    assert forwards[0] == forwards[-1] == "validation"
    assert ddp_bf16 == [True]


def test_cosine_schedule_follows_the_warmup(uninterrupted_run):
    lr = [row["lr"] for row in read_log(uninterrupted_run / "log.csv")[:-1]]
    assert lr[:4] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2, 1e-2])
    assert lr[3 + 5] == pytest.approx(
        1e-2 * (0.1 + 0.9 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * 5 / 11)).item()))
    )


# ---------------------------------------------------------------------------------------------------------
# stop and resume


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_run_resumed_at_any_step_equals_uninterrupted_run(step, uninterrupted_run, dataset, tmp_path):
    out = copy_killed_run(uninterrupted_run, step, tmp_path / "stopped")
    call(train.main, *flags(dataset, out, general__init_from="resume"))
    assert_bitwise_equal(out, uninterrupted_run)


def test_resume_without_a_checkpoint_starts_from_scratch(uninterrupted_run, dataset, tmp_path):
    call(train.main, *flags(dataset, tmp_path / "fresh", general__init_from="resume"))
    assert_bitwise_equal(tmp_path / "fresh", uninterrupted_run)


def test_resume_in_a_new_directory_keeps_the_presets_weights(uninterrupted_run, dataset, tmp_path, monkeypatch):
    """Without a checkpoint, `resume` starts finetune-shakespeare from the weights of GPT-2, not from scratch."""
    monkeypatch.setitem(train_config.PRESETS, "finetune", {"general": {"init_from": str(uninterrupted_run)}})
    changes = {"saving__every_n_steps": 0, "training__max_steps": 2}
    call(train.main, *flags(dataset, tmp_path / "plain", "finetune", **changes))
    call(train.main, *flags(dataset, tmp_path / "resumed", "finetune", **changes, general__init_from="resume"))
    assert read_log_without_timing(tmp_path / "resumed") == read_log_without_timing(tmp_path / "plain")


def test_sigterm_saves_and_exits_with_code_0(uninterrupted_run, dataset, tmp_path):
    out = tmp_path / "stopped"
    arguments = flags(dataset, out, saving__every_n_steps=1000)
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("step      3 | loss"):
            process.send_signal(signal.SIGTERM)
            break
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    stopped_at = int(re.search(r"Stopped and saved at step (\d+)", stdout).group(1))
    assert 4 <= stopped_at < STEPS
    assert [row["step"] for row in read_log(out / "log.csv")] == list(range(stopped_at))
    call(train.main, *flags(dataset, out, saving__every_n_steps=1000, general__init_from="resume"))
    assert_bitwise_equal(out, uninterrupted_run)


@pytest.mark.parametrize("stop_step", range(STEPS))
def test_stop_request_during_any_step_loses_no_update(stop_step, uninterrupted_run, dataset, tmp_path, monkeypatch):
    out, train_step, calls = tmp_path / "stopped", train.train_step, []

    def step_with_stop(*args, stop, **kwargs):
        calls.append(stop)
        return train_step(*args, stop=len(calls) == stop_step + 1, **kwargs)

    monkeypatch.setattr(train, "train_step", step_with_stop)
    call(train.main, *flags(dataset, out, saving__every_n_steps=6))
    monkeypatch.setattr(train, "train_step", train_step)
    saved = checkpoint.read_state(checkpoint.latest(out))["step"]
    assert stop_step + 1 <= saved <= stop_step + 2, "saved after the step, or after the next one, which was in flight"
    assert len(calls) == saved
    call(train.main, *flags(dataset, out, general__init_from="resume"))
    assert_bitwise_equal(out, uninterrupted_run)


# ---------------------------------------------------------------------------------------------------------
# micro-batches


def test_loss_does_not_depend_on_the_micro_batch_size(dataset, tmp_path):
    losses = []
    for size in (1, 4, 16):
        arguments = flags(
            dataset, tmp_path / str(size), training__micro_batch_size=size, model__dropout=0.0, training__max_steps=6,
            optimizer__grad_clip=0.05, saving__every_n_steps=0, sampling__every_n_steps=0,
        )  # fmt: skip
        call(train.main, *arguments)
        losses.append([row["loss"] for row in read_log(tmp_path / str(size) / "log.csv")[:-1]])
    assert losses[0] == pytest.approx(losses[2], rel=1e-5)
    assert losses[1] == pytest.approx(losses[2], rel=1e-5)


# ---------------------------------------------------------------------------------------------------------
# periodic tasks


def test_periodic_tasks_run_without_gradients_or_dropout(dataset, tmp_path, monkeypatch):
    hidden, modes = train.GPT.hidden, []

    def record_modes(self, *args, **kwargs):
        modes.append((torch.is_grad_enabled(), self.training))
        return hidden(self, *args, **kwargs)

    monkeypatch.setattr(train.GPT, "hidden", record_modes)
    arguments = flags(
        dataset, tmp_path / "run", training__max_steps=2, training__compile="off", evaluation__every_n_steps=1,
        validation__every_n_steps=1,
        sampling__every_n_steps=1, evaluation__file=save_hellaswag(tmp_path / "questions.jsonl", 6),
    )  # fmt: skip
    call(train.main, *arguments)
    assert modes.count((True, True)) == 2 * 4, "the micro-batches of two steps"
    assert modes.count((False, False)) == len(modes) - 2 * 4 > 0


def test_periodic_tasks_do_not_change_training(uninterrupted_run, dataset, tmp_path):
    """Validation, HellaSwag and sampling before every step leave losses, gradients and weights bitwise equal."""
    questions = save_hellaswag(tmp_path / "questions.jsonl", 6)
    run = tmp_path / "run"
    arguments = flags(
        dataset, run, validation__every_n_steps=1, evaluation__every_n_steps=1, evaluation__file=questions,
        evaluation__limit=5, sampling__every_n_steps=1, model__block_size=16,
    )  # fmt: skip
    call(train.main, *arguments)
    rows, expected = read_log(run / "log.csv"), read_log(uninterrupted_run / "log.csv")
    assert [(row["loss"], row["grad_norm"]) for row in rows] == [(row["loss"], row["grad_norm"]) for row in expected]
    assert all(row["hellaswag"] in (0, 0.2, 0.4, 0.6, 0.8, 1) for row in rows[1:])
    weights, expected_weights = (load_tensors(path, STEPS)[0].values() for path in (run, uninterrupted_run))
    assert all(torch.equal(a, b) for a, b in zip(weights, expected_weights, strict=True))


def test_throughput_excludes_validation(dataset, tmp_path, monkeypatch):
    validate = train.validate
    monkeypatch.setattr(train, "validate", lambda *args: (time.sleep(0.5), validate(*args))[1])
    call(train.main, *flags(dataset, tmp_path / "run", validation__every_n_steps=2, training__max_steps=6))
    rows = read_log(tmp_path / "run" / "log.csv")
    assert max(row["step_ms"] for row in rows[:-1]) < 450
    assert all(row["tokens_per_s"] == pytest.approx(256 / row["step_ms"] * 1e3) for row in rows[:-1])


# ---------------------------------------------------------------------------------------------------------
# non-finite values


def test_nonfinite_step_is_not_applied_logged_or_saved(dataset, tmp_path, monkeypatch):
    train_step, unchanged = train.train_step, []  # per step and parameter

    def step_with_infinity(state, *args, **kwargs):
        model = state.model
        before = [p.detach().clone() for p in model.parameters()]
        if len(unchanged) == 5:
            with torch.no_grad():
                model.wte.weight[0, 0] = float("inf")  # only in the forward pass of this step
        status = train_step(state, *args, **kwargs)
        if len(unchanged) == 5:
            with torch.no_grad():
                model.wte.weight[0, 0] = before[0][0, 0]
        unchanged.append([torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)])
        return status

    monkeypatch.setattr(train, "train_step", step_with_infinity)
    arguments = flags(
        dataset, tmp_path / "run", validation__every_n_steps=0, saving__every_n_steps=7, sampling__every_n_steps=0
    )
    message = r"Step 5: the loss is .* and the gradient norm is nan.*There is no checkpoint yet\. Start again"
    with pytest.raises(UserError, match=message):
        call(train.main, *arguments)
    assert not any(unchanged[4]), "a finite step changes all weights"
    assert all(unchanged[5]), "the non-finite step changes none"
    assert all(unchanged[6]), "nor does the step in flight"
    assert [row["step"] for row in read_log(tmp_path / "run" / "log.csv")] == [0, 1, 2, 3, 4]
    assert checkpoint.list_checkpoints(tmp_path / "run") == []


@pytest.mark.parametrize("clip", ["1.0", "0.0"])
def test_zero_gradient_norm_is_an_error(clip, dataset, tmp_path, monkeypatch):
    """A loss that does not depend on any weight stops the run at its step, and its update is not applied."""
    forward, applied = train.GPT.forward, []
    train_step = train.train_step

    def record_update(state, *args, **kwargs):
        before = [p.detach().clone() for p in state.model.parameters()]
        status = train_step(state, *args, **kwargs)
        applied.append(not all(map(torch.equal, before, state.model.parameters())))
        return status

    def constant_loss(self, *args, **kwargs):
        loss = forward(self, *args, **kwargs)
        return loss - loss + loss.detach() if len(applied) == 3 and self.training else loss

    monkeypatch.setattr(train, "train_step", record_update)
    monkeypatch.setattr(train.GPT, "forward", constant_loss)
    with pytest.raises(UserError, match=r"Step 3: the gradient norm is exactly 0 at a loss of \d\.\d+, "):
        call(train.main, *flags(dataset, tmp_path / "zero", saving__every_n_steps=7, optimizer__grad_clip=clip))
    assert applied[:4] == [True, True, True, False]
    assert not any(applied[4:])
    assert checkpoint.list_checkpoints(tmp_path / "zero") == []


# ---------------------------------------------------------------------------------------------------------
# starting and resuming, other modes


def test_existing_run_is_not_overwritten(uninterrupted_run, dataset):
    before = (uninterrupted_run / "log.csv").read_bytes()
    with pytest.raises(ConfigError, match=r"already contains a run.*--init-from resume`.*--out-dir"):
        call(train.main, *flags(dataset, uninterrupted_run))
    assert (uninterrupted_run / "log.csv").read_bytes() == before


def test_run_without_a_checkpoint_may_start_again(uninterrupted_run, dataset, tmp_path):
    out = copy_killed_run(uninterrupted_run, 0, tmp_path / "run")
    (out / run_dir.FINISHED).unlink()
    assert checkpoint.list_checkpoints(out) == []
    assert len(read_log(out / "log.csv")) > 1
    call(train.main, *flags(dataset, out))
    assert read_log_without_timing(out) == read_log_without_timing(uninterrupted_run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model__n_layer": 3}, "model.n_layer: 2 before, 3 now"),
        ({"model__block_size": 8}, "data.block_size: 16 before, 8 now"),
        ({"general__seed": 7}, "data.seed: 1337 before, 7 now"),
        ({"data__num_streams": 2}, "data.num_streams: 4 before, 2 now"),
        ({"data__chunk_tokens": 50}, "data.chunk_tokens: 100 before, 50 now"),
        ({"optimizer__name": "muon"}, "optimizer.name: adamw before, muon now"),
    ],
)
def test_resume_names_a_setting_that_must_not_change(change, message, uninterrupted_run, dataset):
    with pytest.raises(ConfigError, match=re.escape(message)):
        call(train.main, *flags(dataset, uninterrupted_run, general__init_from="resume", **change))


def test_resume_without_an_intact_checkpoint_is_rejected(uninterrupted_run, dataset, tmp_path):
    """If all checkpoints are corrupted, the resume is rejected and changes no file of the run."""
    out = copy_killed_run(uninterrupted_run, 2, tmp_path / "run")
    for path in checkpoint.list_checkpoints(out):
        (path / "model.safetensors").write_bytes(b"")
    before = {name: (out / name).read_bytes() for name in ("log.csv", "samples.txt", "config.json")}
    with pytest.raises(ConfigError, match="None of the 2 checkpoints"):
        call(train.main, *flags(dataset, out, general__init_from="resume"))
    assert before == {name: (out / name).read_bytes() for name in before}


def test_resume_before_the_first_checkpoint_keeps_init_from(uninterrupted_run, dataset, tmp_path):
    """A run that was killed before its first checkpoint restarts from the weights that it was initialized with."""
    changes = {"general__init_from": uninterrupted_run, "saving__every_n_steps": 0, "training__max_steps": 2}
    call(train.main, *flags(dataset, tmp_path / "run", **changes))
    first = read_log_without_timing(tmp_path / "run")
    for _ in range(2):
        call(train.main, *flags(dataset, tmp_path / "run", **changes | {"general__init_from": "resume"}))
        assert read_log_without_timing(tmp_path / "run") == first


def test_ranks_that_see_different_checkpoints_are_rejected(uninterrupted_run, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(train.Ranks, "gather", lambda self, number: [14, number, 12, 12] if number < 0 else [number])
    with pytest.raises(ConfigError, match="latest step by rank: 14, none, 12, 12"):
        call(train.main, *flags(dataset, tmp_path / "run", general__init_from="resume"))


def test_modern_checkpoint_is_not_resumed_as_gpt2(dataset, tmp_path):
    """A changed switch is rejected even if it adds no parameters, so that the weights would load."""
    disabled = ["rope", "x0-shortcut", "partial-key-offset"]
    switches = [f"--model.no-{name}" for name in disabled] + ["--model.bias"]
    changes = {"model__value_embeddings": 0, "optimizer__name": "adamw", "training__max_steps": 1}
    call(train.main, *flags(dataset, tmp_path / "run", "modern", **changes), *switches)
    with pytest.raises(ConfigError, match=r"model\.qk_norm: True before, None now") as raised:
        call(train.main, *flags(dataset, tmp_path / "run", general__init_from="resume", training__max_steps=2))
    assert "model.relu2: True before" in str(raised.value)
    assert "rope" not in str(raised.value)


def test_warnings_have_one_prefix(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "untested_torch_warning", lambda: "BabyGPT has not been tested")
    call(train.main, *flags(dataset, tmp_path / "run", training__max_steps=1))
    assert "warning: BabyGPT has not been tested" in capsys.readouterr().err.splitlines()


def test_resume_beyond_max_steps_is_rejected(uninterrupted_run, dataset):
    with pytest.raises(ConfigError, match=r"step_00000014 is past --max-steps 5"):
        call(train.main, *flags(dataset, uninterrupted_run, general__init_from="resume", training__max_steps=5))


def test_resume_prints_changed_settings(uninterrupted_run, dataset, tmp_path, capsys):
    out = copy_killed_run(uninterrupted_run, 10, tmp_path / "stopped")
    call(train.main, *flags(dataset, out, general__init_from="resume", optimizer__max_lr=1e-3))
    assert "optimizer.max_lr was 0.01, is now 0.001" in capsys.readouterr().out


def initial_weights(run: Path) -> str:
    return json.loads((run / "config.json").read_text())["general"]["init_from"]


def test_init_from_loads_the_weights_of_another_run(uninterrupted_run, dataset, tmp_path):
    """A resume keeps the path in config.json. Weights of another shape, or a file as the run directory, are errors."""
    arguments = flags(dataset, tmp_path / "tuned", general__init_from=uninterrupted_run, training__max_steps=1)
    call(train.main, *arguments)
    assert initial_weights(tmp_path / "tuned") == str(uninterrupted_run)
    first_row = read_log(tmp_path / "tuned" / "log.csv")[0]
    last_row = read_log(uninterrupted_run / "log.csv")[-1]
    assert first_row["val_loss"] == last_row["val_loss"]
    call(train.main, *flags(dataset, tmp_path / "tuned", general__init_from="resume", training__max_steps=2))
    assert initial_weights(tmp_path / "tuned") == str(uninterrupted_run)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        call(train.main, *flags(dataset, tmp_path / "file"))
    with pytest.raises(ConfigError, match="n_embd: 16 in the weights, 32 in the settings"):
        call(train.main, *flags(dataset, tmp_path / "wide", general__init_from=uninterrupted_run, model__n_embd=32))


@pytest.mark.parametrize("mode", ["val", "eval", "sample"])
def test_each_mode_evaluates_a_checkpoint_and_writes_nothing(mode, uninterrupted_run, dataset, tmp_path, capsys):
    before = {path: path.read_bytes() for path in uninterrupted_run.rglob("*") if path.is_file()}
    questions = save_hellaswag(tmp_path / "questions.jsonl", 6)
    call(train.main, *flags(dataset, uninterrupted_run, general__mode=[mode], evaluation__file=questions))
    out = capsys.readouterr().out
    val_loss = read_log(uninterrupted_run / "log.csv")[-1]["val_loss"]
    messages = {"val": f"validation loss {val_loss:.4f}", "eval": "hellaswag karpathy acc_norm", "sample": "Hello, I'm"}
    assert messages[mode] in out
    assert before == {path: path.read_bytes() for path in uninterrupted_run.rglob("*") if path.is_file()}


def test_train_mode_neither_validates_nor_samples(dataset, tmp_path):
    call(train.main, *flags(dataset, tmp_path / "run", general__mode=["train"], training__max_steps=5))
    assert not [row for row in read_log(tmp_path / "run" / "log.csv") if row["val_loss"]]
    assert "Hello" not in (tmp_path / "run" / "samples.txt").read_text()


# ---------------------------------------------------------------------------------------------------------
# user errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"training__batch_tokens": 250}, "--training.batch-tokens 250 is not divisible by micro_batch_size x"),
        ({"model__n_head": 3}, "--model.n-embd 16 is not divisible by --model.n-head 3"),
        ({"data__dataset": "data/none"}, "There is no dataset at data/none"),
        ({"training__batch_tokens": 4096}, "too few rows for one step"),
        ({"optimizer__max_lr": "fast"}, "Error parsing --optimizer.max-lr"),
        ({"training__max_stpes": 3}, "Perhaps you meant"),
        ({"model__vocab_size": 200}, "--model.vocab-size 200 does not match"),
        ({"preset": "modern", "model__eot_id": 7}, "--model.eot-id 7 is not the dataset's EOT id"),
        (
            {"preset": "modern", "model__value_embeddings": 2},
            "--model.value-embeddings 2 is more than half of --model.n-layer",
        ),
        ({"model__rope": []}, "--model.rope: the model of gpt2 is a classic GPT-2"),
        (
            {"model__block_size": 512, "training__batch_tokens": 2048},
            "validation tokens, but one row takes",
        ),
        ({"general__init_from": "out/none"}, "There is no model at out/none"),
        ({"general__init_from": "x" * 300}, "There is no model at xxx"),
    ],
)
def test_user_error_prints_one_message_and_leaves_no_files(change, message, dataset, tmp_path, capsys):
    """The exit code is 2, there is no traceback, and the run directory is not created."""
    defaults = {"model__value_embeddings": 1} if change.get("preset") == "modern" else {}
    with pytest.raises(SystemExit) as raised:
        call(lambda: run(train.main), *flags(dataset, tmp_path / "never", **defaults | change))
    assert raised.value.code == 2
    out, err = capsys.readouterr()
    assert message in err + out
    assert "Traceback" not in err
    assert not (tmp_path / "never").exists()


def test_rejected_run_keeps_the_files_of_its_directory(dataset, tmp_path):
    (tmp_path / "notes.tmp").write_text("notes")
    with pytest.raises(UserError, match="There is no model at out/none"):
        call(train.main, *flags(dataset, tmp_path, general__init_from="out/none"))
    (tmp_path / "empty").mkdir()
    for out in (tmp_path, tmp_path / "empty"):
        with pytest.raises(ConfigError, match="too few rows for one step"):
            call(train.main, *flags(dataset, out, training__batch_tokens=4096))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "notes.tmp"]
    assert (tmp_path / "notes.tmp").read_text() == "notes"


def test_validation_uses_the_block_size_of_the_checkpoint(dataset, uninterrupted_run, tmp_path, capsys):
    """--general.mode val uses the block size of the checkpoint, not of the preset."""
    changes = {"general__mode": ["val"], "general__init_from": uninterrupted_run, "model__block_size": 512}
    call(train.main, *flags(dataset, tmp_path / "never", **changes))
    val_loss = read_log(uninterrupted_run / "log.csv")[-1]["val_loss"]
    assert f"validation loss {val_loss:.4f}" in capsys.readouterr().out


def test_run_without_validation_needs_no_validation_tokens(dataset, tmp_path):
    changes = {"model__block_size": 512, "training__micro_batch_size": 1, "training__batch_tokens": 512}
    call(train.main, *flags(dataset, tmp_path / "run", validation__every_n_steps=0, training__max_steps=1, **changes))


def test_script_exits_with_code_2_after_a_user_error(dataset, tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), *flags(dataset, tmp_path / "never", model__n_head=3)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == "error: --model.n-embd 16 is not divisible by --model.n-head 3. Use a multiple of 3."


def test_all_configuration_errors_are_reported_at_once(dataset, tmp_path):
    with pytest.raises(ConfigError) as raised:
        call(train.main, *flags(dataset, tmp_path, model__n_head=3, sampling__top_p=2.0, optimizer__eps=0))
    assert all(message in str(raised.value) for message in ("n-head 3", "--sampling.top-p 2.0", "--optimizer.eps 0.0"))
