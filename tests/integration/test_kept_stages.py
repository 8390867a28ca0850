"""Which stages run again after a change of the recipe or the text, and which are kept."""

import json
import shutil

import pytest
from small_run import RECIPE, assert_mistake, root, run, template  # noqa: F401 (fixtures)
from tokenizers import normalizers
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from agnostic_train.files import read_json
from agnostic_train.neurons.neuron_set import NeuronSet
from agnostic_train.pipeline import STAGES
from agnostic_train.pipeline.manifest import Manifest
from agnostic_train.pipeline.run import Pipeline
from agnostic_train.pipeline.stage_inputs import learning_arguments
from agnostic_train.pipeline.stages import evaluate as evaluate_stage
from agnostic_train.recipe_file import load_recipe
from agnostic_train.recipe_keys import own_types
from agnostic_train.report import page
from agnostic_train.training.trainer import NeuronTrainer

ALL = {*STAGES}
CHANGES = [
    # Each change with the stages whose own inputs it changes; the stages after them follow.
    ({"training.logging_steps": "5"}, set()),
    ({"training.logging_first_step": "true", "training.log_level": "error"}, set()),
    ({"training.disable_tqdm": "false", "training.include_num_input_tokens_seen": "all"}, set()),
    ({"training.low": "0.1", "training.high": "2"}, set()),
    ({"training.pilot_steps": "7"}, {"pilot"}),
    ({"training.pilot_strategies": "shared,related"}, {"pilot"}),
    # A pilot has its own number of steps.
    ({"training.max_steps": "7"}, {"train", "compare"}),
    ({"detection.memory_gb": "0.5"}, set()),
    ({"tracking.run_name": "x"}, set()),
    ({"training.random_like": "shared"}, {"compare"}),
    # A comparison tries multiples of this rate.
    ({"training.learning_rate": "5e-2"}, {"pilot", "train", "compare"}),
    ({"training.seed": "5"}, {"pilot", "train"}),
    ({"training.save_steps": "2"}, set()),
    ({"training.save_only_model": "true"}, {"train"}),
    (
        {
            "training.save_steps": "2",
            "training.load_best_model_at_end": "true",
            "training.eval_strategy": "steps",
            "training.eval_steps": "2",
        },
        {"train"},
    ),
    ({"training.eval_strategy": "epoch"}, {"train"}),
    ({"training.warmup_steps": "2"}, {"pilot", "train", "compare"}),
    ({"training.update": "mask"}, {"pilot", "train", "compare"}),
    ({"detection.top_ratio": "0.3"}, {"detect"}),
    ({"detection.verify": "false"}, {"detect"}),
    ({"detection.consistency": "0.9"}, {"detect"}),
    ({"detection.attention": "paper"}, {"detect"}),
    ({"detection.exclusive": "unique"}, {"detect"}),
    ({"detection.min_languages": "1"}, {"detect"}),
    ({"detection.method": "lape"}, {"detect"}),
    ({"detection.lape_ratio": "0.02"}, {"detect"}),
    ({"detection.pruning": "false"}, {"detect"}),
    ({"detection.stability": "true"}, {"detect"}),
    ({"detection.skip_special_tokens": "true"}, {"detect"}),
    ({"score.controls": "2"}, {"score"}),
    ({"export.dtype": "bfloat16"}, {"export"}),
    ({"export.to": "lora"}, {"export"}),
    ({"evaluation.max_forgetting": "0.1"}, {"pilot", "evaluate", "compare"}),
    ({"evaluation.batch_size": "3"}, {"evaluate"}),
    ({"evaluation.languages": "th"}, {"evaluate", "compare"}),
    ({"corpus.test_sentences": "5"}, {"evaluate", "compare", "report"}),
    ({"corpus.training_sentences": "50"}, {"pilot", "train", "compare", "report"}),
    ({"corpus.validation_sentences": "5"}, {"score", "pilot", "evaluate", "compare", "report"}),
    ({"corpus.validation_sentences": "5", "training.eval_strategy": "epoch"}, {*ALL} - {"detect", "export"}),
    ({"corpus.detection_sentences": "30"}, ALL - {"export", "evaluate"}),
    ({"corpus.seed": "1"}, ALL - {"export", "evaluate"}),
    ({"corpus.max_length": "8"}, ALL - {"export"}),
    ({"corpus.add_bos": "false"}, ALL - {"export"}),
    ({"corpus.batch_size": "8"}, {"report"}),
    ({"training.gradient_checkpointing": "true", "training.save_total_limit": "1"}, set()),
    ({"training.dataloader_num_workers": "1", "training.hub_strategy": "end"}, set()),
    ({"model.dtype": "bfloat16"}, ALL),
    ({"model.revision": "main"}, set()),  # the model is a folder
    ({"training.max_grad_norm": "1.0", "training.seed": "42", "training.num_train_epochs": "5"}, set()),
    ({"training.ddp_timeout": "60", "training.per_device_eval_batch_size": "2", "training.eval_steps": "3"}, set()),
    ({"training.eval_strategy": "epoch", "training.per_device_eval_batch_size": "2"}, {"train"}),
]


