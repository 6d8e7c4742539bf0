"""Text to token ids and back: GPT-2's BPE, one trained here, or any foreign `tokenizer.json`.

    python tokenizer.py train stdlib --vocab-size 4096 --out data/stdlib-bpe.json
    python tokenizer.py train --input 'books/*.txt' --vocab-size 32768 --out data/books-bpe.json
    python tokenizer.py compare gpt2 data/books-bpe.json --input 'books/*.txt'
    python fineweb.py files --input 'books/*.txt' --tokenizer data/books-bpe.json --out-dir data/books

GPT-2's ranks lie in `assets/gpt2.tiktoken` (OpenAI's r50k_base.tiktoken, byte for byte), so nothing is
downloaded. Text is always encoded as ordinary text: a literal `<|endoftext|>` in a page never becomes the
end-of-text token (EOT), which only the data preparation and the prompts put in, by its id.

GPT-2's BPE is tiktoken's, the others are the library `tokenizers`'. For whole data sets `gigatoken` does the same
ten times faster, where it is installed: it must encode a sample of each task alike, and texts in which the Unicode
versions of the libraries differ are left to the slower ones, so that the ids never depend on which one did it.
"""

import base64
import hashlib
import json
import operator
import os
import re
import sys
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np

from babygpt.data.readers import without_surrogates
from babygpt.errors import UserError, run

GPT2_RANKS = Path(__file__).parents[2] / "assets" / "gpt2.tiktoken"
GPT2_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"  # tiktoken, openai_public.py
# tiktoken's r50k pattern: contractions, letters, numbers, other signs, white space
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
END_OF_TEXT = "<|endoftext|>"
# what other tokenizers call it; the first that the vocabulary has is taken
END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]", "<s>")


CACHED = 4 << 30  # bytes of text after which gigatoken, which keeps every word it met, is made anew
# Characters that Unicode 17 made letters or numbers. gigatoken knows them as such, tiktoken and tokenizers don't, so
# a word may end elsewhere. By the first byte, what a text with one of them must hold; a few older ones match too.
UNICODE_17 = {
    b"\xe0": (b"\xe0\xa2\x8f", b"\xe0\xb1\x9c", b"\xe0\xb3\x9c"),
    b"\xea": (b"\xea\x9f\x8e", b"\xea\x9f\x8f", b"\xea\x9f\x92", b"\xea\x9f\x94", b"\xea\x9f\xb1"),
    b"\xf0": (
        b"\xf0\x90\xa5", b"\xf0\x90\xbb", b"\xf0\x91\xb6", b"\xf0\x91\xb7", b"\xf0\x96\xba", b"\xf0\x96\xbb",
        b"\xf0\x96\xbf", b"\xf0\x98\x9f", b"\xf0\x98\xb4", b"\xf0\x98\xb6", b"\xf0\x98\xb7", b"\xf0\x9e\x9b",
        b"\xf0\xab\x9c", b"\xf0\xac\xba", b"\xf0\xb2", b"\xf0\xb3",
    ),
}  # fmt: skip
BLANKS = re.compile(
    r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]{10000,}"
)  # Unicode's White_Space


def _splits_alike(text: bytes) -> bool:
    """Whether all libraries take the same characters of a text, in UTF-8, for letters and numbers."""
    if b"\xf0" not in text and b"\xe0" not in text and b"\xea" not in text:
        return True
    return not any(first in text and any(map(text.__contains__, wholes)) for first, wholes in UNICODE_17.items())


