"""Tokenizers: GPT-2's, one trained by tools.train_tokenizer, one of characters, or any other `tokenizer.json`.

    >>> load_tokenizer("gpt2").encode("Hello, world")
    [15496, 11, 995]
    >>> load_tokenizer("data/books-bpe.json").decode([72, 101])        # trained by tools.train_tokenizer

GPT-2's tokenizer uses the library tiktoken, the others use `tokenizers`. gigatoken.py makes both faster for large data
sets. `assets/gpt2.tiktoken`, a copy of OpenAI's r50k_base.tiktoken, contains GPT-2's ranks, so nothing is downloaded.

Input is always encoded as ordinary text: a literal `<|endoftext|>` in a page never becomes the end-of-text token (EOT).
Only data preparation and prompts insert EOT, by its id.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np

from babygpt.data.gigatoken import BatchEncoder
from babygpt.data.texts import without_surrogates
from babygpt.errors import ConfigError, UserError

GPT2_RANKS = Path(__file__).parents[2] / "assets" / "gpt2.tiktoken"
GPT2_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"  # from tiktoken's openai_public.py
# tiktoken's r50k pattern: contractions, letters, numbers, other characters, whitespace
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
END_OF_TEXT = "<|endoftext|>"
# names of the EOT in other tokenizers; the first one in the vocabulary is used
END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]", "<s>")
# characters with Unicode's property White_Space
LONG_WHITESPACE = re.compile(r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]{10000,}")


class GPT2Tokenizer(BatchEncoder):
    """GPT-2's byte-pair encoding: 50,257 entries, EOT is 50256. The ids equal those of tiktoken's `gpt2`."""

    name, file, sha256, vocab_size, eot_id = "gpt2", GPT2_RANKS, GPT2_SHA256, 50257, 50256
    is_character_level = False

    def __init__(self):
        self.data = GPT2_RANKS.read_bytes()
        if hashlib.sha256(self.data).hexdigest() != GPT2_SHA256:
            raise UserError(
                f"{GPT2_RANKS} is corrupted: its sha256 is not OpenAI's. Restore it with `git checkout {GPT2_RANKS}`."
            )

    def __reduce__(self):
        return GPT2Tokenizer, ()

    @cached_property
    def ranks(self) -> dict[bytes, int]:
        """Map the bytes of each token except EOT to its id."""
        return {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, self.data.splitlines())}

    @cached_property
    def encoding(self):
        import tiktoken

        return tiktoken.Encoding(
            "gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=self.ranks, special_tokens={END_OF_TEXT: self.eot_id}
        )

    def encode(self, text: str) -> list[int]:
        return self._encode_bytes(without_surrogates(text).encode()).tolist()

    @cached_property
    def _gigatoken(self):
        import gigatoken

        return gigatoken.Tokenizer.from_tiktoken(GPT2_RANKS, pretokenizer="r50k").backend

    def _encode_bytes(self, data: bytes) -> np.ndarray:
        text = data.decode()
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:
            pass  # tiktoken's regular expression overflows its stack on half a million whitespace characters in a row
        pieces, start = [], 0
        for whitespace in LONG_WHITESPACE.finditer(text):
            # the last character is split off together with the text after it, as in GPT2_PATTERN
            stop = whitespace.end() - (whitespace.end() < len(text))
            pieces.append(self.encoding.encode_ordinary(text[start : whitespace.start()]))
            pieces.append(self.encoding._core_bpe.encode_single_piece(text[whitespace.start() : stop].encode()))
            start = stop
        pieces.append(self.encoding.encode_ordinary(text[start:]))
        return np.concatenate([np.array(piece, np.uint32) for piece in pieces])

    def decode(self, ids: Iterable[int]) -> str:
        return self.encoding.decode(list(ids))

    def token_bytes(self) -> np.ndarray:
        """Return the length of each token's text in UTF-8 bytes, (vocab_size,) int64, which is 0 for EOT."""
        lengths = [len(self.encoding.decode_single_token_bytes(i)) for i in range(self.vocab_size - 1)]
        return np.array([*lengths, 0], dtype=np.int64)


