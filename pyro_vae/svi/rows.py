"""The rows of a fit, gathered batch by batch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pyro_vae.data import Dataset
from pyro_vae.pair import Batch

PROBE = 1000
"""Rows that a digest reads."""


class Rows:
    """Training rows in a fixed random order for each epoch, and validation rows.

    Args:
        data: a data set, or one batch that is its own validation.
        seed: of the orders.
        ranks: `(rank, count)` of the processes that share each batch.
    """

    def __init__(self, data: Dataset | Batch, seed: int, ranks: tuple[int, int]) -> None:
        self.train: Batch = data.train if isinstance(data, Dataset) else data
        self.validation: Batch = data.validation if isinstance(data, Dataset) else data
        self.per_batch: Callable[[Tensor], Tensor] | None = (
            data.per_batch if isinstance(data, Dataset) else None
        )
        self.seed, (self.rank, self.count) = seed, ranks
        self.device = torch.device("cpu")

    def __len__(self) -> int:
        return len(self.train[0])

    def to(self, device: torch.device) -> None:
        """Work on a device: training rows move there if they fill less than half of it."""
        self.device = device
        self.validation = tuple(part.to(device) for part in self.validation)
        size = sum(part.nbytes for part in self.train)
        if device.type != "cuda" or 2 * size < torch.cuda.mem_get_info(device)[0]:
            self.train = tuple(part.to(device) for part in self.train)

    def take(self, index: Tensor) -> Batch:
        """A batch of training rows, as it is fitted."""
        x, *others = (part.index_select(0, index).to(self.device) for part in self.train)
        return (x if self.per_batch is None else self.per_batch(x), *others)

    def first(self, count: int) -> Batch:
        """The first rows of all, at most so many, as they are fitted."""
        return self.take(torch.arange(min(count, len(self)), device=self.train[0].device))

    def batches(self, epoch: int, size: int, skip: int = 0) -> Iterator[tuple[Batch, float]]:
        """The batches of an epoch after the first `skip`, each with this process's share of it.

        The order is a function of seed and epoch alone.
        """
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
        order = torch.randperm(len(self), generator=generator).to(self.train[0].device)
        for index in order.split(size)[skip:]:
            mine = index[self.rank :: self.count] if self.count > 1 else index
            yield self.take(mine), len(mine) / len(index)

    def where(self, epoch: int, size: int, number: int) -> list[int]:
        """The rows of a batch, counted from 0."""
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
        order = torch.randperm(len(self), generator=generator)
        return order.split(size)[number].tolist()

    def digest(self) -> str:
        """What tells these rows from others: shapes, and the first rows."""
        digest = hashlib.sha256(str([tuple(part.shape) for part in self.train]).encode())
        for part in (*self.train, *self.validation):
            digest.update(part[:PROBE].cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()
