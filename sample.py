"""Text from a model, token by token, with a KV cache.

    python sample.py out/gpt2 --prompt "The meaning of life is" --num-samples 3
    python sample.py out/gpt2 --prompt "In the beginning" "Once upon a time" "The reason why" --temperature 0
    python sample.py out/gpt2                          # asks for prompts
    python sample.py gpt2-xl --prompt "Once upon a time" --temperature 0.8 --top-p 0.95

The prompt is put behind an end-of-text token, as every document of the training data begins with one.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch

from babygpt.data.tokenizer import Tokenizer, stream_decode
from babygpt.errors import UserError, run
from babygpt.nn.generation import generate, read_on
from babygpt.training.device import autocast
from babygpt.training.distributed import process_group
from model import GPT


def sample(
    model: GPT, tokenizer: Tokenizer, prompts: list[str], max_new_tokens: int, temperature: float, top_k: int | None,
    top_p: float | None, seed: int, dtype: str = "auto", compiled: bool = False, show=None,
    stop: Callable[[], bool] = lambda: False,
) -> list[str]:  # fmt: skip
    """A continuation of each prompt, without it, up to its end-of-text token or `stop()`; all are written at once.

    `show` is called with pieces of the first text as it grows. The model's training mode is put back, and PyTorch's
    own random state is left alone.
    """
    was_training = model.training
    model.eval()
    device = model.wte.weight.device
    ids = [[tokenizer.eot_id, *tokenizer.encode(prompt)] for prompt in prompts]
    longest = max(map(len, ids))
    begins = torch.tensor([longest - len(row) for row in ids], device=device)
    tokens = torch.tensor([[tokenizer.eot_id] * (longest - len(row)) + row for row in ids], device=device)
    generator = torch.Generator().manual_seed(seed)
    decode = torch.compile(read_on, dynamic=True) if compiled else read_on
    rows: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(prompts)))

    def first_row() -> Iterator[int]:
        with autocast(device, dtype):
            settings = (max_new_tokens, temperature, top_k, top_p, generator, begins, decode)
            for chosen in generate(model, tokens, *settings):
                for row, token in enumerate(chosen.tolist()):
                    if token == tokenizer.eot_id:
                        open_rows.discard(row)
                    elif row in open_rows:
                        rows[row].append(token)
                        if row == 0:
                            yield token
                if not open_rows or stop():
                    return

    for text in stream_decode(tokenizer, first_row()):
        if show is not None:
            show(text)
    model.train(was_training)
    return [tokenizer.decode(row) for row in rows]


def main() -> None:
    import tyro

    def command(
        model: tyro.conf.Positional[str],
        /,
        *,
        prompt: tuple[str, ...] = (),
        num_samples: int = 1,
        max_new_tokens: int = 200,
        temperature: float = 1.0,
        top_k: int | None = 50,
        top_p: float | None = None,
        seed: int = 1337,
        device: Literal["auto", "cuda", "cpu", "mps"] = "auto",
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        compile: bool = False,
    ) -> None:
        """Writes on from a prompt. Without --prompt it asks for prompts until an empty line.

        Args:
            model: A run's folder (out/NAME), a checkpoint's, a Hugging Face GPT-2 folder, or gpt2[-medium|-large|-xl].
            prompt: The beginning of the text, or of several.
            num_samples: Texts to write for each; the very first is shown as it grows. All are written at once.
            max_new_tokens: Longest text, in tokens.
            temperature: 1 samples as the model believes, less is more careful, 0 takes the likeliest token always.
            top_k: Only the k likeliest tokens.
            top_p: Only the likeliest tokens that hold this share of the probability.
            seed: The same seed gives the same texts.
            device: auto is cuda where there is one, else cpu.
            dtype: Of matrix products; auto is bfloat16 where the device has it, else float32.
            compile: Compile what writes a token: worth its minute for many texts, on CUDA alone.
        """
        if num_samples < 1 or max_new_tokens < 1 or temperature < 0 or (top_k is not None and top_k < 1):
            raise UserError("--num-samples, --max-new-tokens and --top-k must be at least 1, --temperature at least 0.")
        if top_p is not None and not 0 < top_p <= 1:
            raise UserError(f"--top-p {top_p} must be above 0, up to 1.")
        with process_group(device) as ranks:
            if compile and ranks.device.type != "cuda":
                raise UserError("--compile makes sampling faster on CUDA alone: leave it out.")
            loaded = GPT.from_pretrained(model, ranks.device)
            settings = {
                "max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p,
                "seed": seed, "dtype": dtype, "compiled": compile,
            }  # fmt: skip
            if prompt:
                return show_samples(loaded, [p for p in prompt for _ in range(num_samples)], settings)
            while text := _ask():
                show_samples(loaded, [text] * num_samples, settings)

    tyro.cli(command, prog="sample.py", description=__doc__)


def show_samples(model: GPT, prompts: list[str], settings: dict[str, Any]) -> None:
    def show(text: str) -> None:
        print(text, end="", flush=True)

    show(prompts[0])
    texts = sample(model, model.tokenizer, prompts, **settings, show=show)
    print()
    for prompt, text in zip(prompts[1:], texts[1:], strict=True):
        print(f"\n---\n\n{prompt}{text}")


def _ask() -> str:
    try:
        return input("\nprompt> ")
    except EOFError:
        return ""


if __name__ == "__main__":
    run(main)
