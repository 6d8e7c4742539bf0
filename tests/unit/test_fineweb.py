"""fineweb.py: every document once, no document in both splits, the same bytes after any number of kills and with any
number of workers, and a clear message about input that cannot be read."""

import contextlib
import dataclasses
import itertools
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.helpers import call, save, save_jsonl
from support.preparation import hash_text, prepare, snapshot, start
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import fineweb
from babygpt.data import resources, sources
from babygpt.data.plan import plan_shards
from babygpt.data.shards import MANIFEST, open_dataset, read_manifest, verify
from babygpt.data.tokenizer import load_tokenizer
from babygpt.errors import UserError
from tools.train_tokenizer import train_tokenizer

TEXTS = [  # duplicates, empty, long and short documents, and characters that some readers take for line breaks
    "The first document.",
    "",
    "Twice the same.",
    "A literal <|endoftext|> is text.",
    " \n\t ",
    "Twice the same.",
    "Řeka, 你好, 😀, a line\u2028separator, \x85 and \x1c.",
    "The first document.",
    *(f"Page {i}:\n" + f"word{i} and more, " * (i % 13) for i in range(60)),
    *(f"Page {i}:\n" + f"word{i} and more, " * (i % 13) for i in range(50, 55)),
]
SETTINGS = {"val_tokens": 200, "shard_tokens": 500}
GPT2 = load_tokenizer("gpt2")


def documents(directory: Path) -> dict[str, list[list[int]]]:
    """Return the documents of each split on disk, each from its end-of-text token to the next."""
    dataset, splits = open_dataset(directory), {}
    for split, tokens in (("train", dataset.train), ("val", dataset.val)):
        ids = tokens.read(0, len(tokens)).tolist()
        starts = [i for i, token in enumerate(ids) if token == dataset.eot_id]
        assert starts[:1] == [0][: len(ids)]
        splits[split] = [ids[a:b] for a, b in itertools.pairwise([*starts, len(ids)])]
    return splits


def expected(texts: list[str], val_tokens: int, max_tokens=float("inf"), tokenizer=GPT2) -> dict[str, list[list[int]]]:
    """Return the documents of each split as a simple implementation finds them."""
    kept, total, val, val_total = {}, 0, set(), 0
    for text in texts:
        if text.strip() and text not in kept and total < max_tokens:
            kept[text] = [tokenizer.eot_id, *tokenizer.encode(text)]
            total += len(kept[text])
    for text in sorted(kept, key=hash_text)[: len(kept) - 1]:
        if val_total < val_tokens:
            val.add(text)
            val_total += len(kept[text])
    return {
        "train": [ids for text, ids in kept.items() if text not in val],
        "val": [ids for text, ids in kept.items() if text in val],
    }


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> Path:
    """A directory of jsonl files with TEXTS."""
    directory = tmp_path_factory.mktemp("pages")
    for i in range(0, len(TEXTS), 20):
        save_jsonl(directory / f"{i:03d}.jsonl", TEXTS[i : i + 20])
    return directory


@pytest.fixture(scope="module")
def finished(pages, tmp_path_factory) -> Path:
    prepare(tmp_path_factory.mktemp("finished") / "d", pages, **SETTINGS)
    return tmp_path_factory.getbasetemp() / "finished0" / "d"


# ---------------------------------------------------------------------------------------------------------
# every document once


def write_texts(directory: Path, kind: str) -> None:
    if kind == "parquet":
        directory.mkdir()
        rows = pa.table({"id": range(len(TEXTS)), "text": [text or None for text in TEXTS]})  # None is a missing value
        pq.write_table(rows, directory / "a.parquet", row_group_size=7)
    elif kind.startswith("jsonl"):
        save_jsonl(directory / f"a.{kind}", TEXTS[:30], ascii=False)
        save_jsonl(directory / f"b.{kind}", TEXTS[30:])
    else:
        for i, text in enumerate(TEXTS):
            save(directory / f"{i:03d}.{kind}", text.encode())


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "jsonl.gz", "jsonl.zst", "txt", "txt.xz", "txt.zst"])
def test_every_document_is_written_once(tmp_path, kind):
    """Its tokens are the same as if it were encoded alone."""
    write_texts(tmp_path / "in", kind)
    prepare(tmp_path / "d", tmp_path / "in", **SETTINGS)
    assert documents(tmp_path / "d") == expected(TEXTS, 200)
    assert verify(tmp_path / "d")["documents"] == len({text for text in TEXTS if text.strip()})


