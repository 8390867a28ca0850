"""Mean absolute activations, compared with a loop over sentences, and the random sets matched by them."""

import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import padded_batch, tiny_llama
from safetensors.torch import load_file, save_file

from agnostic_train.detection.detect import detect_neurons
from agnostic_train.errors import UserError
from agnostic_train.impact.hooks import ImpactMeter
from agnostic_train.model.decoder import find_decoder
from agnostic_train.model.inference import left_as_found
from agnostic_train.neurons import random_moves
from agnostic_train.neurons.activity import MEASURED
from agnostic_train.neurons.language_neurons import LanguageNeurons
from agnostic_train.neurons.neuron_set import NeuronSet
from agnostic_train.scores import agnostic_score
from agnostic_train.scores.agnostic_score import language_agnostic_score
from agnostic_train.scores.contrast import activation_ratio, random_contrast


def activations_by_definition(model, batches):
    """Compute (layer, projection) -> mean |activation| over real tokens, one sentence at a time without padding."""
    sums, num_tokens = {}, 0
    layer_modules = model.model.layers

    def keep(site, values):
        sums[site] = sums.get(site, 0) + values.detach()[0].abs().sum(0)

    handles = []
    for index, layer in enumerate(layer_modules):
        for name in "qkv":
            linear = getattr(layer.self_attn, f"{name}_proj")
            handles.append(linear.register_forward_hook(lambda m, a, out, site=(index, name): keep(site, out)))
        handles.append(
            layer.mlp.down_proj.register_forward_pre_hook(lambda m, a, site=(index, "down"): keep(site, a[0]))
        )
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            sentence = ids[mask.bool()]
            model(input_ids=sentence[None])
            num_tokens += len(sentence)
    for handle in handles:
        handle.remove()
    return {site: values / num_tokens for site, values in sums.items()}


@pytest.mark.parametrize("side", ["left", "right"])
def test_detection_measures_mean_absolute_activations(side, tmp_path):
    model = tiny_llama(attention_bias=True)
    corpora = {
        "a": [padded_batch([9, 3], side, seed=1), padded_batch([5], side, seed=2)],
        "b": [padded_batch([4, 12, 1], side, seed=3)],
    }
    neurons = detect_neurons(model, corpora, top_ratio=0.2, verify=False, progress=False)
    expected = {language: activations_by_definition(model, batches) for language, batches in corpora.items()}
    assert list(neurons.activations) == ["a", "b"]
    for language, by_site in neurons.activations.items():
        assert by_site.keys() == expected[language].keys() == neurons.mean_activations.keys()
        for site, values in by_site.items():
            assert values.dtype == torch.float32
            torch.testing.assert_close(values, expected[language][site], rtol=1e-5, atol=1e-6)
    for site, values in neurons.mean_activations.items():
        torch.testing.assert_close(values, (expected["a"][site] + expected["b"][site]) / 2, rtol=1e-5, atol=1e-6)
    neurons.save(tmp_path / "neurons")
    loaded = LanguageNeurons.load(tmp_path / "neurons").activations
    assert loaded.keys() == neurons.activations.keys()
    for language, by_site in neurons.activations.items():
        assert loaded[language].keys() == by_site.keys()
        assert all(torch.equal(loaded[language][site], values) for site, values in by_site.items())
    without = detect_neurons(model, corpora, top_ratio=0.2, verify=False, progress=False, activations=False)
    assert without == neurons and without.activations is None and without.mean_activations is None


