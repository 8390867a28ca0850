"""The command line on a small corpus and model, in this process, as a user runs it."""

import gc
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import weakref
from contextlib import redirect_stderr
from dataclasses import replace
from io import StringIO

import pytest
import torch
from conftest import padded_batch, tiny_llama
from forked import in_two_processes
from killing import run_and_kill
from peft import PeftModel
from small_run import RECIPE, assert_mistake, root, run, template  # noqa: F401 (fixtures)
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, TrainerCallback
from transformers.training_args import ParallelMode

from agnostic_train.cli import main
from agnostic_train.export.frozen_weights import check_frozen_weights
from agnostic_train.export.trained import Trained
from agnostic_train.files import sole_user
from agnostic_train.neurons.language_neurons import LanguageNeurons
from agnostic_train.neurons.neuron_set import NeuronSet
from agnostic_train.percent import percent
from agnostic_train.pipeline import COMMANDS, STAGES, stage_inputs
from agnostic_train.pipeline.run import Pipeline
from agnostic_train.pipeline.stage_table import STAGE_TABLE
from agnostic_train.pipeline.stages.context import StageResult
from agnostic_train.quickstart.tiny_model import build_tokenizer
from agnostic_train.recipe_file import load_recipe
from agnostic_train.training.guarded import GuardedTrainer
from agnostic_train.training.trainer import NeuronTrainingArguments

RUN = {*STAGES} - {"pilot", "compare"}
"""The stages of `run` without a pilot."""


@pytest.fixture(scope="module")
def finished_template(template, tmp_path_factory):
    root = tmp_path_factory.mktemp("finished")
    shutil.copytree(template, root / "it")
    (root / "it/recipe.yaml").write_text(RECIPE.format(root=root / "it"))
    assert run(root / "it", "run") == 0
    return root / "it"


@pytest.fixture
def finished(finished_template):
    """Return a folder with a finished run, restored after each test."""
    backup = finished_template.with_name("backup")
    shutil.copytree(finished_template, backup)
    yield finished_template
    shutil.rmtree(finished_template)
    backup.rename(finished_template)


@pytest.mark.figures
def test_run_executes_all_stages_and_keeps_unchanged_ones(root, capsys):
    assert run(root, "run") == 0
    out = root / "out"
    printed = capsys.readouterr().out
    assert "language-agnostic score" in printed and "sw *" in printed

    neurons = LanguageNeurons.load(out / "neurons")
    chosen = NeuronSet.load(out / "checkpoint-6/neurons.safetensors")
    assert chosen == neurons.shared | neurons.exclusive["sw"] and len(chosen)

    enhanced = AutoModelForCausalLM.from_pretrained(out / "enhanced")
    assert AutoTokenizer.from_pretrained(out / "enhanced").bos_token_id is not None
    base = AutoModelForCausalLM.from_pretrained(root / "model")
    check = check_frozen_weights(Trained.of(enhanced, base, chosen))
    assert check.status == "identical" and check.chosen_moved > 0.9

    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["frozen_weights"]["status"] == "identical"
    assert set(manifest) >= {"model", "corpus", "recipe", "versions", "seeds", "frozen_weights"}
    assert set(manifest["corpus"]) == {f"{name}.{split}.txt" for name in ("en", "sw") for split in ("train", "valid")}
    score = json.loads((out / "score.json").read_text())
    assert set(score["importance"]) == {"en", "sw"} and set(score["controls"]["random"]["scores"]) == {"1"}
    evaluation = json.loads((out / "evaluation.json").read_text())["languages"]
    for row in evaluation.values():
        for moment in ("before", "after"):
            assert row[moment]["perplexity"] > 1 and row[moment]["bits_per_byte"] > 0
    assert evaluation["sw"]["after"]["bits_per_byte"] < evaluation["sw"]["before"]["bits_per_byte"]
    page = (out / "report.html").read_text()
    assert (
        "<h1>Enhancing sw" in page and 'src="http' not in page and (out / "figures/neurons.png").stat().st_size > 1000
    )
    ratio = score["controls"]["matched"]["activation_ratio"]
    assert "<td>random sets of similar activation, seed 1</td>" in page
    assert f"<td>of similar activation, all</td><td>{ratio['shared']['all']:.2f}</td>" in page
    low, high = score["variants"]["per_neuron"]["intervals"]["sw"]
    assert f"({low:.3f} to {high:.3f})" in page
    assert not list(out.rglob("*.tmp"))

    # Leave out the lock, because some versions of filelock truncate it.
    written = {path for path in out.rglob("*") if path.is_file() and path.name not in ("manifest.json", ".lock")}
    files = {path: path.stat().st_mtime_ns for path in written}
    assert run(root, "run") == 0
    assert capsys.readouterr().out.count("unchanged, kept") == len(RUN)
    assert files == {path: path.stat().st_mtime_ns for path in files}

    # Another learning rate trains again without detecting again.
    assert run(root, "run", "--training.learning_rate=2e-2") == 0
    printed = capsys.readouterr().out
    assert "detect: unchanged" in printed and "score: unchanged" in printed and "train: unchanged" not in printed
    assert run(root, "detect", "--force", "--training.learning_rate=2e-2") == 0
    assert "detect: unchanged" not in capsys.readouterr().out


def test_single_stage_runs_the_stages_it_needs(root, capsys):
    assert run(root, "export") == 0
    printed = capsys.readouterr().out
    assert [line.split(":")[0] for line in printed.splitlines() if line.split(": ")[-1] in STAGES.values()] == [
        "detect", "train", "export"
    ]  # fmt: skip
    assert not (root / "out/score.json").exists()


def test_stability_and_lape_detection(root, capsys):
    assert run(root, "detect", "--detection.stability=true") == 0
    stability = json.loads((root / "out/neurons/summary.json").read_text())["stability"]
    assert set(stability) == {"halves", "second sample"} and 0 < stability["halves"]["sw"]["all"] < 1
    assert LanguageNeurons.load(root / "out/neurons").stability == stability
    assert "overlap of related sets, halves: en 0." in capsys.readouterr().out
    lape = ("--detection.method=lape", "--detection.lape_ratio=0.2", "--training.strategy=related")
    assert run(root, "run", *lape) == 0
    chosen = NeuronSet.load(root / "out/checkpoint-6/neurons.safetensors").counts()
    assert chosen["gate"] == chosen["up"] == chosen["down"] > 0 and chosen["q"] == 0
    assert "activation probability" in (root / "out/report.html").read_text()


