"""Certified pruning: the bounds hold, and each sentence's top is the one that all exact impacts give."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import padded_batch, tiny_llama
from test_families import FAMILIES, family_model
from transformers import AutoModelForCausalLM

from agnostic_train.detection.detect import detect_neurons
from agnostic_train.detection.top_counts import in_top
from agnostic_train.errors import UserError
from agnostic_train.impact import bound_sieve, query_key
from agnostic_train.impact.attention_block import AttentionBlock
from agnostic_train.impact.hooks import ImpactMeter, unverified_impacts
from agnostic_train.impact.pruning import check_enclosed, decide, num_top, settle
from agnostic_train.impact.row_blocks import row_blocks
from agnostic_train.model.decoder import find_decoder
from agnostic_train.model.inference import left_as_found

TRAINED = Path(__file__).parents[3] / "shared/models/small-multilingual"
LENGTHS = [1, 42, 23, 6]
UNPRUNED = {"Gemma 2"}


def pruned_impacts(model, batch, top_ratio, attention="exact", memory_gb=1.0):
    """The impacts with pruning, and the meter with what was computed."""
    with left_as_found(model), ImpactMeter(model, ["q", "k"], attention, memory_gb, top_ratio) as meter:
        return meter.measure(batch), meter


def assert_same_top(model, batch, top_ratio, attention="exact", memory_gb=1.0, values=True):
    """Returns the meter. Neurons that pruning left in have their exact impact, the others none.

    values: whether to compare the impacts, too; where intervals put a neuron into the top, it has no exact one.
    """
    everything = unverified_impacts(model, batch, ["q", "k"], attention)
    impacts, meter = pruned_impacts(model, batch, top_ratio, attention, memory_gb)
    assert impacts.keys() == everything.keys()
    for site, expected in everything.items():
        count = num_top(top_ratio, expected.shape[1])
        found = impacts[site]
        assert found.dtype == torch.float32 and found.shape == expected.shape
        assert torch.equal(in_top(found, count), in_top(expected, count)), site
        if values:
            exact = torch.where(found > 0, expected, 0)
            torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-5 * expected.max().item())
    return meter


def all_bounds_hold(model, batch, monkeypatch):
    """Every block's bound of every neuron against the exact change in that block; returns how many were compared."""
    compared = []
    original = bound_sieve.BoundSieve.impacts

    def spied(self, top_ratio, work):
        every = self._tiles(torch.ones(self.attention.batch, sum(self.layout.sizes), dtype=torch.bool))
        limits, _ = self._bounds()
        for number, block in enumerate(self.blocks):
            squares = self._squares(every, number)
            assert not (squares > limits[..., number]).any(), f"block {block}"
            compared.append(squares.numel())
        return original(self, top_ratio, work)

    monkeypatch.setattr(bound_sieve.BoundSieve, "impacts", spied)
    pruned_impacts(model, batch, 0.05)
    return sum(compared)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_every_family_has_the_same_top(name, side):
    model = family_model(name)
    meter = assert_same_top(model, padded_batch(LENGTHS, side), 0.1, values=name != "OLMo 2")
    assert bool(meter.unpruned) == (name in UNPRUNED)
    for work in meter.work.values():
        assert (work.neurons == work.all_neurons) == (name in UNPRUNED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_types_and_ratios(dtype):
    model = tiny_llama(attention_bias=True).to(dtype)
    for top_ratio in (0.001, 0.05, 0.3, 1.0):
        assert_same_top(model, padded_batch(LENGTHS), top_ratio)


def test_the_paper_form_is_pruned_too(llama):
    assert not assert_same_top(llama, padded_batch(LENGTHS), 0.1, attention="paper").unpruned


@pytest.mark.parametrize("checkpoint", ["step-00080", "final"])
def test_trained_weights(checkpoint):
    if not TRAINED.exists():
        pytest.skip("the small trained model isn't here")
    model = AutoModelForCausalLM.from_pretrained(TRAINED / checkpoint, dtype=torch.float32)
    meter = assert_same_top(model, padded_batch([48, 31, 17], vocab_size=8192), 0.05)
    assert all(work.logits < 0.3 * work.all_logits for work in meter.work.values())


@pytest.mark.parametrize("scale", [1e-3, 0.1, 4.0, 30.0])
@pytest.mark.parametrize("side", ["left", "right"])
def test_bounds_hold_at_any_scale(scale, side, monkeypatch):
    """From logits in the noise to logits of thousands, where attention sees one key."""
    model = tiny_llama()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= scale
    assert all_bounds_hold(model, padded_batch([1, 37, 20], side), monkeypatch) > 1_000
    monkeypatch.undo()
    assert_same_top(model, padded_batch([1, 37, 20], side), 0.05)


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("family", ["Qwen3", "Gemma 3 text"])
def test_bounds_hold_where_a_norm_makes_the_others_grow(family, scale, monkeypatch):
    """With logits of any size, and with one entry that is most of its head, so that the others grow many times."""
    model = family_model(family)
    with torch.no_grad():
        for layer in find_decoder(model).layers:
            for name, norm in layer.norms.items():
                norm.weight.mul_(scale)
                layer.projections[name].linear.weight[3::10] *= 20
    assert all_bounds_hold(model, padded_batch([1, 37, 20]), monkeypatch) > 1_000
    monkeypatch.undo()
    assert_same_top(model, padded_batch([1, 37, 20]), 0.05)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_bounds_hold_with_a_large_common_part(name, monkeypatch):
    """A bias that all tokens share: squares less squared means would lose everything else to rounding."""
    model = tiny_llama(attention_bias=True)
    with torch.no_grad():
        for layer in find_decoder(model).layers:
            layer.projections[name].linear.bias.normal_(std=30)
    assert all_bounds_hold(model, padded_batch([1, 37, 20]), monkeypatch) > 1_000


def test_a_common_part_does_not_loosen_the_bounds(llama, monkeypatch):
    """The softmax doesn't see what all keys share, so neither may the bounds, beyond a little rounding."""
    ratios = []
    original = bound_sieve.BoundSieve.__init__

    def spied(self, attention, changes, *others):
        real = attention.inputs.real[:, None, :, None]
        shifted = {
            name: replace(x, b=x.b + 100 * x.b.abs().mean() * real, d=x.d + 100 * x.d.abs().mean() * real)
            for name, x in changes.items()
        }
        original(self, attention, shifted, *others)
        bounds = self._bounds()[0]
        original(self, attention, changes, *others)
        ratios.append((bounds / self._bounds()[0]).quantile(0.9))

    monkeypatch.setattr(bound_sieve.BoundSieve, "__init__", spied)
    pruned_impacts(llama, padded_batch([40, 37]), 0.05)
    assert len(ratios) == 2 and max(ratios) < 1.05


def test_bounds_hold_where_few_keys_are_far_apart(llama, monkeypatch):
    """Sentences of two tokens that alternate: many keys and values are equal."""
    batch = padded_batch([40, 40])
    batch["input_ids"][0] = torch.tensor([3, 5]).repeat(20)
    batch["input_ids"][1] = 7
    assert all_bounds_hold(llama, batch, monkeypatch) > 1_000
    monkeypatch.undo()
    impacts, _ = pruned_impacts(llama, batch, 0.1)
    assert all(values.isfinite().all() for values in impacts.values())


def equal_heads():
    """Two equal KV heads with equal query heads: every impact is there twice."""
    model = tiny_llama(num_attention_heads=2, num_key_value_heads=2)
    with torch.no_grad():
        for layer in model.model.layers:
            for name in ("q_proj", "k_proj", "v_proj"):
                weight = getattr(layer.self_attn, name).weight
                weight[10:] = weight[:10]
    return model


def test_ties_go_to_the_lower_index():
    """Of sentences whose logits fill vectors: at a tensor's end, a power of two may differ in its last bit."""
    for top_ratio in (0.05, 0.15, 0.25):
        assert_same_top(equal_heads(), padded_batch([64, 64, 64]), top_ratio)


def test_of_neurons_that_are_equal_but_for_rounding_either_is_found():
    model, batch = equal_heads(), padded_batch(LENGTHS)
    everything = unverified_impacts(model, batch, ["q", "k"])
    for count in (1, 3, 5):
        for site, found in pruned_impacts(model, batch, count / 20)[0].items():
            torch.testing.assert_close(found.topk(count).values, everything[site].topk(count).values)


def test_special_tokens_and_padding_that_is_not_a_number(llama):
    batch = padded_batch(LENGTHS, "left")
    batch["special_tokens_mask"] = torch.zeros_like(batch["input_ids"])
    batch["special_tokens_mask"][:, -3:] = 1
    padding = ~batch["attention_mask"].bool()
    handle = llama.get_input_embeddings().register_forward_hook(
        lambda module, args, output: output.masked_fill(padding.unsqueeze(-1), torch.nan)
    )
    assert_same_top(llama, batch, 0.1)
    handle.remove()


def test_little_memory_gives_the_same(llama):
    batch = padded_batch(LENGTHS)
    expected, _ = pruned_impacts(llama, batch, 0.1)
    for memory_gb in (1e-6, 3e-4):
        found, _ = pruned_impacts(llama, batch, 0.1, memory_gb=memory_gb)
        for site, values in expected.items():
            count = num_top(0.1, values.shape[1])
            assert torch.equal(in_top(found[site], count), in_top(values, count))


def test_the_exact_form_stays_within_the_budget(llama, monkeypatch):
    sizes = []
    original = AttentionBlock.squares

    def spied(self, changed):
        assert changed.shape[1] in bound_sieve._TILE_SIZES
        sizes.append((2 * changed.numel() + changed[..., 0].numel() * llama.config.head_dim) * changed.element_size())
        return original(self, changed)

    monkeypatch.setattr(AttentionBlock, "squares", spied)
    monkeypatch.setattr(query_key, "_MOST_LEFT", 1.0)
    for budget in (1 << 17, 1 << 19):
        sizes.clear()
        pruned_impacts(llama, padded_batch([42, 40]), 0.1, memory_gb=2 * budget / 2**30)
        assert len(sizes) > 10 and max(sizes) <= budget


@pytest.mark.parametrize("projection", ["q_proj", "k_proj", "v_proj"])
def test_impacts_that_are_not_finite_are_refused(projection):
    model = tiny_llama()
    with torch.no_grad():
        getattr(model.model.layers[1].self_attn, projection).weight[3] = torch.nan
    with pytest.raises(UserError, match="layer 1 .* aren't finite"):
        detect_neurons(model, {"a": [padded_batch(LENGTHS)]}, verify=False, progress=False)


def test_detection_says_how_much_was_computed(llama, tmp_path):
    corpora = {"a": [padded_batch(LENGTHS)], "b": [padded_batch([30, 12], seed=5)]}
    found = detect_neurons(llama, corpora, 0.05, 0.5, progress=False)
    plain = detect_neurons(llama, corpora, 0.05, 0.5, pruning=False, progress=False)
    assert found == plain and plain.exact_share is None
    assert found.exact_share.keys() == {"q", "k"} and all(0 < share < 1 for share in found.exact_share.values())
    found.save(tmp_path / "neurons")
    assert type(found).load(tmp_path / "neurons").exact_share == found.exact_share
    for _ in range(2):  # begun, and gone on with where all is counted
        resumed = detect_neurons(llama, corpora, 0.05, 0.5, progress=False, resume_dir=tmp_path / "counts")
        assert resumed.exact_share == found.exact_share


@pytest.mark.parametrize(("most_left", "sieved"), [(0.0, [20, 13]), (1.0, [20, 20, 15, 13])])
def test_where_bounds_leave_too_much_all_are_computed(llama, monkeypatch, most_left, sieved):
    """Until sentences are much shorter; the top sets are the same either way."""
    monkeypatch.setattr(query_key, "_MOST_LEFT", most_left)
    lengths, original = [], bound_sieve.BoundSieve.impacts

    def spied(self, *args):
        lengths.append(self.attention.length)
        return original(self, *args)

    monkeypatch.setattr(bound_sieve.BoundSieve, "impacts", spied)
    batches = [padded_batch([length, 9]) for length in (20, 20, 15, 13)]
    expected = [unverified_impacts(llama, batch, ["q", "k"]) for batch in batches]
    with left_as_found(llama), ImpactMeter(llama, ["q", "k"], top_ratio=0.1) as meter:
        for batch, impacts in zip(batches, expected, strict=True):
            found = meter.measure(batch)
            for site, values in impacts.items():
                count = num_top(0.1, values.shape[1])
                assert torch.equal(in_top(found[site], count), in_top(values, count))
    assert lengths == [length for length in sieved for _ in range(2)] and not meter.unpruned


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_neuron_that_changes_no_logit_has_no_impact_at_all(side, monkeypatch):
    """Not even one of rounding, of which there is a little everywhere here."""
    original = AttentionBlock.squares
    monkeypatch.setattr(AttentionBlock, "squares", lambda self, changed: original(self, changed) + 1e-12)
    model, batch = family_model("Mistral", sliding_window=5), padded_batch([40, 21], side)
    with torch.no_grad():
        for layer in find_decoder(model).layers:
            for name in "qk":
                layer.projections[name].linear.weight[3] = 0
    for impacts in (unverified_impacts(model, batch, ["q", "k"]), pruned_impacts(model, batch, 1.0)[0]):
        assert all(not values[:, 3].any() and values[:, 4].all() for values in impacts.values())


def test_blocks_cover_every_row_and_every_visible_key():
    for length in (1, 7, 16, 42, 123):
        positions = torch.arange(length)
        visible = (positions[:, None] >= positions) & (positions[:, None] - positions < 30)
        blocks = row_blocks(visible[None, None])
        assert [row for block in blocks for row in range(length)[block.rows]] == list(range(length))
        for block in blocks:
            outside = visible[block.rows].clone()
            outside[:, block.keys] = False
            assert not outside.any()


def test_what_a_wide_interval_reports_is_its_lower_end():
    low, high = torch.tensor([[9.0, 8.0, 7.0, 1.0, 0.0]]), torch.tensor([[210.0, torch.inf, 8.0, 2.5, 1.5]])
    certain, unclear = decide(low, high, 3)
    assert certain.tolist() == [[True, True, True, False, False]] and not unclear.any()
    assert settle(low, high, certain, unclear, torch.zeros_like(low)).tolist() == [[9.0, 8.0, 7.5, 0.0, 0.0]]


def test_what_rounding_may_do_decides_nothing():
    ends = torch.tensor([[1.00005, 1.0, 0.99995, 0.9]])
    certain, unclear = decide(ends, ends, 1)
    assert not certain.any() and unclear.tolist() == [[True, True, True, False]]
    check_enclosed(ends * 1.00005, ends, ends)
