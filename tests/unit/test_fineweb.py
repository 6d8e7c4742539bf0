"""fineweb.py: every document once, no document in both splits, the same bytes after any number of kills and with any
number of workers, and a clear message about input that cannot be read."""

import contextlib
import dataclasses
import itertools
import json
import os
import random
import re
import resource
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from support.helpers import call, save, save_jsonl
from support.preparation import prepare, snapshot, start
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import fineweb
from babygpt.data import plan as plan_module
from babygpt.data import resources, sources
from babygpt.data.filters import EMPTY, KEPT
from babygpt.data.plan import load_index, plan_shards, token_ranges
from babygpt.data.readers import without_surrogates
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
    for text in sorted(kept, key=digest)[: len(kept) - 1]:
        if val_total < val_tokens:
            val.add(text)
            val_total += len(kept[text])
    return {
        "train": [ids for text, ids in kept.items() if text not in val],
        "val": [ids for text, ids in kept.items() if text in val],
    }


def digest(text: str) -> bytes:
    return xxhash.xxh3_128_digest(without_surrogates(text).encode())


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
    one = prepare(tmp_path / "1" / "d", tmp_path / "in", task_bytes=10**6, max_tokens=max_tokens, val_tokens=20)
    prepare(tmp_path / "3" / "d", tmp_path / "in", task_bytes=100, workers=3, max_tokens=max_tokens, val_tokens=20)
    assert documents(tmp_path / "1" / "d") == expected(texts, 20, max_tokens)
    assert snapshot(tmp_path / "1" / "d") == snapshot(tmp_path / "3" / "d")
    assert one["counts"]["documents"]["seen"] <= 80


# ---------------------------------------------------------------------------------------------------------
# the plan compared with a simple implementation, one document and one token at a time


def write_index(stem: Path, rows: list[tuple[str, int]]) -> str:
    """Write the index of a part with these documents (text, number of tokens); an empty document has 0 tokens."""
    np.savez(
        f"{stem}.npz",
        hash=np.frombuffer(b"".join(digest(text) for text, _ in rows), ">u8").reshape(-1, 2),
        tokens=np.array([tokens for _, tokens in rows], np.uint32),
        bytes=np.array([len(text) for text, _ in rows], np.uint64),
        decision=np.array([KEPT if tokens else EMPTY for _, tokens in rows], np.uint8),
    )
    return str(stem)


def simple_plan(parts, val_tokens, max_tokens):
    """Return the documents of each split, each a list with (part, position in the part) per token, and their counts."""
    counts, kept, total = Counter(seen=0, kept=0, empty=0, duplicate=0, filtered=0, train=0, val=0), {}, 0
    for part, rows in enumerate(parts):
        for row, (text, tokens) in enumerate(rows):
            if max_tokens is not None and total >= max_tokens:
                break
            start = sum(tokens for _, tokens in rows[:row])
            decision = "empty" if not tokens else "duplicate" if text in kept else "kept"
            counts[decision] += 1
            counts["seen"] += 1
            if decision == "kept":
                kept[text] = [(part, start + i) for i in range(tokens)]
                total += tokens
    val_size, val = min(11_000_000, total // 20) if val_tokens is None else val_tokens, set()
    for text in sorted(kept, key=digest):
        if sum(len(kept[name]) for name in val) < val_size and len(val) < len(kept) - 1:
            val.add(text)
    splits = {"train": [], "val": []}
    for text, positions in kept.items():
        counts["val" if text in val else "train"] += 1
        splits["val" if text in val else "train"].append(positions)
    return splits, counts


def test_plan_and_token_ranges_equal_a_simple_implementation(tmp_path):
    rng = random.Random(0)
    for case in range(150):
        lengths = {f"{case} {i}": rng.choice([0, 1, 1, 2, 5, 30]) for i in range(rng.choice([1, 3, 15, 40]))}
        parts = [rng.choices(list(lengths.items()), k=rng.randint(0, 12)) for _ in range(rng.randint(1, 5))]
        max_total = sum(lengths.values())
        val_tokens, max_tokens = (rng.choice([None, 0, 1, rng.randint(1, max_total + 1)]) for _ in "vm")
        stems = [write_index(tmp_path / str(i), rows) for i, rows in enumerate(parts)]
        with mock.patch.object(plan_module, "BUCKET_ROWS", rng.choice([2, 5, 1000])):  # several buckets, or one
            plan = plan_shards(stems, val_tokens, max_tokens or None, tmp_path / "buckets")
        splits, counts = simple_plan(parts, val_tokens, max_tokens or None)
        positions = {split: list(itertools.chain(*documents)) for split, documents in splits.items()}
        assert plan.documents == counts
        starts = {split: {document[0] for document in documents} for split, documents in splits.items()}
        for split in ("train", "val"):
            assert plan.tokens[split] == len(positions[split])
            shard_size = rng.randint(1, 20)
            for begin in range(0, len(positions[split]), shard_size):
                end = min(begin + shard_size, len(positions[split]))
                planned, starting = [], 0
                for stem, in_split, first, last in plan.pieces(split, begin, end):
                    ranges, count = token_ranges(load_index(stem)["tokens"], in_split, first, last)
                    planned += [(stems.index(stem), i) for a, b in ranges.tolist() for i in range(a, b)]
                    starting += count
                    assert (ranges[1:, 0] > ranges[:-1, 1]).all()  # adjacent ranges are merged
                assert planned == positions[split][begin:end]
                assert starting == sum(position in starts[split] for position in positions[split][begin:end])


def test_plan_does_not_keep_the_index_files_open(tmp_path):
    stems = [write_index(tmp_path / str(i), [(str(i), 3)]) for i in range(200)]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, limits[1]))
    try:
        assert plan_shards(stems, 0, None, tmp_path / "buckets").documents["train"] == 200
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_validation_is_11_m_tokens_or_5_percent_if_less(tmp_path):
    for count, val_count in ((400, 11), (100, 5)):
        stem = write_index(tmp_path / "part", [(str(i), 1_000_000) for i in range(count)])
        assert plan_shards([stem], None, None, tmp_path / "buckets").documents["val"] == val_count


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


