"""The Triton kernels, tested as far as possible without a GPU: in Triton's interpreter, and compiled."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from packaging.version import Version

from agnostic_train.impact import intervals, kernel_trial, kernels

# Bytes that one thread block may use at most, by compute capability: 163 KiB on an A100, 227 KiB on an H100.
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10}
needs_triton = pytest.mark.skipif(kernels.triton is None, reason="needs triton")


@needs_triton
@pytest.mark.skipif(
    kernels.triton is not None
    and Version(kernels.triton.__version__) < Version("3.7")
    and Version(np.__version__) >= Version("2.4"),
    reason="the interpreter of Triton 3.6 turns an array of one into an index, which numpy 2.4 refuses",
)
def test_kernels_pass_their_tests_in_the_interpreter(pytestconfig):
    """Use a separate process: Triton reads `TRITON_INTERPRET` on import, and kernels keep the mode they start with."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/unit/interpreted_kernels.py"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=pytestconfig.rootpath, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "skipped" not in done.stdout


TYPES = {
    kernels: {
        "*fp32": ("parts", "logits", "value", "weight", "a", "b", "c", "d", "r", "s"),
        "*i32": ("spans",),
        "*i1": ("chosen",),
        "fp32": ("softcap",),
    },
    intervals: {
        "*fp32": (
            "ends", "attention", "weight", "a", "b", "c", "d", "middle_b", "middle_d", "lowest_b", "highest_b",
            "lowest_d", "highest_d", "logits", "r", "s", "middle_s", "largest_s", "mean_logit", "longest",
            "largest_logits", "change_rounding",
        ),
        "*fp16": ("value",),
        "*i32": ("spans",),
        "fp32": ("rounding", "logit_rounding", "softcap"),
    },
}  # fmt: skip


def compiled(module, kernel, capability, head_dim, length, grows, capped):
    """Compile a kernel as it is launched for these sizes."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    if module is intervals:
        options = intervals.launch_options(head_dim, head_dim, length, grows, capped, hopper=capability == 90)
    else:
        options = kernels.launch_options(head_dim, head_dim, grows, capped)
    constants = {name: options.pop(name) for name in kernel.arg_names if name in options}
    types = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(constants, "constexpr")
    types |= {name: type for type, names in TYPES[module].items() for name in names}
    aligned = {name for name, type in types.items() if "*" in type or name == "padded"}
    assert {it.name for it in kernel.params if it.do_not_specialize} == set(kernels.SIZES)
    attributes = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(types) if name in aligned}
    return compile(ASTSource(kernel, types, constants, attributes), GPUTarget("cuda", capability, 32), options)


@needs_triton
@pytest.mark.parametrize(
    ("head_dim", "length", "more"),
    [(6, 1, None), (128, 250, None), (256, 42, "grows"), (256, 64, "capped")],
)
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_a100_and_h100(capability, head_dim, length, more, tmp_path, monkeypatch):
    """Compile as launched, because the interpreter doesn't notice types or sizes that a GPU refuses."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    sizes = capability, head_dim, length, more == "grows", more == "capped"
    exact = compiled(kernels, kernels._squared_changes, *sizes)
    rough = compiled(intervals, intervals._squared_intervals, *sizes)
    for kernel in (exact, rough):
        assert kernel.asm["cubin"]
        assert kernel.metadata.shared <= SHARED_MEMORY[capability]
        assert {80: "mma.sync", 90: "wgmma.mma_async"}[capability] in kernel.asm["ptx"]
    assert "tf32x3" in exact.asm["ttir"]
    # Equal attentions differ by exactly zero only if no product is fused with its subtraction.
    assert "fma.rn" not in exact.asm["ptx"]
    assert "f32.f16.f16" in rough.asm["ptx"]


@needs_triton
@pytest.mark.parametrize("length", [1, 64, 65, 128, 129, 256, 257, 5000])
@pytest.mark.parametrize("hopper", [True, False])
@pytest.mark.parametrize("grows, capped", [(False, False), (True, False), (False, True)])
def test_kernels_are_tried_as_they_are_used(length, hopper, grows, capped):
    tried, used = (
        intervals.launch_options(64, 64, it, grows, capped, hopper)
        for it in (kernel_trial._trial_length(length, grows or capped), length)
    )
    assert tried == used


def test_kernels_are_unavailable_on_a_cpu():
    assert not kernel_trial.available(torch.zeros(1, 4, 8))


@needs_triton
def test_machine_without_a_compiler_takes_the_torch_form(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("Failed to find C compiler")

    warnings = []
    monkeypatch.setattr(kernel_trial.logger, "warning", lambda text, *args: warnings.append(text % args))
    monkeypatch.setattr(kernels._squared_changes, "run", fail)
    assert not kernel_trial._work_on.__wrapped__(torch.device("cpu"), 8, 38, False, False)
    assert warnings == [
        "the Triton kernels can't be used on cpu for heads of 8 and sentences like those of 38 tokens "
        "(RuntimeError: Failed to find C compiler): q and k impacts take longer"
    ]
