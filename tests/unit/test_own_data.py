"""fineweb.py with data of any shape: one file, large documents, named validation files, characters, other files."""

import functools
import hashlib
import json
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from support.helpers import call, save, save_jsonl
from support.preparation import prepare, snapshot

import fineweb
from arguments import parse
from babygpt import files
from babygpt.data import sources, workspace
from babygpt.data.shards import open_dataset, verify
from babygpt.data.tokenizer import load_tokenizer
from babygpt.errors import UserError
from train_config import tokens_of


def texts_of(directory) -> dict[str, list[str]]:
    """Return the documents of each split."""
    dataset = open_dataset(directory)
    tokenizer = load_tokenizer(dataset.tokenizer)
    decoded = {
        split: tokenizer.decode(tokens.read(0, len(tokens)).tolist())
        for split, tokens in (("train", dataset.train), ("val", dataset.val))
    }
    return {split: text.split("<|endoftext|>")[1:] for split, text in decoded.items()}


def novel(lines: int, name: str = "Alice") -> str:
    return "".join(f"{name} wrote line {i} of her novel.\n" for i in range(lines))


# ---------------------------------------------------------------------------------------------------------
# validation


def test_single_document_is_divided_at_a_line_end(tmp_path, capsys):
    prepare(tmp_path / "d", save(tmp_path / "input.txt", novel(1000).encode()))
    texts = texts_of(tmp_path / "d")
    assert [len(texts["train"]), len(texts["val"])] == [1, 1]
    assert texts["train"][0] + texts["val"][0] == novel(1000)
    assert texts["train"][0].endswith(".\n")
    assert 0.045 < len(texts["val"][0]) / len(novel(1000)) < 0.055
    assert "the end of the only document, divided at a line end\n" in capsys.readouterr().out
    assert verify(tmp_path / "d")["documents"] == 2


def test_document_without_line_ends_is_divided_between_tokens(tmp_path):
    text = "All the world's a stage. " * 1000
    prepare(tmp_path / "d", save(tmp_path / "input.txt", text.encode()), val_tokens=300)
    dataset, texts = open_dataset(tmp_path / "d"), texts_of(tmp_path / "d")
    assert texts["train"][0] + texts["val"][0] == text
    assert len(dataset.val) == 1 + 300
    assert "between two tokens" in dataset.manifest["split_rule"]


@pytest.mark.parametrize("count", [2, 4, 30])
def test_default_validation_share_is_below_7_percent(tmp_path, count):
    for i in range(count):
        save(tmp_path / "in" / f"{i}.txt", novel(150 + 37 * i, f"Author {i}").encode())
    counts = prepare(tmp_path / "d", tmp_path / "in")["counts"]
    tokens, texts = counts["tokens"], texts_of(tmp_path / "d")
    assert 0.03 < tokens["val"] / (tokens["train"] + tokens["val"]) < 0.07
    assert sum(len(text) for split in texts.values() for text in split) == sum(
        len(novel(150 + 37 * i, f"Author {i}")) for i in range(count)
    )
    assert counts["documents"]["seen"] == count
    assert counts["documents"]["kept"] == verify(tmp_path / "d")["documents"]
    assert counts["text_bytes"] == {split: sum(map(len, split_texts)) for split, split_texts in texts.items()}


@pytest.mark.parametrize(("val_tokens", "is_whole"), [(1900, True), (400, False)])
def test_document_is_divided_above_twice_the_target(tmp_path, val_tokens, is_whole):
    """Each document has about 2,000 tokens."""
    for name in ("Ann", "Bob", "Eve"):
        save(tmp_path / "in" / f"{name}.txt", novel(200, name).encode())
    manifest = prepare(tmp_path / "d", tmp_path / "in", val_tokens=val_tokens)
    assert manifest["split_rule"].startswith("whole documents") == is_whole
    assert val_tokens <= manifest["counts"]["tokens"]["val"] + 20 < 2 * val_tokens + 20


@pytest.mark.parametrize("i", range(4))
def test_small_document_is_not_all_of_validation(tmp_path, i):
    """Whichever of them has the smaller hash."""
    save(tmp_path / "in" / "readme.txt", f"A short text, number {i}.".encode())
    save(tmp_path / "in" / "novel.txt", novel(1000, f"Author {i}").encode())
    tokens = prepare(tmp_path / "d", tmp_path / "in")["counts"]["tokens"]
    assert 0.045 < tokens["val"] / (tokens["train"] + tokens["val"]) < 0.055


