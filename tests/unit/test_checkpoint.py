"""Checkpoints: saves are atomic, the newest intact one is loaded, and corrupted or malicious files are rejected."""

import json
import os
import resource
import shutil
import signal

import pytest
import torch

from babygpt.errors import UserError
from babygpt.training import checkpoint
from babygpt.training.checkpoint import latest, list_checkpoints, load, model_tensors, save
from model import GPT, GPTConfig, ModernConfig

STATE = {"step": 1, "tokens": 10, "model": {}, "tokenizer": {"name": "gpt2"}}


def small(**fields: object) -> GPT:
    return GPT(GPTConfig(**{"block_size": 8, "vocab_size": 50, "n_layer": 1, "n_head": 2, "n_embd": 8} | fields))


def save_steps(run, *steps: int, keep: int = 0) -> GPT:
    model = small()
    for step in steps:
        save(run, step, model_tensors(model), {"w": {"step": torch.tensor(float(step))}}, STATE | {"step": step}, keep)
    return model


def test_loaded_checkpoint_equals_the_saved_one(tmp_path):
    """Its tensors are bitwise equal, and a tied head is stored once."""
    model = save_steps(tmp_path, 7)
    loaded = load(latest(tmp_path))
    assert loaded.state["step"] == 7
    assert loaded.optimizer["w"]["step"] == 7
    assert all(torch.equal(loaded.model[name], tensor) for name, tensor in model_tensors(model).items())
    assert "lm_head.weight" not in loaded.model


def test_latest_checkpoint_skips_incomplete_ones(tmp_path, capsys):
    """The latest checkpoint is the complete one with the highest step, compared as a number."""
    save_steps(tmp_path, 9, 10, 100)
    assert latest(tmp_path).name == "step_00000100"
    (tmp_path / "checkpoints" / "step_00000100" / "manifest.json").unlink()
    shutil.copytree(tmp_path / "checkpoints" / "step_00000010", tmp_path / "checkpoints" / ".step_00000200.tmp")
    assert latest(tmp_path).name == "step_00000010"
    assert "step_00000100 is incomplete" in capsys.readouterr().err
    assert latest(tmp_path / "nothing") is None


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_corrupted_file_is_named_in_the_error(file, damage, tmp_path):
    """A flipped bit, a truncated file or a missing file makes `load` fail and `latest` skip the checkpoint."""
    save_steps(tmp_path, 1)
    path = tmp_path / "checkpoints" / "step_00000001" / file
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    path.write_bytes(data[:-1] if damage == "truncate" else data)
    if damage == "remove":
        path.unlink()
    with pytest.raises(UserError, match="step_00000001 is (corrupted: " + file + "|incomplete)"):
        load(path.parent)
    assert latest(tmp_path) is None


def test_failed_save_keeps_the_earlier_checkpoints(tmp_path, monkeypatch):
    """It leaves no new checkpoint, and the next save deletes its temporary files."""
    save_steps(tmp_path, 1)
    for name in ("save_file", "sha256", "_sync"):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, name, lambda *args: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                save_steps(tmp_path, 2)
        assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000001"]
        assert latest(tmp_path).name == "step_00000001"
    save_steps(tmp_path, 2)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step_00000001", "step_00000002"]


def test_save_keeps_the_newest_and_replaces_an_equal_step(tmp_path):
    save_steps(tmp_path, 1, 2, 3, 4, 4, keep=2)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step_00000003", "step_00000004"]


def test_corrupted_later_checkpoints_do_not_count_as_newest(tmp_path):
    """A run that resumed from an earlier step keeps the newest checkpoints that it saved."""
    save_steps(tmp_path, 40, 50)
    for path in list_checkpoints(tmp_path):
        (path / "model.safetensors").write_bytes(b"")
    save_steps(tmp_path, 10, 20, 30, keep=2)
    assert latest(tmp_path).name == "step_00000030"
    assert [path.name for path in list_checkpoints(tmp_path)][:2] == ["step_00000020", "step_00000030"]


def test_pickle_with_code_is_rejected_and_not_executed(tmp_path):
    """The manifest has the hash of the malicious file, so verification alone does not reject it."""
    save_steps(tmp_path, 1)
    path = tmp_path / "checkpoints" / "step_00000001"

    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save(Malicious(), path / "optimizer.pt")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["optimizer.pt"] = checkpoint.sha256(path / "optimizer.pt")
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="could execute code"):
        load(path)
    assert not (tmp_path / "executed").exists()


def test_model_loads_from_a_run_or_checkpoint_directory(tmp_path):
    """The model has the step, tokenizer and configuration of the checkpoint, and is in eval mode."""
    model = small(tie_head=False, n_kv_head=1)
    state = STATE | {"model": vars(model.config), "step": 3}
    save(tmp_path / "run", 3, model_tensors(model), {}, state, keep=0)
    for spec in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "step_00000003"):
        loaded = GPT.from_pretrained(spec)
        assert (loaded.step, loaded.tokenizer.name, loaded.config) == (3, "gpt2", model.config)
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
        assert not loaded.training
    with pytest.raises(UserError, match="There is no model at"):
        GPT.from_pretrained(tmp_path / "none")


def test_checkpoint_with_invalid_model_fields_is_rejected(tmp_path):
    """An unknown field, and a number of layers or value embeddings that does not match the weights."""
    state = {"step": 1, "model": vars(small().config) | {"hyperdrive": True}, "tokenizer": {"name": "gpt2"}}
    path = save(tmp_path, 1, model_tensors(small()), {}, state, keep=0)
    with pytest.raises(UserError, match="unexpected keyword argument 'hyperdrive'"):
        GPT.from_pretrained(path)
    for config in (vars(small().config) | {"n_layer": 10**9}, vars(ModernConfig()) | {"value_embeddings": 10**9}):
        # the model is rejected before it is built, which would take too long
        state = {"step": 1, "model": config, "tokenizer": {"name": "gpt2"}}
        path = save(tmp_path, 1, model_tensors(small()), {}, state, keep=0)
        with pytest.raises(UserError, match="1,000,000,000 layers, but only"):
            GPT.from_pretrained(path)


def test_full_disk_is_reported_with_the_system_error(tmp_path):
    """If a write inside torch.save fails, the message has the system's error, not that of PyTorch's zip writer."""

    def save_with_file_size_limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        optimizer = {"wte.weight": {"exp_avg": torch.zeros(100_000)}}
        with pytest.raises(UserError, match=r"step 1 could not be written to .*\[Errno 27\] File too large"):
            save(tmp_path, 1, model_tensors(small()), optimizer, STATE, keep=0)
        os._exit(0)

    if (child := os.fork()) == 0:
        try:
            save_with_file_size_limit()
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert list_checkpoints(tmp_path) == []
