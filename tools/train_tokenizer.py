"""Train a byte-level BPE tokenizer with GPT-2's pre-tokenizer.

    python -m tools.train_tokenizer stdlib --vocab-size 4096 --out data/stdlib-bpe.json
    python -m tools.train_tokenizer --input 'books/*.txt' --vocab-size 32768 --out data/books-bpe.json
    python fineweb.py files --input 'books/*.txt' --tokenizer data/books-bpe.json --out-dir data/books

The same text always gives the same tokenizer, byte for byte.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional

from babygpt import files
from babygpt.constraints import Name, metavar, parse_arguments
from babygpt.data import sources
from babygpt.data.texts import without_surrogates
from babygpt.data.tokenizer import END_OF_TEXT, FileTokenizer, create_byte_level_bpe
from babygpt.errors import UserError, run


def train_tokenizer(texts: Iterable[str], vocab_size: int, out: Path, progress: bool = True) -> FileTokenizer:
    """Train a byte-level BPE with GPT-2's pre-tokenizer and save it to `out`.

    The vocabulary has `vocab_size` tokens: all 256 bytes, so that any text can be encoded, merges, and EOT as the last.
    """
    from tokenizers import pre_tokenizers, trainers

    if vocab_size < 257:
        raise UserError(
            f"--vocab-size {vocab_size} is too small. Use at least 257: 256 bytes and the end-of-text token."
        )
    bpe = create_byte_level_bpe()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=progress)
    bpe.train_from_iterator(map(without_surrogates, texts), trainer)
    if bpe.get_vocab_size() != vocab_size - 1:
        raise UserError(
            f"The text is too short for a vocabulary of {vocab_size:,} tokens: it gives only "
            f"{bpe.get_vocab_size() + 1:,}. Use more text or a smaller --vocab-size."
        )
    bpe.add_special_tokens([END_OF_TEXT])
    out.parent.mkdir(parents=True, exist_ok=True)
    files.write(out, bpe.to_str(pretty=True).encode())
    return FileTokenizer(out)


@dataclass(frozen=True, kw_only=True)
class TokenizerArgs:
    """The command line: each field is a flag, and its comment is the help."""

    # source of the text, as for fineweb.py: fineweb-edu-10BT, stdlib, OWNER/NAME, ..., or files (with --input)
    source: Annotated[Positional[str], metavar("[SOURCE]")] = "files"
    vocab_size: Annotated[int, metavar("N")]  # vocabulary size, including the end-of-text token
    out: Path  # tokenizer.json file to write
    # files, directories, glob patterns or URLs for the source `files`: .parquet, .jsonl or .txt; .jsonl and .txt may be
    # compressed (.gz, .xz, .zst)
    input: Annotated[tuple[str, ...], metavar("PATH [PATH ...]")] = ()
    text_column: Name = "text"  # column of a parquet file, or key of a JSON object, that contains the text
    max_bytes: Annotated[int, metavar("BYTES")] = 1_000_000_000  # maximum number of bytes of text to train on


def main() -> None:
    args = parse_arguments(TokenizerArgs, "python -m tools.train_tokenizer", __doc__)
    source = sources.find(args.source, args.input, (args.text_column,))
    tokenizer = train_tokenizer(sources.read_first_documents(source, args.max_bytes), args.vocab_size, args.out)
    print(f"{args.out}: {tokenizer.vocab_size:,} tokens, EOT is {tokenizer.eot_id}, sha256 {tokenizer.sha256[:12]}")


if __name__ == "__main__":
    run(main)
