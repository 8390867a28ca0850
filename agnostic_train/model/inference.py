"""Running a model on batches and leaving it as it was, for detection and perplexity."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from agnostic_train.processes import check_whole, own_share

logger = logging.get_logger(__name__)

Batch = Mapping[str, Tensor]

# Most of what is changed and restored holds for all threads: two that overlap would restore each other's changes.
_ONE_AT_A_TIME = RLock()


@contextmanager
def left_as_found(model: nn.Module) -> Iterator[None]:
    """Runs the block in evaluation mode without gradients, then restores training flags and torch's random states.

    The model computes in its weights' own dtype, see `full_precision` and `without_autocast`, and compiled parts run
    uncompiled, see `uncompiled`. A model in training may hold modules that are kept in evaluation mode, so each
    module's own flag is restored. Rotary embeddings with dynamic scaling keep the frequencies of the longest sentence
    so far in their buffers, which are restored, too.

    Raises:
        UserError: the weights are split over processes. Such a model deadlocks if processes have different numbers of
            batches.
    """
    check_whole(model, "running a model to measure it")
    with _ONE_AT_A_TIME:
        modes = [(module, module.training) for module in model.modules()]
        buffers = [(module, dict(module._buffers), _longest_seen(module)) for module, _ in modes if module._buffers]
        devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
        forked = torch.random.fork_rng(devices=sorted(devices, key=str))
        with forked, torch.no_grad(), full_precision(), without_autocast(model), uncompiled():
            model.eval()
            try:
                yield
            finally:
                for module, training in modes:
                    module.training = training
                for module, own, longest in buffers:
                    module._buffers.update(own)
                    vars(module).update(longest)


def _longest_seen(module: nn.Module) -> dict[str, object]:
    """The length up to which a rotary embedding with dynamic scaling has computed its frequencies."""
    return {name: value for name, value in vars(module).items() if name.endswith("max_seq_len_cached")}


@contextmanager
def uncompiled() -> Iterator[None]:
    """Runs compiled modules uncompiled inside the block: they would ignore hooks registered after compilation."""
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def full_precision() -> Iterator[None]:
    """Keeps float32 products from being rounded inside the block, on GPUs to TF32, on CPUs to TF32 or bfloat16.

    TF32 keeps 10 of 23 mantissa bits, too few for impacts and their proven bounds. `tf32: true` and
    `torch_compile: true` in TrainingArguments enable it for the whole process.
    """
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    found = [_own_precision(backend) for backend in backends]
    older = _older_setting()
    if older is not None:
        torch.set_float32_matmul_precision("highest")
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older)
        for backend, precision in zip(backends, found, strict=True):
            backend.fp32_precision = precision


def _older_setting() -> str | None:
    """The setting of torch's older interface; None if it refuses to read what was set through the newer one."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        pass
    try:
        return "high" if torch.backends.cuda.matmul.allow_tf32 else "highest"
    except RuntimeError:
        return None


def _own_precision(backend: Any) -> str:
    """A backend's own setting, "none" if it follows that of all backends, which may change later."""
    effective = backend.fp32_precision
    backend.fp32_precision = "none"
    inherited = backend.fp32_precision
    backend.fp32_precision = effective
    return "none" if inherited == effective else effective


@contextmanager
def without_autocast(model: nn.Module) -> Iterator[None]:
    """Disables autocast inside the block: the caller's, and what training in bf16 or fp16 wraps around `forward`.

    A model is thus measured in the same way before, during and after training, and only its weights make a difference.
    A model with weights of different dtypes that runs only under autocast can't be measured.
    """
    names = {"forward", "_original_forward"}
    wrapped = [(module, vars(module)["forward"]) for module in model.modules() if names <= vars(module).keys()]
    with ExitStack() as stack:
        for device in {parameter.device.type for parameter in model.parameters()} - {"meta"}:
            stack.enter_context(torch.autocast(device, enabled=False))
        for module, _ in wrapped:
            module.forward = module._original_forward  # where accelerate keeps the forward that it wraps
        try:
            yield
        finally:
            for module, forward in wrapped:
                module.forward = forward


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
