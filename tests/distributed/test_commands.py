"""The commands of README.md and the other documents.

The test runs them in the order of the documents, in a directory with a small dataset at the default path. Additional
flags make training small. NOT_RUN lists the commands that need something that the tests do not have.
"""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tyro
from support.helpers import call, save, save_hellaswag, save_jsonl
from support.runs import ROOT

import arguments as train_arguments
import fineweb
from tools.train_tokenizer import train_tokenizer

DOCUMENTS = [
    "README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md",
    *(f"docs/{name}.md" for name in (
        "data", "data_order", "recipes", "modern", "performance", "reliability", "troubleshooting", "export",
        "evaluation", "chat",
    )),
]  # fmt: skip
NOT_RUN = {
    "CI runs it": [
        "bash runs/demo.sh",
        "bash runs/test.sh",
        "bash runs/test.sh --quick",
        "bash runs/test.sh -k optimizer",
        "source .venv/bin/activate",
    ],
    "the Hugging Face Hub": [
        "python fineweb.py",
        "python fineweb.py fineweb-10BT",
        "python fineweb.py fineweb2-pl",
        "python fineweb.py wikipedia-en",
        "python fineweb.py roneneldan/TinyStories",
        "python fineweb.py shakespeare --tokenizer char",
        "python fineweb.py fineweb-edu-100BT --min-score 3.5 --min-chars 500 --max-tokens 10000000000",
        "python fineweb.py fineweb2-pl --tokenizer data/pl.json --quality data/pl-quality.safetensors "
        "--min-quality 0.5",
    ],
    "an object store or a cluster": [
        "python fineweb.py fineweb-edu-100BT --out-dir s3://bucket/edu",
        "python fineweb.py fineweb-edu-100BT --engine ray --out-dir s3://bucket/edu",
        "python train.py --data.dataset s3://bucket/edu",
        "ray start --head",
        "sbatch --nodes 4 runs/slurm.sh gpt2",
        "torchrun --nnodes 2 --node_rank 0 --master_addr 10.0.0.1 --nproc_per_node=8 train.py gpt2 "
        "--general.init-from resume",
        "torchrun --nnodes 2 --rdzv-backend c10d --rdzv-endpoint 10.0.0.1:29400 --rdzv-id run --nproc_per_node=8 "
        "train.py gpt2 --general.init-from resume",
        "torchrun --max-restarts 3",
    ],
    "a GPU": [
        "bash runs/gpu_report.sh",
        "bash runs/gpu_report.sh --minutes 9",
        "python -m benchmarks.fake_h200",
    ],
    "the package index": [
        "python -m tools.evaluate out/gpt2",
        "python -m tools.evaluate out/gpt2-sft --tasks piqa --chat-template",
        "pip install pre-commit",
        "pip install ray",
        "pip install s3fs",
        "pip install scikit-learn",
        "pre-commit install",
        "bash runs/test.sh --slow",
        "python -m tools.export out/gpt2 exported/my-gpt2 --gguf float16",
        "pip install gguf",
    ],
    "a checkpoint of nanoGPT": [
        "python sample.py nanogpt/ckpt.pt",
        "python train.py finetune-shakespeare --init-from nanogpt/ckpt.pt",
    ],
    "a client": [
        "python chat.py out/gpt2-sft-dpo --serve 8000",
    ],
    "minutes to hours, or files that the reader chooses": [
        "bash results/fineweb-10m/run.sh 'PATH/*.parquet'",
        "python train.py PRESET",
        "python -m tools.NAME --help",
        "python -m tools.evaluate MODEL [MODEL ...]",
        "python -m tools.export MODEL OUT",
        "python benchmarks/compile_cpu.py DATASET",
        "python benchmarks/data.py PATH --runs 2",
        "python benchmarks/data_faults.py",
        "python benchmarks/equivalence.py main .",
        "python benchmarks/exports.py MODEL",
        "python benchmarks/faults.py",
        "python benchmarks/finetune.py out/demo instructions.json preferences.json --also ultrafeedback.jsonl",
        "python benchmarks/harness.py MODEL",
        "python benchmarks/loader.py",
        "python benchmarks/rates.py DATASET --max-batch-tokens 16384",
        "python benchmarks/recipe.py DATASET",
        "python benchmarks/shuffle.py",
        "python benchmarks/speed.py --nanogpt PATH",
        "python benchmarks/windows.py shakespeare-char-cpu --dataset DATASET",
        "python tests/mistakes.py",
        "python tests/mistakes.py 7 13",
    ],
}
PROGRAMS = ("python", "torchrun", "bash", "source", "pip", "pre-commit", "ray", "sbatch")
SMALL = shlex.split(
    "--general.device cpu --data.num-streams 4 --data.chunk-tokens 1000 --model.block-size 32 --model.n-layer 4 "
    "--model.n-head 2 --model.n-embd 16 --training.max-steps 4 --training.batch-tokens 256 "
    "--training.micro-batch-size 4 --training.compile off --validation.every-n-steps 0 --evaluation.limit 4 "
    "--sampling.max-new-tokens 4 --saving.every-n-steps 1"
)


