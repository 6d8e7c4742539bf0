"""The structure of the code: import rules, imports without side effects, and short, documented files.

import-linter checks the rules inside `babygpt` and `tools` (pyproject.toml); this file checks the top level.
"""

import ast
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from importlib import metadata
from pathlib import Path

import mistakes
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
TOP_LEVEL = (
    "arguments", "chat", "dataloader", "finetune", "finetune_config", "fineweb", "hellaswag", "launch", "model",
    "sample", "train", "train_config",
)  # fmt: skip
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for pattern in ("*.py", "babygpt/**/*.py", "tools/*.py")
    for path in sorted(ROOT.glob(pattern))
    if path.name != "__init__.py"
}


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text(encoding="utf-8"))


def imports(module: ast.Module) -> set[str]:
    """Return the full names of all imports of a file, including those inside functions."""
    names = set()
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def packages(module: ast.Module) -> set[str]:
    return {name.split(".")[0] for name in imports(module)}


def test_top_level_has_the_scripts_and_no_other_file():
    """The files that users run, read and edit are at the top level; all others are in packages."""
    assert sorted(name for name in FILES if "." not in name) == sorted(TOP_LEVEL)


def test_imports_have_no_cycle():
    """No file imports itself, directly or indirectly."""
    graph = {name: {other for other in imports(tree(name)) if other in FILES} for name in FILES}
    TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize("name", TOP_LEVEL)
def test_top_level_never_imports_tools_or_fineweb(name):
    """The scripts import only babygpt and each other."""
    assert not packages(tree(name)) & {"tools", "fineweb", "benchmarks", "tests"}


def test_train_is_imported_by_commands_and_tests_only():
    """Only finetune.py and the tools import train.py, not the other scripts or the package."""
    importers = {name for name in FILES if "train" in packages(tree(name))}
    assert {name.split(".")[0] for name in importers} <= {"finetune", "tools"}


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("babygpt.")])
def test_babygpt_receives_plain_values(name):
    """The package uses neither the top-level files nor the names of their configuration and order classes."""
    assert not packages(tree(name)) & {*TOP_LEVEL, "tools"}
    names = {getattr(node, "id", getattr(node, "attr", None)) for node in ast.walk(tree(name))}
    assert not names & {"GPTConfig", "ModernConfig", "Config", "Order"}


def test_imports_have_no_side_effects(tmp_path):
    """An import does not parse arguments, print, write files or start threads."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['x', '--nonsense']\n"
    code += "".join(f"import {name}\n" for name in FILES)
    code += "import threading, multiprocessing; assert threading.active_count() == 1\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", FILES)
def test_file_is_short_and_documented(name):
    """At most 500 lines, with a module docstring."""
    assert len(FILES[name].read_text(encoding="utf-8").splitlines()) <= 500
    assert ast.get_docstring(tree(name))


def test_training_loop_is_short():
    """The loop of train.py has at most 100 lines."""
    train = next(node for node in tree("train").body if isinstance(node, ast.FunctionDef) and node.name == "train")
    (loop,) = [node for node in train.body if isinstance(node, ast.For)]
    assert loop.end_lineno is not None
    assert loop.end_lineno - loop.lineno + 1 <= 100


def test_long_public_functions_and_classes_have_docstrings():
    """Except `main` and the modules of the model, whose names are sufficient."""
    undocumented = set()
    for name in FILES:
        for node in tree(name).body:
            public = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
            if public and node.name != "main" and not ast.get_docstring(node) and node.end_lineno - node.lineno > 12:
                undocumented.add(f"{name}.{node.name}")
    assert undocumented <= {"model.CausalSelfAttention", "model.MLP", "model.Block", "model.GPT"}


def test_mistakes_match_the_code():
    """Every text that tests/mistakes.py replaces occurs in its file."""
    for _, name, _, changes in mistakes.MISTAKES:
        for file, ours, _ in changes:
            assert ours in (ROOT / file).read_text(encoding="utf-8"), f"{name}: {file}"


def test_test_names_are_short():
    """At most 60 characters; the docstring of a test says more."""
    functions = [
        node
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    assert len(functions) > 300
    assert [node.name for node in functions if len(node.name) > 60] == []


def test_selectors_of_mistakes_match_tests():
    """Every `-k` selector in tests/mistakes.py, up to a parametrize id, occurs in the name of a test of its file."""
    for _, name, tests, _ in mistakes.MISTAKES:
        file, _, selector = tests.partition(" -k ")
        module = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
        functions = [node.name for node in ast.walk(module) if isinstance(node, ast.FunctionDef)]
        part = selector.partition("[")[0]
        assert any(f.startswith("test_") and part in f for f in functions), f"{name}: {tests} selects no test"


def installed_by_requirements() -> set[str]:
    """Return the names of all packages that `pip install -r requirements.txt` installs."""
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    pending, found = [Requirement(line) for line in lines if line], set[tuple[str, str]]()
    while pending:
        requirement = pending.pop()
        for extra in {"", *requirement.extras} - {extra for name, extra in found if name == requirement.name}:
            found.add((requirement.name, extra))
            needed = map(Requirement, metadata.requires(requirement.name) or [])
            pending += [other for other in needed if not other.marker or other.marker.evaluate({"extra": extra})]
    return {canonicalize_name(name) for name, _ in found}


def test_requirements_install_all_imported_packages():
    """requirements.txt alone installs every package that the scripts import, without the requirements of the tests."""
    used = set().union(*(packages(tree(name)) for name in FILES)) - sys.stdlib_module_names
    used -= {*TOP_LEVEL, "babygpt", "tools"}
    used -= {"gguf", "ray", "scipy", "sklearn", "threadpoolctl", "transformers", "wandb"}  # optional
    distributions = metadata.packages_distributions()
    needed = {canonicalize_name(distributions.get(name, [name])[0]) for name in used} | {"aiohttp"}  # fsspec imports it
    assert needed <= installed_by_requirements()
