"""The model card of an export: what was trained, how, and the effect on each language."""

import re
from pathlib import Path

from huggingface_hub import ModelCardData

from agnostic_train.choices import ExportTarget
from agnostic_train.files import public_name
from agnostic_train.percent import percent
from agnostic_train.recipe import Recipe
from agnostic_train.training.strategy import BASELINES

_CODE = re.compile(r"([a-z]{2,3})(?:[_-](?:[A-Z][a-z]{3}|[A-Za-z]{2}))*")
"""A language's code, perhaps with its script and region."""


def model_card(recipe: Recipe, training: dict, to: ExportTarget = "merged", evaluation: dict | None = None) -> str:
    """Returns the README.md of an enhanced checkpoint or adapter.

    Args:
        recipe: the recipe of the run.
        training: the manifest's entry on the training.
        to: the export format: `merged`, `lora`, or `delta`.
        evaluation: per language, the values before and after training, as in `evaluation.json`; None if not evaluated.
    """
    # The hub's metadata accepts only hub names as base model, not local paths.
    hub_name = re.fullmatch(r"[\w.-]+/[\w.-]+", recipe.model.name) and not Path(recipe.model.name).exists()
    # A card is published: of a local path, only the last component may appear in it.
    title = recipe.model.name if hub_name else Path(recipe.model.name).resolve().name
    counts = training["neurons"]
    neurons = (
        "none in particular"
        if counts is None
        else ", ".join(f"{name} {count}" for name, count in counts.items() if count)
    )
    if training["strategy"] in BASELINES:
        trained = (
            "all weights were trained"
            if training["strategy"] == "full"
            else "a LoRA of every projection was trained, then merged"
        )
        what = f"Trained with agnostic_train as a baseline: {trained}."
    else:
        kind = "random" if training["strategy"] == "random" else "chosen"
        what = (
            f"Trained with agnostic_train: only {kind} neurons were trained (Chen et al. 2025, arXiv 2506.09890). "
            "Every other weight was compared with the base's, bit for bit: see `manifest.json`."
        )
    detection = recipe.detection
    details = [f"strategy: {training['strategy']} ({training['reason']})", f"neurons trained: {neurons}"]
    if recipe.training.needs_detection:
        how = (
            f"by LAPE, ratio {detection.lape_ratio}"
            if detection.method == "lape"
            else f"by impact, top ratio {detection.top_ratio}, consistency {detection.consistency}"
        )
        details.insert(0, f"neurons detected in {', '.join(recipe.corpus.languages)}: {how}")
    arguments = [f"{key} {_shown(value)}" for key, value in recipe.to_dict()["training"]["arguments"].items()]
    update = None if counts is None else f"update: {recipe.training.update}"
    details.append("; ".join(filter(None, (update, ", ".join(arguments)))))
    if hub_name and recipe.model.revision:
        details.insert(0, f"revision of the base: {recipe.model.revision}")
    if training.get("text"):
        details.append(f"training text: {training['text']}")
    listed = "\n".join(f"- {it}" for it in details if it)
    library, use = _USES[to]
    # Nor does it accept other languages than ISO 639's codes: it would refuse the whole upload.
    codes = [code[1] for it in recipe.training.languages if (code := _CODE.fullmatch(it))]
    metadata = ModelCardData(
        language=list(dict.fromkeys(codes)) or None,
        library_name=library,
        pipeline_tag="text-generation",
        base_model=recipe.model.name if hub_name else None,
        tags=["agnostic-train"],
    )
    return f"""---
{metadata.to_yaml()}
---

# {title}, enhanced for {", ".join(recipe.training.languages)}

{what} {use}

{listed}
{_numbers(evaluation, recipe.training.languages)}"""


_USES = {
    "merged": ("transformers", "It is a plain checkpoint: `AutoModelForCausalLM.from_pretrained`."),
    "lora": ("peft", "It is a LoRA adapter: `PeftModel.from_pretrained`."),
    "delta": (
        "peft",
        "It is an adapter of rows and columns: `import agnostic_train`, then `PeftModel.from_pretrained`.",
    ),
}


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return public_name(value) if isinstance(value, str) else str(value)


def _numbers(evaluation: dict | None, enhanced: list[str]) -> str:
    if evaluation is None:
        return ""
    lines = [
        "",
        "Bits per byte on held-out text (lower is better; * enhanced):",
        "",
        "| language | before | after | change |",
    ]
    lines.append("| --- | ---: | ---: | ---: |")
    for language, row in evaluation.items():
        before, after = row["before"]["bits_per_byte"], row["after"]["bits_per_byte"]
        name = language.replace("|", r"\|") + (" *" if language in enhanced else "")
        lines.append(f"| {name} | {before:.4f} | {after:.4f} | {percent(row['bits_per_byte_change'])} |")
    return "\n".join([*lines, ""])
