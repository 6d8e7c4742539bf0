"""tokenizer.py: GPT-2's ids, encoding and decoding of any text, and texts that contain the name of the EOT token."""

import base64
import inspect
import itertools
import json
import sys
from unittest import mock

import pytest
import regex
import tiktoken_ext.openai_public as openai_public
from hypothesis import given, settings
from hypothesis import strategies as st
from support.helpers import call, save, save_jsonl
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from babygpt.data import tokenizer
from babygpt.data.tokenizer import END_OF_TEXT_NAMES, FileTokenizer, GPT2Tokenizer, load_tokenizer, stream_decode
from babygpt.errors import UserError
from tools import compare_tokenizers
from tools.train_tokenizer import main as train_tokenizer_main
from tools.train_tokenizer import train_tokenizer

CORPUS = [
    "the cat sat on the mat and ate the rat",
    "hello world, hello cat, 123 456",
    "žluťoučký kůň, 你好 😀 naïve",
] * 4
SAMPLE = "Hello, the cat's 1234 mats:\n\n  你好 😀 žluťoučký </s> <|endoftext|>"
any_text = st.lists(st.text() | st.sampled_from("\ud800\udbff\udc00\udfff")).map("".join)  # with lone surrogates
fast = settings(deadline=None, derandomize=True, max_examples=150)


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory):
    """GPT-2's tokenizer, one trained here, and a foreign one similar to SentencePiece."""
    directory = tmp_path_factory.mktemp("tokenizers")
    make_foreign(make_sentencepiece_like()).save(str(directory / "foreign.json"))
    return {
        "gpt2": load_tokenizer("gpt2"),
        "trained": train_tokenizer(CORPUS, 300, directory / "trained.json", progress=False),
        "foreign": load_tokenizer(directory / "foreign.json"),
    }


@pytest.fixture(scope="session")
def token_bytes(tokenizers):
    return {kind: tokenizer.token_bytes() for kind, tokenizer in tokenizers.items()}


def make_sentencepiece_like() -> models.BPE:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Metaspace()
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    bpe.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=specials, show_progress=False))
    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    return models.BPE(model["vocab"], merges, byte_fallback=True, unk_token="<unk>")


def make_foreign(model) -> Tokenizer:
    bpe = Tokenizer(model)
    bpe.add_special_tokens(["<unk>", "<s>", "</s>"])
    bpe.pre_tokenizer = pre_tokenizers.Metaspace()
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return bpe


# ---------------------------------------------------------------------------------------------------------
# GPT-2's ids


def test_ranks_and_pattern_equal_tiktokens():
    assert GPT2Tokenizer.sha256 in inspect.getsource(openai_public.r50k_base)
    assert openai_public.r50k_pat_str == tokenizer.GPT2_PATTERN


PUBLISHED = {  # the model card of GPT-2 and tiktoken's own tests
    "Hello, I'm a language model,": [15496, 11, 314, 1101, 257, 3303, 2746, 11],
    "hello world": [31373, 995],
    "00000": [20483],
    "0" * 12: [8269, 2388],
    "0" * 17: [8269, 10535, 830],
    "": [],
}


@pytest.mark.parametrize("text", PUBLISHED)
def test_gpt2_ids_equal_published_ids(tokenizers, text):
    assert tokenizers["gpt2"].encode(text) == PUBLISHED[text]


# the pattern of GPT-2's release; characters whose class is the same in all Unicode versions
RELEASED_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
CHARACTERS = [*"aestlvrdm'ABz019 \n\t\r.,!?-_<|>éž你½٣😀\u00a0\u2028\u3000", "the", "'ll"]


@pytest.fixture(scope="session")
def ranks():
    lines = [line.split() for line in tokenizer.GPT2_RANKS.read_bytes().splitlines()]
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def encode_plainly(text: str, ranks: dict[bytes, int]) -> list[int]:
    """Encode by plain byte-pair encoding: merge the pair of lowest rank until there is none."""
    ids = []
    for word in regex.findall(RELEASED_PATTERN, text):
        parts = [bytes([byte]) for byte in word.encode("utf-8")]
        while pairs := [pair for pair in itertools.pairwise(parts) if b"".join(pair) in ranks]:
            left, right = min(pairs, key=lambda pair: ranks[b"".join(pair)])
            i = next(i for i in range(len(parts)) if parts[i : i + 2] == [left, right])
            parts[i : i + 2] = [left + right]
        ids += [ranks[part] for part in parts]
    return ids


