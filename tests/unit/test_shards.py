"""shards.py: shards are byte-compatible with llm.c, and a corrupted dataset is rejected with the name of the file."""

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


def make_dataset(directory: Path, val=VAL, train=TRAIN, vocab_size=50257) -> Path:
    """Write shards with these token ids, and the manifest that fineweb.py would write."""
    directory.mkdir(parents=True)
    shards, counts = [], {"val": 0, "train": 0}
    (directory / "gpt2.tiktoken").write_bytes(b"ranks")
    for number, (split, ids) in enumerate([*(("val", ids) for ids in val), *(("train", ids) for ids in train)]):
        file = shard_name(directory.name, split, number)
        sha256 = write_shard(directory / file, len(ids), vocab_size, [np.array(ids)])
        counts[split] += len(ids)
        shards.append({"file": file, "tokens": len(ids), "documents": ids.count(EOT), "sha256": sha256})
    write_json(
        directory / MANIFEST,
        {
            "name": directory.name,
            "tokenizer": {"name": "gpt2", "file": "gpt2.tiktoken", "sha256": hashlib.sha256(b"ranks").hexdigest()},
            "eot_id": EOT,
            "vocab_size": vocab_size,
            "counts": {"tokens": counts, "documents": {"kept": sum(shard["documents"] for shard in shards)}},
            "shards": shards,
        },
    )
    return directory


def edit_manifest(directory: Path, **changes) -> None:
    """Change keys of dataset.json; `first_shard` contains the changes of its first shard."""
    manifest = json.loads((directory / MANIFEST).read_text())
    manifest["shards"][0] |= changes.pop("first_shard", {})
    write_json(directory / MANIFEST, manifest | changes)


def flip_bit(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


# ---------------------------------------------------------------------------------------------------------
# one shard


@pytest.mark.parametrize(
    ("vocab_size", "magic", "version", "code"), [(50257, 20240520, 1, "H"), (128256, 20240801, 7, "I")]
)
def test_shard_bytes_match_llm_c(tmp_path, vocab_size, magic, version, code):
    ids = [vocab_size - 1, 0, 1, 300]
    write_shard(tmp_path / "a.bin", 4, vocab_size, [np.array(ids[:1]), np.array(ids[1:])])
    header = struct.pack("<256i", magic, version, len(ids), *[0] * 253)
    assert (tmp_path / "a.bin").read_bytes() == header + struct.pack(f"<4{code}", *ids)


def test_token_has_two_bytes_if_every_id_fits():
    assert [token_dtype(size).itemsize for size in (257, 50257, 65536, 65537)] == [2, 2, 2, 4]


@pytest.mark.parametrize("vocab_size", [300, 50257, 65536, 65537, 128256])
def test_written_tokens_are_read_back(tmp_path, vocab_size):
    ids = np.random.default_rng(0).integers(0, vocab_size, 1000)
    ids[:2] = 0, vocab_size - 1
    write_shard(tmp_path / "a.bin", 1000, vocab_size, np.array_split(ids, 7))
    shard = open_shard(tmp_path / "a.bin")
    assert np.array_equal(shard, ids)
    assert not shard.flags.writeable


@pytest.mark.parametrize(
    ("vocab_size", "token"), [(50257, 50257), (50257, 65536 + 5), (65536, 65536), (128256, 128256), (50257, -1)]
)
def test_token_outside_the_vocabulary_is_rejected(tmp_path, vocab_size, token):
    with pytest.raises(ValueError, match="not all in the vocabulary of"):
        write_shard(tmp_path / "a.bin", 3, vocab_size, [np.array([1, token, 2])])
    assert not (tmp_path / "a.bin").exists()


def test_incomplete_shard_never_has_its_final_name(tmp_path):
    path = tmp_path / "a.bin"

    def pieces():
        yield np.arange(5)
        assert not path.exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(path, 10, 50257, pieces())
    with pytest.raises(ValueError, match="5 tokens were written instead of 10"):
        write_shard(path, 10, 50257, [np.arange(5)])
    assert not path.exists()


DAMAGE = {
    "one byte missing": lambda data: data[:-1],
    "one token missing": lambda data: data[:-2],
    "one token too many": lambda data: data + b"\0\0",
    "empty": lambda data: b"",
    "truncated header": lambda data: data[:700],
    "first 10 bytes only": lambda data: data[:10],
    "wrong magic": lambda data: struct.pack("<i", 20240521) + data[4:],
    "wrong version": lambda data: data[:4] + struct.pack("<i", 7) + data[8:],
    "wrong token count": lambda data: data[:8] + struct.pack("<i", 2) + data[12:],
    "uint32 header, uint16 tokens": lambda data: struct.pack("<2i", 20240801, 7) + data[8:],
    "big-endian": lambda data: struct.pack(">3i", 20240520, 1, 3) + data[12:],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_corrupted_shard_is_named_in_the_error(tmp_path, damage):
    directory = make_dataset(tmp_path / "d")
    path = directory / "d_val_000000.bin"
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with pytest.raises(UserError, match=path.name):
        open_dataset(directory)
    (directory / MANIFEST).unlink()
    with pytest.raises(UserError, match=path.name):  # the header shows it
        open_dataset(directory)


# ---------------------------------------------------------------------------------------------------------
# shards as one array


def test_read_across_shards_equals_slice_of_one_array():
    random = np.random.default_rng(0)
    shards = [random.integers(0, 50257, n).astype("<u2") for n in (5, 1, 0, 30, 0, 0, 7, 100)]
    array, tokens = np.concatenate(shards), Tokens(shards)
    assert len(tokens) == len(array)
    for start, stop in np.sort(random.integers(0, len(array) + 1, (500, 2))).tolist():
        ids = tokens.read(start, stop)
        assert ids.dtype == np.int64
        assert np.array_equal(ids, array[start:stop])


def test_read_fills_the_given_buffer():
    buffer = np.zeros(4, np.int64)
    assert Tokens([np.arange(3), np.arange(3, 9)]).read(1, 5, out=buffer) is buffer
    assert buffer.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 10), (3, 2), (10, 10)])
