"""Test a chat server with concurrent and malformed requests, slow clients, and clients that disconnect.

    python benchmarks/chat_server.py out/demo-sft

Starts `python chat.py MODEL --serve 0`. Each concurrent request has its own message and seed, half of them stream, and
the answer must be the reply that the same model generates in this process. A request that gets a 503, because the queue
is full, is retried. A malformed request must get an error in OpenAI's format or a valid answer, or its connection must
be closed. Slow clients send a part of a request and then nothing. Other clients disconnect at the same time, in the
middle of a stream or while their requests wait. After that, and while the slow clients are connected, another request
must be answered within two seconds of its usual time. The server must also stay below a memory limit, leave no
additional threads, and print nothing to stderr. The exit code is 1 if a check fails. Requires Linux: memory and threads
are read from /proc.
"""

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support.chat_server import PATH, Client, check_responses, malformed_request, streamed_text  # noqa: E402

from babygpt.chat.reply import reply  # noqa: E402
from babygpt.chat.template import ChatTemplate  # noqa: E402
from babygpt.nn.generation import SamplingParams  # noqa: E402
from benchmarks.table import machine, write_table  # noqa: E402
from model import GPT  # noqa: E402

CONCURRENT, MALFORMED, SLOW, VANISHING = 200, 500, 50, 50  # numbers of requests or clients
TOKENS = 16  # maximum number of tokens of an answer
LONG = {"max_tokens": 1000, "temperature": 2.0, "top_k": 1000}  # of the requests of vanishing clients: long answers
SECONDS = 60  # for each answer, and until the threads have ended; the server waits 30 seconds for a slow request
DELAY = 2.0  # seconds by which slow and vanished clients may delay another request
MEMORY_MIB = 300  # additional memory that the server may use


@contextmanager
def served(model: str) -> Iterator[tuple[Client, int, Path]]:
    """Start the server, and yield a client, the process id of the server, and the file with its stderr."""
    flags = ("--device", "cpu", "--dtype", "float32", "--temperature", 0.8, "--top-k", 50, "--max-new-tokens", TOKENS)
    command = [sys.executable, str(ROOT / "chat.py"), model, "--serve", "0", *map(str, flags)]
    with tempfile.TemporaryDirectory() as directory:
        errors = Path(directory) / "errors"
        with (
            errors.open("wb") as file,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True) as process,
        ):
            try:
                assert process.stdout is not None
                found = re.search(r"http://127.0.0.1:(\d+)", process.stdout.readline())
                if found is None:
                    sys.exit(f"error: chat.py does not start:\n{errors.read_text()}")
                client = Client(int(found[1]))
                client.timeout = SECONDS
                yield client, process.pid, errors
            finally:
                process.terminate()


def status_of(process: int, name: str) -> int:
    """Return a field of /proc/PID/status: Threads, or VmRSS or VmHWM in MiB."""
    text = Path(f"/proc/{process}/status").read_text()
    value = int(re.search(rf"^{name}:\s+(\d+)", text, re.M)[1])  # type: ignore[index]
    return value if name == "Threads" else value // 1024


def fields_of(number: int) -> dict[str, Any]:
    message = {"role": "user", "content": f"Give me {number} words about the number {number * 7919}."}
    return {"messages": [message], "seed": number, "max_tokens": TOKENS}


def expected_replies(spec: str) -> list[str]:
    """Return the reply to each concurrent request, computed in this process."""
    model = GPT.from_pretrained(spec)
    template = ChatTemplate(model.tokenizer)
    params = [SamplingParams(max_new_tokens=TOKENS, temperature=0.8, top_k=50, seed=i) for i in range(CONCURRENT)]
    return ["".join(reply(model, template, fields_of(i)["messages"], p)) for i, p in enumerate(params)]


def send(client: Client, number: int) -> tuple[int, str]:
    """Return the status of a request, and the text of the answer."""
    if number % 2:
        status, content = client.complete(**fields_of(number))
        return status, content["choices"][0]["message"]["content"] if status == 200 else str(content)
    response = client.request("POST", PATH, json.dumps(fields_of(number) | {"stream": True}).encode())
    data: bytes = response.data  # type: ignore[attr-defined]
    return response.status, streamed_text(data) if response.status == 200 else data.decode()


def ask(client: Client, number: int) -> tuple[str, float, int]:
    """Return the answer to a request, the seconds until it is complete, and how often it was retried."""
    start, num_retries = time.monotonic(), 0
    while (sent := send(client, number))[0] == 503:
        num_retries += 1
        time.sleep(0.5)
    return sent[1], time.monotonic() - start, num_retries


