"""Top-n selection, consistency, and detection as a whole, compared with their definitions."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from conftest import padded_batch, tiny_llama
from test_families import family_model
from transformers import AutoModelForCausalLM

from agnostic_train.detection import counting, detect
from agnostic_train.detection.detect import detect_neurons, neuron_impacts
from agnostic_train.detection.top_counts import TopCounts, in_top
from agnostic_train.errors import UserError
from agnostic_train.impact.hooks import unverified_impacts
from agnostic_train.model.decoder import find_decoder
from agnostic_train.neurons.language_neurons import LanguageNeurons
from agnostic_train.neurons.neuron_set import NeuronSet
from agnostic_train.scores.agnostic_score import language_agnostic_score
from agnostic_train.scores.perplexity import perplexity
from agnostic_train.training.callbacks import DetectionCallback


def brute_force_top(row, count):
    """Return the first `count` indices by impact, largest first, ties by index, without zeros."""
    order = sorted(range(len(row)), key=lambda index: (-row[index], index))
    return {index for index in order[:count] if row[index] > 0}


def test_in_top_breaks_ties_by_index_and_leaves_out_zeros():
    generator = torch.Generator().manual_seed(0)
    impacts = torch.randint(0, 4, (200, 23), generator=generator).float()
    impacts[0] = 0
    for count in (1, 5, 23):
        for row, selected in zip(impacts.tolist(), in_top(impacts, count), strict=True):
            assert set(selected.nonzero().flatten().tolist()) == brute_force_top(row, count)


def test_top_size_is_the_floor_of_the_exact_product():
    """In floating point, 0.29 * 100 is 28.999..."""
    counts = TopCounts(top_ratio=0.29)
    counts.add({(0, "q"): torch.arange(1, 101, dtype=torch.float32)[None]})
    assert len(counts.consistent(1.0, {(0, "q"): 100})) == 29


@pytest.mark.parametrize("consistency, expected", [(1.0, [0]), (0.6, [0, 1]), (0.2, [0, 1, 2]), (0.61, [0])])
def test_consistency_is_a_fraction_of_the_sentences(consistency, expected):
    """Of five sentences, neuron 0 is in the top in 5, neuron 1 in 3, neuron 2 in 1, and neuron 3 in none."""
    counts = TopCounts(top_ratio=0.75)
    impacts = torch.tensor([[9, 8, 7, 0], [9, 8, 0, 0], [9, 8, 0, 0], [9, 0, 0, 0], [9, 0, 0, 0]], dtype=torch.float32)
    counts.add({(0, "q"): impacts[:2]})
    counts.add({(0, "q"): impacts[2:]})
    assert counts.consistent(consistency, {(0, "q"): 4}) == NeuronSet({(0, "q"): expected})


def corpora():
    return {
        name: [padded_batch([5, 9, 3], seed=seed), padded_batch([8], seed=seed + 9)] for seed, name in enumerate("ab")
    }


@pytest.mark.parametrize("top_ratio, consistency", [(0.2, 0.75), (0.001, 0.5), (1.0, 1.0)])
def test_detection_equals_its_definition(llama, top_ratio, consistency):
    neurons = detect_neurons(llama, corpora(), top_ratio, consistency, exclusive="unique", progress=False)
    related = {}
    for name, batches in corpora().items():
        impacts = [unverified_impacts(llama, batch) for batch in batches]
        sites = {}
        for site, size in find_decoder(llama).sizes.items():
            rows = torch.cat([values[site] for values in impacts]).tolist()
            tops = [brute_force_top(row, max(1, int(top_ratio * size))) for row in rows]
            sites[site] = [n for n in range(size) if sum(n in top for top in tops) >= consistency * len(rows)]
        related[name] = NeuronSet(sites)
    assert neurons.related == related
    assert neurons.shared == related["a"] & related["b"]
    assert neurons.exclusive["a"] == related["a"] - related["b"]
    assert neurons.settings["num_sentences"] == {"a": 4, "b": 4} and neurons.shared.sizes == find_decoder(llama).sizes


def test_padding_side_does_not_matter(llama):
    left = {"a": [padded_batch([5, 9, 3], "left")]}
    right = {"a": [padded_batch([5, 9, 3], "right")]}
    assert detect_neurons(llama, left, 0.2, progress=False) == detect_neurons(llama, right, 0.2, progress=False)


def test_batch_size_and_padding_side_do_not_change_the_neurons(llama):
    """Only a neuron whose impact equals the threshold's up to rounding could enter or leave a set; here none does."""
    lengths = [5, 9, 3, 8, 11, 7, 4, 6]
    sentences = [padded_batch([length], seed=index) for index, length in enumerate(lengths)]

    def batches(size, side):
        for start in range(0, len(sentences), size):
            part = sentences[start : start + size]
            batch = padded_batch(lengths[start : start + size], side)
            for row, sentence in enumerate(part):
                batch["input_ids"][row][batch["attention_mask"][row].bool()] = sentence["input_ids"][0]
            yield batch

    sets = [
        detect_neurons(llama, {"a": batches(size, side)}, 0.5, 0.5, progress=False).related["a"]
        for size in (1, 3, 8)
        for side in ("left", "right")
    ]
    assert len(sets[0]) > 50
    assert sum(len((sets[0] | other) - (sets[0] & other)) for other in sets[1:]) == 0


