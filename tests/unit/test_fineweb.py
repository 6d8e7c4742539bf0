"""fineweb.py: every document once, split without leaks, the same bytes however often it is killed and by how many
workers it is done, and a clear word about what can't be read."""

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

TEXTS = [  # doubles, empties, long and short, and signs that have broken readers
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


def documents(folder: Path) -> dict[str, list[list[int]]]:
    """The documents on disk, each from its end-of-text token to the next."""
    dataset, splits = open_dataset(folder), {}
    for split, tokens in (("train", dataset.train), ("val", dataset.val)):
        ids = tokens.read(0, len(tokens)).tolist()
        begins = [i for i, token in enumerate(ids) if token == dataset.eot_id]
        assert begins[:1] == [0][: len(ids)]
        splits[split] = [ids[a:b] for a, b in itertools.pairwise([*begins, len(ids)])]
    return splits


def expected(texts: list[str], val_tokens: int, max_tokens=float("inf"), tokenizer=GPT2) -> dict[str, list[list[int]]]:
    """What the documents on disk must be, in plain Python."""
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
    """TEXTS in a folder of jsonl files."""
    folder = tmp_path_factory.mktemp("pages")
    for i in range(0, len(TEXTS), 20):
        save_jsonl(folder / f"{i:03d}.jsonl", TEXTS[i : i + 20])
    return folder


@pytest.fixture(scope="module")
def finished(pages, tmp_path_factory) -> Path:
    prepare(tmp_path_factory.mktemp("finished") / "d", pages, **SETTINGS)
    return tmp_path_factory.getbasetemp() / "finished0" / "d"


# ---------------------------------------------------------------------------------------------------------
# every document, once


def write_texts(folder: Path, kind: str) -> None:
    if kind == "parquet":
        folder.mkdir()
        rows = pa.table({"id": range(len(TEXTS)), "text": [text or None for text in TEXTS]})  # None: a missing value
        pq.write_table(rows, folder / "a.parquet", row_group_size=7)
    elif kind.startswith("jsonl"):
        save_jsonl(folder / f"a.{kind}", TEXTS[:30], ascii=False)
        save_jsonl(folder / f"b.{kind}", TEXTS[30:])
    else:
        for i, text in enumerate(TEXTS):
            save(folder / f"{i:03d}.{kind}", text.encode())


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "jsonl.gz", "jsonl.zst", "txt", "txt.xz", "txt.zst"])
def test_every_document_is_there_once_as_if_encoded_by_itself(tmp_path, kind):
    write_texts(tmp_path / "in", kind)
    prepare(tmp_path / "d", tmp_path / "in", **SETTINGS)
    assert documents(tmp_path / "d") == expected(TEXTS, 200)
    assert verify(tmp_path / "d")["documents"] == len({text for text in TEXTS if text.strip()})


def test_documents_of_one_large_task_come_in_order(tmp_path):
    texts = [f"number {i}" for i in range(700)]
    prepare(tmp_path / "d", save_jsonl(tmp_path / "a.jsonl", texts), task_bytes=10**6, val_tokens=100)
    assert documents(tmp_path / "d") == expected(texts, 100)


def test_shards_hold_the_tokens_asked_for_and_val_comes_first(finished):
    rows = read_manifest(finished)["shards"]
    splits = [row["file"].split("_")[1] for row in rows]
    assert [row["file"] for row in rows] == [f"d_{split}_{number:06d}.bin" for number, split in enumerate(splits)]
    assert splits == sorted(splits, reverse=True)
    for split in ("val", "train"):
        tokens = [row["tokens"] for row in rows if f"_{split}_" in row["file"]]
        assert tokens[:-1] == [500] * (len(tokens) - 1)
        assert 1 <= tokens[-1] <= 500


