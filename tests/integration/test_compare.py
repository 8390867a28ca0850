"""Baselines, pilot and comparison on the command line, and their results."""

import csv
import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from forked import in_two_processes
from peft import PeftModel
from small_run import assert_mistake, root, run, template  # noqa: F401 (fixtures)
from transformers import AutoModelForCausalLM

from agnostic_train.files import read_json
from agnostic_train.neurons.language_neurons import LanguageNeurons
from agnostic_train.neurons.neuron_set import NeuronSet
from agnostic_train.pipeline import fitting, training_text, trials
from agnostic_train.pipeline.run import Pipeline
from agnostic_train.pipeline.stages import pilot as pilot_stage
from agnostic_train.pipeline.stages import train
from agnostic_train.pipeline.trials import Trials
from agnostic_train.recipe_file import load_recipe
from agnostic_train.report.terminal import in_terminal

SMALL = (
    "--comparison.strategies=shared+exclusive,random,lora,full", "--comparison.seeds=3,4",
    "--comparison.learning_rates=[1e-2, 3e-2]", "--training.max_steps=3",
)  # fmt: skip


def test_lora_of_equal_size_is_trained_and_merged(root, capsys):
    assert run(root, "run", "--training.strategy=lora") == 0
    printed = capsys.readouterr().out
    assert "a LoRA of" in printed and "a LoRA touches whole matrices, so none was checked" in printed
    out = root / "out"
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(root / "model"), out / "adapter").eval()
    enhanced = AutoModelForCausalLM.from_pretrained(out / "enhanced").eval()
    ids = torch.arange(3, 13)[None]
    torch.testing.assert_close(enhanced(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)
    card = (out / "enhanced/README.md").read_text()
    assert "a LoRA of every projection was trained, then merged" in card and "update: compact" not in card
    assert run(root, "run", "--training.strategy=lora", "--export.to=lora") == 2
    assert "export.to: 'lora' needs neurons" in capsys.readouterr().err


def cost_of(changes, max_forgetting):
    """What `comparison.select_by: objective` minimises if Swahili is enhanced."""
    excess = max(0, max(change for language, change in changes.items() if language != "sw") - max_forgetting)
    return (1 + changes["sw"]) * (1 + 10 * excess)


@pytest.mark.figures
def test_compare_trains_strategies_equally_and_reports_results(root, capsys):
    assert run(root, "compare", "--dry-run", *SMALL) == 0
    least, most = map(
        int, re.search(r"│ (\d+) to (\d+), each with these optimizer steps", capsys.readouterr().out).groups()
    )
    assert (least, most) == (4 * (3 + 2), 4 * (4 + 2))
    assert run(root, "compare", *SMALL) == 0
    printed, bars = capsys.readouterr()
    assert "train_loss" not in printed and len(re.findall("Loading weights: 100%", bars)) <= 1
    assert least <= len(re.findall(r"^compare: .*, rate .*, seed \d: ", printed, re.MULTILINE)) <= most
    out = root / "out"
    comparison = read_json(out / "comparison.json")
    names = ["shared+exclusive", "random", "lora", "full"]
    assert list(comparison["tuning"]) == list(comparison["texts"]["test"]["strategies"]) == names
    neurons = LanguageNeurons.load(out / "neurons")
    budget = comparison["tuning"]["shared+exclusive"]
    assert budget["neurons"] == len(neurons.shared | neurons.exclusive["sw"])
    assert comparison["tuning"]["random"]["trainable"] == budget["trainable"]
    assert 0.8 * budget["trainable"] < comparison["tuning"]["lora"]["trainable"] <= budget["trainable"]
    tokens = {it["tokens"] for it in comparison["tuning"].values()}
    assert len(tokens) == 1 and tokens.pop() > 0 and {it["steps"] for it in comparison["tuning"].values()} == {3}
    for tuning in comparison["tuning"].values():
        costs = {it["learning_rate"]: cost_of(it["validation"], 0.03) for it in tuning["tried"]}
        assert min(costs, key=costs.get) == tuning["learning_rate"] and len(costs) >= 3
    with (out / "comparison/comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 2 * 3 and {row["seed"] for row in rows} == {"3", "4", "all"}
    for row in (row for row in rows if row["seed"] == "all"):
        expected = comparison["texts"]["test"]["strategies"][row["strategy"]]["languages"][row["language"]]
        assert [float(row[it]) for it in ("change", "low", "high")] == [expected["mean"], *expected["interval"]]
    with (out / "comparison/differences.csv").open() as file:
        rows = list(csv.DictReader(file))
    differences = comparison["texts"]["test"]["differences"]
    assert [[row["first"], row["second"]] for row in rows] == [it["strategies"] for it in differences]
    for row, expected in zip(rows, differences, strict=True):
        values = [float(row[it]) for it in ("difference", "low", "high", "simultaneous_low", "simultaneous_high")]
        assert values == [expected["mean"], *expected["interval"], *expected["simultaneous_interval"]]
        assert row["beyond_noise"] == str(expected["beyond_noise"])
    text = (out / "comparison/comparison.md").read_text()
    assert in_terminal(text) in printed and "| full |" in text and "Learning rates" in text
    assert f"compare: {out}/comparison/comparison.md" in printed and "compare: 2 of " in printed
    for name in ("trade", "rates", "forgetting"):
        assert (out / f"comparison/{name}.png").stat().st_size > 1000 and (out / f"comparison/{name}.svg").exists()
    assert not list(out.glob("checkpoint-*")) and not list((out / ".work/compare").glob(".*"))

    assert run(root, "compare", *SMALL) == 0
    printed = capsys.readouterr().out
    assert "compare: unchanged, kept" in printed and in_terminal(text) in printed
    # The report includes a finished comparison, whenever it ran.
    assert run(root, "run", *SMALL) == 0 and "Strategies compared" in (out / "report.html").read_text()
    assert (out / "figures/trade.png").exists()
    capsys.readouterr()
    assert run(root, "run", *SMALL[1:]) == 0 and "Strategies compared" not in (out / "report.html").read_text()
    assert (
        "report: without the comparison, which is out of date; `compare` renews it (changed: comparison.strategies)"
        in capsys.readouterr().out
    )


def test_interrupted_comparison_trains_nothing_twice(root, monkeypatch, capsys):
    few = ["--comparison.strategies=shared+exclusive,lora", *SMALL[1:]]  # a LoRA starts from random numbers
    assert run(root, "compare", *few, f"--output_dir={root / 'whole'}") == 0
    original, trained = Trials._measure, []

    def interrupted(self, trial, *rest):
        if trial.strategy == "lora":
            raise KeyboardInterrupt
        trained.append(str(trial))
        return original(self, trial, *rest)

    monkeypatch.setattr(Trials, "_measure", interrupted)
    assert run(root, "compare", *few) == 130
    before, trained[:] = set(trained), []
    torch.manual_seed(5)  # the generators' state differs, as in another process
    monkeypatch.setattr(
        Trials, "_measure", lambda self, trial, *rest: trained.append(str(trial)) or original(self, trial, *rest)
    )
    assert run(root, "compare", *few) == 0
    assert trained and not before & set(trained)
    assert read_json(root / "out/comparison.json") == read_json(root / "whole/comparison.json")
    # With one more strategy, only its own trainings are new.
    trained.clear()
    capsys.readouterr()
    more = few[0].replace("=", "=shared,", 1)
    assert run(root, "compare", more, *few[1:]) == 0
    assert trained and all(name.startswith("shared,") for name in trained)
    lines = [line for line in capsys.readouterr().out.splitlines() if ", rate " in line]
    assert lines and all((" (kept): " in line) != (": shared, rate " in line) for line in lines)
    # Of two strategies that choose the same neurons, only one is trained and compared.
    trained.clear()
    before = read_json(root / "out/comparison.json")
    assert run(root, "compare", f"{more},related", *few[1:]) == 0
    assert not trained and before["same"] == {}
    assert read_json(root / "out/comparison.json") == before | {"same": {"related": "shared+exclusive"}}
    text = (root / "out/comparison/comparison.md").read_text()
    assert "related chooses the same neurons as shared+exclusive, and isn't listed separately." in text
    assert "| related |" not in text and "| difference |" in text


def test_trial_whose_measurements_are_missing_is_trained_again(root, monkeypatch, capsys):
    few = ["--comparison.strategies=exclusive,shared", *SMALL[1:]]
    assert run(root, "compare", *few) == 0
    before, original, trained = read_json(root / "out/comparison.json"), Trials._measure, []
    (root / "out/comparison.json").unlink()
    kept = sorted((root / "out/.work/compare").glob("*.safetensors"))
    kept[0].write_bytes(kept[0].read_bytes()[:50])
    monkeypatch.setattr(Trials, "_measure", lambda self, *rest: trained.append(1) or original(self, *rest))
    assert_mistake(root, "compare", few, f"{kept[0]}: not readable", capsys)
    kept[0].unlink()  # as the message says
    assert run(root, "compare", *few) == 0
    assert len(trained) == 1 and read_json(root / "out/comparison.json") == before


def test_diverging_rates_and_strategies_are_passed_over(root, capsys):
    flags = ["--comparison.strategies=shared,full", "--comparison.seeds=1", "--training.max_steps=3"]
    rates = "--comparison.learning_rates=[1e-3, 1e-2, 1e30]"
    assert run(root, "compare", *flags, rates, "--training.max_grad_norm=0") == 0
    tuning = read_json(root / "out/comparison.json")["tuning"]["full"]
    nothing = {"validation": None, "groups": None, "largest_forgetting": None}
    assert tuning["tried"][-1] == {"learning_rate": 1e30, **nothing} and tuning["learning_rate"] < 1
    printed = capsys.readouterr().out
    assert "full, rate 1e+30, seed 0: diverged" in printed
    # One seed tells nothing about the noise between trainings.
    assert "alone: one seed says nothing" in " ".join(printed.split()) and "beyond noise" not in printed
    original, failing = Trials._measure, {"full"}

    def diverging(self, trial, *rest):
        record, measured = original(self, trial, *rest)
        return ({**record, "diverged": True}, None) if trial.strategy in failing else (record, measured)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trials, "_measure", diverging)
        assert run(root, "compare", *flags, f"--output_dir={root / 'other'}", "--comparison.learning_rates=[1e-2]") == 0
        failing.add("shared")
        words = "comparison.learning_rates: every strategy diverged; name lower ones"
        assert_mistake(root, "compare", [*flags, f"--output_dir={root / 'none'}"], words, capsys)
    comparison = read_json(root / "other/comparison.json")
    assert comparison["diverged"] == ["full"] and list(comparison["texts"]["test"]["strategies"]) == ["shared"]
    text = (root / "other/comparison/comparison.md").read_text()
    assert "full diverged at every rate" in text and "| difference |" not in text  # nothing is left to compare with


def sw_changes(root):
    comparison = read_json(root / "out/comparison.json")
    return {name: it["languages"]["sw"]["by_seed"] for name, it in comparison["texts"]["test"]["strategies"].items()}


def test_seeds_differ_and_test_text_does_not_affect_tuning(root, capsys):
    flags = ["--comparison.strategies=shared,full", "--comparison.seeds=1,2", "--training.max_steps=3"]
    flags += ["--comparison.learning_rates=[1e-3, 1e-2]", "--training.data_seed=7"]
    assert run(root, "compare", *flags) == 0
    tuning, before = read_json(root / "out/comparison.json")["tuning"], sw_changes(root)
    assert all(changes["1"] != changes["2"] for changes in before.values())
    # Only the test lines of the valid files change: the same trainings are evaluated on other sentences.
    for language in ("en", "sw"):
        file = root / f"text/{language}.valid.txt"
        lines = file.read_text(encoding="utf-8").splitlines()
        lines[1::2] = [" ".join(reversed(line.split())) + " zz" for line in lines[1::2]]
        file.write_text("\n".join(lines), encoding="utf-8")
    assert run(root, "compare", *flags) == 0
    assert read_json(root / "out/comparison.json")["tuning"] == tuning and sw_changes(root) != before


def test_rates_are_selected_by_gain_and_forgetting(root, capsys):
    """Another selection needs no other trainings than those at a newly selected rate."""
    flags = [
        "--comparison.strategies=shared,full",
        "--comparison.seeds=1",
        "--comparison.learning_rates=[1e-3, 1e-2, 1e-1]",
    ]
    assert run(root, "compare", *flags, "--comparison.select_by=target") == 0
    by_target = read_json(root / "out/comparison.json")
    capsys.readouterr()
    assert run(root, "compare", *flags, "--evaluation.max_forgetting=0.001") == 0
    printed = capsys.readouterr().out
    assert all(f"full, rate {rate:.3g}, seed 0 (kept)" in printed for rate in (1e-3, 1e-2, 1e-1))
    by_objective = read_json(root / "out/comparison.json")
    tuning = by_objective["tuning"]["full"]
    costs = {it["learning_rate"]: cost_of(it["validation"], 0.001) for it in tuning["tried"]}
    for it in tuning["tried"]:
        changes = it["validation"]
        assert it["groups"]["enhanced"] == changes["sw"] and it["groups"]["all"] == pytest.approx(
            sum(changes.values()) / len(changes)
        )
    assert min(costs, key=costs.get) == tuning["learning_rate"] < by_target["tuning"]["full"]["learning_rate"]
    assert by_objective["max_forgetting"] == 0.001 and by_target["max_forgetting"] is None
    assert "with a penalty if those of another detected language rise by more than 0.1%" in " ".join(printed.split())
    assert run(root, "compare", *flags, "--comparison.select_by=all") == 0
    by_all = read_json(root / "out/comparison.json")["tuning"]["full"]
    means = {it["learning_rate"]: it["groups"]["all"] for it in by_all["tried"]}
    assert min(means, key=means.get) == by_all["learning_rate"]
    assert run(root, "compare", *flags, "--evaluation.max_forgetting=0.001") == 0
    capsys.readouterr()
    assert run(root, "compare", *flags, "--evaluation.max_forgetting=0.002") == 0
    assert "(changed: evaluation.max_forgetting)" in capsys.readouterr().out


def test_other_text_trains_again_and_other_logging_does_not(root, monkeypatch):
    flags = ["--comparison.strategies=shared,full", "--comparison.seeds=1", "--comparison.learning_rates=[1e-2]"]
    assert run(root, "compare", *flags) == 0
    trained, original = [], Trials._measure

    def counted(self, trial, *rest):
        trained.append(str(trial))
        return original(self, trial, *rest)

    monkeypatch.setattr(Trials, "_measure", counted)
    assert run(root, "compare", *flags, "--training.logging_steps=1", "--training.save_steps=2") == 0
    assert not trained
    before = sw_changes(root)
    file = root / "text/sw.train.txt"
    file.write_text(file.read_text(encoding="utf-8").replace("a", "e"), encoding="utf-8")
    assert run(root, "compare", *flags) == 0
    assert len(trained) == 5 and sw_changes(root) != before  # the base, two for tuning, two for comparing


def test_masked_training_counts_only_trainable_entries(root):
    flags = ["--comparison.strategies=shared,exclusive", "--comparison.seeds=1", "--comparison.learning_rates=[1e-2]"]
    trainable = []
    for update in ("compact", "mask"):
        assert run(root, "compare", *flags, f"--training.update={update}") == 0
        trainable.append({it["trainable"] for it in read_json(root / "out/comparison.json")["tuning"].values()})
    assert trainable[0] == trainable[1]


@pytest.mark.figures
def test_figure_that_a_comparison_no_longer_has_is_deleted_from_the_results(root):
    flags = [
        "--comparison.strategies=shared,full",
        "--comparison.seeds=1",
        f"--tracking.results_dir={root / 'results'}",
    ]
    assert run(root, "compare", *flags, "--comparison.learning_rates=[1e-2, 2e-2]") == 0
    assert (root / "results/rates.png").exists() and (root / "results/trade.png").exists()
    assert run(root, "compare", *flags, "--comparison.learning_rates=[1e-2]") == 0
    assert not (root / "results/rates.png").exists() and (root / "results/trade.png").exists()


@pytest.mark.figures
def test_report_leaves_out_results_of_another_recipe(root, capsys):
    """So do the copies in `tracking.results_dir`; a user's own files there are left alone."""
    flags = ["--comparison.strategies=shared,full", "--comparison.seeds=1", "--comparison.learning_rates=[1e-2]"]
    flags.append(f"--tracking.results_dir={root / 'results'}")
    assert run(root, "compare", *flags) == 0 and run(root, "run", *flags) == 0
    assert "Strategies compared" in (root / "out/report.html").read_text()
    for name in ("mine.csv", "tasks.csv"):
        (root / "results" / name).touch()
    compared = {f"comparison.{ending}" for ending in ("csv", "json", "md")} | {"trade.png", "forgetting.svg"}
    assert compared < {it.name for it in (root / "results").iterdir()}
    assert run(root, "run", "--detection.top_ratio=0.3", *flags) == 0
    assert "compare: the existing result comes from an earlier run; to renew: `compare`" in capsys.readouterr().out
    assert "Strategies compared" not in (root / "out/report.html").read_text()
    left = {it.name for it in (root / "results").iterdir()}
    assert not compared & left and {"mine.csv", "tasks.csv", "evaluation.csv", "score.png"} < left
    checkpoints = f"--model.checkpoints=7={root / 'model'}"
    assert run(root, "run", checkpoints, *flags) == 0
    assert "training step" in (root / "out/figures/emergence.svg").read_text()
    assert {"emergence.csv", "emergence.png"} < {it.name for it in (root / "results").iterdir()}
    assert run(root, "run", *flags) == 0
    assert not (root / "out/emergence.json").exists() and not (root / "out/figures/emergence.svg").exists()
    assert not [it for it in (root / "results").iterdir() if it.name.startswith("emergence")]


def test_a_pilot_reads_no_evaluation_text(root):
    whole = Pipeline(load_recipe(root / "recipe.yaml", {"training.strategy": "pilot"}))
    assert whole.inputs.of_trials("pilot")["text"].keys() == {"training", "validation"}
    assert "evaluation_texts" not in vars(whole.materials)


def test_pilot_ranks_its_candidates_and_trains_the_best(root, capsys):
    flags = [
        "--training.strategy=pilot",
        "--training.pilot_steps=3",
        "--training.pilot_strategies=shared,exclusive,related,shared+exclusive",
    ]
    assert run(root, "run", *flags, f"--tracking.results_dir={root / 'results'}") == 0
    printed = capsys.readouterr().out
    ranking = read_json(root / "out/pilot.json")["ranking"]
    assert {row["strategy"] for row in ranking} == {"shared", "exclusive", "related"}
    costs = [cost_of(row["languages"], 0.03) for row in ranking]
    assert costs == sorted(costs) and ranking[0]["change"] < 0
    assert all(row["change"] == row["languages"]["sw"] for row in ranking)
    assert all(row["forgetting"] == max(0, row["languages"]["en"]) for row in ranking)
    assert f"pilot: 1. {ranking[0]['strategy']}:" in printed
    assert "pilot: shared+exclusive chooses the same neurons as related, and isn't listed separately" in printed
    stages = json.loads((root / "out/manifest.json").read_text())["stages"]
    assert stages["train"]["strategy"] == stages["pilot"]["strategy"] == ranking[0]["strategy"]
    page = (root / "out/report.html").read_text()
    assert f"Strategy <b>{ranking[0]['strategy']}</b>" in page
    assert "<h2>Pilot</h2>" in page and f"<td>{ranking[0]['trainable']:,}</td>" in page
    with (root / "results/pilot.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["strategy"] for row in rows] == [row["strategy"] for row in ranking]
    assert float(rows[0]["change_en"]) == ranking[0]["languages"]["en"]
    assert "the best of the pilot" in stages["train"]["reason"] and "pilot.json" in stages["pilot"]["files"]
    neurons = LanguageNeurons.load(root / "out/neurons")
    expected = {"shared": neurons.shared, "exclusive": neurons.exclusive["sw"], "related": neurons.related["sw"]}
    assert NeuronSet.load(root / "out/checkpoint-6/neurons.safetensors") == expected[ranking[0]["strategy"]]
    for dry in ([], ["--dry-run"]):
        assert run(root, "train", *flags[:1], "--training.pilot_steps=30", *dry) == 2
        assert "training.pilot_steps: 30 steps read 120 sentences of 'sw', more than half" in capsys.readouterr().err
    epoch = ["--training.max_steps=-1", "--training.num_train_epochs=1", "--training.dataloader_drop_last=true"]
    epoch += ["--training.per_device_train_batch_size=16", "--training.pilot_steps=2", "--dry-run"]
    assert run(root, "train", *flags[:1], *epoch) == 0
    # 180 sentences without the pilot's 32 make nine batches of 16; the last four sentences are dropped.
    assert re.search(r"optimizer steps +│ 9 ", capsys.readouterr().out)


def test_pilot_says_if_its_winner_gains_nothing_because_others_cost_too_much(root, monkeypatch, capsys):
    changes = {"shared": {"en": 0.0, "sw": 0.001}, "related": {"en": 0.1, "sw": -0.05}}
    monkeypatch.setattr(
        Trials, "run", lambda self, trial: SimpleNamespace(
            record={"trainable": 1}, measured={}, changes=lambda base: changes[trial.strategy]
        ),
    )  # fmt: skip
    flags = ["--training.strategy=pilot", "--training.pilot_steps=3", "--training.pilot_strategies=shared,related"]
    for gain, message in (
        (-0.05, "pilot: the best doesn't improve sw; candidates that do cost another language too much"),
        (0.05, "pilot: no candidate improves sw; training.learning_rate may be too high"),
    ):
        changes["related"]["sw"] = gain
        assert run(root, "train", *flags, "--force") == 0
        assert message in capsys.readouterr().out


def test_another_ranking_trains_again_only_if_another_candidate_wins(root, read, monkeypatch, capsys):
    flags = ["--training.strategy=pilot", "--training.pilot_steps=3", "--training.pilot_strategies=shared,related"]
    assert run(root, "train", *flags) == 0
    trained, ranking = len(read), read_json(root / "out/pilot.json")["ranking"]
    capsys.readouterr()
    assert run(root, "train", *flags, "--evaluation.max_forgetting=10") == 0
    printed = capsys.readouterr().out
    assert "(changed: evaluation.max_forgetting)" in printed and "train: unchanged, kept" in printed
    assert read_json(root / "out/pilot.json")["ranking"] == ranking and len(read) == trained
    # Nor does another candidate with the winner's neurons, of which only the report shows more.
    assert run(root, "run", *flags) == 0
    capsys.readouterr()
    twin = ["--training.pilot_strategies=shared,shared+exclusive"]
    assert run(root, "train", *flags[:2], *twin) == 0 and len(read) == trained
    again = read_json(root / "out/pilot.json")["ranking"]
    assert (ranking[0]["strategy"], again[0]["strategy"]) == ("related", "shared+exclusive")
    printed = capsys.readouterr().out
    assert "train: unchanged, kept" in printed and "report: the existing result comes from an earlier run" in printed
    recipe = read_json(root / "out/manifest.json")["recipe"]["training"]
    assert recipe["pilot_strategies"] == ["shared", "shared+exclusive"] and recipe["strategy"] == "pilot"
    # Only the objective decides, and no candidate trains again for it.
    monkeypatch.setattr(pilot_stage, "relative_objective", lambda changes, *args: -cost_of(changes, 0.03))
    assert run(root, "train", *flags) == 0
    assert "the result of pilot" in capsys.readouterr().out
    assert read_json(root / "out/pilot.json")["ranking"] == ranking[::-1] and len(read) == trained + 1
    assert run(root, "train", *flags, "--force") == 0 and len(read) == trained + 4
    # A later training without a pilot leaves no ranking that isn't its own.
    results = f"--tracking.results_dir={root / 'results'}"
    assert run(root, "train", *flags, results) == 0 and (root / "results/pilot.csv").exists()
    assert run(root, "train", "--training.strategy=shared", results) == 0
    assert not (root / "out/pilot.json").exists() and not (root / "results/pilot.csv").exists()


def test_pilot_that_diverges_keeps_the_earlier_training(root, monkeypatch, capsys):
    flags = ["--training.strategy=pilot", "--training.pilot_steps=3", "--training.pilot_strategies=shared,related"]
    assert run(root, "export", *flags) == 0
    files = {path: path.read_bytes() for path in (root / "out").glob("[a-z]*/*") if path.is_file()}
    capsys.readouterr()
    assert run(root, "export", *flags, "--training.learning_rate=1e30") == 2
    assert "training.learning_rate: 1e+30 makes every pilot diverge; lower it" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in files} == files
    assert run(root, "export", *flags) == 0
    printed = capsys.readouterr().out
    assert "train: unchanged, kept" in printed and "export: unchanged, kept" in printed
    # The ranking of that earlier training isn't left beside another one.
    assert run(root, "train", *flags, "--training.learning_rate=1e30") == 2
    assert (root / "out/pilot.json").exists()
    assert run(root, "train", "--training.strategy=shared") == 0 and not (root / "out/pilot.json").exists()


def test_training_reads_no_text_of_a_pilot_by_more_processes(root, read):
    flags = ["--training.strategy=pilot", "--training.pilot_steps=3", "--training.pilot_strategies=shared,related"]
    in_two_processes("agnostic_train.cli", "main", ["train", str(root / "recipe.yaml"), *flags])
    assert run(root, "train", *flags, "--training.max_steps=2") == 0
    ((text, _),) = read
    # A step of two processes reads eight sentences.
    assert len(text["sw"]) == 180 - 3 * 8


def test_pilot_that_an_earlier_version_recorded_as_part_of_training_is_replaced(root):
    flags = ["--training.strategy=pilot", "--training.pilot_steps=3", "--training.pilot_strategies=shared,related"]
    assert run(root, "run", *flags) == 0
    manifest = read_json(root / "out/manifest.json")
    stages = manifest["stages"]
    stages["train"]["files"] |= stages.pop("pilot")["files"]
    (root / "out/manifest.json").write_text(json.dumps(manifest))
    assert run(root, "run", *flags, "--training.max_steps=2") == 0 and (root / "out/pilot.json").exists()


@pytest.mark.parametrize(("launch", "num_trainings"), [({}, 1), ({"processes": 2}, 4)])
def test_pilot_reuses_only_candidates_of_the_same_launcher(root, read, monkeypatch, launch, num_trainings):
    """Candidates trained by two processes have read other text."""
    flags = ["--training.strategy=pilot", "--training.pilot_steps=1"]
    flags.append("--training.pilot_strategies=shared,exclusive,related")

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pilot_stage, "write_json", interrupted)
        assert run(root, "train", *flags) == 130 and len(read) == 3
    original = pilot_stage.launch_settings
    monkeypatch.setattr(pilot_stage, "launch_settings", lambda arguments: original(arguments) | launch)
    read.clear()
    assert run(root, "train", *flags) == 0 and len(read) == num_trainings


