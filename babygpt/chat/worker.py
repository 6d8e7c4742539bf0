"""The thread that computes the answers of the server, one at a time, behind a bounded queue."""

import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from queue import Empty, SimpleQueue

from babygpt.chat.completions import CompletionRequest, before_stop
from babygpt.chat.template import Conversation
from babygpt.nn.generation import SamplingParams

Generate = Callable[[Conversation, SamplingParams, Callable[[], bool]], Iterator[str]]


class Job:
    """The computation of one answer: the worker puts text into its queue, and the thread of the client takes it out."""

    def __init__(self, request: CompletionRequest):
        self.request, self.is_cancelled = request, False
        self.queue: SimpleQueue[str | None] = SimpleQueue()  # None: the end
        # known at the end
        self.num_tokens, self.finish_reason, self.error = 0, "stop", ""

    def compute(self, generate: Generate) -> None:
        """Generate the answer up to a stop string, and put its text into the queue."""
        if self.is_cancelled:
            return
        request, text, num_sent = self.request, "", 0
        for piece in generate(request.messages, request.params, lambda: self.is_cancelled):
            text += piece
            self.num_tokens = min(self.num_tokens + 1, request.params.max_new_tokens)
            end, is_stopped = before_stop(text, num_sent, request.stop)
            if end > num_sent:
                self.queue.put(text[num_sent:end])
                num_sent = end
            if is_stopped or self.is_cancelled:
                return
        self.queue.put(text[num_sent:])
        if self.num_tokens == request.params.max_new_tokens:
            self.finish_reason = "length"

    def wait(self, seconds: float) -> tuple[str, bool]:
        """Wait for text. Return all text in the queue, "" if there is none in this time, and whether it is the end."""
        text, is_last = "", False
        with suppress(Empty):
            while not is_last:
                piece = self.queue.get_nowait() if text else self.queue.get(timeout=seconds)
                text, is_last = text + (piece or ""), piece is None
        return text, is_last


class Worker:
    """Computes jobs in the order of their submission. At most `max_waiting` of them wait."""

    def __init__(self, generate: Generate, max_waiting: int):
        self.generate, self.max_waiting = generate, max_waiting
        self.jobs: deque[Job] = deque()  # the first is being computed
        self.condition, self.is_closed = threading.Condition(), False
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def submit(self, job: Job) -> bool:
        """Append a job to the queue, and return whether it was accepted."""
        with self.condition:
            if self.is_closed or len(self.jobs) > self.max_waiting:
                return False
            self.jobs.append(job)
            self.condition.notify()
            return True

    def cancel(self, job: Job) -> None:
        """Stop a job if it is being computed, or remove it from the queue."""
        with self.condition:
            job.is_cancelled = True
            if job in self.jobs and job is not self.jobs[0]:
                self.jobs.remove(job)

    def close(self) -> None:
        """Cancel all jobs, and wait until the thread has ended, which takes one token."""
        with self.condition:
            self.is_closed = True
            for job in self.jobs:
                job.is_cancelled = True
            self.condition.notify()
        self.thread.join(timeout=10)

    def run(self) -> None:
        while job := self.next_job():
            try:
                job.compute(self.generate)
            except BaseException as error:  # also a panic of the tokenizers library
                traceback.print_exc()
                reason = f"{type(error).__name__}: {error!s:.200}"
                job.error = f"The answer cannot be computed ({reason}). See the terminal of the server."
            self.finish(job)
        for job in list(self.jobs):  # those that wait when the worker is closed
            self.finish(job)

    def next_job(self) -> Job | None:
        """Return the first job, as soon as there is one, or None if the worker is closed."""
        with self.condition:
            self.condition.wait_for(lambda: self.jobs or self.is_closed)
            return None if self.is_closed else self.jobs[0]

    def finish(self, job: Job) -> None:
        with self.condition:
            self.jobs.remove(job)
            if self.is_closed:
                job.error = job.error or "The server is shutting down."
        job.queue.put(None)