def test_a_trained_tokenizer_lies_beside_its_shards(tmp_path, pages):
    own = train_tokenizer(TEXTS * 2, 300, tmp_path / "own.json", progress=False)
    prepare(tmp_path / "d", pages, tokenizer=tmp_path / "own.json", **SETTINGS)
    assert documents(tmp_path / "d") == expected(TEXTS, 200, tokenizer=own)
    dataset = open_dataset(tmp_path / "d")
    assert (dataset.eot_id, dataset.vocab_size) == (299, 300)
    assert load_tokenizer(dataset.tokenizer).sha256 == dataset.tokenizer_sha256 == own.sha256


@pytest.mark.parametrize("way", ["d", "d/../d", "link"])
def test_a_tokenizer_may_lie_in_the_folder_it_is_used_for(tmp_path, pages, way):
    train_tokenizer(TEXTS * 2, 300, tmp_path / "d" / "tokenizer.json", progress=False)
    os.symlink(tmp_path / "d", tmp_path / "link")
    prepare(tmp_path / "d", pages, tokenizer=tmp_path / way / "tokenizer.json")
    assert load_tokenizer(open_dataset(tmp_path / "d").tokenizer).vocab_size == 300


def test_a_vocabulary_over_65536_keeps_its_ids(tmp_path, pages):
    signs = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(f"unused{i}" for i in range(70_000))]
    large = Tokenizer(models.BPE({sign: i for i, sign in enumerate(reversed(signs))}, []))
    large.pre_tokenizer, large.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    large.add_special_tokens(["<|endoftext|>"])
    large.save(str(tmp_path / "large.json"))
    prepare(tmp_path / "d", pages, tokenizer=tmp_path / "large.json", val_tokens=1000)
    assert documents(tmp_path / "d") == expected(TEXTS, 1000, tokenizer=load_tokenizer(tmp_path / "large.json"))


# ---------------------------------------------------------------------------------------------------------
# the split, and --max-tokens


def test_no_text_stands_on_both_sides_of_the_split(tmp_path):
    texts = [f"text {i}" for i in range(40)]
    for copy in range(3):
        save_jsonl(tmp_path / "in" / f"{copy}.jsonl", texts[copy:] + texts[:copy])
    prepare(tmp_path / "d", tmp_path / "in", val_tokens=60)  # each text is 3 tokens
    splits = documents(tmp_path / "d")
    assert len(splits["val"]) == 20 == len(splits["train"])
    assert sorted(splits["val"] + splits["train"]) == sorted([GPT2.eot_id, *GPT2.encode(text)] for text in texts)


@pytest.mark.parametrize("val_tokens", [0, 1, 10**6])
def test_validation_is_whole_documents_and_leaves_one_for_training(tmp_path, pages, val_tokens):
    prepare(tmp_path / "d", pages, val_tokens=val_tokens)
    assert documents(tmp_path / "d") == expected(TEXTS, val_tokens)
    assert len(documents(tmp_path / "d")["val"]) == {0: 0, 1: 1, 10**6: 63}[val_tokens]


@pytest.mark.parametrize("max_tokens", [1, 300, "all"])
def test_max_tokens_keeps_whole_documents_in_source_order_whatever_the_workers_and_tasks(tmp_path, max_tokens):
    texts = [f"document {i // 2} has {i // 2} words" for i in range(80)]
    if max_tokens == "all":  # reached by the very last new document; doubles, which need not be read, follow
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
# the plan against the design's sentences, one document and one token at a time


def write_index(stem: Path, rows: list[tuple[str, int]]) -> str:
    """Write the index of a part whose documents are (text, tokens); an empty document has no tokens."""
    np.savez(
        f"{stem}.npz",
        hash=np.frombuffer(b"".join(digest(text) for text, _ in rows), ">u8").reshape(-1, 2),
        tokens=np.array([tokens for _, tokens in rows], np.uint32),
        bytes=np.array([len(text) for text, _ in rows], np.uint64),
        decision=np.array([KEPT if tokens else EMPTY for _, tokens in rows], np.uint8),
    )
    return str(stem)


