"""`strategy: pilot`: every candidate trains a few steps on text set aside for it; the best on validation text wins."""

import math
from collections.abc import Sequence

from tqdm.auto import tqdm

from agnostic_train.errors import UserError
from agnostic_train.evaluation.objective import largest_forgetting, relative_objective, target_change
from agnostic_train.files import read_json, write_json
from agnostic_train.fingerprints import fingerprint
from agnostic_train.pipeline.settings import launch_settings
from agnostic_train.pipeline.stages.context import Context, StageResult
from agnostic_train.pipeline.training_text import split_pilot_text
from agnostic_train.pipeline.trials import Trial, Trials, check_choices, what_learns
from agnostic_train.report.comparison_prose import twin_sentences
from agnostic_train.report.tables import pilot_table

PILOT = "pilot.json"


def check_candidates(context: Context) -> None:
    candidates = context.recipe.training.pilot_strategies
    check_choices("training.pilot_strategies", candidates, context.load_neurons(), context.materials)


def is_own_key(key: str) -> bool:
    """Whether a key of the recipe's section `training` is the pilot's."""
    return key.startswith("pilot_")


def pilot(context: Context) -> StageResult:
    """Ranks the candidates, by `evaluation.objective`.

    Returns: the result. Its fact `strategy` is the winner; it leaves to the training the winner's neurons, and how many
        sentences of each language the pilot read, the last ones.

    Raises:
        UserError: every candidate diverged.
    """
    section, steps = context.recipe.training, context.recipe.training.pilot_steps
    _, text = split_pilot_text(
        context.recipe, context.arguments, context.materials.encoder, context.materials.training_text
    )
    trials = Trials(
        materials=context.materials,
        detected=context.load_neurons(),
        training=text,
        texts={"validation": context.materials.validation_batches},
        directory=context.work,
        key=[
            context.inputs.of_trials("pilot"),
            context.set_hashes(with_activations=False),
            launch_settings(context.arguments),
        ],
        # A warm-up as long as the whole pilot would leave nothing to rank.
        changes={"max_steps": steps, "warmup_steps": min(context.arguments.get_warmup_steps(steps), steps // 10)},
    )
    same = trials.twins(section.pilot_strategies)
    rows = _rank(context, trials, [it for it in section.pilot_strategies if it not in same])
    for place, row in enumerate(rows, 1):
        context.say(f"pilot: {place}. {row['strategy']}: {_describe_row(row, section.languages)}")
    for sentence in twin_sentences(same):
        context.say(f"pilot: {sentence}")
    if context.processes.is_main_process:
        limit = context.recipe.evaluation.max_forgetting
        content = {"steps": steps, "max_forgetting": limit, "ranking": rows, "same": same}
        write_json(context.directory / PILOT, content)
    enhanced = ", ".join(section.languages)
    if all(row["change"] is None or row["change"] > 0 for row in rows):
        context.say(f"pilot: no candidate improves {enhanced}; training.learning_rate may be too high")
    elif rows[0]["change"] > 0:
        context.say(f"pilot: the best doesn't improve {enhanced}; candidates that do cost another language too much")
    winner = rows[0]["strategy"]
    left = {
        "neurons": fingerprint(what_learns(trials.choose(Trial(winner)))),
        "sentences_read": {language: len(sentences) for language, sentences in text.items()},
    }
    return StageResult([PILOT], for_training=left, facts={"strategy": winner})


def publish(context: Context) -> None:
    context.publish_tables({"pilot": pilot_table(read_json(context.directory / PILOT))})


def _rank(context: Context, trials: Trials, candidates: Sequence[str]) -> list[dict]:
    """Trains each candidate briefly; returns plain JSON rows, the best first.

    A row has the `strategy`, the relative `change` of bits per byte on validation text, averaged over the enhanced
    languages (None if the training diverged), the largest `forgetting` among the others, every language's own change,
    and the number of `trainable` weights.
    """
    enhanced, arguments = context.recipe.training.languages, context.arguments
    base = trials.base()
    rows = []
    hidden = not context.processes.is_local_main_process
    bar = tqdm(candidates, desc="pilot", unit=" strategies", disable=hidden, leave=False)
    for name in bar:
        bar.set_postfix_str(name)
        result = trials.run(Trial(name, arguments.seed, arguments.learning_rate))
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
        changes, limit = row["languages"], context.recipe.evaluation.max_forgetting
        return math.inf if changes is None else relative_objective(changes, enhanced, limit)

    rows.sort(key=rank)
    if rows[0]["languages"] is None:
        raise UserError(f"training.learning_rate: {arguments.learning_rate:.3g} makes every pilot diverge; lower it")
    return rows


def _describe_row(row: dict, languages: Sequence[str]) -> str:
    if row["change"] is None:
        return "diverged"
    gain = f"{row['change']:+z.2%} bits per byte in {', '.join(languages)}"
    if len(row["languages"]) > len(languages):
        rise = f"at most {row['forgetting']:+.2%}" if row["forgetting"] else "no rise"
        gain += f", {rise} in another language"
    return f"{gain}, validation text, {row['trainable']:,} weights"