def test_read_outside_the_tokens_is_an_error(start, stop):
    with pytest.raises(IndexError):
        Tokens([np.arange(9)]).read(start, stop)


# ---------------------------------------------------------------------------------------------------------
# opening a dataset


def test_dataset_has_its_splits_and_tokenizer(tmp_path):
    dataset = open_dataset(make_dataset(tmp_path / "d"))
    assert dataset.val.read(0, len(dataset.val)).tolist() == VAL[0]
    assert dataset.train.read(0, len(dataset.train)).tolist() == TRAIN[0] + TRAIN[1]
    assert (dataset.eot_id, dataset.vocab_size, dataset.tokenizer) == (EOT, 50257, "gpt2")


@pytest.mark.parametrize("name", ["my_val_set", "my_train_set", "a_val_1"])
def test_splits_do_not_depend_on_the_dataset_name(tmp_path, name):
    """A name may contain `_val_` or `_train_`."""
    dataset = open_dataset(make_dataset(tmp_path / name))
    assert (len(dataset.val), len(dataset.train)) == (3, 8)


def test_shards_without_a_manifest_open(tmp_path):
    """Shards of other projects have no manifest; their tokenizer is taken to be GPT-2's."""
    directory = make_dataset(tmp_path / "d")
    (directory / MANIFEST).unlink()
    dataset = open_dataset(directory)
    assert dataset.manifest is None
    assert (dataset.eot_id, dataset.vocab_size, dataset.tokenizer) == (50256, 50257, "gpt2")
    assert (len(dataset.val), len(dataset.train)) == (3, 8)


def test_files_of_nanogpt_and_build_nanogpt_open(tmp_path):
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


@pytest.mark.parametrize("damage", ["odd size", "truncated", "uint32", "two dimensions", "not numpy"])
def test_corrupted_file_of_another_project_is_named_in_the_error(tmp_path, damage):
    name = "train.bin" if damage == "odd size" else "x_train_000001.npy"
    if damage == "odd size":
        save(tmp_path / name, b"12345")
    else:
        tokens = np.zeros((4, 4) if damage == "two dimensions" else 100, np.uint32 if damage == "uint32" else np.uint16)
        np.save(tmp_path / name, tokens)
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes({"truncated": data[:-20], "not numpy": b"text"}.get(damage, data))
    with pytest.raises(UserError, match=name):
        open_dataset(tmp_path)


def test_uint32_shards_without_a_manifest_are_rejected(tmp_path):
    directory = make_dataset(tmp_path / "d", vocab_size=128256)
    assert len(open_dataset(directory).train) == 8
    (directory / MANIFEST).unlink()
    with pytest.raises(UserError, match="uint32"):
        open_dataset(directory)


def test_missing_or_unlisted_shard_is_named_in_the_error(tmp_path):
    directory = make_dataset(tmp_path / "d")
    unlisted = shutil.copy(directory / "d_train_000001.bin", directory / "x_train_000009.bin")
    with pytest.raises(UserError, match=r"x_train_000009\.bin is not in the manifest"):
        open_dataset(directory)
    os.remove(unlisted)
    os.remove(directory / "d_train_000001.bin")
    with pytest.raises(UserError, match=r"d_train_000001\.bin is missing"):
        open_dataset(directory)