@pytest.fixture
def read(monkeypatch):
    """Collect each training's sentences by language, and the number of sequences made of them."""
    texts, trainings = {}, []

    def encoded(encoder, text, section):
        examples = training_text.training_examples(encoder, text, section)
        texts[id(examples)] = text
        return examples

    def made(materials, arguments, choice, examples, *validation):
        trainings.append((texts[id(examples)], len(examples)))
        return fitting.make_trainer(materials, arguments, choice, examples, *validation)

    for module in (train, trials):
        monkeypatch.setattr(module, "training_examples", encoded)
        monkeypatch.setattr(module, "make_trainer", made)
    return trainings


def test_comparison_trains_every_strategy_on_the_mixture(root, read):
    flags = ["--comparison.strategies=shared,full", "--comparison.learning_rates=1e-3", "--training.max_steps=1"]
    assert run(root, "compare", *flags, "--comparison.seeds=1", "--training.mixture={sw: 1, en: 1}") == 0
    assert len(read) == 4 and all(text.keys() == {"sw", "en"} for text, _ in read)


def test_force_repeats_the_trainings_of_a_comparison(root, read):
    flags = ["--comparison.strategies=shared,related", "--comparison.learning_rates=1e-3", "--training.max_steps=1"]
    assert run(root, "compare", *flags, "--comparison.seeds=1") == 0
    trained = len(read)
    assert run(root, "compare", *flags, "--comparison.seeds=1,2") == 0
    assert len(read) == trained + 2
    assert run(root, "compare", *flags, "--comparison.seeds=1", "--force") == 0
    assert len(read) == 2 * trained + 2


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], {"sw": 12}),
        (["--training.mixture={sw: 3, en: 1}"], {"sw": 9, "en": 3}),
        (["--training.packing=true", "--corpus.max_length=60"], {"sw": None}),
    ],
)
def test_pilot_reads_text_that_training_does_not_read(root, read, flags, expected):
    """The pilot's text is enough for three steps of four sequences, packed or not."""
    pilot = ["--training.strategy=pilot", "--training.pilot_steps=3", "--training.pilot_strategies=shared,related"]
    assert run(root, "train", *pilot, *flags) == 0
    (first, num_sequences), (second, _), (proper, _) = read
    assert first == second and first.keys() == expected.keys()
    assert num_sequences == pytest.approx(12, rel=0.1)
    for language, count in expected.items():
        own = first[language]
        assert not set(own) & set(proper[language])
        assert len(own) > 24 if count is None else len(own) == count