def test_packing_takes_as_many_steps_as_the_dry_run_says(root, capsys):
    """An epoch of full sequences takes about as many steps as the dry run predicts."""
    flags = [
        "--training.packing=true",
        "--corpus.max_length=30",
        "--training.max_steps=-1",
        "--training.num_train_epochs=1",
    ]
    assert run(root, "run", "--dry-run", *flags) == 0
    (predicted,) = re.findall(r"optimizer steps +│ about (\d+)", capsys.readouterr().out)
    assert run(root, "run", *flags) == 0
    (steps,) = re.findall(r"^train: (\d+) steps", capsys.readouterr().out, re.MULTILINE)
    assert (
        int(steps) == pytest.approx(int(predicted), rel=0.1) and int(steps) < 45
    )  # the steps of 180 unpacked sentences in batches of four
    for file in ("enhanced/README.md", "report.html"):
        assert "raining text: sentences packed to 30 tokens" in (root / "out" / file).read_text()
    assert run(root, "train", *flags[1:]) == 0
    assert "(changed: training.packing)" in capsys.readouterr().out


def test_dry_run_of_detection_needs_no_training_text(root, capsys):
    for flags in ([], ["--training.packing=true", "--corpus.max_length=30"]):
        flags = ["--dry-run", "--corpus.detection_sentences=200", *flags]
        assert run(root, "detect", *flags) == 0
        assert re.search(r"sw \* .*200 .* 0 ", capsys.readouterr().out)
        assert_mistake(root, "run", flags, "detection takes every train sentence of 'sw'", capsys)


def test_dry_run_of_detection_does_not_check_training(root, capsys):
    flags = ["--dry-run", "--training.dataloader_drop_last=true", "--training.per_device_train_batch_size=999"]
    assert run(root, "detect", *flags) == 0
    assert_mistake(root, "train", flags, "an epoch's 180 sequences don't fill a batch of 999", capsys)


@pytest.mark.parametrize("stage", ["run", "train", "compare"])
@pytest.mark.parametrize(
    "flags, message",
    [
        (["--corpus.detection_sentences=200"], "detection takes every train sentence of 'sw'"),
        (
            ["--training.dataloader_drop_last=true", "--training.per_device_train_batch_size=999"],
            "an epoch's 180 sequences don't fill a batch of 999",
        ),
    ],
)
def test_too_little_training_text_is_refused_before_anything_runs(root, capsys, stage, flags, message):
    assert_mistake(root, stage, flags, message, capsys)
    assert not (root / "out/manifest.json").exists()


def test_dry_run_of_detection_ignores_a_mixture_without_enhanced_languages(root, capsys):
    assert run(root, "detect", "--dry-run", "--training.languages=[]", "--training.mixture={en: 1}") == 0
    assert "optimizer steps" not in capsys.readouterr().out


def test_detect_and_score_need_no_training_section(root, capsys):
    recipe = root / "recipe.yaml"
    recipe.write_text(re.sub(r"training:\n(  .*\n)+", "", recipe.read_text()))
    assert "training" not in recipe.read_text()
    for stage in ("detect", "score"):
        assert run(root, stage, "--dry-run") == 0
    assert run(root, "score") == 0
    written = sorted(it.name for it in (root / "out").iterdir() if not it.name.startswith("."))
    assert written == ["manifest.json", "neurons", "score.json"]
    for stage in ("train", "compare", "run"):
        for flags in ([], ["--dry-run"]):
            assert_mistake(root, stage, flags, "training.languages: missing; name the languages to enhance", capsys)
    capsys.readouterr()
    assert run(root, "train", "--training.languages=sw", "--training.max_steps=1") == 0
    assert "detect: unchanged, kept" in capsys.readouterr().out


def test_training_on_a_mixture(root, capsys):
    """An epoch of four parts of the enhanced language and one part of another; the dry run counts its steps."""
    flags = ["--training.mixture={sw: 4, en: 1}", "--training.max_steps=-1", "--training.num_train_epochs=1"]
    flags += ["--training.hub_token=hf_secret"]
    assert run(root, "run", "--dry-run", *flags) == 0
    printed_plan = capsys.readouterr().out
    assert re.search(r"sw \* .*180", printed_plan) and re.search(r"en \* .*180", printed_plan)
    assert re.search(r"optimizer steps +│ 57 ", printed_plan)  # 180 and 45 sentences in batches of four
    assert run(root, "run", *flags) == 0
    assert "train: 57 steps" in capsys.readouterr().out
    for file in ("enhanced/README.md", "report.html"):
        assert "raining text: sw 0.8, en 0.2" in (root / "out" / file).read_text()
    # transformers stores all of its arguments in this file of its checkpoints.
    written = [it for it in (root / "out").rglob("*") if it.is_file() and it.name != "training_args.bin"]
    assert len(written) > 20 and not any(b"hf_secret" in it.read_bytes() for it in written)
    assert run(root, "train", "--training.mixture={sw: 4, en: 2}", *flags[1:]) == 0
    printed = capsys.readouterr().out
    assert "(changed: training.mixture)" in printed and "train: 68 steps" in printed


def test_packing_without_an_eos_token_is_refused_before_any_stage(root, capsys):
    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(root / "model")
    flags = ["--training.packing=true", "--corpus.max_length=30"]
    for more in ([], ["--dry-run"]):
        assert_mistake(root, "run", [*flags, *more], "training.packing: the tokenizer has no end-of-sequence", capsys)
    assert not (root / "out/neurons").exists()


