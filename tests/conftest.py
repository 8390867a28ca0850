"""Small random models and batches that the tests share."""

import gc
import os
from pathlib import Path
from typing import get_args

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Torch reads this on import, here and in the processes that tests start. Nothing is large enough for more threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings
from matplotlib.figure import Figure
from transformers import LlamaConfig, LlamaForCausalLM

from agnostic_train.choices import Update

UPDATES = get_args(Update)

# Use the same examples in every run and no deadlines, so that a failure here is a failure everywhere.
settings.register_profile(
    "same", derandomize=True, database=None, deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip
settings.load_profile("same")


def pytest_collection_finish():
    """Exclude imported objects from garbage collection: each Trainer collects, which would take 0.3 s with them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def unrendered_figures(request, monkeypatch):
    """Leave figures out of their files, except in tests marked `figures`: rendering takes a seventh of all time."""
    if request.node.get_closest_marker("figures") is None:
        monkeypatch.setattr(Figure, "savefig", lambda self, path, **options: Path(path).write_text('<svg width="9pt">'))


def tiny_llama(**changes) -> LlamaForCausalLM:
    """Return a random grouped-query Llama with odd sizes and weights large enough for peaked attention."""
    torch.manual_seed(0)
    settings = dict(
        vocab_size=61,
        hidden_size=42,
        intermediate_size=53,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=10,
        max_position_embeddings=64,
        attention_bias=False,
        pad_token_id=0,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.5)
    return model.eval()


def padded_batch(lengths: list[int], side: str = "right", seed: int = 1, vocab_size: int = 61) -> dict:
    """Return random sentences of the given lengths, padded on one side with token 0."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for row, length in enumerate(lengths):
        where = slice(0, length) if side == "right" else slice(max(lengths) - length, None)
        input_ids[row, where] = torch.randint(1, vocab_size, (length,), generator=generator)
        attention_mask[row, where] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


@pytest.fixture
def llama() -> LlamaForCausalLM:
    return tiny_llama()