class _Batches:
    """Encodes whole data sets: by gigatoken, once it was found to do it alike."""

    fast = None  # gigatoken's tokenizer, where it is used
    encoded = 0  # bytes that it has encoded; it never forgets a word

    def use_gigatoken(self, texts: list[bytes], sample_bytes: int) -> str | None:
        """From here on batches are encoded by gigatoken, if it encodes the first `sample_bytes` of these texts as
        this tokenizer does; else says why not."""
        self.fast = None
        if self.encoded > CACHED:
            self.__dict__.pop("_gigatoken", None)
            self.encoded = 0
        try:
            fast = self._gigatoken
        except ImportError:
            return "gigatoken is not installed (pip install gigatoken): encoding is some ten times slower."
        except Exception as error:  # its loaders raise many kinds for a tokenizer that they don't know
            return f"gigatoken can't take this tokenizer ({error}): encoding is slower."
        sizes = accumulate(map(len, texts), initial=0)
        sample = [text for text, before in zip(texts, sizes, strict=False) if before < sample_bytes]
        plain = [self._plain_ids(text) for text in sample]
        self.fast = fast
        differing = sum(map(operator.not_, map(np.array_equal, plain, self.encode_batch(sample))))
        if differing:
            self.fast = None
            return f"gigatoken encodes {differing} of {len(sample)} documents differently: there it is not used."
        return None

    def encode_batch(self, texts: list[bytes]) -> list[np.ndarray]:
        """Ids of each text, (n,) uint32, on one thread (preparing data runs one process a core)."""
        if self.fast is None:
            return list(map(self._plain_ids, texts))
        self.encoded += sum(map(len, texts))
        return [self.fast.encode(text) if _splits_alike(text) else self._plain_ids(text) for text in texts]


class GPT2Tokenizer(_Batches):
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
    def encoding(self):
        import tiktoken

        ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, self.data.splitlines())}
        return tiktoken.Encoding(
            "gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: self.eot_id}
        )

    def encode(self, text: str) -> list[int]:
        return self._plain_ids(without_surrogates(text).encode()).tolist()

    @cached_property
    def _gigatoken(self):
        import gigatoken

        return gigatoken.Tokenizer.from_tiktoken(GPT2_RANKS, pretokenizer="r50k").backend

    def _plain_ids(self, text: bytes) -> np.ndarray:
        text = text.decode()
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


