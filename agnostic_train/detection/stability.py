"""How stable detected sets are: their overlap with the sets that another sample of the same language would give."""

from collections.abc import Callable

from agnostic_train.model.decoder import PROJECTIONS
from agnostic_train.neurons.language_neurons import LanguageNeurons
from agnostic_train.neurons.neuron_set import NeuronSet

SAMPLE_SIZES = (100, 300, 1000)

Sentences = dict[str, list[str]]
Overlaps = dict[str, dict[str, float | None]]


def jaccard(a: NeuronSet, b: NeuronSet) -> dict[str, float | None]:
    """Jaccard index (intersection over union) per projection and for `all`; None where both sets are empty."""
    shared, either = a & b, a | b
    parts, wholes = shared.counts(), either.counts()
    pairs = {name: (parts[name], wholes[name]) for name in PROJECTIONS}
    pairs["all"] = (len(shared), len(either))
    return {name: part / whole if whole else None for name, (part, whole) in pairs.items()}


def detection_stability(
    detect: Callable[[Sentences], LanguageNeurons], detected: LanguageNeurons, sentences: Sentences, others: Sentences
) -> dict[str, Overlaps]:
    """Jaccard overlaps of the related sets, per comparison, language and projection.

    Args:
        detect: detects on the given sentences with the run's own settings.
        detected: the neurons detected on all of `sentences`.
        sentences: per language, in random order.
        others: per language, further sentences, for a second sample of equal size if there are enough.

    Returns: `halves` (the two halves of the sample, if it has two), `second sample` (another sample of equal size, as
        another seed would draw it), and `first N` (N sentences against all), for each N of `SAMPLE_SIZES` below the
        sample's size.
    """
    size = min(len(it) for it in sentences.values())
    middle = size // 2
    result: dict[str, Overlaps] = {}
    if middle:
        result["halves"] = _overlaps(
            detect({language: it[:middle] for language, it in sentences.items()}),
            detect({language: it[middle:size] for language, it in sentences.items()}),
        )
    if all(len(others[language]) >= len(it) for language, it in sentences.items()):
        second = detect({language: others[language][: len(it)] for language, it in sentences.items()})
        result["second sample"] = _overlaps(detected, second)
    for count in SAMPLE_SIZES:
        if count < size:
            first = detect({language: it[:count] for language, it in sentences.items()})
            result[f"first {count}"] = _overlaps(detected, first)
    return result


def _overlaps(a: LanguageNeurons, b: LanguageNeurons) -> Overlaps:
    return {language: jaccard(a.related[language], b.related[language]) for language in a.languages}