def test_documents_of_one_large_task_keep_their_order(tmp_path):
    texts = [f"number {i}" for i in range(700)]
    prepare(tmp_path / "d", save_jsonl(tmp_path / "a.jsonl", texts), task_bytes=10**6, val_tokens=100)
    assert documents(tmp_path / "d") == expected(texts, 100)


def test_shards_have_the_requested_size_and_val_is_first(finished):
    shards = read_manifest(finished)["shards"]
    splits = [shard["file"].split("_")[1] for shard in shards]
    assert [shard["file"] for shard in shards] == [f"d_{split}_{number:06d}.bin" for number, split in enumerate(splits)]
    assert splits == sorted(splits, reverse=True)
    for split in ("val", "train"):
        tokens = [shard["tokens"] for shard in shards if f"_{split}_" in shard["file"]]
        assert tokens[:-1] == [500] * (len(tokens) - 1)
        assert 1 <= tokens[-1] <= 500


def test_tokenizer_file_is_copied_next_to_the_shards(tmp_path, pages):
    trained = train_tokenizer(TEXTS * 2, 300, tmp_path / "bpe.json", progress=False)
    prepare(tmp_path / "d", pages, tokenizer=tmp_path / "bpe.json", **SETTINGS)
    assert documents(tmp_path / "d") == expected(TEXTS, 200, tokenizer=trained)
    dataset = open_dataset(tmp_path / "d")
    assert (dataset.eot_id, dataset.vocab_size) == (299, 300)
    assert load_tokenizer(dataset.tokenizer).sha256 == dataset.tokenizer_sha256 == trained.sha256


@pytest.mark.parametrize("directory", ["d", "d/../d", "link"])
def test_tokenizer_may_be_in_the_output_directory(tmp_path, pages, directory):
    train_tokenizer(TEXTS * 2, 300, tmp_path / "d" / "tokenizer.json", progress=False)
    os.symlink(tmp_path / "d", tmp_path / "link")
    prepare(tmp_path / "d", pages, tokenizer=tmp_path / directory / "tokenizer.json")
    assert load_tokenizer(open_dataset(tmp_path / "d").tokenizer).vocab_size == 300


def test_vocabulary_above_65536_keeps_its_ids(tmp_path, pages):
    vocabulary = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(f"unused{i}" for i in range(70_000))]
    large = Tokenizer(models.BPE({token: i for i, token in enumerate(reversed(vocabulary))}, []))
    large.pre_tokenizer, large.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    large.add_special_tokens(["<|endoftext|>"])
    large.save(str(tmp_path / "large.json"))
    prepare(tmp_path / "d", pages, tokenizer=tmp_path / "large.json", val_tokens=1000)
    assert documents(tmp_path / "d") == expected(TEXTS, 1000, tokenizer=load_tokenizer(tmp_path / "large.json"))


# ---------------------------------------------------------------------------------------------------------
# the split, and --max-tokens


def test_no_document_is_in_both_splits(tmp_path):
    texts = [f"text {i}" for i in range(40)]
    for copy in range(3):
        save_jsonl(tmp_path / "in" / f"{copy}.jsonl", texts[copy:] + texts[:copy])
    prepare(tmp_path / "d", tmp_path / "in", val_tokens=60)  # each document has 3 tokens
    splits = documents(tmp_path / "d")
    assert len(splits["val"]) == 20 == len(splits["train"])
    assert sorted(splits["val"] + splits["train"]) == sorted([GPT2.eot_id, *GPT2.encode(text)] for text in texts)


