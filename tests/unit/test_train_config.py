"""Presets, command-line flags, and the checks of a configuration."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from arguments import parse, resolve, to_json, with_micro_batch_size, with_momentum_defaults
from babygpt.errors import ConfigError
from babygpt.settings import variant
from babygpt.training.memory import micro_batch_warning
from babygpt.training.run_dir import differences
from model import ModernConfig, build_model
from train_config import PRESETS, Config, preset


def problems(config: Config, world_size: int = 1) -> list[str]:
    try:
        resolve(config, world_size)
    except ConfigError as error:
        return [line.strip() for line in str(error).splitlines() if line.strip().startswith("--")]
    return []


def num_params(name: str, vocab_size: int = 50257) -> int:
    with torch.device("meta"):
        return build_model(dataclasses.replace(preset(name).model, vocab_size=vocab_size)).num_params()


def test_default_is_gpt2_124m_on_10_billion_tokens():
    name, config = parse([])
    assert name == "gpt2"
    assert config == variant(Config(), general={"out_dir": Path("out/gpt2"), "preset": "gpt2"})
    assert num_params("gpt2") == 124_439_808
    assert config.training.max_steps * config.training.batch_tokens == pytest.approx(10e9, rel=1e-4)
    o = config.optimizer
    assert (o.max_lr, o.min_lr_ratio, o.warmup_steps, o.weight_decay, o.grad_clip) == (6e-4, 0.1, 715, 0.1, 1.0)
    assert (resolve(Config(), 1).optimizer.beta1, o.beta2, o.eps) == (0.9, 0.95, 1e-8)
    assert config.data.dataset == "data/fineweb-edu-10BT"


@pytest.mark.parametrize(
    ("name", "millions"),
    [("gpt2-medium", 355), ("gpt2-large", 774), ("gpt2-xl", 1558), ("babygpt-en", 124), ("edu-270m", 268),
     ("gpt-xs", 124), ("smollgpt", 135)],
)  # fmt: skip
def test_presets_have_their_nominal_size(name, millions):
    assert num_params(name) / 1e6 == pytest.approx(millions, abs=0.6)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("world_size", [1, 8])
def test_every_preset_is_valid(name, world_size):
    if world_size == 8 and name in ("shakespeare-char-cpu", "shakespeare-modern"):
        return  # 12 rows per step
    assert problems(preset(name), world_size) == []


def test_flag_changes_only_its_field():
    _, config = parse(["smollgpt", "--model.dropout", "0.2", "--general.mode", "val", "eval", "--model.no-bias"])
    expected = variant(
        preset("smollgpt"),
        model={"dropout": 0.2, "bias": False},
        general={"mode": ("val", "eval"), "out_dir": Path("out/smollgpt"), "preset": "smollgpt"},
    )
    assert config == expected
    assert parse(["demo"])[1].general.out_dir == Path("out/demo")


@pytest.mark.parametrize("name", ["gpt2", "modern"])
def test_help_shows_every_field_with_its_comment(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        parse([name, "--help"])
    text = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    for section in dataclasses.fields(Config):
        for field in dataclasses.fields(getattr(preset(name), section.name)):
            if field.name == "preset":  # not a flag
                continue
            flag = f"--{section.name}.{field.name.replace('_', '-')}"
            (shown,) = re.findall(rf"{flag}(?:, --[\w.-]+)* (.*?)\(default", text)
            assert re.search("[a-z]{2}", re.sub(r"\{.*?\}|\[.*?\]|[A-Z|]{2,}", "", shown)), f"{flag} has no comment"
    assert "tokens per optimizer step, over all ranks" in text


def test_unknown_preset_is_rejected_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"no preset 'gpt2-medum'. Did you mean 'gpt2-medium'\?"):
        parse(["gpt2-medum"])


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("training", "batch_tokens", 524_289), ("training", "micro_batch_size", -1), ("training", "max_steps", 0),
        ("model", "n_kv_head", 5), ("model", "dropout", 1.0), ("model", "n_embd", 770), ("optimizer", "max_lr", -1.0),
        ("optimizer", "max_lr", float("nan")), ("optimizer", "beta2", 1.0), ("optimizer", "eps", 0.0),
        ("optimizer", "min_lr_ratio", 1.5), ("sampling", "top_p", 0.0), ("sampling", "top_k", 0),
        ("sampling", "temperature", -0.1), ("saving", "keep", -1), ("evaluation", "limit", 0), ("general", "mode", ()),
        ("general", "seed", -1), ("general", "seed", 2**63), ("general", "timeout_minutes", 0.0),
        ("general", "timeout_minutes", 1e300), ("data", "num_streams", 0), ("validation", "every_n_steps", -5),
    ],
)  # fmt: skip
def test_value_out_of_range_error_names_the_flag(section, field, value):
    (problem,) = problems(variant(Config(), **{section: {field: value}}), world_size=8)
    assert problem.startswith(f"--{section}.{field.replace('_', '-')} ")


def test_error_for_unencodable_text_names_the_flag():
    """A NUL byte, which no path can contain, and a lone surrogate, which UTF-8 cannot encode."""
    for section, field in (("sampling", "prompt"), ("general", "init_from"), ("data", "dataset")):
        for text in ("a\0b", "\ud800"):
            with pytest.raises(ConfigError, match=rf"^--{section}.{field.replace('_', '-')} 'a?\\"):
                resolve(variant(Config(), **{section: {field: text}}), 1)


def test_all_problems_are_reported_together():
    config = variant(Config(), training={"max_steps": 0}, optimizer={"beta1": 2.0}, sampling={"top_p": 2.0})
    assert len(problems(config)) == 3
    assert len(problems(variant(Config(), model={"n_head": 7}, sampling={"top_p": 2.0}))) == 2


@pytest.mark.parametrize("head_size", [1, 2, 6])
@pytest.mark.parametrize("switch", ["rope", "partial_key_offset"])
def test_head_size_of_modern_must_be_a_multiple_of_4(head_size, switch):
    """RoPE rotates half of each half of a head's channels, and the partial key offset shifts the others."""
    switches = {"rope": False, "partial_key_offset": False} | {switch: True}
    (problem,) = problems(variant(preset("modern"), model={"n_head": 12, "n_embd": 12 * head_size, **switches}))
    assert problem.endswith("require a multiple of 4. Use a --model.n-embd divisible by 48.")
    classic = variant(preset("modern"), model={"n_head": 12, "n_embd": 12 * head_size, **switches, switch: False})
    assert problems(classic) == []


