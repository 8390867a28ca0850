"""The self-check passes a correct model and refuses one whose impacts are wrong."""

import gc
import weakref

import pytest
import torch
import transformers
from conftest import padded_batch, tiny_llama
from test_families import FAMILIES, family_model
from transformers import AutoModelForCausalLM

from agnostic_train import detect_neurons, neuron_impacts
from agnostic_train.detection import detect, self_check
from agnostic_train.detection.self_check import ImpactMismatchError, comparison_table, verify_impacts
from agnostic_train.errors import UserError
from agnostic_train.impact import attention, hooks, query_key
from agnostic_train.model.decoder import PROJECTIONS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_correct_model_passes_and_is_left_unchanged(dtype):
    model = tiny_llama(attention_bias=True, num_hidden_layers=5).to(dtype)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    comparisons = verify_impacts(model, padded_batch([7, 12, 3], "left"))
    assert {(c.layer, c.projection) for c in comparisons} == {(i, p) for i in (0, 2, 4) for p in PROJECTIONS}
    assert max(c.error for c in comparisons) < 1e-4
    assert sum(c.deactivated > 0 for c in comparisons) > len(comparisons) / 2
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert model.dtype == dtype and model.config._attn_implementation == "sdpa"
    assert len(comparison_table(comparisons).splitlines()) == len(comparisons) + 1


def test_wrong_formula_is_refused(llama, monkeypatch):
    """Here impacts that ignore the rotation, as in the reference implementation."""
    right = attention.rotated_change

    def wrong_for_queries(inputs, name, *rest):
        return attention.paper_change(inputs) if name == "q" else right(inputs, name, *rest)

    monkeypatch.setattr(query_key, "rotated_change", wrong_for_queries)
    with pytest.raises(
        ImpactMismatchError, match="Llama.* isn't supported: .*layer . q neuron .* another family"
    ) as caught:
        verify_impacts(llama, padded_batch([7, 12]))
    assert len(caught.value.table.splitlines()) == 1 + 2 * 7 * 3 * 2


def test_impacts_off_by_one_percent_are_refused(llama, monkeypatch):
    right = hooks.hidden_unit_impacts
    monkeypatch.setattr(hooks, "hidden_unit_impacts", lambda *args: 1.01 * right(*args))
    with pytest.raises(ImpactMismatchError, match="layer . (gate|up|down)"):
        verify_impacts(llama, padded_batch([7, 12]))


@pytest.mark.parametrize("name", FAMILIES)
def test_rounding_noise_passes(name, monkeypatch):
    """If all values are equal, attention has no effect, and deactivating q and k gives only rounding noise."""
    monkeypatch.setattr(self_check, "MIN_VARIETY", 0)
    batch = {"input_ids": torch.full((2, 9), 7), "attention_mask": torch.ones(2, 9, dtype=torch.int64)}
    comparisons = verify_impacts(family_model(name), batch)
    noise = [c for c in comparisons if c.projection in ("q", "k")]
    assert max(abs(c.deactivated - c.impact) / c.largest for c in noise if c.largest) > self_check.TOLERANCE
    assert max(c.error for c in noise) == 0 and max(c.error for c in comparisons) < self_check.TOLERANCE


@pytest.mark.parametrize("ids", [[[5]], [[5], [9]], [[7] * 30], [[5, 9, 5, 9]]])
def test_wrong_formula_is_refused_on_sentences_in_which_attention_has_no_effect(llama, monkeypatch, ids):
    monkeypatch.setattr(query_key, "rotated_change", lambda inputs, *rest: attention.paper_change(inputs))
    with pytest.raises(ImpactMismatchError, match="layer . [qk] neuron"):
        neuron_impacts(llama, {"input_ids": torch.tensor(ids)})
    batches = [{"input_ids": torch.tensor(ids)}, padded_batch([9])]
    with pytest.raises(ImpactMismatchError, match="layer . [qk] neuron"):
        detect_neurons(llama, {"a": batches}, progress=False)


def test_changes_below_output_rounding_pass(llama):
    """Changes of logits this small are lost in the rounding of the output."""
    with torch.no_grad():
        for layer in llama.model.layers:
            layer.self_attn.q_proj.weight.mul_(1e-4)
            layer.self_attn.v_proj.bias = torch.nn.Parameter(torch.full((layer.self_attn.v_proj.out_features,), 3.0))
    assert max(c.error for c in verify_impacts(llama, padded_batch([7, 12]))) < self_check.TOLERANCE


def test_attention_with_an_unknown_norm_is_refused(llama):
    """With normalised queries, zeroing one entry also changes the others, which the rank-two formula ignores."""
    projection = llama.model.layers[1].self_attn.q_proj
    projection.register_forward_hook(lambda module, args, output: torch.nn.functional.layer_norm(output, [60]))
    with pytest.raises(ImpactMismatchError, match="layer 1 q"):
        verify_impacts(llama, padded_batch([7, 12]))