def inputs(root, flags=None, **lines):
    """Return each stage's inputs other than earlier stages; `lines` are first appended to files of the text."""
    for name, line in lines.items():
        with (root / f"text/{name.replace('_', '.')}.txt").open("a") as file:
            file.write(f"\n{line}")
    pipeline = Pipeline(load_recipe(root / "recipe.yaml", flags), say=lambda line: None)
    return {stage: pipeline.inputs.of(stage) for stage in ALL}


@pytest.fixture(scope="module")
def unchanged(template, tmp_path_factory):
    """Return a folder that no test changes, and the inputs of its stages."""
    folder = tmp_path_factory.mktemp("unchanged") / "it"
    shutil.copytree(template, folder)
    shutil.copy(folder / "text/sw.valid.txt", folder / "text/th.valid.txt")
    (folder / "recipe.yaml").write_text(RECIPE.format(root=folder))
    return folder, inputs(folder)


@pytest.mark.parametrize("flags, stages", CHANGES, ids=[next(iter(flags)) for flags, _ in CHANGES])
def test_key_changes_the_inputs_of_the_stages_it_affects(unchanged, flags, stages):
    folder, before = unchanged
    after = inputs(folder, flags)
    assert {stage for stage in ALL if after[stage] != before[stage]} == stages


def test_when_to_save_counts_only_if_the_best_checkpoint_is_chosen():
    for best, differs in ((True, True), (False, False)):
        few, more = (
            learning_arguments({"load_best_model_at_end": best, "eval_strategy": "steps", "save_steps": it})
            for it in (2, 3)
        )
        assert (few != more) is differs


def test_config_file_of_an_engine_counts_by_its_content(tmp_path):
    (tmp_path / "zero.json").write_text("{}")
    keys = {"deepspeed": str(tmp_path / "zero.json")}
    before = learning_arguments(keys)
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 3}}')
    assert learning_arguments(keys) != before
    assert learning_arguments({"optim": str(tmp_path / "zero.json")})["optim"].endswith("zero.json")
    written_out = {"deepspeed": '{"a": 1}' * 100}  # longer than a file name can be
    assert learning_arguments(written_out) == written_out


def test_missing_file_is_printed_as_the_reason(root, capsys):
    assert run(root, "detect") == 0
    (root / "out/neurons/shared.safetensors").unlink()
    capsys.readouterr()
    assert run(root, "detect") == 0
    assert "this replaces an earlier result (changed: neurons/shared.safetensors)" in capsys.readouterr().out


def test_detecting_the_same_sets_again_keeps_the_training(root, capsys):
    assert run(root, "export") == 0
    capsys.readouterr()
    assert run(root, "detect", "--detection.verify=false") == 0
    assert "the existing result" not in capsys.readouterr().out
    assert run(root, "export", "--detection.stability=true") == 0
    printed = capsys.readouterr().out
    assert "(changed: detection.stability, detection.verify, training text)" in printed
    assert "train: unchanged, kept" in printed and "export: unchanged, kept" in printed
    assert run(root, "export", "--detection.top_ratio=0.3") == 0
    printed = capsys.readouterr().out
    assert "train: train the chosen neurons" in printed and "(changed: the result of detect)" in printed


def test_changes_cover_all_keys_of_detection_score_and_export():
    own = {key for key in own_types() if key.startswith(("detection.", "score.", "export."))}
    assert own <= {key for flags, _ in CHANGES for key in flags}