def test_evaluation_of_other_languages_parallel_text_and_checkpoints(root, capsys):
    shutil.copy(root / "text/en.valid.txt", root / "text/th.valid.txt")
    (root / "parallel").mkdir()
    for language in ("en", "sw", "th"):
        lines = [f"{language} one two {number}" for number in range(8)]
        (root / f"parallel/{language}.txt").write_text("\n".join(lines))
    flags = [
        "--evaluation.languages=th", f"--evaluation.parallel={root / 'parallel'}", "--evaluation.parallel_sentences=6",
        f"--evaluation.checkpoints={root / 'model'}", f"--tracking.results_dir={root / 'results'}",
    ]  # fmt: skip
    assert run(root, "run", *flags) == 0
    evaluation = read_json(root / "out/evaluation.json")
    assert set(evaluation["languages"]) == set(evaluation["parallel"]) == {"en", "sw", "th"}
    assert evaluation["languages"]["th"]["before"] == evaluation["languages"]["en"]["before"]  # the same text
    assert evaluation["parallel"]["sw"]["num_sentences"] == 6
    for row in evaluation["languages"].values():
        assert row["interval"][0] <= row["bits_per_byte_change"] <= row["interval"][1]
    first, second = evaluation["pairs"]
    assert (first["first"], second["first"]) == ("before", "after") and first["second"] == str(root / "model")
    assert first["texts"]["test"]["sw"]["bits_per_byte_change"] == 0  # the base itself
    back = 1 + second["texts"]["test"]["sw"]["bits_per_byte_change"]
    assert back == pytest.approx(1 / (1 + evaluation["languages"]["sw"]["bits_per_byte_change"]))
    named = evaluation["checkpoints"][str(root / "model")]
    assert named["test"]["sw"] == evaluation["languages"]["sw"]["before"]
    page = (root / "out/report.html").read_text()
    assert "parallel text" in page and "Other checkpoints" in page and "Neither detected nor trained: th" in page
    published = {file.name for file in (root / "results").iterdir()}
    assert {"evaluation.csv", "score.csv", "ablation.csv", "neurons.csv", "score.png", "score.svg"} <= published
    assert run(root, "evaluate", *flags) == 0 and "evaluate: unchanged" in capsys.readouterr().out
    shutil.rmtree(root / "results")
    assert run(root, "run", *flags) == 0 and capsys.readouterr().out.count("unchanged, kept") == 6
    assert {file.name for file in (root / "results").iterdir()} == published
    (root / "parallel/sw.txt").write_text("\n".join(f"sw three {number}" for number in range(8)))
    assert run(root, "evaluate", *flags) == 0 and "evaluate: unchanged" not in capsys.readouterr().out
    assert run(root, "evaluate", "--evaluation.languages=sw") == 2
    assert "evaluation.languages: 'sw' is in corpus.languages" in capsys.readouterr().err