def test_preparation_of_a_divided_document_resumes(tmp_path, monkeypatch):
    path = save(tmp_path / "input.txt", novel(1000).encode())
    prepare(tmp_path / "whole", path)
    with monkeypatch.context() as patch:
        patch.setattr(fineweb, "write_shards", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path / "d", path)
    prepare(tmp_path / "d", path)
    shards = {name.replace("whole", "d"): data for name, data in snapshot(tmp_path / "whole").items() if ".bin" in name}
    assert {name: data for name, data in snapshot(tmp_path / "d").items() if ".bin" in name} == shards


def test_named_validation_documents_are_not_in_training(tmp_path):
    save_jsonl(tmp_path / "in" / "a.jsonl", ["one", "two", "three", "four"])
    save_jsonl(tmp_path / "in" / "val" / "b.jsonl", ["three", "five", "five"])
    for name, source in (("file", tmp_path / "in" / "a.jsonl"), ("directory", tmp_path / "in")):
        prepare(tmp_path / name, source, val_input=tmp_path / "in" / "val")
        assert texts_of(tmp_path / name) == {"train": ["one", "two", "four"], "val": ["three", "five"]}


def test_validation_files_without_text_are_rejected(tmp_path):
    save_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    for name in ("empty.jsonl", "blank.txt"):
        save(tmp_path / name, b"\n")
        with pytest.raises(UserError, match="The files of --val-input have no text"):
            prepare(tmp_path / "d", tmp_path / "a.jsonl", val_input=tmp_path / name)


def test_max_tokens_that_leave_no_training_document_are_named(tmp_path):
    save_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    save_jsonl(tmp_path / "b.jsonl", ["three " * 50])
    with pytest.raises(UserError, match=r"No training documents are left.*--max-tokens counts both"):
        prepare(tmp_path / "d", tmp_path / "a.jsonl", val_input=tmp_path / "b.jsonl", max_tokens=20)


def test_named_validation_documents_are_part_of_the_settings(tmp_path):
    paths = [save_jsonl(tmp_path / f"{name}.jsonl", [name]) for name in "abc"]
    prepare(tmp_path / "d", paths[1], paths[2], val_input=paths[0])
    with pytest.raises(UserError, match="a complete dataset with different settings"):
        prepare(tmp_path / "d", *paths)
    with pytest.raises(UserError, match="--val-input matches all files of --input"):
        prepare(tmp_path / "e", paths[0], val_input=paths[0])
    with pytest.raises(UserError, match="--val-tokens 5 has no effect with --val-input"):
        prepare(tmp_path / "e", paths[0], val_input=paths[1], val_tokens=5)


# ---------------------------------------------------------------------------------------------------------
# tiny Shakespeare and characters