def test_rerun_of_a_complete_data_set_changes_nothing(finished, pages, capsys):
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
    with pytest.raises(UserError, match=r"b\.jsonl"):
        prepare(tmp_path / "d", tmp_path / "a.parquet", bad)
    pq.write_table(pa.table({"text": ["must not be lost"]}), tmp_path / "c.parquet")
    with pytest.raises(UserError, match="revision"):
        prepare(tmp_path / "d", tmp_path / "c.parquet")
    shutil.rmtree(tmp_path / "d")
    assert prepare(tmp_path / "d", tmp_path / "c.parquet")["counts"]["documents"]["kept"] == 1


def test_parts_of_another_version_are_refused(tmp_path, pages, unfinished):
    directory = shutil.copytree(unfinished, tmp_path / "d")
    settings = json.loads((directory / "parts" / "settings.json").read_text())
    (directory / "parts" / "settings.json").write_text(json.dumps(settings | {"format": 1}))
    with pytest.raises(UserError, match="another version"):
        prepare(directory, pages, **SETTINGS)


def test_complete_data_set_without_a_shard_is_refused(tmp_path, pages, finished):
    """The message names the missing shard and says what to delete."""
    directory = shutil.copytree(finished, tmp_path / "d")
    (directory / "d_train_000001.bin").unlink()
    with pytest.raises(UserError, match=r"is missing d_train_000001\.bin.*delete"):
        prepare(directory, pages, **SETTINGS)


def test_tokenizer_changed_during_the_run_is_not_copied(tmp_path, pages):
    """The data set contains the tokenizer that encoded it."""
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


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.string_view()])
def test_text_columns_of_any_string_type_are_read(tmp_path, kind):
    texts = ["one", "two", None, "one"]
    pq.write_table(pa.table({"text": pa.array(texts, kind)}), tmp_path / "a.parquet")
    assert read_all(tmp_path / "a.parquet") == ["one", "two", "", "one"]


def test_incomplete_data_set_is_not_opened(unfinished):
    with pytest.raises(UserError, match=r"fineweb\.py"):
        open_dataset(unfinished)


CHANGED_SETTINGS = [("val_tokens", 201), ("shard_tokens", 501), ("max_tokens", 300), ("text_column", "body")]


