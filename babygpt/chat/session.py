"""A session in the terminal: lines of text, and commands that start with a slash.

sample.py and chat.py define what happens to a line of text (`enter`), and add their own commands.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any, ClassVar

from babygpt.constraints import violations
from babygpt.nn.generation import SamplingParams

SETTINGS: dict[str, tuple[str, Callable[[str], Any]]] = {  # command -> field of SamplingParams and its type
    "temperature": ("temperature", float), "tokens": ("max_new_tokens", int), "top-k": ("top_k", int),
    "top-p": ("top_p", float), "seed": ("seed", int),
}  # fmt: skip


class TerminalSession(ABC):
    """Read lines from the terminal until Ctrl-D."""

    GREETING, PROMPT = "Enter a prompt, or /help.", "\nprompt> "
    COMMANDS: ClassVar[tuple[str, ...]] = ("new", "help")  # in addition to SETTINGS
    SETTINGS_HELP = (
        "These commands print or change a setting:\n"
        "/temperature 0.8, /tokens 100, /top-k 50, /top-p 0.9, /seed 1. The value off disables top-k or top-p."
    )
    HELP = SETTINGS_HELP

    def __init__(self, params: SamplingParams):
        self.params = params

    @abstractmethod
    def enter(self, text: str) -> None:
        """Process a line that is not a command."""

    def run(self) -> None:
        with suppress(ImportError):
            import readline  # noqa: F401, it gives input() line editing and a history

        print(self.GREETING)
        while True:
            try:
                line = input(self.PROMPT)
            except EOFError:
                return print()
            except KeyboardInterrupt:
                print("\nPress Ctrl-D to exit.")
                continue
            if line.startswith("/") and not line.startswith("//"):
                self.command(*line[1:].split(maxsplit=1))
            else:
                self.enter(line.removeprefix("/"))

    def command(self, name: str = "", value: str = "") -> None:
        """Run /name value. A subclass runs its own commands and passes the others on."""
        value = value.strip()
        if name in SETTINGS:
            self.change_setting(name, value)
        elif name == "help":
            print(self.HELP)
        else:
            commands = [f"/{command}" for command in (*self.COMMANDS, *SETTINGS)]
            print(f"/{name} is not a command. Use {', '.join(commands)}.")

    def change_setting(self, name: str, value: str) -> None:
        """Change a setting unless the value is empty, and print it."""
        field, convert = SETTINGS[name]
        if value:
            is_off = value == "off" and name in ("top-k", "top-p")
            try:
                change: dict[str, Any] = {field: None if is_off else convert(value)}
                changed = replace(self.params, **change)
                problems = violations(changed, format_name=lambda _: f"/{name}")
            except ValueError:
                problems = [f"/{name} {value} is invalid. Use {'an integer' if convert is int else 'a number'}."]
            if problems:
                return print(*problems, sep="\n")
            self.params = changed
        current = getattr(self.params, field)
        print(f"{name}: {'off' if current is None else current}")

    def advance_seed(self) -> None:
        """Increment the seed, so that the same text gets another answer."""
        self.params = replace(self.params, seed=self.params.seed + 1)