@given(characters=st.lists(st.sampled_from(CHARACTERS), max_size=40))
@fast
def test_gpt2_ids_equal_plain_bpe(tokenizers, ranks, characters):
    text = "".join(characters)
    assert tokenizers["gpt2"].encode(text) == encode_plainly(text, ranks)


def test_corrupted_ranks_are_named_in_the_error(tmp_path, monkeypatch):
    data = tokenizer.GPT2_RANKS.read_bytes()
    monkeypatch.setattr(tokenizer, "GPT2_RANKS", save(tmp_path / "ranks.tiktoken", data.replace(b" 777\n", b" 778\n")))
    with pytest.raises(UserError, match=r"ranks\.tiktoken is corrupted"):
        GPT2Tokenizer()


# ---------------------------------------------------------------------------------------------------------
# encoding and decoding


@pytest.mark.parametrize("kind", ["gpt2", "trained"])
@given(text=any_text)
@fast
def test_any_text_survives_encode_and_decode(tokenizers, kind, text):
    """Lone surrogates become the replacement character."""
    ids = tokenizers[kind].encode(text)
    assert tokenizers[kind].decode(ids) == text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert tokenizers[kind].eot_id not in ids


@pytest.mark.parametrize("kind", ["gpt2", "trained", "foreign"])
def test_encode_batch_equals_encode(tokenizers, kind):
    texts = [SAMPLE, "", "\ufeffmark", "cat"]
    assert encode_batch(tokenizers[kind], texts) == [tokenizers[kind].encode(text) for text in texts]
    assert tokenizers[kind].encode_batch([]) == []


@pytest.mark.parametrize("kind", ["gpt2", "trained", "foreign"])
@pytest.mark.parametrize("name", END_OF_TEXT_NAMES)
def test_literal_end_of_text_is_ordinary_text(tokenizers, kind, name):
    """The name of the EOT token in a document never becomes the token itself."""
    for text in (name, f"the cat {name} sat", f"{name}{name}", f"x{name}\n"):
        assert tokenizers[kind].eot_id not in tokenizers[kind].encode(text)
        assert tokenizers[kind].eot_id not in encode_batch(tokenizers[kind], ["cat", text])[1]


def test_literal_end_of_text_not_marked_special_is_text(tmp_path):
    """The same, if tokenizer.json does not mark the token as special."""
    content = json.loads(make_foreign(make_sentencepiece_like()).to_str())
    for token in content["added_tokens"]:
        token["special"] = False
    loaded = load_tokenizer(save(tmp_path / "t.json", json.dumps(content).encode()))
    assert loaded.eot_id not in loaded.encode("the cat </s> sat")