def test_batch_tokens_must_be_divisible_by_micro_batches():
    """By micro_batch_size x block_size x ranks, or block_size x ranks if micro_batch_size is 0; in train mode only."""
    (problem,) = problems(variant(Config(), training={"micro_batch_size": 16}), world_size=3)
    assert "micro_batch_size x block_size x ranks = 16 x 1,024 x 3 = 49,152. Use a multiple of 49,152" in problem
    (problem,) = problems(Config(), world_size=3)
    assert "block_size x ranks = 1,024 x 3 = 3,072. Use a multiple of 3,072, such as 522,240." in problem
    assert problems(variant(Config(), general={"mode": ("eval",)}), world_size=3) == []


@pytest.mark.parametrize(
    ("memory", "world_size", "changes", "expected"),
    [
        (0, 1, {}, 16),  # a CPU
        (8e9, 8, {}, 4),
        (25e9, 8, {}, 32),
        (42e9, 8, {}, 64),
        (141e9, 1, {}, 64),
        (42e9, 8, preset("modern"), 32),
        (85e9, 8, preset("modern"), 64),
        (42e9, 16, {}, 32),  # each of 16 ranks reads 32 of the 512 rows
        (42e9, 1, {"training": {"batch_tokens": 60 * 1024}}, 60),
        (42e9, 1, {"training": {"batch_tokens": 67 * 1024}}, 1),
        (85e9, 1, preset("gpt2-medium"), 32),
        (85e9, 1, preset("gpt2-xl"), 8),
        (25e9, 1, preset("gpt2-xl"), 1),  # weights and optimizer state alone need more memory
        (141e9, 1, {"training": {"micro_batch_size": 5}}, 5),  # an explicit value stays, even if it does not divide
    ],
)
def test_micro_batch_size_fits_device_and_batch(memory, world_size, changes, expected):
    """A micro_batch_size of 0 becomes a divisor of the rows of a rank that fits: at most 64, or 16 on a CPU."""
    config = changes if isinstance(changes, Config) else variant(Config(), **changes)
    config = variant(config, model={"vocab_size": config.model.vocab_size or 50257})
    assert with_micro_batch_size(config, int(memory), world_size).training.micro_batch_size == expected


