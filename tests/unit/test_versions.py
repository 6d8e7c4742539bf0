"""Checkpoints that other versions of BabyGPT wrote: rejected with a message, or adapted."""

import json
import math
import shutil

import pytest
from support.helpers import call
from support.runs import copy_killed_run, flags

import train
from babygpt.errors import ConfigError, UserError
from babygpt.training import checkpoint
from babygpt.training.log import column, read_log
from model import GPT
from tools import replay


@pytest.mark.parametrize("version", [1, 3])
def test_checkpoint_of_another_format_is_rejected(version, uninterrupted_run, dataset, tmp_path):
    """Neither resume nor GPT.from_pretrained loads a checkpoint of an earlier or later format version."""
    out = copy_killed_run(uninterrupted_run, 6, tmp_path / "other")
    loaded = checkpoint.load(checkpoint.latest(out))
    checkpoint.save(out, 6, loaded.model, loaded.optimizer, loaded.state | {"format": version}, keep=0)
    message = f"has checkpoint format {version}, but this version of BabyGPT reads format 2"
    with pytest.raises(UserError, match=message):
        call(train.main, *flags(dataset, out, general__init_from="resume"))
    with pytest.raises(UserError, match=message):
        GPT.from_pretrained(out)


@pytest.mark.parametrize(("name", "value"), [("logit_softcap", 15.0), ("rms_norm", True), ("unet", True)])
def test_checkpoint_with_a_removed_switch_is_rejected(name, value, uninterrupted_run, dataset, tmp_path):
    """Earlier versions had these fields."""
    out = copy_killed_run(uninterrupted_run, 6, tmp_path / "earlier")
    loaded = checkpoint.load(checkpoint.latest(out))
    state = loaded.state | {"model": loaded.state["model"] | {name: value}}
    checkpoint.save(out, 6, loaded.model, loaded.optimizer, state, keep=0)
    with pytest.raises(UserError, match=f"a model with {name} {value}, which this version .* does not support"):
        GPT.from_pretrained(out)
    with pytest.raises(UserError, match=f"a model with {name}"):
        call(train.main, *flags(dataset, out, general__init_from="resume"))


@pytest.mark.parametrize("scale", [None, 0.5])
def test_modern_checkpoint_of_an_earlier_version_resumes(scale, dataset, tmp_path):
    """Its removed switches are off, and attention_scale, if it was set, is converted. The head size is 8."""
    factor = None if scale is None else scale * math.sqrt(8)
    changes = {"model__value_embeddings": 1, "model__attention_score_factor": factor, "training__max_steps": 1}
    call(train.main, *flags(dataset, tmp_path, "modern", **changes))
    loaded = checkpoint.load(checkpoint.latest(tmp_path))
    earlier = {"logit_softcap": None, "rms_norm": False, "unet": False, "zero_init": True, "attention_scale": scale}
    fields = {name: value for name, value in loaded.state["model"].items() if name != "attention_score_factor"}
    state = loaded.state | {"model": fields | earlier}
    checkpoint.save(tmp_path, 1, loaded.model, loaded.optimizer, state, keep=0)
    assert GPT.from_pretrained(tmp_path).config.attention_score_factor == factor
    changes |= {"general__init_from": "resume", "training__max_steps": 2}
    call(train.main, *flags(dataset, tmp_path, "modern", **changes))


def test_run_with_the_first_version_of_the_order_resumes(dataset, tmp_path, capsys):
    """Its config.json and its checkpoints do not name the version. With a preset, the mismatch is an error."""
    whole, out = tmp_path / "whole", tmp_path / "earlier"
    call(train.main, *flags(dataset, whole, data__order=1, training__max_steps=6))
    copy_killed_run(whole, 3, out)
    for path in checkpoint.list_checkpoints(out):
        loaded = checkpoint.load(path)
        del loaded.state["data"]["order"], loaded.state["launches"][0]["config"]["data"]["order"]
        checkpoint.save(out, checkpoint.step_of(path), loaded.model, loaded.optimizer, loaded.state, keep=0)
    settings = json.loads((out / "config.json").read_text())
    del settings["data"]["order"]
    (out / "config.json").write_text(json.dumps(settings))
    shutil.copytree(out, tmp_path / "killed")
    (tmp_path / "killed" / "log.csv").write_text("".join((out / "log.csv").read_text().splitlines(True)[:4]))
    call(replay.main, tmp_path / "killed")
    printed = capsys.readouterr().out
    assert "steps 2 to 3: reproduced, bitwise equal" in printed
    assert "FAILED" not in printed
    with pytest.raises(ConfigError, match=r"data\.order: 1 before, 2 now"):
        call(train.main, *flags(dataset, out, general__init_from="resume", training__max_steps=6))
    capsys.readouterr()
    call(train.main, "--out-dir", out, "--init-from", "resume")
    assert "Settings that differ from those of the last launch" not in capsys.readouterr().out
    assert column(read_log(out / "log.csv"), "loss") == column(read_log(whole / "log.csv"), "loss")
