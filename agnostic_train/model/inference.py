"""Running a model to measure it, in its own precision, and leaving it as it was."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import RLock
from typing import Any

import torch
from torch import nn

from agnostic_train.processes import check_whole

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
