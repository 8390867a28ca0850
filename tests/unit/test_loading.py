"""Where a model is loaded to."""

import pytest
import torch
from conftest import tiny_llama

from agnostic_train.model.loading import find_accelerator, load_model
from agnostic_train.recipe import ModelSection


@pytest.mark.parametrize("name, expected", [("mps", "cpu"), ("meta", "meta"), (None, "cpu")])
def test_an_accelerator_without_float64_is_passed_over(tmp_path, monkeypatch, name, expected):
    tiny_llama().save_pretrained(tmp_path)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: name is not None)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(name))
    assert load_model(ModelSection(name=str(tmp_path)), tmp_path).device.type == expected


@pytest.mark.parametrize("flag, expected", [("true", None), ("false", torch.device("meta"))])
def test_a_launcher_for_cpus_is_heeded_beside_a_gpu(monkeypatch, flag, expected):
    monkeypatch.setenv("ACCELERATE_USE_CPU", flag)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    assert find_accelerator() == expected