@pytest.fixture
def shakespeare(tmp_path, monkeypatch) -> str:
    """Serve a short text in place of tiny Shakespeare, from a server on this machine, and return its URL."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "www" / "input.txt", novel(100).encode())
    handler = functools.partial(SimpleHTTPRequestHandler, directory=tmp_path / "www")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(sources, "SHAKESPEARE_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(sources, "SHAKESPEARE_SHA256", hashlib.sha256(novel(100).encode()).hexdigest())
        yield sources.SHAKESPEARE_URL
        server.shutdown()


def test_shakespeare_is_cut_after_90_percent_of_its_characters(tmp_path, shakespeare):
    prepare(tmp_path / "d", source="shakespeare", tokenizer="char")
    cut = int(0.9 * len(novel(100)))
    assert texts_of(tmp_path / "d") == {"train": [novel(100)[:cut]], "val": [novel(100)[cut:]]}
    (tmp_path / "www" / "input.txt").unlink()  # the text is downloaded once
    prepare(tmp_path / "e", source="shakespeare")
    assert texts_of(tmp_path / "e") == texts_of(tmp_path / "d")


def test_changed_shakespeare_is_rejected(tmp_path, shakespeare):
    save(tmp_path / "www" / "input.txt", b"Brush up your Shakespeare")
    with pytest.raises(UserError, match=r"input\.txt is corrupted: its sha256"):
        prepare(tmp_path / "d", source="shakespeare")
    assert not (tmp_path / "d").exists()


def test_every_character_is_a_token(tmp_path, capsys):
    text = "To be, or not to be:\n▁ż\n" * 100
    prepare(tmp_path / "d", save(tmp_path / "a.txt", text.encode()), tokenizer="char")
    assert "files: 2.70 kB, about 3.78K tokens." in capsys.readouterr().out, "the estimate counts characters"
    dataset = open_dataset(tmp_path / "d")
    tokenizer = load_tokenizer(dataset.tokenizer)
    assert dataset.vocab_size == len(set(text)) + 1 == dataset.eot_id + 1
    ids = [*dataset.train.read(1, len(dataset.train)), *dataset.val.read(1, len(dataset.val))]
    assert ids == [sorted(set(text)).index(char) for char in text]
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
    with pytest.raises(UserError, match=r"no token for the character 'é'"):
        tokenizer.encode("to bé")


# ---------------------------------------------------------------------------------------------------------
# the next command


@pytest.mark.parametrize(
    ("tokens", "has_gpu", "expected"),
    [
        (300_000, False, "tiny --dataset data/x --out-dir out/x --epochs 4"),
        (3_000_000, True, "tiny --dataset data/x --out-dir out/x"),
        (20_000_000, True, "mini --dataset data/x --out-dir out/x"),
        (100_000_000, True, "small --dataset data/x --out-dir out/x"),
        (100_000_000, False, "tiny --dataset data/x --out-dir out/x"),
        (10_000_000_000, True, "gpt2 --dataset data/x --out-dir out/x"),
    ],
)
def test_next_command_fits_data_and_machine(tokens, has_gpu, expected, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: has_gpu)
    command = fineweb.training_command("data/x", tokens, 5000, is_character_level=False)
    assert command == f"python train.py {expected}"
    _, config = parse(command.split()[2:])
    assert config.training.epochs is not None or tokens_of(config) <= 10 * tokens


def test_next_command_of_shakespeare_needs_no_flag(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    command = fineweb.training_command("data/shakespeare-char", 1_003_855, 111_541, is_character_level=True)
    assert command == "python train.py shakespeare-char-cpu"


def test_next_command_of_a_short_text_is_advice():
    assert fineweb.training_command("data/x", 3000, 100, is_character_level=False).startswith("use more text")


def test_next_command_omits_validation_that_is_too_short(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    command = fineweb.training_command("/d/my text", 20_000, 100, is_character_level=False)
    expected = "tiny --dataset '/d/my text' --out-dir 'out/my text' --epochs 4 --mode train sample"
    assert command == f"python train.py {expected}"


# ---------------------------------------------------------------------------------------------------------
# errors


def test_failed_preparation_removes_its_directory(tmp_path):
    save(tmp_path / "in" / "a.txt", b"good")
    save(tmp_path / "in" / "b.jsonl", b"not JSON")
    with pytest.raises(UserError, match="not valid JSON"):
        prepare(tmp_path / "d", tmp_path / "in")
    assert not (tmp_path / "d").exists()
    (tmp_path / "mine").mkdir()
    save(tmp_path / "mine" / "notes.txt", b"not from us")
    with pytest.raises(UserError, match="not valid JSON"):
        prepare(tmp_path / "mine", tmp_path / "in")
    assert (tmp_path / "mine" / "notes.txt").exists()


def test_failed_preparation_keeps_what_it_has_not_made(tmp_path, monkeypatch):
    """Unfinished work of another process or machine, and that of a preparation that took long."""
    good, bad = save_jsonl(tmp_path / "a.jsonl", ["good"]), save(tmp_path / "b.jsonl", b"{")
    url = "memory://bucket/kept"
    files.write(f"{url}/parts/00000-00000.npz", b"finished")
    files.write_json(f"{url}/parts/settings.json", {"format": 3, "revision": "other"})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="an unfinished dataset with different settings"):
        prepare(url, good)
    assert "00000-00000.npz" in files.list_names(f"{url}/parts")
    monkeypatch.setattr(workspace, "KEPT_AFTER", 0.0)
    with pytest.raises(UserError, match="not valid JSON"):
        prepare(tmp_path / "long", good, bad, task_bytes=1)
    assert (tmp_path / "long" / "parts").exists()


def test_skipped_files_are_counted_in_the_manifest(tmp_path):
    save(tmp_path / "in" / "a.txt", b"good")
    save(tmp_path / "in" / "b.txt", b"caf\xe9")
    call(fineweb.main, "files", "--input", tmp_path / "in", "--out-dir", tmp_path / "d", "--workers", 1, "--skip-bad")
    counts = json.loads((tmp_path / "d" / "dataset.json").read_text())["counts"]
    assert (counts["documents"]["kept"], counts["filtered_by"]) == (1, {"undecodable": 1})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoding": "undefined"}, "--encoding 'undefined' is unknown"),
        ({"encoding": "utf8000"}, "--encoding 'utf8000' is unknown"),
        ({"separator": ""}, "--separator is empty"),
    ],
)
def test_invalid_text_options_are_rejected(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        prepare(tmp_path / "d", save(tmp_path / "a.txt", b"a"), **options)
