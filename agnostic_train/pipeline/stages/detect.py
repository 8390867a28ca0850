"""`detect`: finds each language's related, shared and exclusive neurons."""

import shutil
from collections.abc import Mapping, Sequence

from transformers import PreTrainedModel

from agnostic_train.detection.detect import detect_neurons
from agnostic_train.detection.self_check import ImpactMismatchError
from agnostic_train.detection.stability import detection_stability
from agnostic_train.errors import UserError
from agnostic_train.files import whole_file
from agnostic_train.fingerprints import file_key
from agnostic_train.impact.pruning import num_top
from agnostic_train.model.batches import Batch
from agnostic_train.model.decoder import find_decoder
from agnostic_train.neurons.language_neurons import LanguageNeurons
from agnostic_train.pipeline.stages.context import Context, StageResult
from agnostic_train.report.tables import neuron_table

SELF_CHECK_FILE = "self_check.txt"
# Fewer related neurons than this fraction of a sentence's top neurons call for a hint.
_FEW_RATIO = 0.05


def check_model(context: Context) -> None:
    """Raises `UserError` for a model that isn't supported or can't read its tokenizer's tokens."""
    find_decoder(context.materials.model)
    batches = context.materials.detection_batches
    if context.recipe.detection.method == "impact":
        _hint_at_single_tokens(context, batches)


def detect(context: Context) -> StageResult:
    section = context.recipe.detection
    # Partial counts cover a number of batches, so they hold for one batch size only.
    resume_dir = context.work / file_key([context.inputs.of("detect"), context.recipe.corpus.batch_size])
    texts, model = context.materials.corpus.texts, context.materials.model
    detected = detect_in(
        context, model, context.materials.detection_batches, verify=section.verify, resume_dir=resume_dir
    )
    if section.stability:
        sample = {language: text.detection for language, text in texts.items()}
        others = {language: text.training for language, text in texts.items()}

        def detect_part(part: dict[str, list[str]]) -> LanguageNeurons:
            return detect_in(context, model, context.materials.batches("detection", part), verify=False)

        detected.stability = detection_stability(detect_part, detected, sample, others)
        for name, overlaps in detected.stability.items():
            values = "  ".join(
                f"{language} {'none' if it['all'] is None else format(it['all'], '.2f')}"
                for language, it in overlaps.items()
            )
            context.say(f"detect: Jaccard overlap of related sets, {name}: {values}")
    if context.processes.is_main_process:
        detected.save(context.directory / "neurons")
        shutil.rmtree(resume_dir, ignore_errors=True)
    for language in detected.languages:
        context.say(
            f"detect: {language}  {len(detected.related[language])} related, {len(detected.exclusive[language])} "
            f"exclusive ({section.exclusive})"
        )
    least = section.min_languages
    by_whom = "all" if least in (None, len(detected.languages)) else f"at least {least} language{'s' * (least > 1)}"
    context.say(f"detect: {len(detected.shared)} shared by {by_whom}")
    if section.method == "impact" and detected.shared.sizes:
        _hint_at_few(
            context, detected, sum(num_top(section.top_ratio, size) for size in detected.shared.sizes.values())
        )
    for name, share in (detected.exact_share or {}).items():
        ruled_out = "; pruning ruled out the others" if share < 1 else ""
        context.say(f"detect: {share:.0%} of {name}'s neurons had to be computed exactly{ruled_out}")
    return StageResult(["neurons"], facts={"shared": len(detected.shared)})


def publish(context: Context) -> None:
    detected = context.load_neurons()
    context.tracker.log_summary(detected.metrics())
    context.publish_tables({"neurons": neuron_table(detected)})


def _hint_at_single_tokens(context: Context, batches: Mapping[str, Sequence[Batch]]) -> None:
    """Reports sentences of one token, which attend to nothing else: a few can leave a language without q and k."""
    unrelated = ", so none can be related to it" if context.recipe.detection.consistency == 1 else ""
    for language, of_language in batches.items():
        if num_single := sum(int((batch["attention_mask"].sum(1) == 1).sum()) for batch in of_language):
            context.say(
                f"detect: {num_single} sentence{'s' * (num_single > 1)} of {language} of a single token, in which no q "
                f"or k neuron has an impact{unrelated}"
            )


def _hint_at_few(context: Context, detected: LanguageNeurons, num_possible: int) -> None:
    """Reports languages with very few related neurons, too few to learn much with."""
    few = [language for language, neurons in detected.related.items() if len(neurons) < _FEW_RATIO * num_possible]
    if few:
        context.say(
            f"detect: few neurons of {', '.join(few)} are top in {context.recipe.detection.consistency:.0%} of the "
            "sentences; a lower detection.consistency gives more"
        )


def detect_in(
    context: Context, model: PreTrainedModel, batches: Mapping[str, Sequence[Batch]], **settings
) -> LanguageNeurons:
    """Detects with the recipe's settings on the given batches; `settings` are passed on to `detect_neurons`.

    Raises:
        UserError: by `detect_neurons`; if the self-check failed, its comparisons are written to `SELF_CHECK_FILE`.
    """
    section = context.recipe.detection
    try:
        return detect_neurons(
            model,
            batches,
            method=section.method,
            lape_ratio=section.lape_ratio,
            top_ratio=section.top_ratio,
            consistency=section.consistency,
            attention=section.attention,
            exclusive=section.exclusive,
            min_languages=section.min_languages,
            memory_gb=section.memory_gb,
            pruning=section.pruning,
            progress=context.processes.is_local_main_process,
            **settings,
        )
    except ImpactMismatchError as error:
        file = context.directory / SELF_CHECK_FILE
        if context.processes.is_main_process:
            with whole_file(file) as temporary:
                temporary.write_text(error.table + "\n", encoding="utf-8")
        raise UserError(f"{error}, or open an issue with {file}") from None
