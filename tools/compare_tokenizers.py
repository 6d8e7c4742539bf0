"""Compare tokenizers by the number of tokens that they need for a text.

    python -m tools.compare_tokenizers gpt2 data/books-bpe.json --input 'books/*.txt'

The output is a Markdown table with bytes per token and tokens per word.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional

from babygpt.constraints import Name, metavar, parse_arguments, required
from babygpt.data import sources
from babygpt.data.tokenizer import load_tokenizer
from babygpt.errors import UserError, run


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


@dataclass(frozen=True, kw_only=True)
class CompareArgs:
    """The command line: each field is a flag, and its comment is the help."""

    # tokenizers: gpt2, or paths of tokenizer.json files
    tokenizers: Annotated[Positional[tuple[str, ...]], required("TOKENIZER [TOKENIZER ...]")] = ()
    # files, directories, glob patterns or URLs of text: .parquet, .jsonl or .txt (also .gz, .xz, .zst)
    input: Annotated[tuple[str, ...], metavar("PATH [PATH ...]")]
    text_column: Name = "text"  # column of a parquet file, or key of a JSON object, that contains the text
    # number of bytes of text to encode, from the start of the input
    max_bytes: Annotated[int, metavar("BYTES")] = 10_000_000


def main() -> None:
    args = parse_arguments(CompareArgs, "python -m tools.compare_tokenizers", __doc__)
    # behind --input all are taken for files, but no file of text is called so
    behind = [path for path in args.input if path == "gpt2" or path.endswith(".json")]
    specs = [*args.tokenizers, *behind]
    if not specs:
        raise UserError('give one or more tokenizers: "gpt2" or paths of a tokenizer.json.')
    source = sources.find("files", tuple(path for path in args.input if path not in behind), (args.text_column,))
    texts, left = [], args.max_bytes
    for text in sources.read_first_documents(source, args.max_bytes):
        texts.append(text.encode()[:left].decode(errors="ignore").encode())  # no part of a character
        left -= len(texts[-1])
    print(compare(specs, texts))


if __name__ == "__main__":
    run(main)
