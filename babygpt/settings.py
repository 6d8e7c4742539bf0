"""Helpers for settings grouped in sections: modified copies, short flags, and checks of presets.

>>> @dataclass(frozen=True)
... class Config:
...     training: Training = Training()
>>> variant(Config(), training={"max_steps": 10})
>>> expand_flags(["--max-steps", "10"], {"training": ["max_steps"]})
['--training.max-steps', '10']
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from difflib import get_close_matches
from typing import Any, TypeVar

from babygpt.constraints import flag
from babygpt.errors import ConfigError, suggest

Settings = TypeVar("Settings")


def variant(config: Settings, **sections: dict[str, Any]) -> Settings:
    """Return the config with some fields changed: variant(config, training={"max_steps": 10})."""
    values = {name: replace(getattr(config, name), **values) for name, values in sections.items()}
    return replace(config, **values)  # type: ignore[type-var]


def unknown_names(sections: dict[str, Any], known: Mapping[str, Iterable[str]]) -> list[str]:
    """Return one sentence for each section or field of a preset that does not exist. `known` has the fields of each."""
    problems = []
    for section, values in sections.items():
        if section not in known:
            problems.append(f"There is no section {section!r}. {suggest(section, known)}")
        elif not isinstance(values, dict):
            problems.append(f"{section} is {values!r:.50}, not a dictionary. Remove any comma after its closing brace.")
        else:
            unknown = [name for name in values if name not in known[section]]
            problems += [f"{section} has no field {name!r}. {suggest(name, known[section])}" for name in unknown]
    return problems


def expand_flags(arguments: list[str], known: Mapping[str, Iterable[str]]) -> list[str]:
    """Return the arguments with each --field as --section.field, if only one section has a field of this name.

    ConfigError if several sections have the field, or if no section has it but a similar name exists.
    """
    sections: dict[str, list[str]] = {}  # by field
    for section, names in known.items():
        for name in names:
            sections.setdefault(name, []).append(section)
    expanded = []
    for argument in arguments:
        word, equals, value = argument.partition("=")
        name = word.removeprefix("--").replace("-", "_")
        owners = sections.get(name) or sections.get(name.removeprefix("no_"), [])
        long_flags = [flag(f"{section}.{name}") for section in owners]
        is_short = argument.startswith("--") and "." not in word and word not in ("--", "--help")
        if is_short and not long_flags and get_close_matches(word, map(flag, sections), n=1):
            raise ConfigError(f"There is no flag {word}. {suggest(word.replace('_', '-'), map(flag, sections))}")
        if not argument.startswith("--") or not long_flags:
            expanded.append(argument)
        elif len(long_flags) == 1:
            expanded.append(f"{long_flags[0]}{equals}{value}")
        else:
            raise ConfigError(f"{word} is a field of several sections. Use {' or '.join(long_flags)}.")
    return expanded


def flag_values(arguments: list[str], name: str) -> list[str] | None:
    """Return the values that the last use of a flag has, such as those of --general.mode val eval, or None."""
    values: list[str] | None = None
    is_open = False
    for argument in arguments:
        word, equals, value = argument.partition("=")
        if argument.startswith("--"):
            is_open = word.replace("_", "-") == flag(name)
            if is_open:
                values = [value] if equals else []
        elif is_open and values is not None:
            values.append(argument)
    return values


def section_items(config: Any) -> Iterator[tuple[str, str, Any]]:
    """Yield (section, field, value)."""
    for section in fields(config):
        values = getattr(config, section.name)
        for field in fields(values):
            yield section.name, field.name, getattr(values, field.name)
