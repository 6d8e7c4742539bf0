"""Measure the complexity of Python files: lines, longest function, deepest nesting and most arguments.

    python benchmarks/anatomy.py model.py train.py train_config.py fineweb.py [OTHER/train.py ...]

The lines of a function include its signature and docstring. The nesting of a statement is the number of blocks (if,
for, while, with, try, def) around it within its function. Arguments do not include self and cls.
"""

import ast
import sys
from pathlib import Path

BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.FunctionDef, ast.AsyncFor, ast.AsyncWith)


def find_functions(tree: ast.AST) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def count_lines(function: ast.FunctionDef) -> int:
    return (function.end_lineno or function.lineno) - function.lineno + 1


def count_arguments(function: ast.FunctionDef) -> int:
    arguments = function.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def nesting_depth(node: ast.AST, blocks: int = 0) -> int:
    """Return the largest number of blocks around a statement below `node`. An elif has the depth of its if."""
    deepest = blocks
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                is_elif = isinstance(node, ast.If) and name == "orelse" and isinstance(child, ast.If)
                deepest = max(deepest, nesting_depth(child, blocks + (isinstance(child, BLOCKS) and not is_elif)))
    return deepest


def main() -> None:
    print("| file | lines | longest function | deepest nesting | most arguments |\n|---|---:|---|---|---|")
    for name in sys.argv[1:]:
        text = Path(name).read_text(encoding="utf-8")
        tree = ast.parse(text)
        cells = [f"{len(text.splitlines()):,}"]
        for measure in (count_lines, nesting_depth, count_arguments):
            function = max(find_functions(tree), key=measure, default=None)
            cells.append(f"{measure(function)} (`{function.name}`)" if function else "none")
        cells[2] += f", {nesting_depth(tree)} in the file"
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
