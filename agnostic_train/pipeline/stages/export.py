"""`export`: writes the enhanced checkpoint, and proves that nothing else moved."""

import shutil
from dataclasses import asdict, replace

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from agnostic_train.choices import ExportTarget
from agnostic_train.errors import UserError
from agnostic_train.export.checkpoint import CARD, export_checkpoint
from agnostic_train.export.frozen_weights import FrozenWeightCheck
from agnostic_train.export.model_card import model_card
from agnostic_train.model.loading import load_model
from agnostic_train.neurons.neuron_set import NeuronSet
from agnostic_train.pipeline.materials import Materials
from agnostic_train.pipeline.stages.context import Context, StageResult
from agnostic_train.pipeline.stages.train import ADAPTER
from agnostic_train.training.checkpoints import NEURONS_FILE
from agnostic_train.training.strategy import BASELINES

EXPORTS = {"merged": "enhanced", "lora": "lora", "delta": "delta"}


def check_files(materials: Materials) -> None:
    """Raises `UserError` for a model to which float32 changes can't be added."""
    materials.check_trainable("enhanced/, the sum of weights and changes,")


def export(context: Context) -> StageResult:
    if not context.processes.is_main_process:
        return StageResult()
    record = context.manifest.record("train")
    checkpoint = context.directory / record["checkpoint"]
    neurons = None if record["strategy"] in BASELINES else NeuronSet.load(checkpoint / NEURONS_FILE)
    if record["strategy"] == "lora":
        trained = _merged_lora(context)
    elif record["adapter"]:
        trained = context.directory / ADAPTER
    else:
        trained = load_model(replace(context.recipe.model, name=str(checkpoint)))
    dtype: torch.dtype | str | None = context.recipe.export.dtype
    if dtype is None and isinstance(trained, PreTrainedModel) and trained.dtype != context.materials.model.dtype:
        dtype = context.materials.model.dtype  # engines that shard weights train, and save, all of them in float32

    def write(to: ExportTarget) -> FrozenWeightCheck:
        return export_checkpoint(
            trained,
            context.directory / EXPORTS[to],
            to=to,
            base=context.materials.model,
            tokenizer=context.materials.tokenizer,
            dtype=dtype,
            neurons=neurons,
            model_card=model_card(context.recipe, record, to),
        )

    check = write("merged")
    frozen = asdict(check) | {"changed": list(check.changed)}
    if check.status == "changed":
        shutil.rmtree(context.directory / EXPORTS["merged"])
        context.manifest.refuse(frozen)
        raise UserError(
            f"enhanced: not written, because {len(check.changed)} parameters moved that weren't chosen "
            f"({check.changed[0]}, ...); report this with {context.directory / 'manifest.json'}"
        )
    if neurons is None:
        reason = "all weights were trained" if record["strategy"] == "full" else "a LoRA touches whole matrices"
        context.say(f"export: enhanced/ written; {reason}, so none was checked")
    else:
        rounding = f", {check.chosen_surviving:.1%} of these survived rounding" if check.chosen_moved else ""
        context.say(
            f"export: enhanced/ written; {check.num_compared:,} weights are bit-identical to the base's, "
            f"{check.chosen_moved:.1%} of {check.num_chosen:,} chosen ones moved{rounding}"
        )
    to = context.recipe.export.to
    if to != "merged":
        write(to)
        context.say(f"export: {EXPORTS[to]}/ written")
    folders = dict.fromkeys([EXPORTS["merged"], EXPORTS[to]])
    files = [
        f"{folder}/{path.name}"
        for folder in folders
        for path in sorted((context.directory / folder).iterdir())
        if path.name != CARD
    ]
    # The evaluate stage rewrites the cards with its numbers.
    return StageResult(files, rewritten=[f"{folder}/{CARD}" for folder in folders], frozen_weights=frozen)


def _merged_lora(context: Context) -> PreTrainedModel:
    # The base weights as in training, then converted to the LoRA's float32: a sum in a narrower dtype would be rounded
    # before `export.dtype` applies.
    base = load_model(context.materials.model_section)
    dtypes = {name: weight.dtype for name, weight in base.named_parameters()}
    merged = PeftModel.from_pretrained(base.float(), context.directory / ADAPTER).merge_and_unload()
    if context.recipe.export.dtype is None:
        for name, weight in merged.named_parameters():
            weight.data = weight.data.to(dtypes[name])
    return merged