@pytest.mark.parametrize("strategy", ["random", "full"])
def test_baseline_strategies(root, strategy):
    assert run(root, "run", f"--training.strategy={strategy}") == 0
    manifest = json.loads((root / "out/manifest.json").read_text())
    assert manifest["stages"]["train"]["strategy"] == strategy
    assert manifest["frozen_weights"]["status"] == ("unverified" if strategy == "full" else "identical")
    if strategy == "random":
        neurons = LanguageNeurons.load(root / "out/neurons")
        chosen = NeuronSet.load(root / "out/checkpoint-6/neurons.safetensors")
        assert chosen.counts() == (neurons.shared | neurons.exclusive["sw"]).counts()


def test_trained_model_is_freed_before_the_next_stage(root, monkeypatch):
    """Mixed precision makes the model part of a reference cycle, and a device may not have memory for two models."""
    models, alive = weakref.WeakSet(), []
    original_init, export = LlamaForCausalLM.__init__, STAGE_TABLE["export"]

    def noted(self, *args, **keywords):
        original_init(self, *args, **keywords)
        models.add(self)

    monkeypatch.setattr(LlamaForCausalLM, "__init__", noted)
    counted = replace(export, run=lambda context: alive.append(len(models)) or export.run(context))
    monkeypatch.setitem(STAGE_TABLE, "export", counted)
    gc.collect()
    gc.disable()
    try:
        assert run(root, "export", "--training.bf16=true") == 0
    finally:
        gc.enable()
    assert alive == [0]


def test_neurons_from_a_file_are_trained(root, capsys):
    neurons = NeuronSet({(0, "up"): [1, 2]})
    neurons.save(root / "mine.safetensors")
    assert run(root, "export", f"--training.neurons={root / 'mine.safetensors'}") == 0
    assert NeuronSet.load(root / "out/checkpoint-6/neurons.safetensors") == neurons
    assert not (root / "out/neurons").exists()
    NeuronSet({(0, "up"): [1]}, {(0, "up"): 64}).save(root / "other.safetensors")
    assert run(root, "train", f"--training.neurons={root / 'other.safetensors'}") == 2
    assert "other.safetensors: made for a model with 0 neurons at layer 0 q" in capsys.readouterr().err


@pytest.mark.parametrize("only_model", ["false", "true"])
def test_interrupted_training_resumes_to_the_same_weights(root, monkeypatch, capsys, only_model):
    """Training doesn't resume from a checkpoint without an optimizer, but starts again."""
    flag = f"--training.save_only_model={only_model}"
    assert run(root, "train", flag, f"--output_dir={root / 'whole'}") == 0
    from agnostic_train.training.trainer import NeuronTrainer

    original = NeuronTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 4:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(NeuronTrainer, "training_step", interrupted)
    assert run(root, "train", flag) == 130
    monkeypatch.undo()
    (root / "out/checkpoint-5").mkdir()  # as left behind by a kill during saving
    assert run(root, "train", flag) == 0
    assert ("resumed from checkpoint-3" in capsys.readouterr().out) is (only_model == "false")
    models = [
        AutoModelForCausalLM.from_pretrained(root / name / "checkpoint-6").state_dict() for name in ("whole", "out")
    ]
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())
    assert not (root / "out/checkpoint-5").exists()


def test_training_ended_by_a_signal_is_not_finished(root, monkeypatch, capsys):
    """With `enable_jit_checkpoint`, transformers saves a checkpoint and ends the training as if it were complete."""

    def stop(trainer, *args, **kwargs):
        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                control.should_save = control.should_training_stop = state.global_step == 3

        trainer.add_callback(Stop())
        return original(trainer, *args, **kwargs)

    original = GuardedTrainer.train
    with monkeypatch.context() as patched:
        patched.setattr(GuardedTrainer, "train", stop)
        assert run(root, "train") == 130
    assert "interrupted; the same command resumes" in capsys.readouterr().err
    assert not (root / "out/adapter").exists()
    assert run(root, "train") == 0
    printed = capsys.readouterr().out
    assert "train: resumed from checkpoint-3" in printed and "train: 6 steps" in printed


def test_killed_detection_resumes_from_its_counts(root):
    """After kill -9 in the middle, complete files of counts remain, and the resumed run finds the same sets."""
    flags = ["--corpus.batch_size=1", "--detection.verify=false"]
    assert run(root, "detect", *flags, f"--output_dir={root / 'whole'}") == 0
    command = ["detect", str(root / "recipe.yaml"), *flags]
    at_once = ("agnostic_train.detection.counting.SECONDS_BETWEEN_CHECKPOINTS", 0)
    killed = run_and_kill(
        command, ["agnostic_train.detection.counting.ImpactMeter.measure"], call=27, changes=[at_once]
    )
    assert killed == -9 and not (root / "out/neurons").exists()
    counts = sorted(path.name for path in next((root / "out/.work/detect").iterdir()).iterdir())
    assert counts == ["en.0-of-1.safetensors", "sw.0-of-1.safetensors"]
    assert run(root, "detect", *flags) == 0
    assert LanguageNeurons.load(root / "out/neurons") == LanguageNeurons.load(root / "whole/neurons")
    assert not (root / "out/.work").exists()


def test_interrupted_run_with_other_keys_does_not_resume_old_checkpoints(root, monkeypatch):
    assert run(root, "train") == 0
    assert run(root, "train", "--training.learning_rate=5e-2", f"--output_dir={root / 'clean'}") == 0

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("agnostic_train.pipeline.stages.train.training_examples", interrupted)
    assert run(root, "train", "--training.learning_rate=5e-2") == 130
    monkeypatch.undo()
    assert run(root, "train", "--training.learning_rate=5e-2") == 0
    models = [
        AutoModelForCausalLM.from_pretrained(root / name / "checkpoint-6").state_dict() for name in ("clean", "out")
    ]
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())


