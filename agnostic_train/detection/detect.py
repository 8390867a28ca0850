"""Impacts that passed the self-check, and the detection of each language's related neurons from them.

Detection is streamed: per batch, only counts are kept.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from itertools import chain
from math import inf
from operator import add
from pathlib import Path
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers.utils import logging

from agnostic_train.choices import Attention, Exclusive, Method, check_choice
from agnostic_train.detection.counting import CountingOptions, count_top_neurons
from agnostic_train.detection.lape import firing_rates, specific_neurons
from agnostic_train.detection.self_check import verify_impacts
from agnostic_train.detection.top_counts import TopCounts
from agnostic_train.errors import UserError
from agnostic_train.impact.hooks import DEFAULT_MEMORY_GB, unverified_impacts
from agnostic_train.model.batches import Batch, check_batch, check_corpora, find_device, own_sentences
from agnostic_train.model.decoder import PROJECTIONS, Site, check_projections, find_decoder
from agnostic_train.model.inference import left_as_found
from agnostic_train.model.weights import model_checksum
from agnostic_train.neurons.language_neurons import LanguageNeurons, check_languages, check_min_languages
from agnostic_train.neurons.neuron_set import NeuronSet
from agnostic_train.processes import num_processes, own_share, process_index

logger = logging.get_logger(__name__)


_verified: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()
"""By model, the projections whose impacts have been compared with real deactivation."""


def neuron_impacts(
    model: nn.Module,
    batch: Batch,
    projections: Sequence[str] | None = None,
    attention: Attention = "exact",
    *,
    verify: bool = True,
) -> dict[Site, Tensor]:
    """Impact of every neuron of every site on its own layer's output, per sentence.

    The impact is the L2 norm, over the sentence's real tokens and the feature axis, of the change that deactivating the
    neuron makes: in the concatenated heads for `q k v`, in `o_proj`'s output for `o`, in `down_proj`'s output for
    `gate up down` (Chen et al. 2025, Appendix A).

    Args:
        model: a Hugging Face causal language model; left as found (mode, gradients, random states).
        batch: `input_ids` and `attention_mask`, (sentences, length), padded on either side. An optional
            `special_tokens_mask` (1 at special tokens) excludes those tokens from the norms.
        projections: some of `q k v o gate up down`; all by default.
        attention: `exact` equals real deactivation; `paper` is Eq. 11 on the rotated queries and keys.
        verify: on the first measurement of a model, compare a few of its neurons with real deactivation, see
            `verify_impacts`.

    Returns: (layer, projection) -> float32 (sentences, neurons), on the model's device.

    Raises:
        UserError: the model's projections can't be found, or its attention isn't supported.
        ImpactMismatchError: impacts don't equal real deactivation.
        ValueError: an unknown projection or attention mode, or a batch of wrong shapes or tokens.
    """
    projections = check_projections(projections, model)
    check_choice("attention", attention, Attention)
    unverified = {*projections} - _verified.get(model, set())
    if verify and unverified:
        verify_impacts(model, batch, pruning=False, projections=projections)
        _verified[model] = _verified.get(model, set()) | unverified
    return unverified_impacts(model, batch, projections, attention)


def detect_neurons(
    model: nn.Module,
    corpora: Mapping[str, Iterable[Batch]],
    top_ratio: float = 0.05,
    consistency: float = 1.0,
    attention: Attention = "exact",
    exclusive: Exclusive = "complement",
    *,
    min_languages: int | None = None,
    method: Method = "impact",
    lape_ratio: float = 0.01,
    projections: Sequence[str] = PROJECTIONS,
    memory_gb: float = DEFAULT_MEMORY_GB,
    activations: bool = True,
    pruning: bool = True,
    verify: bool = True,
    progress: bool = True,
    resume_dir: str | Path | None = None,
) -> LanguageNeurons:
    """Finds the neurons that matter whenever a language is processed (Chen et al. 2025, section 2 and Appendix A).

    A neuron is related to a language if it is among the top `max(1, floor(top_ratio * size))` of its site in at least
    `consistency` of the language's sentences. An impact of zero never counts. Ties go to the lower index, but on a CPU
    equal neurons of q or k may have impacts that differ in the last bit.

    Several processes share the batches and sum their counts: pass all of `corpora` to each.

    Args:
        model: a Hugging Face causal language model, on any device; left as found.
        corpora: per language an iterable of batches with `input_ids` and `attention_mask`, (sentences, length).
        top_ratio: fraction of a site's neurons that count as top in a sentence, in (0, 1].
        consistency: fraction of the sentences, in (0, 1].
        attention: `exact` or `paper`, see `neuron_impacts`.
        exclusive: `complement` (related minus shared) or `unique` (related to no other language).
        min_languages: shared means related to at least this many languages; all by default.
        method: `impact`, or `lape` for language activation probability entropy (Tang et al. 2024), which selects only
            feed-forward units, by their firing rates over all languages, and ignores `top_ratio` and `consistency`.
        lape_ratio: fraction of all feed-forward units that `lape` selects, in (0, 1].
        projections: the projections in which `impact` detects neurons.
        memory_gb: bound on the temporaries of the q and k impacts, in GiB.
        activations: also measure each neuron's mean absolute activation in each language, which `random_like` can
            match; only with `impact`.
        pruning: skip q and k neurons whose impact is proven to be below their sentence's top, which gives the same sets
            at a fraction of the work. Layers that pruning doesn't cover (such as soft caps on a CPU) are computed in
            full, and so are sentences for which it rules out too few neurons.
        verify: compare a few impacts with real deactivation first, see `verify_impacts`, and again for each language
            whose first batch is longer.
        progress: show a progress bar per language.
        resume_dir: a folder in which the counts so far are saved every half minute. An interrupted detection continues
            from its own counts there, to identical sets. Counts of other weights, settings or batches are discarded.
            `lape`, which costs no more than a forward pass, always starts over.

    Returns: the sets. `activations` has each language's mean absolute activations (None without `activations`),
        `exact_share` the fraction of the q and k neurons whose impact had to be computed (None without `pruning`), and
        `settings` the options above as plain JSON values.

    Raises:
        ValueError: an option out of range, or a batch of wrong shapes or tokens.
        TypeError: `corpora` doesn't map languages to batches.
        UserError: a model that isn't supported or computes NaN, or a language without a sentence.
        ImpactMismatchError: `verify` found impacts that don't equal real deactivation; a `UserError`.
    """
    check_choice("method", method, Method)
    # NumPy's float32 isn't JSON, and rounds a ratio so that another number of neurons may be top.
    top_ratio, consistency, lape_ratio, memory_gb = map(float, (top_ratio, consistency, lape_ratio, memory_gb))
    for name, value in (("top_ratio", top_ratio), ("consistency", consistency), ("lape_ratio", lape_ratio)):
        if not 0 < value <= 1:
            raise ValueError(f"{name} must be above 0 and at most 1, not {value}")
    if not 0 <= memory_gb < inf:
        raise ValueError(f"memory_gb must be a number of at least 0, not {memory_gb}")
    check_corpora(corpora)
    if not corpora:
        raise UserError("corpus.languages: no language given; name at least one")
    check_languages(corpora)
    for language, batches in corpora.items():
        if isinstance(batches, Sequence) and not batches:
            raise _no_sentence(language)
    check_min_languages(min_languages, len(corpora))
    check_choice("attention", attention, Attention)
    check_choice("exclusive", exclusive, Exclusive)
    projections = check_projections(projections, model)
    if method == "lape":
        return _detect_by_lape(model, corpora, lape_ratio, exclusive, min_languages, progress)
    options = CountingOptions(top_ratio, attention, projections, memory_gb, activations, pruning, progress)
    return _detect_by_impact(model, corpora, options, consistency, exclusive, min_languages, verify, resume_dir)


def _detect_by_impact(
    model: nn.Module,
    corpora: Mapping[str, Iterable[Batch]],
    options: CountingOptions,
    consistency: float,
    exclusive: Exclusive,
    min_languages: int | None,
    verify: bool,
    resume_dir: str | Path | None,
) -> LanguageNeurons:
    counts: dict[str, TopCounts] = {}
    related: dict[str, NeuronSet] = {}
    unpruned: set[int] = set()
    verified_length = 0
    sizes = find_decoder(model).sizes
    key = "" if resume_dir is None else options.key(model_checksum(model))
    with left_as_found(model):
        for language, corpus in corpora.items():
            batches = iter(corpus)
            first = next(batches, None)
            if first is None:
                raise _no_sentence(language)
            check_batch(model, first)
            # Some families treat later positions differently, so shorter sentences don't stand for longer ones.
            if verify and first["input_ids"].shape[1] > verified_length:
                verified_length = first["input_ids"].shape[1]
                verify_impacts(
                    model, first, pruning=options.pruning, projections=options.projections, memory_gb=options.memory_gb
                )
            file = None
            if resume_dir is not None:
                file = Path(resume_dir) / f"{language}.{process_index()}-of-{num_processes()}.safetensors"
            counts[language], layers = count_top_neurons(
                model, own_share(chain([first], batches)), options,
                description=f"detect {language}", num_sentences=own_sentences(corpus), file=file, key=key,
            )  # fmt: skip
            unpruned |= layers
            counts[language].sum_over_processes(sizes, find_device(model))
            related[language] = counts[language].consistent(consistency, sizes)
    settings = {
        "method": "impact",
        "attention": options.attention,
        "top_ratio": options.top_ratio,
        "consistency": consistency,
        "projections": list(options.projections),
        "num_sentences": {language: it.num_sentences for language, it in counts.items()},
        "verified": verify,
    }
    neurons = LanguageNeurons.from_related(related, exclusive, min_languages, settings)
    if options.activations:
        neurons.activations = {language: it.mean_activations() for language, it in counts.items()}
    if options.pruning:
        if unpruned:
            num_layers = len(find_decoder(model).layers)
            logger.warning(
                f"detection.pruning: {len(unpruned)} of {num_layers} layers cap their logits, normalise queries or "
                "keys other than by their mean square, or have heads dominated by a single entry; pruning doesn't "
                "cover these layers, so all their neurons were computed"
            )
        work = {name: reduce(add, (it.work[name] for it in counts.values())) for name in ("q", "k")}
        neurons.exact_share = {name: it.neurons / it.all_neurons for name, it in work.items() if it.all_neurons}
    return neurons


def _detect_by_lape(
    model: nn.Module,
    corpora: Mapping[str, Iterable[Batch]],
    ratio: float,
    exclusive: Exclusive,
    min_languages: int | None,
    progress: bool,
) -> LanguageNeurons:
    with left_as_found(model):
        firing = {language: firing_rates(model, batches, language, progress) for language, batches in corpora.items()}
    for language, rates in firing.items():
        if not rates.num_sentences:
            raise _no_sentence(language)
    related = specific_neurons(
        {language: it.rates for language, it in firing.items()}, ratio, find_decoder(model).sizes
    )
    settings = {
        "method": "lape",
        "lape_ratio": ratio,
        "num_sentences": {language: it.num_sentences for language, it in firing.items()},
    }
    return LanguageNeurons.from_related(related, exclusive, min_languages, settings)


def _no_sentence(language: str) -> UserError:
    return UserError(f"corpus.languages: {language!r} has no sentence")