def test_broken_activations_file_is_refused_in_one_line(llama, tmp_path):
    corpora = {name: [padded_batch([5, 8], seed=seed)] for seed, name in enumerate(["a", "b.c"])}
    neurons = detect_neurons(llama, corpora, top_ratio=0.2, verify=False, progress=False)
    neurons.save(tmp_path)
    file = tmp_path / "activations.safetensors"
    whole, tensors = file.read_bytes(), load_file(file)
    assert "b.c/0/q" in tensors and LanguageNeurons.load(tmp_path).activations.keys() == corpora.keys()

    def refuses(message):
        with pytest.raises(UserError, match=rf"activations\.safetensors: .*{message}.*detect again") as caught:
            LanguageNeurons.load(tmp_path)
        assert "\n" not in str(caught.value)

    file.write_bytes(whole[:-7])
    refuses("not readable")
    for wrong, message in (
        ({"layers.0.q": tensors["a/0/q"]}, "not the activations of a, b.c"),  # the format of an earlier version
        ({"d/0/q": tensors["a/0/q"]}, "not the activations of a, b.c"),
        ({key: it for key, it in tensors.items() if not key.startswith("a/")}, "missing"),
        ({key: it for key, it in tensors.items() if key != "b.c/1/down"}, "missing"),
        ({key: it for key, it in tensors.items() if not key.endswith("/1/down")}, "missing"),
        (tensors | {"a/0/q": tensors["a/0/q"][1:].clone()}, "of another model"),
    ):
        save_file(wrong, file)
        refuses(message)


def test_special_tokens_do_not_count(llama):
    batch = padded_batch([6, 6])
    special = torch.zeros_like(batch["input_ids"])
    special[:, 0] = 1
    corpora = {"a": [batch | {"special_tokens_mask": special}]}
    without_special = detect_neurons(llama, corpora, top_ratio=0.2, verify=False, progress=False)
    everything = detect_neurons(llama, {"a": [batch]}, top_ratio=0.2, verify=False, progress=False)
    assert not torch.allclose(without_special.activations["a"][(0, "q")], everything.activations["a"][(0, "q")])


def a_set(model):
    sites = {(0, "gate"): [1, 2], (0, "up"): [2, 30], (0, "down"): [30], (1, "v"): [3, 11], (1, "o"): [3, 13, 45]}
    return NeuronSet({**sites, (1, "q"): range(0, 30, 5), (0, "k"): [19]}, find_decoder(model).sizes)


