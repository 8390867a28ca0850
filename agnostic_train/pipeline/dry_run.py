"""The dry run: prints a recipe's plan as tables."""

import sys

from accelerate import PartialState
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from agnostic_train.evaluation.tuning import default_rates, num_trainings
from agnostic_train.model.decoder import TESTED_FAMILIES
from agnostic_train.model.memory import GIB, SLACK
from agnostic_train.pipeline.plan import PURPOSES, Plan, make_plan
from agnostic_train.recipe import Recipe


def print_plan(recipe: Recipe, stage: str) -> None:
    """Prints the plan of a stage as tables, once for all processes."""
    plan = make_plan(recipe, stage)
    if not PartialState().is_main_process:
        return
    console = Console(width=None if sys.stdout.isatty() else 110)
    for table in (_model_table(recipe, plan, stage), _text_table(recipe, plan), _memory_table(plan)):
        if table.row_count:
            console.print(table)


def _model_table(recipe: Recipe, plan: Plan, stage: str) -> Table:
    table = Table(title=recipe.model.name, show_header=False)
    share = plan.num_trainable / plan.memory.num_parameters
    sizes = plan.decoder.sizes
    rows = {
        "class": f"{plan.model_class}, {plan.dtype}",
        "family": _family(recipe, plan.family),
        "parameters": f"{plan.memory.num_parameters:,}",
        "neurons": f"{sum(sizes.values()):,} in {plan.memory.num_layers} layers",
        "processes": str(plan.num_processes),
        "output": recipe.output_dir,
    }
    if plan.num_steps is not None:
        rows |= {
            "strategy": recipe.training.neurons or recipe.training.strategy,
            "update": recipe.training.update,
            "trainable weights, at most": f"{plan.num_trainable:,} ({share:.1%})",
            "batch": f"{plan.batch} sequences of at most {plan.length} tokens, over all processes",
            "optimizer steps": _steps(recipe, plan.num_steps, is_read=bool(plan.mean_tokens)),
        }
    if stage == "compare":
        section = recipe.comparison
        rates = len(section.learning_rates or default_rates(1.0))
        least, most = num_trainings(len(section.strategies), rates, len(section.seeds))
        how_many = f"{least} to {most}" if most > least else str(least)
        rows["trainings"] = f"{how_many}, each with these optimizer steps; fewer if strategies choose the same neurons"
        rows["strategy"] = ", ".join(section.strategies)
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _family(recipe: Recipe, family: str) -> str:
    if family in TESTED_FAMILIES:
        return family
    checked = recipe.detection.verify and recipe.detection.method == "impact"
    what_decides = "; `detect` first checks its impacts, and refuses it if they are wrong" if checked else ""
    return f"{family}, not among the tested ones{what_decides}"


def _steps(recipe: Recipe, num_steps: int, is_read: bool) -> str:
    """The number of optimizer steps, in words; for packed text it depends on the sentences' lengths."""
    if not recipe.training.packing or recipe.training.arguments.get("max_steps", -1) > 0:
        return f"{num_steps:,}"
    return f"about {num_steps:,}" if is_read else "unknown until the text is read, because it is packed"


def _text_table(recipe: Recipe, plan: Plan) -> Table:
    source = (
        recipe.corpus.path
        or f"{recipe.corpus.dataset}, streamed: as many as requested, since a dry run doesn't read them"
    )
    table = Table("language", title=f"Sentences of {source}")
    for purpose in PURPOSES:
        table.add_column(purpose, justify="right")
    table.add_column("tokens each", justify="right")
    for language, counts in plan.num_sentences.items():
        mark = " *" if language in recipe.training.text_languages else ""
        tokens = f"{plan.mean_tokens[language]:.0f}" if language in plan.mean_tokens else "?"
        table.add_row(escape(language) + mark, *(f"{counts[purpose]:,}" for purpose in PURPOSES), tokens)
    table.caption = "* its training text is trained on"
    return table


def _memory_table(plan: Plan) -> Table:
    table = Table("stage", title="GPU memory of a process, GiB")
    for name in ("weights", "trainable", "activations", "logits", f"total x {SLACK}"):
        table.add_column(name, justify="right")
    for phase in plan.phases:
        parts = (phase.weights, phase.trainable, phase.activations, phase.logits, phase.total)
        table.add_row(phase.name, *(f"{part / GIB:.1f}" for part in parts))
    table.caption = "estimates for the longest batches of text, not of tasks; the formulas are in recipes/README.md"
    return table
