"""Settings that follow the run: short flags, config.json as the preset, epochs, and the architecture of weights."""

import json
from pathlib import Path

import pytest
from support.helpers import call
from support.runs import assert_bitwise_equal, copy_killed_run, flags, read_log_without_timing

import train
from arguments import bind, parse, resolve, to_json
from babygpt.data.shards import open_dataset
from babygpt.errors import ConfigError, UserError
from babygpt.settings import expand_flags, flag_values, variant
from babygpt.training import checkpoint, run_dir
from babygpt.training.log import read_log
from dataloader import Order
from model import ModernConfig
from train_config import PRESETS, preset

# ---------------------------------------------------------------------------------------------------------
# flags


def test_unique_field_is_a_flag_without_its_section():
    short = "--max-steps 10 --max-lr=1e-3 --seed 7 --no-rope --bf16_gradients --no-bias --mode val eval"
    long = (
        "--training.max-steps 10 --optimizer.max-lr 1e-3 --general.seed 7 --model.no-rope --training.bf16-gradients "
        "--model.no-bias --general.mode val eval"
    )
    assert parse(f"modern {short}".split(" ")) == parse(f"modern {long}".split(" "))


def test_field_of_several_sections_is_ambiguous():
    message = r"--every-n-steps is a field of several sections. Use --validation.every-n-steps or --evaluation.every"
    with pytest.raises(ConfigError, match=message):
        parse(["gpt2", "--every-n-steps", "5"])


def test_values_and_unknown_flags_are_not_expanded():
    known = {"a": ["steps", "text"], "b": ["text"]}
    assert expand_flags(["--steps", "steps", "--a.text", "--zz", "-h", "--a.text=--steps"], known) == [
        "--a.steps", "steps", "--a.text", "--zz", "-h", "--a.text=--steps",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"There is no flag --no-stepz. Did you mean '--steps'\?"):
        expand_flags(["--no-stepz"], known)


def test_last_use_of_a_flag_counts():
    words = ["--a.b", "1", "--a.c", "x", "y", "--a.b=2", "--a.d_e", "3"]
    assert [flag_values(words, name) for name in ("a.b", "a.c", "a.d_e", "a.f")] == [["2"], ["x", "y"], ["3"], None]


# ---------------------------------------------------------------------------------------------------------
# the settings of a run


def test_resume_without_a_preset_needs_no_other_flag(uninterrupted_run, tmp_path, capsys):
    out = copy_killed_run(uninterrupted_run, 10, tmp_path / "run")
    call(train.main, "--out-dir", out, "--init-from", "resume")
    assert_bitwise_equal(out, uninterrupted_run)
    assert "Settings that differ from those of the last launch" not in capsys.readouterr().out


def test_resume_without_a_preset_names_the_values_that_differ(uninterrupted_run, tmp_path, capsys, monkeypatch):
    out = copy_killed_run(uninterrupted_run, 13, tmp_path / "run")
    monkeypatch.setitem(PRESETS, "gpt2", {"optimizer": {"beta2": 0.99}, "training": {"max_steps": 14}})
    call(train.main, "--out-dir", out, "--init-from", "resume")
    text = capsys.readouterr().out
    assert f"The settings are those of {out}/config.json" in text
    assert "  optimizer.beta2: 0.95 in this run, 0.99 in the preset" in text
    assert "training.max_steps:" not in text, "equal"
    assert not any(f"{name}: " in text for name in ("micro_batch_size", "num_streams", "vocab_size", "beta1"))


def test_evaluation_without_a_preset_uses_the_runs_settings(uninterrupted_run, capsys):
    call(train.main, "--out-dir", uninterrupted_run, "--mode", "val")
    logged = read_log(uninterrupted_run / "log.csv")[-1]
    assert f"validation loss {logged['val_loss']:.4f}" in capsys.readouterr().out


def test_preset_is_applied_on_resume(uninterrupted_run, dataset, tmp_path, capsys):
    out = copy_killed_run(uninterrupted_run, 10, tmp_path / "run")
    call(train.main, *flags(dataset, out, general__init_from="resume", optimizer__beta2=0.9))
    assert "optimizer.beta2 was 0.95, is now 0.9" in capsys.readouterr().out


def test_config_of_a_run_starts_a_new_run_in_a_new_directory(uninterrupted_run, tmp_path):
    out = copy_killed_run(uninterrupted_run, 14, tmp_path / "run")
    for name in ("run-2", "run-3"):
        call(train.main, out / "config.json", "--max-steps", "3")
        settings = json.loads((tmp_path / name / "config.json").read_text())
        assert (settings["training"]["max_steps"], settings["model"]["n_layer"]) == (3, 2)
        assert settings["general"]["preset"] == "gpt2"
    first, second = (read_log_without_timing(tmp_path / name) for name in ("run-2", "run-3"))
    assert first == second
    assert parse([str(out / "config.json"), "--init-from", "resume"])[1].general.out_dir == out


