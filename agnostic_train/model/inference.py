"""Running a model without leaving a trace on it: what detection and perplexity share."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from agnostic_train.processes import check_whole, own_share

Batch = Mapping[str, Tensor]


@contextmanager
def left_as_found(model: nn.Module) -> Iterator[None]:
    """Runs its body in evaluation mode without gradients, then restores every module's training flag and torch's random states.

    The model computes in its weights' own dtype, see `full_precision` and `without_autocast`. A model in training may hold
    modules that are kept in evaluation mode, so each module's own flag is restored.

    Raises:
        UserError: weights split over processes. Such models deadlock when processes have unequal numbers of batches.
    """
    check_whole(model, "running a model to measure it")
    modes = [(module, module.training) for module in model.modules()]
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    forked = torch.random.fork_rng(devices=sorted(devices, key=str))
    with forked, torch.no_grad(), full_precision(), without_autocast(model):
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


@contextmanager
def full_precision() -> Iterator[None]:
    """Keeps TF32 out of its body: of 23 bits it keeps 10, which impacts and their proven bounds can't do without.

    `tf32: true` and `torch_compile: true` among TrainingArguments turn it on for the whole process.
    """
    matmul = torch.backends.cuda.matmul
    if matmul.fp32_precision != "tf32":
        yield
        return
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # set through the newer of torch's two interfaces, which the older one refuses to read
        precision = None
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if precision is not None:
            torch.set_float32_matmul_precision(precision)
        else:
            matmul.fp32_precision = "none" if torch.backends.fp32_precision == "tf32" else "tf32"


@contextmanager
def without_autocast(model: nn.Module) -> Iterator[None]:
    """Keeps autocast out of its body, the caller's and the one that a training in bf16 or fp16 leaves around `forward`.

    A model before, during and after training is measured alike, so that only its weights make a difference. One whose weights
    differ in dtype, and that computes under autocast alone, can't be measured.
    """
    names = {"forward", "_original_forward"}
    autocast = [(module, vars(module)["forward"]) for module in model.modules() if names <= vars(module).keys()]
    with ExitStack() as stack:
        for device in {parameter.device.type for parameter in model.parameters()} - {"meta"}:
            stack.enter_context(torch.autocast(device, enabled=False))
        for module, _ in autocast:
            module.forward = module._original_forward  # accelerate's name for it
        try:
            yield
        finally:
            for module, forward in autocast:
                module.forward = forward


def find_device(model: nn.Module) -> torch.device:
    """Where the model takes its inputs: the device of its embeddings, or the one that they are fetched to if offloaded."""
    embeddings = model.get_input_embeddings()
    fetched_to = getattr(getattr(embeddings, "_hf_hook", None), "execution_device", None)  # accelerate's
    if embeddings.weight.is_meta and fetched_to is not None:
        return torch.device(fetched_to)
    return embeddings.weight.device


def check_corpora(corpora: object) -> None:
    """Raises `TypeError` for what isn't batches by language."""
    if not isinstance(corpora, Mapping):
        raise TypeError(
            f"corpora: expected batches by language, such as {{'sw': batches}}, got {type(corpora).__name__}"
        )
    for language, batches in corpora.items():
        if isinstance(batches, Mapping):
            raise TypeError(f"corpora: {language!r} has one batch where several were expected, such as a list of it")


def check_tokens(model: nn.Module, input_ids: Tensor) -> None:
    """Raises `ValueError` for tokens that the model has no embedding of; a GPU would stop at them without a name."""
    size = model.get_input_embeddings().weight.shape[0]
    smallest, largest = (int(it) for it in input_ids.long().aminmax())
    if smallest < 0 or largest >= size:
        token = smallest if smallest < 0 else largest
        raise ValueError(f"input_ids: token {token} is beyond the model's vocabulary of {size}")


def own_sentences(batches: Iterable[Batch]) -> int | None:
    """How many sentences this process's share of the batches has; None where that shows only on the way."""
    if not isinstance(batches, Sequence):
        return None
    return sum(len(batch["input_ids"]) for batch in own_share(batches) if isinstance(batch, Mapping))


def check_batch(model: nn.Module, batch: Batch) -> None:
    """Refuses what isn't a batch for the model.

    Raises:
        ValueError: a batch without a token, of another shape, of numbers that aren't integers, or, unless it is on a GPU
            already, with a token beyond the model's vocabulary.
        TypeError: no batch of tensors.
    """
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        what = f"one with {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else type(batch).__name__
        raise TypeError(f"batch: expected a mapping with input_ids, got {what}; batches_of makes batches")
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    for name, it in (("input_ids", ids), ("attention_mask", mask)):
        if it is not None and not isinstance(it, Tensor):
            raise TypeError(
                f"{name}: expected a tensor, got {type(it).__name__}; tokenizers give them with return_tensors='pt', and "
                "batches_of makes batches"
            )
    shape = tuple(ids.shape)
    if len(shape) != 2 or not ids.numel() or ids.is_floating_point():
        raise ValueError(f"input_ids: expected integers of shape (batch, length), not empty, got {ids.dtype} {shape}")
    if mask is not None and mask.shape != shape:
        raise ValueError(f"attention_mask: expected the shape of input_ids, {shape}, got {tuple(mask.shape)}")
    # A GPU would have to be waited for.
    if ids.device.type == "cpu":
        check_tokens(model, ids)


def model_inputs(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """The forward arguments for a padded batch, on the model's input device.

    Positions count real tokens only, so that a sentence's result doesn't depend on how it was padded.

    Args:
        batch: `input_ids` and, unless every token is real, `attention_mask`, both (batch, length).

    Raises:
        ValueError, TypeError: as by `check_batch`.
    """
    check_batch(model, batch)
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    device = find_device(model)
    # A GPU that is still busy with the last batch needn't be waited for.
    ahead = device.type == "cuda"
    input_ids = ids.to(device, torch.int64, non_blocking=ahead)
    mask = torch.ones_like(input_ids) if mask is None else mask.to(device, non_blocking=ahead)
    position_ids = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": input_ids, "attention_mask": mask, "position_ids": position_ids, "use_cache": False}


def real_and_counted(inputs: Mapping[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
    """Which tokens are real, and which of them count in a norm: both (batch, length) bool, on the input device.

    inputs: what `model_inputs` made of the batch.

    Raises:
        ValueError: unless it is on a GPU already, a batch with a sentence of padding alone, which would count as one.
    """
    mask = batch.get("attention_mask")
    if mask is not None and mask.device.type == "cpu" and not mask.any(1).all():
        raise ValueError("attention_mask: a sentence of the batch is padding alone; leave it out")
    real = inputs["attention_mask"].bool()
    if "special_tokens_mask" not in batch:
        return real, real
    return real, real & ~batch["special_tokens_mask"].to(real.device, non_blocking=real.is_cuda).bool()
