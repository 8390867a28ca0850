"""Set algebra, matched random sets, and files that load as they were saved."""

import json
import operator
from dataclasses import replace

import pytest
import torch
from conftest import tiny_llama
from peft import get_peft_model
from safetensors.torch import save_file

from agnostic_train.errors import UserError
from agnostic_train.model.decoder import Rotation, find_decoder
from agnostic_train.neurons.deactivation import deactivate
from agnostic_train.neurons.language_neurons import LanguageNeurons
from agnostic_train.neurons.neuron_set import NeuronSet
from agnostic_train.scores.perplexity import Perplexity
from agnostic_train.training.compact import NeuronConfig, adapter_neurons

A = NeuronSet({(0, "q"): [5, 1, 1], (1, "down"): [7]})
B = NeuronSet({(0, "q"): [5, 9], (2, "v"): torch.tensor([0])})


def test_indices_are_sorted_unique_int64_and_missing_sites_are_empty():
    assert A[(0, "q")].tolist() == [1, 5] and A[(0, "q")].dtype == torch.int64
    assert A[(7, "k")].shape == (0,) and A[(7, "k")].dtype == torch.int64
    assert len(A) == 3 and A.counts()["down"] == 1 and A.counts()["gate"] == 0


def test_union_intersection_difference_and_equality():
    assert NeuronSet({(0, "q"): [1, 5, 9], (1, "down"): [7], (2, "v"): [0]}) == A | B
    assert NeuronSet({(0, "q"): [5]}) == A & B
    assert NeuronSet({(0, "q"): [1], (1, "down"): [7]}) == A - B
    assert A != B and NeuronSet({(1, "down"): [7], (0, "q"): [1, 5], (3, "k"): []}) == A


@pytest.mark.parametrize(
    "sites",
    [{(0, "query"): [1]}, {(0, "q"): [-1]}, {(-1, "q"): [1]}, {"q": [1]}, {(0.5, "q"): [1]}, {(0, "q"): "12"}]
    + [{(0, "q"): [1.5]}, {(0, "q"): torch.tensor([True, False])}, {(0, "q"): torch.zeros(2, 2, dtype=torch.int64)}],
)
def test_invalid_sites_and_indices_are_refused(sites):
    with pytest.raises(ValueError):
        NeuronSet(sites)


def test_error_names_the_shape_of_indices_that_are_not_a_list():
    with pytest.raises(ValueError, match="layer 0 q: expected a list of indices, got shape \\(2, 3\\) of torch.int64"):
        NeuronSet({(0, "q"): torch.zeros(2, 3, dtype=torch.int64)})
    with pytest.raises(ValueError, match="got shape \\(\\) of torch.int64"):
        NeuronSet({(0, "q"): torch.tensor(1)})


def test_changing_given_or_returned_tensors_does_not_change_the_set():
    given = torch.tensor([1, 5])
    neurons = NeuronSet({(0, "q"): given})
    given[0] = neurons[(0, "q")][0] = 7
    for _, indices in neurons.items():
        indices[0] = 7
    NeuronSet()[(0, "q")].resize_(1)
    assert neurons == NeuronSet({(0, "q"): [1, 5]}) and not len(NeuronSet()[(0, "q")])


@pytest.mark.parametrize("operation", [operator.or_, operator.and_, operator.sub])
def test_operators_refuse_other_types(operation):
    for other in (None, {(0, "q"): [1]}):
        with pytest.raises(TypeError, match="unsupported operand"):
            operation(A, other)


def test_mapping_is_accepted_in_place_of_a_set(llama):
    before = {name: it.clone() for name, it in llama.state_dict().items()}
    with deactivate(llama, {(0, "q"): [1, 5]}):
        rows = llama.state_dict()["model.layers.0.self_attn.q_proj.weight"]
        assert not rows[[1, 5]].any() and rows[0].any()
    assert all(torch.equal(it, before[name]) for name, it in llama.state_dict().items())
    adapted = get_peft_model(llama, NeuronConfig(neurons={(0, "q"): [1, 5]}))
    assert adapter_neurons(adapted) == NeuronSet({(0, "q"): [1, 5]})


def test_dataclasses_with_tensors_compare_by_identity(llama):
    measured = Perplexity(torch.ones(2), torch.ones(2), None)
    projection = replace(find_decoder(llama).layers[0].projections["q"], rows=torch.arange(4))
    rotation = Rotation(None, torch.arange(4))
    for value in (measured, projection, rotation):
        assert value == value and value != replace(value) and len({value, replace(value)}) == 2


def test_sets_of_different_models_cannot_be_combined():
    with pytest.raises(ValueError, match="different shapes"):
        NeuronSet({}, {(0, "q"): 4}) | NeuronSet({}, {(0, "q"): 8})
    with pytest.raises(ValueError, match="has 4 neurons"):
        NeuronSet({(0, "q"): [4]}, {(0, "q"): 4})


