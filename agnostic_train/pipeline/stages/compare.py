"""`compare`: trains every strategy and baseline on the same data and budget, each at its own best learning rate."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean

from tqdm.auto import tqdm

from agnostic_train.errors import UserError
from agnostic_train.evaluation.comparison import compare_strategies, group_means, language_groups
from agnostic_train.evaluation.objective import largest_forgetting, relative_objective, target_change
from agnostic_train.evaluation.tuning import Tuning, default_rates, num_trainings, tune
from agnostic_train.files import read_json, whole_directory, write_json
from agnostic_train.percent import percent
from agnostic_train.pipeline.materials import Materials
from agnostic_train.pipeline.measured import Measured
from agnostic_train.pipeline.stages.context import Context, StageResult
from agnostic_train.pipeline.tracking import run_id_within, tracked
from agnostic_train.pipeline.training_text import count_batches
from agnostic_train.pipeline.trials import Trial, TrialResult, Trials, check_choices
from agnostic_train.recipe import Recipe
from agnostic_train.report.page import (
    COMPARISON,
    COMPARISON_FILES,
    COMPARISON_TABLE,
    COMPARISON_TEXT,
    DIFFERENCES_TABLE,
    comparison_text,
    is_comparison_file,
    write_comparison_figures,
)
from agnostic_train.report.tables import comparison_table, differences_table, write_csv
from agnostic_train.training.trainer import NeuronTrainingArguments

Results = dict[str, dict[int, TrialResult]]
"""Results of trials by strategy and seed."""


def check_files(materials: Materials) -> None:
    """Raises `UserError` for a model that not every strategy can train."""
    materials.check_trainable("a comparison")


def check_text(materials: Materials, arguments: NeuronTrainingArguments) -> None:
    """Raises `UserError` if there is too little text."""
    count_batches(materials.recipe, arguments, materials.encoder, materials.training_text, has_pilot=False)


def check_strategies(context: Context) -> None:
    strategies = context.recipe.comparison.strategies
    check_choices("comparison.strategies", strategies, context.load_neurons(), context.materials)


def compare(context: Context) -> StageResult:
    recipe = context.recipe
    trials = Trials(
        materials=context.materials,
        detected=context.load_neurons(),
        training=context.materials.training_text,
        texts={"validation": context.materials.validation_batches, **context.materials.evaluation_batches()},
        directory=context.work,
        key=[context.inputs.of_trials("compare"), context.set_hashes(with_activations=False)],
        group=_group(context),
    )
    same = trials.twins(recipe.comparison.strategies)
    strategies = [it for it in recipe.comparison.strategies if it not in same]
    tunings, results = _train_all(context, trials, strategies)
    comparison = _comparison_json(recipe, trials.base(), tunings, results, same)
    if set(comparison["diverged"]) == set(strategies):
        raise UserError("comparison.learning_rates: every strategy diverged; name lower ones")
    text = comparison_text(comparison)
    if context.processes.is_main_process:
        write_json(context.directory / "comparison.json", comparison)
        with whole_directory(context.directory / COMPARISON, is_comparison_file) as folder:
            write_comparison_figures(comparison, folder)
            (folder / COMPARISON_TEXT).write_text(text, encoding="utf-8")
            write_csv(comparison_table(comparison), folder / COMPARISON_TABLE)
            if differences := differences_table(comparison):  # one strategy alone has none
                write_csv(differences, folder / DIFFERENCES_TABLE)
    return StageResult(["comparison.json", COMPARISON])


def publish(context: Context) -> None:
    """Publishes in a separate tracked run, beside those of the trainings; the same comparison keeps the same run."""
    file = context.directory / "comparison.json"
    files: dict[str, Path | None] = dict.fromkeys(COMPARISON_FILES)
    files |= {it.name: it for it in (file, *(context.directory / COMPARISON).iterdir()) if it.suffix != ".csv"}
    run_id = run_id_within(context.directory, context.manifest.record("compare")["run"])
    with tracked(context.recipe, context.processes, "comparison", _group(context), run_id) as tracker:
        tracker.log_figures(context.directory / COMPARISON)
        comparison = read_json(file)
        tables = {"comparison": comparison_table(comparison), "differences": differences_table(comparison) or None}
        replace(context, tracker=tracker).publish_tables(tables, files)


def _group(context: Context) -> str:
    return context.recipe.tracking.run_name or context.directory.resolve().name


def _train_all(context: Context, trials: Trials, strategies: Sequence[str]) -> tuple[dict[str, Tuning], Results]:
    """Tunes each strategy's learning rate, then trains it once per seed at that rate, unless every rate diverged."""
    recipe, section = context.recipe, context.recipe.comparison
    base = trials.base()
    rates = section.learning_rates or default_rates(context.arguments.learning_rate)
    tunings: dict[str, Tuning] = {}
    results: Results = {}
    total, most = num_trainings(len(strategies), len(rates), len(section.seeds))
    in_all = f"at most {most}" if most > total else str(total)
    hidden = not context.processes.is_local_main_process
    with tqdm(total=most, desc="compare", unit=" trainings", disable=hidden, leave=False) as bar:

        def run(trial: Trial) -> TrialResult:
            bar.set_postfix_str(str(trial))
            result = trials.run(trial)
            bar.update()
            changes = result.changes(base)
            bar.clear()
            context.say(
                f"compare: {bar.n:.0f} of {in_all}: {trial}{' (kept)' if result.kept else ''}: "
                + ("diverged" if changes is None else _describe_changes(changes))
            )
            return result

        def measure(name: str, rate: float) -> dict[str, float] | None:
            return run(Trial(name, section.tuning_seed, rate)).changes(base)

        for name in strategies:
            tunings[name] = tune(partial(measure, name), rates, partial(_objective, recipe))
            rate = tunings[name].learning_rate
            results[name] = {} if rate is None else {seed: run(Trial(name, seed, rate)) for seed in section.seeds}
    return tunings, results