def test_detection_on_a_model_placed_by_device_map(tmp_path, llama):
    llama.save_pretrained(tmp_path)
    placed = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto")
    assert detect_neurons(placed, corpora(), 0.2, progress=False) == detect_neurons(
        llama, corpora(), 0.2, progress=False
    )


@contextmanager
def forbidden(model):
    """Fail the test if the model runs within the block."""
    handle = model.model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    try:
        yield
    finally:
        handle.remove()


def test_projections_can_be_an_iterator(llama):
    once = detect_neurons(llama, corpora(), 0.2, projections=iter(["v", "up"]), progress=False)
    assert once == detect_neurons(llama, corpora(), 0.2, projections=["up", "v"], progress=False)
    assert all(len(neurons) for neurons in once.related.values())


@pytest.mark.parametrize("method", ["impact", "lape"])
def test_progress_bar_shows_the_total_if_batches_have_a_length(llama, capsys, method):
    batches = [padded_batch([5, 9]), padded_batch([7])]
    detect_neurons(llama, {"en": batches, "sw": iter(batches)}, method=method, verify=False)
    shown = capsys.readouterr().err
    assert "detect en:   0%" in shown and " 0/3 " in shown and "detect sw: 0 sentences" in shown


def test_gate_is_refused_or_left_out_for_a_family_without_one():
    model = family_model("GPT-NeoX")
    with pytest.raises(UserError, match="GPTNeoXForCausalLM has none of gate"):
        neuron_impacts(model, padded_batch([5]), ["gate"])
    assert {name for _, name in neuron_impacts(model, padded_batch([5]), ["gate", "up"])} == {"up"}


