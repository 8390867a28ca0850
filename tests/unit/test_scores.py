"""Deactivation, perplexity and the language-agnostic score, compared with computation by hand."""

import copy
import math
import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from conftest import padded_batch, tiny_llama
from transformers import LlamaForSequenceClassification

from agnostic_train.detection.lape import firing_rates
from agnostic_train.errors import UserError
from agnostic_train.files import write_json
from agnostic_train.model import batches as batches_module
from agnostic_train.model.decoder import find_decoder
from agnostic_train.neurons.deactivation import deactivate
from agnostic_train.neurons.language_neurons import LanguageNeurons
from agnostic_train.neurons.neuron_set import NeuronSet
from agnostic_train.pipeline.stages import score as score_stage
from agnostic_train.quickstart.tiny_model import build_tokenizer
from agnostic_train.report.tables import score_table
from agnostic_train.scores import ablation, bootstrap
from agnostic_train.scores.ablation import Ablation
from agnostic_train.scores.agnostic_score import language_agnostic_score, score_contrasts
from agnostic_train.scores.bootstrap import interval
from agnostic_train.scores.contrast import Contrast
from agnostic_train.scores.perplexity import NonFiniteLossError, Perplexity, knows_beginning, perplexity
from agnostic_train.scores.result import AgnosticScore, LanguageScore
from agnostic_train.training.strategy import Strategy

EVERY_PROJECTION = NeuronSet({(1, name): [0, 3] for name in ("q", "k", "v", "o", "gate", "up", "down")})