def test_text_changes_the_inputs_of_the_stages_that_read_it(root):
    before = inputs(root)
    after = inputs(root, en_test="A sentence to test on.", sw_test="Another one.")
    # Without a test file, the valid file served both purposes.
    assert {stage for stage in ALL if after[stage] != before[stage]} == {
        "score",
        "pilot",
        "evaluate",
        "compare",
        "report",
    }
    later = inputs(root, en_test="One more.")
    assert {stage for stage in ALL if later[stage] != after[stage]} == {"evaluate", "compare", "report"}
    other = inputs(root, en_train="A sentence to train on.")
    assert all(other[stage] == later[stage] for stage in ("pilot", "train", "compare"))
    stable = {"detection.stability": "true"}
    detect_inputs = [inputs(root, stable | {"corpus.training_sentences": count})["detect"] for count in ("50", "60")]
    assert detect_inputs[0] != detect_inputs[1]


def test_mixture_and_its_text_change_the_inputs_of_training(root):
    mixed = {"training.mixture": "{sw: 4, en: 1}"}
    before = inputs(root, mixed)
    assert inputs(root, {"training.mixture": "{en: 1, sw: 4}"}) == before
    other = inputs(root, {"training.mixture": "{sw: 4, en: 2}"})
    assert {stage for stage in ALL if other[stage] != before[stage]} == {"pilot", "train", "compare"}
    other = inputs(root, mixed, en_train="A sentence to train on.")
    assert all(other[stage] != before[stage] for stage in ("pilot", "train", "compare"))


def test_comparison_by_gain_alone_ignores_the_limit_on_forgetting(root):
    by_gain = {"comparison.select_by": "target"}
    one, other = (inputs(root, by_gain | {"evaluation.max_forgetting": it})["compare"] for it in ("0.1", "0.2"))
    assert one == other


def test_stages_are_kept_after_irrelevant_changes(root, capsys):
    assert run(root, "export") == 0
    capsys.readouterr()
    flags = ["--training.logging_steps=1", "--detection.memory_gb=1", "--evaluation.max_forgetting=0.1"]
    assert run(root, "export", *flags, "--corpus.test_sentences=5") == 0
    assert capsys.readouterr().out.count("unchanged, kept") == 3


def test_comparison_with_own_rates_ignores_the_training_rate(root):
    own = {"comparison.learning_rates": "1e-3"}
    one, other = (inputs(root, own | {"training.learning_rate": rate})["compare"] for rate in ("1e-2", "5e-2"))
    assert one == other


def test_force_deletes_only_the_partial_work_of_its_stage(root):
    folders = [root / "out/.work" / stage for stage in ("score", "train", "compare")]

    def left_after(*flags):
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "something").touch()
        assert run(root, "train", *flags) == 0
        return [folder.name for folder in folders if folder.exists()]

    assert left_after() == left_after("--training.max_steps=5") == ["score", "train", "compare"]
    assert left_after("--force") == ["score", "compare"]


def test_manifest_names_all_text_that_was_read(root):
    (root / "aligned").mkdir()
    for language in ("en", "sw"):
        (root / f"aligned/{language}.txt").write_text("One sentence.\nAnother one.\n")
    assert run(root, "detect", f"--evaluation.parallel={root / 'aligned'}") == 0
    own = {"en.train.txt", "en.valid.txt", "sw.train.txt", "sw.valid.txt"}
    assert read_json(root / "out/manifest.json")["corpus"].keys() == own
    assert run(root, "evaluate", f"--evaluation.parallel={root / 'aligned'}") == 0
    assert read_json(root / "out/manifest.json")["corpus"].keys() == own | {"parallel/en.txt", "parallel/sw.txt"}


@pytest.mark.parametrize(
    ("launch", "words"),
    [
        (
            {"processes": 2},
            "from a training with 2 processes, but this run has 1 process; resume with the same launch settings, or",
        ),
        (
            {"precision": "bf16"},
            "with mixed_precision bf16, but this run has mixed_precision no; resume with the same launch settings",
        ),
    ],
)
def test_finished_training_is_kept_under_another_launcher(root, capsys, launch, words):
    """An unfinished training isn't resumed, because its steps so far used other text or other arithmetic."""
    assert run(root, "train") == 0
    file = root / "out/manifest.json"
    manifest = read_json(file)
    manifest["stages"]["train"] |= launch
    file.write_text(json.dumps(manifest))
    assert run(root, "export") == 0
    assert "train: unchanged, kept" in capsys.readouterr().out
    lost = root / "out/adapter/adapter_model.safetensors"
    content = lost.read_bytes()
    lost.unlink()
    assert run(root, "export") == 2
    assert words in capsys.readouterr().err
    lost.write_bytes(content)
    manifest = read_json(file)
    manifest["stages"]["train"]["finished"] = False
    file.write_text(json.dumps(manifest))
    assert run(root, "export") == 2
    assert words in capsys.readouterr().err
    assert (root / "out/checkpoint-6").exists()
    assert run(root, "train", "--training.max_steps=5") == 0
    assert "deletes the checkpoints of an unfinished training with other keys" in capsys.readouterr().out


