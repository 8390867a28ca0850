"""`strategy: pilot`: every candidate trains a few steps on text set aside for it; the best on validation text wins."""

import math
from collections.abc import Sequence

from tqdm.auto import tqdm

from agnostic_train.errors import UserError
from agnostic_train.pipeline.trials import Trial, Trials


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
