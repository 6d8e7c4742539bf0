"""--help of every command: usage, descriptions and defaults that a user can read."""

import importlib
import re

import pytest
from support.helpers import call

from arguments import parse
from babygpt.errors import ConfigError

COMMANDS = {
    "fineweb": "fineweb.py [-h] [SOURCE] [OPTIONS]",
    "fineweb verify": "fineweb.py verify [-h] DIRECTORY",
    "train": "train.py [-h] [PRESET] [OPTIONS]",
    "train modern": "train.py [-h] [PRESET] [OPTIONS]",
    "finetune": "finetune.py [-h] {sft,dpo,resume} MODEL [DATA] [OPTIONS]",
    "hellaswag": "hellaswag.py [-h] MODEL [OPTIONS]",
    "sample": "sample.py [-h] MODEL [OPTIONS]",
    "chat": "chat.py [-h] MODEL [OPTIONS]",
    "tools.plot": "python -m tools.plot [-h] RUN [RUN ...] [--out PATH] [--x {steps,tokens,hours}] [--smooth N]",
    "tools.runs": "python -m tools.runs [-h] [PATH ...] [OPTIONS]",
    "tools.evaluate": "python -m tools.evaluate [-h] MODEL [MODEL ...] [OPTIONS]",
    "tools.evaluate_chat": "python -m tools.evaluate_chat [-h] MODEL DATA [OPTIONS]",
    "tools.export": "python -m tools.export [-h] MODEL OUT [--license NAME] [--gguf float32|float16]",
    "tools.replay": "python -m tools.replay [-h] RUN [--segments N] [--seed SEED] [--device {auto,cuda,cpu}]",
    "tools.inspect_step": "python -m tools.inspect_step [-h] RUN --step STEP [--ranks N] [--chars CHARACTERS]",
    "tools.train_tokenizer": "python -m tools.train_tokenizer [-h] [SOURCE] [OPTIONS]",
    "tools.compare_tokenizers": "python -m tools.compare_tokenizers [-h] TOKENIZER [TOKENIZER ...] [OPTIONS]",
    "tools.train_quality_filter": "python -m tools.train_quality_filter [-h] [OPTIONS]",
}


def read_help(command: str, capsys, monkeypatch, width: int) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    module, *arguments = command.split()
    with pytest.raises(SystemExit, match="0"):
        call(importlib.import_module(module).main, *arguments, "--help")
    return re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out)


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_readable(command, width, capsys, monkeypatch):
    """The usage names the positional arguments, every argument has one default or is required, and values have names
    instead of types."""
    text = read_help(command, capsys, monkeypatch, width)
    usage, rest = text.split("\n\n", 1)
    assert " ".join(usage.split()) == f"usage: {COMMANDS[command]}"
    assert not rest.startswith("\n")
    too_long = [line for line in text.splitlines() if len(line.rstrip()) > width]
    assert all(line.startswith("    ") for line in too_long), "only examples may be longer"
    _, *arguments = re.split(r"\n  (?=--?[a-z]|\[?[A-Z]{3,}\b)", text)
    [help_argument] = [argument for argument in arguments if argument.startswith("-h")]
    arguments.remove(help_argument)
    for argument in arguments:
        words = " ".join(argument.split())
        assert len(re.findall(r"\(default: |\(required\)", words)) == 1, words
        description = re.sub(r"--?[\w.-]+,?|\{.*?\}|\[.*?\]|\b[A-Z|]+\b|\((default: |required\)).*", "", words)
        assert re.search(r"[a-z]{2}", description), f"no comment: {words}"
        assert not re.search(r"\b(STR|INT)\b|\{None|default: (None\b|\)|')|'\"'|\[\[", words), words


def test_help_keeps_examples_as_written(capsys, monkeypatch):
    text = read_help("sample", capsys, monkeypatch, 80)
    docstring = importlib.import_module("sample").__doc__
    examples = [line for line in docstring.splitlines() if line.startswith("    python")]
    assert examples
    assert "\n".join([docstring.splitlines()[0], "", *examples, "", ""]) in text


@pytest.mark.parametrize("arguments", [["demo", "demo"], ["--training.max-steps", "5", "demo"]])
def test_preset_after_the_first_argument_is_a_user_error(arguments):
    with pytest.raises(ConfigError, match=r"Unrecognized argument 'demo'\. A preset comes first"):
        parse(arguments)
