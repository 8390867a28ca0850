"""Baselines, pilot and comparison on the command line, and what they measure."""

import csv
import json
import shutil

import pytest
import torch
from peft import PeftModel
from small_run import assert_mistake, root, run, template  # noqa: F401 (fixtures)
from transformers import AutoModelForCausalLM

from agnostic_train.files import read_json
from agnostic_train.neurons import LanguageNeurons, NeuronSet
from agnostic_train.trials import Trials

SMALL = (
    "--comparison.strategies=shared+exclusive,random,lora,full", "--comparison.seeds=3,4",
    "--comparison.learning_rates=[1e-2, 3e-2]", "--training.max_steps=3",
)  # fmt: skip


def test_a_lora_of_equal_size(root, capsys):
    assert run(root, "run", "--training.strategy=lora") == 0
    printed = capsys.readouterr().out
    assert "a LoRA of" in printed and "a LoRA touches whole matrices, so none was checked" in printed
    out = root / "out"
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(root / "model"), out / "adapter").eval()
    enhanced = AutoModelForCausalLM.from_pretrained(out / "enhanced").eval()
    ids = torch.arange(3, 13)[None]
    torch.testing.assert_close(enhanced(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)
    assert "a LoRA of every projection, merged, learned" in (out / "enhanced/README.md").read_text()
    assert run(root, "run", "--training.strategy=lora", "--export.to=lora") == 2
    assert "export.to: 'lora' needs neurons" in capsys.readouterr().err


def test_compare_trains_everything_alike_and_says_what_differs(root, capsys):
    assert run(root, "compare", *SMALL) == 0
    printed = capsys.readouterr().out
    out = root / "out"
    comparison = read_json(out / "comparison.json")
    names = ["shared+exclusive", "random", "lora", "full"]
    assert list(comparison["tuning"]) == list(comparison["texts"]["test"]["strategies"]) == names
    found = LanguageNeurons.load(out / "neurons")
    budget = comparison["tuning"]["shared+exclusive"]
    assert budget["neurons"] == len(found.shared | found.exclusive["sw"])
    assert comparison["tuning"]["random"]["trainable"] == budget["trainable"]
    assert 0.8 * budget["trainable"] < comparison["tuning"]["lora"]["trainable"] <= budget["trainable"]
    tokens = {it["tokens"] for it in comparison["tuning"].values()}
    assert len(tokens) == 1 and tokens.pop() > 0 and {it["steps"] for it in comparison["tuning"].values()} == {3}
    for tuning in comparison["tuning"].values():
        changes = {it["learning_rate"]: it["validation"]["sw"] for it in tuning["tried"]}
        assert min(changes, key=changes.get) == tuning["learning_rate"] and len(changes) >= 3
    with (out / "comparison/comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 2 * 3 and {row["seed"] for row in rows} == {"3", "4", "all"}
    text = (out / "comparison/comparison.md").read_text()
    assert text in printed and "| full |" in text and "Learning rates" in text
    for name in ("trade", "forgetting"):
        assert (out / f"comparison/{name}.png").stat().st_size > 1000 and (out / f"comparison/{name}.svg").exists()
    assert not list(out.glob("checkpoint-*")) and not list((out / ".trials").glob(".*"))

    assert run(root, "compare", *SMALL) == 0 and "compare: unchanged, kept" in capsys.readouterr().out
    # The report takes up what was compared, whenever that was.
    assert run(root, "run") == 0 and "Strategies compared" in (out / "report.html").read_text()
    assert (out / "figures/trade.png").exists()


def test_an_interrupted_comparison_trains_nothing_twice(root, monkeypatch, capsys):
    assert run(root, "compare", *SMALL, f"--output_dir={root / 'whole'}") == 0
    original, trained = Trials._measure, []

    def interrupted(self, trial, *rest):
        if len(trained) == 5:
            raise KeyboardInterrupt
        trained.append(str(trial))
        return original(self, trial, *rest)

    monkeypatch.setattr(Trials, "_measure", interrupted)
    assert run(root, "compare", *SMALL) == 130
    before, trained[:] = set(trained), []
    monkeypatch.setattr(
        Trials, "_measure", lambda self, trial, *rest: trained.append(str(trial)) or original(self, trial, *rest)
    )
    assert run(root, "compare", *SMALL) == 0
    assert trained and not before & set(trained)
    assert read_json(root / "out/comparison.json") == read_json(root / "whole/comparison.json")
    # One more strategy: only its own trainings are new.
    trained.clear()
    more = SMALL[0].replace("=", "=shared,", 1)
    assert run(root, "compare", more, *SMALL[1:]) == 0
    assert trained and all(name.startswith("shared,") for name in trained)
    # What one strategy's neurons have learnt needn't be learnt again for another that chooses the same.
    trained.clear()
    assert run(root, "compare", more.replace("=", "=related,", 1), *SMALL[1:]) == 0
    compared = read_json(root / "out/comparison.json")["texts"]["test"]["strategies"]
    assert not trained and compared["related"] == compared["shared+exclusive"]


def test_a_diverging_rate_is_passed_over(root, capsys):
    flags = ["--comparison.strategies=shared,full", "--comparison.seeds=0", "--training.max_steps=3"]
    rates = "--comparison.learning_rates=[1e-3, 1e-2, 1e30]"
    assert run(root, "compare", *flags, rates, "--training.max_grad_norm=0") == 0
    tuning = read_json(root / "out/comparison.json")["tuning"]["full"]
    assert tuning["tried"][-1] == {"learning_rate": 1e30, "validation": None} and tuning["learning_rate"] < 1
    assert "full, rate 1e+30, seed 0: diverged" in capsys.readouterr().out


def test_the_pilot_ranks_its_candidates_and_trains_the_best(root, capsys):
    flags = [
        "--training.strategy=pilot",
        "--training.pilot_steps=3",
        "--training.pilot_strategies=shared,exclusive,related",
    ]
    assert run(root, "train", *flags) == 0
    printed = capsys.readouterr().out
    ranking = read_json(root / "out/pilot.json")["ranking"]
    assert {row["strategy"] for row in ranking} == {"shared", "exclusive", "related"}
    assert [row["change"] for row in ranking] == sorted(row["change"] for row in ranking)
    assert f"pilot 1. {ranking[0]['strategy']}:" in printed
    record = json.loads((root / "out/manifest.json").read_text())["stages"]["train"]
    assert record["strategy"] == ranking[0]["strategy"] and "pilot.json" in record["files"]
    found = LanguageNeurons.load(root / "out/neurons")
    expected = {"shared": found.shared, "exclusive": found.exclusive["sw"], "related": found.related["sw"]}
    assert NeuronSet.load(root / "out/checkpoint-6/neurons.safetensors") == expected[ranking[0]["strategy"]]
    assert run(root, "train", *flags[:1], "--training.pilot_steps=30") == 2
    assert "training.pilot_steps: 30 steps read 120 sentences of 'sw', more than half" in capsys.readouterr().err


def test_the_pilot_reads_text_of_its_own(root, monkeypatch):
    from agnostic_train import fitting

    read = []
    original = fitting.training_examples
    monkeypatch.setattr(
        fitting, "training_examples", lambda encoder, text: read.append(text) or original(encoder, text)
    )
    assert (
        run(
            root,
            "train",
            "--training.strategy=pilot",
            "--training.pilot_steps=3",
            "--training.pilot_strategies=shared,related",
        )
        == 0
    )
    *pilot, proper = [set(text["sw"]) for text in read]
    assert len(pilot) == 2 and pilot[0] == pilot[1] and len(pilot[0]) == 12 and not pilot[0] & proper


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
    named = evaluation["checkpoints"][str(root / "model")]
    assert named["test"]["sw"] == evaluation["languages"]["sw"]["before"]
    page = (root / "out/report.html").read_text()
    assert "parallel text" in page and "Other checkpoints" in page and "Neither detected nor trained: th" in page
    published = {file.name for file in (root / "results").iterdir()}
    assert {"evaluation.csv", "score.csv", "ablation.csv", "neurons.csv", "score.png", "score.svg"} <= published
    assert run(root, "evaluate", *flags) == 0 and "evaluate: unchanged" in capsys.readouterr().out
    (root / "parallel/sw.txt").write_text("\n".join(f"sw three {number}" for number in range(8)))
    assert run(root, "evaluate", *flags) == 0 and "evaluate: unchanged" not in capsys.readouterr().out
    assert run(root, "evaluate", "--evaluation.languages=sw") == 2
    assert "evaluation.languages: 'sw' is in corpus.languages" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--comparison.strategies=shared"], "comparison.strategies"),
        (["--comparison.strategies=shared,auto"], "comparison.strategies"),
        (["--comparison.learning_rates=fast"], "comparison.learning_rates"),
        (["--comparison.seeds=[]"], "comparison.seeds"),
        (["--comparison.seds=1"], "did you mean --comparison.seeds?"),
        (["--evaluation.parallel=nowhere"], "evaluation.parallel: nowhere isn't a folder"),
        (["--evaluation.languages=xx"], "evaluation.languages: 'xx' has no file"),
        (["--evaluation.checkpoints=nowhere"], "evaluation.checkpoints: no such folder nowhere"),
    ],
)
def test_mistakes(root, capsys, flags, message):
    assert_mistake(root, "compare", flags, message, capsys)