def test_comparison_and_pilot_refuse_sharded_models(root, monkeypatch, capsys):
    # accelerate's launcher sets this variable; accelerate's state, set up earlier in this process, doesn't reread it.
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for stage, flags in (("compare", ()), ("run", ("--training.strategy=pilot",))):
        assert run(root, stage, *flags) == 2
        assert "measures the model between trainings" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--comparison.strategies="], "comparison.strategies"),
        (["--comparison.strategies=shared,auto"], "comparison.strategies"),
        (["--comparison.learning_rates=fast"], "comparison.learning_rates"),
        (["--comparison.seeds=[]"], "comparison.seeds"),
        (["--comparison.seeds=1,1"], "comparison.seeds: names 1 twice"),
        (["--comparison.seeds=-1"], "comparison.seeds"),
        (["--comparison.seeds=0,1"], "tuning_seed 0 is one of seeds"),
        (["--comparison.strategies=full,full"], "comparison.strategies: names full twice"),
        (["--comparison.learning_rates=[-1e-2]"], "comparison.learning_rates"),
        (
            ["--detection.consistency=1", "--detection.top_ratio=0.01"],
            "comparison.strategies: 'shared' of sw has no neuron",
        ),
        (
            ["--training.lr_scheduler_type=reduce_lr_on_plateau", "--training.eval_strategy=epoch"],
            "reduce_lr_on_plateau follows evaluations, and compare",
        ),
        (["--training.strategy=full", "--training.update=mask", "--training.optim=adafactor"], "training.optim"),
        (["--evaluation.checkpoints=before"], "evaluation.checkpoints: 'before' is a name of this run's own"),
        (["--comparison.seds=1"], "did you mean --comparison.seeds?"),
        (["--evaluation.parallel=nowhere"], "evaluation.parallel: nowhere isn't a folder"),
        (["--evaluation.languages=xx"], "evaluation.languages: 'xx' has no file"),
        (["--evaluation.checkpoints=nowhere"], "evaluation.checkpoints: no such folder nowhere"),
        (["--evaluation.checkpoints=/proc"], "evaluation.checkpoints: /proc has no config.json"),
    ],
)
def test_mistakes_of_compare_are_one_line(root, capsys, flags, message):
    assert_mistake(root, "compare", flags, message, capsys)


