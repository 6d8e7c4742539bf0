"""What the benchmarks end with: their tables on the screen and, if asked for, in a file."""

from pathlib import Path


def show(lines: list[str], out: Path | None) -> None:
    """Prints lines of Markdown, and writes them to `out` if that is given."""
    text = "\n".join(lines) + "\n"
    print(text)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