def test_invalid_batches_are_refused(llama, tmp_path):
    ids = padded_batch([5, 9])["input_ids"]
    for batch, message in (
        ({"input_ids": ids[0]}, r"input_ids: expected integers of shape \(batch, length\)"),
        ({"input_ids": ids[:0]}, "not empty"),
        ({"input_ids": ids.float()}, "expected integers"),
        ({"input_ids": ids, "attention_mask": torch.ones(2, 5)}, r"expected the shape of input_ids, \(2, 9\)"),
        ({"input_ids": ids + 100}, r"token 1\d\d is beyond the model's vocabulary of"),
        ({"input_ids": ids - 100}, r"token -\d+ is beyond the model's vocabulary of"),
    ):
        for measure in (neuron_impacts, lambda model, batch: perplexity(model, [batch])):
            with pytest.raises(ValueError, match=message):
                measure(llama, batch)
    nothing = {"input_ids": ids, "attention_mask": torch.tensor([[1] * 9, [0] * 9])}
    with pytest.raises(ValueError, match="a sentence of the batch is padding alone"):
        neuron_impacts(llama, nothing)
    assert perplexity(llama, [nothing]).sentence_tokens.tolist() == [8, 0]
    assert perplexity(llama, [{"input_ids": ids.to(torch.uint16)}]).num_tokens == 16
    for batch, message in (
        ({"input_ids": ids.tolist()}, "input_ids: expected a tensor, got list; .* return_tensors='pt'"),
        ({"input_ids": ids, "attention_mask": [1]}, "attention_mask: expected a tensor, got list"),
        ({"ids": ids, "mask": ids}, "expected a mapping with input_ids, got one with ids, mask"),
        ("sw", "expected a mapping with input_ids, got str"),
    ):
        with pytest.raises(TypeError, match=message):
            neuron_impacts(llama, batch)
        with pytest.raises(TypeError, match=message):
            detect_neurons(llama, {"a": [batch]}, verify=False, resume_dir=tmp_path)
        with pytest.raises(TypeError, match=message):
            detect_neurons(llama, {"a": [{"input_ids": ids}, batch]})
        with pytest.raises(TypeError, match=message):
            detect_neurons(llama, {"a": [batch], "b": [batch]}, method="lape")
    for given in ({"input_ids": ids}, {"sw": [{"input_ids": ids}]}):
        with pytest.raises(TypeError, match="batches: got a mapping"):
            perplexity(llama, given)
    with pytest.raises(TypeError, match="model: expected a model, such as .* got str"):
        detect_neurons("my/model", {"a": [{"input_ids": ids}]})
    for corpora, message in (
        ([{"input_ids": ids}], "expected batches by language, such as .*, got list"),
        ({"sw": {"input_ids": ids}}, "'sw' has one batch where several were expected"),
    ):
        for measure in (lambda given: detect_neurons(llama, given), DetectionCallback):
            with pytest.raises(TypeError, match=message):
                measure(corpora)
    short, long = (perplexity(llama, [{"input_ids": it}]) for it in (ids.int(), ids))
    assert short.value == long.value


def test_default_device_does_not_change_results(llama):
    """Scripts may set "cuda" as the default device; with "meta", any tensor made on the default device would show."""
    corpora = {language: [padded_batch([5, 9, 7], seed=seed)] for seed, language in enumerate("ab")}

    def measured():
        neurons = detect_neurons(llama, corpora, 0.2, 0.5, progress=False)
        score = language_agnostic_score(llama, neurons, corpora, control_seeds=[1])
        drawn = [neurons.shared.random_like(0, llama, it) for it in (None, neurons.mean_activations)]
        return neurons.related, drawn, score.to_json()

    expected = measured()
    torch.set_default_device("meta")
    try:
        assert measured() == expected
        assert NeuronSet({(0, "q"): [1]})[(0, "k")].tolist() == []
    finally:
        torch.set_default_device(None)


def test_invalid_options_are_refused(llama):
    for settings, message in (
        ({"top_ratio": 0}, "top_ratio"),
        ({"consistency": 1.5}, "consistency"),
        ({"exclusive": "all"}, "exclusive"),
        ({"min_languages": 3}, "min_languages"),
        ({"attention": "flash"}, "attention"),
        ({"projections": ["query"]}, "unknown projection 'query'"),
        ({"projections": "gate"}, r"projections: expected several names, such as \['gate'\]"),
        ({"projections": []}, "projections"),
    ):
        with pytest.raises(ValueError, match=message), forbidden(llama):
            detect_neurons(llama, corpora(), progress=False, **settings)
    with pytest.raises(UserError, match="'b' has no sentence"):
        detect_neurons(llama, corpora() | {"b": []}, progress=False)
    with pytest.raises(UserError, match="no language"):
        detect_neurons(llama, {})


