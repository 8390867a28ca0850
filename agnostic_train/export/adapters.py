"""Writes a training's changes as an adapter: only the rows and columns, or a LoRA that equals them."""

from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, TaskType
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from agnostic_train.export.trained import Trained
from agnostic_train.training.compact import NeuronConfig
from agnostic_train.training.delta import KEY_PREFIX, Delta


def write_delta(directory: Path, trained: Trained) -> None:
    """Writes the rows and columns; raises `UserError` if they aren't known, see `Trained.deltas`."""
    deltas = trained.deltas()
    sizes = [{name: len(it.index) for name, it in deltas.items() if it.dim == dim} for dim in (0, 1)]
    config = NeuronConfig(
        task_type=TaskType.CAUSAL_LM, base_model_name_or_path=trained.base_name, revision=trained.base_revision,
        inference_mode=True, rows=sizes[0], columns=sizes[1],
    )  # fmt: skip
    tensors = {f"{name}.neuron_delta": delta.values for name, delta in deltas.items()}
    tensors |= {f"{name}.neuron_index": delta.index for name, delta in deltas.items()}
    _write_adapter(directory, config, tensors)


def write_lora(directory: Path, trained: Trained) -> None:
    """Writes a LoRA of rank R for each module with R chosen rows or columns; raises as `write_delta` does."""
    deltas, chosen = trained.deltas(), trained.chosen or {}
    ranks = {name: len(delta.index) for name, delta in deltas.items()}
    largest = max(ranks.values())
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM, base_model_name_or_path=trained.base_name, revision=trained.base_revision,
        inference_mode=True, r=largest, lora_alpha=largest, rank_pattern=ranks, alpha_pattern=ranks,
        target_modules=sorted(ranks),
    )  # fmt: skip
    tensors = {}
    for name, delta in deltas.items():
        linear = chosen[name].linear
        for factor, values in zip("AB", _lora_factors(delta, (linear.out_features, linear.in_features)), strict=True):
            tensors[f"{name}.lora_{factor}.weight"] = values
    _write_adapter(directory, config, tensors)


def _lora_factors(delta: Delta, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Returns A (rank, in) and B (out, rank) with B @ A = delta: one has the values, the other is one-hot."""
    index, values = delta.index.to(delta.values.device), delta.values
    picked = torch.zeros(len(index), shape[delta.dim], dtype=values.dtype, device=values.device)
    picked.scatter_(1, index.unsqueeze(1), 1)
    return (values, picked.T) if delta.dim == 0 else (picked, values)


def _write_adapter(directory: Path, config: NeuronConfig | LoraConfig, tensors: Mapping[str, Tensor]) -> None:
    config.save_pretrained(str(directory))
    tensors = {f"{KEY_PREFIX}{name}": values.contiguous().cpu() for name, values in tensors.items()}
    save_file(tensors, directory / SAFETENSORS_WEIGHTS_NAME, {"format": "pt"})
