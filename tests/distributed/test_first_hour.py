"""Mistakes of a new user's first hour: one message that names the fix, exit code 2, and nothing left behind."""

import os
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
from support.first_hour import MISTAKES, PREPARE, make_files
from support.helpers import call

import fineweb


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("first")
    make_files(directory)
    earlier = os.getcwd()
    os.chdir(directory)
    call(fineweb.main, *PREPARE)
    os.chdir(earlier)
    return directory


@pytest.mark.parametrize(("command", "message"), MISTAKES, ids=[command for command, _ in MISTAKES])
def test_mistake_is_one_message_and_exit_code_2(command, message, directory, monkeypatch, capsys):
    if "cuda" in command and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    before = sorted(directory.rglob("*"))
    _, *words = shlex.split(command)
    module = words[:1] == ["-m"]
    monkeypatch.chdir(directory)
    monkeypatch.setattr(sys, "argv", words[1:] if module else words)
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as exit:
        runpy.run_module(words[1], run_name="__main__") if module else runpy.run_path(words[0], run_name="__main__")
    captured = capsys.readouterr()
    assert exit.value.code == 2
    assert message in " ".join((captured.out + captured.err).split())
    assert "Traceback" not in captured.out + captured.err
    assert sorted(path for path in directory.rglob("*") if "__pycache__" not in path.parts) == before
