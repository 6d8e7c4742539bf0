"""Command lines from dataclasses: annotations of fields declare types, ranges, and the names of values in --help.

>>> @dataclass
... class Training:
...     max_steps: Annotated[int, Ge(1)] = 100
>>> violations(Training(max_steps=0), "training.")
['--training.max-steps 0 is out of range. Use at least 1.']
"""

import io
import math
import operator
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import astuple, fields, is_dataclass
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro
from annotated_types import BaseMetadata, Ge, Gt, Le, Lt, MinLen
from tyro.conf import Positional

from babygpt.errors import UserError

Parsed = TypeVar("Parsed")


def metavar(name: str, none: str = "none") -> Any:
    """Return an annotation for --help: the name of the argument's value, and the text for a default of None or ()."""

    def format_default(default: str) -> str:
        text = " ".join(shlex.split(default))  # tyro quotes it for the shell
        if text in ("", "None"):
            text = none
        elif text != default:
            text = f'"{text}"'
        return f"(default: {text})"

    return tyro.conf.arg(metavar=name, help_behavior_hint=format_default)


def required(name: str) -> Any:
    """Return an annotation for --help: an argument that the command requires, but that tyro considers optional."""
    return tyro.conf.arg(metavar=name, help_behavior_hint="(required)")


Positive = Annotated[int, Ge(1), metavar("N")]
NonNegative = Annotated[int, Ge(0), metavar("N")]
Seed = Annotated[int, Ge(0), Lt(2**63), tyro.conf.arg(metavar="SEED")]
Fraction = Annotated[float, Ge(0), Le(1), metavar("FRACTION")]
Probability = Annotated[float, Gt(0), Le(1), metavar("PROBABILITY")]
PositiveFloat = Annotated[float, Gt(0), Lt(math.inf)]
Name = Annotated[str, metavar("NAME")]
ModelArgument = Annotated[Positional[str], metavar("MODEL")]
RunArgument = Annotated[Positional[Path], metavar("RUN")]

# the comparison of a value with the bound, and the phrase for messages
LIMITS: dict[type, tuple[Callable[[Any, Any], bool], str]] = {
    Ge: (operator.ge, "at least {:,}"),
    Gt: (operator.gt, "more than {:,}"),
    Le: (operator.le, "at most {:,}"),
    Lt: (operator.lt, "less than {:,}"),
    MinLen: (lambda value, min_length: len(value) >= min_length, "at least {:,} item"),
}


def flag(name: str) -> str:
    """Return the command-line flag of a field: "training.max_steps" is --training.max-steps."""
    return f"--{name.replace('_', '-')}"


def violations(values: Any, prefix: str = "", format_name: Callable[[str], str] = flag) -> list[str]:
    """Return one sentence for each field whose value violates its annotation, including those of nested dataclasses.

    The sentence calls a field `format_name(name)`.
    """
    sentences = []
    hints = get_type_hints(type(values), include_extras=True)
    for field in fields(values):
        value = getattr(values, field.name)
        if is_dataclass(value):
            sentences += violations(value, f"{prefix}{field.name}.", format_name)
        elif problem := _problem(value, hints[field.name]):
            sentences.append(f"{format_name(prefix + field.name)} {_format(value)} {problem}")
    return sentences


def summary(problems: list[str], heading: str) -> str:
    """Return a single problem unchanged, or several problems as indented lines under a heading."""
    return problems[0] if len(problems) == 1 else "\n  ".join([heading, *problems])


def check(values: Any) -> None:
    """Raise a UserError that lists all violations."""
    if problems := violations(values):
        raise UserError(summary(problems, "The arguments are invalid:"))


def parse_arguments(arguments_type: type[Parsed], prog: str, description: str | None) -> Parsed:
    """Parse and check a command line. Each field of a dataclass is a flag, and its comment is the help."""
    parsed = parse_command_line(arguments_type, prog, description)
    check(parsed)
    return parsed


def parse_command_line(interface: Callable[..., Parsed], prog: str, description: str | None, **options: Any) -> Parsed:
    """Call tyro.cli, but wrap the paragraphs of the description to the terminal and keep its examples as written."""
    if not {"-h", "--help"} & set(options.get("args", sys.argv[1:])):
        return tyro.cli(interface, prog=prog, **options)
    captured = io.TextIOWrapper(io.BytesIO(), sys.stdout.encoding)
    captured.isatty = sys.stdout.isatty  # type: ignore[method-assign]  # tyro colors the help for a terminal
    try:
        with redirect_stdout(captured):
            return tyro.cli(interface, prog=prog, description="", **options)
    finally:
        captured.seek(0)
        usage, _, arguments = captured.read().partition("\n\n")
        if usage:  # only one rank per node prints
            width = shutil.get_terminal_size().columns
            print(_wrap_usage(usage, width), _wrap_description(description or "", width), arguments, sep="\n\n", end="")


def _wrap_usage(usage: str, width: int) -> str:
    """Wrap the usage line between its groups, such as [--out PATH], with [OPTIONS] after the positional arguments."""
    if " [OPTIONS]" in usage:
        usage = usage.replace(" [OPTIONS]", "") + " [OPTIONS]"
    usage = re.sub(r"\[[^]]*\]", lambda group: group[0].replace(" ", "\0"), usage)
    return _wrap(usage, width, indent=len("usage: ")).replace("\0", " ")


def _wrap_description(text: str, width: int) -> str:
    """Wrap the paragraphs and list items of a docstring, except for indented blocks."""
    blocks = []
    for block in text.strip().split("\n\n"):
        items = [block] if block.startswith(" ") else re.split(r"\n(?=- )", block)
        blocks += ["\n".join(item if item[0] == " " else _wrap(item, width, 2 * (item[0] == "-")) for item in items)]
    return "\n\n".join(blocks)


def _wrap(text: str, width: int, indent: int) -> str:
    """Wrap a paragraph; all lines but the first are indented."""
    joined = " ".join(text.split())
    return textwrap.fill(joined, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def _format(value: Any) -> str:
    return f"{value:,}" if isinstance(value, Integral) and not isinstance(value, bool) else f"{value!r:.50}"


def _problem(value: Any, hint: Any) -> str | None:
    """Return what is wrong with a value of this annotation, as the end of a sentence, or None."""
    if not _has_type(value, hint):
        return f"is not {_type_name(hint)}. Use {_type_name(hint)}."
    if _is_unwritable(value):
        return "contains a null character or is not valid UTF-8. Use other characters."
    limits = [(*LIMITS[type(limit)], *astuple(limit)) for limit in _limits(hint)]  # check, phrase, bound
    if value is None or all(satisfies(value, bound) for satisfies, _, bound in limits):
        return None
    return f"is out of range. Use {' and '.join(phrase.format(bound) for _, phrase, bound in limits)}."


def _is_unwritable(value: Any) -> bool:
    """Return whether config.json cannot contain a text or path. File names in a tuple need not be UTF-8."""
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
    if get_origin(hint) is Annotated:
        return _limits(hint.__origin__) + [limit for limit in hint.__metadata__ if isinstance(limit, BaseMetadata)]
    return []
