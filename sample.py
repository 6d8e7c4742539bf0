"""Generate text from a model, using a KV cache.

    python sample.py out/gpt2 --prompt "The meaning of life is" --num-samples 3
    python sample.py out/gpt2 --prompt "In the beginning" "Once upon a time" --temperature 0
    python sample.py out/gpt2                          # read prompts from the terminal
    python sample.py gpt2-xl --prompt "Once upon a time" --temperature 0.8 --top-p 0.95

The prompt is preceded by an end-of-text token, as every document in the training data is.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

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
class SampleArgs(SamplingParams):
    """The command line: each field is a flag, and its comment is the help."""

    # run directory (out/NAME), checkpoint directory, Hugging Face GPT-2 directory, or a model on the Hugging Face Hub:
    # gpt2, gpt2-medium, gpt2-large or gpt2-xl
    model: ModelArgument
    # one or more prompts
    prompt: Annotated[
        tuple[str, ...], metavar("TEXT [TEXT ...]", "read prompts from the terminal, until an empty line")
    ] = ()
    num_samples: Positive = 1  # number of samples per prompt; all samples are generated as one batch
    device: Literal["auto", "cuda", "cpu", "mps"] = "auto"  # device to run on; auto: CUDA if available, otherwise CPU
    # data type for matrix multiplications; auto: bfloat16 if the device supports it, otherwise float32
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"


def main() -> None:
    args = parse_arguments(SampleArgs, "sample.py", __doc__)
    with process_group(args.device) as ranks:
        if args.compile and ranks.device.type != "cuda":
            raise UserError(f"--compile is supported on CUDA only, not on {ranks.device.type}. Omit it.")
        model = GPT.from_pretrained(args.model, ranks.device)
        with autocast(ranks.device, args.dtype):
            if args.prompt:
                return print_samples(model, [p for p in args.prompt for _ in range(args.num_samples)], args)
            while prompt := read_prompt():
                print_samples(model, [prompt] * args.num_samples, args)


def print_samples(model: GPT, prompts: list[str], params: SamplingParams) -> None:
    """Print the first text while it is generated, then the others."""

    def show(text: str) -> None:
        print(text, end="", flush=True)

    show(prompts[0])
    texts = sample(model, model.tokenizer, prompts, params, on_text=show)
    print()
    for prompt, text in zip(prompts[1:], texts[1:], strict=True):
        print(f"\n---\n\n{prompt}{text}")


def read_prompt() -> str:
    try:
        return input("\nprompt> ")
    except EOFError:
        return ""


if __name__ == "__main__":
    run(main)