def test_neurons_that_do_not_fit_are_refused_before_any_stage(root, capsys):
    NeuronSet({(9, "up"): [1]}).save(root / "mine.safetensors")
    assert run(root, "run", f"--training.neurons={root / 'mine.safetensors'}") == 2
    out, err = capsys.readouterr()
    assert "mine.safetensors" in err and "detect:" not in out


def test_manifest_keeps_the_settings_each_stage_ran_with(root):
    """Running an earlier stage later doesn't change what the manifest records of training and evaluation."""
    (root / "aligned").mkdir()
    for language in ("en", "sw"):
        (root / f"aligned/{language}.txt").write_text("One sentence.\nAnother one.\n")
    assert run(root, "evaluate", f"--evaluation.parallel={root / 'aligned'}", "--training.seed=7") == 0
    before = read_json(root / "out/manifest.json")
    flags = ["--detection.top_ratio=0.3", "--training.languages=en", "--training.learning_rate=9e-3"]
    assert run(root, "detect", "--force", *flags) == 0
    after = read_json(root / "out/manifest.json")
    assert after["recipe"]["detection"]["top_ratio"] == 0.3
    for section in ("training", "export", "evaluation"):
        assert after["recipe"][section] == before["recipe"][section]
    assert after["seeds"]["training"] == 7 and after["corpus"] == before["corpus"]
    assert after["frozen_weights"]["status"] == "identical"


@pytest.fixture
def rising_loss(monkeypatch):
    """Evaluations report losses that rise, so that the first checkpoint is the best."""
    evaluate = NeuronTrainer.evaluate

    def rising(self, *args, **kwargs):
        metrics = evaluate(self, *args, **kwargs)
        return metrics | {name: self.state.global_step for name in metrics if name.endswith("_loss")}

    monkeypatch.setattr(NeuronTrainer, "evaluate", rising)


def test_loss_figure_extends_to_the_end_of_training(root, rising_loss, monkeypatch):
    """It does so even if an earlier checkpoint was the best."""
    flags = ["--training.load_best_model_at_end=true", "--training.eval_strategy=steps", "--training.eval_steps=3"]
    flags += ["--training.logging_steps=1"]
    drawn = []
    original = page.draw_training
    monkeypatch.setattr(page, "draw_training", lambda history: drawn.append(history) or original(history))
    assert run(root, "report", *flags) == 0
    record = read_json(root / "out/manifest.json")["stages"]["train"]
    assert record["checkpoint"] == "checkpoint-3"
    assert {name.split("/")[0] for name in record["files"]} == {"checkpoint-3", "adapter", "trainer_state.json"}
    assert max(entry["step"] for entry in drawn[0] if "loss" in entry) == 6


def test_weights_of_the_best_step_are_not_saved_as_the_last(root, rising_loss):
    flags = ["--training.load_best_model_at_end=true", "--training.eval_strategy=steps", "--training.eval_steps=2"]
    flags += ["--training.save_strategy=best"]
    assert run(root, "train", *flags) == 0
    assert {it.name for it in (root / "out").glob("checkpoint-*")} == {"checkpoint-2"}
    state = read_json(root / "out/trainer_state.json")
    assert state["global_step"] == 6 and state["best_global_step"] == 2
    adapter, best = (root / f"out/{it}/adapter_model.safetensors" for it in ("adapter", "checkpoint-2"))
    assert adapter.read_bytes() == best.read_bytes()


