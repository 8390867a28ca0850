"""For every supported family, the impacts of all projections equal those of real deactivation."""

import pytest
import torch
import transformers
from conftest import padded_batch
from test_impact import brute_force, sentences_of

from agnostic_train.detection.self_check import verify_impacts
from agnostic_train.export.frozen_weights import check_frozen_weights
from agnostic_train.export.trained import Trained
from agnostic_train.impact.hooks import ImpactMeter, unverified_impacts
from agnostic_train.model.decoder import PROJECTIONS, TESTED_FAMILIES, find_decoder
from agnostic_train.neurons.neuron_set import NeuronSet
from agnostic_train.training.mask import GradientMask

LENGTHS = [1, 5, 11]
COMMON = dict(
    vocab_size=61, hidden_size=36, intermediate_size=29, num_hidden_layers=2, num_attention_heads=6,
    num_key_value_heads=2, head_dim=10, max_position_embeddings=64, pad_token_id=0, initializer_range=0.3,
)  # fmt: skip
MHA = {"num_key_value_heads": 6}
HEADS_OF_6 = {name: value for name, value in COMMON.items() if name != "head_dim"}
FAMILIES = {
    "Llama with biases": ("Llama", COMMON | {"attention_bias": True, "mlp_bias": True}),
    "Mistral": ("Mistral", COMMON | {"sliding_window": 4}),
    "Qwen2": ("Qwen2", HEADS_OF_6),
    "Qwen3": ("Qwen3", COMMON),
    "Gemma": ("Gemma", COMMON),
    "Gemma 2": (
        "Gemma2",
        COMMON | {"sliding_window": 4, "query_pre_attn_scalar": 17, "attn_logit_softcapping": 3.0},
    ),
    "Gemma 3 text": ("Gemma3", COMMON | {"sliding_window": 4, "query_pre_attn_scalar": 17}),
    "OLMo": ("Olmo", HEADS_OF_6 | {"clip_qkv": 0.8}),
    "OLMo 2": ("Olmo2", HEADS_OF_6),
    "OLMo 3": ("Olmo3", HEADS_OF_6 | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}),
    "Cohere": ("Cohere", HEADS_OF_6),
    "Cohere 2": (
        "Cohere2",
        COMMON | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "Granite": ("Granite", HEADS_OF_6 | {"attention_multiplier": 0.3, "residual_multiplier": 0.7}),
    "GLM-4": ("Glm4", COMMON | {"attention_bias": True}),
    "SmolLM3": ("SmolLM3", HEADS_OF_6 | {"no_rope_layers": [1, 0]}),
    "Exaone 4": ("Exaone4", COMMON | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}),
    "Phi-3": ("Phi3", HEADS_OF_6 | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    "Phi-3 partial rotation": (
        "Phi3",
        HEADS_OF_6
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.67}},
    ),
    "GPT-NeoX": (
        "GPTNeoX",
        {name: value for name, value in HEADS_OF_6.items() if name != "num_key_value_heads"}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.67}},
    ),
}  # fmt: skip


def family_model(name, **changes):
    """Return a random model of the family, with every bias and norm moved away from its neutral initial value."""
    family, settings = FAMILIES[name]
    config_class = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    config = getattr(transformers, config_class)(**settings | changes)
    torch.manual_seed(0)
    # Eager attention defines each family: some versions' sdpa ignores Gemma 2's cap.
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(std=0.5)
            elif "norm" in parameter_name:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_impacts_equal_real_deactivation(name):
    model = family_model(name)
    expected = brute_force(model, sentences_of(padded_batch(LENGTHS)))
    names = [name for name in PROJECTIONS if (0, name) in find_decoder(model).sizes]
    assert names == list(PROJECTIONS) or (name == "GPT-NeoX" and "gate" not in names)
    for side in ("right", "left"):
        impacts = unverified_impacts(model, padded_batch(LENGTHS, side))
        assert list(impacts) == [(layer, projection) for layer in range(2) for projection in names]
        for site, values in impacts.items():
            assert values.shape == expected[site].shape
            torch.testing.assert_close(
                values,
                expected[site],
                rtol=0,
                atol=1e-4 * expected[site].max().item(),
                msg=lambda m, site=site: f"{site}: {m}",
            )
    assert max(comparison.error for comparison in verify_impacts(model, padded_batch(LENGTHS, "left"))) < 1e-4


def test_tested_families_are_named(pytestconfig):
    tested = {family_model(name).config.model_type for name in FAMILIES} | {"gemma3"}  # see test_vision_language.py
    assert tested == TESTED_FAMILIES
    readme = (pytestconfig.rootpath / "README.md").read_text().replace(" ", "").replace("-", "").lower()
    for family in TESTED_FAMILIES - {"gemma3_text", "gpt_neox"}:
        assert family.replace("_", "") in readme


def test_sliding_window_and_cap_change_impacts():
    """Otherwise the test above would pass without them."""
    for name, change in (("Mistral", {"sliding_window": 64}), ("Gemma 2", {"attn_logit_softcapping": 1e6})):
        before = unverified_impacts(family_model(name), padded_batch([11]), ["q"])
        after = unverified_impacts(family_model(name, **change), padded_batch([11]), ["q"])
        assert not torch.allclose(before[(1, "q")], after[(1, "q")], rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("projection", ["q", "k"])
@pytest.mark.parametrize("name", ["SmolLM3", "Exaone 4"])
def test_a_layer_without_rotation_is_recognised_by_the_first_longer_sentence(name, projection, dtype):
    model = family_model(name).to(dtype)
    with torch.no_grad(), ImpactMeter(model, [projection]) as meter:
        for lengths, rotates in (([1, 1], [None, None]), ([5, 1], [True, False]), ([9], [True, False])):
            meter.measure(padded_batch(lengths))
            assert [observer.query_key._rotates for observer in meter._observers] == rotates


@pytest.mark.parametrize("name", ["Phi-3", "GPT-NeoX"])
def test_fused_weights_train_only_the_chosen_rows(name, tmp_path):
    """q, k and v share one weight: each chosen neuron is one of its rows, and no other row moves."""
    model = family_model(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    neurons = NeuronSet({(0, "q"): [0, 7], (0, "k"): [1], (0, "v"): [11], (1, "up"): [3], (1, "down"): [28]})
    mask = GradientMask(model, neurons)
    optimizer = torch.optim.AdamW([it.parameter for it in mask.parameters], lr=1e-2, weight_decay=0.1)
    mask.guard(optimizer)
    batch = padded_batch([9, 9])
    for _ in range(3):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    q_row = {"Phi-3": 7, "GPT-NeoX": 1 * 3 * 6 + 1}[name]
    k_row = {"Phi-3": 36 + 1, "GPT-NeoX": 6 + 1}[name]
    v_row = {"Phi-3": 36 + 12 + 11, "GPT-NeoX": 1 * 3 * 6 + 2 * 6 + 5}[name]
    fused = find_decoder(model).projection((0, "q")).linear.weight
    old = before[next(key for key, value in model.named_parameters() if value is fused)]
    assert (fused != old).any(1).nonzero().flatten().tolist() == sorted([0, q_row, k_row, v_row])
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert len(moved) == 3
    base = family_model(name)
    check = check_frozen_weights(Trained.of(model, base, neurons))
    assert check.status == "identical" and check.num_chosen == 6 * 36