def slow_plan(parts, val_tokens, max_tokens):
    """(part, position in it) of every token of each document of each split, in order, and the counts of documents."""
    counts, kept, total = Counter(seen=0, kept=0, empty=0, duplicate=0, filtered=0, train=0, val=0), {}, 0
    for part, rows in enumerate(parts):
        for row, (text, tokens) in enumerate(rows):
            if max_tokens is not None and total >= max_tokens:
                break
            at = sum(tokens for _, tokens in rows[:row])
            what = "empty" if not tokens else "duplicate" if text in kept else "kept"
            counts[what] += 1
            counts["seen"] += 1
            if what == "kept":
                kept[text] = [(part, at + i) for i in range(tokens)]
                total += tokens
    wanted, val = min(11_000_000, total // 20) if val_tokens is None else val_tokens, set()
    for text in sorted(kept, key=digest):
        if sum(len(kept[name]) for name in val) < wanted and len(val) < len(kept) - 1:
            val.add(text)
    tokens = {"train": [], "val": []}
    for text, places in kept.items():
        counts["val" if text in val else "train"] += 1
        tokens["val" if text in val else "train"].append(places)
    return tokens, counts


def test_the_plan_and_the_shards_ranges_equal_a_slow_reference(tmp_path):
    rng = random.Random(0)
    for case in range(150):
        length = {f"{case} {i}": rng.choice([0, 1, 1, 2, 5, 30]) for i in range(rng.choice([1, 3, 15, 40]))}
        parts = [rng.choices(list(length.items()), k=rng.randint(0, 12)) for _ in range(rng.randint(1, 5))]
        most = sum(length.values())
        val_tokens, max_tokens = (rng.choice([None, 0, 1, rng.randint(1, most + 1)]) for _ in "vm")
        stems = [write_index(tmp_path / str(i), rows) for i, rows in enumerate(parts)]
        with mock.patch.object(plan_module, "BUCKET_ROWS", rng.choice([2, 5, 1000])):  # in several buckets, or in one
            plan = plan_shards(stems, val_tokens, max_tokens or None, tmp_path / "buckets")
        documents_of, counts = slow_plan(parts, val_tokens, max_tokens or None)
        places = {split: list(itertools.chain(*groups)) for split, groups in documents_of.items()}
        assert plan.documents == counts
        starts = {split: {kept[0] for kept in groups} for split, groups in documents_of.items()}
        for split in ("train", "val"):
            assert plan.tokens[split] == len(places[split])
            shard = rng.randint(1, 20)
            for begin in range(0, len(places[split]), shard):
                end = min(begin + shard, len(places[split]))
                found, begun = [], 0
                for stem, in_split, first, last in plan.pieces(split, begin, end):
                    ranges, documents_ = token_ranges(load_index(stem)["tokens"], in_split, first, last)
                    found += [(stems.index(stem), i) for a, b in ranges.tolist() for i in range(a, b)]
                    begun += documents_
                    assert (ranges[1:, 0] > ranges[:-1, 1]).all()  # neighbours are one range
                assert found == places[split][begin:end]
                assert begun == sum(place in starts[split] for place in places[split][begin:end])


def test_a_plan_holds_no_file_open_for_each_part(tmp_path):
    stems = [write_index(tmp_path / str(i), [(str(i), 3)]) for i in range(200)]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, limits[1]))
    try:
        assert plan_shards(stems, 0, None, tmp_path / "buckets").documents["train"] == 200
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_validation_is_eleven_million_tokens_unless_five_percent_are_less(tmp_path):
    for documents_, val in ((400, 11), (100, 5)):
        stem = write_index(tmp_path / "part", [(str(i), 1_000_000) for i in range(documents_)])
        assert plan_shards([stem], None, None, tmp_path / "buckets").documents["val"] == val


# ---------------------------------------------------------------------------------------------------------
# dataset.json


