"""Checkpoints by name, and the table that is made of them."""

import pytest

from agnostic_train.agnostic_score import AgnosticScore
from agnostic_train.emergence import Checkpoint, follow_checkpoints
from agnostic_train.neurons import LanguageNeurons, NeuronSet


@pytest.mark.parametrize(
    ("entry", "source", "step"),
    [
        ("runs/step-00080", "runs/step-00080", 80),
        ("step143000", "step143000", 143000),
        ("stage1-step596057-tokens2500B", "stage1-step596057-tokens2500B", 2500),
        ("596057=stage1-step596057-tokens2500B", "stage1-step596057-tokens2500B", 596057),
        ("4373=runs/final", "runs/final", 4373),
        ("runs/final", "runs/final", None),
        ("runs-7/final", "runs-7/final", None),
    ],
)
def test_names_tell_the_step(entry, source, step):
    assert Checkpoint.parse(entry) == Checkpoint(source, step)


def test_an_interrupted_table_goes_on_where_it_stopped(tmp_path):
    found = LanguageNeurons.from_related({"a": NeuronSet({(0, "up"): [1, 2]}), "b": NeuronSet({(0, "up"): [2]})})
    checkpoints, measured = [Checkpoint("late", 9), Checkpoint("early", 2), Checkpoint("middle", 5)], []

    def measure(checkpoint):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(checkpoint.name)
        return found, AgnosticScore((checkpoint.step or 0) / 10, [])

    def follow():
        return follow_checkpoints(checkpoints, measure, lambda it: [it.name], tmp_path)

    with pytest.raises(KeyboardInterrupt):
        follow()
    measured.clear()
    rows = follow()
    assert measured == ["middle"] and [row["score"] for row in rows] == [0.2, 0.5, 0.9]
    assert rows[0]["shared"] == 1 and rows[0]["shared_ratio"] == {"a": 0.5, "b": 1.0} and rows[0]["related"]["a"] == 2
    checkpoints.append(Checkpoint("final", None))  # without a step, the given order
    measured.clear()
    assert [row["checkpoint"] for row in follow()] == ["late", "early", "middle", "final"]