@pytest.mark.parametrize("val_tokens", [0, 1, 10**6])
def test_validation_takes_documents_and_leaves_one_to_train(tmp_path, pages, val_tokens):
    prepare(tmp_path / "d", pages, val_tokens=val_tokens)
    assert documents(tmp_path / "d") == expected(TEXTS, val_tokens)
    assert len(documents(tmp_path / "d")["val"]) == {0: 0, 1: 1, 10**6: 63}[val_tokens]


@pytest.mark.parametrize("max_tokens", [1, 300, "all"])
def test_max_tokens_keeps_the_first_documents(tmp_path, max_tokens):
    """Documents are kept in source order and complete, with any number of workers and any size of tasks."""
    texts = [f"document {i // 2} has {i // 2} words" for i in range(80)]
    if max_tokens == "all":  # reached by the last new document; the duplicates after it need not be read
        max_tokens = sum(len(ids) for ids in expected(texts, 0)["train"])
        texts += texts
    for i in range(0, len(texts), 5):
        save_jsonl(tmp_path / "in" / f"{i:03d}.jsonl", texts[i : i + 5])
    manifest = prepare(tmp_path / "1" / "d", tmp_path / "in", task_bytes=10**6, max_tokens=max_tokens, val_tokens=20)
    prepare(tmp_path / "3" / "d", tmp_path / "in", task_bytes=100, workers=3, max_tokens=max_tokens, val_tokens=20)
    assert documents(tmp_path / "1" / "d") == expected(texts, 20, max_tokens)
    assert snapshot(tmp_path / "1" / "d") == snapshot(tmp_path / "3" / "d")
    assert manifest["counts"]["documents"]["seen"] <= 80


# ---------------------------------------------------------------------------------------------------------
# dataset.json


def test_counts_of_the_manifest_add_up(finished):
    manifest, splits = read_manifest(finished), expected(TEXTS, 200)
    documents, tokens, sizes = (manifest["counts"][unit] for unit in ("documents", "tokens", "text_bytes"))
    assert documents["seen"] == len(TEXTS)
    assert documents["seen"] == sum(documents[decision] for decision in ("kept", "empty", "duplicate", "filtered"))
    assert (documents["empty"], documents["duplicate"], documents["filtered"]) == (2, 7, 0)
    assert documents["kept"] == documents["train"] + documents["val"]
    assert sum(sizes.values()) == sum(len(text.encode()) for text in {text for text in TEXTS if text.strip()})
    for split in ("train", "val"):
        shards = [shard for shard in manifest["shards"] if f"_{split}_" in shard["file"]]
        assert documents[split] == len(splits[split]) == sum(shard["documents"] for shard in shards)
        assert tokens[split] == sum(map(len, splits[split])) == sum(shard["tokens"] for shard in shards)
        assert sizes[split] == sum(len(GPT2.decode(ids[1:]).encode()) for ids in splits[split])


def test_bytes_depend_on_source_and_settings_alone(tmp_path, pages, finished, monkeypatch):
    """They do not depend on the number of workers, the directories or the time."""
    shutil.copytree(pages, tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    prepare(Path("d"), Path("elsewhere"), workers=3, **SETTINGS)
    assert snapshot(tmp_path / "d") == snapshot(finished)
    assert all(path not in (finished / MANIFEST).read_text() for path in (str(pages), str(finished.parent)))


# ---------------------------------------------------------------------------------------------------------
# killed and resumed


def test_rerun_of_a_complete_dataset_changes_nothing(finished, pages, capsys):
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in finished.rglob("*")}
    (finished / "parts").mkdir()  # as if the run had been killed while it deleted them
    prepare(finished, pages, workers=2, **SETTINGS)
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in finished.rglob("*")} == before
    assert "already complete" in capsys.readouterr().out


@contextlib.contextmanager
def interrupted_before(condition):
    """Interrupt the code within before the first rename for which condition(rename number, final name) is true."""
    rename, number = os.replace, itertools.count(1)

    def replace(source, target):
        if condition(next(number), Path(target).name):
            raise KeyboardInterrupt
        rename(source, target)

    with mock.patch.object(os, "replace", replace), contextlib.suppress(KeyboardInterrupt):
        yield