def test_the_counts_add_up(finished):
    manifest, splits = read_manifest(finished), expected(TEXTS, 200)
    documents, tokens, sizes = (manifest["counts"][what] for what in ("documents", "tokens", "text_bytes"))
    assert documents["seen"] == len(TEXTS)
    assert documents["seen"] == sum(documents[what] for what in ("kept", "empty", "duplicate", "filtered"))
    assert (documents["empty"], documents["duplicate"], documents["filtered"]) == (2, 7, 0)
    assert documents["kept"] == documents["train"] + documents["val"]
    assert sum(sizes.values()) == sum(len(text.encode()) for text in {text for text in TEXTS if text.strip()})
    for split in ("train", "val"):
        rows = [row for row in manifest["shards"] if f"_{split}_" in row["file"]]
        assert documents[split] == len(splits[split]) == sum(row["documents"] for row in rows)
        assert tokens[split] == sum(map(len, splits[split])) == sum(row["tokens"] for row in rows)
        assert sizes[split] == sum(len(GPT2.decode(ids[1:]).encode()) for ids in splits[split])


def test_bytes_do_not_depend_on_the_number_of_workers_the_place_or_the_time(tmp_path, pages, finished, monkeypatch):
    shutil.copytree(pages, tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    prepare(Path("d"), Path("elsewhere"), workers=3, **SETTINGS)
    assert snapshot(tmp_path / "d") == snapshot(finished)
    assert all(word not in (finished / MANIFEST).read_text() for word in (str(pages), str(finished.parent)))


# ---------------------------------------------------------------------------------------------------------
# killed and started again


def test_a_rerun_of_a_finished_set_changes_nothing(finished, pages, capsys):
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in finished.rglob("*")}
    (finished / "parts").mkdir()  # of a run killed in its last breath
    prepare(finished, pages, workers=2, **SETTINGS)
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in finished.rglob("*")} == before
    assert "already complete" in capsys.readouterr().out


@contextlib.contextmanager
def killed_at(moment):
    """Ends the preparation within before the rename for which `moment` holds, given its number and the final name."""
    real, number = os.replace, itertools.count(1)

    def replace(source, target):
        if moment(next(number), Path(target).name):
            raise KeyboardInterrupt
        real(source, target)

    with mock.patch.object(os, "replace", replace), contextlib.suppress(KeyboardInterrupt):
        yield


def test_killed_before_every_commit_the_bytes_are_the_same(tmp_path, pages, finished):
    kills = 0
    while not (tmp_path / "d" / MANIFEST).exists():
        kills += 1
        with killed_at(lambda number, _, kill=kills: number == kill):
            prepare(tmp_path / "d", pages, **SETTINGS)
    assert kills > 4
    assert snapshot(tmp_path / "d") == snapshot(finished)


@pytest.fixture(scope="module")
def unfinished(pages, tmp_path_factory) -> Path:
    """A preparation killed just before its last commit: all shards and parts are there, but no dataset.json."""
    folder = tmp_path_factory.mktemp("unfinished") / "d"
    with killed_at(lambda _, name: name == MANIFEST):
        prepare(folder, pages, **SETTINGS)
    assert list(folder.glob("*.bin"))
    assert not (folder / MANIFEST).exists()
    return folder


WRITTEN = ["*.bin", "parts/*.bin.json"]
LOST = {
    "dataset.json": [],
    "the records of the shards": ["parts/*.bin.json"],
    "some shards": ["*1.bin", "parts/*1.bin.json"],
    "all shards": WRITTEN,
    "a unit": [*WRITTEN, "parts/00001*"],
    "an index beside its tokens": [*WRITTEN, "parts/00001.json", "parts/00001-*.npz"],
    "all but the settings": [*WRITTEN, "parts/0*"],
}