def bits(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_deactivation_zeroes_the_defined_weights_and_restores_them():
    model = tiny_llama(attention_bias=True, mlp_bias=True)
    before = bits(model)
    with pytest.raises(RuntimeError, match="inside"), deactivate(model, EVERY_PROJECTION):
        layer = model.model.layers[1]
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            assert not linear.weight[[0, 3]].any() and not linear.bias[[0, 3]].any() and linear.weight[1].all()
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            assert not linear.weight[:, [0, 3]].any() and linear.bias.all() and linear.weight[:, 1].all()
        assert torch.is_grad_enabled()
        with deactivate(model, NeuronSet({(1, "q"): [3, 4]})):
            assert not layer.self_attn.q_proj.weight[4].any()
        assert not layer.self_attn.q_proj.weight[3].any() and layer.self_attn.q_proj.weight[4].all()
        raise RuntimeError("inside")
    assert all(torch.equal(value, before[name]) for name, value in bits(model).items())


def test_refused_deactivation_changes_nothing(llama):
    before = bits(llama)
    with pytest.raises(UserError), deactivate(llama, NeuronSet({(0, "q"): [0], (1, "up"): [99]})):
        pass
    assert all(torch.equal(value, before[name]) for name, value in bits(llama).items())


@pytest.mark.parametrize("side", ["right", "left"])
def test_perplexity_scores_each_token_once(llama, side):
    lengths = [1, 2, 7, 11]
    batch = padded_batch(lengths, side) | {"num_bytes": torch.tensor([3, 5, 20, 31])}
    nats = []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        sentence = ids[mask.bool()]
        with torch.no_grad():
            log_probs = llama(input_ids=sentence[None]).logits[0].log_softmax(-1)
        nats.append(-sum(float(log_probs[i, sentence[i + 1]]) for i in range(len(sentence) - 1)))
    halves = [{name: value[part] for name, value in batch.items()} for part in (slice(0, 2), slice(2, 4))]
    for batches in ([batch], halves):
        result = perplexity(llama, iter(batches))
        assert result.num_tokens == 0 + 1 + 6 + 10
        assert result.nats == pytest.approx(sum(nats), rel=1e-5)
        assert result.value == pytest.approx(math.exp(sum(nats) / 17), rel=1e-5)
        assert result.bits_per_byte == pytest.approx(sum(nats) / math.log(2) / 59, rel=1e-5)
        assert result.sentence_nats.tolist() == pytest.approx(nats, rel=1e-5)


def test_perplexity_without_bytes_or_tokens(llama):
    assert perplexity(llama, [padded_batch([4])]).bits_per_byte is None
    mixed = [padded_batch([4]) | {"num_bytes": torch.tensor([9])}, padded_batch([4])]
    assert perplexity(llama, mixed).bits_per_byte is None
    with pytest.raises(UserError, match="no token to score"):
        perplexity(llama, [padded_batch([1, 1])])
    with pytest.raises(UserError, match="no token to score"):
        perplexity(llama, [])


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_perplexity_of_an_offloaded_model(llama, device):
    batches = [padded_batch([7, 4]), padded_batch([5])]
    expected = perplexity(llama, batches)
    offloaded = cpu_offload(copy.deepcopy(llama), execution_device=device)
    assert all(parameter.is_meta for parameter in offloaded.parameters())
    torch.testing.assert_close(perplexity(offloaded, batches).sentence_nats, expected.sentence_nats)


def test_perplexity_of_a_model_placed_by_device_map(llama, tmp_path):
    """The embeddings are on disk, the rest in memory: accelerate's hooks use the module names of the map."""
    batches = [padded_batch([7, 4])]
    places = {name: "cpu" for name, _ in llama.named_children()} | {"model.embed_tokens": "disk"}
    places |= {f"model.{name}": "cpu" for name, _ in llama.model.named_children() if name != "embed_tokens"}
    del places["model"]
    placed = dispatch_model(copy.deepcopy(llama), places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert placed.get_input_embeddings().weight.is_meta
    torch.testing.assert_close(perplexity(placed, batches).sentence_nats, perplexity(llama, batches).sentence_nats)


def test_sentence_results_are_in_the_order_of_sentence_index(llama):
    batch = padded_batch([5, 9, 7])
    places = torch.tensor([2, 0, 1])
    shuffled = [{name: it[places] for name, it in batch.items()} | {"sentence_index": places}]
    expected, reordered = perplexity(llama, [batch]), perplexity(llama, shuffled)
    torch.testing.assert_close(reordered.sentence_nats, expected.sentence_nats)
    assert reordered.sentence_tokens.tolist() == [4, 8, 6]


def test_perplexity_too_large_for_a_float_is_refused(llama):
    with torch.no_grad():
        llama.lm_head.weight.mul_(1e4)
    with pytest.raises(UserError, match="hundreds of nats a token"):
        perplexity(llama, [padded_batch([4])])


@pytest.mark.parametrize("name", ["num_bytes", "sentence_index"])
def test_perplexity_requires_one_number_per_sentence(llama, name):
    for numbers in (torch.tensor([1]), torch.tensor(3), [1, 2, 3]):
        with pytest.raises(ValueError, match=f"{name}: expected one for each of 2 sentences"):
            perplexity(llama, [padded_batch([4, 6]) | {name: numbers}])


def test_perplexity_refuses_nan(llama):
    with torch.no_grad():
        llama.lm_head.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="its loss is NaN, infinite, or hundreds of nats"):
        perplexity(llama, [padded_batch([4])])


def ablation_of(before, shared, exclusive):
    """Return the ablation of one language of one token: its perplexities, None for a set that is empty."""
    perplexities = {"none": before, "shared": shared, "exclusive a": exclusive}
    sizes = {"none": 0, "shared": 2, "exclusive a": 8}
    measured = {
        name: {"a": Perplexity(torch.tensor([math.log(it)], dtype=torch.float64), torch.tensor([1]), None)}
        for name, it in perplexities.items()
        if it is not None
    }
    return Ablation(measured, {name: sizes[name] for name in measured})


def score_of(*perplexities):
    (score,) = score_contrasts(ablation_of(*perplexities), [Contrast(NeuronSet(), {})], 0).values()
    return score


@pytest.mark.parametrize(
    ("shared", "exclusive", "importance", "clipped"),
    [(14, 12, 2, ()), (9, 12, 5e-7, ("shared",)), (14, 10, 4e6, ("exclusive",)), (14, None, None, ())],
)
def test_importance_by_hand(shared, exclusive, importance, clipped):
    """Perplexity 10; 14 without shared, 12 without exclusive: importance 2. With 9 (clipped) and 12: 1e-6 / 2."""
    score = score_of(10, shared, exclusive)
    (row,) = score.table
    assert (row.perplexity, row.change_shared) == pytest.approx((10, shared - 10)) and row.clipped == clipped
    assert row.change_exclusive == (exclusive and pytest.approx(exclusive - 10))
    assert (row.num_shared, row.num_exclusive) == (2, 8 if exclusive else 0)
    assert row.importance == (importance and pytest.approx(importance))
    assert score.value == (importance and pytest.approx(math.log1p(importance)))


def language_neurons():
    related = {
        "a": NeuronSet({(0, "up"): range(12), (0, "v"): [1]}),
        "b": NeuronSet({(0, "up"): range(6, 20)}),
        "c": NeuronSet({(0, "up"): range(6, 12)}),
    }
    return LanguageNeurons.from_related(related)


def test_score_equals_that_of_deactivated_models(llama):
    neurons = language_neurons()
    corpora = {name: [padded_batch([9, 12, 7], seed=seed)] for seed, name in enumerate("abc")}
    before = bits(llama)
    score = language_agnostic_score(llama, neurons, {n: iter(it) for n, it in corpora.items()}, control_seeds=[1, 2])
    assert all(torch.equal(value, before[name]) for name, value in bits(llama).items())
    logs = []
    for name in "ab":
        changes = []
        for off in (neurons.shared, neurons.exclusive[name]):
            with deactivate(llama, off):
                changed = perplexity(llama, corpora[name]).value
            changes.append(max(changed - perplexity(llama, corpora[name]).value, 1e-6))
        assert score.importance[name] == pytest.approx(changes[0] / changes[1], rel=1e-4)
        logs.append(math.log(1 + score.importance[name]))
    assert score.importance["c"] is None and score.undefined == ["c"]
    assert score.value == pytest.approx(sum(logs) / 2)
    controls = score.controls["random"].scores
    assert set(controls) == {1, 2} and controls[1].value != score.value
    assert score.to_json()["importance"] == score.importance
    assert score.to_json()["controls"]["random"]["scores"].keys() == {"1", "2"}
    # Without the measurements of every sentence.
    assert len(repr(score)) < 2000


def test_score_of_a_single_set_is_refused(llama):
    with pytest.raises(TypeError, match="neurons: give the LanguageNeurons of a detection, not a NeuronSet"):
        language_agnostic_score(llama, EVERY_PROJECTION, {"a": [padded_batch([9])]})


def test_score_loads_as_it_was_saved(llama, tmp_path):
    corpora = {name: [padded_batch([9, 12, 7])] for name in "abc"}
    score = language_agnostic_score(llama, language_neurons(), corpora, control_seeds=[1])
    write_json(tmp_path / "score.json", score.to_json())
    loaded = AgnosticScore.load(tmp_path / "score.json")
    assert (loaded.value, loaded.table) == (score.value, score.table)
    assert copy.deepcopy(score) == score
    for broken in ({}, [], {"value": 1, "table": [{}]}):
        write_json(tmp_path / "score.json", broken)
        with pytest.raises(UserError, match=r"score\.json"):
            AgnosticScore.load(tmp_path / "score.json")


def test_each_deactivated_set_is_measured_on_each_language(llama):
    detected, corpora = (
        language_neurons(),
        {name: [padded_batch([9, 12, 7], seed=seed)] for seed, name in enumerate("abc")},
    )
    rows = language_agnostic_score(llama, detected, corpora, control_seeds=[5]).to_json()["ablation"]
    sets = {"none": NeuronSet(), "shared": detected.shared, "random 5 shared": detected.shared.random_like(5, llama)}
    sets |= {f"exclusive {name}": detected.exclusive[name] for name in "ab"}
    random = {f"random 5 exclusive {name}": detected.exclusive[name].random_like(5, llama) for name in "ab"}
    assert rows.keys() == sets.keys() | random.keys()
    for off, neurons in (sets | random).items():
        languages = off[-1] if off in random else "abc"
        assert rows[off]["neurons"] == len(neurons) and "".join(rows[off]["languages"]) == languages
        for language in languages:
            with deactivate(llama, neurons):
                expected = perplexity(llama, corpora[language]).value
            assert rows[off]["languages"][language]["perplexity"] == expected


def test_error_names_the_set_whose_deactivation_breaks_the_model(llama, monkeypatch):
    neurons = language_neurons()
    (layer, projection), indices = next(iter(neurons.shared.items()))
    weight = find_decoder(llama).projection((layer, projection)).linear.weight

    def overflowing(model, batches, **options):
        rows = weight[:, indices] if projection in ("o", "down") else weight[indices]
        if not rows.any():
            raise NonFiniteLossError("its loss is NaN")
        return perplexity(model, batches, **options)

    monkeypatch.setattr(ablation, "perplexity", overflowing)
    corpora = {name: [padded_batch([9, 12])] for name in "abc"}
    with pytest.raises(NonFiniteLossError, match="model.dtype: with the shared neurons off, the loss of 'a' is NaN"):
        language_agnostic_score(llama, neurons, corpora)


def test_models_that_predict_no_tokens_are_refused(llama):
    batch = padded_batch([9, 5])
    for model, error, words in (
        ("my/model", TypeError, "expected a model, such as AutoModelForCausalLM.from_pretrained gives, got str"),
        (llama.model, UserError, "a LlamaModel doesn't predict tokens; load it as AutoModelForCausalLM"),
        (LlamaForSequenceClassification(llama.config), UserError, "doesn't predict tokens"),
        (torch.nn.DataParallel(llama), UserError, "it is inside a DataParallel"),
    ):
        with pytest.raises(error, match=words):
            perplexity(model, [batch])


def test_many_sentences_are_resampled_in_chunks(llama, monkeypatch):
    """Each resample is a draw of its own, and there are as many of them."""
    neurons, corpora = language_neurons(), {name: [padded_batch([9, 12, 7, 3])] for name in "abc"}
    counts, original = [], bootstrap.resample_counts
    monkeypatch.setattr(bootstrap, "_MAX_COUNTS", 4 * 16)
    monkeypatch.setattr(bootstrap, "resample_counts", lambda *args: counts.append(original(*args)) or counts[-1])
    score = language_agnostic_score(llama, neurons, corpora, num_resamples=40, control_seeds=[])
    assert [len(it) for it in counts] == [16, 16, 8] * 3 and not torch.equal(counts[0], counts[1])
    assert all(row.interval[0] <= row.importance <= row.interval[1] for row in score.table if not row.clipped)


def test_variants_and_intervals_equal_brute_force(llama):
    """A resample is a list of sentences: the score is recomputed for each from sums over its sentences."""
    neurons, corpora = (
        language_neurons(),
        {name: [padded_batch([9, 12, 7, 3], seed=seed)] for seed, name in enumerate("abc")},
    )
    score = language_agnostic_score(llama, neurons, corpora, num_resamples=40)
    draws = {}
    for seed, name in enumerate("abc"):
        draws[name] = torch.randint(4, (40, 4), generator=torch.Generator().manual_seed(seed)).tolist()

    def importance(language, sentences, change):
        values = []
        for off in (NeuronSet(), neurons.shared, neurons.exclusive[language]):
            with deactivate(llama, off):
                result = perplexity(llama, corpora[language])
            nats = sum(float(result.sentence_nats[it]) for it in sentences)
            values.append(math.exp(nats / sum(int(result.sentence_tokens[it]) for it in sentences)))
        return change(values[1], values[0], len(neurons.shared)) / change(
            values[2], values[0], len(neurons.exclusive[language])
        )

    # Changes are clipped as changes of perplexity, before the variant's transformation.
    def by_log(after, before, size):
        return math.log1p(max(after - before, 1e-6) / before)

    def by_neuron(after, before, size):
        return max(after - before, 1e-6) / size

    for name, change in (("per_neuron", by_neuron), ("log_perplexity", by_log)):
        variant = score.variants[name]
        values = {language: importance(language, range(4), change) for language in "ab"}
        assert {it: variant.importance[it] for it in "ab"} == pytest.approx(values, rel=1e-6)
        assert variant.value == pytest.approx(sum(map(math.log1p, values.values())) / 2, rel=1e-6)
        drawn = {language: [importance(language, draw, change) for draw in draws[language]] for language in "ab"}
        for language in "ab":
            expected = np.quantile(drawn[language], [0.025, 0.975])
            assert variant.intervals[language] == pytest.approx(expected, rel=1e-6)
        means = [(math.log1p(a) + math.log1p(b)) / 2 for a, b in zip(*drawn.values(), strict=True)]
        assert variant.interval == pytest.approx(np.quantile(means, [0.025, 0.975]), rel=1e-6)
        assert variant.importance["c"] is None and variant.intervals["c"] is None
    resampled = {
        name: [importance(name, draw, lambda after, before, size: max(after - before, 1e-6)) for draw in draws[name]]
        for name in "ab"
    }
    for row in score.table[:2]:
        assert row.interval == pytest.approx(np.quantile(resampled[row.language], [0.025, 0.975]), rel=1e-6)
    means = [(math.log1p(a) + math.log1p(b)) / 2 for a, b in zip(*resampled.values(), strict=True)]
    assert score.interval == pytest.approx(np.quantile(means, [0.025, 0.975]), rel=1e-6)
    assert score.table[2].interval is None
    score = language_agnostic_score(llama, neurons, corpora, control_seeds=[5], num_resamples=40).to_json()
    control = score["controls"]["random"]["scores"]["5"]
    assert control["interval"] and None not in [control["importance_intervals"][it] for it in "ab"]
    assert all(it["intervals"]["a"] for it in control["variants"].values())
    assert language_agnostic_score(llama, neurons, corpora, num_resamples=0).interval is None


def test_variants_clip_changes_of_perplexity():
    """A change from 1000 to 1000.0005 isn't clipped, although that of the logarithm, 5e-7, is below 1e-6."""
    score = score_of(1000, 1000.0005, 1001)
    expected = math.log1p(5e-7) / math.log1p(1e-3)
    assert score.variants["log_perplexity"].importance["a"] == pytest.approx(expected, rel=1e-6)
    assert score.variants["per_neuron"].importance["a"] == pytest.approx(5e-4 * 8 / 2, rel=1e-6)
    assert not score.clipped
    score = score_of(1000, 900, 1001)
    assert score.variants["log_perplexity"].importance["a"] == pytest.approx(1e-9 / math.log1p(1e-3), rel=1e-6)
    assert score.clipped == ["a"] and score.to_json()["variants"]["per_neuron"]["importance"]["a"] < 1


def test_resample_counts_of_one_language_are_kept_at_a_time(llama, monkeypatch):
    original, references = bootstrap.resample_counts, []

    def watched(*args):
        assert all(it() is None for it in references)
        counts = original(*args)
        references.append(weakref.ref(counts))
        return counts

    monkeypatch.setattr(bootstrap, "resample_counts", watched)
    corpora = {name: [padded_batch([9, 12, 7], seed=seed)] for seed, name in enumerate("abc")}
    language_agnostic_score(llama, language_neurons(), corpora, control_seeds=[1], num_resamples=10)
    assert len(references) == 3


def test_table_separates_importances_and_scores(llama):
    corpora = {name: [padded_batch([9, 12, 7, 5], seed=seed)] for seed, name in enumerate("abc")}
    score = language_agnostic_score(llama, language_neurons(), corpora, control_seeds=[5], num_resamples=40).to_json()
    table = score_table(score)
    assert {tuple(row) for row in table} == {tuple(table[0])}
    rows = {(row["sets"], row["seed"], row["language"]): row for row in table}
    assert len(rows) == len(table) == 2 * 3 * 4
    for (kind, seed, language), row in rows.items():
        clipped = (score["controls"]["random"]["scores"][seed] if seed else score)["clipped"]
        assert row["clipped"] == (bool(clipped) if language == "all" else language in clipped)
        if language == "all":
            others = [rows[kind, seed, it]["score"] for it in "ab"]
            assert row["importance"] is None and row["score"] == pytest.approx(sum(others) / 2)
            assert row["score_low"] <= row["score_high"]
        elif language == "c":
            assert row["importance"] is row["score"] is row["score_low"] is row["importance_low"] is None
        else:
            for ending in ("", "_low", "_high"):
                assert row[f"score{ending}"] == pytest.approx(math.log1p(row[f"importance{ending}"]))
    assert rows["detected", None, "a"]["importance"] == score["importance"]["a"]
    assert rows["detected, per_neuron", None, "all"]["score"] == score["variants"]["per_neuron"]["value"]
    assert [rows["random", "5", "a"][f"importance_{end}"] for end in ("low", "high")] == list(
        score["controls"]["random"]["scores"]["5"]["importance_intervals"]["a"]
    )


def test_score_without_a_defined_importance_is_none(llama):
    neurons = LanguageNeurons.from_related({"a": NeuronSet({(0, "up"): [1]}), "b": NeuronSet({(0, "up"): [2]})})
    score = language_agnostic_score(llama, neurons, {name: [padded_batch([5])] for name in "ab"})
    assert score.value is None and score.undefined == ["a", "b"]
    with pytest.raises(ValueError, match="no corpus for b"):
        language_agnostic_score(llama, neurons, {"a": [padded_batch([5])]})


def test_strategies_choose_the_sets_they_are_named_after(llama):
    neurons = language_neurons()

    def chosen(name, score=None, **settings):
        value = AgnosticScore(score, [])
        return Strategy(name, languages=settings.pop("languages", ["a"]), **settings).choose(neurons, value, llama)

    assert chosen("shared").neurons == neurons.shared
    assert chosen("exclusive").neurons == neurons.exclusive["a"]
    assert chosen("related").neurons == neurons.related["a"]
    assert chosen("exclusive", languages=["a", "b"]).neurons == neurons.exclusive["a"] | neurons.exclusive["b"]
    assert chosen("shared+exclusive", languages=["b"]).neurons == neurons.shared | neurons.exclusive["b"]
    random = chosen("random", random_like="exclusive", seed=5)
    assert random.neurons.counts() == neurons.exclusive["a"].counts() and random.neurons != neurons.exclusive["a"]
    assert chosen("auto", 0.5, high=2.0).strategy == "shared+exclusive"
    assert chosen("auto", 1.0, high=2.0).strategy == "shared"
    assert chosen("auto", 2.5, high=2.0).strategy == "exclusive" and "2.500" in chosen("auto", 2.5, high=2.0).reason
    for wrong, message in (
        (lambda: chosen("auto", None, high=2.0), "defined language-agnostic score"),
        (lambda: chosen("auto", 1.0), r"training\.high"),
        (lambda: chosen("auto", 1.0, high=0.1), "below training.low"),
        (lambda: chosen("best"), r"training\.strategy"),
        (lambda: chosen("random", random_like="auto"), r"training\.random_like"),
        (lambda: chosen("shared", languages=["d"]), r"training\.languages"),
        (lambda: chosen("exclusive", languages=["c"]), "no neuron to train; lower detection.consistency or raise"),
    ):
        with pytest.raises(UserError, match=message):
            wrong()
    by_lape = replace(neurons, settings=neurons.settings | {"method": "lape"})
    with pytest.raises(UserError, match="no neuron to train; raise detection.lape_ratio, or train 'related'"):
        Strategy("exclusive", ["c"]).choose(by_lape, None, llama)


def test_auto_names_clipped_languages_and_refuses_an_entirely_clipped_score(llama):
    neurons = language_neurons()
    measured = LanguageScore("a", 10.0, 3, 4, 4.0, 2.0, 2.0)
    clipped = LanguageScore("b", 10.0, 3, 4, 0.5, 0.0, 5e5, ("exclusive",))
    undefined = LanguageScore("c", 10.0, 3, 0, -1.0, None, None, ("shared",))  # clipped too, but not part of the mean

    def choose(value, *rows):
        return Strategy("auto", languages=["a"], high=2.0).choose(neurons, AgnosticScore(value, list(rows)), llama)

    assert "(" not in choose(1.0, measured).reason
    reason = choose(1.0, measured, clipped, undefined).reason
    assert reason.startswith("score 1.000 (clipped in b; undefined in c) is between")
    for rows in ([clipped], [clipped, undefined]):
        with pytest.raises(UserError, match=r"training\.strategy: .* clipped in b: "):
            choose(13.1, *rows)


def test_languages_as_a_string_are_refused():
    with pytest.raises(UserError, match=r"training.languages: expected a list of languages, such as \['sw'\]"):
        Strategy("shared", languages="sw")


@pytest.mark.parametrize("measure", ["perplexity", "lape"])
def test_no_device_synchronisation_per_batch(llama, monkeypatch, measure):
    """Results are fetched once per call instead of once per batch, because a fetch waits for the device."""
    fetches = []
    # It reads inputs before they are on the device.
    monkeypatch.setattr(batches_module, "check_tokens", lambda *args: None)
    for name in ("cpu", "item", "tolist", "__int__", "__float__"):  # not __bool__, by which transformers checks masks
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *rest, it=original, name=name: fetches.append(name) or it(self, *rest)
        )

    def count(num_batches):
        del fetches[:]
        batches = [padded_batch([5, 8, 3 + index], seed=index) for index in range(num_batches)]
        if measure == "perplexity":
            perplexity(llama, batches)
        else:
            with torch.no_grad():
                firing_rates(llama, batches, "a", progress=False)
        return len(fetches)

    few, many = count(1), count(6)
    assert many == few


