"""Downloads from a local server with the endpoints on the Hugging Face Hub: truncated bodies, 5xx, 404, no network."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.hub_server import HubServer, downloads, run_python

ROOT = Path(__file__).parents[2]
REPO = "HuggingFaceFW/fineweb-edu"


def parquet(texts: list[str], row_group_size: int = 20) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"text": texts, "id": list(range(len(texts)))}), file, row_group_size=row_group_size)
    return file.getvalue()


TEXTS = {
    f"sample/10BT/{number:03d}_00000.parquet": [f"document {i} of file {number}. " + "word " * i for i in range(50)]
    for number in range(3)
}


@pytest.fixture
def server():
    files = {path: parquet(texts) for path, texts in TEXTS.items()}
    with HubServer({REPO: files, "owner/tiny": {"data/train-0.parquet": parquet(["one", "two", "three"] * 9)}}) as hub:
        yield hub


@pytest.fixture
def start(server, tmp_path):
    """A function that starts fineweb.py with the server as its hub."""

    def start(*arguments: object, endpoint: str | None = None) -> subprocess.Popen:
        env = os.environ | {"HF_ENDPOINT": endpoint or server.endpoint, "HF_HOME": str(tmp_path / "hf")}
        env |= {"HF_UPDATE_DOWNLOAD_COUNTS": "0"}
        command = [sys.executable, str(ROOT / "fineweb.py"), *map(str, arguments), "--workers", "1"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}

        def handle_sigint() -> None:  # a shell starts background jobs, and so their children, with SIGINT ignored
            signal.signal(signal.SIGINT, signal.SIG_DFL)

        return subprocess.Popen(
            command, cwd=tmp_path, env=env, start_new_session=True, preexec_fn=handle_sigint, **pipes
        )

    return start


@pytest.fixture
def prepare(start):
    """A function that runs fineweb.py with the server as its hub and returns the completed process."""

    def run(*arguments: object, **options) -> subprocess.CompletedProcess:
        with start(*arguments, **options) as process:
            stdout, stderr = process.communicate()
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    return run


def test_named_source_downloads_and_deletes_each_file(prepare, server, tmp_path):
    done = prepare("fineweb-edu-10BT", "--val-tokens", 100)
    assert done.returncode == 0, done.stderr
    directory = tmp_path / "data" / "fineweb-edu-10BT"
    manifest = json.loads((directory / "dataset.json").read_text())
    assert manifest["counts"]["documents"]["kept"] == 150
    assert manifest["settings"]["revision"] == server.sha(REPO)
    assert downloads(server) == [path.rsplit("/", 1)[-1] for path in TEXTS]
    assert not list(directory.rglob("*.parquet"))
    assert not (directory / "parts").exists()


def test_max_tokens_downloads_only_the_files_it_needs(prepare, server, tmp_path):
    texts = [f"document {i}. " + "word " * i for i in range(50)]
    names = [f"{number:03d}_00000.parquet" for number in range(6)]  # the second is a duplicate of the first
    batches = [texts, texts, *([f"{number} {text}" for text in texts] for number in range(4))]
    files = {f"sample/10BT/{n}": parquet(batch) for n, batch in zip(names, batches, strict=True)}
    server.commit(REPO, files)
    done = prepare("fineweb-edu-10BT", "--val-tokens", 0, "--max-tokens", 2000)
    assert done.returncode == 0, done.stderr
    assert downloads(server) in (names[:3], names[:4])  # the next file may be downloaded ahead
    manifest = json.loads((tmp_path / "data" / "fineweb-edu-10BT" / "dataset.json").read_text())
    assert 2000 <= manifest["counts"]["tokens"]["train"] < 2000 + 60
    assert manifest["counts"]["documents"]["duplicate"] == 50


def test_truncated_bodies_and_a_503_change_no_byte(prepare, server, tmp_path):
    assert prepare("fineweb-edu-10BT", "--out-dir", tmp_path / "a" / "set").returncode == 0
    server.truncate("000_00000", after_bytes=500)
    server.fail("001_00000", status=503, times=1, method="GET")
    server.truncate("002_00000", after_bytes=300, reset=True)
    done = prepare("fineweb-edu-10BT", "--out-dir", tmp_path / "b" / "set")
    assert done.returncode == 0, done.stderr
    assert "Retrying in 1 s" in done.stderr
    names = sorted(path.name for path in (tmp_path / "a" / "set").iterdir())
    assert all((tmp_path / "a/set" / n).read_bytes() == (tmp_path / "b/set" / n).read_bytes() for n in names)


def test_resume_downloads_only_the_missing_files(prepare, server, tmp_path):
    server.fail("001_00000", status=404, times=1)
    assert prepare("fineweb-edu-10BT").returncode == 2
    before = len(downloads(server))
    done = prepare("fineweb-edu-10BT")
    assert done.returncode == 0, done.stderr
    assert downloads(server)[before:] == ["001_00000.parquet", "002_00000.parquet"]


def test_ctrl_c_prints_how_to_resume(start, server, tmp_path):
    server.truncate("001_00000", after_bytes=100, hang=60)  # so that it cannot finish before the interrupt
    with start("fineweb-edu-10BT") as process:
        while process.poll() is None and not list(tmp_path.glob("data/*/parts/*.npz")):
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130, stderr
    assert "To resume, run the same command again." in stderr
    assert "Traceback" not in stderr


def test_file_with_another_sha256_is_downloaded_again(prepare, server, tmp_path):
    files = server.repos["datasets", REPO][server.sha(REPO)]
    path = next(iter(files))
    data = files[path].source
    bodies = iter([b"x" * len(data), data])

    def chunks(start, stop):
        if stop > start:  # not a HEAD request
            yield next(bodies)[start:stop]

    files[path].chunks = chunks
    done = prepare("fineweb-edu-10BT")
    assert done.returncode == 0, done.stderr
    assert "its sha256 differs" in done.stderr


def test_any_dataset_of_the_hub_is_streamed(prepare, tmp_path):
    done = prepare("owner/tiny", "--val-tokens", 0)
    assert done.returncode == 0, done.stderr
    counts = json.loads((tmp_path / "data" / "tiny" / "dataset.json").read_text())["counts"]["documents"]
    assert (counts["seen"], counts["kept"], counts["duplicate"]) == (27, 3, 24)


QUESTIONS = [
    {"ind": i, "activity_label": "a", "ctx_a": "b", "ctx_b": "c", "ctx": "b c", "split": "val", "split_type": "x",
     "label": str(i % 4), "endings": list("defg"), "source_id": "activitynet~1"}
    for i in range(5)
]  # fmt: skip


def test_hellaswag_and_translations_are_downloaded(tmp_path):
    table = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(QUESTIONS), table)
    polish = "".join(json.dumps(row) + "\n" for row in QUESTIONS).encode()
    repos = {
        "Rowan/hellaswag": {"data/validation-00000-of-00001.parquet": table.getvalue()},
        "openGPT-X/hellaswagx": {"hellaswag_PL_validation.jsonl": polish},
    }
    code = "import hashlib, hellaswag as h; from pathlib import Path\n"
    code += "h.files.write = lambda path, data: (setattr(h, 'ENGLISH_SHA256', hashlib.sha256(data).hexdigest()), "
    code += "path.write_bytes(data))\n"
    code += "print(h.fetch(None, 'en').read_text().count(chr(10)), h.fetch(None, 'pl').read_text().count(chr(10)))"
    with HubServer(repos) as hub:
        done = run_python(code, hub, tmp_path)
    assert done.stdout == "5 5\n", done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["owner/none"], "owner/none is not available on the Hugging Face Hub"),
        (["fineweb2-pl"], "HuggingFaceFW/fineweb-2 is not available on the Hugging Face Hub"),
        (["owner/tiny", "--text-column", "body"], "has no column 'body': it has text, id"),
        (["owner/tiny", "--split", "dev"], "Bad split: dev"),
        (["fineweb-edu-10BT", "--text-column", "body"], "no column 'body': it has text, id"),
        (["fineweb-edu-10B"], "Did you mean 'fineweb-edu-10BT'?"),
    ],
)
def test_missing_source_column_or_split_is_one_message(arguments, message, prepare):
    done = prepare(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_network_offline_sources_are_suggested(prepare):
    done = prepare("fineweb-edu-10BT", endpoint="http://127.0.0.1:9")
    assert done.returncode == 2
    assert "python fineweb.py stdlib" in done.stderr
    assert "python fineweb.py files --input" in done.stderr
    assert "Retrying" not in done.stderr
    assert "Traceback" not in done.stderr