@pytest.mark.parametrize("lost", LOST)
def test_whatever_a_kill_leaves_is_gone_on_with_to_the_same_bytes(tmp_path, pages, finished, unfinished, lost):
    folder = shutil.copytree(unfinished, tmp_path / "d")
    for path in [path for pattern in LOST[lost] for path in folder.glob(pattern)]:
        half = f"{path}.{'0' * 32}.tmp"
        path.rename(half)
        os.truncate(half, os.path.getsize(half) // 2)
    save(folder / f"d_train_000099.bin.{'0' * 32}.tmp", b"of a worker that is no more")
    prepare(folder, pages, workers=2, **SETTINGS)
    assert snapshot(folder) == snapshot(finished)


# ---------------------------------------------------------------------------------------------------------
# a folder that is in use


def test_what_another_source_left_is_never_taken_for_this_one_s(tmp_path):
    empty = pa.table({"text": pa.array([], pa.string())})
    pq.write_table(empty, tmp_path / "a.parquet")
    bad = save(tmp_path / "b.jsonl", b"{")
    with pytest.raises(UserError, match=r"b\.jsonl"):
        prepare(tmp_path / "d", tmp_path / "a.parquet", bad)
    pq.write_table(pa.table({"text": ["never to be lost"]}), tmp_path / "c.parquet")
    with pytest.raises(UserError, match="revision"):
        prepare(tmp_path / "d", tmp_path / "c.parquet")
    shutil.rmtree(tmp_path / "d")
    assert prepare(tmp_path / "d", tmp_path / "c.parquet")["counts"]["documents"]["kept"] == 1


def test_parts_of_another_version_are_not_gone_on_with(tmp_path, pages, unfinished):
    folder = shutil.copytree(unfinished, tmp_path / "d")
    settings = json.loads((folder / "parts" / "settings.json").read_text())
    (folder / "parts" / "settings.json").write_text(json.dumps(settings | {"format": 1}))
    with pytest.raises(UserError, match="another version"):
        prepare(folder, pages, **SETTINGS)


def test_a_finished_set_that_has_lost_a_shard_says_how_to_get_out(tmp_path, pages, finished):
    folder = shutil.copytree(finished, tmp_path / "d")
    (folder / "d_train_000001.bin").unlink()
    with pytest.raises(UserError, match=r"is missing d_train_000001\.bin.*delete"):
        prepare(folder, pages, **SETTINGS)


def test_the_tokenizer_that_encoded_is_the_one_that_is_kept(tmp_path, pages):
    path = train_tokenizer(TEXTS * 2, 300, tmp_path / "own.json", progress=False).file
    data = path.read_bytes()

    def change_file_and_plan(*arguments):
        path.write_bytes(b"changed")
        return plan_shards(*arguments)

    with mock.patch.object(fineweb, "plan_shards", change_file_and_plan):
        prepare(tmp_path / "d", pages, tokenizer=path, **SETTINGS)
    assert (tmp_path / "d" / "tokenizer.json").read_bytes() == data
    verify(tmp_path / "d")


def test_files_of_others_are_left_alone(tmp_path, pages):
    save(tmp_path / "d" / "notes.tmp", b"mine")
    (tmp_path / "d" / "folder.tmp").mkdir()
    prepare(tmp_path / "d", pages, **SETTINGS)
    assert (tmp_path / "d" / "notes.tmp").read_bytes() == b"mine"


def test_max_tokens_reached_before_parts_without_documents(tmp_path):
    save_jsonl(tmp_path / "in" / "a.jsonl", ["the only one"])
    save(tmp_path / "in" / "b.jsonl", b"\n" * 600)
    prepare(tmp_path / "d", tmp_path / "in", max_tokens=4, val_tokens=0)
    assert documents(tmp_path / "d") == expected(["the only one"], 0)


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.string_view()])
def test_text_columns_of_any_kind_are_read(tmp_path, kind):
    texts = ["one", "two", None, "one"]
    pq.write_table(pa.table({"text": pa.array(texts, kind)}), tmp_path / "a.parquet")
    assert read_all(tmp_path / "a.parquet") == ["one", "two", "", "one"]


