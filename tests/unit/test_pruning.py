"""Certified pruning: the bounds hold, and each sentence's top equals that of all exact impacts."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import padded_batch, tiny_llama
from test_families import FAMILIES, family_model
from transformers import AutoModelForCausalLM

from agnostic_train.detection.detect import detect_neurons
from agnostic_train.detection.self_check import verify_impacts
from agnostic_train.detection.top_counts import in_top
from agnostic_train.errors import UserError
from agnostic_train.impact import bound_sieve, query_key
from agnostic_train.impact.attention_block import AttentionBlock
from agnostic_train.impact.hooks import ImpactMeter, unverified_impacts
from agnostic_train.impact.pruning import Work, check_enclosed, decide, num_top, settle
from agnostic_train.impact.row_blocks import row_blocks
from agnostic_train.model.decoder import find_decoder
from agnostic_train.model.inference import left_as_found

TRAINED = Path(__file__).parents[3] / "shared/models/small-multilingual"
LENGTHS = [1, 42, 23, 6]
UNPRUNED = {"Gemma 2"}


def pruned_impacts(model, batch, top_ratio, attention="exact", memory_gb=1.0):
    """Return the impacts with pruning, and the meter that counts what was computed."""
    with left_as_found(model), ImpactMeter(model, ["q", "k"], attention, memory_gb, top_ratio) as meter:
        return meter.measure(batch), meter


def assert_same_top(model, batch, top_ratio, attention="exact", memory_gb=1.0, values=True):
    """Check that pruned impacts give the exact impacts' top; neurons in it have exact impacts, the others zero.

    values: whether to compare impacts too; a neuron that its interval puts into the top has no exact one.
    Returns the meter.
    """
    everything = unverified_impacts(model, batch, ["q", "k"], attention)
    impacts, meter = pruned_impacts(model, batch, top_ratio, attention, memory_gb)
    assert impacts.keys() == everything.keys()
    for site, expected in everything.items():
        count = num_top(top_ratio, expected.shape[1])
        pruned = impacts[site]
        assert pruned.dtype == torch.float32 and pruned.shape == expected.shape
        assert torch.equal(in_top(pruned, count), in_top(expected, count)), site
        if values:
            exact = torch.where(pruned > 0, expected, 0)
            torch.testing.assert_close(pruned, exact, rtol=1e-3, atol=1e-5 * expected.max().item())
    return meter


def all_bounds_hold(model, batch, monkeypatch):
    """Check every neuron's bound in every block against the exact change there; return how many were compared."""
    compared = []
    original = bound_sieve.BoundSieve.impacts

    def spied(self, top_ratio):
        every = self._tiles(torch.ones(self.attention.batch, sum(self.layout.sizes), dtype=torch.bool))
        limits, _ = self._bounds()
        for number, block in enumerate(self.blocks):
            squares = self._squares(every, number)
            assert not (squares > limits[..., number]).any(), f"block {block}"
            compared.append(squares.numel())
        return original(self, top_ratio)

    monkeypatch.setattr(bound_sieve.BoundSieve, "impacts", spied)
    pruned_impacts(model, batch, 0.05)
    return sum(compared)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_pruning_finds_the_same_top_for_every_family(name, side):
    model = family_model(name)
    meter = assert_same_top(model, padded_batch(LENGTHS, side), 0.1, values=name not in ("OLMo 2", "OLMo 3"))
    assert bool(meter.unpruned) == (name in UNPRUNED)
    for work in meter.work.values():
        assert (work.neurons == work.all_neurons) == (name in UNPRUNED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_pruning_finds_the_same_top_for_any_dtype_and_ratio(dtype):
    model = tiny_llama(attention_bias=True).to(dtype)
    for top_ratio in (0.001, 0.05, 0.3, 1.0):
        assert_same_top(model, padded_batch(LENGTHS), top_ratio)


def test_paper_attention_is_pruned_too(llama):
    assert not assert_same_top(llama, padded_batch(LENGTHS), 0.1, attention="paper").unpruned


@pytest.mark.parametrize("checkpoint", ["step-00080", "final"])
def test_pruning_of_a_trained_model(checkpoint):
    if not TRAINED.exists():
        pytest.skip("the small trained model isn't here")
    model = AutoModelForCausalLM.from_pretrained(TRAINED / checkpoint, dtype=torch.float32)
    meter = assert_same_top(model, padded_batch([48, 31, 17], vocab_size=8192), 0.05)
    assert all(work.logits < 0.3 * work.all_logits for work in meter.work.values())


@pytest.mark.parametrize("scale", [1e-3, 0.1, 4.0, 30.0])
@pytest.mark.parametrize("side", ["left", "right"])
def test_bounds_hold_at_any_scale(scale, side, monkeypatch):
    """From logits in the range of rounding noise to thousands, with which attention selects one key."""
    model = tiny_llama()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= scale
    assert all_bounds_hold(model, padded_batch([1, 37, 20], side), monkeypatch) > 1_000
    monkeypatch.undo()
    assert_same_top(model, padded_batch([1, 37, 20], side), 0.05)


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("family", ["Qwen3", "Gemma 3 text"])
def test_bounds_hold_if_a_norm_makes_other_entries_grow(family, scale, monkeypatch):
    """Logits of any size, and one entry that dominates its head, so that without it the others grow many times."""
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
    """All tokens share a bias: with it, squares minus squared means would lose everything else to rounding."""
    model = tiny_llama(attention_bias=True)
    with torch.no_grad():
        for layer in find_decoder(model).layers:
            layer.projections[name].linear.bias.normal_(std=30)
    assert all_bounds_hold(model, padded_batch([1, 37, 20]), monkeypatch) > 1_000


def test_common_part_of_keys_does_not_loosen_the_bounds(llama, monkeypatch):
    """The softmax ignores what all keys share, so the bounds must too, apart from a little rounding."""
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


def test_bounds_hold_with_few_distinct_keys(llama, monkeypatch):
    """One sentence alternates between two tokens, one repeats a token: many keys and values are equal."""
    batch = padded_batch([40, 40])
    batch["input_ids"][0] = torch.tensor([3, 5]).repeat(20)
    batch["input_ids"][1] = 7
    assert all_bounds_hold(llama, batch, monkeypatch) > 1_000
    monkeypatch.undo()
    impacts, _ = pruned_impacts(llama, batch, 0.1)
    assert all(values.isfinite().all() for values in impacts.values())


def equal_heads():
    """Return a model with two equal KV heads and equal query heads, so that every impact occurs twice."""
    model = tiny_llama(num_attention_heads=2, num_key_value_heads=2)
    with torch.no_grad():
        for layer in model.model.layers:
            for name in ("q_proj", "k_proj", "v_proj"):
                weight = getattr(layer.self_attn, name).weight
                weight[10:] = weight[:10]
    return model


def test_ties_go_to_the_lower_index():
    """Lengths fill whole SIMD vectors, because at a tensor's end a power of two may differ in its last bit."""
    for top_ratio in (0.05, 0.15, 0.25):
        assert_same_top(equal_heads(), padded_batch([64, 64, 64]), top_ratio)


def test_neurons_that_tie_up_to_rounding_are_interchangeable():
    model, batch = equal_heads(), padded_batch(LENGTHS)
    everything = unverified_impacts(model, batch, ["q", "k"])
    for count in (1, 3, 5):
        for site, impacts in pruned_impacts(model, batch, count / 20)[0].items():
            torch.testing.assert_close(impacts.topk(count).values, everything[site].topk(count).values)


def test_pruning_with_special_tokens_and_nan_at_padding(llama):
    batch = padded_batch(LENGTHS, "left")
    batch["special_tokens_mask"] = torch.zeros_like(batch["input_ids"])
    batch["special_tokens_mask"][:, -3:] = 1
    padding = ~batch["attention_mask"].bool()
    handle = llama.get_input_embeddings().register_forward_hook(
        lambda module, args, output: output.masked_fill(padding.unsqueeze(-1), torch.nan)
    )
    assert_same_top(llama, batch, 0.1)
    handle.remove()


def test_little_memory_gives_the_same_top(llama):
    batch = padded_batch(LENGTHS)
    expected, _ = pruned_impacts(llama, batch, 0.1)
    for memory_gb in (1e-6, 3e-4):
        impacts, _ = pruned_impacts(llama, batch, 0.1, memory_gb=memory_gb)
        for site, values in expected.items():
            count = num_top(0.1, values.shape[1])
            assert torch.equal(in_top(impacts[site], count), in_top(values, count))


def test_exact_computation_stays_within_the_memory_budget(llama, monkeypatch):
    sizes = []
    original = AttentionBlock.squares

    def spied(self, changed):
        assert changed.shape[1] in bound_sieve._TILE_SIZES
        sizes.append((2 * changed.numel() + changed[..., 0].numel() * llama.config.head_dim) * changed.element_size())
        return original(self, changed)

    monkeypatch.setattr(AttentionBlock, "squares", spied)
    monkeypatch.setattr(query_key, "_MAX_LEFT", 1.0)
    for budget in (1 << 17, 1 << 19):
        sizes.clear()
        pruned_impacts(llama, padded_batch([42, 40]), 0.1, memory_gb=2 * budget / 2**30)
        assert len(sizes) > 10 and max(sizes) <= budget


@pytest.mark.parametrize("projection", ["q_proj", "k_proj", "v_proj"])
def test_nonfinite_impacts_are_refused(projection):
    model = tiny_llama()
    with torch.no_grad():
        getattr(model.model.layers[1].self_attn, projection).weight[3] = torch.nan
    with pytest.raises(UserError, match="layer 1 .* aren't finite"):
        detect_neurons(model, {"a": [padded_batch(LENGTHS)]}, verify=False, progress=False)


def test_detection_reports_the_share_computed_exactly(llama, tmp_path):
    corpora = {"a": [padded_batch(LENGTHS)], "b": [padded_batch([30, 12], seed=5)]}
    pruned = detect_neurons(llama, corpora, 0.05, 0.5, progress=False)
    plain = detect_neurons(llama, corpora, 0.05, 0.5, pruning=False, progress=False)
    assert pruned == plain and plain.exact_share is None
    assert pruned.exact_share.keys() == {"q", "k"} and all(0 < share < 1 for share in pruned.exact_share.values())
    pruned.save(tmp_path / "neurons")
    assert type(pruned).load(tmp_path / "neurons").exact_share == pruned.exact_share
    for _ in range(2):  # from the start, then resumed with all sentences counted
        resumed = detect_neurons(llama, corpora, 0.05, 0.5, progress=False, resume_dir=tmp_path / "counts")
        assert resumed.exact_share == pruned.exact_share


@pytest.mark.parametrize(("most_left", "sieved"), [(0.0, [20, 13]), (1.0, [20, 20, 15, 13])])
def test_sieve_is_skipped_if_bounds_leave_too_much(llama, monkeypatch, most_left, sieved):
    """The sieve is tried again once sentences are much shorter; the top sets are the same either way."""
    monkeypatch.setattr(query_key, "_MAX_LEFT", most_left)
    lengths, original = [], bound_sieve.BoundSieve.impacts

    def spied(self, *args):
        lengths.append(self.attention.length)
        return original(self, *args)

    monkeypatch.setattr(bound_sieve.BoundSieve, "impacts", spied)
    batches = [padded_batch([length, 9]) for length in (20, 20, 15, 13)]
    expected = [unverified_impacts(llama, batch, ["q", "k"]) for batch in batches]
    with left_as_found(llama), ImpactMeter(llama, ["q", "k"], top_ratio=0.1) as meter:
        for batch, impacts in zip(batches, expected, strict=True):
            pruned = meter.measure(batch)
            for site, values in impacts.items():
                count = num_top(0.1, values.shape[1])
                assert torch.equal(in_top(pruned[site], count), in_top(values, count))
    assert lengths == [length for length in sieved for _ in range(2)] and not meter.unpruned


@pytest.mark.parametrize("family", ["Mistral", "Qwen3"])
def test_small_values_give_the_same_top(family):
    """The model computes the same with tiny values and large `o` weights; fourth powers of such values underflow."""
    model, batch = family_model(family), padded_batch([40, 30])
    expected = pruned_impacts(model, batch, 0.1)[0]
    with torch.no_grad():
        for layer in find_decoder(model).layers:
            layer.projections["v"].linear.weight *= 2.0**-50
            layer.projections["o"].linear.weight *= 2.0**50
    impacts = assert_same_top(model, batch, 0.1) and pruned_impacts(model, batch, 0.1)[0]
    for site, values in impacts.items():
        torch.testing.assert_close(values * 2.0**50, expected[site], rtol=1e-3, atol=0)


def test_self_check_notices_bounds_that_do_not_hold(llama, monkeypatch):
    batch, original = padded_batch([40, 30]), bound_sieve.square_bounds
    verify_impacts(llama, batch, pruning=True)

    def too_low(*arguments):
        bounds, estimates = original(*arguments)
        return bounds * 1e-3, estimates

    monkeypatch.setattr(bound_sieve, "square_bounds", too_low)
    with pytest.raises(UserError, match=r"detection\.pruning: impacts lie outside the intervals proven for them"):
        verify_impacts(llama, batch, pruning=True)


@pytest.mark.parametrize("side", ["left", "right"])
def test_neuron_that_changes_no_logit_has_zero_impact(side, monkeypatch):
    """Its impact is exactly zero although a little rounding error is added here to every square of rows that count."""
    original = AttentionBlock.squares

    def imprecise(self, changed):
        return original(self, changed) + 1e-12 * self.counted.amax(-1, keepdim=True)

    monkeypatch.setattr(AttentionBlock, "squares", imprecise)
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


def test_settle_reports_the_lower_end_of_a_wide_interval():
    low, high = torch.tensor([[9.0, 8.0, 7.0, 1.0, 0.0]]), torch.tensor([[210.0, torch.inf, 8.0, 2.5, 1.5]])
    certain, unclear = decide(low, high, 3)
    assert certain.tolist() == [[True, True, True, False, False]] and not unclear.any()
    assert settle(low, high, certain, torch.zeros_like(low)).tolist() == [[9.0, 8.0, 7.5, 0.0, 0.0]]


def test_decide_leaves_differences_within_rounding_unclear():
    ends = torch.tensor([[1.00005, 1.0, 0.99995, 0.9]])
    certain, unclear = decide(ends, ends, 1)
    assert not certain.any() and unclear.tolist() == [[True, True, True, False]]
    check_enclosed(ends * 1.00005, ends, ends)


def test_counts_are_read_before_those_of_several_layers_are_added(llama):
    """The layers may be on several GPUs, whose tensors can't be added."""

    class OnDevice:
        def __int__(self):
            return 3

        def __add__(self, other):
            raise AssertionError("added on the device")

        __radd__ = __add__

    meter = ImpactMeter(llama, top_ratio=0.1)
    for observer in meter._observers:
        observer.query_key.work["q"] = Work(neurons=OnDevice(), all_neurons=5)
    num_layers = llama.config.num_hidden_layers
    assert (meter.work["q"].neurons, meter.work["q"].all_neurons) == (3 * num_layers, 5 * num_layers)