def test_interrupted_training_that_replaces_another_resumes_from_its_own_checkpoints(root, monkeypatch, capsys):
    assert run(root, "train", "--training.max_steps=3") == 0
    original, steps = NeuronTrainer.training_step, []

    def interrupted(self, *args, **kwargs):
        steps.append(self.state.global_step)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(NeuronTrainer, "training_step", interrupted)
    assert run(root, "train", "--training.learning_rate=2e-2") == 130 and steps == [0, 1, 2, 3, 4]
    capsys.readouterr()
    assert run(root, "train", "--training.learning_rate=2e-2") == 0 and steps[5:] == [3, 4, 5]
    assert "resumed from checkpoint-3" in capsys.readouterr().out


def test_detection_counts_for_the_score_of_checkpoints(unchanged):
    folder, _ = unchanged
    flags = {"model.checkpoints": f"7={folder / 'model'}"}
    before, after = (inputs(folder, flags | {"detection.consistency": it})["score"] for it in ("0.9", "0.8"))
    assert before != after


def test_logging_counts_only_if_it_says_when_to_evaluate(unchanged):
    folder, _ = unchanged
    steps = {"training.eval_strategy": "steps"}
    for more, same in (({}, False), ({"training.eval_steps": "2"}, True)):
        one, other = (inputs(folder, steps | more | {"training.logging_steps": it})["train"] for it in ("1", "3"))
        assert (one == other) == same


def test_result_of_an_interrupted_stage_is_removed_with_what_it_came_from(root, monkeypatch, capsys):
    assert run(root, "evaluate") == 0

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(evaluate_stage, "measure", interrupted)
        assert run(root, "evaluate", "--evaluation.batch_size=3") == 130
    assert (root / "out/evaluation.json").exists()  # of the same checkpoint
    assert run(root, "export", "--training.learning_rate=5e-2") == 0
    assert not (root / "out/evaluation.json").exists()


def test_text_of_a_hub_dataset_is_read_once(root):
    """A local folder of the same layout stands in for the Hub and is deleted before the run continues."""
    hub = root / "hub"
    for language in ("en", "sw", "th"):
        (hub / language).mkdir(parents=True)
        source = "en" if language == "en" else "sw"
        lines = (root / f"text/{source}.train.txt").read_text().splitlines()
        (hub / language / "part.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    flags = [
        "--corpus.path=",
        f"--corpus.dataset={hub}",
        "--corpus.data_files={lang}/*.jsonl",
        "--evaluation.languages=th",
    ]
    flags += [f"--corpus.{purpose}_sentences=10" for purpose in ("training", "validation", "test")]
    assert run(root, "detect", *flags) == 0
    assert run(root, "detect", *flags, "--corpus.seed=1") == 0
    assert run(root, "evaluate", *flags) == 0
    shutil.rmtree(hub)
    assert run(root, "report", *flags) == 0
    assert run(root, "detect", *flags, "--corpus.seed=2") == 2


def test_results_of_an_earlier_run_are_reported(root, capsys):
    assert run(root, "run") == 0
    printed = capsys.readouterr().out
    assert "an earlier" not in printed
    assert run(root, "train", "--training.max_steps=4") == 0
    printed = capsys.readouterr().out
    assert "train: train the chosen neurons; this replaces an earlier result (changed: training.max_steps)" in printed
    assert "export, evaluate, report: the existing result comes from an earlier run; to renew: `run`" in printed
    assert run(root, "run", "--training.max_steps=4") == 0
    assert "comes from" not in capsys.readouterr().out


def test_foreign_files_are_refused_before_any_stage(root, capsys):
    (root / "out/checkpoint-10").mkdir(parents=True)
    (root / "out/enhanced").mkdir()
    for foreign in ("checkpoint-10/x", "enhanced/mine.txt"):
        (root / "out" / foreign).write_text("mine")
    for message, folder in (("checkpoint-10 isn't from a run recorded in", "checkpoint-10"), ("mine.txt", "enhanced")):
        assert run(root, "run") == 2
        printed = capsys.readouterr()
        assert message in printed.err and "detect:" not in printed.out
        shutil.rmtree(root / "out" / folder)
    assert run(root, "detect") == 0


def test_refused_model_leaves_a_finished_detection(root, capsys):
    assert run(root, "score") == 0
    GPT2LMHeadModel(GPT2Config(vocab_size=400, n_positions=64, n_embd=8, n_layer=1, n_head=1)).save_pretrained(
        root / "other"
    )
    AutoTokenizer.from_pretrained(root / "model").save_pretrained(root / "other")
    assert run(root, "score", f"--model.name={root / 'other'}") == 2
    assert "such models aren't supported" in capsys.readouterr().err
    assert run(root, "score") == 0
    printed = capsys.readouterr().out
    assert "detect: unchanged, kept" in printed and "score: unchanged, kept" in printed