@pytest.mark.parametrize("longest, checked", [("b", [7, 12]), ("a", [12])])
def test_detection_checks_again_on_longer_sentences(llama, monkeypatch, longest, checked):
    """Some families scale what is beyond a position, which shorter sentences don't show."""
    lengths = []
    monkeypatch.setattr(
        detect, "verify_impacts", lambda model, batch, **settings: lengths.append(batch["input_ids"].shape[1])
    )
    corpora = {language: [padded_batch([12 if language == longest else 7, 3])] for language in "abc"}
    detect_neurons(llama, corpora, progress=False)
    assert lengths == checked


@pytest.mark.parametrize("poisoned", ["self_attn.k_proj", "mlp.down_proj"])
def test_nan_of_the_model_is_not_reported_as_a_mismatch(llama, poisoned):
    with torch.no_grad():
        llama.model.layers[1].get_submodule(poisoned).weight[0, 0] = torch.nan
    with pytest.raises(UserError, match="the model computes NaN or Inf, in layer 1 at") as caught:
        verify_impacts(llama, padded_batch([7, 12]))
    assert not isinstance(caught.value, ImpactMismatchError)


def test_one_layer_is_copied_at_a_time(monkeypatch):
    copies, most = [], []
    original = self_check.float32_copy

    def watched(layer):
        gc.collect()
        most.append(sum(it() is not None for it in copies))
        copied = original(layer)
        copies.append(weakref.ref(copied.attention))
        return copied

    monkeypatch.setattr(self_check, "float32_copy", watched)
    verify_impacts(tiny_llama(num_hidden_layers=5), padded_batch([7, 12]))
    assert most == [0, 0, 0]


def test_only_checked_layers_are_measured_within_the_given_memory(monkeypatch):
    measured = []
    original = query_key.QueryKeyImpacts.measure

    def watched(self, *args):
        measured.append((self.layer.index, self._half_bytes))
        return original(self, *args)

    monkeypatch.setattr(query_key.QueryKeyImpacts, "measure", watched)
    verify_impacts(tiny_llama(num_hidden_layers=5), padded_batch([7, 12]), memory_gb=0.5)
    assert measured == [(index, 2**28) for index in (0, 2, 4)]


def test_only_requested_projections_are_checked(llama, monkeypatch):
    """An attention that can't be followed is no obstacle if q and k aren't requested."""

    def fail(*args):
        raise LookupError("no rotation")

    monkeypatch.setattr(query_key.QueryKeyImpacts, "measure", fail)
    batches = {language: [padded_batch([7, 12], seed=seed)] for seed, language in enumerate(("en", "sw"))}
    projections = ("gate", "up", "down", "v", "o")
    neurons = detect_neurons(llama, batches, top_ratio=0.2, projections=projections, progress=False)
    assert len(neurons.related["en"])
    comparisons = verify_impacts(llama, batches["en"][0], projections=projections)
    assert {c.projection for c in comparisons} == set(projections)
    with pytest.raises(UserError, match="can't be followed"):
        detect_neurons(llama, batches, top_ratio=0.2, progress=False)


OTHERS = {
    "a norm after the rotation": ("HunYuanDenseV1", {"head_dim": 12}),
    "norms before o and down": ("BitNet", {}),
    "heads of another shape": ("Persimmon", {}),
    "differences of attentions": ("DiffLlama", {}),
}


@pytest.mark.parametrize("family", OTHERS)
def test_unsupported_families_are_refused(family):
    """The error names the family and comes at every call, also the first."""
    name, changes = OTHERS[family]
    sizes = dict(
        vocab_size=61, hidden_size=48, intermediate_size=53, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes, **changes)
    model = AutoModelForCausalLM.from_config(config).eval()
    for _ in range(2):
        with pytest.raises(UserError, match=name):
            neuron_impacts(model, padded_batch([12, 9]))


def test_impacts_are_verified_at_the_first_call(llama, monkeypatch):
    checked = []
    original = detect.verify_impacts

    def watched(*args, **keywords):
        checked.append(keywords["projections"])
        return original(*args, **keywords)

    monkeypatch.setattr(detect, "verify_impacts", watched)
    batch = padded_batch([7, 12])
    neuron_impacts(llama, batch, ["up", "v"])
    neuron_impacts(llama, batch, ["v"])
    neuron_impacts(llama, batch, ["k"], verify=False)
    assert checked == [("v", "up")]
    neuron_impacts(llama, batch)
    neuron_impacts(llama, batch, ["q"], attention="paper")
    assert checked[1:] == [PROJECTIONS]
    neuron_impacts(tiny_llama(), batch)
    assert len(checked) == 3


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_nan_at_padding_does_not_matter(llama, side, implementation):
    """NaN at padding reaches neither the impacts nor their verification."""
    llama.set_attn_implementation(implementation)
    batch = padded_batch([5, 9], side)
    expected = neuron_impacts(llama, batch)
    poisoned = tiny_llama()
    poisoned.set_attn_implementation(implementation)
    with torch.no_grad():
        poisoned.get_input_embeddings().weight[0] = torch.nan
    impacts = neuron_impacts(poisoned, batch)
    for site, values in expected.items():
        torch.testing.assert_close(impacts[site], values, rtol=1e-5, atol=1e-6)
