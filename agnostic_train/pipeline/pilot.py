"""`strategy: pilot`: every candidate trains a few steps on text set aside for it; the best on validation text wins."""

import math
from collections.abc import Sequence

from tqdm.auto import tqdm

from agnostic_train.errors import UserError
from agnostic_train.evaluation.objective import largest_forgetting, relative_objective, target_change
from agnostic_train.pipeline.trials import Trial, Trials


def rank_candidates(
    trials: Trials,
    candidates: Sequence[str],
    enhanced: Sequence[str],
    max_forgetting: float,
    seed: int,
    rate: float,
) -> list[dict]:
    """Trains each candidate briefly; returns plain JSON rows, the best by `evaluation.objective` first.

    A row has the `strategy`, the relative `change` of bits per byte on validation text, averaged over the enhanced
    languages (None if the training diverged), the largest `forgetting` among the others, every language's own change,
    and the number of `trainable` weights.

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
        rows.append(
            {
                "strategy": name,
                "change": None if changes is None else target_change(changes, enhanced),
                "forgetting": None if changes is None else largest_forgetting(changes, enhanced),
                "languages": changes,
                "trainable": result.record["trainable"],
            }
        )

    def rank(row: dict) -> float:
        changes = row["languages"]
        return math.inf if changes is None else relative_objective(changes, enhanced, max_forgetting)

    rows.sort(key=rank)
    if rows[0]["languages"] is None:
        raise UserError(f"training.learning_rate: {rate:.3g} makes every pilot diverge; lower it")
    return rows
