"""Output of the benchmarks: Markdown on the standard output and, optionally, in a file."""

from pathlib import Path


def write_table(lines: list[str], out: Path | None) -> None:
    """Print lines of Markdown and also write them to `out`, if given."""
    text = "\n".join(lines) + "\n"
    print(text)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