def test_one_strategy_alone_has_seeds_but_no_differences(root, capsys):
    flags = ["--comparison.strategies=shared", "--comparison.seeds=1,2", "--comparison.learning_rates=[1e-2]"]
    assert run(root, "compare", *flags, f"--tracking.results_dir={root / 'results'}") == 0
    comparison = read_json(root / "out/comparison.json")
    row = comparison["texts"]["test"]["strategies"]["shared"]["languages"]["sw"]
    assert len(row["by_seed"]) == 2 and comparison["texts"]["test"]["differences"] == []
    assert (root / "results/comparison.csv").exists()
    assert not [*root.rglob("differences.csv")]


def test_comparison_refuses_a_neuron_file(root, capsys):
    NeuronSet({(0, "up"): [1]}).save(root / "mine.safetensors")
    flags = [f"--training.neurons={root / 'mine.safetensors'}"]
    assert_mistake(root, "compare", flags, "training.neurons: a comparison trains what its strategies choose", capsys)
    for order in ("sequential", "batch_rebalance"):
        message = f"training.train_sampling_strategy: '{order}' reads the text in the same order with every seed"
        assert_mistake(root, "compare", [f"--training.train_sampling_strategy={order}"], message, capsys)


def test_two_processes_give_the_comparison_of_one(root):
    flags = ["--comparison.strategies=shared,full", "--comparison.seeds=2", "--training.max_steps=3"]
    # The second rate diverges; both processes must agree that it does.
    flags += ["--comparison.learning_rates=[1e-2, 1e30]", "--training.max_grad_norm=0"]
    assert run(root, "compare", *flags) == 0
    alone = sw_changes(root)
    command = ["compare", str(root / "recipe.yaml"), "--training.per_device_train_batch_size=2", *flags]
    printed = in_two_processes("agnostic_train.cli", "main", command)
    assert printed.count("full, rate 0.01, seed 2") == 1 and "diverged" in printed
    for name, by_seed in sw_changes(root).items():
        assert by_seed == pytest.approx(alone[name], abs=1e-4)


def test_processes_agree_to_read_streamed_text_for_the_manifest(root):
    """Only the main process writes the manifest, for which it asks whether the comparison is up to date."""
    (root / "hub").mkdir()
    for language in ("en", "sw"):
        lines = (root / f"text/{language}.train.txt").read_text().splitlines()
        (root / f"hub/{language}.txt").write_text("\n".join(lines))
    flags = ["--corpus.path=", f"--corpus.dataset={root / 'hub'}", "--corpus.data_files={lang}.txt"]
    flags += [f"--corpus.{it}_sentences=10" for it in ("detection", "training", "validation", "test")]
    flags += ["--comparison.strategies=shared,exclusive", "--comparison.seeds=1", "--comparison.learning_rates=1e-2"]
    flags += ["--training.max_steps=2", "--training.per_device_train_batch_size=2"]
    recipe = str(root / "recipe.yaml")
    in_two_processes("agnostic_train.cli", "main", ["compare", recipe, *flags])
    assert "detect: " in in_two_processes("agnostic_train.cli", "main", ["detect", recipe, *flags, "--force"])