def commands(text: str) -> Iterator[str]:
    """Yield the commands of a Markdown text, in order: lines of bash blocks, and code spans that begin with a program.

    Comments are removed, and a loop over several lines is one command.
    """
    for block, span in re.findall(r"```bash\n(.*?)```|(?<!`)`([^`]+)`(?!`)", text, re.DOTALL):
        if span and span.split()[0] in PROGRAMS and len(span.split()) > 1:
            yield " ".join(span.split())
        lines = re.sub(r"\s+# .*", "", block)
        yield from filter(None, re.split(r"\n(?!  |done)", lines.replace("\\\n", " ").strip()))


def documented() -> list[str]:
    """The distinct commands of all documents, in order."""
    return list(dict.fromkeys(c for name in DOCUMENTS for c in commands((ROOT / name).read_text(encoding="utf-8"))))


def not_run() -> list[str]:
    return [command for listed in NOT_RUN.values() for command in listed]


def shrink(command: str) -> str:
    """The same command with two processes instead of eight, a small model, and a generated HellaSwag file."""
    command = command.replace("--nproc_per_node=8", "--nproc_per_node=2").replace("sleep 30", "sleep 0")
    added = []
    if re.search(r"train\.py(?!.*--help)", command):
        added = ["--evaluation.file", "hellaswag.jsonl", *([] if "--general.mode" in command else SMALL)]
    elif command.startswith("python hellaswag.py"):
        added = ["--file", "hellaswag.jsonl", "--device", "cpu"]
    elif command.startswith(("python finetune.py sft", "python finetune.py dpo")):
        added = ["--max-steps", "2", "--held-out", "0.3", "--device", "cpu"]
    elif command.startswith(("python chat.py", "python -m tools.evaluate_chat")):
        added = ["--device", "cpu"]
    elif command.startswith("python sample.py"):
        added = ["--max-new-tokens", "4", "--device", "cpu"]
    if not added:
        return command
    return re.sub(r"( && break|$)", f" {shlex.join(added)}\\1", command, count=1)


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the repository, by links, with datasets at the default paths and the files that the commands read."""
    for path in ROOT.iterdir():
        if path.name not in ("data", "out", ".git") and not path.name.startswith(".venv"):
            (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    text = "".join(path.read_text("utf-8", "replace") for path in sorted(Path(os.__file__).parent.rglob("*.py")))
    texts = [text[i : i + 4000] for i in range(0, 8_000_000, 4000)]
    save_jsonl(tmp_path / "pages" / "a.jsonl.gz", texts)
    save_hellaswag(tmp_path / "hellaswag.jsonl", 8)
    records = [{"prompt": f"{i}", "chosen": "A", "rejected": "B"} for i in range(30)]  # fit into 32 tokens
    for name in ("instructions", "preferences"):
        save(tmp_path / f"{name}.jsonl", "".join(json.dumps(record) + "\n" for record in records).encode())
    for name, part in {"wikipedia-pl/a": texts[:30], "textbooks": texts[30:50], "pages": texts[50:100]}.items():
        save_jsonl(tmp_path / f"{name}.jsonl", part)
    save(tmp_path / "notes" / "a.txt", "\n\n".join(texts[:20]).encode())
    for name in ("train", "val"):
        save(tmp_path / f"{name}.csv", f"text\n{name}\n".encode())
    train_tokenizer(texts[:10], 500, tmp_path / "data" / "pl.json", progress=False)
    call(
        fineweb.main, "files", "--input", "pages/*.jsonl.gz", "--out-dir", "data/fineweb-edu-10BT", "--val-tokens",
        5000, "--workers", 1,
    )  # fmt: skip
    call(
        fineweb.main, "files", "--input", "notes", "--out-dir", "data/shakespeare-char", "--tokenizer", "char",
        "--workers", 1,
    )  # fmt: skip
    (tmp_path / "data" / "demo").symlink_to(tmp_path / "data" / "fineweb-edu-10BT")
    return tmp_path


def test_documented_commands_run(workspace: Path):
    """Every command of the documents that NOT_RUN does not list exits with code 0, as does the README's Python code."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    failures = []
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    for command in [*documented(), *(f"python -c {shlex.quote(block)}" for block in code)]:
        if command in not_run():
            continue
        start = time.monotonic()
        done = subprocess.run(
            ["bash", "-c", shrink(command)], cwd=workspace, env=environment, capture_output=True, text=True, timeout=300
        )
        print(f"{time.monotonic() - start:6.1f} s  {command}")
        if done.returncode:
            failures.append(f"{command}\n{done.stdout[-500:]}{done.stderr[-1000:]}")
    assert not failures, "\n\n".join(failures)