def test_save_and_load_round_trip(tmp_path, llama):
    sized = NeuronSet({(0, "q"): [1, 5], (1, "down"): [7]}, find_decoder(llama).sizes)
    for neurons in (A, sized, NeuronSet({})):
        neurons.save(tmp_path / "set.safetensors")
        loaded = NeuronSet.load(tmp_path / "set.safetensors")
        assert loaded == neurons and loaded.sizes == neurons.sizes
        neurons.to_json(tmp_path / "set.json")
        assert NeuronSet.from_json(tmp_path / "set.json", llama) == neurons
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")] == []


def test_published_sets_map_query_heads_to_the_kv_heads_that_serve_them(tmp_path, llama):
    """Six query heads of size 10 on two KV heads: channel 34 is channel 4 of head 3, which KV head 1 serves: row 14."""
    content = {"fwd_up": {"0": [3, 2]}, "fwd_down": {"1": [52]}, "attn_q": {"0": [59]}, "attn_o": {"0": [41]}}
    content |= {"attn_k": {"0": [4, 14, 34, 59]}, "attn_v": {"1": [0, 30]}}
    (tmp_path / "published.json").write_text(json.dumps(content))
    assert NeuronSet.from_json(tmp_path / "published.json", llama) == NeuronSet(
        {(0, "up"): [2, 3], (1, "down"): [52], (0, "q"): [59], (0, "o"): [41], (0, "k"): [4, 14, 19], (1, "v"): [0, 10]}
    )


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", '{"fwd_upp": {}}', '{"fwd_up": []}', '{"fwd_up": {"a": [1]}}', '{"fwd_up": {"0": [99]}}']
    + ['{"attn_k": {"0": [true]}}', '{"fwd_up": {"0": [1], "00": [2]}}']
    + ['{"attn_k": {"0": [60]}}', '{"fwd_up": {"9": [0]}}', '{"fwd_up": {"0": ["x"]}}', '{"attn_k": {"9": [0]}}'],
)
def test_error_of_broken_json_names_the_file(tmp_path, llama, content):
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(UserError, match=r"bad\.json"):
        NeuronSet.from_json(tmp_path / "bad.json", llama)


def test_error_of_a_broken_neuron_file_names_the_file(tmp_path):
    file = tmp_path / "bad.safetensors"
    with pytest.raises(UserError, match="no such neuron file"):
        NeuronSet.load(file)
    for write in (
        lambda: file.write_bytes(b"garbage"),
        lambda: save_file({"x": torch.zeros(1)}, file),
        lambda: save_file({"x": torch.zeros(1)}, file, {"format": "agnostic_train.neurons"}),
        lambda: save_file({"layers.0.q": torch.zeros(1)}, file, {"format": "agnostic_train.neurons", "sizes": "["}),
    ):
        write()
        with pytest.raises(UserError, match=r"bad\.safetensors"):
            NeuronSet.load(file)


def test_neurons_of_another_model_are_refused(llama):
    with pytest.raises(UserError, match=r"set\.st: neuron 53 at layer 0 up, where this model has 53"):
        NeuronSet({(0, "up"): [53]}).check(llama, "set.st")
    other = NeuronSet({(0, "q"): [1]}, find_decoder(tiny_llama(intermediate_size=64)).sizes)
    with pytest.raises(UserError, match="64 neurons at layer 0 gate, this model has 53"):
        other.check(llama)