def test_model_that_computes_nan_is_refused():
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3] = torch.nan
    with pytest.raises(UserError, match="layer 1 .* aren't finite"):
        detect_neurons(model, corpora(), verify=False, progress=False)


def test_warning_counts_layers_that_any_language_left_unpruned(llama, monkeypatch):
    """Whether one entry of a head is nearly all of its vector depends on the text."""
    languages = iter([[0], [1], []])
    warnings = []

    class Meter(counting.ImpactMeter):
        def __enter__(self):
            self.layers = next(languages)
            return super().__enter__()

        @property
        def unpruned(self):
            return [self.decoder.layers[index] for index in self.layers]

    monkeypatch.setattr(counting, "ImpactMeter", Meter)
    monkeypatch.setattr(detect.logger, "warning", warnings.append)
    detect_neurons(llama, {name: [padded_batch([5, 8])] for name in "abc"}, verify=False, progress=False)
    assert len(warnings) == 1 and "2 of 2 layers" in warnings[0]


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_nonfinite_impacts_are_refused_after_counting(value):
    counts = TopCounts(top_ratio=0.5)
    counts.add({(0, "q"): torch.tensor([[1.0, 2.0], [value, 3.0]])})
    with pytest.raises(UserError, match="layer 0 q aren't finite"):
        counts.consistent(1.0, {(0, "q"): 2})


def test_loaded_counts_continue_the_mean_activations(tmp_path):
    counts = TopCounts(0.5, "key")
    counts.add_activations({(0, "q"): torch.tensor([2.0, 4.0])}, torch.tensor(2))
    counts.save(tmp_path / "counts")
    again = TopCounts.load(tmp_path / "counts", 0.5, torch.device("cpu"), "key")
    again.add_activations({(0, "q"): torch.tensor([1.0, 2.0])}, torch.tensor(1))
    assert again.mean_activations()[(0, "q")].tolist() == [1.0, 2.0]


def test_numbers_of_numpy_can_be_saved(llama, tmp_path):
    options = dict(top_ratio=np.float32(0.25), consistency=torch.tensor(0.5), min_languages=np.int64(1))
    neurons = detect_neurons(llama, {"a": [padded_batch([5, 9])]}, **options, progress=False)
    neurons.save(tmp_path / "neurons")
    assert LanguageNeurons.load(tmp_path / "neurons").settings == neurons.settings


def test_numbers_of_numpy_are_those_of_python(llama, tmp_path):
    """0.53 of 100 neurons are 53, but float32's 0.53 is less."""
    corpora = {"a": [padded_batch([5, 9])]}
    settings = dict(top_ratio=np.float32(0.53), consistency=np.float32(0.5), memory_gb=np.float32(1))
    with pytest.raises(ValueError, match="memory_gb must be a number of at least 0, not nan"):
        detect_neurons(llama, corpora, **settings | {"memory_gb": np.nan})
    found = detect_neurons(llama, corpora, **settings, progress=False, resume_dir=tmp_path)
    assert found == detect_neurons(llama, corpora, float(np.float32(0.53)), 0.5, progress=False)


def test_nan_in_activations_is_refused():
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3] = torch.nan  # after the last attention
    corpora = {"a": [padded_batch([5, 9])]}
    assert len(
        detect_neurons(
            model, corpora, projections=["q", "k"], activations=False, consistency=0.5, progress=False
        ).shared
    )
    with pytest.raises(UserError, match=r"model\.name: activations at layer 1 down aren't finite"):
        detect_neurons(model, corpora, projections=["q", "k"], progress=False)


def test_empty_language_is_refused_before_any_is_measured(llama, monkeypatch):
    monkeypatch.setattr(detect, "count_top_neurons", None)
    with pytest.raises(UserError, match=r"corpus\.languages: 'b' has no sentence"):
        detect_neurons(llama, {"a": [padded_batch([5, 9])], "b": []}, verify=False, progress=False)