@pytest.mark.parametrize("state", ["finished", "unfinished"])
def test_changed_settings_are_refused_by_name(tmp_path, request, pages, state):
    directory = request.getfixturevalue(state)
    before = snapshot(directory)
    for name, value in CHANGED_SETTINGS:
        with pytest.raises(UserError, match=rf"(?s)other settings.*{name}.*{value}"):
            prepare(directory, pages, **SETTINGS | {name: value})
    train_tokenizer(TEXTS * 2, 300, tmp_path / "bpe.json", progress=False)
    with pytest.raises(UserError, match="tokenizer"):
        prepare(directory, pages, tokenizer=tmp_path / "bpe.json", **SETTINGS)
    with pytest.raises(UserError, match="source: 'files' there, 'stdlib' now"):
        prepare(directory, source="stdlib", **SETTINGS)
    assert snapshot(directory) == before


@pytest.mark.parametrize("state", ["finished", "unfinished"])
def test_changed_input_is_refused(tmp_path, request, state):
    other = save_jsonl(tmp_path / "other.jsonl", ["Something else."])
    with pytest.raises(UserError, match="other"):
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


def test_small_disk_is_refused_before_anything_is_written(tmp_path, pages):
    with (
        mock.patch.object(shutil, "disk_usage", return_value=mock.Mock(free=100)),
        pytest.raises(UserError, match="is too small"),
    ):
        prepare(tmp_path / "d", pages)
    assert not (tmp_path / "d").exists()


def test_page_cache_counts_as_available_memory():
    meminfo = "MemTotal: 1000 kB\nMemFree: 10 kB\nMemAvailable: 600 kB\n"
    with mock.patch.object(Path, "read_text", return_value=meminfo):
        assert resources._available_memory() == 600 << 10


# ---------------------------------------------------------------------------------------------------------
# input that cannot be read


def read_all(*inputs: Path, column="text") -> list[str]:
    return list(sources.read_documents(sources.find("files", tuple(map(str, inputs)), (column,))))


def test_only_a_line_feed_ends_a_line_of_jsonl(tmp_path):
    texts = ["line\u2028paragraph\u2029next\x85form\x0cfile\x1c", "carriage\rreturn", "a\nb"]
    assert read_all(save_jsonl(tmp_path / "a.jsonl", texts, ascii=False)) == texts
    save(tmp_path / "b.jsonl", b'\n{"text": "a"}\r\n\n  \n{"text": "b"}')
    assert read_all(tmp_path / "b.jsonl") == ["a", "b"]


def test_lone_surrogate_is_encoded_as_replacement_character(tmp_path):
    texts = ["lone \ud800 surrogate", "another"]
    prepare(tmp_path / "d", save_jsonl(tmp_path / "a.jsonl", texts), val_tokens=0)
    assert open_dataset(tmp_path / "d").train.read(0, 4).tolist() == expected(texts, 0)["train"][0][:4]
    assert GPT2.encode(texts[0]) == GPT2.encode("lone \ufffd surrogate")


BAD_LINES = {
    "not JSON": b'{"text": ',
    "not UTF-8": b'{"text": "\xff"}',
    "not an object": b'["text"]',
    "a number": b"7",
    "missing column": b'{"body": "b"}',
    "not a string": b'{"text": 7}',
    "a list of strings": b'{"text": ["b"]}',
    "deeply nested": b"[" * 100_000,
}


@pytest.mark.parametrize("bad", BAD_LINES)
def test_invalid_line_is_reported_with_file_and_number(tmp_path, bad):
    save(tmp_path / "a.jsonl", b'{"text": "a"}\n\n' + BAD_LINES[bad] + b"\n")
    with pytest.raises(UserError, match=r"a\.jsonl, line 3"):
        read_all(tmp_path / "a.jsonl")


@pytest.mark.parametrize("column", [pa.array([1, 2]), pa.array([b"a", b"b"]), pa.array([["a"], ["b"]])])
def test_parquet_column_that_is_not_text_is_refused_by_file(tmp_path, column):
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet.*text"):
        read_all(tmp_path / "a.parquet")