def test_kills_before_every_rename_change_no_byte(tmp_path, pages, finished):
    kills = 0
    while not (tmp_path / "d" / MANIFEST).exists():
        kills += 1
        with interrupted_before(lambda number, _, kill=kills: number == kill):
            prepare(tmp_path / "d", pages, **SETTINGS)
    assert kills > 4
    assert snapshot(tmp_path / "d") == snapshot(finished)


@pytest.fixture(scope="module")
def unfinished(pages, tmp_path_factory) -> Path:
    """The directory of a preparation killed before its last rename: all shards and parts exist, but no dataset.json."""
    directory = tmp_path_factory.mktemp("unfinished") / "d"
    with interrupted_before(lambda _, name: name == MANIFEST):
        prepare(directory, pages, **SETTINGS)
    assert list(directory.glob("*.bin"))
    assert not (directory / MANIFEST).exists()
    return directory


WRITTEN = ["*.bin", "parts/*.bin.json"]
LOST = {
    "dataset.json": [],
    "the records of the shards": ["parts/*.bin.json"],
    "some shards": ["*1.bin", "parts/*1.bin.json"],
    "all shards": WRITTEN,
    "one unit": [*WRITTEN, "parts/00001*"],
    "one index, but not its tokens": [*WRITTEN, "parts/00001.json", "parts/00001-*.npz"],
    "all except the settings": [*WRITTEN, "parts/0*"],
}