@pytest.mark.parametrize(
    "change", [{"first_shard": {"tokens": 4}}, {"first_shard": {"tokens": "4"}}, {"vocab_size": 128256}]
)
def test_shard_contradicting_the_manifest_is_named_in_the_error(tmp_path, change):
    """The manifest determines the length and dtype of each shard."""
    directory = make_dataset(tmp_path / "d")
    edit_manifest(directory, **change)
    with pytest.raises(UserError, match=r"d_\w+\.bin"):
        open_dataset(directory)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"shards": []}', "\udcff"])
def test_corrupted_manifest_is_named_in_the_error(tmp_path, content):
    directory = make_dataset(tmp_path / "d")
    (directory / MANIFEST).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=MANIFEST):
        open_dataset(directory)


def test_missing_or_empty_directory_is_named_in_the_error(tmp_path):
    with pytest.raises(UserError, match=r"no dataset at .*nowhere"):
        open_dataset(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no dataset at aaa"):
        open_dataset("a" * 5000)
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        open_dataset(tmp_path)


def test_write_json_is_atomic(tmp_path):
    write_json(tmp_path / "a.json", {"a": "é"})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"b": 1, "c": object()})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"a": "é"}


@pytest.mark.parametrize("manifest", [True, False])
def test_fingerprint_depends_on_the_tokens_alone(tmp_path, manifest):
    """It stays the same if the directory moves, and changes with a token."""
    directories = [
        make_dataset(tmp_path / "a" / "d"),
        make_dataset(tmp_path / "b" / "d", train=[TRAIN[0], [5, 6, EOT, 8]]),
    ]
    if not manifest:
        for directory in directories:
            (directory / MANIFEST).unlink()
    first, second = [open_dataset(directory).fingerprint for directory in directories]
    assert open_dataset(directories[0].rename(tmp_path / "moved")).fingerprint == first != second


# ---------------------------------------------------------------------------------------------------------
# verify


def test_verify_counts_shards_tokens_and_documents(tmp_path):
    bytes_read = []
    totals = verify(make_dataset(tmp_path / "d"), bytes_read.append)
    assert totals == {"shards": 3, "tokens": 11, "documents": 4}
    assert sum(bytes_read) == 2 * 11


@pytest.mark.parametrize("offset", [0, 5, 9, 600, 1023, 1024, 1026, -1])
def test_verify_finds_a_flipped_bit_in_header_or_tokens(tmp_path, offset):
    directory = make_dataset(tmp_path / "d")
    flip_bit(directory / "d_train_000002.bin", offset)
    with pytest.raises(UserError, match=r"d_train_000002\.bin") as error:
        verify(directory)
    assert "d_train_000001" not in str(error.value)


def test_verify_names_every_corrupted_shard(tmp_path):
    directory = make_dataset(tmp_path / "d")
    flip_bit(directory / "d_val_000000.bin", -1)
    flip_bit(directory / "d_train_000002.bin", 600)
    with pytest.raises(UserError, match=r"(?s)d_val_000000\.bin.*d_train_000002\.bin"):
        verify(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"first_shard": {"documents": 2}}, "dataset.json lists 2 documents, but 1 start in this shard"),
        ({"first_shard": {"documents": "2"}}, "dataset.json lists '2' documents, but 1"),
        ({"vocab_size": 50256}, "50256"),
        ({"vocab_size": "50257"}, "eot_id and vocab_size must be integers"),
    ],
)  # fmt: skip
def test_verify_checks_document_counts_and_the_vocabulary(tmp_path, change, message):
    directory = make_dataset(tmp_path / "d")
    edit_manifest(directory, **change)
    with pytest.raises(UserError, match=message):
        verify(directory)


def test_verify_without_a_manifest_is_rejected(tmp_path):
    directory = make_dataset(tmp_path / "d")
    (directory / MANIFEST).unlink()
    with pytest.raises(UserError, match=MANIFEST):
        verify(directory)


def test_verify_finds_wrong_totals_and_another_tokenizer(tmp_path):
    directory = make_dataset(tmp_path / "d")
    edit_manifest(directory, counts={"tokens": {"val": 3, "train": 9}, "documents": {"kept": 77}})
    (directory / "gpt2.tiktoken").write_bytes(b"other ranks")
    with pytest.raises(
        UserError,
        match=r"(?s)tokens, but .*lists 77 documents, but .*gpt2.tiktoken is missing",
    ):
        verify(directory)


def test_opening_many_shards_raises_the_open_file_limit(tmp_path):
    directory = make_dataset(tmp_path / "d", train=[[EOT, 1]] * 150)
    code = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (100, 1000)); from babygpt.data import shards; "
    code += f"print(len(shards.open_dataset({str(directory)!r}).train))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "300\n", done.stderr