def test_tuned_run_is_evaluated_and_copied_with_its_weights(uninterrupted_run, dataset, tmp_path, capsys):
    """Its config.json names the weights from which it started, which an evaluation must not use."""
    arguments = flags(dataset, tmp_path / "tuned", general__init_from=uninterrupted_run, training__max_steps=4)
    call(train.main, *arguments)
    logged = read_log(tmp_path / "tuned" / "log.csv")[-1]
    for words in (["--out-dir", tmp_path / "tuned"], [tmp_path / "tuned" / "config.json"]):
        capsys.readouterr()
        call(train.main, *words, "--mode", "val")
        assert f"validation loss {logged['val_loss']:.4f}" in capsys.readouterr().out
    config = str(tmp_path / "tuned" / "config.json")
    _, copy = parse([config])
    assert copy.general.init_from == str(uninterrupted_run)
    with pytest.raises(ConfigError, match=f"no run in .*new to resume. Use .*init-from {uninterrupted_run} for"):
        parse([config, "--init-from", "resume", "--out-dir", str(tmp_path / "new")])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--max-lr 1", (4, 0.9, 4, 100)),
        ("--init-from resume", (4, 0.9, 4, 100)),
        ("--batch-tokens 320", (0, None, 4, 100)),
        ("--num-streams 8", (4, 0.9, 8, None)),
        ("--dataset data/other", (4, 0.9, None, None)),
    ],
)
def test_changed_flag_resets_what_was_derived_from_it(words, expected, uninterrupted_run):
    _, config = parse([str(uninterrupted_run / "config.json"), *words.split()])
    data = config.data
    assert (config.training.micro_batch_size, config.optimizer.beta1, data.num_streams, data.chunk_tokens) == expected


@pytest.mark.parametrize("words", ["--init-from resume demo", "--out-dir out/a demo", "--seed 1 demo"])
def test_preset_after_flags_is_an_error(words):
    with pytest.raises(ConfigError, match="A preset comes first"):
        parse(words.split())


def test_run_directory_as_preset_names_its_config(uninterrupted_run):
    with pytest.raises(ConfigError, match=r"is a run, not a preset. Use .*/config.json"):
        parse([str(uninterrupted_run)])


def test_micro_batches_adapt_to_the_number_of_ranks(uninterrupted_run, monkeypatch):
    """The run has 16 rows per step, in micro-batches of 4."""
    for world_size, micro_batch_size in ((1, 4), (4, 4), (8, 0), (16, 0)):
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        _, config = parse(["--out-dir", str(uninterrupted_run), "--init-from", "resume"])
        assert resolve(config, world_size).training.micro_batch_size == micro_batch_size


@pytest.mark.parametrize("text", [None, "{", "[]", '{"general": {}}', "block_size"])
def test_invalid_config_is_named_in_the_error(text, tmp_path):
    if text == "block_size":
        text = json.dumps(to_json(variant(preset("gpt2"), model={"block_size": 0})))
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(
        UserError, match=r"config\.json(:| cannot be read as the config.json of a run)|--model.block-size 0"
    ):
        parse([str(tmp_path / "config.json")])


# ---------------------------------------------------------------------------------------------------------
# weights and epochs


def test_weights_determine_the_architecture(uninterrupted_run, dataset, tmp_path):
    run = ["--init-from", str(uninterrupted_run), "--dataset", str(dataset), "--device", "cpu"]
    for name in ("gpt2", "modern"):
        _, config = parse([name, *run])
        weights = checkpoint.read_state(checkpoint.latest(uninterrupted_run))["model"]
        assert {**weights, "vocab_size": 0, "dropout": 0.0} == config.model.__dict__
    _, config = parse(["gpt2", *run, "--block-size", "8", "--dropout", "0.3"])
    assert (config.model.block_size, config.model.dropout, config.model.n_layer) == (8, 0.3, 2)
    call(
        train.main, "gpt2", *run, "--out-dir", tmp_path / "tuned", "--max-steps", 1, "--batch-tokens", 64, "--mode",
        "train", "--num-streams", 4, "--dtype", "float32",
    )  # fmt: skip
    assert len(read_log(tmp_path / "tuned" / "log.csv")) == 2


def test_sizes_of_gpt2_weights_are_known_without_a_download():
    _, config = parse(["finetune-shakespeare", "--init-from", "gpt2-medium"])
    assert config.model == preset("gpt2-medium").model
    assert not isinstance(parse(["modern", "--init-from", "gpt2"])[1].model, ModernConfig)


@pytest.mark.parametrize("epochs", [0.5, 1, 2.5])
def test_epochs_replace_max_steps(epochs, dataset, tmp_path):
    opened, arguments = open_dataset(dataset), flags(dataset, tmp_path / "run")
    position = arguments.index("--training.max-steps")
    arguments[position : position + 2] = ["--training.epochs", str(epochs)]
    _, config = parse(arguments)
    config = bind(resolve(config, 1), opened)
    order = Order(opened.train, opened.eot_id, 16, config.data.num_streams, 1337, config.data.chunk_tokens)
    assert config.training.max_steps == round(epochs * (order.rows_per_epoch // 16))
    with pytest.raises(ConfigError, match=r"--training.epochs replaces --training.max-steps"):
        parse([*arguments, "--max-steps", "5"])


def test_max_steps_replaces_the_epochs_of_a_run(dataset, tmp_path):
    path = tmp_path / "run" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(to_json(variant(preset("gpt2"), training={"epochs": 3.0}))))
    assert parse([str(path)])[1].training.epochs == 3
    assert parse([str(path), "--max-steps", "5"])[1].training.epochs is None


@pytest.mark.parametrize(("max_steps", "warns"), [(80, False), (81, True)])
def test_more_than_ten_epochs_are_a_warning(max_steps, warns, dataset):
    """An epoch has 8 steps."""
    opened = open_dataset(dataset)
    warning = Order(opened.train, opened.eot_id, 16, 4, 1337, 100).repetition_warning(256, max_steps)
    assert (warning is not None) == warns
    assert not warns or "81 steps x 256 tokens = 20,736 tokens are 10.1 epochs of the" in warning


def test_resume_command_quotes_the_directory():
    assert run_dir.resume_command(Path("out/my run")) == "python train.py --out-dir 'out/my run' --init-from resume"