class FileTokenizer(BatchEncoder):
    """A tokenizer from a `tokenizer.json` of the `tokenizers` library."""

    def __init__(self, path: str | Path, data: bytes | None = None):
        """Load `data`, the contents of the file, or read `path` if it is None."""
        from tokenizers import Tokenizer

        self.file, self.name = Path(path), "tokenizer.json"
        self.data = data = self.file.read_bytes() if data is None else data
        self.sha256 = hashlib.sha256(data).hexdigest()
        try:
            self.backend = Tokenizer.from_str(data.decode("utf-8"))
        except BaseException as error:  # a panic of the library is a BaseException
            if isinstance(error, KeyboardInterrupt):
                raise
            raise UserError(
                f"{path} is not a tokenizer.json of the `tokenizers` library ({error}). Use a different file."
            ) from None
        self.backend.no_truncation()
        self.backend.no_padding()
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        eot_names = [name for name in END_OF_TEXT_NAMES if name in vocabulary]
        if not eot_names:
            raise UserError(
                f"{path} has no end-of-text token. Add one of {', '.join(END_OF_TEXT_NAMES)} to its vocabulary."
            )
        self.eot, self.eot_id = eot_names[0], vocabulary[eot_names[0]]
        self.backend.encode_special_tokens = True  # encode a literal "<|endoftext|>" as ordinary text

    def __reduce__(self):
        return FileTokenizer, (self.file, self.data)  # a pickle of `backend` loses the settings made above

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """Map each special token to its id."""
        return {token.content: i for i, token in self.backend.get_added_tokens_decoder().items() if token.special}

    def encode(self, text: str) -> list[int]:
        """Encode a text. Lone surrogates, which UTF-8 cannot represent, become U+FFFD, as in tiktoken."""
        text = without_surrogates(text)
        ids = self._encode(text)
        # a literal end-of-text is EOT if the file does not mark it as special or the model has learned it as a piece
        return self._encode_without_eot(text) if self.eot_id in ids else ids

    def _encode_without_eot(self, text: str) -> list[int]:
        """Encode a text, split after the first character of every literal end-of-text."""
        first, rest = self.eot[0], self.eot[1:]
        pieces = text.split(self.eot)
        pieces = [(rest if i else "") + p + (first if i < len(pieces) - 1 else "") for i, p in enumerate(pieces)]
        return [i for piece in pieces for i in self._encode(piece) if i != self.eot_id]

    def _encode(self, text: str) -> list[int]:
        try:
            return self.backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except Exception as error:  # the library raises no other type
            unknown = next((char for char in text if self.backend.token_to_id(char) is None), None)
            if unknown is None or not self.is_character_level:
                raise
            raise ConfigError(
                f"The tokenizer {self.file} has no token for the character {unknown!r}, which its dataset does not "
                "contain. Use a different prompt (in train.py: --sampling.prompt)."
            ) from error

    @cached_property
    def is_character_level(self) -> bool:
        """Whether this is a tokenizer of `character_tokenizer`."""
        is_word_level = json.loads(self.backend.to_str())["model"]["type"] == "WordLevel"
        return is_word_level and all(len(token) == 1 for token in self.backend.get_vocab(with_added_tokens=False))

    def use_gigatoken(self, texts: list[bytes], sample_bytes: int) -> str | None:
        return None if self.is_character_level else super().use_gigatoken(texts, sample_bytes)

    @cached_property
    def _gigatoken(self):
        """Only for tokenizers that tools.train_tokenizer trained: for others, a sample may not show all differences."""
        import gigatoken

        settings = json.loads(self.backend.to_str())
        supported = json.loads(create_byte_level_bpe().to_str())
        parts = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
        if any(settings[part] != supported[part] for part in parts):
            raise ValueError("it was not trained by tools.train_tokenizer")
        settings["added_tokens"] = []  # encode a literal end-of-text as ordinary text
        return gigatoken.Tokenizer.from_json(json.dumps(settings)).backend

    def _encode_bytes(self, data: bytes) -> np.ndarray:
        return np.array(self.encode(data.decode()), np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def token_bytes(self) -> np.ndarray:
        """Return the length of each token's text in UTF-8 bytes, (vocab_size,) int64, which is 0 for special tokens."""
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        is_byte_level = "ByteLevel" in str(self.backend.decoder)
        special_ids = set(self.special_ids.values())
        for token, i in self.backend.get_vocab(with_added_tokens=True).items():
            if i in special_ids or i == self.eot_id:
                continue
            if is_byte_level:  # each character of the token represents one byte
                lengths[i] = len(token)
            elif len(token) == 6 and token.startswith("<0x"):  # SentencePiece's byte fallback
                lengths[i] = 1
            else:
                text = token if self.is_character_level else token.replace("▁", " ")
                lengths[i] = len(text.encode("utf-8"))
        return lengths


Tokenizer = GPT2Tokenizer | FileTokenizer


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """Load "gpt2", a `tokenizer.json`, or the `tokenizer.json` of a directory."""
    if str(spec) == "gpt2":
        return GPT2Tokenizer()
    path = Path(spec)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f'There is no tokenizer at {path}. Use "gpt2", or the path to a tokenizer.json (--tokenizer).')
    return FileTokenizer(path)


