"""Generate text from a model, using a KV cache.

    python sample.py out/gpt2 --prompt "The meaning of life is" --num-samples 3
    python sample.py out/gpt2 --prompt "In the beginning" --prompt "Once upon a time" --temperature 0
    python sample.py out/gpt2                          # an interactive session
    python sample.py gpt2-xl --prompt "Once upon a time" --temperature 0.8 --top-p 0.95

The prompt is preceded by an end-of-text token, as every document in the training data is.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import tyro

from babygpt.chat.session import TerminalSession
from babygpt.constraints import ModelArgument, Positive, metavar, parse_arguments
from babygpt.data.tokenizer import Tokenizer, stream_decode
from babygpt.errors import UserError, run
from babygpt.nn.generation import SamplingParams, generate
from babygpt.training.device import autocast
from babygpt.training.distributed import process_group
from model import GPT


def sample(
    model: GPT, tokenizer: Tokenizer, prompts: list[str], params: SamplingParams,
    on_text: Callable[[str], None] = lambda text: None, stop: Callable[[], bool] = lambda: False,
) -> list[str]:  # fmt: skip
    """Return the continuation of each prompt, up to its end-of-text token or `stop()`.

    All texts are generated as one batch. `on_text` receives the first continuation while it is generated. The training
    mode of the model is restored, and PyTorch's global random state is not used.
    """
    ids = [[tokenizer.eot_id, *tokenizer.encode(prompt)] for prompt in prompts]
    rows: list[list[int]] = [[] for _ in prompts]

    def tokens_of_first_text() -> Iterator[int]:
        for tokens in generate(model, ids, params, tokenizer.eot_id, stop):
            for row, token in zip(rows, tokens, strict=True):
                if token is not None:
                    row.append(token)
            if tokens[0] is not None:
                yield tokens[0]

    for text in stream_decode(tokenizer, tokens_of_first_text()):
        on_text(text)
    return [tokenizer.decode(row) for row in rows]


@dataclass(frozen=True, kw_only=True)
class ModelArgs(SamplingParams):
    """The flags that sample.py and chat.py share."""

    # run directory (out/NAME), checkpoint directory, Hugging Face GPT-2 directory, or a model on the Hugging Face Hub:
    # gpt2, gpt2-medium, gpt2-large or gpt2-xl
    model: ModelArgument
    device: Literal["auto", "cuda", "cpu", "mps"] = "auto"  # device to run on; auto: CUDA if available, otherwise CPU
    # data type for matrix multiplications; auto: bfloat16 if the device supports it, otherwise float32
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    def load_model(self, device: torch.device) -> GPT:
        if self.compile and device.type != "cuda":
            raise UserError(f"--compile is supported on CUDA only, not on {device.type}. Omit it.")
        return GPT.from_pretrained(self.model, device)


@dataclass(frozen=True, kw_only=True)
class SampleArgs(ModelArgs):
    """The command line: each field is a flag, and its comment is the help."""

    # prompt; can be repeated
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, metavar("TEXT", "start an interactive session")] = ()
    num_samples: Positive = 1  # number of samples per prompt; all samples are generated as one batch


def main() -> None:
    args = parse_arguments(SampleArgs, "sample.py", __doc__)
    with process_group(args.device) as ranks:
        model = args.load_model(ranks.device)
        with autocast(ranks.device, args.dtype):
            if args.prompt:
                print_samples(model, [p for p in args.prompt for _ in range(args.num_samples)], args)
            else:
                Session(model, args, args.num_samples).run()


def print_samples(model: GPT, prompts: list[str], params: SamplingParams) -> None:
    """Print each prompt with its continuation, the first one while it is generated."""
    print(prompts[0], end="", flush=True)
    texts = sample(model, model.tokenizer, prompts, params, print_piece)
    print()
    for prompt, text in zip(prompts[1:], texts[1:], strict=True):
        print(f"\n---\n\n{prompt}{text}")


def print_piece(text: str) -> None:
    print(text, end="", flush=True)


class Session(TerminalSession):
    """Read prompts from the terminal and print their continuations.

    A prompt continues the text so far on a new line. With several samples per prompt, each prompt starts a new text,
    and an empty line continues the first sample.
    """

    HELP = (
        "A prompt continues the text so far. An empty line continues the text without adding to it.\n"
        f"/new starts a new text. /help prints this help. {TerminalSession.SETTINGS_HELP}\n"
        "To start a prompt with a slash, type two slashes. Press Ctrl-C to stop generating, and Ctrl-D to exit."
    )

    def __init__(self, model: GPT, params: SamplingParams, num_samples: int = 1):
        super().__init__(params)
        self.model, self.num_samples, self.text = model, num_samples, ""
        self.separator = "\n"  # between the text and a prompt that continues it
        try:
            model.tokenizer.encode(self.separator)
        except UserError:  # the tokens are characters, and the training data has no line breaks
            self.separator = ""

    def enter(self, text: str) -> None:
        """Print the continuation of the text and the prompt, and increment the seed for the next one."""
        prompt, pieces = text, list[str]()
        text = prompt or self.text
        if not text:
            return
        if self.text and prompt and self.num_samples == 1:
            text = f"{self.text}{self.separator}{prompt}"

        def show(piece: str) -> None:
            pieces.append(piece)
            print_piece(piece)

        try:
            texts = sample(self.model, self.model.tokenizer, [text] * self.num_samples, self.params, show)
            print()
            for other in texts[1:]:
                print(f"\n---\n\n{other}")
        except KeyboardInterrupt:
            print()
        except UserError as error:  # a character without a token
            return print(error)
        self.text = text + "".join(pieces)
        self.advance_seed()

    def command(self, name: str = "", value: str = "") -> None:
        if name == "new" and not value.strip():
            self.text = ""
        else:
            super().command(name, value)


if __name__ == "__main__":
    run(main)
