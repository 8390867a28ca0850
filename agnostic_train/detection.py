"""From impacts to each language's related neurons, streamed: per batch only counts leave the hooks."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from agnostic_train.decoder import PROJECTIONS, Site, find_decoder
from agnostic_train.files import UserError
from agnostic_train.impact.hooks import DEFAULT_MEMORY_GB, ImpactMeter
from agnostic_train.inference import Batch, left_as_found
from agnostic_train.neurons import LanguageNeurons, NeuronSet
from agnostic_train.self_check import verify_impacts


def detect_neurons(
    model: nn.Module,
    corpora: Mapping[str, Iterable[Batch]],
    top_ratio: float = 0.05,
    consistency: float = 1.0,
    attention: str = "exact",
    exclusive: str = "complement",
    *,
    min_languages: int | None = None,
    projections: Sequence[str] = PROJECTIONS,
    memory_gb: float = DEFAULT_MEMORY_GB,
    verify: bool = True,
    progress: bool = True,
) -> LanguageNeurons:
    """Finds the neurons that matter whenever a language is processed (Chen et al. 2025, section 2 and Appendix A).

    A neuron is related to a language when it is among the top `max(1, floor(top_ratio * size))` of its site in at
    least `consistency` of the language's sentences. An impact of zero never counts; ties go to the lower index.

    Args:
        model: a Hugging Face causal language model, on any device; left as found.
        corpora: per language an iterable of batches with `input_ids` and `attention_mask`, (sentences, length).
        top_ratio: part of a site's neurons that count as top in a sentence, in (0, 1].
        consistency: part of the sentences, in (0, 1].
        attention: `exact` or `paper`, see `neuron_impacts`.
        exclusive: `complement` (related minus shared) or `unique` (related to no other language).
        min_languages: shared means related to at least so many languages; all by default.
        projections: the projections to look at.
        memory_gb: bound on the temporaries of the q and k impacts, in GiB.
        verify: compare a few scores with real deactivation first, see `verify_impacts`.
        progress: show a progress bar per language.

    Raises:
        ValueError: an option out of range.
        UserError: a model that isn't supported or computes NaN, or a language without a sentence.
    """
    for name, value in (("top_ratio", top_ratio), ("consistency", consistency)):
        if not 0 < value <= 1:
            raise ValueError(f"{name} must be above 0 and at most 1, not {value}")
    if not corpora:
        raise UserError("corpus.languages: no language to detect the neurons of")
    if min_languages is not None and not 1 <= min_languages <= len(corpora):
        raise ValueError(f"min_languages must be from 1 to the number of languages, {len(corpora)}")
    sizes = find_decoder(model).sizes
    related: dict[str, NeuronSet] = {}
    num_sentences: dict[str, int] = {}
    with left_as_found(model):
        for language, batches in corpora.items():
            batches = iter(batches)
            first = next(batches, None)
            if first is None:
                raise UserError(f"corpus.languages: {language!r} has no sentence")
            if verify and not related:
                verify_impacts(model, first)
            with ImpactMeter(model, projections, attention, memory_gb) as meter:
                counts = _count_top(meter, chain([first], batches), top_ratio, language, progress)
            related[language] = counts.consistent(consistency, sizes)
            num_sentences[language] = counts.num_sentences
    settings = {
        "method": "impact",
        "attention": attention,
        "top_ratio": top_ratio,
        "consistency": consistency,
        "projections": list(projections),
        "num_sentences": num_sentences,
        "verified": verify,
    }
    return LanguageNeurons.from_related(related, exclusive, min_languages, settings)


class TopCounts:
    """How often each neuron of each site was among its sentence's top, counted on the device."""

    def __init__(self, top_ratio: float):
        self.top_ratio = top_ratio
        self.num_sentences = 0
        self._counts: dict[Site, Tensor] = {}
        self._finite: dict[Site, Tensor] = {}

    def add(self, site: Site, impacts: Tensor) -> None:
        """impacts: (sentences, neurons), float."""
        finite = impacts.isfinite().all()
        top = in_top(impacts, max(1, int(self.top_ratio * impacts.shape[1]))).sum(0, dtype=torch.int32)
        if site in self._counts:
            self._counts[site] += top
            self._finite[site] &= finite
        else:
            self._counts[site], self._finite[site] = top, finite

    def consistent(self, consistency: float, sizes: Mapping[Site, int]) -> NeuronSet:
        """The neurons that were in the top in at least `consistency` of the sentences."""
        for (layer, projection), finite in self._finite.items():
            if not finite:
                raise UserError(
                    f"model.name: impacts at layer {layer} {projection} aren't finite; the model computes NaN or Inf"
                )
        # The slack keeps 0.6 of 5 sentences at 3, whatever 0.6 * 5 is in binary.
        least = max(1.0, consistency * self.num_sentences * (1 - 1e-9))
        return NeuronSet({site: (counts >= least).nonzero().flatten() for site, counts in self._counts.items()}, sizes)


def in_top(impacts: Tensor, count: int) -> Tensor:
    """Which neurons are among the `count` largest of their sentence: bool, the shape of `impacts`.

    Exactly `count` a sentence unless fewer are above zero; of equal impacts the lower index is taken.
    """
    threshold = impacts.topk(count, dim=1).values[:, -1:]
    above = impacts > threshold
    tied = impacts == threshold
    places = count - above.sum(1, keepdim=True)
    return (above | (tied & (tied.cumsum(1) <= places))) & (impacts > 0)


def _count_top(
    meter: ImpactMeter, batches: Iterable[Batch], top_ratio: float, language: str, progress: bool
) -> TopCounts:
    counts = TopCounts(top_ratio)
    with tqdm(desc=f"detect {language}", unit=" sentences", disable=not progress, leave=False) as bar:
        for batch in batches:
            meter.measure(batch, counts.add)
            counts.num_sentences += len(batch["input_ids"])
            bar.update(len(batch["input_ids"]))
    return counts
