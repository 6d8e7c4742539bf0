"""How much a reader must hold in mind: lines, longest function, deepest nesting and most arguments of Python files.

    python benchmarks/anatomy.py model.py train.py train_config.py fineweb.py [OTHER/train.py ...]

Lines are those of the file. A function's lines include its signature and docstring; nesting counts the blocks (if, for,
while, with, try, def) around a statement inside its function; arguments do not include self and cls.
"""

import ast
import sys
from pathlib import Path

BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.FunctionDef, ast.AsyncFor, ast.AsyncWith)


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def num_lines(function: ast.FunctionDef) -> int:
    return (function.end_lineno or function.lineno) - function.lineno + 1


def num_arguments(function: ast.FunctionDef) -> int:
    a = function.args
    names = [argument.arg for argument in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def depth(node: ast.AST, blocks: int = 0) -> int:
    """Return the largest number of blocks around a statement below `node`; an elif is as deep as its if."""
    deepest = blocks
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                is_elif = isinstance(node, ast.If) and name == "orelse" and isinstance(child, ast.If)
                deepest = max(deepest, depth(child, blocks + (isinstance(child, BLOCKS) and not is_elif)))
    return deepest


def main() -> None:
    print("| file | lines | longest function | deepest nesting | most arguments |\n|---|---:|---|---|---|")
    for name in sys.argv[1:]:
        text = Path(name).read_text(encoding="utf-8")
        tree = ast.parse(text)
        cells = [f"{len(text.splitlines()):,}"]
        for measure in (num_lines, depth, num_arguments):
            found = max(functions(tree), key=measure, default=None)
            cells.append(f"{measure(found)} (`{found.name}`)" if found else "none")
        cells[2] += f", {depth(tree)} in the file"
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