def test_literal_end_of_text_of_unigram_model_is_text(tmp_path):
    """The same, if the token is in the vocabulary of a unigram model."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((sign, -3.0) for sign in "▁</s>abct")]
    unigram = make_foreign(models.Unigram(pieces, 0))
    unigram.normalizer = normalizers.Lowercase()
    unigram.save(str(tmp_path / "t.json"))
    loaded = load_tokenizer(tmp_path / "t.json")
    for text in ("a cat </s> sat", "</s></s>", "a cat </S> sat"):
        assert loaded.eot_id not in loaded.encode(text)


def test_foreign_tokenizer_adds_and_truncates_nothing(tmp_path):
    """Truncation, padding and special tokens that tokenizer.json requests are disabled."""
    bpe = make_foreign(make_sentencepiece_like())
    plain = bpe.encode("the cat sat", add_special_tokens=False).ids
    bpe.enable_truncation(2)
    bpe.enable_padding(length=50)
    bpe.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    bpe.save(str(tmp_path / "t.json"))
    assert encode_batch(load_tokenizer(tmp_path / "t.json"), ["the cat sat"] * 2) == [plain] * 2


@pytest.mark.parametrize("kind", ["gpt2", "trained"])
@given(text=st.text())
@fast
def test_token_bytes_sum_to_the_length_of_the_text(tokenizers, token_bytes, kind, text):
    assert token_bytes[kind][tokenizers[kind].encode(text)].sum() == len(text.encode("utf-8"))


def test_foreign_token_bytes_include_the_prepended_space(tokenizers, token_bytes):
    assert token_bytes["foreign"][tokenizers["foreign"].encode(SAMPLE)].sum() == len(f" {SAMPLE}".encode())


@pytest.mark.parametrize("kind", ["gpt2", "trained", "foreign"])
def test_end_of_text_has_no_bytes(tokenizers, token_bytes, kind):
    assert token_bytes[kind].shape == (tokenizers[kind].vocab_size,)
    assert token_bytes[kind][tokenizers[kind].eot_id] == 0


# ---------------------------------------------------------------------------------------------------------
# streaming


@pytest.mark.parametrize("kind", ["gpt2", "trained", "foreign"])
def test_stream_yields_complete_characters(tokenizers, kind):
    ids = tokenizers[kind].encode(SAMPLE)
    pieces = list(stream_decode(tokenizers[kind], ids))
    assert "".join(pieces) == SAMPLE
    assert "\ufffd" not in "".join(pieces)
    assert len([piece for piece in pieces if piece]) > 10
    assert len(pieces) == len(ids), "one for each id"


def test_stream_yields_text_before_the_last_id(tokenizers):
    def ids():
        yield from tokenizers["gpt2"].encode(" cat")
        pytest.fail("read the next id before it yielded the first text")

    assert next(stream_decode(tokenizers["gpt2"], ids())) == " cat"


@pytest.mark.parametrize("kind", ["gpt2", "trained"])
@given(data=st.data())
@fast
def test_stream_of_any_ids_equals_decode(tokenizers, kind, data):
    ids = data.draw(st.lists(st.integers(0, 299), max_size=20))  # single bytes, mostly not complete characters
    pieces = list(stream_decode(tokenizers[kind], ids))
    assert "".join(pieces) == tokenizers[kind].decode(ids)
    assert len(pieces) - len(ids) in (0, 1)


# ---------------------------------------------------------------------------------------------------------
# training, and invalid files


def test_training_is_deterministic(tmp_path):
    """The vocabulary has the requested size, and EOT is its last id."""
    trained = [train_tokenizer(iter(CORPUS), 320, tmp_path / name / "t.json", progress=False) for name in "ab"]
    assert trained[0].sha256 == trained[1].sha256
    assert trained[0].vocab_size == 320
    assert sorted(trained[0].backend.get_vocab().values()) == list(range(320))
    assert trained[0].eot_id == 319
    assert trained[0].decode([319]) == "<|endoftext|>"


def test_train_command_reads_files(tmp_path, capsys):
    source = save_jsonl(tmp_path / "a.jsonl", CORPUS)
    call(train_tokenizer_main, "--input", source, "--vocab-size", 300, "--out", tmp_path / "tokenizer.json")
    assert "300 tokens, EOT is 299" in capsys.readouterr().out
    assert load_tokenizer(tmp_path).sha256 == train_tokenizer(CORPUS, 300, tmp_path / "t.json", progress=False).sha256


def test_training_replaces_lone_surrogates(tmp_path):
    surrogate = train_tokenizer([*CORPUS, "\ud800 hi"], 300, tmp_path / "a.json", progress=False)
    replacement = train_tokenizer([*CORPUS, "\ufffd hi"], 300, tmp_path / "b.json", progress=False)
    assert surrogate.sha256 == replacement.sha256


def test_impossible_vocabulary_size_is_rejected(tmp_path):
    """The text is too small for the vocabulary, or the vocabulary too small for 256 bytes and EOT."""
    with pytest.raises(UserError, match="too short for a vocabulary of 4,096 tokens"):
        train_tokenizer(CORPUS, 4096, tmp_path / "t.json", progress=False)
    with pytest.raises(UserError, match="256 is too small"):
        train_tokenizer(CORPUS, 256, tmp_path / "t.json", progress=False)
    assert not (tmp_path / "t.json").exists()
    assert train_tokenizer(CORPUS, 257, tmp_path / "t.json", progress=False).encode("cat") != []


@pytest.mark.parametrize("content", [b"", b"{}", b"hello", b"\xff\xfe", b'{"model": {"type": "BPE"}}'])
def test_file_that_is_not_a_tokenizer_is_named_in_the_error(tmp_path, content):
    with pytest.raises(UserError, match=r"odd\.json is not a tokenizer"):
        load_tokenizer(save(tmp_path / "odd.json", content))


def test_file_that_makes_the_library_panic_is_rejected(tmp_path):
    content = json.loads(train_tokenizer(CORPUS, 300, tmp_path / "t.json", progress=False).data)
    content["model"]["continuing_subword_prefix"] = "x" * 50  # longer than the tokens from which it is removed
    with pytest.raises(UserError, match=r"odd\.json is not a tokenizer"):
        load_tokenizer(save(tmp_path / "odd.json", json.dumps(content).encode()))


def test_missing_tokenizer_is_named_in_the_error(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(UserError, match="There is no tokenizer at"):
            load_tokenizer(path)


def test_tokenizer_without_end_of_text_is_named_in_the_error(tmp_path):
    Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a")).save(str(tmp_path / "t.json"))
    with pytest.raises(UserError, match=r"t\.json has no end-of-text token"):
        FileTokenizer(tmp_path / "t.json")


# ---------------------------------------------------------------------------------------------------------
# comparing


def read_table(out: str) -> dict[str, list[str]]:
    """Return the rows of a Markdown table by their first cell."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in rows[2:]}


