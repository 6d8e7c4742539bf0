"""The hub, by a server on this machine that speaks its endpoints: cut-off bodies, 5xx, 404, no network."""

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
from support.hub_server import HubServer, downloads, python

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
    """Starts fineweb.py against the server."""

    def start(*arguments: object, endpoint: str | None = None) -> subprocess.Popen:
        env = os.environ | {"HF_ENDPOINT": endpoint or server.endpoint, "HF_HOME": str(tmp_path / "hf")}
        env |= {"HF_UPDATE_DOWNLOAD_COUNTS": "0"}
        command = [sys.executable, str(ROOT / "fineweb.py"), *map(str, arguments), "--workers", "1"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}

        def hear_interrupts() -> None:  # what a shell starts in the background ignores them, and its children too
            signal.signal(signal.SIGINT, signal.SIG_DFL)

        return subprocess.Popen(
            command, cwd=tmp_path, env=env, start_new_session=True, preexec_fn=hear_interrupts, **pipes
        )

    return start


@pytest.fixture
def prepare(start):
    """Runs fineweb.py against the server; returns the finished process."""

    def run(*arguments: object, **options) -> subprocess.CompletedProcess:
        with start(*arguments, **options) as process:
            stdout, stderr = process.communicate()
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    return run


def test_a_named_source_is_downloaded_a_file_at_a_time_and_the_files_go(prepare, server, tmp_path):
    done = prepare("fineweb-edu-10BT", "--val-tokens", 100)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "data" / "fineweb-edu-10BT"
    manifest = json.loads((folder / "dataset.json").read_text())
    assert manifest["counts"]["documents"]["kept"] == 150
    assert manifest["settings"]["revision"] == server.sha(REPO)
    assert downloads(server) == [path.rsplit("/", 1)[-1] for path in TEXTS]
    assert not list(folder.rglob("*.parquet"))
    assert not (folder / "parts").exists()


def test_max_tokens_downloads_each_file_once_and_no_more_than_are_needed(prepare, server, tmp_path):
    texts = [f"document {i}. " + "word " * i for i in range(50)]
    names = [f"{number:03d}_00000.parquet" for number in range(6)]  # the first two are doubles
    batches = [texts, texts, *([f"{number} {text}" for text in texts] for number in range(4))]
    files = {f"sample/10BT/{n}": parquet(batch) for n, batch in zip(names, batches, strict=True)}
    server.commit(REPO, files)
    done = prepare("fineweb-edu-10BT", "--val-tokens", 0, "--max-tokens", 2000)
    assert done.returncode == 0, done.stderr
    assert downloads(server) in (names[:3], names[:4])  # one may be on its way already
    manifest = json.loads((tmp_path / "data" / "fineweb-edu-10BT" / "dataset.json").read_text())
    assert 2000 <= manifest["counts"]["tokens"]["train"] < 2000 + 60
    assert manifest["counts"]["documents"]["duplicate"] == 50


def test_a_cut_off_body_and_a_503_change_no_byte(prepare, server, tmp_path):
    assert prepare("fineweb-edu-10BT", "--out-dir", tmp_path / "a" / "set").returncode == 0
    server.cut("000_00000", after_bytes=500)
    server.fail("001_00000", status=503, times=1, method="GET")
    server.cut("002_00000", after_bytes=300, reset=True)
    done = prepare("fineweb-edu-10BT", "--out-dir", tmp_path / "b" / "set")
    assert done.returncode == 0, done.stderr
    assert "trying again in 1 s" in done.stderr
    names = sorted(path.name for path in (tmp_path / "a" / "set").iterdir())
    assert all((tmp_path / "a/set" / n).read_bytes() == (tmp_path / "b/set" / n).read_bytes() for n in names)


def test_a_kill_between_files_fetches_only_what_is_missing(prepare, server, tmp_path):
    server.fail("001_00000", status=404, times=1)
    assert prepare("fineweb-edu-10BT").returncode == 2
    before = len(downloads(server))
    done = prepare("fineweb-edu-10BT")
    assert done.returncode == 0, done.stderr
    assert downloads(server)[before:] == ["001_00000.parquet", "002_00000.parquet"]


def test_control_c_says_that_the_same_command_goes_on(start, server, tmp_path):
    server.cut("001_00000", after_bytes=100, hang=60)  # so that it can't end before it is told to
    with start("fineweb-edu-10BT") as process:
        while process.poll() is None and not list(tmp_path.glob("data/*/parts/*.npz")):
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130, stderr
    assert "to resume, run the same command again" in stderr
    assert "Traceback" not in stderr


def test_a_file_other_than_the_hubs_is_fetched_again(prepare, server, tmp_path):
    files = server.repos["datasets", REPO][server.sha(REPO)]
    path = next(iter(files))
    good = files[path].source
    bodies = iter([b"x" * len(good), good])

    def chunks(start, stop):
        if stop > start:  # not for a HEAD
            yield next(bodies)[start:stop]

    files[path].chunks = chunks
    done = prepare("fineweb-edu-10BT")
    assert done.returncode == 0, done.stderr
    assert "its sha256 differs" in done.stderr


def test_any_data_set_of_the_hub_is_streamed(prepare, tmp_path):
    done = prepare("owner/tiny", "--val-tokens", 0)
    assert done.returncode == 0, done.stderr
    counts = json.loads((tmp_path / "data" / "tiny" / "dataset.json").read_text())["counts"]["documents"]
    assert (counts["seen"], counts["kept"], counts["duplicate"]) == (27, 3, 24)


QUESTIONS = [
    {"ind": i, "activity_label": "a", "ctx_a": "b", "ctx_b": "c", "ctx": "b c", "split": "val", "split_type": "x",
     "label": str(i % 4), "endings": list("defg"), "source_id": "activitynet~1"}
    for i in range(5)
]  # fmt: skip


def test_hellaswag_and_its_translations_come_from_the_hub(tmp_path):
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
        done = python(code, hub, tmp_path)
    assert done.stdout == "5 5\n", done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["owner/none"], "the hub doesn't give owner/none"),
        (["fineweb2-pl"], "the hub doesn't give HuggingFaceFW/fineweb-2"),
        (["owner/tiny", "--text-column", "body"], "has no column 'body': it has text, id"),
        (["owner/tiny", "--split", "dev"], "Bad split: dev"),
        (["fineweb-edu-10BT", "--text-column", "body"], "no column 'body': it has text, id"),
        (["fineweb-edu-10B"], "Did you mean 'fineweb-edu-10BT'?"),
    ],
)
def test_what_the_hub_has_not_is_told_in_one_message(arguments, words, prepare):
    done = prepare(*arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_network_the_offline_ways_are_named_at_once(prepare):
    done = prepare("fineweb-edu-10BT", endpoint="http://127.0.0.1:9")
    assert done.returncode == 2
    assert "python fineweb.py stdlib" in done.stderr
    assert "python fineweb.py files --input" in done.stderr
    assert "trying again" not in done.stderr
    assert "Traceback" not in done.stderr
