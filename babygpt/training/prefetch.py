"""Read the batches of a run ahead in a background thread."""

import queue
import threading
from abc import ABC, abstractmethod
from contextlib import suppress
from typing import Any, Generic, TypeVar

import torch

BatchType = TypeVar("BatchType")


class Prefetcher(ABC, Generic[BatchType]):
    """An endless iterator over batches, from `position` on. A background thread reads up to two batches ahead.

    A subclass implements `read_batch`. The next batch starts at the `end` of the one before.
    """

    def __init__(self, position: Any, device: torch.device | None = None):
        """Start the thread. If `device` is CUDA, `cuda_device` is set, and `read_batch` can use pinned memory."""
        self.cuda_device = device if device is not None and device.type == "cuda" else None
        self.batches: queue.Queue[Any] = queue.Queue(maxsize=2)
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._read_ahead, args=(position,), daemon=True, name="dataloader")
        self.thread.start()

    @abstractmethod
    def read_batch(self, position: Any) -> BatchType:
        """Return the first batch at or after `position`."""

    def __iter__(self) -> "Prefetcher[BatchType]":
        return self

    def __next__(self) -> BatchType:
        batch = self.batches.get()
        if isinstance(batch, BaseException):
            raise batch
        return batch

    def close(self) -> None:
        """Stop the background thread."""
        self.stopped.set()
        while self.thread.is_alive():
            with suppress(queue.Empty):
                self.batches.get(timeout=0.01)  # make room, so that a blocked `put` returns

    def _read_ahead(self, position: Any) -> None:
        try:
            if self.cuda_device is not None:  # otherwise a new thread uses device 0, also to pin memory
                torch.cuda.set_device(self.cuda_device)
            while not self.stopped.is_set():
                batch: Any = self.read_batch(position)
                position = batch.end
                self.batches.put(batch)
        except BaseException as error:  # `__next__` raises it in the main thread
            self.batches.put(error)