def vanish(client: Client, number: int) -> None:
    """Send a request with a long answer, and close the connection at its first byte, but after at most one second."""
    with client.connect() as connection:
        connection.sendall(client.post_bytes(**fields_of(number) | LONG | {"stream": number % 2 == 0}))
        connection.settimeout(1)
        with suppress(TimeoutError):
            connection.recv(1)


def in_threads(function: Callable, number: int, items: Iterable) -> tuple[list, float]:
    """Return function(item) for each item, computed by `number` threads, and the seconds that this takes."""
    start = time.monotonic()
    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(function, items)), time.monotonic() - start


def measure(client: Client, process: int, expected: list[str]) -> Iterator[tuple[str, str, bool]]:
    """Yield a name, a result, and whether the check passed."""
    _, alone, _ = ask(client, 1)
    time.sleep(3)  # until the thread of the connection has ended
    threads, before = status_of(process, "Threads"), status_of(process, "VmRSS")
    Path(f"/proc/{process}/clear_refs").write_text("5")  # resets VmHWM, the peak

    answers, seconds = in_threads(lambda i: ask(client, i), CONCURRENT, range(CONCURRENT))
    num_correct = sum(text == correct for (text, _, _), correct in zip(answers, expected, strict=True))
    slowest, num_retries = max(answer[1] for answer in answers), sum(answer[2] for answer in answers)
    result = f"{num_correct} answers are correct; {seconds:.1f} s in total, {slowest:.1f} s for the slowest"
    yield f"{CONCURRENT} concurrent requests", f"{result}; {num_retries:,} retries", num_correct == CONCURRENT

    rng = random.Random(0)
    requests = [malformed_request(rng, client) for _ in range(MALFORMED)]
    received, seconds = in_threads(client.exchange, 64, requests)
    responses = [check_responses(*pair) for pair in zip(requests, received, strict=True)]
    counts = Counter(str(found[0][0]) if found else "none" for found in responses)
    result = ", ".join(f"{status}: {number}" for status, number in sorted(counts.items()))
    is_varied = {"200", "400", "403", "404", "411", "501"} <= counts.keys() and counts["none"] < MALFORMED / 2
    yield f"{MALFORMED} malformed requests, by status of the first response", f"{result}; {seconds:.1f} s", is_varied

    with ExitStack() as connections:
        for i in range(SLOW):
            data = client.post_bytes(**fields_of(i))
            connections.enter_context(client.connect()).sendall(data[: rng.randrange(1, len(data))])
        in_threads(lambda i: vanish(client, i), VANISHING, range(VANISHING))
        text, seconds, _ = ask(client, 1)
    yield (
        f"a request next to {SLOW} slow clients, after {VANISHING} have vanished",
        f"{'correct' if text == expected[1] else 'wrong'} after {seconds:.2f} s ({alone:.2f} s without them)",
        text == expected[1] and seconds < alone + DELAY,
    )
    deadline = time.monotonic() + SECONDS
    while (now := status_of(process, "Threads")) > threads and time.monotonic() < deadline:
        time.sleep(0.1)
    yield "threads before and after", f"{threads}, {now}", now <= threads
    peak, after = status_of(process, "VmHWM"), status_of(process, "VmRSS")
    yield "memory before, peak, after (MiB)", f"{before}, {peak}, {after}", peak < before + MEMORY_MIB
    text, _, _ = ask(client, 2)
    is_correct = text == expected[2]
    yield "a request at the end", "correct" if is_correct else "wrong", is_correct


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="chat model")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    lines = [f"`python benchmarks/chat_server.py {' '.join(sys.argv[1:])}`, {machine()}", "", "| check | result |"]
    lines.append("|---|---|")
    problems = []
    expected = expected_replies(options.model)
    with served(options.model) as (client, process, errors):
        try:
            for name, result, passed in measure(client, process, expected):
                lines.append(f"| {name} | {result} |")
                print(lines[-1], file=sys.stderr, flush=True)
                problems += [] if passed else [name]
        finally:
            printed = errors.read_text()
            print(printed, file=sys.stderr)
        lines.append(f"| stderr of the server | {counted_lines(printed)} |")
        problems += ["stderr of the server"] if printed else []
    write_table(lines, options.out)
    if problems:
        sys.exit(f"error: failed: {', '.join(problems)}")


def counted_lines(text: str) -> str:
    return f"{len(text.splitlines())} lines" if text else "empty"


if __name__ == "__main__":
    main()
