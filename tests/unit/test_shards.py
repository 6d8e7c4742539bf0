"""shards.py: the bytes on disk are llm.c's, what isn't whole is refused by name, nothing is read wrongly."""

import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.helpers import save

from babygpt.data.shards import MANIFEST, Tokens, open_dataset, open_shard, shard_name, token_dtype, verify, write_shard
from babygpt.errors import UserError
from babygpt.files import write_json

EOT = 50256
VAL, TRAIN = [[EOT, 1, 2]], [[EOT, 3, 4, EOT], [5, 6, EOT, 7]]
ROOT = Path(__file__).parents[2]


def make_dataset(folder: Path, val=VAL, train=TRAIN, vocab_size=50257) -> Path:
    """A data set of these shards (lists of ids), with the manifest that fineweb.py would write."""
    folder.mkdir(parents=True)
    rows, counts = [], {"val": 0, "train": 0}
    (folder / "gpt2.tiktoken").write_bytes(b"ranks")
    for number, (split, ids) in enumerate([*(("val", ids) for ids in val), *(("train", ids) for ids in train)]):
        file = shard_name(folder.name, split, number)
        sha256 = write_shard(folder / file, len(ids), vocab_size, [np.array(ids)])
        counts[split] += len(ids)
        rows.append({"file": file, "tokens": len(ids), "documents": ids.count(EOT), "sha256": sha256})
    write_json(
        folder / MANIFEST,
        {
            "name": folder.name,
            "tokenizer": {"name": "gpt2", "file": "gpt2.tiktoken", "sha256": hashlib.sha256(b"ranks").hexdigest()},
            "eot_id": EOT,
            "vocab_size": vocab_size,
            "counts": {"tokens": counts, "documents": {"kept": sum(shard["documents"] for shard in rows)}},
            "shards": rows,
        },
    )
    return folder