def test_random_sets_match_each_site_and_keep_units_together(llama):
    units, channels = [3, 11, 40], [2, 13]
    columns = [2, 22, 33]  # query heads 0 and 2 read channel (0, 2), query head 3 reads channel (1, 3)
    neurons = NeuronSet(
        {(0, name): units for name in ("gate", "up", "down")}
        | {(0, "v"): channels, (0, "o"): columns, (1, "q"): range(17), (1, "k"): [0]}
    )
    drawn = [neurons.random_like(seed, llama) for seed in range(20)]
    for random_set in drawn:
        assert {site: len(indices) for site, indices in random_set.items()} == {
            site: len(indices) for site, indices in neurons.items()
        }
        assert torch.equal(random_set[(0, "gate")], random_set[(0, "up")]) and torch.equal(
            random_set[(0, "up")], random_set[(0, "down")]
        )
        served = {int(column) // 30 * 10 + int(column) % 10 for column in random_set[(0, "o")]}
        assert served == set(random_set[(0, "v")].tolist())
    assert neurons.random_like(3, llama) == drawn[3] and drawn[3] != drawn[4]
    assert len(torch.cat([random_set[(0, "up")] for random_set in drawn]).unique()) > 30


def test_language_neurons_equal_their_definition_and_load_as_saved(tmp_path):
    related = {
        "a": NeuronSet({(0, "q"): [0, 1, 2]}),
        "b": NeuronSet({(0, "q"): [0, 1, 3]}),
        "c": NeuronSet({(0, "q"): [0, 4]}),
    }
    complement = LanguageNeurons.from_related(related)
    assert complement.shared == NeuronSet({(0, "q"): [0]})
    assert complement.exclusive["a"] == NeuronSet({(0, "q"): [1, 2]})
    unique = LanguageNeurons.from_related(related, "unique", min_languages=2)
    assert unique.shared == NeuronSet({(0, "q"): [0, 1]}) and unique.exclusive["a"] == NeuronSet({(0, "q"): [2]})
    assert unique.shared_ratio == {"a": 2 / 3, "b": 2 / 3, "c": 1 / 2}
    unique.save(tmp_path / "neurons")
    unique.save(tmp_path / "neurons")
    assert LanguageNeurons.load(tmp_path / "neurons") == unique
    names = {path.name for path in (tmp_path / "neurons").iterdir()}
    assert names == {"summary.json", "shared.safetensors"} | {
        f"{kind}.{language}.safetensors" for kind in ("related", "exclusive") for language in "abc"
    }
    assert json.loads((tmp_path / "neurons/summary.json").read_text())["settings"]["exclusive"] == "unique"
    (tmp_path / "neurons/related.b.safetensors").unlink()
    with pytest.raises(UserError, match=r"related\.b"):
        LanguageNeurons.load(tmp_path / "neurons")


def test_error_names_the_projection_that_a_model_lacks():
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj = torch.nn.Identity()
    with pytest.raises(UserError, match="layer 1 has no nn.Linear called up_proj"):
        find_decoder(model)


def test_iterating_gives_the_nonempty_sites_in_order():
    neurons = NeuronSet({(1, "q"): [3], (0, "up"): [1, 2], (0, "v"): []})
    assert list(neurons) == [(0, "up"), (1, "q")]
    assert (0, "up") in neurons and (0, "v") not in neurons and "up" not in neurons


def test_errors_name_what_cannot_become_a_set():
    for value, message in (
        ([(0, "q")], r"or \{\(layer, projection\): indices\}, got list"),
        (LanguageNeurons.from_related({"a": NeuronSet()}), r"a NeuronSet, such as \.shared .*, got LanguageNeurons"),
    ):
        with pytest.raises(TypeError, match=message):
            NeuronSet.of(value)
    with pytest.raises(TypeError, match=r"expected \{\(layer, projection\): indices\}, got list"):
        NeuronSet([(0, "q")])
    with pytest.raises(ValueError, match=r"a site is \(layer, projection\), such as \(0, 'q'\), not 'q'"):
        A["q"]


def test_language_names_that_cannot_be_file_names_are_refused():
    LanguageNeurons.from_related({"Swiss German": A})
    for name in ("zh/Hans", ""):
        with pytest.raises(ValueError, match=f"languages: {name!r} can't be part of a file's name"):
            LanguageNeurons.from_related({name: A, "en": A})


def test_min_languages_out_of_range_is_refused():
    related = {"a": NeuronSet({(0, "q"): [1]}), "b": NeuronSet({(0, "q"): [1, 2]})}
    for number in (-1, 0, 3):
        with pytest.raises(ValueError, match="min_languages must be from 1 to the number of languages, 2"):
            LanguageNeurons.from_related(related, min_languages=number)


def test_random_columns_of_o_come_from_all_query_heads(llama):
    drawn = [NeuronSet({(0, "o"): [2]}).random_like(seed, llama) for seed in range(40)]
    assert {int(it[(0, "o")]) // 10 for it in drawn} == set(range(6))


def test_swapped_files_are_refused(tmp_path):
    related = {"a": NeuronSet({(0, "q"): [1]}), "b": NeuronSet({(0, "q"): [1, 2]})}
    LanguageNeurons.from_related(related).save(tmp_path)
    (tmp_path / "related.a.safetensors").write_bytes((tmp_path / "related.b.safetensors").read_bytes())
    with pytest.raises(UserError, match="related.a.safetensors: not the set that summary.json describes"):
        LanguageNeurons.load(tmp_path)


def test_summary_counts_each_set(tmp_path):
    neurons = LanguageNeurons.from_related({"a": NeuronSet({(0, "q"): [0, 1, 2]}), "b": NeuronSet({(0, "q"): [0]})})
    neurons.save(tmp_path / "neurons")
    counts = json.loads((tmp_path / "neurons/summary.json").read_text())["counts"]
    assert counts["shared"]["q"] == 1 and counts["related"]["a"]["q"] == 3 and counts["exclusive"]["a"]["q"] == 2
