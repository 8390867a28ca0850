"""Batches of token ids: their checks, and what a model is given of them."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers.utils import logging

from agnostic_train.processes import own_share

logger = logging.get_logger(__name__)

Batch = Mapping[str, Tensor]


def find_device(model: nn.Module) -> torch.device:
    """Returns the device of the model's inputs: its embeddings', or where offloaded embeddings are fetched to."""
    embeddings = model.get_input_embeddings()
    fetched_to = getattr(getattr(embeddings, "_hf_hook", None), "execution_device", None)  # set by accelerate
    if embeddings.weight.is_meta and fetched_to is not None:
        return torch.device(fetched_to)
    return embeddings.weight.device


def check_corpora(corpora: object) -> None:
    """Raises `TypeError` unless `corpora` maps languages to batches."""
    if not isinstance(corpora, Mapping):
        raise TypeError(
            f"corpora: expected batches by language, such as {{'sw': batches}}, got {type(corpora).__name__}"
        )
    for language, batches in corpora.items():
        if isinstance(batches, Mapping):
            raise TypeError(f"corpora: {language!r} has one batch where several were expected, such as a list of it")


def check_tokens(model: nn.Module, input_ids: Tensor) -> None:
    """Raises `ValueError` that names a token without an embedding; an error on a GPU wouldn't name it."""
    size = model.get_input_embeddings().weight.shape[0]
    smallest, largest = (int(it) for it in input_ids.long().aminmax())
    if smallest < 0 or largest >= size:
        token = smallest if smallest < 0 else largest
        raise ValueError(f"input_ids: token {token} is beyond the model's vocabulary of {size}")


def own_sentences(batches: Iterable[Batch]) -> int | None:
    """Returns the number of sentences in this process's share of the batches; None if they aren't a sequence.

    Batches without `input_ids` aren't counted: the forward pass refuses them by name.
    """
    if not isinstance(batches, Sequence):
        return None
    return sum(len(batch.get("input_ids", ())) for batch in own_share(batches) if isinstance(batch, Mapping))


def check_batch(model: nn.Module, batch: Batch) -> None:
    """Checks that a batch is valid input for the model.

    Raises:
        ValueError: `input_ids` is empty, not two-dimensional, or not of integers; a mask has another shape; or, unless
            the batch is on a GPU already, a token is beyond the model's vocabulary, `attention_mask` has other values
            than 0 and 1, or `position_ids` start anew within a row.
        TypeError: `batch` isn't a mapping with `input_ids`, or holds something other than tensors.
    """
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        received = f"one with {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else type(batch).__name__
        raise TypeError(f"batch: expected a mapping with input_ids, got {received}; batches_of makes batches")
    ids = batch["input_ids"]
    masks = {name: batch.get(name) for name in ("attention_mask", "special_tokens_mask")}
    for name, value in {"input_ids": ids, **masks}.items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(
                f"{name}: expected a tensor, got {type(value).__name__}; tokenizers give them with "
                "return_tensors='pt', and batches_of makes batches"
            )
    shape = tuple(ids.shape)
    if len(shape) != 2 or not ids.numel() or ids.is_floating_point():
        raise ValueError(f"input_ids: expected integers of shape (batch, length), not empty, got {ids.dtype} {shape}")
    for name, mask in masks.items():
        if mask is not None and mask.shape != shape:
            raise ValueError(f"{name}: expected the shape of input_ids, {shape}, got {tuple(mask.shape)}")
    # Not on a GPU, where reading the values would wait for the device.
    if ids.device.type == "cpu":
        check_tokens(model, ids)
    mask, positions = masks["attention_mask"], batch.get("position_ids")
    if mask is not None and mask.device.type == "cpu" and ((mask != 0) & (mask != 1)).any():
        raise ValueError("attention_mask: expected 0 and 1; put each sentence of a packed row into a row of its own")
    if isinstance(positions, Tensor) and positions.shape == shape and _is_packed(positions, mask):
        raise ValueError("position_ids: several sentences are packed into one row; put each into a row of its own")


def _is_packed(positions: Tensor, mask: Tensor | None) -> bool:
    """Whether positions fall from one real token to the next; padding may have any. False for tensors on a GPU."""
    real = torch.ones_like(positions) if mask is None else mask
    if {positions.device.type, real.device.type} != {"cpu"}:
        return False
    return bool(((positions.diff(dim=-1) < 0) & real[:, 1:].bool() & real[:, :-1].bool()).any())


def model_inputs(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Makes the forward arguments for a padded batch, on the model's input device.

    Positions count real tokens only, so that a sentence's result doesn't depend on how it was padded.

    Args:
        batch: `input_ids` and, unless every token is real, `attention_mask`, both (batch, length).

    Raises:
        ValueError, TypeError: as by `check_batch`.
    """
    check_batch(model, batch)
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    device = find_device(model)
    # Copied without waiting for a GPU that may still be busy with the last batch.
    non_blocking = device.type == "cuda"
    input_ids = ids.to(device, torch.int64, non_blocking=non_blocking)
    mask = torch.ones_like(input_ids) if mask is None else mask.to(device, non_blocking=non_blocking).bool().long()
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": input_ids, "attention_mask": mask, "position_ids": position_ids, "use_cache": False}


def real_and_counted(inputs: Mapping[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
    """Returns which tokens are real, and which of them count in norms: both (batch, length) bool, on the input device.

    Args:
        inputs: what `model_inputs` made of the batch.

    Raises:
        ValueError: a sentence is padding alone, but would count as one. Not checked if the batch is on a GPU already.
    """
    mask = batch.get("attention_mask")
    if mask is not None and mask.device.type == "cpu" and not mask.any(1).all():
        raise ValueError("attention_mask: a sentence of the batch is padding alone; leave it out")
    real = inputs["attention_mask"].bool()
    special = batch.get("special_tokens_mask")
    if special is None:
        return real, real
    # Not on a GPU, where reading the values would wait for the device.
    on_cpu = special.device.type == "cpu" and (mask is None or mask.device.type == "cpu")
    if on_cpu and (special.bool() | (False if mask is None else mask == 0)).all(1).any():
        logger.warning_once(
            "special_tokens_mask: a sentence has special tokens alone (1 in the mask), so no neuron has an impact there"
        )
    return real, real & ~special.to(real.device, non_blocking=real.is_cuda).bool()