@pytest.mark.parametrize("update", ["compact", "mask"])
def test_adapter_exports_have_the_logits_of_the_enhanced_checkpoint(root, update, capsys):
    """All three exports have the same logits, and their model cards contain the results once these are known."""
    out, batch = root / "out", padded_batch([5, 9], vocab_size=200)
    for name in ("lora", "delta"):
        assert run(root, "run", f"--training.update={update}", f"--export.to={name}") == 0
        assert (out / "adapter").exists() is (update == "compact")
        expected = AutoModelForCausalLM.from_pretrained(out / "enhanced").eval()(**batch).logits
        base = AutoModelForCausalLM.from_pretrained(root / "model")
        adapted = PeftModel.from_pretrained(base, out / name).eval()
        torch.testing.assert_close(adapted(**batch).logits, expected, rtol=1e-4, atol=1e-4)
        card = (out / name / "README.md").read_text()
        assert "library_name: peft" in card and "| sw * |" in card and f"- update: {update};" in card
        assert "- neurons detected in en, sw: by impact, top ratio 0.2, consistency 0.5\n" in card
        assert (out / name / "tokenizer.json").exists()
    assert "train: unchanged, kept" in capsys.readouterr().out
    assert not (out / "lora").exists()  # an export for other options is removed
    assert "| sw * |" in (out / "enhanced/README.md").read_text()
    (out / "enhanced/README.md").unlink()
    assert run(root, "run", f"--training.update={update}", "--export.to=delta") == 0
    printed = capsys.readouterr().out
    assert "export: unchanged" in printed and "evaluate: unchanged" not in printed
    assert "| sw * |" in (out / "enhanced/README.md").read_text()


@pytest.mark.parametrize(
    "damage, stage",
    [
        (lambda out: (out / "neurons/shared.safetensors").unlink(), "detect"),
        (lambda out: (out / "score.json").write_text("{"), "score"),
        (lambda out: (out / "checkpoint-6/adapter_model.safetensors").unlink(), "train"),
        (lambda out: (out / "adapter/adapter_config.json").unlink(), "train"),
        (lambda out: (out / "enhanced/model.safetensors").write_bytes(b""), "export"),
        (lambda out: shutil.rmtree(out / "figures"), "report"),
    ],
)
def test_stage_with_a_damaged_file_and_its_dependents_run_again(finished, capsys, damage, stage):
    damage(finished / "out")
    assert run(finished, "run") == 0
    printed = capsys.readouterr().out
    kept = {line.split(":")[0] for line in printed.splitlines() if "unchanged" in line}
    # Detecting again gives the same sets, so what was measured and trained with them is kept.
    rerun = {
        "detect": ["detect", "report"],
        "score": ["score", "report"],
        "train": ["train", "export", "evaluate", "report"],
    }
    rerun |= {"export": ["export", "evaluate", "report"], "report": ["report"]}
    assert kept == RUN - set(rerun[stage])


def test_forced_stage_makes_its_dependents_stale(finished, capsys):
    assert run(finished, "train", "--force") == 0
    assert json.loads((finished / "out/manifest.json").read_text())["frozen_weights"] == {"status": "unverified"}
    capsys.readouterr()
    assert run(finished, "export") == 0
    assert "export: unchanged" not in capsys.readouterr().out
    assert json.loads((finished / "out/manifest.json").read_text())["frozen_weights"]["status"] == "identical"


def test_inputs_and_foreign_files_are_not_overwritten(finished, capsys):
    out = finished / "out"
    for key, path in (
        ("model.name", out / "enhanced"), ("corpus.path", out), ("evaluation.checkpoints", out / "enhanced"),
        ("model.checkpoints", out / "enhanced"), ("training.neurons", out / "neurons/shared.safetensors"),
    ):  # fmt: skip
        message = f"output_dir: {key} lies in it ({path}), and could be overwritten; use another folder"
        assert_mistake(finished, "run", [f"--{key}={path}"], message, capsys)
    message = "tracking.results_dir: is output_dir"
    assert_mistake(finished, "run", [f"--tracking.results_dir={out}"], message, capsys)
    for folder, stage in (("neurons", "detect"), ("figures/mine", "report")):
        message = f"tracking.results_dir: {stage} replaces {out / folder.split('/')[0]}; name another folder"
        assert_mistake(finished, "run", [f"--tracking.results_dir={out / folder}"], message, capsys)
        assert not (out / "figures/mine").exists()
    foreign = finished / "foreign"
    shutil.copytree(out / "checkpoint-6", foreign / "checkpoint-900")
    assert run(finished, "train", f"--output_dir={foreign}") == 2
    assert (
        "checkpoint-900 isn't from a run recorded in" in capsys.readouterr().err
        and (foreign / "checkpoint-900").exists()
    )
    masked = ("--training.update=mask", "--training.optim=adafactor")
    assert run(finished, "train", *masked) == 2 and (out / "checkpoint-6").exists()


def test_changing_the_update_removes_the_adapter(root):
    assert run(root, "export") == 0 and (root / "out/adapter").exists()
    assert run(root, "export", "--training.update=mask") == 0
    assert not (root / "out/adapter").exists() and (root / "out/enhanced/model.safetensors").exists()


@pytest.mark.parametrize(
    "flag", ["lr_scheduler_type=reduce_lr_on_plateau", "lr_scheduler_type=greedy", "save_strategy=best"]
)
def test_keys_that_need_a_metric_take_the_first_enhanced_language(root, flag):
    assert run(root, "train", f"--training.{flag}", "--training.eval_strategy=steps", "--training.eval_steps=2") == 0


def test_best_checkpoint_by_the_loss_of_the_first_enhanced_language(root):
    flags = ["--training.load_best_model_at_end=true", "--training.eval_strategy=steps"]
    assert run(root, "train", *flags, "--training.eval_steps=3", "--training.learning_rate=3") == 0
    state = json.loads((root / "out/checkpoint-6/trainer_state.json").read_text())
    assert state["best_metric"] == min(it["eval_sw_loss"] for it in state["log_history"] if "eval_sw_loss" in it)


