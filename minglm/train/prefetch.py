"""Batches prepared by a background thread while the device computes."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import Any

import torch

from minglm.data.stream import Batch, RowStream


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy a batch to `device`; from pinned memory, without the host waiting for it."""
    return Batch(*(getattr(batch, field.name).to(device, non_blocking=True) for field in fields(batch)))


class Prefetcher:
    """Deals this rank's micro-batches of a stream, reading the next one ahead in a thread.

    `state_dict` is the stream's as of the last micro-batch dealt, whatever was read ahead. An exception in the thread is
    raised by the `next` that wanted its micro-batch.
    """

    def __init__(self, stream: RowStream, sequences: int, device: torch.device, rank: int = 0, ranks: int = 1):
        self._stream, self._sequences, self._device = stream, sequences, device
        self._rank, self._ranks = rank, ranks
        self._state = stream.state_dict()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._ahead = self._thread.submit(self._read)

    def next(self) -> Batch:
        batch, self._state = self._ahead.result()
        self._ahead = self._thread.submit(self._read)
        return to_device(batch, self._device)

    def state_dict(self) -> dict[str, Any]:
        return self._state

    def close(self) -> None:
        self._thread.shutdown()

    def _read(self) -> tuple[Batch, dict[str, Any]]:
        batch = self._stream.next(self._sequences, self._rank, self._ranks)
        if self._device.type == "cuda":  # only pinned memory is copied while the host goes on
            batch = Batch(*(getattr(batch, field.name).pin_memory() for field in fields(batch)))
        return batch, self._stream.state_dict()
