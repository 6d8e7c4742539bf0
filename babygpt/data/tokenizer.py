"""Text to token ids and back: GPT-2's BPE, one trained here, or any foreign `tokenizer.json`.

    >>> load_tokenizer("gpt2").encode("Hello, world")
    [15496, 11, 995]
    >>> load_tokenizer("data/books-bpe.json").decode([72, 101])        # one that tools.train_tokenizer trained

GPT-2's ranks lie in `assets/gpt2.tiktoken` (OpenAI's r50k_base.tiktoken, byte for byte), so nothing is
downloaded. Text is always encoded as ordinary text: a literal `<|endoftext|>` in a page never becomes the
end-of-text token (EOT), which only the data preparation and the prompts put in, by its id.

GPT-2's BPE is tiktoken's, the others are the library `tokenizers`'. For whole data sets gigatoken.py makes both faster.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from babygpt.data.gigatoken import BatchEncoder
from babygpt.data.readers import without_surrogates
from babygpt.errors import UserError

GPT2_RANKS = Path(__file__).parents[2] / "assets" / "gpt2.tiktoken"
GPT2_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"  # tiktoken, openai_public.py
# tiktoken's r50k pattern: contractions, letters, numbers, other signs, white space
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
END_OF_TEXT = "<|endoftext|>"
# what other tokenizers call it; the first that the vocabulary has is taken
END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]", "<s>")
BLANKS = re.compile(
    r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]{10000,}"
)  # Unicode's White_Space


class GPT2Tokenizer(BatchEncoder):
    """GPT-2's byte-pair encoding: 50,257 entries, EOT is 50256. Ids equal tiktoken's `gpt2`."""

    name, file, sha256, vocab_size, eot_id = "gpt2", GPT2_RANKS, GPT2_SHA256, 50257, 50256

    def __init__(self):
        self.data = GPT2_RANKS.read_bytes()
        if hashlib.sha256(self.data).hexdigest() != GPT2_SHA256:
            raise UserError(
                f"{GPT2_RANKS} is damaged (its sha256 is not OpenAI's). Restore it: git checkout {GPT2_RANKS}"
            )

    def __reduce__(self):
        return GPT2Tokenizer, ()

    @cached_property
    def ranks(self) -> dict[bytes, int]:
        """Map each token's bytes to its id, EOT excluded."""
        return {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, self.data.splitlines())}

    @cached_property
    def encoding(self):
        import tiktoken

        return tiktoken.Encoding(
            "gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=self.ranks, special_tokens={END_OF_TEXT: self.eot_id}
        )

    def encode(self, text: str) -> list[int]:
        return self._plain_ids(without_surrogates(text).encode()).tolist()

    @cached_property
    def _gigatoken(self):
        import gigatoken

        return gigatoken.Tokenizer.from_tiktoken(GPT2_RANKS, pretokenizer="r50k").backend

    def _plain_ids(self, data: bytes) -> np.ndarray:
        text = data.decode()
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:
            pass  # its regular expression runs out of stack in half a million blanks: they are taken out for it
        pieces, at = [], 0
        for blanks in BLANKS.finditer(text):
            stop = blanks.end() - (blanks.end() < len(text))  # the last one goes with what follows, as in the pattern
            pieces.append(self.encoding.encode_ordinary(text[at : blanks.start()]))
            pieces.append(self.encoding._core_bpe.encode_single_piece(text[blanks.start() : stop].encode()))
            at = stop
        pieces.append(self.encoding.encode_ordinary(text[at:]))
        return np.concatenate([np.array(piece, np.uint32) for piece in pieces])

    def decode(self, ids: Iterable[int]) -> str:
        return self.encoding.decode(list(ids))

    def token_bytes(self) -> np.ndarray:
        """Length of every token's text in UTF-8 bytes, (vocab_size,) int64; EOT has none."""
        lengths = [len(self.encoding.decode_single_token_bytes(i)) for i in range(self.vocab_size - 1)]
        return np.array([*lengths, 0], dtype=np.int64)