def test_missing_parquet_column_is_refused_with_known_columns(tmp_path):
    pq.write_table(pa.table({"id": [1], "body": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet has no column 'text': it has id, body"):
        read_all(tmp_path / "a.parquet")


def test_corrupted_parquet_file_is_refused_by_name(tmp_path):
    texts = [f"text number {i}" for i in range(100)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", compression="none", use_dictionary=False)
    data = (tmp_path / "a.parquet").read_bytes()
    not_utf8 = data.replace(b"text number 50", b"text \xff\xff\xff\xff\xff\xff 50")
    for corrupted in (data[:-100], b"", data[:4] + b"\xff" * 60 + data[64:], not_utf8):
        (tmp_path / "a.parquet").write_bytes(corrupted)
        with pytest.raises(UserError, match=r"a\.parquet"):
            read_all(tmp_path / "a.parquet")


@pytest.mark.parametrize("ending", ["gz", "xz", "zst"])
@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_corrupted_compressed_file_is_refused_by_name(tmp_path, kind, ending):
    text = "".join(random.Random(0).choices("abcdefgh ", k=20_000))
    path = save(tmp_path / f"a.{kind}.{ending}", json.dumps({"text": text}).encode())
    data = path.read_bytes()
    half = len(data) // 2
    for corrupted in (data[:half], b"garbage", data[:half] + bytes(byte ^ 255 for byte in data[half:])):
        path.write_bytes(corrupted)
        with pytest.raises(UserError, match=path.name):
            read_all(path)


def test_all_members_of_a_compressed_file_are_read(tmp_path):
    """Compressed files may be concatenated."""
    for ending in ("gz", "xz", "zst"):
        path = save_jsonl(tmp_path / f"a.jsonl.{ending}", ["first"])
        path.write_bytes(path.read_bytes() + save_jsonl(tmp_path / f"b.jsonl.{ending}", ["second"]).read_bytes())
        assert read_all(path) == ["first", "second"]


@pytest.mark.parametrize("name", ["a.csv", "a", "a.json", "a.parquet.gz", "a.gz"])
def test_file_of_unknown_format_is_refused_by_name(tmp_path, name):
    save(tmp_path / "b.txt", b"b")
    save(tmp_path / name, b"a")
    with pytest.raises(UserError, match=rf"unknown type, .*{name}"):
        read_all(tmp_path)


def test_pattern_without_a_match_is_refused_by_name(tmp_path):
    save(tmp_path / "a.txt", b"a")
    with pytest.raises(UserError, match=r"\*\.jsonl matches no file"):
        read_all(tmp_path / "a.txt", tmp_path / "*.jsonl")


def test_source_without_text_is_refused(tmp_path):
    pq.ParquetWriter(tmp_path / "rows.parquet", pa.schema([("text", pa.string())])).close()  # no row group
    for source in (tmp_path / "rows.parquet", save(tmp_path / "empty.jsonl", b""), save(tmp_path / "a.txt", b" \n")):
        with pytest.raises(UserError, match="no text"):
            prepare(tmp_path / "out" / source.name, source)


@pytest.mark.parametrize("option", ["val_tokens=-1", "shard_tokens=0", "max_tokens=0", "workers=0"])
def test_size_out_of_range_is_refused_by_name(tmp_path, pages, option):
    name, value = option.split("=")
    with pytest.raises(UserError, match=rf"--{name.replace('_', '-')} {value}"):
        prepare(tmp_path / "d", pages, **{name: value})


def test_invalid_arguments_are_reported_together(tmp_path, pages):
    """The UserError has one line per argument, with the flag, its value and the fix."""
    with pytest.raises(UserError) as refused:
        prepare(tmp_path / "d", pages, val_tokens=-1, workers=0, quality="model.safetensors")
    assert str(refused.value).splitlines() == [
        "The arguments are invalid:",
        "  --val-tokens -1 is out of range. Use at least 0 and less than 2,147,483,648.",
        "  --workers 0 is out of range. Use at least 1 and at most 10,000.",
        "  --quality model.safetensors has no effect alone. Use --quality and --min-quality together.",
    ]
    assert not (tmp_path / "d").exists()


def test_input_may_have_names_that_are_not_utf8(tmp_path):
    """A shell expands patterns to names in any encoding; Python decodes them with surrogates."""
    name = os.fsencode(tmp_path) + b"/caf\xe9.txt"
    with open(name, "wb") as file:
        file.write(b"some text")
    prepare(tmp_path / "d", os.fsdecode(name))
    assert open_dataset(tmp_path / "d").manifest["counts"]["documents"]["kept"] == 1


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
    assert f"{tmp_path / 'a.jsonl'}, line 2: 'text' is int" in stderr
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
    with full_disk, pytest.raises(UserError, match="the disk is full"):
        prepare(tmp_path / "d", pages)


def test_single_document_prints_a_note_on_validation(tmp_path, capsys):
    prepare(tmp_path / "d", save(tmp_path / "input.txt", b"All the world's a stage. " * 50))
    assert "a single document" in capsys.readouterr().out
