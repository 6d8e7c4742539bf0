"""Draw one or several runs, from their log.csv alone.

    python -m tools.plot out/gpt2                          # writes out/gpt2/plot.png
    python -m tools.plot out/gpt2 out/modern --out compare.png --x tokens

The picture has losses, HellaSwag, learning rate, gradient norm and speed.
"""

from pathlib import Path
from typing import Literal

from babygpt.errors import UserError, run
from babygpt.training.plots import plot


def main() -> None:
    import tyro

    def command(
        runs: tyro.conf.Positional[tuple[Path, ...]],
        /,
        *,
        out: Path | None = None,
        x: Literal["steps", "tokens"] = "steps",
    ) -> None:
        """Draws one or several runs into a PNG.

        Args:
            runs: Folders of runs (out/NAME).
            out: The picture [plot.png in the folder of the first run].
            x: What the losses stand against.
        """
        if not runs:
            raise UserError("name at least one run: python -m tools.plot out/NAME")
        for path in runs:
            if not (path / "log.csv").exists():
                raise UserError(f"there is no run at {path}: it has no log.csv.")
        plot(list(runs), out or runs[0] / "plot.png", x)
        print(out or runs[0] / "plot.png")

    tyro.cli(command, prog="python -m tools.plot", description=__doc__)


if __name__ == "__main__":
    run(main)