class FileTokenizer(BatchEncoder):
    """A `tokenizer.json` of the `tokenizers` library: trained by tools.train_tokenizer, or anyone's."""

    def __init__(self, path: str | Path, data: bytes | None = None):
        """Reads `path`, unless its contents are given: then the file need not be there."""
        from tokenizers import Tokenizer

        self.file, self.name = Path(path), "tokenizer.json"
        self.data = data = self.file.read_bytes() if data is None else data
        self.sha256 = hashlib.sha256(data).hexdigest()
        try:
            self.bpe = Tokenizer.from_str(data.decode("utf-8"))
        except BaseException as error:  # bare Exception for what it can't parse, or a panic, which is none
            if isinstance(error, KeyboardInterrupt):
                raise
            raise UserError(f"{path} is no tokenizer.json of the `tokenizers` library: {error}") from None
        self.bpe.no_truncation()
        self.bpe.no_padding()
        vocabulary = self.bpe.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        found = [name for name in END_OF_TEXT_NAMES if name in vocabulary]
        if not found:
            raise UserError(
                f"{path} has no end-of-text token: none of {', '.join(END_OF_TEXT_NAMES)} is in its vocabulary."
            )
        self.eot, self.eot_id = found[0], vocabulary[found[0]]
        self.bpe.encode_special_tokens = True  # a literal "<|endoftext|>" in a text stays text

    def __reduce__(self):
        return FileTokenizer, (self.file, self.data)  # to a worker; its library's pickles forget what is set here

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Lone surrogates, which UTF-8 can't hold, become U+FFFD, as in tiktoken."""
        text = without_surrogates(text)
        ids = self._ids(text)
        # a file may not mark its end-of-text token as special, or its model may know it as a piece
        return self._encode_apart(text) if self.eot_id in ids else ids

    def _encode_apart(self, text: str) -> list[int]:
        """Encodes a text with every literal end-of-text broken behind its first character."""
        first, rest = self.eot[0], self.eot[1:]
        pieces = text.split(self.eot)
        pieces = [(rest if i else "") + p + (first if i < len(pieces) - 1 else "") for i, p in enumerate(pieces)]
        return [i for piece in pieces for i in self._ids(piece) if i != self.eot_id]

    def _ids(self, text: str) -> list[int]:
        return self.bpe.encode_batch_fast([text], add_special_tokens=False)[0].ids

    @cached_property
    def _gigatoken(self):
        """Of a tokenizer that tools.train_tokenizer trained; in others' there is more than a sample would show."""
        import gigatoken

        settings = json.loads(self.bpe.to_str())
        ours = json.loads(byte_level_bpe().to_str())
        if any(settings[part] != ours[part] for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder")):
            raise ValueError("it was not trained by tools.train_tokenizer")
        settings["added_tokens"] = []  # a literal end of text is text
        return gigatoken.Tokenizer.from_json(json.dumps(settings)).backend

    def _plain_ids(self, text: bytes) -> np.ndarray:
        return np.array(self.encode(text.decode()), np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        return self.bpe.decode(list(ids), skip_special_tokens=False)

    def token_bytes(self) -> np.ndarray:
        """Length of every token's text in UTF-8 bytes, (vocab_size,) int64; special tokens have none."""
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        byte_level = "ByteLevel" in str(self.bpe.decoder)
        special = {i for i, token in self.bpe.get_added_tokens_decoder().items() if token.special}
        for token, i in self.bpe.get_vocab(with_added_tokens=True).items():
            if i in special or i == self.eot_id:
                continue
            if byte_level:  # this alphabet writes each byte as one character
                lengths[i] = len(token)
            elif len(token) == 6 and token.startswith("<0x"):  # SentencePiece's byte fallback
                lengths[i] = 1
            else:
                lengths[i] = len(token.replace("▁", " ").encode("utf-8"))
        return lengths


Tokenizer = GPT2Tokenizer | FileTokenizer


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """ "gpt2", or the path of a `tokenizer.json` or of a folder that holds one."""
    if str(spec) == "gpt2":
        return GPT2Tokenizer()
    path = Path(spec)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f'there is no tokenizer at {path}. Give "gpt2" or the path of a tokenizer.json (--tokenizer).')
    return FileTokenizer(path)


def is_gpt2(tokenizer: Tokenizer) -> bool:
    """Return whether a tokenizer encodes exactly as GPT-2's: callers then use "gpt2", so that both have one sha256."""
    if isinstance(tokenizer, GPT2Tokenizer):
        return True
    settings = json.loads(tokenizer.bpe.to_str())
    pre_tokenizer, model = settings["pre_tokenizer"] or {}, settings["model"]
    same = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    unset = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
    plain = (
        settings["normalizer"] is None
        and same.items() <= pre_tokenizer.items()
        and model["type"] == "BPE"
        and not any(model.get(name) for name in unset)
    )
    # the byte-level alphabet maps printable bytes to themselves, the others to U+0100 and up
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = {byte: chr(byte) for byte in printable}
    characters |= {byte: chr(256 + i) for i, byte in enumerate(sorted({*range(256)} - {*printable}))}
    ranks = GPT2Tokenizer().ranks
    vocabulary = {"".join(map(characters.__getitem__, token)): rank for token, rank in ranks.items()}
    merged = [token for token, rank in vocabulary.items() if rank >= 256]  # sorted by rank, the order of the merges
    merges = ["".join(pair).replace(" ", "") for pair in model.get("merges", [])]  # pairs, or "a b"
    vocabulary |= {END_OF_TEXT: GPT2Tokenizer.eot_id}
    return plain and merges == merged and tokenizer.bpe.get_vocab(with_added_tokens=True) == vocabulary


def tokenizer_of_model(folder: Path, vocab_size: int) -> Tokenizer:
    """Return the tokenizer of a Hugging Face model directory: its tokenizer.json, or GPT-2's if the size fits.

    UserError if there is no tokenizer.json and the vocabulary is not GPT-2's, or if it has more entries than the model.
    """
    if (folder / "tokenizer.json").exists():
        tokenizer = load_tokenizer(folder)
        if tokenizer.vocab_size > vocab_size:
            raise UserError(
                f"{folder / 'tokenizer.json'} has {tokenizer.vocab_size:,} entries, but the model of {folder} has only "
                f"{vocab_size:,}. Use the tokenizer.json that the model was trained with."
            )
        return load_tokenizer("gpt2") if is_gpt2(tokenizer) else tokenizer  # one tokenizer has one sha256
    if vocab_size != load_tokenizer("gpt2").vocab_size:
        raise UserError(
            f"{folder} has no tokenizer.json, and its vocabulary of {vocab_size:,} is not GPT-2's. Add the "
            "tokenizer.json that the model was trained with."
        )
    return load_tokenizer("gpt2")


def stream_decode(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """The text of ids as they come, piece by piece; a character waits until all its bytes are there."""
    seen: list[int] = []
    told = 0
    for i in ids:
        seen.append(i)
        text = tokenizer.decode(seen)
        if not text.endswith("\ufffd"):
            yield text[told:]
            told = len(text)
    yield tokenizer.decode(seen)[told:]


def byte_level_bpe():
    """A byte-level BPE with GPT-2's pre-tokenizer and an empty vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bpe.decoder = decoders.ByteLevel()
    return bpe
