"""`report`: presents the results of the other stages as a page with figures."""

from pathlib import Path

from agnostic_train.pipeline.manifest import changed_in_words
from agnostic_train.pipeline.stages.context import Context, StageResult
from agnostic_train.report.page import COMPARISON_TEXT, RUN_FILES, write_report


def report(context: Context) -> StageResult:
    if context.processes.is_main_process:
        has_comparison = context.inputs.has_comparison
        if not has_comparison and context.manifest.record("compare").get("finished"):
            changed = changed_in_words(context.manifest.changed("compare", context.inputs.whole("compare")))
            context.say(
                f"report: without the comparison, which is out of date; `compare` renews it (changed: {changed})"
            )
        recipe, has_pilot = context.recipe.to_dict(), context.recipe.training.has_pilot
        write_report(context.directory, recipe, context.manifest.read(), has_pilot, has_comparison)
    return StageResult(["report.html", "figures"])


def publish(context: Context) -> None:
    context.tracker.log_figures(context.directory / "figures")
    files: dict[str, Path | None] = dict.fromkeys(RUN_FILES)
    files |= {file.name: file for file in (context.directory / "figures").iterdir()}
    if context.inputs.has_comparison:
        context.publish_tables({}, files)
    else:
        context.publish_tables(
            {"comparison": None, "differences": None}, files | {"comparison.json": None, COMPARISON_TEXT: None}
        )
