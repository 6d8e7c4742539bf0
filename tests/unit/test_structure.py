"""The structure: no import cycles, nothing happens at import, files stay readable in one sitting."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(path for pattern in ("*.py", "babygpt/**/*.py") for path in ROOT.glob(pattern) if path.name[0] != "_")
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES}


def imports(name: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & set(MODULES)


def test_no_import_goes_in_a_circle():
    order: list[str] = []

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"{' -> '.join((*path, name))}"
        for other in imports(name):
            visit(other, (*path, name))
        order.append(name)

    for name in MODULES:
        visit(name, ())


def test_importing_does_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['x', '--nonsense']\n"
    code += "".join(f"import {name}\n" for name in MODULES)
    code += "import threading, multiprocessing; assert threading.active_count() == 1\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", MODULES)
def test_a_file_is_read_in_one_sitting(name):
    text = MODULES[name].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 500
    assert ast.get_docstring(ast.parse(text)), "a file says what it is for"


def test_the_training_loop_fits_on_two_screens():
    tree = ast.parse((ROOT / "train.py").read_text(encoding="utf-8"))
    train = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train")
    (loop,) = [node for node in train.body if isinstance(node, ast.For)]
    assert loop.end_lineno - loop.lineno + 1 <= 100


def test_public_functions_and_classes_say_what_they_are_for():
    """All but what its name and signature say whole: main, forward, and the parts of the model."""
    silent = []
    for name in MODULES:
        for node in ast.parse(MODULES[name].read_text(encoding="utf-8")).body:
            public = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
            if public and node.name != "main" and not ast.get_docstring(node) and node.end_lineno - node.lineno > 12:
                silent.append(f"{name}.{node.name}")
    assert set(silent) <= {"model.CausalSelfAttention", "model.MLP", "model.Block", "model.GPT"}