def test_an_unfinished_preparation_is_not_opened_as_a_data_set(unfinished):
    with pytest.raises(UserError, match=r"fineweb\.py"):
        open_dataset(unfinished)


OTHER = [("val_tokens", 201), ("shard_tokens", 501), ("max_tokens", 300), ("text_column", "body")]


@pytest.mark.parametrize("state", ["finished", "unfinished"])
def test_other_settings_on_a_folder_in_use_are_refused_by_name(tmp_path, request, pages, state):
    folder = request.getfixturevalue(state)
    before = snapshot(folder)
    for name, value in OTHER:
        with pytest.raises(UserError, match=rf"(?s)other settings.*{name}.*{value}"):
            prepare(folder, pages, **SETTINGS | {name: value})
    train_tokenizer(TEXTS * 2, 300, tmp_path / "own.json", progress=False)
    with pytest.raises(UserError, match="tokenizer"):
        prepare(folder, pages, tokenizer=tmp_path / "own.json", **SETTINGS)
    with pytest.raises(UserError, match="source: 'files' there, 'stdlib' now"):
        prepare(folder, source="stdlib", **SETTINGS)
    assert snapshot(folder) == before


@pytest.mark.parametrize("state", ["finished", "unfinished"])
def test_another_input_on_a_folder_in_use_is_refused(tmp_path, request, state):
    other = save_jsonl(tmp_path / "other.jsonl", ["Something else."])
    with pytest.raises(UserError, match="other"):
        prepare(request.getfixturevalue(state), other, **SETTINGS)


def test_shards_of_somebody_else_are_not_written_over(tmp_path, pages):
    save(tmp_path / "d" / "d_train_000001.bin", b"theirs")
    with pytest.raises(UserError, match="has shards but no"):
        prepare(tmp_path / "d", pages)
    assert snapshot(tmp_path / "d") == {"d_train_000001.bin": b"theirs"}


def test_what_is_written_already_counts_as_room(tmp_path, pages, unfinished):
    folder = shutil.copytree(unfinished, tmp_path / "d")
    source = sources.find("files", (str(pages),))
    source.open()
    disk = 4 * int(sum(unit.bytes for unit in source.units) * source.tokens_per_byte)  # 4 bytes a token at the peak
    usage = mock.Mock(free=disk - sum(path.stat().st_size for path in folder.glob("parts/*-*.bin")))
    with mock.patch.object(shutil, "disk_usage", return_value=usage):
        prepare(folder, pages, **SETTINGS)


def test_too_small_a_disk_is_told_before_anything_is_written(tmp_path, pages):
    with (
        mock.patch.object(shutil, "disk_usage", return_value=mock.Mock(free=100)),
        pytest.raises(UserError, match="is too small"),
    ):
        prepare(tmp_path / "d", pages)
    assert not (tmp_path / "d").exists()


def test_memory_that_only_caches_files_counts_as_free():
    told = "MemTotal: 1000 kB\nMemFree: 10 kB\nMemAvailable: 600 kB\n"
    with mock.patch.object(Path, "read_text", return_value=told):
        assert resources._available_memory() == 600 << 10


# ---------------------------------------------------------------------------------------------------------
# what can't be read


def read_all(*inputs: Path, column="text") -> list[str]:
    return list(sources.read_documents(sources.find("files", tuple(map(str, inputs)), (column,))))


def test_only_a_line_feed_ends_a_line_of_jsonl(tmp_path):
    texts = ["line\u2028paragraph\u2029next\x85form\x0cfile\x1c", "carriage\rreturn", "a\nb"]
    assert read_all(save_jsonl(tmp_path / "a.jsonl", texts, ascii=False)) == texts
    save(tmp_path / "b.jsonl", b'\n{"text": "a"}\r\n\n  \n{"text": "b"}')
    assert read_all(tmp_path / "b.jsonl") == ["a", "b"]


