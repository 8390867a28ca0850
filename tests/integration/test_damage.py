"""Damaged files, a full disk and failing training give a one-line error and exit status 2, and harm nothing else."""

import json
import os
import pickle
import shutil
import subprocess
import zipfile

import pytest
import torch
from conftest import UPDATES, tiny_llama
from killing import run_with_full_disk
from small_run import RECIPE, run, write_inputs
from small_training import CHOSEN, arguments, sentences

from agnostic_train import NeuronTrainer
from agnostic_train.errors import UserError
from agnostic_train.scores.perplexity import NonFiniteLossError
from agnostic_train.training import guarded

STATE = ("optimizer.pt", "scheduler.pt", "rng_state.pth")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a folder whose training looks as if it had been killed after saving step 3."""
    root = tmp_path_factory.mktemp("damage") / "it"
    root.mkdir()
    write_inputs(root)
    (root / "recipe.yaml").write_text(RECIPE.format(root=root))
    assert run(root, "train") == 0
    shutil.rmtree(root / "out/checkpoint-6")
    shutil.rmtree(root / "out/adapter")
    manifest = json.loads((root / "out/manifest.json").read_text())
    manifest["stages"]["train"] |= {"finished": False}
    (root / "out/manifest.json").write_text(json.dumps(manifest))
    shutil.copytree(root, root.with_name("backup"))
    return root


@pytest.fixture
def root(trained):
    yield trained
    shutil.rmtree(trained)
    shutil.copytree(trained.with_name("backup"), trained)


def assert_one_line(capsys, status, *messages):
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("agnostic-train: error: ")]
    assert status == 2 and len(lines) == 1 and "Traceback" not in error
    assert all(message in lines[0] for message in messages), lines[0]


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])


def flip(file):
    content = bytearray(file.read_bytes())
    content[20:40] = bytes(255 - byte for byte in content[20:40])
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip, lambda file: file.write_bytes(b"")], ids=["cut", "flip", "empty"])
@pytest.mark.parametrize("name", [*STATE, "adapter_model.safetensors", "adapter_config.json", "neurons.safetensors"])
def test_error_names_the_damaged_file_of_a_checkpoint(root, capsys, name, damage):
    damage(root / "out/checkpoint-3" / name)
    assert_one_line(capsys, run(root, "train"), f"checkpoint-3/{name}: ")


def test_optimizer_state_of_fsdp_is_checked_too(tmp_path):
    for name in ("optimizer.bin", "training_args.bin"):
        torch.save({"state": torch.ones(1000)}, tmp_path / name)
    cut(tmp_path / "training_args.bin")  # this file is never read
    (tmp_path / "trainer_state.json").write_text("{}")
    guarded.check_resumable(tmp_path)
    cut(tmp_path / "optimizer.bin")
    with pytest.raises(UserError, match=r"optimizer\.bin: can't be resumed from"):
        guarded.check_resumable(tmp_path)


def test_training_continues_without_the_damaged_checkpoint(root, capsys):
    cut(root / "out/checkpoint-3/optimizer.pt")
    assert_one_line(capsys, run(root, "train"), "delete", "checkpoint-3, and training continues")
    shutil.rmtree(root / "out/checkpoint-3")
    assert run(root, "train") == 0


@pytest.mark.parametrize("name", STATE)
def test_loading_a_checkpoint_runs_no_code(root, capsys, name):
    """A pickle that would call a function is refused in every file of the training state."""

    class Intruder:
        def __reduce__(self):
            return os.mkdir, (str(root / "intruded"),)

    file = root / "out/checkpoint-3" / name
    torch.save({"state": Intruder(), "param_groups": []}, file)
    assert_one_line(capsys, run(root, "train"), f"checkpoint-3/{name}: ")
    file.write_bytes(pickle.dumps(Intruder()))
    assert_one_line(capsys, run(root, "train"), f"checkpoint-3/{name}: ")
    assert not (root / "intruded").exists()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("it/data.pkl", pickle.dumps(Intruder()))
        archive.writestr("it/version", "3")
    assert_one_line(capsys, run(root, "train"), f"checkpoint-3/{name}: ")
    assert not (root / "intruded").exists()


@pytest.mark.parametrize(
    "name, stage, message",
    [
        ("model/model.safetensors", "detect", "model.name: can't load"),
        ("model/config.json", "detect", "model.name: can't load"),
        ("model/tokenizer.json", "detect", "model.name: can't load"),
        ("out/manifest.json", "detect", "manifest.json: not valid JSON"),
        ("out/neurons/summary.json", "train", None),
        ("out/neurons/shared.safetensors", "train", None),
    ],
)
def test_truncated_inputs_are_named_and_truncated_results_made_again(root, capsys, name, stage, message):
    """Errors name truncated inputs; truncated results of earlier stages are recomputed."""
    cut(root / name)
    status = run(root, stage)
    if message:
        assert_one_line(capsys, status, message)
    else:
        assert status == 0 and "detect: unchanged" not in capsys.readouterr().out


def test_unreadable_results_of_the_right_size_are_named(root, capsys):
    flip(root / "out/neurons/shared.safetensors")
    assert_one_line(capsys, run(root, "score"), "neurons/shared.safetensors: not a readable neuron set")
    shutil.copy(root.with_name("backup") / "out/neurons/shared.safetensors", root / "out/neurons/shared.safetensors")
    flip(root / "out/neurons/summary.json")
    assert_one_line(capsys, run(root, "score"), "neurons/summary.json: not valid JSON")


def test_tokenizer_of_another_model_is_refused(root, capsys):
    config = json.loads((root / "model/config.json").read_text())
    tiny_llama(vocab_size=50).save_pretrained(root / "model")
    assert config["vocab_size"] > 50
    assert_one_line(capsys, run(root, "detect"), "model.name: its tokenizer gives token", "don't belong together")


@pytest.mark.parametrize("stage, limit", [("detect", 1_500), ("train", 12_000), ("train", 5_000), ("export", 60_000)])
def test_full_disk_leaves_no_partial_results(root, stage, limit):
    """If files can't grow beyond a limit, the error is one line, no final name is partial, and a rerun succeeds."""
    if stage == "detect":
        shutil.rmtree(root / "out")
    status = run_with_full_disk([stage, str(root / "recipe.yaml")], limit, root / "errors")
    printed = (root / "errors").read_text()
    errors = [line for line in printed.splitlines() if line.startswith("agnostic-train: error: ")]
    assert status == 2 and len(errors) == 1 and "Traceback" not in printed, printed[-2000:]
    assert "output_dir" in errors[0] and any(it in errors[0] for it in ("File too large", "full?"))
    assert not (root / "out/enhanced").exists() and not list((root / "out").glob(".*.tmp"))
    assert run(root, stage) == 0