def _objective(recipe: Recipe, changes: Mapping[str, float]) -> float:
    """What the choice of a learning rate minimises, from each language's change on validation text."""
    select_by, enhanced = recipe.comparison.select_by, recipe.training.languages
    if select_by == "all":
        return fmean(changes.values())
    if select_by == "target":
        return target_change(changes, enhanced)
    return relative_objective(changes, enhanced, recipe.evaluation.max_forgetting)


def _comparison_json(
    recipe: Recipe, base: Measured, tunings: Mapping[str, Tuning], results: Results, same: Mapping[str, str]
) -> dict:
    """The content of `comparison.json`; a strategy that diverged with any seed isn't compared."""
    section, training = recipe.comparison, recipe.training
    groups = language_groups(
        training.languages, training.text_languages, recipe.corpus.languages, recipe.evaluation.languages
    )
    diverged = [name for name, by_seed in results.items() if not _all_measured(by_seed, section.seeds)]
    texts = {}
    for kind in [kind for kind in base if kind != "validation"]:
        after = {
            name: {seed: result.measured[kind] for seed, result in by_seed.items() if result.measured is not None}
            for name, by_seed in results.items()
            if name not in diverged
        }
        texts[kind] = compare_strategies(base[kind], after, groups, aligned=kind == "parallel")
    return {
        "enhanced": training.languages,
        "mixture": training.mixture,
        "groups": groups,
        "seeds": section.seeds,
        "tuning_seed": section.tuning_seed,
        "select_by": section.select_by,
        "max_forgetting": recipe.evaluation.max_forgetting if section.select_by == "objective" else None,
        "diverged": diverged,
        "same": same,
        "tuning": {name: _tuning_json(tunings[name], by_seed, groups) for name, by_seed in results.items() if by_seed},
        "texts": texts,
        "before": {
            kind: {
                language: {
                    "perplexity": measured.value,
                    "bits_per_byte": measured.bits_per_byte,
                    "num_sentences": len(measured.sentence_nats),
                }
                for language, measured in by_language.items()
            }
            for kind, by_language in base.items()
        },
    }


def _all_measured(by_seed: Mapping[int, TrialResult], seeds: Sequence[int]) -> bool:
    return len(by_seed) == len(seeds) and all(result.measured is not None for result in by_seed.values())


def _describe_changes(changes: Mapping[str, float]) -> str:
    return "  ".join(f"{language} {percent(change)}" for language, change in changes.items()) + "  (validation)"


def _tuning_json(tuning: Tuning, results: Mapping[int, TrialResult], groups: Mapping[str, Sequence[str]]) -> dict:
    record = next(iter(results.values())).record
    tried = [
        {
            "learning_rate": rate,
            "validation": changes,
            "groups": None if changes is None else group_means(changes, groups),
            "largest_forgetting": None if changes is None else largest_forgetting(changes, groups["enhanced"]),
        }
        for rate, changes in tuning.tried.items()
    ]
    return {
        "learning_rate": tuning.learning_rate,
        "at_end": tuning.at_end,
        "tried": tried,
        "trainable": record["trainable"],
        "neurons": record["neurons"],
        "steps": record["steps"],
        "tokens": record["tokens"],
    }