def test_a_lone_surrogate_is_a_text_like_others(tmp_path):
    texts = ["lone \ud800 surrogate", "another"]
    prepare(tmp_path / "d", save_jsonl(tmp_path / "a.jsonl", texts), val_tokens=0)
    assert open_dataset(tmp_path / "d").train.read(0, 4).tolist() == expected(texts, 0)["train"][0][:4]
    assert GPT2.encode(texts[0]) == GPT2.encode("lone \ufffd surrogate")


BAD_LINES = {
    "no JSON": b'{"text": ',
    "no UTF-8": b'{"text": "\xff"}',
    "no object": b'["text"]',
    "a number": b"7",
    "no such column": b'{"body": "b"}',
    "no text": b'{"text": 7}',
    "a list of texts": b'{"text": ["b"]}',
    "a pit": b"[" * 100_000,
}


@pytest.mark.parametrize("bad", BAD_LINES)
def test_a_bad_line_is_told_with_its_file_and_number(tmp_path, bad):
    save(tmp_path / "a.jsonl", b'{"text": "a"}\n\n' + BAD_LINES[bad] + b"\n")
    with pytest.raises(UserError, match=r"a\.jsonl, line 3"):
        read_all(tmp_path / "a.jsonl")


@pytest.mark.parametrize("column", [pa.array([1, 2]), pa.array([b"a", b"b"]), pa.array([["a"], ["b"]])])
def test_a_parquet_column_that_is_no_text_is_told_with_its_file(tmp_path, column):
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet.*text"):
        read_all(tmp_path / "a.parquet")


