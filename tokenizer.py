"""Text to token ids and back: GPT-2's BPE, one trained here, or any foreign `tokenizer.json`.

    python tokenizer.py train stdlib --vocab-size 4096 --out data/stdlib-bpe.json
    python tokenizer.py train --input 'books/*.txt' --vocab-size 32768 --out data/books-bpe.json
    python fineweb.py files --input 'books/*.txt' --tokenizer data/books-bpe.json --out-dir data/books

GPT-2's ranks lie in `assets/gpt2.tiktoken` (OpenAI's r50k_base.tiktoken, byte for byte), so nothing is
downloaded. Text is always encoded as ordinary text: a literal `<|endoftext|>` in a page never becomes the
end-of-text token (EOT), which only the data preparation and the prompts put in, by its id.
"""

import base64
import hashlib
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from errors import UserError, run

GPT2_RANKS = Path(__file__).parent / "assets" / "gpt2.tiktoken"
GPT2_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"  # tiktoken, openai_public.py
# tiktoken's r50k pattern: contractions, letters, numbers, other signs, white space
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
END_OF_TEXT = "<|endoftext|>"
# what other tokenizers call it; the first that the vocabulary has is taken
END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]", "<s>")


class GPT2Tokenizer:
    """GPT-2's byte-pair encoding: 50,257 entries, EOT is 50256. Ids equal tiktoken's `gpt2`."""

    name, file, sha256, vocab_size, eot_id = "gpt2", GPT2_RANKS, GPT2_SHA256, 50257, 50256

    def __init__(self):
        import tiktoken

        data = GPT2_RANKS.read_bytes()
        if hashlib.sha256(data).hexdigest() != GPT2_SHA256:
            raise UserError(
                f"{GPT2_RANKS} is damaged (its sha256 is not OpenAI's). Restore it: git checkout {GPT2_RANKS}"
            )
        ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, data.splitlines())}
        self.encoding = tiktoken.Encoding(
            "gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: self.eot_id}
        )

    def encode(self, text: str) -> list[int]:
        try:
            return self.encoding.encode_ordinary(text)
        except BaseException as error:
            # tiktoken's regular expression runs out of stack in half a million blanks, as a panic of its Rust
            if type(error).__name__ != "PanicException":
                raise
            pieces = (text[i : i + 100_000] for i in range(0, len(text), 100_000))
            return [i for piece in pieces for i in self.encoding.encode_ordinary(piece)]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """One list of ids a text, on one thread (preparing data runs one process a core)."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return self.encoding.decode(list(ids))

    def token_bytes(self) -> np.ndarray:
        """Length of every token's text in UTF-8 bytes, (vocab_size,) int64; EOT has none."""
        lengths = [len(self.encoding.decode_single_token_bytes(i)) for i in range(self.vocab_size - 1)]
        return np.array([*lengths, 0], dtype=np.int64)


class FileTokenizer:
    """A `tokenizer.json` of the `tokenizers` library: trained by this file's `train`, or anyone's."""

    def __init__(self, path: str | Path):
        from tokenizers import Tokenizer

        self.file = Path(path)
        self.name = "tokenizer.json"
        data = self.file.read_bytes()
        self.sha256 = hashlib.sha256(data).hexdigest()
        try:
            self.bpe = Tokenizer.from_str(data.decode("utf-8"))
        except Exception as error:  # the library raises bare Exception for whatever it can't parse
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

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """One list of ids a text. Lone surrogates, which UTF-8 can't hold, become U+FFFD, as in tiktoken."""
        ids = self._ids(texts)
        # a file may not mark its end-of-text token as special, or its model may know it as a piece
        return [self._encode_apart(t) if self.eot_id in i else i for t, i in zip(texts, ids, strict=True)]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        encodings = self.bpe.encode_batch_fast(list(map(_without_surrogates, texts)), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def _encode_apart(self, text: str) -> list[int]:
        """Encodes a text with every literal end-of-text broken behind its first character."""
        first, rest = self.eot[0], self.eot[1:]
        pieces = text.split(self.eot)
        pieces = [(rest if i else "") + p + (first if i < len(pieces) - 1 else "") for i, p in enumerate(pieces)]
        return [i for ids in self._ids(pieces) for i in ids if i != self.eot_id]

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


def _without_surrogates(text: str) -> str:
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


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


def train(texts: Iterable[str], vocab_size: int, out: Path, progress: bool = True) -> FileTokenizer:
    """Trains a byte-level BPE of `vocab_size` entries, EOT (the last id) among them, and saves it to `out`.

    The pre-tokenizer is GPT-2's; all 256 bytes are in the vocabulary, so that any text can be encoded.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise UserError(f"a byte-level vocabulary takes 256 bytes and EOT: --vocab-size {vocab_size} is under 257.")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=progress)
    bpe.train_from_iterator(map(_without_surrogates, texts), trainer)
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


def main() -> None:
    import tyro

    import sources

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
        source_ = sources.find(source, input, text_column)
        tokenizer = train(sources.first_bytes(source_, max_bytes), vocab_size, out)
        print(f"{out}: {tokenizer.vocab_size:,} entries, EOT is {tokenizer.eot_id}, sha256 {tokenizer.sha256[:12]}")

    tyro.extras.subcommand_cli_from_dict({"train": train_command}, prog="tokenizer.py", description=__doc__)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.argv.append("--help")
    run(main)
