"""`score`: computes the language-agnostic score and its controls, also for earlier checkpoints of the model."""

import shutil
from pathlib import Path

from transformers import PreTrainedModel

from agnostic_train.errors import UserError
from agnostic_train.files import read_json, whole_directory, write_json
from agnostic_train.fingerprints import file_key
from agnostic_train.model.loading import at_checkpoint, load_model, model_identity
from agnostic_train.neurons.language_neurons import LanguageNeurons
from agnostic_train.pipeline.materials import Materials
from agnostic_train.pipeline.stages.context import Context, StageResult
from agnostic_train.pipeline.stages.detect import detect_in
from agnostic_train.report.page import EMERGENCE_FILES, is_emergence_file, write_emergence_figures
from agnostic_train.report.tables import ablation_table, emergence_table, score_table
from agnostic_train.scores.agnostic_score import language_agnostic_score
from agnostic_train.scores.emergence import Checkpoint, follow_checkpoints, parse_checkpoints
from agnostic_train.scores.perplexity import knows_beginning
from agnostic_train.scores.result import CONTROLS, AgnosticScore, describe_score

EMERGENCE = "emergence"
_KEY = "model.checkpoints"


def check_files(materials: Materials) -> None:
    """Raises `UserError` for a checkpoint that needs another tokenizer than the model's."""
    sources = [it.source for it in parse_checkpoints(materials.recipe.model.checkpoints)]
    materials.check_vocabularies(_KEY, sources)


def score(context: Context) -> StageResult:
    key = [context.inputs.of("score"), context.set_hashes(with_activations=True)]
    resume_dir = context.work / file_key(key)
    result = _score_of(context, context.materials.model, context.load_neurons(), resume_dir)
    outputs = ["score.json"]
    context.processes.wait_for_everyone()  # until each has read what an interrupted score kept
    if context.processes.is_main_process:
        write_json(context.directory / "score.json", result.to_json())
        shutil.rmtree(resume_dir, ignore_errors=True)
    value = describe_score(result.value, result.clipped)
    if result.interval:
        value += " (95% interval {:.3f} to {:.3f})".format(*result.interval)
    context.say(f"score: language-agnostic score {value}")
    for kind, controls in result.controls.items():
        values = ", ".join(describe_score(it.value, it.clipped) for it in controls.scores.values())
        if values:
            context.say(f"score: for comparison, {CONTROLS[kind]}: {values}")
    scores = [result, *(it for controls in result.controls.values() for it in controls.scores.values())]
    if any(it.value is not None and it.clipped for it in scores):
        own = f" (here of {', '.join(result.clipped)})" if result.clipped else ""
        context.say(
            f"score: clipped means that switching a set off didn't raise a language's perplexity{own}; the ratio of "
            "its changes is arbitrary then"
        )
    if result.undefined:
        context.say(f"score: undefined, the shared or exclusive set is empty: {', '.join(result.undefined)}")
    _hint_at_unknown_beginning(context, result)
    outputs += _follow_checkpoints(context)
    read_by_auto = {"value": result.value, "clipped": result.clipped, "undefined": result.undefined}
    return StageResult(outputs, for_training=read_by_auto, facts={"value": result.value})


def publish(context: Context) -> None:
    result = read_json(context.directory / "score.json")
    context.tracker.log_summary(
        {"agnostic_score": result["value"]}
        | {f"agnostic_score/importance/{language}": value for language, value in result["importance"].items()}
        | {
            f"agnostic_score/{kind}/{seed}": control["value"]
            for kind, controls in result["controls"].items()
            for seed, control in controls["scores"].items()
        }
    )
    context.publish_tables({"score": score_table(result), "ablation": ablation_table(result["ablation"])})
    table, figures = None, dict[str, Path | None].fromkeys(EMERGENCE_FILES)
    if context.recipe.model.checkpoints:
        table = emergence_table(read_json(context.directory / "emergence.json"))
        figures = {name: context.directory / EMERGENCE / name for name in EMERGENCE_FILES}
    context.publish_tables({"emergence": table}, figures)


def _hint_at_unknown_beginning(context: Context, result: AgnosticScore) -> None:
    """Says if a model that has learnt something doesn't know the token with which sentences begin."""
    tokenizer, batches = context.materials.tokenizer, context.materials.validation_batches
    first = [of_language[0] for of_language in batches.values()]
    if tokenizer.bos_token_id is None or any((it["input_ids"][:, 0] != tokenizer.bos_token_id).any() for it in first):
        return
    # A model without training knows no token.
    has_learnt = min(row.perplexity for row in result.table) < len(tokenizer) / 2
    if has_learnt and not knows_beginning(context.materials.model, first):
        context.say(
            f"score: the model doesn't know {tokenizer.bos_token!r}, with which sentences begin: what follows costs it "
            "more than a guess, and training would mostly teach it that; set corpus.add_bos to false"
        )


def _score_of(
    context: Context, model: PreTrainedModel, detected: LanguageNeurons, resume_dir: Path | None = None
) -> AgnosticScore:
    return language_agnostic_score(
        model,
        detected,
        context.materials.validation_batches,
        control_seeds=range(1, context.recipe.score.controls + 1),
        progress=context.processes.is_local_main_process,
        resume_dir=resume_dir,
    )


def _follow_checkpoints(context: Context) -> list[str]:
    """Scores the model's earlier checkpoints; returns the names of the files and folders that it writes."""
    section = context.recipe.model
    checkpoints = parse_checkpoints(section.checkpoints)
    if not checkpoints:
        return []
    context.materials.forget_model()  # a checkpoint may not fit in memory beside it

    def measure(checkpoint: Checkpoint) -> tuple[LanguageNeurons, AgnosticScore]:
        model = load_model(at_checkpoint(section, checkpoint.source, _KEY), _KEY)
        try:
            detected = detect_in(
                context, model, context.materials.detection_batches, verify=context.recipe.detection.verify
            )
            score = _score_of(context, model, detected)
        except UserError as error:
            problem = str(error).removeprefix("model.name: ")
            raise UserError(f"{_KEY}: {checkpoint.name}: {problem}") from None
        value = describe_score(score.value, score.clipped)
        context.say(f"score: {checkpoint.name}  {len(detected.shared)} shared neurons, score {value}")
        return detected, score

    rows = follow_checkpoints(
        checkpoints,
        measure,
        lambda checkpoint: [
            context.inputs.of("detect"), context.inputs.of("score")["text"], context.recipe.score.controls,
            checkpoint.step, model_identity(at_checkpoint(section, checkpoint.source, _KEY)),
        ],
        context.work / "emergence",
    )  # fmt: skip
    if context.processes.is_main_process:
        write_json(context.directory / "emergence.json", rows)
        with whole_directory(context.directory / EMERGENCE, is_emergence_file) as folder:
            write_emergence_figures(rows, folder)
    return ["emergence.json", EMERGENCE]
