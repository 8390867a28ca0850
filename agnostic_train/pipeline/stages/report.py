"""`report`: what the other stages found, for people."""

from agnostic_train.pipeline.stages.context import Context
from agnostic_train.report.page import write_report


def report(context: Context) -> dict:
    if context.processes.is_main_process:
        has_comparison = bool(context.manifest.record("compare")) and context.inputs.state("compare") == "finished"
        write_report(context.directory, context.recipe.to_dict(), context.manifest.read(), has_comparison)
        context.tracker.log_figures(context.directory / "figures")
        figures = sorted((context.directory / "figures").iterdir())
        context.publish({}, {file.name: file for file in figures})
    return {"outputs": ["report.html", "figures"]}