@pytest.mark.parametrize("lost", LOST)
def test_resume_after_lost_files_writes_the_same_bytes(tmp_path, pages, finished, unfinished, lost):
    """Files that were not finished have temporary names and half their bytes."""
    directory = shutil.copytree(unfinished, tmp_path / "d")
    for path in [path for pattern in LOST[lost] for path in directory.glob(pattern)]:
        temporary = f"{path}.{'0' * 32}.tmp"
        path.rename(temporary)
        os.truncate(temporary, os.path.getsize(temporary) // 2)
    save(directory / f"d_train_000099.bin.{'0' * 32}.tmp", b"written by a killed worker")
    prepare(directory, pages, workers=2, **SETTINGS)
    assert snapshot(directory) == snapshot(finished)


# ---------------------------------------------------------------------------------------------------------
# a directory that already has files


def test_parts_of_another_source_are_never_used(tmp_path):
    empty = pa.table({"text": pa.array([], pa.string())})
    pq.write_table(empty, tmp_path / "a.parquet")
    bad = save(tmp_path / "b.jsonl", b"{")
    (tmp_path / "d").mkdir()  # otherwise the failed preparation would delete it
    with pytest.raises(UserError, match=r"b\.jsonl"):
        prepare(tmp_path / "d", tmp_path / "a.parquet", bad)
    pq.write_table(pa.table({"text": ["must not be lost"]}), tmp_path / "c.parquet")
    with pytest.raises(UserError, match="revision"):
        prepare(tmp_path / "d", tmp_path / "c.parquet")
    shutil.rmtree(tmp_path / "d")
    assert prepare(tmp_path / "d", tmp_path / "c.parquet")["counts"]["documents"]["kept"] == 1


def test_parts_of_another_version_are_rejected(tmp_path, pages, unfinished):
    directory = shutil.copytree(unfinished, tmp_path / "d")
    settings = json.loads((directory / "parts" / "settings.json").read_text())
    (directory / "parts" / "settings.json").write_text(json.dumps(settings | {"format": 1}))
    with pytest.raises(UserError, match="a different version"):
        prepare(directory, pages, **SETTINGS)


def test_complete_dataset_without_a_shard_is_rejected(tmp_path, pages, finished):
    """The message names the missing shard and says what to delete."""
    directory = shutil.copytree(finished, tmp_path / "d")
    (directory / "d_train_000001.bin").unlink()
    with pytest.raises(UserError, match=r"is missing d_train_000001\.bin.*delete"):
        prepare(directory, pages, **SETTINGS)


def test_tokenizer_changed_during_the_run_is_not_copied(tmp_path, pages):
    """The dataset contains the tokenizer that encoded it."""
    path = train_tokenizer(TEXTS * 2, 300, tmp_path / "bpe.json", progress=False).file
    data = path.read_bytes()

    def change_file_and_plan(*arguments):
        path.write_bytes(b"changed")
        return plan_shards(*arguments)

    with mock.patch.object(fineweb, "plan_shards", change_file_and_plan):
        prepare(tmp_path / "d", pages, tokenizer=path, **SETTINGS)
    assert (tmp_path / "d" / "tokenizer.json").read_bytes() == data
    verify(tmp_path / "d")


def test_unrelated_files_are_not_deleted(tmp_path, pages):
    save(tmp_path / "d" / "notes.tmp", b"notes")
    (tmp_path / "d" / "directory.tmp").mkdir()
    prepare(tmp_path / "d", pages, **SETTINGS)
    assert (tmp_path / "d" / "notes.tmp").read_bytes() == b"notes"


def test_max_tokens_may_be_reached_before_an_empty_part(tmp_path):
    save_jsonl(tmp_path / "in" / "a.jsonl", ["the only one"])
    save(tmp_path / "in" / "b.jsonl", b"\n" * 600)
    prepare(tmp_path / "d", tmp_path / "in", max_tokens=4, val_tokens=0)
    assert documents(tmp_path / "d") == expected(["the only one"], 0)


def test_incomplete_dataset_is_not_opened(unfinished):
    with pytest.raises(UserError, match=r"fineweb\.py"):
        open_dataset(unfinished)


CHANGED_SETTINGS = [("val_tokens", 201), ("shard_tokens", 501), ("max_tokens", 300), ("text_column", "body")]


@pytest.mark.parametrize("state", ["finished", "unfinished"])
def test_changed_settings_are_named_in_the_error(tmp_path, request, pages, state):
    directory = request.getfixturevalue(state)
    before = snapshot(directory)
    for name, value in CHANGED_SETTINGS:
        with pytest.raises(UserError, match=rf"(?s)different settings.*{name}.*{value}"):
            prepare(directory, pages, **SETTINGS | {name: value})
    train_tokenizer(TEXTS * 2, 300, tmp_path / "bpe.json", progress=False)
    with pytest.raises(UserError, match="tokenizer"):
        prepare(directory, pages, tokenizer=tmp_path / "bpe.json", **SETTINGS)
    with pytest.raises(UserError, match="source: 'files' before, 'stdlib' now"):
        prepare(directory, source="stdlib", **SETTINGS)
    assert snapshot(directory) == before


@pytest.mark.parametrize("state", ["finished", "unfinished"])
def test_changed_input_is_rejected(tmp_path, request, state):
    other = save_jsonl(tmp_path / "other.jsonl", ["Something else."])
    with pytest.raises(UserError, match="different"):
        prepare(request.getfixturevalue(state), other, **SETTINGS)


def test_shards_of_other_programs_are_not_overwritten(tmp_path, pages):
    save(tmp_path / "d" / "d_train_000001.bin", b"other")
    with pytest.raises(UserError, match="has shards but no"):
        prepare(tmp_path / "d", pages)
    assert snapshot(tmp_path / "d") == {"d_train_000001.bin": b"other"}


def test_disk_check_subtracts_what_is_already_written(tmp_path, pages, unfinished):
    directory = shutil.copytree(unfinished, tmp_path / "d")
    source = sources.find("files", (str(pages),))
    source.open()
    disk = 4 * int(sum(unit.bytes for unit in source.units) * source.tokens_per_byte)  # 4 bytes per token at the peak
    usage = mock.Mock(free=disk - sum(path.stat().st_size for path in directory.glob("parts/*-*.bin")))
    with mock.patch.object(shutil, "disk_usage", return_value=usage):
        prepare(directory, pages, **SETTINGS)


def test_small_disk_is_rejected_before_anything_is_written(tmp_path, pages):
    with (
        mock.patch.object(shutil, "disk_usage", return_value=mock.Mock(free=100)),
        pytest.raises(UserError, match="Not enough disk space"),
    ):
        prepare(tmp_path / "d", pages)
    assert not (tmp_path / "d").exists()


def test_page_cache_counts_as_available_memory():
    meminfo = "MemTotal: 1000 kB\nMemFree: 10 kB\nMemAvailable: 600 kB\n"
    with mock.patch.object(Path, "read_text", return_value=meminfo):
        assert resources._available_memory() == 600 << 10


# ---------------------------------------------------------------------------------------------------------
# invalid input and arguments, and the other messages


def test_lone_surrogate_is_encoded_as_replacement_character(tmp_path):
    texts = ["lone \ud800 surrogate", "another"]
    prepare(tmp_path / "d", save_jsonl(tmp_path / "a.jsonl", texts), val_tokens=0)
    assert open_dataset(tmp_path / "d").train.read(0, 4).tolist() == expected(texts, 0)["train"][0][:4]
    assert GPT2.encode(texts[0]) == GPT2.encode("lone \ufffd surrogate")


@pytest.mark.parametrize("option", ["val_tokens=-1", "shard_tokens=0", "max_tokens=0", "workers=0"])
def test_size_out_of_range_is_named_in_the_error(tmp_path, pages, option):
    name, value = option.split("=")
    with pytest.raises(UserError, match=rf"--{name.replace('_', '-')} {value}"):
        prepare(tmp_path / "d", pages, **{name: value})


def test_invalid_arguments_are_reported_together(tmp_path, pages):
    """The UserError has one line per argument, with the flag, its value and the fix."""
    with pytest.raises(UserError) as rejected:
        prepare(tmp_path / "d", pages, val_tokens=-1, workers=0, quality="model.safetensors")
    assert str(rejected.value).splitlines() == [
        "The arguments are invalid:",
        "  --val-tokens -1 is out of range. Use at least 0 and less than 2,147,483,648.",
        "  --workers 0 is out of range. Use at least 1 and at most 10,000.",
        "  --quality model.safetensors has no effect on its own. Use --quality and --min-quality together.",
    ]
    assert not (tmp_path / "d").exists()


def test_help_shows_each_default_once(capsys):
    """No argument shows None or an empty default; each optional one says what happens without it."""
    with pytest.raises(SystemExit, match="0"):
        call(fineweb.main, "--help")
    text = capsys.readouterr().out
    assert text.count("(default:") == len(dataclasses.fields(fineweb.PrepareArgs))
    assert not re.search(r"None|\(default: *\)", text)


def test_user_error_in_a_worker_is_one_message_and_exit_code_2(tmp_path):
    save(tmp_path / "a.jsonl", b'{"text": "a"}\n{"text": 7}\n')
    process = start(tmp_path / "d", tmp_path / "a.jsonl", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    assert stderr.count("error: ") == 1
    assert f"{tmp_path / 'a.jsonl'}, line 2: the value of 'text' has type int" in stderr
    assert "Traceback" not in stderr


def test_verify_command_finds_a_changed_byte(tmp_path, finished, capsys):
    call(fineweb.main, "verify", finished)
    assert "is intact" in capsys.readouterr().out
    directory = shutil.copytree(finished, tmp_path / "d")
    with open(directory / "d_train_000001.bin", "r+b") as file:
        file.seek(1100)
        file.write(b"\xff")
    with pytest.raises(UserError, match=r"d_train_000001\.bin"):
        call(fineweb.main, "verify", directory)
    with pytest.raises(SystemExit, match="2"):
        call(fineweb.main, "verify")


def test_default_number_of_workers_fits_in_memory(tmp_path, pages, capsys):
    with (
        mock.patch.object(resources, "_available_memory", return_value=900 << 20),
        mock.patch.object(resources, "_cores", return_value=64),
    ):
        call(fineweb.main, "files", "--input", pages, "--out-dir", tmp_path / "d")
    assert "for 2 workers" in capsys.readouterr().out


def test_full_disk_is_reported(tmp_path, pages):
    full_disk = mock.patch.object(fineweb, "tokenize", side_effect=OSError(28, "No space left on device"))
    with full_disk, pytest.raises(UserError, match="The disk is full"):
        prepare(tmp_path / "d", pages)