@pytest.fixture
def mounted(tmp_path):
    """Yield a small separate disk and a function that changes its mount options."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*options):
        return subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", folder], capture_output=True)

    if shutil.which("mount") is None or mount("size=100k").returncode:
        pytest.skip("mounting a disk isn't allowed here")
    yield folder, lambda *options: mount("remount", *options)
    # Unmount lazily, because a model loaded from the disk may still have its file open.
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_mounted_disk_that_is_full_or_read_only(root, mounted, capsys):
    folder, remount = mounted
    flag = f"--output_dir={folder / 'out'}"
    assert_one_line(capsys, run(root, "train", flag), "output_dir")
    assert not (folder / "out/adapter").exists()
    assert remount("size=10m").returncode == 0
    assert run(root, "export", flag) == 0
    assert remount("ro").returncode == 0
    capsys.readouterr()
    assert_one_line(capsys, run(root, "run", flag), "output_dir: can't write to", "Read-only")
    assert remount("rw").returncode == 0 and run(root, "run", flag) == 0
    assert "train: unchanged" in capsys.readouterr().out


class Poisoned(torch.nn.Module):
    """A part of a model whose output is NaN from call number `call` on."""

    def __init__(self, module, call):
        super().__init__()
        self.module, self.call, self.num_calls = module, call, 0

    def forward(self, *args, **kwargs):
        self.num_calls += 1
        output = self.module(*args, **kwargs)
        return output * float("nan") if self.num_calls >= self.call else output


@pytest.mark.parametrize("update", UPDATES)
def test_nonfinite_loss_stops_training(tmp_path, update):
    model = tiny_llama()
    model.lm_head = Poisoned(model.lm_head, call=6)
    settings = arguments(tmp_path, save_strategy="steps", save_steps=2, update=update, save_total_limit=1)
    rows = sentences()
    trainer = NeuronTrainer(model, settings, train_dataset=rows, neurons=CHOSEN)
    with pytest.raises(
        UserError, match=r"the loss is nan at step 6, on the batch of 4 sequences whose first .*"
    ) as caught:
        trainer.train()
    first_tokens = json.loads(str(caught.value).partition("tokens ")[2].partition(";")[0])
    assert first_tokens in [row["input_ids"].tolist() for row in rows]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]


def test_loss_that_is_not_finite_in_another_process_stops_this_one_without_naming_its_text(tmp_path, monkeypatch):
    monkeypatch.setattr(guarded, "sum_over_processes", lambda values: values + 1)
    trainer = NeuronTrainer(tiny_llama(), arguments(tmp_path), train_dataset=sentences(), neurons=CHOSEN)
    with pytest.raises(NonFiniteLossError, match="the loss of another process isn't finite at step 1") as caught:
        trainer.train()
    assert "tokens" not in str(caught.value)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("call", [4, 6])
def test_losses_are_checked_once_per_step(tmp_path, monkeypatch, update, call):
    """The error names the first accumulated batch that failed, and the step isn't taken."""
    model = tiny_llama()
    model.lm_head = Poisoned(model.lm_head, call)
    settings = arguments(tmp_path, update=update, gradient_accumulation_steps=3)
    checks, batches = [], []
    original = guarded.sum_over_processes
    monkeypatch.setattr(guarded, "sum_over_processes", lambda values: checks.append(1) or original(values))

    class Watched(NeuronTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            batches.append(inputs["input_ids"])
            return super().training_step(model, inputs, *args, **kwargs)

    trainer = Watched(model, settings, train_dataset=sentences(36), neurons=CHOSEN)
    with pytest.raises(NonFiniteLossError, match="the loss is nan at step 2, on the batch of 4") as caught:
        trainer.train()
    assert str(batches[call - 1][0].tolist()) in str(caught.value)
    assert len(batches) == 6 and len(checks) == 2 and trainer.state.global_step == 1


@pytest.mark.parametrize("update", UPDATES)
def test_nonfinite_weights_do_not_replace_a_good_checkpoint(tmp_path, update):
    """The loss is finite but the step's gradients aren't, so saving at this step would save NaN."""
    settings = arguments(
        tmp_path, save_strategy="steps", save_steps=2, update=update, save_total_limit=1, max_grad_norm=0
    )
    trainer = NeuronTrainer(tiny_llama(), settings, train_dataset=sentences(), neurons=CHOSEN)
    original = trainer.training_step

    def with_bad_gradients(model, *args, **kwargs):
        loss = original(model, *args, **kwargs)
        if trainer.state.global_step == 3:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(float("nan"))
        return loss

    trainer.training_step = with_bad_gradients
    with pytest.raises(UserError, match="isn't finite after step 4, and isn't saved"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.parametrize(
    "flags", [["--training.disable_tqdm=false"], ["--training.update=mask"], ["--training.strategy=full"]]
)
def test_diverging_training_on_the_command_line_is_one_line(root, capsys, flags):
    flags = [*flags, "--training.learning_rate=1e36", "--training.max_grad_norm=0", "--training.max_steps=20"]
    flags += ["--training.save_steps=1", f"--output_dir={root / 'diverged'}"]
    assert_one_line(capsys, run(root, "train", *flags), "training.learning_rate: ", "earlier checkpoints are kept")
    for checkpoint in (root / "diverged").glob("checkpoint-*/trainer_state.json"):
        assert "NaN" not in checkpoint.read_text()
