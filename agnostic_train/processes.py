"""Sharing work among the processes of a run.

Batches are made before they are shared out, so that the number of processes affects a result only through the order in
which floats are summed. The exception are the losses that transformers itself evaluates during a training: each is a
mean over batches, which differ with the number of processes.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from agnostic_train.errors import UserError

T = TypeVar("T")


def num_processes() -> int:
    """Returns how many processes share the run; 1 if `torch.distributed` isn't initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    return dist.get_rank() if num_processes() > 1 else 0


def own_share(items: Iterable[T]) -> Iterator[T]:
    """Yields this process's share: every n-th item, where n is the number of processes. No item is in two shares."""
    return islice(items, process_index(), None, num_processes())


def sum_over_processes(values: Tensor) -> Tensor:
    """Sums integers or floats over all processes, in place. They must be on a device that the backend supports."""
    if num_processes() > 1:
        dist.all_reduce(values)
    return values


def own_part(parameter: nn.Parameter) -> Tensor:
    """Returns what this process holds of a parameter: all of it, or its shard under FSDP2 and ZeRO-3."""
    return parameter.to_local() if isinstance(parameter, DTensor) else getattr(parameter, "ds_tensor", parameter)


def check_whole(model: nn.Module, what: str) -> None:
    """Checks that each process holds all of the model's weights.

    Args:
        what: the operation that needs the whole model, for the error message.

    Raises:
        UserError: FSDP or ZeRO-3 has split the weights.
    """
    for parameter in model.parameters():
        # ZeRO-3 replaces a weight that it has split by an empty tensor, and keeps the full size in `ds_numel`.
        if isinstance(parameter, DTensor) or getattr(parameter, "ds_numel", parameter.numel()) != parameter.numel():
            raise UserError(
                f"model: {what} needs all weights in each process, and FSDP or ZeRO-3 has split them; do it in a run "
                "on one GPU or under DDP (recipes/accelerate/single_gpu.yaml, ddp.yaml)"
            )


def of_first_process(value: T) -> T:
    """Returns the first process's value on every process."""
    if num_processes() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def gather_in_order(own: list[T]) -> list[T]:
    """Gathers the results of every process's `own_share` and returns them on each process, in the items' order."""
    if num_processes() == 1:
        return own
    shares: list[list[T]] = [[] for _ in range(num_processes())]
    dist.all_gather_object(shares, own)
    total = sum(len(share) for share in shares)
    return [shares[index % len(shares)][index // len(shares)] for index in range(total)]