def edit_manifest(folder: Path, **changes) -> None:
    """Changes keys of dataset.json; `row` is merged into its first shard."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["shards"][0] |= changes.pop("row", {})
    write_json(folder / MANIFEST, manifest | changes)


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


# ---------------------------------------------------------------------------------------------------------
# one shard


@pytest.mark.parametrize(
    ("vocab_size", "magic", "version", "code"), [(50257, 20240520, 1, "H"), (128256, 20240801, 7, "I")]
)
def test_a_shard_is_llm_c_s_to_the_byte(tmp_path, vocab_size, magic, version, code):
    ids = [vocab_size - 1, 0, 1, 300]
    write_shard(tmp_path / "a.bin", 4, vocab_size, [np.array(ids[:1]), np.array(ids[1:])])
    header = struct.pack("<256i", magic, version, len(ids), *[0] * 253)
    assert (tmp_path / "a.bin").read_bytes() == header + struct.pack(f"<4{code}", *ids)


def test_two_bytes_a_token_as_long_as_every_id_fits():
    assert [token_dtype(size).itemsize for size in (257, 50257, 65536, 65537)] == [2, 2, 2, 4]


@pytest.mark.parametrize("vocab_size", [300, 50257, 65536, 65537, 128256])
def test_what_was_written_is_read_back(tmp_path, vocab_size):
    ids = np.random.default_rng(0).integers(0, vocab_size, 1000)
    ids[:2] = 0, vocab_size - 1
    write_shard(tmp_path / "a.bin", 1000, vocab_size, np.array_split(ids, 7))
    shard = open_shard(tmp_path / "a.bin")
    assert np.array_equal(shard, ids)
    assert not shard.flags.writeable


@pytest.mark.parametrize(
    ("vocab_size", "token"), [(50257, 50257), (50257, 65536 + 5), (65536, 65536), (128256, 128256), (50257, -1)]
)
def test_a_token_outside_the_vocabulary_is_never_wrapped(tmp_path, vocab_size, token):
    with pytest.raises(ValueError, match="outside the vocabulary"):
        write_shard(tmp_path / "a.bin", 3, vocab_size, [np.array([1, token, 2])])
    assert not (tmp_path / "a.bin").exists()


def test_a_half_written_shard_never_appears_under_its_final_name(tmp_path):
    path = tmp_path / "a.bin"

    def pieces():
        yield np.arange(5)
        assert not path.exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(path, 10, 50257, pieces())
    with pytest.raises(ValueError, match="5 tokens came for a shard of 10"):
        write_shard(path, 10, 50257, [np.arange(5)])
    assert not path.exists()


DAMAGE = {
    "a byte short": lambda data: data[:-1],
    "a token short": lambda data: data[:-2],
    "a token long": lambda data: data + b"\0\0",
    "empty": lambda data: b"",
    "cut in the header": lambda data: data[:700],
    "cut in its first bytes": lambda data: data[:10],
    "another magic": lambda data: struct.pack("<i", 20240521) + data[4:],
    "another version": lambda data: data[:4] + struct.pack("<i", 7) + data[8:],
    "another count": lambda data: data[:8] + struct.pack("<i", 2) + data[12:],
    "uint32 header over uint16 tokens": lambda data: struct.pack("<2i", 20240801, 7) + data[8:],
    "big-endian": lambda data: struct.pack(">3i", 20240520, 1, 3) + data[12:],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_shard_that_is_not_whole_is_refused_by_name(tmp_path, damage):
    folder = make_dataset(tmp_path / "d")
    path = folder / "d_val_000000.bin"
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with pytest.raises(UserError, match=path.name):
        open_dataset(folder)
    (folder / MANIFEST).unlink()
    with pytest.raises(UserError, match=path.name):  # by its header alone
        open_dataset(folder)


# ---------------------------------------------------------------------------------------------------------
# one long array


def test_reading_across_shard_borders_equals_reading_one_array():
    random = np.random.default_rng(0)
    shards = [random.integers(0, 50257, n).astype("<u2") for n in (5, 1, 0, 30, 0, 0, 7, 100)]
    whole, tokens = np.concatenate(shards), Tokens(shards)
    assert len(tokens) == len(whole)
    for start, stop in np.sort(random.integers(0, len(whole) + 1, (500, 2))).tolist():
        ids = tokens.read(start, stop)
        assert ids.dtype == np.int64
        assert np.array_equal(ids, whole[start:stop])


def test_reading_fills_the_buffer_that_is_given():
    buffer = np.zeros(4, np.int64)
    assert Tokens([np.arange(3), np.arange(3, 9)]).read(1, 5, out=buffer) is buffer
    assert buffer.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 10), (3, 2), (10, 10)])
def test_reading_past_the_ends_is_an_error(start, stop):
    with pytest.raises(IndexError):
        Tokens([np.arange(9)]).read(start, stop)


# ---------------------------------------------------------------------------------------------------------
# a data set


def test_a_data_set_gives_back_its_splits_and_its_tokenizer(tmp_path):
    dataset = open_dataset(make_dataset(tmp_path / "d"))
    assert dataset.val.read(0, len(dataset.val)).tolist() == VAL[0]
    assert dataset.train.read(0, len(dataset.train)).tolist() == TRAIN[0] + TRAIN[1]
    assert (dataset.eot_id, dataset.vocab_size, dataset.tokenizer) == (EOT, 50257, "gpt2")


@pytest.mark.parametrize("name", ["my_val_set", "my_train_set", "a_val_1"])
def test_the_name_of_a_data_set_never_mixes_its_splits(tmp_path, name):
    dataset = open_dataset(make_dataset(tmp_path / name))
    assert (len(dataset.val), len(dataset.train)) == (3, 8)


def test_somebody_else_s_shards_open_without_a_manifest(tmp_path):
    folder = make_dataset(tmp_path / "d")
    (folder / MANIFEST).unlink()
    dataset = open_dataset(folder)
    assert dataset.manifest is None
    assert (dataset.eot_id, dataset.vocab_size, dataset.tokenizer) == (50256, 50257, "gpt2")
    assert (len(dataset.val), len(dataset.train)) == (3, 8)


def test_nanogpt_s_and_build_nanogpt_s_files_open_too(tmp_path):
    train, val = np.arange(50_000, dtype=np.uint16), np.arange(7, dtype=np.uint16)
    save(tmp_path / "nanogpt" / "train.bin", train.tobytes())
    save(tmp_path / "nanogpt" / "val.bin", val.tobytes())
    (tmp_path / "build").mkdir()
    np.save(tmp_path / "build" / "edufineweb_val_000000.npy", val)
    np.save(tmp_path / "build" / "edufineweb_train_000001.npy", train[:30_000])
    np.save(tmp_path / "build" / "edufineweb_train_000002.npy", train[30_000:])
    for name in ("nanogpt", "build"):
        dataset = open_dataset(tmp_path / name)
        assert dataset.train.read(0, 50_000).tolist() == train.tolist()
        assert dataset.val.read(0, 7).tolist() == val.tolist()
        assert (dataset.eot_id, dataset.vocab_size, dataset.tokenizer) == (50256, 50257, "gpt2")


@pytest.mark.parametrize("damage", ["odd", "short", "wide", "matrix", "no numpy"])
def test_somebody_else_s_file_that_is_not_whole_is_refused_by_name(tmp_path, damage):
    name = "train.bin" if damage == "odd" else "x_train_000001.npy"
    if damage == "odd":
        save(tmp_path / name, b"12345")
    else:
        tokens = np.zeros((4, 4) if damage == "matrix" else 100, np.uint32 if damage == "wide" else np.uint16)
        np.save(tmp_path / name, tokens)
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes({"short": data[:-20], "no numpy": b"text"}.get(damage, data))
    with pytest.raises(UserError, match=name):
        open_dataset(tmp_path)


def test_four_byte_shards_without_a_manifest_are_refused(tmp_path):
    folder = make_dataset(tmp_path / "d", vocab_size=128256)
    assert len(open_dataset(folder).train) == 8
    (folder / MANIFEST).unlink()
    with pytest.raises(UserError, match="uint32"):
        open_dataset(folder)


def test_a_shard_missing_or_not_in_the_manifest_is_refused_by_name(tmp_path):
    folder = make_dataset(tmp_path / "d")
    foreign = shutil.copy(folder / "d_train_000001.bin", folder / "x_train_000009.bin")
    with pytest.raises(UserError, match=r"x_train_000009\.bin is not in the manifest"):
        open_dataset(folder)
    os.remove(foreign)
    os.remove(folder / "d_train_000001.bin")
    with pytest.raises(UserError, match=r"d_train_000001\.bin is missing"):
        open_dataset(folder)


@pytest.mark.parametrize("change", [{"row": {"tokens": 4}}, {"row": {"tokens": "4"}}, {"vocab_size": 128256}])
def test_shards_of_another_length_or_dtype_than_the_manifest_are_refused_by_name(tmp_path, change):
    folder = make_dataset(tmp_path / "d")
    edit_manifest(folder, **change)
    with pytest.raises(UserError, match=r"d_\w+\.bin"):
        open_dataset(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"shards": []}', "\udcff"])
def test_a_damaged_manifest_is_refused_by_name(tmp_path, content):
    folder = make_dataset(tmp_path / "d")
    (folder / MANIFEST).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=MANIFEST):
        open_dataset(folder)


def test_a_folder_that_is_missing_or_empty_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"no data set at .*nowhere"):
        open_dataset(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no data set at aaa"):
        open_dataset("a" * 5000)
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        open_dataset(tmp_path)


def test_a_manifest_is_replaced_whole_or_not_at_all(tmp_path):
    write_json(tmp_path / "a.json", {"a": "é"})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"b": 1, "c": object()})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"a": "é"}


@pytest.mark.parametrize("manifest", [True, False])
def test_the_fingerprint_stays_when_the_folder_moves_and_changes_with_a_token(tmp_path, manifest):
    folders = [make_dataset(tmp_path / "a" / "d"), make_dataset(tmp_path / "b" / "d", train=[TRAIN[0], [5, 6, EOT, 8]])]
    if not manifest:
        for folder in folders:
            (folder / MANIFEST).unlink()
    here, other = [open_dataset(folder).fingerprint for folder in folders]
    assert open_dataset(folders[0].rename(tmp_path / "moved")).fingerprint == here != other


# ---------------------------------------------------------------------------------------------------------
# verify


def test_verify_counts_shards_tokens_and_documents(tmp_path):
    read = []
    totals = verify(make_dataset(tmp_path / "d"), read.append)
    assert totals == {"shards": 3, "tokens": 11, "documents": 4}
    assert sum(read) == 2 * 11


@pytest.mark.parametrize("offset", [0, 5, 9, 600, 1023, 1024, 1026, -1])
def test_verify_finds_one_flipped_bit_of_header_or_body(tmp_path, offset):
    folder = make_dataset(tmp_path / "d")
    flip(folder / "d_train_000002.bin", offset)
    with pytest.raises(UserError, match=r"d_train_000002\.bin") as error:
        verify(folder)
    assert "d_train_000001" not in str(error.value)


def test_verify_names_every_damaged_shard_at_once(tmp_path):
    folder = make_dataset(tmp_path / "d")
    flip(folder / "d_val_000000.bin", -1)
    flip(folder / "d_train_000002.bin", 600)
    with pytest.raises(UserError, match=r"(?s)d_val_000000\.bin.*d_train_000002\.bin"):
        verify(folder)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"row": {"documents": 2}}, "1 documents begin in it, the manifest says 2"),
        ({"row": {"documents": "2"}}, "the manifest says '2'"), ({"vocab_size": 50256}, "50256"),
        ({"vocab_size": "50257"}, "eot_id and vocab_size are numbers"),
    ],
)  # fmt: skip
def test_verify_refuses_wrong_document_counts_and_tokens_outside_the_vocabulary(tmp_path, change, complaint):
    folder = make_dataset(tmp_path / "d")
    edit_manifest(folder, **change)
    with pytest.raises(UserError, match=complaint):
        verify(folder)


def test_verify_says_so_when_there_is_nothing_to_verify_by(tmp_path):
    folder = make_dataset(tmp_path / "d")
    (folder / MANIFEST).unlink()
    with pytest.raises(UserError, match=MANIFEST):
        verify(folder)


def test_verify_finds_wrong_sums_and_another_tokenizer(tmp_path):
    folder = make_dataset(tmp_path / "d")
    edit_manifest(folder, counts={"tokens": {"val": 3, "train": 9}, "documents": {"kept": 77}})
    (folder / "gpt2.tiktoken").write_bytes(b"other ranks")
    with pytest.raises(
        UserError,
        match=r"(?s)tokens, its counts.*documents, its counts.*gpt2.tiktoken is missing",
    ):
        verify(folder)


def test_more_shards_than_files_may_be_open_are_opened(tmp_path):
    folder = make_dataset(tmp_path / "d", train=[[EOT, 1]] * 150)
    code = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (100, 1000)); from babygpt.data import shards; "
    code += f"print(len(shards.open_dataset({str(folder)!r}).train))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "300\n", done.stderr