def test_detecting_the_same_sets_again_keeps_the_score(root, capsys):
    assert run(root, "score") == 0
    assert run(root, "score", "--detection.verify=false") == 0
    printed = capsys.readouterr().out
    assert "detect: find each language" in printed and "score: unchanged, kept" in printed


def test_measurements_of_the_same_weights_are_reused(root, monkeypatch, capsys):
    """Exporting another format removes the evaluation of the enhanced checkpoint, but its numbers are kept."""
    assert run(root, "run") == 0
    before = read_json(root / "out/evaluation.json")
    assert run(root, "export", "--export.to=lora") == 0
    printed = capsys.readouterr().out
    assert "evaluate: removed, because it came from an earlier result; `run` makes it again" in printed
    assert (
        "report: the existing result comes from an earlier run" in printed
        and not (root / "out/evaluation.json").exists()
    )
    assert run(root, "export", "--export.to=delta") == 0
    assert "evaluate" not in capsys.readouterr().out  # it was already removed
    assert run(root, "export", "--export.to=lora") == 0
    measured = []
    monkeypatch.setattr(evaluate_stage, "measure", lambda model, texts, label: measured.append(label))
    monkeypatch.setattr("agnostic_train.pipeline.materials.load_model", lambda *_: pytest.fail("the model was loaded"))
    assert run(root, "evaluate", "--export.to=lora", "--evaluation.max_forgetting=0.1") == 0
    after = read_json(root / "out/evaluation.json")
    assert after.pop("objectives") and before.pop("objectives") and after == before and not measured
    assert all(
        "| before | after |" in (root / f"out/{folder}/README.md").read_text() for folder in ("enhanced", "lora")
    )
    assert capsys.readouterr().out.count(": kept from an earlier measurement\n") == 2


def test_other_weights_text_or_tokens_are_measured_again(root):
    """Each result equals that of `--force`, which reuses nothing."""
    shutil.copytree(root / "model", root / "named")
    named = f"--evaluation.checkpoints={root / 'named'}"
    evaluations = []

    def evaluated(*flags):
        assert run(root, "evaluate", named, *flags) == 0
        evaluations.append(read_json(root / "out/evaluation.json"))
        assert run(root, "evaluate", named, *flags, "--force") == 0
        assert read_json(root / "out/evaluation.json") == evaluations[-1]

    evaluated()
    evaluated("--export.dtype=bfloat16")
    evaluated("--corpus.test_sentences=5")
    evaluated("--corpus.max_length=8")
    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("a", "b")
    tokenizer.save_pretrained(root / "model")
    evaluated()
    of_named = [next(iter(it["checkpoints"].values()))["test"]["sw"]["perplexity"] for it in evaluations]
    assert of_named[0] == of_named[1] and len({*of_named[1:]}) == 4
    assert evaluations[0]["languages"]["sw"]["after"] != evaluations[1]["languages"]["sw"]["after"]


def test_exported_folder_can_contain_folders(root):
    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ messages }}"}
    tokenizer.save_pretrained(root / "model")
    assert run(root, "evaluate") == 0 and any(it.is_dir() for it in (root / "out/enhanced").iterdir())


def test_packing_changes_the_inputs_of_training(root):
    short = {"corpus.max_length": "30"}
    before, after = inputs(root, short), inputs(root, short | {"training.packing": "true"})
    assert {stage for stage in ALL if after[stage] != before[stage]} == {"pilot", "train", "compare"}


def test_files_count_by_their_content(root):
    shutil.copytree(root / "model", root / "other")
    folders = {f"{section}.checkpoints": str(root / "other") for section in ("evaluation", "model")}
    file, versions = root / "mine.safetensors", []
    for index in (1, 2):
        NeuronSet({(0, "up"): [index]}).save(file)
        (root / "other/config.json").open("a").write("\n")
        versions.append(inputs(root, folders | {"training.neurons": str(file)}))
    before, after = versions
    assert {stage for stage in ALL if after[stage] != before[stage]} >= {"score", "train", "evaluate"}


