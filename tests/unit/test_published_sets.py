"""The neuron sets published with the paper, loaded for a Llama-3.1-8B without weights."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from agnostic_train.neurons.neuron_set import NeuronSet

RAW = {
    "shared_neurons": (896, 896, 8193, 8193, 1442, 1442),
    "exclusive_en_neuron": (792, 792, 2441, 2441, 1369, 1369),
    "exclusive_sw_neuron": (1495, 1495, 3834, 3834, 3634, 3634),
}
KEYS = ("fwd_up", "fwd_down", "attn_q", "attn_k", "attn_v", "attn_o")
MAPPED_KV = {"shared_neurons": (3579, 844), "exclusive_en_neuron": (1901, 895), "exclusive_sw_neuron": (2844, 2053)}
"""Numbers of k and v rows after query-head channels that share a row are merged."""


@pytest.fixture(scope="module")
def llama_8b():
    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8,
    )  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(config)


@pytest.mark.parametrize("name", RAW)
def test_published_sets_have_the_expected_counts(name, llama_8b, pytestconfig):
    file = pytestconfig.rootpath.parent / f"shared/data/published_sets/Llama-3.1-8B_{name}_0.05.json"
    if not file.exists():
        pytest.skip(f"{file} isn't here")
    content = json.loads(file.read_text())
    raw = tuple(sum(len(values) for values in content[key].values()) for key in KEYS)
    assert raw == RAW[name]
    counts = NeuronSet.from_json(file, llama_8b).counts()
    assert [counts[projection] for projection in ("up", "down", "q", "o", "gate")] == [*raw[:3], raw[5], 0]
    for key, projection, expected in zip(("attn_k", "attn_v"), "kv", MAPPED_KV[name], strict=True):
        rows = {
            (layer, channel // 128 // 4 * 128 + channel % 128)
            for layer, channels in content[key].items()
            for channel in channels
        }
        assert counts[projection] == len(rows) == expected