def test_followed_checkpoint_of_another_model_is_refused_by_its_name(root, capsys):
    small = tiny_llama(vocab_size=50)
    small.save_pretrained(root / "small")
    for key, value in (("model.checkpoints", f"7={root / 'small'}"), ("evaluation.checkpoints", str(root / "small"))):
        message = f"{key}: {root / 'small'} has a vocabulary of 50, and the tokenizer "
        assert_mistake(root, "run", [f"--{key}={value}"], message, capsys)
        assert not (root / "out/manifest.json").exists()
    shutil.copytree(root / "model", root / "rival")
    build_tokenizer(["other text, other tokens"] * 9, vocab_size=300).save_pretrained(root / "rival")
    padded = AutoTokenizer.from_pretrained(root / "model")
    padded.add_tokens(["<further>"])
    shutil.copytree(root / "model", root / "padded")
    padded.save_pretrained(root / "padded")
    assert run(root, "score", f"--model.checkpoints=7={root / 'padded'}", f"--output_dir={root / 'of-padded'}") == 0
    for key, value in (("model.checkpoints", f"7={root / 'rival'}"), ("evaluation.checkpoints", str(root / "rival"))):
        message = f"{key}: {root / 'rival'} has another tokenizer than model.name"
        assert_mistake(root, "run", [f"--{key}={value}"], message, capsys)
    broken = tiny_llama(vocab_size=400)
    with torch.no_grad():
        broken.model.layers[0].mlp.up_proj.weight.fill_(torch.nan)
    broken.save_pretrained(root / "broken")
    message = "model.checkpoints: broken: the model computes NaN"
    assert_mistake(root, "score", [f"--model.checkpoints=7={root / 'broken'}"], message, capsys)


def test_results_are_printed_also_if_they_were_kept(root, capsys):
    for is_kept in (False, True):
        assert run(root, "evaluate") == 0
        printed = capsys.readouterr().out
        assert ("evaluate: unchanged, kept" in printed) is is_kept
        row = next(line for line in printed.splitlines() if "sw *" in line)
        language = json.loads((root / "out/evaluation.json").read_text())["languages"]["sw"]
        assert percent(language["interval"][0]) + " to " + percent(language["interval"][1]) in row
        assert f"evaluate: {root}/out/evaluation.json" in printed


def test_followed_checkpoints_are_measured_once(root, capsys):
    shutil.copytree(root / "model", root / "step-00012")
    entries = f"--model.checkpoints=40={root / 'model'},{root / 'step-00012'}"
    assert run(root, "score", entries) == 0
    rows = json.loads((root / "out/emergence.json").read_text())
    score = json.loads((root / "out/score.json").read_text())
    assert [(row["step"], row["checkpoint"]) for row in rows] == [(12, "step-00012"), (40, "model")]
    for row in rows:  # both checkpoints are the model itself
        assert row["score"] == score["value"] and row["interval"] == score["interval"]
        for kind, controls in score["controls"].items():
            assert [it["score"] for it in row["controls"][kind]] == [it["value"] for it in controls["scores"].values()]
        assert row["shared"] == len(LanguageNeurons.load(root / "out/neurons").shared)
    capsys.readouterr()
    assert run(root, "score", entries) == 0 and "score: unchanged" in capsys.readouterr().out
    # With one more checkpoint, the neurons are kept, and the two measured checkpoints aren't measured again.
    shutil.copytree(root / "model", root / "step-00020")
    assert run(root, "score", f"{entries},{root / 'step-00020'}") == 0
    printed = capsys.readouterr().out
    assert "detect: unchanged" in printed and "step-00020" in printed and "step-00012" not in printed
    kept = json.loads((root / "out/emergence.json").read_text())
    assert [row["step"] for row in kept] == [12, 20, 40]
    # Other weights under the same name are another checkpoint, even if the step is the same.
    other = AutoModelForCausalLM.from_pretrained(root / "step-00020")
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight.mul_(3)
    other.save_pretrained(root / "step-00020")
    assert run(root, "score", f"{entries},{root / 'step-00020'}") == 0
    rows = json.loads((root / "out/emergence.json").read_text())
    assert rows[1]["perplexity"] != kept[1]["perplexity"] and (rows[0], rows[2]) == (kept[0], kept[2])
    assert run(root, "run", entries) == 0
    assert (root / "out/figures/emergence.png").exists() and "ablation" in (root / "out/score.json").read_text()


def test_second_run_in_the_same_folder_is_refused(root, capsys):
    (root / "out").mkdir()
    with sole_user(root / "out"):
        assert run(root, "detect") == 2
    assert "another run is writing" in capsys.readouterr().err and not (root / "out/neurons").exists()
    assert run(root, "detect") == 0


def is_refused(recipe):
    with redirect_stderr(StringIO()) as error:
        assert main(["detect", recipe]) == 2
    assert "another run is writing" in error.getvalue()


def test_second_run_of_several_processes_in_the_same_folder_is_refused_by_each(root):
    (root / "out").mkdir()
    with sole_user(root / "out"):
        in_two_processes(__name__, "is_refused", str(root / "recipe.yaml"))


def test_process_that_waits_for_one_that_failed_says_so_in_one_line(root, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise RuntimeError("[..gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:30001")

    monkeypatch.setattr(Pipeline, "run", fail)
    assert run(root, "detect") == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "agnostic-train: error: another process ended; its message says why"
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("dispatch_batches: true", "dispatch_batches needs batches of equal length"),
        ("split_batches: true", "split_batches divides per_device_train_batch_size by the number of processes"),
        ("even_batches: false", "with even_batches false, processes get different numbers of batches"),
    ],
)
def test_sharing_of_batches_that_several_processes_cannot_do_is_refused(root, monkeypatch, capsys, config, message):
    flag = f"--training.accelerator_config={{{config}}}"
    with monkeypatch.context() as patched:
        patched.setattr(NeuronTrainingArguments, "parallel_mode", ParallelMode.DISTRIBUTED)
        assert_mistake(root, "train", [flag], f"training.accelerator_config: {message}", capsys)
    assert run(root, "detect", flag) == 0


def test_neurons_from_a_json_file_are_trained(root):
    NeuronSet({(0, "up"): [1, 2], (1, "down"): [3]}).to_json(root / "mine.json")
    assert run(root, "train", f"--training.neurons={root / 'mine.json'}") == 0
    assert len(NeuronSet.load(root / "out/checkpoint-6/neurons.safetensors")) == 3


