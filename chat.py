"""Chat with a model in the terminal, or serve it on this machine.

    python chat.py out/chat
    python chat.py out/chat --system "Answer in one sentence." --temperature 0.5
    python chat.py out/chat --serve 8000       # a page and an OpenAI-compatible API at http://127.0.0.1:8000

The model must be a chat model: one that is trained on conversations with the chat template, ChatML.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Le

from babygpt.chat.completions import ChatModel
from babygpt.chat.reply import fit_context, limit_to_context, reply
from babygpt.chat.server import serve
from babygpt.chat.session import TerminalSession
from babygpt.chat.template import ChatTemplate, Conversation
from babygpt.console import counted
from babygpt.constraints import Positive, metavar, parse_arguments
from babygpt.data.texts import without_surrogates
from babygpt.errors import UserError, run
from babygpt.nn.generation import SamplingParams
from babygpt.training.device import autocast
from babygpt.training.distributed import process_group
from sample import ModelArgs, print_piece


@dataclass(frozen=True, kw_only=True)
class ChatArgs(ModelArgs):
    """The command line: each field is a flag, and its comment is the help."""

    # system message at the start of each conversation; with --serve, of requests without one
    system: Annotated[str | None, metavar("TEXT", "no system message")] = None
    # serve a page and an OpenAI-compatible API on this port of 127.0.0.1; 0: any free port
    serve: Annotated[Annotated[int, Ge(0), Le(65535)] | None, metavar("PORT", "chat in the terminal")] = None
    max_new_tokens: Annotated[Positive, metavar("TOKENS")] = 256  # maximum number of new tokens per answer
    temperature: Annotated[float, Ge(0)] = 0.8  # softmax temperature; 0: greedy decoding


def main() -> None:
    args = parse_arguments(ChatArgs, "chat.py", __doc__)
    with process_group(args.device) as ranks:
        model = args.load_model(ranks.device)
        template = ChatTemplate(model.tokenizer)

        def generate(
            messages: Conversation, params: SamplingParams, stop: Callable[[], bool] = lambda: False
        ) -> Iterator[str]:
            with autocast(ranks.device, args.dtype):  # here, because it applies to the current thread only
                yield from reply(model, template, messages, params, stop)

        name, block_size = Path(args.model).resolve().name, model.config.block_size
        chat_model = ChatModel(name, template, block_size, args, generate, args.system)
        if args.serve is None:
            Session(chat_model).run()
        else:
            serve(chat_model, args.serve)


class Session(TerminalSession):
    """Read messages from the terminal and print the answers."""

    GREETING, PROMPT = "Enter a message, or /help.", "\nuser> "
    COMMANDS = ("new", "system", "save", "help")
    HELP = (
        "A message continues the conversation. /new starts a new one. /help prints this help.\n"
        "/system TEXT sets the system message and starts a new conversation, /system off removes it, and /system\n"
        "prints it. /save PATH appends the conversation to a .jsonl file, as one line that finetuning can read.\n"
        f"{TerminalSession.SETTINGS_HELP}\n"
        "To start a message with a slash, type two slashes. Press Ctrl-C to stop the answer, and Ctrl-D to exit."
    )

    def __init__(self, model: ChatModel):
        super().__init__(model.params)
        self.model, self.system = model, model.system
        self.start()

    def start(self) -> None:
        """Start a new conversation."""
        self.messages: Conversation = [{"role": "system", "content": self.system}] if self.system else []
        self.num_dropped = 0  # of the oldest messages after the system message: those that the context has no room for

    def enter(self, text: str) -> None:
        """Print the answer to a message. The conversation keeps an answer that Ctrl-C stops."""
        if not text.strip():
            return
        model, messages = self.model, [*self.messages, {"role": "user", "content": without_surrogates(text)}]
        try:
            kept, num_dropped = fit_context(model.template, messages, model.block_size, self.params.max_new_tokens)
        except UserError as error:
            return print(error)
        if num_dropped > self.num_dropped:
            newly_dropped = counted(num_dropped - self.num_dropped, "message")
            print(f"(The context is full. Dropped from the prompt: the oldest {newly_dropped}.)")
        params = limit_to_context(self.params, len(model.template.prompt(kept)), model.block_size)
        pieces, is_interrupted = list[str](), False
        print("\nassistant> ", end="", flush=True)
        try:
            for piece in model.generate(kept, params, lambda: False):
                pieces.append(piece)
                print_piece(piece)
        except KeyboardInterrupt:
            is_interrupted = True
        print()
        if is_interrupted and not any(pieces):
            return
        if not is_interrupted and len(pieces) >= params.max_new_tokens:
            is_context_full = params.max_new_tokens < self.params.max_new_tokens
            reason = "the context is full" if is_context_full else "/tokens changes this limit"
            print(f"(The answer is cut off after {counted(params.max_new_tokens, 'token')}: {reason}.)")
        self.messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]
        self.num_dropped = num_dropped
        self.advance_seed()

    def command(self, name: str = "", value: str = "") -> None:
        value = value.strip()
        if name == "new" and not value:
            self.start()
        elif name == "system":
            if value:
                self.system = None if value == "off" else without_surrogates(value)
                self.start()
            print(f"system: {self.system or 'off'}")
        elif name == "save":
            self.save(value)
        else:
            super().command(name, value)

    def save(self, path: str) -> None:
        """Append the conversation to a file, as one line of JSON."""
        if not path:
            return print("/save needs a path. Use, for instance, /save chats.jsonl.")
        if not any(message["role"] == "assistant" for message in self.messages):
            return print("There is no conversation to save. Enter a message first.")
        line = json.dumps({"messages": self.messages}, ensure_ascii=False)
        try:
            with open(os.path.expanduser(path), "ab+") as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    line = line if file.read() == b"\n" else f"\n{line}"  # the last line has no line break yet
                file.write(f"{line}\n".encode())
        except (OSError, ValueError) as error:
            return print(f"{path} cannot be written ({error}). Use a different path.")
        print(f"{path}: appended a conversation of {counted(len(self.messages), 'message')}")


if __name__ == "__main__":
    run(main)
