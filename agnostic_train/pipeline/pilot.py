"""`strategy: pilot`: every candidate trains a few steps on text set aside for it; the best on validation text wins."""

import math
from collections.abc import Mapping, Sequence

from tqdm.auto import tqdm

from agnostic_train.corpus.encoding import Encoder
from agnostic_train.errors import UserError
from agnostic_train.pipeline.trials import Trial, Trials
from agnostic_train.recipe import Recipe
from agnostic_train.training.trainer import NeuronTrainingArguments

Sentences = dict[str, Sequence[str]]


def split_pilot_text(
    recipe: Recipe, arguments: NeuronTrainingArguments, encoder: Encoder, training: Mapping[str, Sequence[str]]
) -> tuple[Sentences, Sentences]:
    """Splits the training sentences: those for the main training, and as many as a pilot reads once.

    For packed text, the second number is an estimate.

    Raises:
        UserError: the pilot would take more than half of a language's sentences.
    """
    batch = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    shares = recipe.training.mixture or dict.fromkeys(training, 1.0)
    proper, pilot = {}, {}
    for language, sentences in training.items():
        num_sequences = recipe.training.pilot_steps * batch * shares[language] / sum(shares.values())
        if recipe.training.packing:
            num_sequences *= encoder.sentences_packed(sentences, f"training text of {language}")
        wanted = math.ceil(num_sequences)
        if 2 * wanted > len(sentences):
            raise UserError(
                f"training.pilot_steps: {recipe.training.pilot_steps} steps read {wanted} sentences of {language!r}, "
                f"more than half of its {len(sentences)}; lower it or add text"
            )
        proper[language] = sentences[: len(sentences) - wanted]
        pilot[language] = sentences[len(sentences) - wanted :]
    return proper, pilot


def rank_candidates(
    trials: Trials, candidates: Sequence[str], languages: Sequence[str], seed: int, rate: float
) -> list[dict]:
    """Trains each candidate briefly; returns plain JSON rows, the best first.

    A row has the `strategy`, the relative `change` of bits per byte on validation text, averaged over the given
    languages (None if the training diverged), every language's own change, and the number of `trainable` weights.

    Raises:
        UserError: every candidate diverged.
    """
    base = trials.base()
    rows = []
    hidden = not trials.materials.processes.is_local_main_process
    bar = tqdm(candidates, desc="pilot", unit=" strategies", disable=hidden, leave=False)
    for name in bar:
        bar.set_postfix_str(name)
        result = trials.run(Trial(name, seed, rate))
        changes = result.changes(base)
        mean = None if changes is None else sum(changes[it] for it in languages) / len(languages)
        rows.append({"strategy": name, "change": mean, "languages": changes, "trainable": result.record["trainable"]})
    rows.sort(key=lambda row: math.inf if row["change"] is None else row["change"])
    if rows[0]["change"] is None:
        raise UserError(f"training.learning_rate: {rate:.3g} makes every pilot diverge; lower it")
    return rows