def test_checkpoint_that_lacks_weights_is_refused(root, capsys):
    config = json.loads((root / "model/config.json").read_text()) | {"num_hidden_layers": 3}
    (root / "model/config.json").write_text(json.dumps(config))
    assert run(root, "detect") == 2
    assert "lacks 9 weights that its config asks for" in capsys.readouterr().err
    (root / "model/model.safetensors").write_bytes(b"truncated")
    assert run(root, "detect") == 2


MISTAKES = [
    (["--corpus.pth=x"], "unknown flag --corpus.pth; did you mean --corpus.path?"),
    (["--detection.top_ratio=2"], "detection.top_ratio"),
    (["--corpus.languages=en,sw,xx"], "'xx' has no file"),
    (["--training.languages=xx"], "training.languages: 'xx' isn't in corpus.languages"),
    (["--corpus.detection_sentences=500"], "corpus.detection_sentences: 500 asked for, 'en' has 200"),
    (["--corpus.path=nowhere"], "corpus.path: nowhere isn't a folder"),
    (["--model.name=nowhere"], "model.name: can't load the config of nowhere: no such folder"),
    (["--model.name=./no/where"], "model.name: no such folder ./no/where"),
    (["--model.dtype=bf16"], "--model.dtype: "),
    (
        ["--training.output_dir=x"],
        "unknown flag --training.output_dir; it comes from the recipe's own key, --output_dir",
    ),
    (["--training.resume_from_checkpoint=x"], "training.resume_from_checkpoint: "),
    (
        ["--training.adam_beta1=2"],
        "training.optim: adamw_torch_fused can't be made of learning_rate, weight_decay, adam_* and optim_* "
        "(ValueError: Invalid beta parameter",
    ),
    (["--training.optim=lomo"], "training.optim: lomo"),
    (["--training.lr_scheduler_type=cosine_with_min_lr"], "training.lr_scheduler_type: cosine_with_min_lr"),
    (["--training.dataloader_num_workers=-1"], "training.dataloader_num_workers"),
    (["--training.torch_compile_backend=foo"], "training.torch_compile_backend"),
    (["--training.torch_compile_mode=foo"], "training.torch_compile_mode"),
    (["--training.dataloader_multiprocessing_context=zzz", "--training.dataloader_num_workers=1"], "dataloader_*"),
    (["--training.log_level=foo"], "training.log_level: 'foo' isn't one of"),
    (["--training.lr_scheduler_kwargs={a: 1}"], "training.lr_scheduler_kwargs: linear can't be made of"),
    (["--training.greater_is_better=true"], "training.greater_is_better: the best checkpoint has the lowest loss"),
    (["--training.project=x"], "unknown flag --training.project; it comes from the recipe's own key, --tracking.proj"),
    (["--training.train_sampling_strategy=sequental"], "'sequental' isn't one of random, sequential, group_by_length"),
    (["--training.label_names=[foo]"], "training.label_names: the text's labels are named labels"),
    (
        ["--training.train_sampling_strategy=sequential", "--training.mixture={sw: 2, en: 1}"],
        "'sequential' would read one language's text after the other's",
    ),
    (
        [
            "--training.train_sampling_strategy=batch_rebalance",
            "--training.dataloader_drop_last=true",
            "--training.gradient_accumulation_steps=64",
        ],
        "sequences don't fill a batch of 256",
    ),
    (
        ["--seed=3"],
        "unknown flag --seed; did you mean --corpus.seed or --training.seed? (see agnostic-train STAGE --help)",
    ),
    (["--training.group_by_length=true"], "since transformers 5 it is train_sampling_strategy: group_by_length"),
    (["--detection.top_ratio=2024-13-45"], "--detection.top_ratio: not valid YAML (month must be in 1..12; put a text"),
    (["--training.neftune_noise_alpha=-1"], "training.neftune_noise_alpha: must be at least 0"),
    (["--training.weight_decay=-1"], "training.weight_decay: must be at least 0"),
    (["--training.label_smoothing_factor=5"], "training.label_smoothing_factor: must be at most 1"),
    (["--training.per_device_eval_batch_size=0"], "training.per_device_eval_batch_size: must be above 0"),
    (["--training.eval_accumulation_steps=0"], "training.eval_accumulation_steps: must be above 0"),
    (
        ["--training.gradient_checkpointing=true", "--training.gradient_checkpointing_kwargs={x: 1}"],
        "training.gradient_checkpointing_kwargs",
    ),
    (["--training.fsdp=full_shard"], "training.fsdp: needs several processes"),
    (["--training.strategy=auto"], "training.high"),
    (["--training.optim=adamx"], "training.optim: adamx is not a valid OptimizerNames"),
    (
        ["--training.load_best_model_at_end=true", "--training.eval_strategy=steps", "--training.optim=adamx"],
        "training.optim: adamx is not a valid OptimizerNames",
    ),
    (
        ["--training.dataloader_drop_last=true", "--training.per_device_train_batch_size=999"],
        "training.dataloader_drop_last: ",
    ),
    (["--training.use_liger_kernel=true"], "training.use_liger_kernel: needs pip install liger-kernel"),
    (["--training.mixture={sw: 4, en: 0}"], "error: --training.mixture.en: "),
    (["--comparison.seeds=0,1"], "recipe.yaml with --comparison.seeds: comparison: tuning_seed 0 is one of seeds"),
    (["--training.update=mask", "--training.optim=adafactor"], "training.optim"),
    (["--training.update=masked"], "training.update"),
    (["--export.to=onnx"], "export.to"),
    (["--model.checkpoints=nowhere"], "model.checkpoints: no such folder nowhere"),
    (["--model.checkpoints=7=a,7=a"], "model.checkpoints: a is listed twice"),
    (["--model.checkpoints=7=/proc"], "model.checkpoints: /proc has no config.json; name the folder of a checkpoint"),
    (["--model.checkpoints=a,"], "--model.checkpoints: string should have at least 1 character"),
    (["--evaluation.checkpoints=a,"], "--evaluation.checkpoints: string should have at least 1 character"),
    (["--evaluation.tasks=a,"], "--evaluation.tasks: string should have at least 1 character"),
    (["--training.strategy=full", "--export.to=lora"], "export.to"),
    (["--training.learning_rate=1e30", "--training.max_grad_norm=0"], "training.learning_rate: "),
    (["--training.metric_for_best_model=eval_loss"], "training.metric_for_best_model"),
    (["--training.neurons=none.safetensors"], "training.neurons: no such file"),
    (
        ["--training.neurons=/proc"],
        "training.neurons: /proc is a folder; name a file of it, such as shared.safetensors",
    ),
    (["--training.learning_rate=-1"], "training.learning_rate: must be at least 0, not -1"),
    (["--tracking.results_dir=/proc/none"], "tracking.results_dir: can't write to /proc/none"),
    (["--model.checkpoints=5=/tmp,5=/proc"], "model.checkpoints: two have step 5 (one is /proc); write STEP="),
    (["--training.neurons=x", "--training.strategy=random"], "training.neurons: takes the place of a strategy"),
    (["--training.per_device_train_batch_size=0"], "training.per_device_train_batch_size: must be above 0"),
    (["--training.parallelism_config={dp_replicate_size: 1}"], "training.parallelism_config: comes from the launcher"),
    (["--training.mixture={sw:4}"], "not None; YAML needs a space after the colon"),
    (["--training.push_to_hub=true"], "training.push_to_hub: would upload all of output_dir, the text included"),
    (["other.yaml"], "unexpected argument other.yaml"),
    (["--training.max_steps=0"], "training.max_steps: must be above 0"),
    (["--corpus.languages=sw"], "corpus.languages: one language shares nothing"),
    (["--detection.min_languages=3"], "detection.min_languages: 3 is more than the 2"),
    (["--training.high=.inf"], "training.high"),
    (["--training.packing=true"], "corpus.max_length: training.packing joins sentences to this many tokens"),
    (["--training.mixture={sw: 1, fr: 1}"], "training.mixture: 'fr' isn't in corpus.languages"),
    (["--training.mixture={en: 1}"], "training.mixture: gives no share to 'sw'"),
    (["--training.mixture={sw: 1, en: 0}"], "training.mixture.en: input should be greater than 0"),
    (["--training.mixture={sw: 1, en: true}"], "training.mixture: takes a number, not true"),
    (["--training.mixture={sw: 1, en: 20000}"], "training.mixture: one share is more than 10,000 times another"),
    (["--training.mixture={}"], "training.mixture: needs at least 1"),
    (["--training.mixture=sw:4,en:1"], "training.mixture: input should be a valid dictionary"),
    (
        [
            "--corpus.path=",
            "--corpus.dataset=x",
            "--corpus.config_pattern=en",
            "--corpus.languages=sw",
            "--evaluation.languages=en",
        ],
        "evaluation.languages: each would read the text of corpus.languages; write {lang}",
    ),
    (["--output_dir=/proc/none"], "output_dir: can't write to /proc/none"),
]