def test_comparison_counts_tokens_of_the_same_text(tmp_path, tokenizers, capsys):
    source, own = save_jsonl(tmp_path / "a.jsonl", CORPUS), str(tokenizers["trained"].file)
    size, words = sum(len(text.encode()) for text in CORPUS), sum(len(text.split()) for text in CORPUS)
    call(compare_tokenizers.main, "gpt2", own, "--input", source)
    out = capsys.readouterr().out
    assert out.startswith(f"12 documents, {size} bytes, {words} words\n")
    assert list(read_table(out)) == ["gpt2", own]
    for kind, row in zip(("gpt2", "trained"), read_table(out).values(), strict=True):
        tokens = sum(len(tokenizers[kind].encode(text)) for text in CORPUS)
        assert row[:2] == [f"{tokenizers[kind].vocab_size:,}", f"{tokens:,}"]
        assert row[2:] == [f"{size / tokens:.3f}", f"{tokens / words:.3f}"]
    call(compare_tokenizers.main, "--input", source, "gpt2", own)
    assert capsys.readouterr().out == out


def test_comparison_stops_at_max_bytes(tmp_path, capsys):
    """The last character within the limit is complete."""
    source = save_jsonl(tmp_path / "a.jsonl", ["łódź ", "łódź " * 1000, "never"])  # a word has 8 bytes
    call(compare_tokenizers.main, "gpt2", "--input", source, "--max-bytes", 8 + 14)
    assert capsys.readouterr().out.startswith("2 documents, 21 bytes, 3 words\n")


def test_comparison_without_words_or_tokenizers_is_rejected(tmp_path):
    source = save(tmp_path / "a.txt", b" \n")
    with pytest.raises(UserError, match="no words"):
        call(compare_tokenizers.main, "gpt2", "--input", source)
    with pytest.raises(UserError, match="No tokenizers given"):
        call(compare_tokenizers.main, "--input", source)
    with pytest.raises(UserError, match=r"no tokenizer at .*none\.json"):
        call(compare_tokenizers.main, "--input", save(tmp_path / "b.txt", b"word"), tmp_path / "none.json")


# ---------------------------------------------------------------------------------------------------------
# gigatoken


def encode_batch(tokenizer, texts: list[str]) -> list[list[int]]:
    """Encode texts as data preparation does."""
    return [ids.tolist() for ids in tokenizer.encode_batch([text.encode() for text in texts])]


