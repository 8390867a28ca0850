"""Before and after: what training did to every language, on text that selected nothing."""

from collections.abc import Mapping, Sequence

from torch import nn
from tqdm.auto import tqdm

from agnostic_train.inference import Batch
from agnostic_train.perplexity import Perplexity, perplexity


def evaluate_languages(
    model: nn.Module, corpora: Mapping[str, Sequence[Batch]], label: str, progress: bool = True
) -> dict[str, Perplexity]:
    """Perplexity of each language.

    Args:
        model: left as found.
        corpora: per language, batches as for `perplexity`.
        label: names the model in the progress bar.
    """
    bar = tqdm(corpora.items(), desc=f"evaluate {label}", unit=" languages", disable=not progress, leave=False)
    return {language: perplexity(model, batches) for language, batches in bar}


def compare_languages(before: Mapping[str, Perplexity], after: Mapping[str, Perplexity]) -> dict:
    """`evaluation.json`: per language perplexity and bits per byte before and after, and the relative change."""
    languages = {}
    for language in before:
        old, new = before[language], after[language]
        languages[language] = {
            "before": {"perplexity": old.value, "bits_per_byte": old.bits_per_byte},
            "after": {"perplexity": new.value, "bits_per_byte": new.bits_per_byte},
            "bits_per_byte_change": new.bits_per_byte / old.bits_per_byte - 1,
            "num_sentences": len(old.sentence_nats),
            "num_tokens": old.num_tokens,
        }
    return {"languages": languages}
