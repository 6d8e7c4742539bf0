"""Run the mistakes of tests/support/first_hour.py as a user would, and write what each of them prints.

python benchmarks/first_hour.py [--out results/first-hour/mistakes.md]
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support.first_hour import MISTAKES, PREPARE, make_files  # noqa: E402

from benchmarks.table import machine, write_table  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    lines = [f"`python benchmarks/first_hour.py`, {machine()}", ""]
    with tempfile.TemporaryDirectory() as directory:
        make_files(Path(directory))
        environment = os.environ | {"COLUMNS": "110"}
        subprocess.run([sys.executable, "fineweb.py", *PREPARE], cwd=directory, check=True, capture_output=True)
        for command, _ in MISTAKES:
            line = command.replace("python", f'"{sys.executable}"', 1)
            done = subprocess.run(
                line, shell=True, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                env=environment,
            )  # fmt: skip
            shown = [text for text in done.stdout.replace(directory, "DIRECTORY").splitlines() if "it/s" not in text]
            output = "\n".join(text for text in shown if text.strip() and "?B/s" not in text)
            lines += ["```", f"$ {command}", output, f"exit code {done.returncode}", "```", ""]
    write_table(lines[:-1], options.out)


if __name__ == "__main__":
    main()
