"""The shell scripts, with programs that only write down how they were called."""

import shutil
import subprocess

import pytest


@pytest.fixture
def clone(pytestconfig, tmp_path):
    shutil.copytree(pytestconfig.rootpath / "scripts", tmp_path / "scripts")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(pytestconfig.rootpath / name, tmp_path)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    for name in ("python", "agnostic-train"):
        program = tmp_path / ".venv/bin" / name
        program.write_text(f'#!/bin/sh\necho "{name} $*" >>"{tmp_path}/calls"\n')
        program.chmod(0o755)
    return tmp_path


def call(clone, script, *arguments):
    return subprocess.run(["bash", f"{clone}/scripts/{script}", *arguments], capture_output=True, text=True, cwd="/")


def test_quickstart_passes_its_flags_on_and_installs_once(clone):
    for flag in ("--output_dir=runs/other", "--force"):
        assert call(clone, "quickstart.sh", flag).returncode == 0
    calls = (clone / "calls").read_text().splitlines()
    assert [it for it in calls if it.startswith("agnostic-train")] == [
        "agnostic-train run recipes/quickstart.yaml --output_dir=runs/other",
        "agnostic-train run recipes/quickstart.yaml --force",
    ]
    installed = [it for it in calls if " -e " in it]
    assert len(installed) == 1 and installed[0].endswith(" -e .")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "usage: on_gpu.sh FOLDER [PART ...]"),
        (["kernels"], "usage: on_gpu.sh FOLDER [PART ...]"),
        (["{clone}/out", "kernels", "kernals"], "kernals: unknown part; choose from kernels detection"),
        (["{clone}/out", "kernels"], "has no torch that sees a GPU"),
    ],
)
def test_gpu_benchmarks_refuse_mistakes_before_they_measure(clone, arguments, message):
    (clone / ".venv/bin/python").write_text("#!/bin/sh\nexit 1\n")
    done = call(clone, "benchmarks/on_gpu.sh", *(it.format(clone=clone) for it in arguments))
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (clone / "out").exists()
