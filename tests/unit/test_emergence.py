"""Parsing of checkpoint names, and the emergence table over checkpoints."""

import pytest

from agnostic_train.neurons.language_neurons import LanguageNeurons
from agnostic_train.neurons.neuron_set import NeuronSet
from agnostic_train.report.tables import emergence_table
from agnostic_train.scores.emergence import Checkpoint, emergence_row, follow_checkpoints
from agnostic_train.scores.result import AgnosticScore, Controls, LanguageScore


@pytest.mark.parametrize(
    ("entry", "source", "step"),
    [
        ("runs/step-00080", "runs/step-00080", 80),
        ("step143000", "step143000", 143000),
        ("stage1-step596057-tokens2500B", "stage1-step596057-tokens2500B", 596057),
        ("global_step_7-v2", "global_step_7-v2", 7),
        ("runs/checkpoint-500", "runs/checkpoint-500", 500),
        ("iter0001000_early", "iter0001000_early", 1000),
        ("epoch=3-step=500.ckpt", "epoch=3-step=500.ckpt", 500),
        ("olmo-base-1000", "olmo-base-1000", 1000),
        ("stage-2000", "stage-2000", 2000),
        ("checkpoint-1000-bf16", "checkpoint-1000-bf16", 1000),
        # Commits, versions, sizes and rates aren't steps.
        ("step1k", "step1k", None),
        ("lr1e-4", "lr1e-4", None),
        ("9fceb02d0ae598e95dc970b74767f19372d61af8", "9fceb02d0ae598e95dc970b74767f19372d61af8", None),
        ("9fceb02", "9fceb02", None),
        ("v1.0", "v1.0", None),
        ("llama-3.2-1b-early", "llama-3.2-1b-early", None),
        ("5=stage1-step596057-tokens2500B", "stage1-step596057-tokens2500B", 5),
        ("4373=runs/final", "runs/final", 4373),
        ("runs/final", "runs/final", None),
        ("²=runs/final", "²=runs/final", None),
        ("runs-7/final", "runs-7/final", None),
    ],
)
def test_step_is_parsed_from_the_name(entry, source, step):
    assert Checkpoint.parse(entry) == Checkpoint(source, step)


def test_tilde_in_a_checkpoint_expands_to_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert Checkpoint.parse("~/step-7") == Checkpoint.parse("7=~/step-7") == Checkpoint("/home/someone/step-7", 7)


def test_interrupted_table_resumes_where_it_stopped(tmp_path):
    neurons = LanguageNeurons.from_related({"a": NeuronSet({(0, "up"): [1, 2]}), "b": NeuronSet({(0, "up"): [2]})})
    checkpoints, measured = [Checkpoint("late", 9), Checkpoint("early", 2), Checkpoint("middle", 5)], []

    def measure(checkpoint):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(checkpoint.name)
        return neurons, AgnosticScore((checkpoint.step or 0) / 10, [])

    def follow():
        return follow_checkpoints(checkpoints, measure, lambda it: [it.name], tmp_path)

    with pytest.raises(KeyboardInterrupt):
        follow()
    measured.clear()
    rows = follow()
    assert measured == ["middle"] and [row["score"] for row in rows] == [0.2, 0.5, 0.9]
    assert rows[0]["shared"] == 1 and rows[0]["shared_ratio"] == {"a": 0.5, "b": 1.0} and rows[0]["related"]["a"] == 2
    checkpoints.append(Checkpoint("final", None))  # if a step is unknown, the given order is kept
    measured.clear()
    assert [row["checkpoint"] for row in follow()] == ["late", "early", "middle", "final"]


def test_kept_row_of_a_renamed_checkpoint_has_the_new_name(tmp_path):
    neurons = LanguageNeurons.from_related({"a": NeuronSet({(0, "up"): [1, 2]}), "b": NeuronSet({(0, "up"): [2]})})
    rows = [
        follow_checkpoints([it], lambda it: (neurons, AgnosticScore(0.5, [])), lambda it: ["same weights"], tmp_path)[0]
        for it in (Checkpoint("old", 7), Checkpoint("new", 8))
    ]
    assert len(list(tmp_path.iterdir())) == 1
    assert [(row["checkpoint"], row["step"], row["score"]) for row in rows] == [("old", 7, 0.5), ("new", 8, 0.5)]


def test_table_names_clipped_languages():
    neurons = LanguageNeurons.from_related({"a": NeuronSet({(0, "up"): [1, 2]}), "b": NeuronSet({(0, "up"): [2]})})
    rows = [LanguageScore(name, 10.0, 1, 1, -1.0, 2.0, 5e-7, ("shared",)) for name in "ab"]
    control = AgnosticScore(0.3, [LanguageScore("a", 10.0, 1, 1, 1.0, 2.0, 0.5), rows[1]])
    controls = {"random": Controls({1: control, 2: AgnosticScore(0.1, [])}), "matched": Controls({})}
    score = AgnosticScore(0.5, rows, controls)
    (row,) = emergence_table([emergence_row(Checkpoint("step-8", 8), neurons, score)])
    assert row["clipped"] == "a, b" and row["random_1_clipped"] == "b" and row["random_2_clipped"] == ""
    assert row["random_1"] == 0.3 and row["random_2"] == 0.1


def test_step_is_the_last_number_of_the_name():
    assert Checkpoint.parse("runs/v2-700") == Checkpoint("runs/v2-700", 700)
