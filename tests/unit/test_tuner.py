"""The PEFT tuner of chosen rows and columns passes what PEFT's own test matrix requires of every tuner."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from conftest import padded_batch, tiny_llama
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_families import FAMILIES, family_model
from transformers import AutoModelForCausalLM

from agnostic_train.errors import UserError
from agnostic_train.model.decoder import find_decoder
from agnostic_train.neurons.neuron_set import NeuronSet
from agnostic_train.training.compact import NeuronConfig, NeuronLinear, adapter_neurons

BATCH = padded_batch([5, 9])


def some_neurons(model, offset=0):
    """Return a few neurons, the last included, at every other site."""
    sizes = find_decoder(model).sizes
    return NeuronSet({site: [offset, size // 2, size - 1] for site, size in list(sizes.items())[offset::2]}, sizes)


def fill(model, adapter_name="default", seed=5):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, NeuronLinear) and adapter_name in module.neuron_delta:
                delta = module.neuron_delta[adapter_name]
                delta.copy_(torch.randn(delta.shape, generator=generator) * 0.2)


def adapted(model=None, neurons=None):
    model = tiny_llama() if model is None else model
    wrapped = get_peft_model(model, NeuronConfig(neurons=neurons or some_neurons(model), task_type="CAUSAL_LM"))
    fill(wrapped)
    return wrapped.eval()


@torch.no_grad()
def logits(model):
    return model(**BATCH).logits[BATCH["attention_mask"].bool()]


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def brute_force(model, neurons, seed=5):
    """Apply the adapter's change to a plain copy's weights, entry by entry, as it is defined."""
    changed = copy.deepcopy(model)
    wrapped = get_peft_model(copy.deepcopy(model), NeuronConfig(neurons=neurons))
    fill(wrapped, seed=seed)
    for site, indices in neurons.items():
        projection = find_decoder(changed).projection(site)
        layer = find_decoder(wrapped).projection(site).linear
        for row_or_column in projection.entries(indices).tolist():
            place = layer.neuron_index["default"].tolist().index(row_or_column)
            with torch.no_grad():
                if projection.neuron_dim == 0:
                    projection.linear.weight[row_or_column] += layer.neuron_delta["default"][place]
                else:
                    projection.linear.weight[:, row_or_column] += layer.neuron_delta["default"][:, place]
    return changed


@pytest.mark.parametrize("name", FAMILIES)
def test_fresh_adapter_changes_no_logit_and_filled_adapter_equals_changed_weights(name):
    model = family_model(name)
    neurons, before = some_neurons(model), logits(model)
    expected = logits(brute_force(model, neurons))
    wrapped = get_peft_model(model, NeuronConfig(neurons=neurons)).eval()
    assert torch.equal(logits(wrapped), before)
    assert adapter_neurons(wrapped) == neurons
    trainable = {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    assert trainable and all(".neuron_delta.default" in name for name in trainable)
    fill(wrapped)
    assert_same(logits(wrapped), expected)
    assert not torch.allclose(expected, before)
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped), before)


@pytest.mark.parametrize("name", ["Llama with biases", "Phi-3", "GPT-NeoX"])
def test_merging_and_unmerging(name):
    model = family_model(name)
    weights = copy.deepcopy(model.state_dict())
    before, wrapped = logits(model), adapted(model)
    expected = logits(wrapped)
    wrapped.merge_adapter()
    assert_same(logits(wrapped), expected)
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped), before)
    wrapped.merge_adapter(safe_merge=True)
    wrapped.unmerge_adapter()
    assert_same(logits(wrapped), expected)
    unloaded = wrapped.unload()
    # Bit for bit: unmerging restores the weights that merging replaced.
    assert all(torch.equal(value, weights[name]) for name, value in unloaded.state_dict().items())
    merged = adapted(unloaded).merge_and_unload(safe_merge=True)
    assert type(merged) is type(model) and not any(isinstance(it, NeuronLinear) for it in merged.modules())
    assert_same(logits(merged), expected)


def test_unmerging_two_adapters_restores_every_bit():
    """They share a column, so only the reverse order restores it."""
    base = tiny_llama()
    before = {name: it.clone() for name, it in base.named_parameters()}
    model = adapted(base, NeuronSet({(0, "down"): [1, 2]}))
    model.add_adapter("other", NeuronConfig(neurons=NeuronSet({(0, "down"): [2, 3]})))
    fill(model, "other", seed=6)
    model.merge_adapter(["default", "other"])
    model.unmerge_adapter()
    after = {name.replace(".base_layer", ""): it for name, it in model.get_base_model().named_parameters()}
    assert all(torch.equal(after[name], it) for name, it in before.items())


def test_safe_merge_refuses_nan_and_changes_nothing():
    wrapped = adapted()
    layer = next(module for module in wrapped.modules() if isinstance(module, NeuronLinear))
    before = layer.base_layer.weight.clone()
    with torch.no_grad():
        layer.neuron_delta["default"][0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected"):
        wrapped.merge_adapter(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before)


def test_names_and_shapes_in_the_saved_adapter(tmp_path):
    """The names are hard-coded here: changing one would make every saved adapter unreadable."""
    neurons = NeuronSet({(0, "q"): [1, 17], (1, "down"): [0, 7, 52]})
    wrapped = adapted(neurons=neurons)
    wrapped.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors"
    ]  # fmt: skip
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    q, down = "base_model.model.model.layers.0.self_attn.q_proj", "base_model.model.model.layers.1.mlp.down_proj"
    assert set(tensors) == {f"{it}.{part}" for it in (q, down) for part in ("neuron_delta", "neuron_index")}
    assert tensors[f"{q}.neuron_delta"].shape == (2, 42) and tensors[f"{q}.neuron_delta"].dtype == torch.float32
    assert tensors[f"{down}.neuron_delta"].shape == (42, 3)
    assert tensors[f"{q}.neuron_index"].tolist() == [1, 17] and tensors[f"{down}.neuron_index"].tolist() == [0, 7, 52]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "NEURON" and config["task_type"] == "CAUSAL_LM"
    assert config["rows"] == {"model.layers.0.self_attn.q_proj": 2}
    assert config["columns"] == {"model.layers.1.mlp.down_proj": 3}
    assert "neurons" not in config


def test_saved_file_is_as_large_as_the_chosen_entries_and_their_indices(tmp_path):
    model = tiny_llama(hidden_size=512, intermediate_size=1536, num_attention_heads=8, head_dim=64, num_hidden_layers=4)
    sizes = find_decoder(model).sizes
    neurons = NeuronSet({site: range(size // 20) for site, size in sizes.items()}, sizes)
    wrapped = adapted(model, neurons)
    wrapped.save_pretrained(tmp_path)
    entries = sum(parameter.numel() for parameter in wrapped.parameters() if parameter.requires_grad)
    expected = 4 * entries + 8 * len(neurons)
    assert expected <= (tmp_path / "adapter_model.safetensors").stat().st_size <= 1.02 * expected


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_peft_saves_and_loads_the_adapter(tmp_path, low_cpu_mem_usage):
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    plain = logits(base)
    wrapped = adapted(base)
    expected = logits(wrapped)
    wrapped.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    wrapped.save_pretrained(tmp_path / "adapter")

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded), expected)
    assert adapter_neurons(loaded) == some_neurons(tiny_llama())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    automatic = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(automatic), expected)
    trainable = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter", is_trainable=True)
    assert any(parameter.requires_grad for parameter in trainable.parameters())
    loaded.save_pretrained(tmp_path / "again")
    for name in ("adapter_model.safetensors",):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()

    # Load into a model that already has another adapter.
    other = get_peft_model(tiny_llama(), NeuronConfig(neurons=NeuronSet({(0, "k"): [1]}))).eval()
    other.load_adapter(tmp_path / "adapter", "second", low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(other), plain)
    other.set_adapter("second")
    assert torch.equal(logits(other), expected)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loading_onto_a_half_precision_base_does_not_round_the_delta(tmp_path, low_cpu_mem_usage):
    wrapped = adapted(tiny_llama().bfloat16())
    wrapped.save_pretrained(tmp_path)
    base = tiny_llama().bfloat16()
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    saved_deltas, loaded_deltas = (
        {name: it for name, it in model.named_parameters() if "neuron_delta" in name} for model in (wrapped, loaded)
    )
    assert saved_deltas.keys() == loaded_deltas.keys()
    for name, delta in loaded_deltas.items():
        assert torch.equal(delta, saved_deltas[name]) and not delta.requires_grad


def test_switching_combining_and_deleting_several_adapters():
    base = tiny_llama()
    plain = logits(base)
    first = logits(brute_force(base, some_neurons(base), seed=5))
    second = logits(brute_force(base, some_neurons(base, offset=1), seed=6))
    changed_by_both = brute_force(brute_force(base, some_neurons(base), seed=5), some_neurons(base, offset=1), seed=6)
    wrapped = adapted(base)
    wrapped.add_adapter("second", NeuronConfig(neurons=some_neurons(base, offset=1)))
    fill(wrapped, "second", seed=6)
    wrapped.eval()
    assert_same(logits(wrapped), first)
    assert all(".default" in name for name, parameter in wrapped.named_parameters() if parameter.requires_grad)
    wrapped.set_adapter("second")
    assert_same(logits(wrapped), second)
    assert all(".second" in name for name, parameter in wrapped.named_parameters() if parameter.requires_grad)
    assert adapter_neurons(wrapped) == some_neurons(base, offset=1)
    wrapped.base_model.set_adapter(["default", "second"])
    assert_same(logits(wrapped), logits(changed_by_both))
    wrapped.merge_adapter()
    assert_same(logits(wrapped), logits(changed_by_both))
    wrapped.unmerge_adapter()
    wrapped.base_model.set_adapter("second")
    wrapped.delete_adapter("default")
    assert_same(logits(wrapped), second)
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped), plain)


def test_second_adapter_of_a_trained_configuration_is_refused():
    """TRL adds such an adapter as the reference for preference training, but copies no delta into it."""
    wrapped = get_peft_model(tiny_llama(), NeuronConfig(neurons=NeuronSet({(0, "q"): [1]}), task_type="CAUSAL_LM"))
    wrapped.add_adapter("ref", wrapped.peft_config["default"])  # both are the base model
    fill(wrapped)
    with pytest.raises(UserError, match="adapter 'default' of this NeuronConfig is already trained"):
        wrapped.add_adapter("other", wrapped.peft_config["default"])
    assert "other" not in wrapped.peft_config
    assert not any("other" in name for name, _ in wrapped.named_parameters())


def test_different_adapters_within_a_batch_are_refused():
    with pytest.raises(ValueError, match="adapter_names: neuron adapters can't be mixed"):
        adapted()(**BATCH, adapter_names=["default", "__base__"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base_gets_a_float32_delta(dtype):
    base = tiny_llama().to(dtype)
    plain = logits(base)
    wrapped = get_peft_model(base, NeuronConfig(neurons=some_neurons(base)), autocast_adapter_dtype=False).eval()
    assert torch.equal(logits(wrapped), plain)
    fill(wrapped)
    assert all(parameter.dtype == torch.float32 for parameter in wrapped.parameters() if parameter.requires_grad)
    expected = logits(wrapped)
    wrapped.merge_adapter()
    torch.testing.assert_close(logits(wrapped), expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))
    # Each merged weight is the float32 sum, rounded once.
    layer = next(module for module in wrapped.modules() if isinstance(module, NeuronLinear))
    merged = layer.base_layer.weight.clone()
    wrapped.unmerge_adapter()
    assert torch.equal(merged, (layer.base_layer.weight.float() + layer.get_delta_weight("default")).to(dtype))


def test_deepcopy_and_state_dict_carry_the_adapter():
    wrapped = adapted()
    expected = logits(wrapped)
    duplicate = copy.deepcopy(wrapped)
    fill(wrapped, seed=9)
    assert torch.equal(logits(duplicate), expected)
    wrapped.load_state_dict(duplicate.state_dict())
    assert torch.equal(logits(wrapped), expected)


def test_neurons_can_be_given_as_a_file(tmp_path):
    model = tiny_llama()
    neurons = some_neurons(model)
    neurons.save(tmp_path / "set.safetensors")
    neurons.to_json(tmp_path / "set.json")
    for file in ("set.safetensors", "set.json"):
        wrapped = get_peft_model(tiny_llama(), NeuronConfig(neurons=tmp_path / file))
        assert adapter_neurons(wrapped) == neurons


def test_errors_name_the_mistake(tmp_path):
    for config, message in (
        (NeuronConfig(), "give NeuronConfig a NeuronSet"),
        (NeuronConfig(neurons=NeuronSet({})), "the set is empty, there is nothing to train"),
        (NeuronConfig(neurons=NeuronSet({(0, "q"): [60]})), "neuron 60 at layer 0 q"),
        (NeuronConfig(neurons=tmp_path / "none.safetensors"), "no such neuron file"),
    ):
        with pytest.raises(UserError, match=message):
            get_peft_model(tiny_llama(), config)
    lora = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UserError, match="adapters already"):
        get_peft_model(lora.base_model.model, NeuronConfig(neurons=NeuronSet({(0, "q"): [0]})))


def test_adapter_of_another_model_is_refused(tmp_path):
    adapted(neurons=NeuronSet({(0, "q"): [1, 59]})).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="trained on another model"):
        PeftModel.from_pretrained(tiny_llama(num_attention_heads=3, num_key_value_heads=1), tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(tiny_llama(hidden_size=36), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(name for name in tensors if name.endswith("neuron_index"))
    save_file({**tensors, key: tensors[key] - 100}, file)
    with pytest.raises(ValueError, match="trained on another model"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)


def test_peft_without_this_package_names_the_unknown_type(tmp_path):
    adapted().save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).peft_type == "NEURON"
    load = f"from peft import PeftConfig; PeftConfig.from_pretrained({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True)
    assert done.returncode and "NEURON" in done.stderr.splitlines()[-1]


def test_adapter_without_loaded_weights_fails_instead_of_training_nothing(tmp_path):
    adapted().save_pretrained(tmp_path)
    empty = get_peft_model(tiny_llama(), PeftConfig.from_pretrained(tmp_path))
    with pytest.raises(UserError, match="weren't loaded"):
        adapter_neurons(empty)
    with pytest.raises((RuntimeError, IndexError)):
        logits(empty)


def test_adapter_of_a_deeper_model_is_refused(tmp_path):
    deep = tiny_llama(num_hidden_layers=4)
    adapted(deep, NeuronSet({(0, "q"): [1], (3, "up"): [2]})).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"model\.layers\.3\.mlp\.up_proj, which this model lacks"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)


def test_unmerging_after_a_cast_restores_the_cast_weights():
    wrapped = adapted()
    wrapped.merge_adapter()
    wrapped.to(torch.bfloat16).unmerge_adapter()
    weight = wrapped.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight
    assert torch.equal(weight, tiny_llama().model.layers[0].self_attn.q_proj.weight.bfloat16())


def test_wrapping_a_peft_model_is_refused():
    with pytest.raises(UserError, match="PeftModel already"):
        get_peft_model(adapted(), NeuronConfig(neurons=NeuronSet({(0, "q"): [0]})))


def test_adapter_neurons_unites_all_active_adapters():
    wrapped = adapted(neurons=NeuronSet({(0, "q"): [1, 4]}))
    wrapped.add_adapter("second", NeuronConfig(neurons=NeuronSet({(0, "q"): [4, 7], (1, "up"): [2]})))
    wrapped.base_model.set_adapter(["default", "second"])
    assert adapter_neurons(wrapped) == NeuronSet({(0, "q"): [1, 4, 7], (1, "up"): [2]})


def test_frozen_delta_stays_frozen_when_moved():
    layer = NeuronLinear(torch.nn.Linear(6, 4), 0)
    layer.add("default", torch.tensor([1, 2]))
    layer.neuron_delta["default"].requires_grad_(False)
    layer._move_adapter_to_device_of_base_layer("default", torch.device("meta"))
    assert layer.neuron_delta["default"].is_meta and not layer.neuron_delta["default"].requires_grad


def test_task_types_with_a_new_head_are_refused():
    with pytest.raises(UserError, match="task_type: SEQ_CLS adds a head"):
        NeuronConfig(neurons=NeuronSet({(0, "q"): [1]}), task_type="SEQ_CLS")