def is_gpt2(tokenizer: Tokenizer) -> bool:
    """Return whether a tokenizer is equivalent to "gpt2". Callers then use "gpt2", so that the sha256 is the same."""
    if isinstance(tokenizer, GPT2Tokenizer):
        return True
    settings = json.loads(tokenizer.backend.to_str())
    pre_tokenizer, model = settings["pre_tokenizer"] or {}, settings["model"]
    gpt2_pre_tokenizer = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    unset_options = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
    has_gpt2_settings = (
        settings["normalizer"] is None
        and gpt2_pre_tokenizer.items() <= pre_tokenizer.items()
        and model["type"] == "BPE"
        and not any(model.get(name) for name in unset_options)
    )
    vocabulary = gpt2_vocabulary()
    gpt2_merges = [token for token, rank in vocabulary.items() if rank >= 256]  # in the order of the merges
    merges = ["".join(pair).replace(" ", "") for pair in model.get("merges", [])]  # a pair is ["a", "b"] or "a b"
    vocabulary |= {END_OF_TEXT: GPT2Tokenizer.eot_id}
    same_vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True) == vocabulary
    return has_gpt2_settings and merges == gpt2_merges and same_vocabulary


def gpt2_vocabulary() -> dict[str, int]:
    """Return GPT-2's tokens except EOT and their ids, in the order of the ids, in the alphabet of a tokenizer.json.

    It maps printable bytes to their Latin-1 characters, and the others to U+0100 and up.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = {byte: chr(byte) for byte in printable}
    characters |= {byte: chr(256 + i) for i, byte in enumerate(sorted({*range(256)} - {*printable}))}
    return {"".join(map(characters.__getitem__, token)): rank for token, rank in GPT2Tokenizer().ranks.items()}


def to_json(tokenizer: Tokenizer) -> str:
    """Return a tokenizer as the text of a tokenizer.json."""
    if not isinstance(tokenizer, GPT2Tokenizer):
        return tokenizer.data.decode()
    from tokenizers import models

    vocabulary = gpt2_vocabulary()
    merges = [find_merge(token, vocabulary) for token in vocabulary if len(token) > 1]
    bpe = create_byte_level_bpe()
    bpe.model = models.BPE(vocabulary, merges)
    bpe.add_special_tokens([END_OF_TEXT])
    return bpe.to_str()


def find_merge(token: str, ranks: dict[str, int]) -> tuple[str, str]:
    """Return the two tokens that byte-pair encoding merges into `token`, by merging its characters as it does."""
    parts = list(token)
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in pairwise(parts)]
        i = pairs.index(min(pairs))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def load_model_tokenizer(directory: Path, vocab_size: int) -> Tokenizer:
    """Load the tokenizer of a model in another format: its tokenizer.json, or GPT-2's if `vocab_size` is GPT-2's.

    UserError if the tokenizer.json has more than `vocab_size` entries, or is missing and `vocab_size` is not GPT-2's.
    If its tokens are characters, it may have one more: nanoGPT's data of characters has no end of text.
    """
    if (directory / "tokenizer.json").exists():
        tokenizer = load_tokenizer(directory)
        if tokenizer.vocab_size - tokenizer.is_character_level > vocab_size:
            raise UserError(
                f"{directory / 'tokenizer.json'} has {tokenizer.vocab_size:,} entries, but the model of {directory} "
                f"has only {vocab_size:,}. Use the tokenizer.json that the model was trained with."
            )
        return load_tokenizer("gpt2") if is_gpt2(tokenizer) else tokenizer
    if vocab_size != load_tokenizer("gpt2").vocab_size:
        raise UserError(
            f"{directory} has no tokenizer.json, and its vocabulary size, {vocab_size:,}, is not GPT-2's. Add the "
            "tokenizer.json that the model was trained with."
        )
    return load_tokenizer("gpt2")


def stream_decode(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Yield the text of each id as soon as it is known, so one text per id. A character is yielded with its last byte.

    If the last id does not complete a character, one more text follows: U+FFFD for the bytes of that character.
    """
    decoded: list[int] = []
    num_yielded = 0  # characters
    for i in ids:
        decoded.append(i)
        text = tokenizer.decode(decoded)
        num_complete = num_yielded if text.endswith("\ufffd") else len(text)
        yield text[num_yielded:num_complete]
        num_yielded = num_complete
    if rest := tokenizer.decode(decoded)[num_yielded:]:
        yield rest


def character_tokenizer(texts: Iterable[str]) -> FileTokenizer:
    """Return a tokenizer with one token for each character of the texts, by code point, and EOT as the last."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    backend = Tokenizer(models.WordLevel({character: i for i, character in enumerate(sorted(characters))}))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([END_OF_TEXT])
    return FileTokenizer("tokenizer.json", backend.to_str(pretty=True).encode())


def create_byte_level_bpe():
    """Return a `tokenizers.Tokenizer`: a byte-level BPE with GPT-2's pre-tokenizer and an empty vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bpe.decoder = decoders.ByteLevel()
    return bpe
