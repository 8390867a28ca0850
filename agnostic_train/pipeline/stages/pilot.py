"""Within `train`, for `strategy: pilot`: which strategy the pilot trainings choose."""

from collections.abc import Sequence

from agnostic_train.files import write_json
from agnostic_train.pipeline.pilot import Sentences, rank_candidates
from agnostic_train.pipeline.settings import make_strategy
from agnostic_train.pipeline.stages.context import Context
from agnostic_train.pipeline.trials import Trials


def run_pilot(context: Context, text: Sentences) -> str:
    """Ranks the candidates, prints and keeps the ranking, and returns the winner's name."""
    recipe, found = context.recipe, context.found
    steps = recipe.training.pilot_steps
    trials = Trials(
        context.materials,
        lambda trial: make_strategy(recipe, trial.strategy, trial.seed).choose(found, None, context.materials.model),
        text,
        {"validation": context.materials.batches("validation")},
        context.work,
        [context.inputs("train"), context.set_hashes],
        # A warm-up as long as the whole pilot would leave nothing to rank.
        {"max_steps": steps, "warmup_steps": min(context.arguments.get_warmup_steps(steps), steps // 10)},
    )
    seed, rate = context.arguments.seed, context.arguments.learning_rate
    rows = rank_candidates(trials, recipe.training.pilot_strategies, recipe.training.languages, seed, rate)
    for place, row in enumerate(rows, 1):
        context.say(f"train: pilot {place}. {row['strategy']}: {describe(row, recipe.training.languages)}")
    if context.processes.is_main_process:
        write_json(context.directory / "pilot.json", {"steps": steps, "ranking": rows})
    context.publish({"pilot": [{**row, "languages": str(row["languages"])} for row in rows]})
    return rows[0]["strategy"]


def describe(row: dict, languages: Sequence[str]) -> str:
    if row["change"] is None:
        return "diverged"
    return (
        f"{row['change']:+z.2%} bits per byte in {', '.join(languages)}, validation text, {row['trainable']:,} weights"
    )
