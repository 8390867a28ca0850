"""Sharing work over the processes of a run, if there are several.

Batches are made before they are shared out, so that a result depends on how many processes there are only by the order
in which floats are added up.
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
    """How many processes share the run; 1 where `torch.distributed` isn't set up."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    return dist.get_rank() if num_processes() > 1 else 0


def own_share(items: Iterable[T]) -> Iterator[T]:
    """Every n-th item, n the number of processes; together the processes get each item once."""
    return islice(items, process_index(), None, num_processes())


def sum_over_processes(values: Tensor) -> Tensor:
    """Adds up integers or floats of all processes, in place, on the device that the backend works on."""
    if num_processes() > 1:
        dist.all_reduce(values)
    return values


def own_part(parameter: nn.Parameter) -> Tensor:
    """What this process holds of a parameter: all of it, or its part under FSDP2 and ZeRO-3."""
    return parameter.to_local() if isinstance(parameter, DTensor) else getattr(parameter, "ds_tensor", parameter)


def check_whole(model: nn.Module, what: str) -> None:
    """Refuses a model whose weights are split over processes.

    Raises:
        UserError: saying what the whole model is needed for.
    """
    for parameter in model.parameters():
        # ZeRO-3 leaves an empty tensor where it has split a weight, and its size beside it.
        if isinstance(parameter, DTensor) or getattr(parameter, "ds_numel", parameter.numel()) != parameter.numel():
            raise UserError(
                f"model: {what} needs all weights in each process, and FSDP or ZeRO-3 has split them; do it in a run "
                "on one GPU or under DDP (recipes/accelerate/single_gpu.yaml, ddp.yaml)"
            )


def in_order(own: list[T]) -> list[T]:
    """From each process's results of its `own_share` to the results of all items, in their order, everywhere."""
    if num_processes() == 1:
        return own
    shares: list[list[T]] = [[] for _ in range(num_processes())]
    dist.all_gather_object(shares, own)
    total = sum(len(share) for share in shares)
    return [shares[index % len(shares)][index // len(shares)] for index in range(total)]