@pytest.mark.parametrize("flags, message", MISTAKES, ids=[flags[0] for flags, _ in MISTAKES])
def test_mistakes_give_one_line_and_exit_status_2(root, capsys, flags, message):
    assert_mistake(root, "run", flags, message, capsys)


def test_unsupported_model_is_refused(root, capsys):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=400)).save_pretrained(root / "model")
    assert run(root, "detect") == 2
    assert "GPT2LMHeadModel has no list of decoder layers" in capsys.readouterr().err
    assert not (root / "out/neurons").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_output_folder_without_write_permission_is_refused(root, capsys):
    (root / "locked").mkdir(mode=0o500)
    assert run(root, "detect", f"--output_dir={root / 'locked'}") == 2
    assert "output_dir: can't write" in capsys.readouterr().err


@pytest.mark.parametrize("stage", [None, *COMMANDS])
def test_help_lists_stages_and_keys(stage, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*([stage] if stage else []), "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    if stage is None:
        assert "evaluate" in printed
    else:
        assert "--detection.top_ratio VALUE" in printed and "default 0.05" in printed
        assert "one of impact, lape; default impact" in " ".join(printed.split())


def test_missing_stage_or_recipe_is_refused(capsys):
    for arguments in ([], ["detekt", "x.yaml"], ["run"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
    assert main(["run", "none.yaml"]) == 2


@pytest.mark.parametrize(
    "stage, keys",
    [
        ("detect", "lower corpus.batch_size or detection.memory_gb, or set model.dtype to bfloat16"),
        ("score", "lower corpus.batch_size, or set"),
        ("train", "lower training.per_device_train_batch_size (and raise training.gradient_accumulation_steps"),
        ("export", "set model.dtype to bfloat16"),
        ("evaluate", "lower evaluation.batch_size, or set"),
        ("compare", "lower training.per_device_train_batch_size or evaluation.batch_size, or set"),
    ],
)
def test_out_of_memory_gives_one_line_and_exit_status_1(root, monkeypatch, capsys, stage, keys):
    def too_large(context):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total of\n 8 GiB.")

    for name, stage_entry in STAGE_TABLE.items():
        function = too_large if name == stage else lambda context: StageResult()
        monkeypatch.setitem(STAGE_TABLE, name, replace(stage_entry, run=function, check=lambda context: None))
    assert run(root, stage) == 1
    expected = f"agnostic-train: error: {stage}: CUDA out of memory. Tried to allocate 20.00 GiB; {keys}"
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("agnostic-train: error")] == lines[-1:]
    assert lines[-1].startswith(expected)


def test_text_is_encoded_without_the_model_and_its_identity_is_read_once(root, monkeypatch):
    NeuronSet({(0, "up"): [1, 2]}).save(root / "mine.safetensors")
    whole = Pipeline(load_recipe(root / "recipe.yaml"))
    monkeypatch.setattr("agnostic_train.pipeline.materials.load_model", lambda *_: pytest.fail("the model was loaded"))
    batches = whole.materials.batches("validation")
    assert len(batches["sw"][0]["input_ids"]) == 10 and whole.materials.encoder.vocab_size == 400
    monkeypatch.undo()
    original, requests = stage_inputs.model_identity, []
    monkeypatch.setattr(stage_inputs, "model_identity", lambda *its: requests.append(its) or original(*its))
    assert run(root, "export", f"--training.neurons={root / 'mine.safetensors'}") == 0
    assert len(requests) == 1


def test_known_import_warnings_are_suppressed(caplog, capsys):
    main(["run", "none.yaml"])
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "No module named 'kernels'")
    logger.warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]