def test_pilot_depends_on_what_it_is_ranked_by(root):
    pilot = {"training.strategy": "pilot", "training.pilot_strategies": "shared,related"}
    before = inputs(root, pilot)
    for change in (
        {"corpus.validation_sentences": "5"},
        {"evaluation.max_forgetting": "0.1"},
        {"training.pilot_strategies": "shared,exclusive"},
    ):
        after = inputs(root, pilot | change)
        # The training depends on the winner alone.
        assert after["pilot"] != before["pilot"] and after["train"] == before["train"]
    after = inputs(root, pilot | {"training.pilot_steps": "7"})  # which leaves other text to the training
    assert after["pilot"] != before["pilot"] and after["train"] != before["train"]


def test_interrupted_stage_resumes_as_the_same_run(tmp_path):
    manifest, runs = Manifest(tmp_path), []
    for finishes in (False, True, False):
        manifest.start("compare", {"a": 1}, {}, {})
        runs.append(manifest.record("compare")["run"])
        if finishes:
            manifest.finish("compare", [], {}, {})
    assert runs[0] == runs[1] != runs[2]


def test_auto_depends_only_on_what_it_reads_of_the_score(root, capsys):
    flags = ["--training.strategy=auto", "--training.high=20", "--detection.consistency=0.3"]
    assert run(root, "train", *flags) == 0
    capsys.readouterr()
    assert run(root, "train", *flags, "--score.controls=0") == 0
    printed = capsys.readouterr().out
    assert "score: " in printed and "changed: score.controls" in printed and "train: unchanged, kept" in printed
    assert run(root, "train", *flags, f"--model.checkpoints={root / 'model'}") == 0
    printed = capsys.readouterr().out
    assert "(changed: model.checkpoints, score.controls)" in printed and "train: unchanged, kept" in printed


def test_checkpoints_that_cannot_be_trained_or_exported_are_refused_before_any_stage(root, capsys):
    config = json.loads((root / "model/config.json").read_text())
    quantised = config | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (root / "model/config.json").write_text(json.dumps(quantised))
    for stage, flags, what in (
        ("train", ["--training.update=mask"], "training.update 'mask'"),
        ("train", ["--training.strategy=lora"], "training.strategy 'lora'"),
        ("export", [], "enhanced/, the sum of weights and changes,"),
        ("run", [], "enhanced/, the sum of weights and changes,"),
        ("compare", [], "a comparison"),
    ):
        for dry in ([], ["--dry-run"]):
            assert_mistake(root, stage, [*flags, *dry], f"model.name: {what} needs the unquantised model, not", capsys)
    (root / "model/config.json").write_text(json.dumps(config))
    (root / "model/adapter_config.json").write_text("{}")
    for stage in ("train", "run", "compare"):
        for dry in ([], ["--dry-run"]):
            assert_mistake(root, stage, dry, "holds an adapter, too; merge it into the model", capsys)
    assert not (root / "out/neurons").exists()
    (root / "model/config.json").unlink()
    assert_mistake(root, "detect", [], "has no config.json but an adapter; merge it into its base", capsys)


@pytest.mark.parametrize(
    ("command", "stage", "flags", "then", "left"),
    [
        (
            "score",
            "score",
            ["--model.checkpoints={root}/model"],
            ["run"],
            ["emergence.json", "emergence", "figures/emergence.png"],
        ),
        ("train", "train", [], ["run", "--training.update=mask"], ["adapter"]),
        ("export", "export", ["--export.to=lora"], ["run"], ["lora"]),
        ("evaluate", "evaluate", [], ["export", "--export.dtype=bfloat16"], ["evaluation.json"]),
        ("train", "pilot", ["--training.strategy=pilot", "--training.pilot_steps=2"], ["run"], ["pilot.json"]),
    ],
)
def test_what_an_interrupted_stage_wrote_does_not_stay_as_another_runs(
    root, monkeypatch, command, stage, flags, then, left
):
    finish = Manifest.finish

    def interrupted(self, name, *args):
        if name == stage:
            raise KeyboardInterrupt
        return finish(self, name, *args)

    with monkeypatch.context() as patched:
        patched.setattr(Manifest, "finish", interrupted)
        assert run(root, command, *(it.format(root=root) for it in flags)) == 130
    assert (root / "out" / left[0]).exists()
    assert run(root, *then) == 0
    assert not [it for it in left if (root / "out" / it).exists()]
    if "run" in then:
        assert "Over the model's training" not in (root / "out/report.html").read_text()
