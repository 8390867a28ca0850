"""Overlaps between samples, with a detection whose result is known."""

import pytest

from agnostic_train.detection.stability import detection_stability, jaccard
from agnostic_train.neurons.language_neurons import LanguageNeurons
from agnostic_train.neurons.neuron_set import NeuronSet


def test_jaccard_per_projection():
    a, b = NeuronSet({(0, "q"): [1, 2], (0, "up"): [1]}), NeuronSet({(0, "q"): [2, 3], (1, "up"): [1]})
    overlap = jaccard(a, b)
    assert overlap["q"] == pytest.approx(1 / 3) and overlap["up"] == 0 and overlap["k"] is None
    assert overlap["all"] == pytest.approx(1 / 5)
    assert jaccard(NeuronSet({}), NeuronSet({}))["all"] is None


def test_each_comparison_uses_the_sentences_it_names():
    sample_sizes = []

    def detect(sentences):
        """Detect one neuron per sentence, so that two detections overlap as their sentences do."""
        sample_sizes.append({language: len(lines) for language, lines in sentences.items()})
        return LanguageNeurons.from_related(
            {language: NeuronSet({(0, "up"): [int(line) for line in lines]}) for language, lines in sentences.items()}
        )

    sentences = {"a": [str(n) for n in range(400)], "b": [str(n) for n in range(400, 800)]}
    others = {"a": [str(n) for n in range(200, 700)], "b": [str(n) for n in range(2000, 2500)]}
    neurons = detect(sentences)
    result = detection_stability(detect, neurons, sentences, others)
    assert list(result) == ["halves", "second sample", "first 100", "first 300"]
    assert result["halves"]["a"]["all"] == 0 and result["first 100"]["b"]["up"] == 0.25
    assert result["first 300"]["a"]["all"] == 0.75
    assert result["second sample"]["a"]["all"] == pytest.approx(200 / 600) and result["second sample"]["b"]["all"] == 0
    assert [it["a"] for it in sample_sizes] == [400, 200, 200, 400, 100, 300]
    assert "second sample" not in detection_stability(detect, neurons, sentences, {"a": [], "b": []})
    one = {language: lines[:1] for language, lines in sentences.items()}
    assert list(detection_stability(detect, detect(one), one, others)) == ["second sample"]


def test_first_sentences_are_compared_only_if_there_are_more():
    def detect(sentences):
        return LanguageNeurons.from_related({"a": NeuronSet({(0, "up"): range(len(sentences["a"]))})})

    sentences = {"a": ["x"] * 100}
    assert list(detection_stability(detect, detect(sentences), sentences, {"a": []})) == ["halves"]


def test_compared_samples_are_equally_large():
    """Both halves have half the smallest language's sentences; the second sample is as large as the first."""
    sample_sizes = []

    def detect(sentences):
        sample_sizes.append({language: len(lines) for language, lines in sentences.items()})
        sets = {language: NeuronSet({(0, "up"): range(len(lines))}) for language, lines in sentences.items()}
        return LanguageNeurons.from_related(sets)

    sentences, others = {"a": ["x"] * 8, "b": ["x"] * 20}, {"a": ["y"] * 30, "b": ["y"] * 30}
    detection_stability(detect, detect(sentences), sentences, others)
    assert sample_sizes[1:] == [{"a": 4, "b": 4}, {"a": 4, "b": 4}, {"a": 8, "b": 20}]