def test_a_missing_parquet_column_is_told_with_those_that_are_there(tmp_path):
    pq.write_table(pa.table({"id": [1], "body": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet has no column 'text': it has id, body"):
        read_all(tmp_path / "a.parquet")


def test_a_damaged_parquet_file_is_told_by_name(tmp_path):
    texts = [f"text number {i}" for i in range(100)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", compression="none", use_dictionary=False)
    data = (tmp_path / "a.parquet").read_bytes()
    not_utf8 = data.replace(b"text number 50", b"text \xff\xff\xff\xff\xff\xff 50")
    for damaged in (data[:-100], b"", data[:4] + b"\xff" * 60 + data[64:], not_utf8):
        (tmp_path / "a.parquet").write_bytes(damaged)
        with pytest.raises(UserError, match=r"a\.parquet"):
            read_all(tmp_path / "a.parquet")


@pytest.mark.parametrize("ending", ["gz", "xz", "zst"])
@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_a_damaged_compressed_file_is_told_by_name(tmp_path, kind, ending):
    text = "".join(random.Random(0).choices("abcdefgh ", k=20_000))
    path = save(tmp_path / f"a.{kind}.{ending}", json.dumps({"text": text}).encode())
    data = path.read_bytes()
    half = len(data) // 2
    for damaged in (data[:half], b"garbage", data[:half] + bytes(byte ^ 255 for byte in data[half:])):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=path.name):
            read_all(path)


def test_compressed_files_of_several_pieces_are_read_whole(tmp_path):
    for ending in ("gz", "xz", "zst"):
        path = save_jsonl(tmp_path / f"a.jsonl.{ending}", ["first"])
        path.write_bytes(path.read_bytes() + save_jsonl(tmp_path / f"b.jsonl.{ending}", ["second"]).read_bytes())
        assert read_all(path) == ["first", "second"]


@pytest.mark.parametrize("name", ["a.csv", "a", "a.json", "a.parquet.gz", "a.gz"])
def test_a_file_of_an_unknown_kind_is_refused_by_name(tmp_path, name):
    save(tmp_path / "b.txt", b"b")
    save(tmp_path / name, b"a")
    with pytest.raises(UserError, match=rf"(?s)unknown kind, .*{name}"):
        read_all(tmp_path)


def test_a_pattern_that_names_no_file_is_refused_by_name(tmp_path):
    save(tmp_path / "a.txt", b"a")
    with pytest.raises(UserError, match=r"\*\.jsonl names no file"):
        read_all(tmp_path / "a.txt", tmp_path / "*.jsonl")


def test_a_source_without_text_is_refused(tmp_path):
    pq.ParquetWriter(tmp_path / "rows.parquet", pa.schema([("text", pa.string())])).close()  # no row group at all
    for source in (tmp_path / "rows.parquet", save(tmp_path / "empty.jsonl", b""), save(tmp_path / "a.txt", b" \n")):
        with pytest.raises(UserError, match="no text"):
            prepare(tmp_path / "out" / source.name, source)


@pytest.mark.parametrize("option", ["val_tokens=-1", "shard_tokens=0", "max_tokens=0", "workers=0"])
def test_a_size_out_of_range_is_refused_by_name(tmp_path, pages, option):
    name, value = option.split("=")
    with pytest.raises(UserError, match=rf"--{name.replace('_', '-')} {value}"):
        prepare(tmp_path / "d", pages, **{name: value})


def test_invalid_arguments_are_reported_together(tmp_path, pages):
    """One UserError has a line for each, with the flag, its value and what to use."""
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
    """The shell expands a pattern to names in any encoding; Python passes them on with surrogates."""
    name = os.fsencode(tmp_path) + b"/caf\xe9.txt"
    with open(name, "wb") as file:
        file.write(b"some text")
    prepare(tmp_path / "d", os.fsdecode(name))
    assert open_dataset(tmp_path / "d").manifest["counts"]["documents"]["kept"] == 1


def test_help_shows_each_default_once(capsys):
    """No argument shows None or an empty default, and every argument of an empty type says what happens without it."""
    with pytest.raises(SystemExit, match="0"):
        call(fineweb.main, "--help")
    text = capsys.readouterr().out
    assert text.count("(default:") == len(dataclasses.fields(fineweb.PrepareArgs))
    assert not re.search(r"None|\(default: *\)", text)


def test_a_mistake_found_by_a_worker_is_one_message_and_exit_code_2(tmp_path):
    save(tmp_path / "a.jsonl", b'{"text": "a"}\n{"text": 7}\n')
    process = start(tmp_path / "d", tmp_path / "a.jsonl", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    assert stderr.count("error: ") == 1
    assert f"{tmp_path / 'a.jsonl'}, line 2: 'text' is int" in stderr
    assert "Traceback" not in stderr


def test_the_verify_command_tells_sound_from_damaged(tmp_path, finished, capsys):
    call(fineweb.main, "verify", finished)
    assert "is intact" in capsys.readouterr().out
    folder = shutil.copytree(finished, tmp_path / "d")
    with open(folder / "d_train_000001.bin", "r+b") as file:
        file.seek(1100)
        file.write(b"\xff")
    with pytest.raises(UserError, match=r"d_train_000001\.bin"):
        call(fineweb.main, "verify", folder)
    with pytest.raises(SystemExit, match="2"):
        call(fineweb.main, "verify")


def test_as_many_workers_as_the_memory_allows(tmp_path, pages, capsys):
    with (
        mock.patch.object(resources, "_available_memory", return_value=900 << 20),
        mock.patch.object(resources, "_cores", return_value=64),
    ):
        call(fineweb.main, "files", "--input", pages, "--out-dir", tmp_path / "d")
    assert "for 2 workers" in capsys.readouterr().out


def test_a_full_disk_is_told(tmp_path, pages):
    full = mock.patch.object(fineweb, "tokenize", side_effect=OSError(28, "No space left on device"))
    with full, pytest.raises(UserError, match="the disk is full"):
        prepare(tmp_path / "d", pages)


def test_a_single_document_is_said_to_leave_nothing_to_validate_on(tmp_path, capsys):
    prepare(tmp_path / "d", save(tmp_path / "input.txt", b"All the world's a stage. " * 50))
    assert "a single document" in capsys.readouterr().out