@pytest.mark.parametrize(
    ("rows", "micro_batch_size", "warns"), [(67, 1, True), (512, 16, False), (512, 4, False), (1, 1, False)]
)
def test_micro_batch_without_larger_divisors_warns(rows, micro_batch_size, warns):
    warning = micro_batch_warning(rows * 1024, 1024, micro_batch_size, world_size=1)
    assert (warning is not None) == warns
    assert warning is None or "such as 81,920" in warning


def test_differences_name_the_field_and_both_values():
    changed = variant(Config(), optimizer={"max_lr": 1e-3}, model={"n_layer": 6})
    assert differences(to_json(Config()), to_json(changed)) == [
        ("model.n_layer", 12, 6),
        ("optimizer.max_lr", 6e-4, 1e-3),
    ]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"training": {"max_step": 10}}, "training has no field 'max_step'. Did you mean 'max_steps'?"),
        ({"trainig": {"max_steps": 10}}, "There is no section 'trainig'. Did you mean 'training'?"),
        ({"training": {"max_steps": "10"}}, "--training.max-steps '10' is not an integer. Use an integer."),
        ({"optimizer": {"max_lr": (3e-4,)}}, "--optimizer.max-lr (0.0003,) is not a number. Use a number."),
        ({"training": ({"max_steps": 10},)}, "training is ({'max_steps': 10},), not a dictionary. Remove any comma"),
        ({"general": {"mode": "train"}}, "--general.mode 'train' is not a tuple"),
        ({"training": {"max_steps": 0}, "optimizer": {"eps": 0.0}}, "--optimizer.eps 0.0 is out of range"),
        ({"model": {"rop": True}}, "model has no field 'rop'. Did you mean 'rope'?"),
    ],
)
def test_invalid_preset_is_rejected_with_section_and_field(sections, message, monkeypatch):
    """A wrong name, type or value in train_config.py is one message, not a traceback."""
    monkeypatch.setitem(PRESETS, "custom", sections)
    with pytest.raises(ConfigError, match=re.escape(message)) as raised:
        parse(["custom"])
    assert str(raised.value).startswith("The preset 'custom' in train_config.py is invalid:")


def test_modern_switch_on_a_classic_preset_is_rejected():
    """The message names the preset modern."""
    for flag in ("--model.rope", "--model.no-relu2", "--model.window=5"):
        with pytest.raises(ConfigError, match=f"{flag.split('=')[0]}: the model of smollgpt .* preset modern"):
            parse(["smollgpt", flag])
    _, config = parse(["modern", "--model.no-rope", "--model.window", "5"])
    assert isinstance(config.model, ModernConfig)
    assert (config.model.rope, config.model.window) == (False, 5)


def test_momenta_grow_with_the_batch_unless_they_are_set():
    def momenta(name: str, batch_tokens: int, **optimizer) -> tuple:
        changed = variant(preset(name), training={"batch_tokens": batch_tokens}, optimizer=optimizer)
        return with_momentum_defaults(changed).optimizer.beta1, with_momentum_defaults(changed).optimizer.momentum

    assert momenta("modern", 4096) == momenta("modern", 32_768) == (0.6, 0.8)
    assert momenta("modern", 131_072) == pytest.approx((0.7, 0.875))
    assert momenta("modern", 524_288) == momenta("modern", 1 << 20) == pytest.approx((0.8, 0.95))
    assert momenta("modern", 4096, beta1=0.0, momentum=0.9) == (0.0, 0.9)
    assert momenta("gpt2", 4096) == (0.9, None), "off"


def test_resolve_reads_no_files(monkeypatch):
    """A dataset in an object store is not downloaded to check a configuration."""
    monkeypatch.setattr("builtins.open", lambda *_, **__: pytest.fail("a file was opened"))
    monkeypatch.setattr("os.stat", lambda *_, **__: pytest.fail("os.stat was called"))
    config = variant(preset("modern"), data={"dataset": "s3://bucket/data"})
    assert resolve(config, 8) == with_momentum_defaults(config)
