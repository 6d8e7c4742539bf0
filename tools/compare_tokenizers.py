"""Compare tokenizers by the number of tokens that they use to encode a text.

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
    """Return a Markdown table that compares tokenizers on UTF-8 texts. Words are separated by whitespace."""
    num_bytes, num_words = sum(map(len, texts)), sum(len(text.decode().split()) for text in texts)
    if num_words == 0:
        raise UserError("--input contains no words. Use other files.")
    lines = [
        f"{len(texts):,} documents, {num_bytes:,} bytes, {num_words:,} words",
        "",
        "| tokenizer | vocabulary | tokens | bytes per token | tokens per word |",
        "|---|---:|---:|---:|---:|",
    ]
    for spec in specs:
        tokenizer = load_tokenizer(spec)
        tokens = sum(map(len, tokenizer.encode_batch(texts)))
        ratios = f"{num_bytes / tokens:.3f} | {tokens / num_words:.3f}"
        lines.append(f"| {spec} | {tokenizer.vocab_size:,} | {tokens:,} | {ratios} |")
    return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class CompareArgs:
    """The command line: each field is a flag, and its comment is the help."""

    # tokenizers: gpt2, or paths to tokenizer.json files
    tokenizers: Annotated[Positional[tuple[str, ...]], required("TOKENIZER [TOKENIZER ...]")] = ()
    # files, directories, glob patterns or URLs of text: .parquet, .jsonl or .txt; .jsonl and .txt may be
    # compressed (.gz, .xz, .zst)
    input: Annotated[tuple[str, ...], metavar("PATH [PATH ...]")]
    text_column: Name = "text"  # column of a parquet file, or key of a JSON object, that contains the text
    # number of bytes of text to encode, from the start of the input
    max_bytes: Annotated[int, metavar("BYTES")] = 10_000_000


def main() -> None:
    args = parse_arguments(CompareArgs, "python -m tools.compare_tokenizers", __doc__)
    # tokenizers that follow --input are parsed as its values; their names cannot be those of text files
    misplaced = [path for path in args.input if path == "gpt2" or path.endswith(".json")]
    specs = [*args.tokenizers, *misplaced]
    if not specs:
        raise UserError("No tokenizers given. Use gpt2, or paths to tokenizer.json files.")
    source = sources.find("files", tuple(path for path in args.input if path not in misplaced), (args.text_column,))
    texts, remaining = [], args.max_bytes
    for text in sources.read_first_documents(source, args.max_bytes):
        texts.append(text.encode()[:remaining].decode(errors="ignore").encode())  # drops an incomplete character
        remaining -= len(texts[-1])
    print(compare(specs, texts))


if __name__ == "__main__":
    run(main)
