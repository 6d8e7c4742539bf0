"""Types and ranges of dataclass fields, declared as annotations and checked together.

>>> @dataclass
... class Training:
...     max_steps: Annotated[int, Ge(1)] = 100
>>> violations(Training(max_steps=0), "training.")
['--training.max-steps 0 is out of range. Use at least 1.']
"""

import operator
from collections.abc import Callable
from dataclasses import astuple, fields, is_dataclass
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from annotated_types import BaseMetadata, Ge, Gt, Le, Lt, MinLen

from babygpt.errors import UserError

Arguments = TypeVar("Arguments")
Positive = Annotated[int, Ge(1)]
NonNegative = Annotated[int, Ge(0)]
Fraction = Annotated[float, Ge(0), Le(1)]
Probability = Annotated[float, Gt(0), Le(1)]

# whether a value keeps to the bound, and how a message says so
LIMITS: dict[type, tuple[Callable[[Any, Any], bool], str]] = {
    Ge: (operator.ge, "at least {:,}"),
    Gt: (operator.gt, "more than {:,}"),
    Le: (operator.le, "at most {:,}"),
    Lt: (operator.lt, "less than {:,}"),
    MinLen: (lambda value, length: len(value) >= length, "at least {:,} item"),
}


def flag(name: str) -> str:
    """Return the command-line flag of a field: "training.max_steps" is --training.max-steps."""
    return f"--{name.replace('_', '-')}"


def violations(values: Any, prefix: str = "", name: Callable[[str], str] = flag) -> list[str]:
    """Return one sentence for each field whose value violates its annotation, including those of nested dataclasses.

    `name` turns the name of a field into that in the sentence.
    """
    found = []
    hints = get_type_hints(type(values), include_extras=True)
    for field in fields(values):
        value = getattr(values, field.name)
        if is_dataclass(value):
            found += violations(value, f"{prefix}{field.name}.", name)
        elif problem := _problem(value, hints[field.name]):
            found.append(f"{name(prefix + field.name)} {_shown(value)} {problem}")
    return found


def summary(problems: list[str], heading: str) -> str:
    """Return a single problem unchanged, or several problems as indented lines under a heading."""
    return problems[0] if len(problems) == 1 else "\n  ".join([heading, *problems])


def check(values: Any) -> None:
    """Raise a UserError that lists all violations."""
    if problems := violations(values):
        raise UserError(summary(problems, "The arguments are invalid:"))


def parse_arguments(arguments: type[Arguments], prog: str, description: str | None) -> Arguments:
    """Parse and check a command line; the fields of a dataclass are its flags, and their comments the help."""
    import tyro

    found = tyro.cli(arguments, prog=prog, description=description)
    check(found)
    return found


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, Integral) and not isinstance(value, bool) else f"{value!r:.50}"


def _problem(value: Any, hint: Any) -> str | None:
    """Return what is wrong with a value of this annotation, as the end of a sentence, or None."""
    if not _has_type(value, hint):
        return f"is not {_type_name(hint)}. Use {_type_name(hint)}."
    if _is_unwritable(value):
        return "contains a null character or is not valid UTF-8. Use other characters."
    limits = [(*LIMITS[type(limit)], *astuple(limit)) for limit in _limits(hint)]  # check, phrase, bound
    if value is None or all(holds(value, bound) for holds, _, bound in limits):
        return None
    return f"is out of range. Use {' and '.join(phrase.format(bound) for _, phrase, bound in limits)}."


def _is_unwritable(value: Any) -> bool:
    """Return whether config.json cannot hold a text or path. The files of a tuple may have names that are not UTF-8."""
    if isinstance(value, tuple):
        return any("\0" in str(item) for item in value)
    text = str(value) if isinstance(value, str | Path) else ""
    return "\0" in text or text != text.encode("utf-8", "replace").decode()


def _has_type(value: Any, hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _has_type(value, arguments[0])
    if origin in (Union, UnionType):
        return any(_has_type(value, option) for option in arguments)
    if origin is Literal:
        return value in arguments
    if origin is tuple:  # tuple[X, ...]
        return isinstance(value, tuple) and all(_has_type(item, arguments[0]) for item in value)
    if hint is float:
        return isinstance(value, Real) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    return isinstance(value, hint)


def _type_name(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    names = {int: "an integer", float: "a number", str: "text", bool: "True or False", Path: "a path", NoneType: "None"}
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin in (Union, UnionType):
        return " or ".join(map(_type_name, arguments))
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is tuple:
        return f"a tuple, each item {_type_name(arguments[0])}"
    return names[hint]


def _limits(hint: Any) -> list[Any]:
    """Return the limits that an annotation declares, also inside a union."""
    if get_origin(hint) in (Union, UnionType):
        return [limit for option in get_args(hint) for limit in _limits(option)]
    metadata = hint.__metadata__ if get_origin(hint) is Annotated else ()
    return [limit for limit in metadata if isinstance(limit, BaseMetadata)]