class FileTokenizer(_Batches):
    """A `tokenizer.json` of the `tokenizers` library: trained by this file's `train`, or anyone's."""

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
        self.vocab_size = max(self.bpe.get_vocab(with_added_tokens=True).values()) + 1
        self.eot = next((name for name in END_OF_TEXT_NAMES if self.bpe.token_to_id(name) is not None), None)
        if self.eot is None:
            raise UserError(
                f"{path} has no end-of-text token: none of {', '.join(END_OF_TEXT_NAMES)} is in its vocabulary."
            )
        self.eot_id = self.bpe.token_to_id(self.eot)
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
        """Of a tokenizer that this file trained; in others' there is more than a sample would show."""
        import gigatoken

        settings = json.loads(self.bpe.to_str())
        ours = json.loads(_untrained().to_str())
        if any(settings[part] != ours[part] for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder")):
            raise ValueError("it was not trained by tokenizer.py")
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


def _untrained():
    """A byte-level BPE with GPT-2's pre-tokenizer and an empty vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bpe.decoder = decoders.ByteLevel()
    return bpe


def train(texts: Iterable[str], vocab_size: int, out: Path, progress: bool = True) -> FileTokenizer:
    """Trains a byte-level BPE of `vocab_size` entries, EOT (the last id) among them, and saves it to `out`.

    The pre-tokenizer is GPT-2's; all 256 bytes are in the vocabulary, so that any text can be encoded.
    """
    from tokenizers import pre_tokenizers, trainers

    if vocab_size < 257:
        raise UserError(f"a byte-level vocabulary takes 256 bytes and EOT: --vocab-size {vocab_size} is under 257.")
    bpe = _untrained()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=progress)
    bpe.train_from_iterator(map(without_surrogates, texts), trainer)
    if bpe.get_vocab_size() != vocab_size - 1:
        raise UserError(
            f"the text is too small for {vocab_size:,} entries: it gives {bpe.get_vocab_size() + 1:,} at the most. "
            "Give more text or a smaller --vocab-size."
        )
    bpe.add_special_tokens([END_OF_TEXT])
    out.parent.mkdir(parents=True, exist_ok=True)
    bpe.save(f"{out}.tmp")
    os.replace(f"{out}.tmp", out)
    return FileTokenizer(out)


def compare(specs: Iterable[str], texts: list[bytes]) -> str:
    """A Markdown table of what each tokenizer makes of texts in UTF-8; words are runs of signs that are not blank."""
    size, words = sum(map(len, texts)), sum(len(text.decode().split()) for text in texts)
    if words == 0:
        raise UserError("--input has no words to compare tokenizers by.")
    lines = [
        f"{len(texts):,} documents, {size:,} bytes, {words:,} words",
        "",
        "| tokenizer | vocabulary | tokens | bytes a token | tokens a word |",
        "|---|---:|---:|---:|---:|",
    ]
    for spec in specs:
        tokenizer = load_tokenizer(spec)
        tokens = sum(map(len, tokenizer.encode_batch(texts)))
        vocabulary, per_token, per_word = f"{tokenizer.vocab_size:,}", f"{size / tokens:.3f}", f"{tokens / words:.3f}"
        lines.append(f"| {spec} | {vocabulary} | {tokens:,} | {per_token} | {per_word} |")
    return "\n".join(lines)


def main() -> None:
    import tyro

    from babygpt.data import sources

    def train_command(
        source: tyro.conf.Positional[str] = "files",
        /,
        *,
        vocab_size: int,
        out: Path,
        input: tuple[str, ...] = (),
        text_column: str = "text",
        max_bytes: int = 1_000_000_000,
    ) -> None:
        """Trains a byte-level BPE on a source of text.

        Args:
            source: A source as `python fineweb.py` takes it; `files` reads --input.
            vocab_size: Entries of the vocabulary, the end-of-text token among them.
            out: The tokenizer.json to write.
            input: Files or patterns of them (parquet, jsonl, txt; .gz .xz .zst), for the source `files`.
            text_column: The column or key that holds a document's text.
            max_bytes: Text to learn from at the most, in UTF-8 bytes.
        """
        source_ = sources.find(source, input, (text_column,))
        tokenizer = train(sources.first_bytes(source_, max_bytes), vocab_size, out)
        print(f"{out}: {tokenizer.vocab_size:,} entries, EOT is {tokenizer.eot_id}, sha256 {tokenizer.sha256[:12]}")

    def compare_command(
        tokenizers: tyro.conf.Positional[tuple[str, ...]] = (),
        /,
        *,
        input: tuple[str, ...],
        text_column: str = "text",
        max_bytes: int = 10_000_000,
    ) -> None:
        """How many tokens each tokenizer makes of a text.

        Args:
            tokenizers: "gpt2" or paths of a tokenizer.json.
            input: Files, folders or patterns (parquet, jsonl, txt; .gz .xz .zst).
            text_column: The column or key that holds a document's text.
            max_bytes: Text to look at, in UTF-8 bytes, from the beginning.
        """
        # behind --input all are taken for files, but no file of text is called so
        behind = [path for path in input if path == "gpt2" or path.endswith(".json")]
        specs = [*tokenizers, *behind]
        if not specs:
            raise UserError('give one or more tokenizers: "gpt2" or paths of a tokenizer.json.')
        source = sources.find("files", tuple(path for path in input if path not in behind), (text_column,))
        texts, left = [], max_bytes
        for text in sources.first_bytes(source, max_bytes):
            texts.append(text.encode()[:left].decode(errors="ignore").encode())  # no part of a character
            left -= len(texts[-1])
        print(compare(specs, texts))

    commands = {"train": train_command, "compare": compare_command}
    tyro.extras.subcommand_cli_from_dict(commands, prog="tokenizer.py", description=__doc__)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.argv.append("--help")
    run(main)
