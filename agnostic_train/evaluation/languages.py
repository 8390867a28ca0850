"""The effect of training on each language, measured on text that was not used for any selection."""

import math
from collections.abc import Mapping

from agnostic_train.evaluation.comparison import NUM_RESAMPLES, relative_change, resampled_changes
from agnostic_train.scores.bootstrap import interval
from agnostic_train.scores.perplexity import Perplexity


def compare_languages(before: Mapping[str, Perplexity], after: Mapping[str, Perplexity]) -> dict:
    """Returns each language's results before and after, and the relative change of bits per byte with a 95% interval.

    Both results must come from the same sentences, but may be of any two models. The interval is a percentile
    bootstrap over sentences, with the same resampled sentences before and after.
    """
    languages = {}
    for seed, language in enumerate(before):
        old, new = before[language], after[language]
        drawn = resampled_changes(old, [new], NUM_RESAMPLES, seed * NUM_RESAMPLES)[1][:, 0]
        languages[language] = {
            "before": describe(old),
            "after": describe(new),
            "bits_per_byte_change": relative_change(old, new),
            "interval": interval(drawn),
            "num_sentences": len(old.sentence_nats),
            "num_tokens": old.num_tokens,
        }
    return languages


def describe(result: Perplexity) -> dict:
    """Returns perplexity, bits per byte, and bits per sentence (comparable across languages on parallel text)."""
    bits = result.nats / math.log(2)
    return {
        "perplexity": result.value,
        "bits_per_byte": result.bits_per_byte,
        "bits_per_sentence": bits / len(result.sentence_nats),
    }
