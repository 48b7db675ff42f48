"""Several processes at one task, on a launched `lightning_fabric.Fabric`.

    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    run = pv.fit(model, guide, data, fabric=fabric)

The same script runs under `torchrun`, SLURM, or by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from pyro_vae.pair import Batch

Result = TypeVar("Result")


def summed(tensor: Tensor, fabric: Any) -> Tensor:
    """The sum of a tensor over processes, on each of them.

    Raises:
        RuntimeError: another process has stopped.
    """
    try:
        return fabric.all_reduce(tensor, reduce_op="sum")
    except RuntimeError as error:
        raise RuntimeError(
            f"process {fabric.global_rank} of {fabric.world_size} waits for another that has "
            "stopped\n  kept:     the last checkpoint, if the fit has a folder"
            "\n  try:      look at the other process's error, then the same command again: it "
            "goes on from the checkpoint"
        ) from error


def sharded(work: Callable[[Batch, int], Result], batch: Batch, fabric: Any) -> list[Result]:
    """Each process works on a block of the rows; every one gets all results, in order.

    Args:
        work: called with the block and the process's rank, as a seed of its own, such as
            `lambda block, rank: pv.bounds(model, guide, block, seed=rank)`.
        batch: tensors of `B` rows, the same in each process.
        fabric: launched; `None` works on all rows here.

    Returns:
        A result for each process; `Bounds.joined` and `Draws.joined` put them together.

    Raises:
        ValueError: fewer rows than processes.

    Example:
        >>> sharded(lambda block, rank: block[0].sum(), (torch.ones(4, 2),), None)
        [tensor(8.)]
    """
    rank, count = place(fabric)
    if len(batch[0]) < count:
        raise ValueError(f"{len(batch[0])} rows cannot occupy {count} processes")
    blocks = list(zip(*(part.tensor_split(count) for part in batch), strict=True))
    return gathered(work(blocks[rank], rank), fabric)


def place(fabric: Any) -> tuple[int, int]:
    """The rank of this process, and how many there are."""
    return (0, 1) if fabric is None else (fabric.global_rank, fabric.world_size)


def gathered(mine: Result, fabric: Any) -> list[Result]:
    """What each process has, on every one of them."""
    if fabric is None:
        return [mine]
    results: list[Any] = [None] * fabric.world_size
    torch.distributed.all_gather_object(results, mine)
    return results