@pytest.fixture(scope="module")
def fast_and_plain(tokenizers, tmp_path_factory):
    """Two tokenizers of each kind that gigatoken supports, the first of which uses it. `pairs` merges any two bytes."""
    pairs = tmp_path_factory.mktemp("pairs") / "t.json"
    characters = pre_tokenizers.ByteLevel.alphabet()
    model = models.BPE({c: i for i, c in enumerate(characters)} | {a + b: 256 + i for i, (a, b) in enumerate(
        itertools.product(characters, characters))}, list(itertools.product(characters, characters)))  # fmt: skip
    bpe = tokenizer.create_byte_level_bpe()
    bpe.model = model
    bpe.add_special_tokens(["<|endoftext|>"])
    bpe.save(str(pairs))
    loaded = {}
    for kind, spec in {"gpt2": "gpt2", "trained": tokenizers["trained"].file, "pairs": pairs}.items():
        loaded[kind] = load_tokenizer(spec), load_tokenizer(spec)
        assert loaded[kind][0].use_gigatoken([SAMPLE.encode()], 100) is None
    return loaded


@pytest.mark.parametrize("kind", ["gpt2", "trained"])
@given(text=st.text() | st.lists(st.sampled_from(["<|endoftext|>", " ", "\n", "'s", "x", "7", "😀", "ł"])).map("".join))
@fast
def test_gigatoken_ids_equal_the_tokenizers(fast_and_plain, kind, text):
    fast, plain = fast_and_plain[kind]
    assert fast.fast_encoder is not None
    assert encode_batch(fast, [text]) == encode_batch(plain, [text]) == [plain.encode(text)]


def test_ids_do_not_depend_on_unicode_versions(fast_and_plain):
    """Any two bytes merge in this vocabulary, so ids differ if the libraries end a word at different characters."""
    fast, plain = fast_and_plain["pairs"]
    # every 97th character of long ranges whose characters have the same class, and all other characters
    uniform = [*range(0x3400, 0xA000), *range(0xAC00, 0xD800), *range(0x20000, 0x110000)]
    code_points = sorted(set(range(0x20000)) - set(range(0xD800, 0xE000)) - set(uniform)) + uniform[::97]
    newer = [0x88F, 0xC5C, 0xA7CE, 0x10940, 0x16EA0, 0x187FF, 0x1E6C0, 0x2B73A, 0x323B0, 0x33479]
    texts = [f"a{chr(c)}b 1{chr(c)}2 {chr(c)}!{chr(c)}'s {chr(c)}{chr(c)}x  {chr(c)}" for c in code_points + newer]
    fast_ids, plain_ids = encode_batch(fast, texts), encode_batch(plain, texts)
    assert [text for text, a, b in zip(texts, fast_ids, plain_ids, strict=True) if a != b] == []
    gigatoken_ids = [fast.fast_encoder.encode(text.encode()).tolist() for text in texts[-len(newer) :]]
    assert all(a != b for a, b in zip(gigatoken_ids, plain_ids[-len(newer) :], strict=True)), "gigatoken alone differs"


def test_gigatoken_is_used_only_if_its_ids_are_equal(tokenizers, monkeypatch):
    """Nor is it used for an unsupported tokenizer, or if it is not installed."""
    gpt2, sample = load_tokenizer("gpt2"), [b"one", b"two", b"three", b"four"]
    gpt2._gigatoken = mock.Mock(
        encode=lambda text: gpt2._encode_bytes(text)[: -1 if text in (b"two", b"four") else None]
    )
    assert gpt2.use_gigatoken(sample, 3) is None  # the texts that it encodes wrongly are not in the sample
    assert "encodes 1 of 3 sampled documents differently" in gpt2.use_gigatoken(sample, 11)
    assert encode_batch(gpt2, ["two"]) == [gpt2.encode("two")]
    assert "not trained by tools.train_tokenizer" in tokenizers["foreign"].use_gigatoken(sample, 100)
    assert encode_batch(tokenizers["foreign"], [SAMPLE]) == [tokenizers["foreign"].encode(SAMPLE)]
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    assert "pip install gigatoken" in load_tokenizer("gpt2").use_gigatoken(sample, 100)


@pytest.mark.parametrize("text", ["x{}y", "{}", "x{}", " {}\n.", "a b{}c  d{} e"])
def test_long_whitespace_is_encoded_exactly(fast_and_plain, text):
    """The ids equal gigatoken's. tiktoken itself fails on such texts."""
    fast, plain = fast_and_plain["gpt2"]
    for blank in (" ", "\n", "\u3000", " \t"):
        texts = [text.format(*[blank * 600_000] * 2)]
        assert encode_batch(plain, texts) == encode_batch(fast, texts)