def test_half_precision_logits_are_scored_in_float32():
    model = tiny_llama().bfloat16()
    batch = padded_batch([9, 12, 7])
    with torch.no_grad():
        logits = model(**batch).logits.float()
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].mT, batch["input_ids"][:, 1:], reduction="none")
    expected = (losses * batch["attention_mask"][:, 1:]).sum(1)
    torch.testing.assert_close(perplexity(model, [batch]).sentence_nats.float(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["attention_mask", "num_bytes", "sentence_index"])
def test_kept_results_of_other_text_are_not_reused(llama, tmp_path, name):
    batch = padded_batch([9, 12]) | {"num_bytes": torch.tensor([9, 12]), "sentence_index": torch.tensor([0, 1])}
    other = batch | {name: batch[name].flip(0) * (3 if name == "num_bytes" else 1)}
    if name == "attention_mask":
        other[name] = batch[name].clone()
        other[name][1, 6:] = 0
    for batch_measured in (batch, other):
        resumed = ablation.ablate(llama, {}, {"a": [batch_measured]}, resume_dir=tmp_path).measured["none"]["a"]
        fresh = perplexity(llama, [batch_measured])
        assert resumed.num_bytes == fresh.num_bytes and torch.equal(resumed.sentence_nats, fresh.sentence_nats)


def test_kept_results_of_another_config_are_not_reused(tmp_path):
    """The same weights give other results."""
    nats = []
    for eps in (1e-6, 0.5):
        result = ablation.ablate(tiny_llama(rms_norm_eps=eps), {}, {"a": [padded_batch([9])]}, resume_dir=tmp_path)
        nats.append(result.measured["none"]["a"].nats)
    assert nats[0] != nats[1]


def test_kept_results_of_another_site_are_not_reused(llama, tmp_path):
    nats = []
    for site in ((0, "up"), (1, "up")):
        result = ablation.ablate(llama, {"x": NeuronSet({site: [1]})}, {"a": [padded_batch([9])]}, resume_dir=tmp_path)
        nats.append(result.measured["x"]["a"].nats)
    assert nats[0] != nats[1]


def test_interval_leaves_out_nan_resamples():
    assert interval(torch.tensor([1.0, torch.nan, 3.0], dtype=torch.float64), 0.5) == (1.5, 2.5)


def test_auto_thresholds_are_inclusive_for_shared(llama):
    neurons = LanguageNeurons.from_related({"a": NeuronSet({(0, "up"): [1, 2]}), "b": NeuronSet({(0, "up"): [1, 3]})})
    for value in (0.5, 2.0):
        assert Strategy("auto", low=0.5, high=2.0).choose(neurons, AgnosticScore(value, []), llama).strategy == "shared"


def test_model_knows_the_beginning_of_sentences_if_it_predicts_what_follows(llama):
    batch = padded_batch([9, 5, 1])
    with torch.no_grad():
        target = int(batch["input_ids"][0, 1])
        batch["input_ids"][:2, 1] = target
        for logit, known in ((20.0, True), (-20.0, False)):
            model = tiny_llama()
            head = model.lm_head.weight
            states = model.model(**batch).last_hidden_state[:2, 0]
            head.zero_()
            # One direction raises or lowers the right token after the first one.
            head[target] = logit * torch.linalg.pinv(states).sum(1)
            assert knows_beginning(model, [batch]) is known
    assert knows_beginning(llama, []) and knows_beginning(llama, [padded_batch([1, 1])])


@pytest.mark.parametrize("knows", [True, False])
@pytest.mark.parametrize("perplexity_of_all, says", [(20.0, True), (400.0, False)])
def test_unknown_beginning_is_reported_of_a_model_that_has_learnt(monkeypatch, knows, perplexity_of_all, says):
    said, batch, tokenizer = [], padded_batch([5, 3]), build_tokenizer(["abc"], vocab_size=280)
    tokenizer.bos_token = tokenizer.eos_token
    batch["input_ids"][:, 0] = tokenizer.bos_token_id
    monkeypatch.setattr(score_stage, "knows_beginning", lambda *_: knows)
    materials = SimpleNamespace(tokenizer=tokenizer, validation_batches={"en": [batch]}, model=None)
    context = SimpleNamespace(materials=materials, say=said.append)
    result = SimpleNamespace(table=[SimpleNamespace(perplexity=perplexity_of_all)])
    score_stage._hint_at_unknown_beginning(context, result)
    assert len(said) == (says and not knows)
    batch["input_ids"][0, 0] = tokenizer.bos_token_id + 1  # a sentence that begins with a word
    score_stage._hint_at_unknown_beginning(context, result)
    assert len(said) == (says and not knows)