def test_commands_that_are_not_run_are_documented():
    """NOT_RUN has no command that the documents no longer have."""
    assert set(not_run()) <= set(documented())


@pytest.mark.parametrize("command", [command for command in not_run() if re.search(r"\S+\.(py|sh)|-m ", command)])
def test_commands_that_are_not_run_have_valid_flags(command: str):
    """The script of the command exists and knows its flags."""
    words = shlex.split(command.replace("PRESET", "gpt2").replace("NAME", "plot"))
    position = next(i for i, word in enumerate(words) if word.endswith((".py", ".sh")) or words[i - 1] == "-m")
    script, arguments = words[position], words[position + 1 :]
    if script == "train.py":
        train_arguments.parse(arguments)
    elif script == "fineweb.py":
        tyro.cli(fineweb.PrepareArgs, args=arguments)
    else:
        path = script if script.endswith((".py", ".sh")) else f"{script.replace('.', '/')}.py"
        source = (ROOT / path).read_text(encoding="utf-8")
        for flag in (word for word in arguments if word.startswith("--") and word != "--help"):
            assert flag in source or flag[2:].replace("-", "_") in source, f"{script} does not know {flag}"


def test_documented_links_exist():
    """Links between the documents lead to files and headings that exist."""
    for name in DOCUMENTS:
        text = (ROOT / name).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if not target.startswith("http"):
                path, _, heading = target.partition("#")
                file = (ROOT / name).parent / path if path else ROOT / name
                assert file.exists(), f"{name}: {target}"
                anchors = [anchor(line) for line in file.read_text(encoding="utf-8").splitlines()] if heading else []
                assert heading in ("", *anchors), f"{name}: {target}"


def test_messages_quoted_in_troubleshooting_exist():
    """The messages that docs/troubleshooting.md quotes are in the code."""
    strings = []
    for path in (*ROOT.glob("*.py"), *(ROOT / "babygpt").rglob("*.py")):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        strings += [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    rows = re.findall(r"^\| `(.*?)` \|", (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert rows
    for message in rows:
        for piece in re.split(r" ?\.\.\. ?| 3 | nan$", message):
            assert any(piece in string for string in strings), message


def anchor(line: str) -> str:
    """Return the anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-") if line.startswith("#") else ""
