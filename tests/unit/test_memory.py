"""The memory formulas agree with what PyTorch keeps, and the counts with the model's parameters."""

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig, LlamaConfig, Qwen2Config

from agnostic_train import NeuronConfig
from agnostic_train.model.decoder import find_decoder
from agnostic_train.model.memory import MemoryModel
from agnostic_train.neurons.neuron_set import NeuronSet

SENTENCES, LENGTH = 2, 96


def small(config_class, dtype, num_layers=3):
    torch.manual_seed(0)
    config = config_class(
        vocab_size=500, hidden_size=64, intermediate_size=160, num_hidden_layers=num_layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=24, max_position_embeddings=256,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def kept_for_backward(model):
    """Return the bytes of the tensors, without parameters, that a training forward pass keeps for its backward pass."""
    parameters = {it.untyped_storage().data_ptr() for it in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor too, so that its memory isn't reused
        return tensor

    input_ids = torch.randint(1, 500, (SENTENCES, LENGTH))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.train()(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), labels=input_ids)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("all_weights", [False, True], ids=["compact", "full"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen2Config, Gemma2Config, Gemma3TextConfig])
def test_activation_estimate_matches_what_a_forward_pass_keeps(config_class, dtype, checkpointing, all_weights):
    """Three more layers keep what the formula says, to 10%; to 35% where norms learn, whose share differs by family."""
    kept, estimates = [], []
    for num_layers in (3, 6):
        model = small(config_class, dtype, num_layers)
        layout = MemoryModel.of(model, find_decoder(model))
        estimates.append(layout.activations(SENTENCES * LENGTH, LENGTH, checkpointing, all_weights))
        if not all_weights:
            chosen = {site: range(max(1, size // 20)) for site, size in find_decoder(model).sizes.items()}
            model = get_peft_model(model, NeuronConfig(neurons=NeuronSet(chosen), task_type="CAUSAL_LM"))
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        kept.append(kept_for_backward(model))
    assert kept[1] - kept[0] == pytest.approx(estimates[1] - estimates[0], rel=0.35 if all_weights else 0.1)


def test_counts_of_a_small_model():
    model = small(Gemma3TextConfig, torch.bfloat16)
    layout = MemoryModel.of(model, find_decoder(model))
    assert layout.num_parameters == sum(it.numel() for it in model.parameters()) and layout.weight_bytes == 2
    assert (layout.hidden, layout.queries, layout.feed_forward, layout.vocabulary) == (64, 96, 160, 500)
    assert layout.norm_widths == 4 * 64 + 96 + 48 and layout.num_heads == 4 and not layout.is_eager
    for (layer, name), entries in layout.entry_sizes.items():
        projection = find_decoder(model).projection((layer, name))
        assert entries * projection.num_neurons == projection.linear.weight.numel()
    projections = [it.linear for layer in find_decoder(model).layers for it in layer.projections.values()]
    assert layout.num_projected == sum(it.weight.numel() for it in projections)
    assert layout.adapter_state(10) == 180 and layout.state_in_place(10) == 60
    assert layout.trained_logits(7) == 7 * 500 * 12 and layout.scored_logits(7, 600) == 500 * (14 + 4800)