def test_two_processes_run_all_stages(root):
    """Sentences are divided between processes, training is data parallel, and one process writes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "agnostic_train", "run", str(root / "recipe.yaml"), "--training.per_device_train_batch_size=2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("6 steps") == 1
    assert run(root, "detect", f"--output_dir={root / 'alone'}") == 0
    assert LanguageNeurons.load(root / "out/neurons") == LanguageNeurons.load(root / "alone/neurons")
    assert json.loads((root / "out/manifest.json").read_text())["frozen_weights"]["status"] == "identical"


def test_refused_command_keeps_finished_work(finished, capsys):
    (finished / "empty").mkdir()
    assert run(finished, "run", f"--model.name={finished / 'empty'}") == 2
    assert run(finished, "run", "--training.strategy=pilot", "--training.pilot_steps=999") == 2
    assert "training.pilot_steps" in capsys.readouterr().err
    (finished / "file").touch()
    assert run(finished, "run", f"--tracking.results_dir={finished / 'file'}") == 2
    assert "tracking.results_dir" in capsys.readouterr().err
    NeuronSet().to_json(finished / "none.json")
    (finished / "broken.json").write_text("{")
    for flag, words in (
        (f"--training.neurons={finished / 'none.json'}", "none.json holds no neuron; name another file"),
        (f"--training.neurons={finished / 'broken.json'}", "name a file that to_json wrote"),
    ):
        for command in ("train", "run"):
            assert_mistake(finished, command, [flag], words, capsys)
    assert run(finished, "run") == 0
    assert capsys.readouterr().out.count("unchanged, kept") == len(RUN)


def test_damaged_record_of_published_files_is_named(finished, capsys):
    (finished / "results").mkdir()
    flag = [f"--tracking.results_dir={finished / 'results'}"]
    for content in ("[]", "{"):
        (finished / "results/.published.json").write_text(content)
        assert_mistake(finished, "score", flag, "results/.published.json: not", capsys)


def test_sentences_of_a_single_token_are_reported(root, capsys):
    for language, line in (("sw", "a"), ("en", "one more sentence")):
        with (root / f"text/{language}.train.txt").open("a") as file:
            file.write(f"\n{line}")
    assert run(root, "detect", "--corpus.add_bos=false", "--corpus.detection_sentences=201") == 0
    assert "detect: 1 sentence of sw of a single token, in which no q or k neuron has an" in capsys.readouterr().out


def test_strategy_without_neurons_keeps_the_finished_training(root, capsys):
    flags = ["--detection.consistency=1", "--detection.top_ratio=0.01", "--score.controls=0"]
    assert run(root, "train", *flags, "--training.strategy=full") == 0
    assert run(root, "detect", *flags) == 0 and not len(LanguageNeurons.load(root / "out/neurons").shared)
    for strategy in ("shared", "pilot"):
        key = "training.pilot_strategies" if strategy == "pilot" else "training.strategy"
        words = f"{key}: 'shared' of sw has no neuron to train"
        more = [f"--training.strategy={strategy}", "--training.pilot_steps=2"]
        assert_mistake(root, "train", [*flags, *more], words, capsys)
    capsys.readouterr()
    assert run(root, "train", *flags, "--training.strategy=full") == 0
    assert "train: unchanged, kept" in capsys.readouterr().out


def test_run_without_any_neurons_has_a_report(root):
    flags = ["--detection.method=lape", "--detection.lape_ratio=0.001", "--training.strategy=full"]
    assert run(root, "run", *flags) == 0
    assert not (root / "out/figures/ablation.png").exists() and (root / "out/report.html").exists()


def test_users_files_in_output_folders_are_not_deleted(finished, capsys):
    """The stage refuses before it does anything, so its finished work is kept."""
    out = finished / "out"
    for stage, folder in (
        ("detect", "neurons"), ("train", "adapter"), ("export", "enhanced"), ("report", "figures")
    ):  # fmt: skip
        notes = out / folder / "notes.txt"
        notes.write_text("years of work")
        assert_mistake(finished, stage, ["--force"], f"{out / folder}: would be replaced, but holds notes.txt", capsys)
        assert notes.read_text() == "years of work"
        assert run(finished, "run") == 0 and capsys.readouterr().out.count("unchanged") == 6
        notes.unlink()
    notes = out / "neurons/notes.txt"
    notes.touch()
    assert run(finished, "score", "--force") == 0  # which replaces nothing in that folder
    notes.unlink()
    for stage in ("detect", "train", "export", "report"):
        assert run(finished, stage, "--force") == 0
    # An export without a list of its files, as earlier versions wrote it, is recognised by the run's record.
    manifest = json.loads((out / "enhanced/manifest.json").read_text())
    del manifest["files"]
    (out / "enhanced/manifest.json").write_text(json.dumps(manifest))
    assert run(finished, "export", "--force") == 0
    (finished / "other/figures").mkdir(parents=True)
    (finished / "other/figures/score.pdf").write_text("mine")
    assert_mistake(finished, "run", [f"--output_dir={finished / 'other'}"], "figures: would be replaced", capsys)
    assert (finished / "other/figures/score.pdf").read_text() == "mine"


def test_detect_prints_how_many_languages_share_a_neuron(root, capsys):
    assert run(root, "detect", "--detection.min_languages=1") == 0
    assert "shared by at least 1 language" in capsys.readouterr().out
    assert run(root, "detect", "--detection.min_languages=2") == 0  # there are only two languages
    assert "shared by all" in capsys.readouterr().out