def test_matched_sets_are_outside_the_set_and_near_in_activation(llama, monkeypatch):
    monkeypatch.setattr("agnostic_train.neurons.random_moves.NUM_NEAREST", 3)
    neurons = a_set(llama)
    generator = torch.Generator().manual_seed(3)
    activations = {
        (layer.index, name): torch.rand(layer.projections[name].num_neurons, generator=generator)
        for layer in find_decoder(llama).layers
        for name in ("q", "k", "v", "down")
    }
    draws = [neurons.random_like(seed, llama, activations) for seed in range(40)]
    assert draws[0] == neurons.random_like(0, llama, activations) and any(it != draws[0] for it in draws)
    assert neurons.random_like(np.int64(3), llama) == neurons.random_like(3, llama)
    for others in ({}, {site: values[:-1] for site, values in activations.items()}):
        with pytest.raises(UserError, match="activations: not those of layer 0"):
            neurons.random_like(0, llama, others)
    for drawn in draws:
        assert {site: len(it) for site, it in drawn.items()} == {site: len(it) for site, it in neurons.items()}
        # Hidden units move as units: units that projections share stay shared, and none is in the original set.
        units = set().union(*(drawn[(0, name)].tolist() for name in ("gate", "up", "down")))
        assert len(units) == 3 and not units & {1, 2, 30}
        assert len(set(drawn[(0, "gate")].tolist()) & set(drawn[(0, "up")].tolist())) == 1
        assert set(drawn[(0, "down")].tolist()) <= set(drawn[(0, "up")].tolist())
        # Columns 3 and 13 of o read channel 3 of v, column 45 (query head 4) channel 15; all move to new channels.
        read = {column // 30 * 10 + column % 10 for column in drawn[(1, "o")].tolist()}
        assert len(read) == 2 or len(read) == 3
        channels = {3, 11, 15}
        assert not set(drawn[(1, "v")].tolist()) & channels and not read & channels
        k = drawn[(0, "k")].item()
        ranks = (activations[(0, "k")] - activations[(0, "k")][19]).abs().argsort().tolist()
        assert 1 <= ranks.index(k) <= 3
    # The distance of unmatched random sets is several times as large.
    site = (1, "q")

    def distance(drawn):
        return (
            (activations[site][drawn[site]].sort().values - activations[site][neurons[site]].sort().values).abs().mean()
        )

    matched = sum(distance(it) for it in draws) / 40
    free = sum(distance(neurons.random_like(seed, llama)) for seed in range(40)) / 40
    assert matched < free / 2


def test_set_of_most_neurons_still_has_a_matched_set(llama):
    most = NeuronSet({(0, "up"): range(50), (0, "q"): range(60)}, find_decoder(llama).sizes)
    activations = {site: torch.rand(size) for site, size in find_decoder(llama).sizes.items()}
    drawn = most.random_like(1, llama, activations)
    assert drawn.counts() == most.counts() and drawn != most


def test_matched_sets_avoid_excluded_neurons_while_others_are_left(llama):
    sizes = find_decoder(llama).sizes
    members = NeuronSet({(0, "q"): [0, 1], (1, "o"): [3], (1, "up"): [5]}, sizes)
    # Of the q rows, two are left: they are taken, though the excluded ones are nearest in activation.
    excluded = NeuronSet({(0, "q"): range(2, 58), (1, "v"): range(4, 20), (1, "gate"): range(6, 53)}, sizes)
    activations = {site: torch.arange(size).float() for site, size in sizes.items()}
    for seed in range(20):
        drawn = members.random_like(seed, llama, activations, excluded)
        assert drawn[(0, "q")].tolist() == [58, 59]
        assert drawn[(1, "o")].item() // 30 * 10 + drawn[(1, "o")].item() % 10 < 3
        assert drawn[(1, "up")].item() < 5
    # One q row is left for two members: excluded ones are used, too, but still no member.
    most = NeuronSet({(0, "q"): range(2, 59)}, sizes)
    drawn = members.random_like(0, llama, activations, most)[(0, "q")]
    assert len(drawn) == 2 and drawn.min() > 1
    with pytest.raises(UserError, match="neurons"):
        members.random_like(0, llama, activations, NeuronSet({(9, "q"): [0]}))


def test_matched_controls_of_a_score_hold_no_detected_neuron(llama):
    corpora = {name: [padded_batch([9, 12, 7], seed=seed)] for seed, name in enumerate("ab")}
    neurons = detect_neurons(
        llama, corpora, top_ratio=0.1, consistency=0.6, verify=False, progress=False, activations=True
    )
    detected = neurons.related["a"] | neurons.related["b"]
    assert len(neurons.shared) and len(neurons.exclusive["a"])
    drawn = [random_contrast(neurons, seed, llama, "matched") for seed in range(5)]
    assert not any(detected & chosen for contrast in drawn for chosen in contrast.sets.values())
    # Without the rule some would be drawn.
    own = neurons.activations["a"]
    assert any(detected & neurons.exclusive["a"].random_like(seed, llama, own) for seed in range(5))


def active(activations, site, index):
    """Return a neuron's mean |activation|: its hidden unit's for gate, up and down, the channel's it reads for o."""
    layer, name = site
    if name == "o":
        return float(activations[(layer, "v")][index // 30 * 10 + index % 10])
    return float(activations[(layer, {"gate": "down", "up": "down"}.get(name, name))][index])


def test_matched_controls_are_as_active_as_their_set_in_its_language(llama, monkeypatch):
    """An exclusive set is matched in its own language, not in others; the score reports the activation ratio."""
    sizes = find_decoder(llama).sizes
    generator = torch.Generator().manual_seed(5)
    own = NeuronSet({(0, "q"): range(0, 60, 6), (1, "up"): range(0, 53, 6), (1, "v"): [3, 6], (1, "o"): [32]}, sizes)
    shared = NeuronSet({(0, "down"): range(1, 53, 7), (0, "k"): [2, 7]}, sizes)
    neurons = LanguageNeurons.from_related({"a": own | shared, "b": shared})

    def some(size, language):
        # Every third neuron is active in a, the others in b: over both languages, all are equally active.
        third = torch.arange(size) % 3 == 0
        return torch.rand(size, generator=generator) + 3 * (third if language == "a" else ~third)

    neurons.activations = {
        language: {(layer, name): some(sizes[(layer, name)], language) for layer in (0, 1) for name in MEASURED}
        for language in "ab"
    }
    sets, original = {}, agnostic_score.ablate

    def watched(model, named, *rest):
        sets.update(named)
        return original(model, named, *rest)

    monkeypatch.setattr(agnostic_score, "ablate", watched)
    corpora = {name: [padded_batch([9, 12, 7])] for name in "ab"}
    score = language_agnostic_score(llama, neurons, corpora, control_seeds=[1, 2], num_resamples=0).to_json()
    for kind in ("matched", "random"):
        ratios = score["controls"][kind]["activation_ratio"]
        assert ratios["exclusive"]["b"] == {}
        for name, members, judged, ratio in (
            ("shared", shared, neurons.mean_activations, ratios["shared"]),
            ("exclusive a", own, neurons.activations["a"], ratios["exclusive"]["a"]),
        ):
            expected = {}
            for drawn in (sets[f"{kind} {seed} {name}"] for seed in (1, 2)):
                for site, indices in members.items():
                    sums = [sum(active(judged, site, it) for it in of[site].tolist()) for of in (drawn, members)]
                    for projection in (site[1], "all"):
                        expected.setdefault(projection, []).extend([sums[0] / sums[1]] * len(indices))
            assert ratio == pytest.approx({name: sum(it) / len(it) for name, it in expected.items()}, rel=1e-6)
            if kind == "matched":
                # There is a neuron of similar activation for each neuron.
                assert all(abs(it - 1) < 0.1 for it in ratio.values()), ratio


def test_sites_without_activation_have_no_ratio(llama):
    layers = find_decoder(llama).layers
    members = NeuronSet({(0, "q"): [0, 1], (1, "q"): [2]})
    control = NeuronSet({(0, "q"): [4, 5], (1, "q"): [6]})
    activations = {(0, "q"): torch.zeros(60), (1, "q"): torch.arange(60.0)}
    assert activation_ratio(members, [control], layers, activations) == {"q": 3.0, "all": 3.0}
    assert activation_ratio(members, [], layers, activations) == {}


def test_score_with_matched_controls_resumes_where_it_was_interrupted(llama, tmp_path, monkeypatch):
    corpora = {name: [padded_batch([9, 12, 7], seed=seed)] for seed, name in enumerate("ab")}
    neurons = detect_neurons(llama, corpora, top_ratio=0.3, consistency=0.6, verify=False, progress=False)
    whole = language_agnostic_score(llama, neurons, corpora, control_seeds=[1, 2])
    assert whole.controls["matched"].scores.keys() == whole.controls["random"].scores.keys() == {1, 2}
    matched, free = (whole.ablation.measured[f"{kind} 1 shared"]["a"].nats for kind in ("matched", "random"))
    assert matched != free
    drawn = neurons.shared.random_like(1, llama, neurons.mean_activations)
    assert whole.ablation.num_neurons["matched 1 shared"] == len(drawn) == len(neurons.shared)

    from agnostic_train.scores import ablation

    original, calls = ablation.perplexity, []

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return original(*args, **options)

    monkeypatch.setattr(ablation, "perplexity", interrupted)
    with pytest.raises(KeyboardInterrupt):
        language_agnostic_score(llama, neurons, corpora, control_seeds=[1, 2], resume_dir=tmp_path)
    calls[:] = [1] * 9
    continued = language_agnostic_score(llama, neurons, corpora, control_seeds=[1, 2], resume_dir=tmp_path)
    num_passes = 2 * 4 + 4 * (2 + 2)
    assert len(calls) == 9 + num_passes - 8 and continued.to_json() == whole.to_json()
    # Which results are kept is decided before any is measured, so equal sets may share a file.
    twice = ablation.ablate(
        llama, {"one": neurons.shared, "other": neurons.shared}, corpora, resume_dir=tmp_path / "twice"
    )
    assert len(list((tmp_path / "twice").iterdir())) == 2 and list(twice.measured) == ["none", "one", "other"]
    # With other weights, text or neurons, no kept result is reused.
    for model, neurons_given, text in (
        (tiny_llama(initializer_range=0.2), neurons, corpora),
        (llama, neurons, corpora | {"a": [padded_batch([9, 12, 7], seed=7)]}),
        (
            llama,
            replace(neurons, exclusive=dict(zip("ab", list(neurons.exclusive.values())[::-1], strict=True))),
            corpora,
        ),
    ):
        resumed, expected = (
            language_agnostic_score(model, neurons_given, text, control_seeds=[], resume_dir=it)
            for it in (tmp_path, None)
        )
        assert resumed.to_json() == expected.to_json() != whole.to_json()


def nearest_free_by_definition(activation, members, excluded, generator):
    """Draw each member's counterpart after comparing it with every free neuron."""
    activation = activation.double()
    others = set(range(len(activation)))
    for closed in (members, excluded):
        left = others - set(closed.tolist())
        others = left if len(left) >= len(members) else others
    free = torch.tensor([index in others for index in range(len(activation))])
    move = torch.arange(len(activation))
    for member in members[torch.randperm(len(members), generator=generator)].tolist():
        candidates = free.nonzero().flatten()
        nearest = (activation[candidates] - activation[member]).abs().argsort(stable=True)[: random_moves.NUM_NEAREST]
        choice = candidates[nearest[torch.randint(len(nearest), (), generator=generator)]]
        move[member] = choice
        free[choice] = False
    return move


@pytest.mark.parametrize("num_nearest", [1, 2, 5])
@pytest.mark.parametrize("num_levels", [1, 4, 10**6])
def test_nearest_free_equals_a_comparison_with_all(monkeypatch, num_nearest, num_levels):
    """The same seed gives the same draws; few levels give many ties, which go to the lower index."""
    monkeypatch.setattr("agnostic_train.neurons.random_moves.NUM_NEAREST", num_nearest)
    for seed, (size, count) in enumerate([(1, 1), (2, 1), (42, 6), (123, 61), (123, 62), (123, 123), (50, 0)]):
        generator = torch.Generator().manual_seed(seed)
        activation = torch.randint(num_levels, (size,), generator=generator) / num_levels
        # The set holds mostly the most active neurons.
        members = activation.argsort(descending=True)[: size // 2 + count // 2][-count:] if count else torch.arange(0)
        members = members.sort().values
        for num_excluded in (0, size // 3, size - 1):
            excluded = torch.randperm(size, generator=generator)[:num_excluded]
            actual, expected = (
                draw(activation, members, excluded, torch.Generator().manual_seed(seed))
                for draw in (random_moves._nearest_free, nearest_free_by_definition)
            )
            assert torch.equal(actual, expected)


def test_drawing_is_fast_at_the_size_of_a_large_model():
    generator = torch.Generator().manual_seed(0)
    activation, members = torch.rand(14336, generator=generator), torch.arange(0, 14336, 20)
    start = time.process_time()
    random_moves._nearest_free(activation, members, members, generator)
    assert time.process_time() - start < 0.2  # a sort for every member takes most of a second


def test_measuring_leaves_the_forward_pass_as_it_is(llama):
    """Tokens that don't count are zeroed in copies, not in the model's own activations."""
    batch = padded_batch([9, 12])
    special = torch.zeros_like(batch["input_ids"])
    special[:, 2] = 1
    expected = llama(**batch, output_hidden_states=True).hidden_states
    with left_as_found(llama), ImpactMeter(llama, activations=True) as meter:
        seen = []
        hook = llama.model.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
        meter.measure(batch | {"special_tokens_mask": special})
        hook.remove()
    real = batch["attention_mask"].bool()
    last = llama.model.norm(seen[0])[real]
    torch.testing.assert_close(last, expected[-1][real], rtol=1e-4, atol=1e-5)
