"""Property tests: neuron sets behave like Python's sets, and damaged files of them are refused."""

import json

import pytest
import torch
from conftest import tiny_llama
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from agnostic_train.detection.top_counts import TopCounts
from agnostic_train.errors import UserError
from agnostic_train.model.decoder import PROJECTIONS, find_decoder
from agnostic_train.neurons.language_neurons import LanguageNeurons
from agnostic_train.neurons.neuron_set import NeuronSet

MODEL = tiny_llama()
SIZES = find_decoder(MODEL).sizes
SITES = st.sampled_from(sorted(SIZES))


@st.composite
def plain_sets(draw):
    """Draw a neuron set as a Python set of (layer, projection, index)."""
    sites = draw(st.lists(SITES, max_size=4))
    return {(*site, index) for site in sites for index in draw(st.sets(st.integers(0, SIZES[site] - 1), max_size=12))}


def built(plain, sized=True):
    sites = {}
    for layer, projection, index in plain:
        sites.setdefault((layer, projection), []).append(index)
    return NeuronSet(sites, SIZES if sized else None)


def plain_of(neurons):
    return {(*site, index) for site, indices in neurons.items() for index in indices.tolist()}


@given(plain_sets(), plain_sets(), st.booleans(), st.booleans())
def test_algebra_equals_that_of_python_sets(a, b, a_sized, b_sized):
    one, other = built(a, a_sized), built(b, b_sized)
    assert plain_of(one | other) == a | b
    assert plain_of(one & other) == a & b
    assert plain_of(one - other) == a - b
    assert len(one) == len(a) == sum(one.counts().values()) and (one == other) == (a == b)
    for combined in (one | other, one & other, one - other):
        assert combined.sizes == (SIZES if a_sized or b_sized else None)
        for _, indices in combined.items():
            assert indices.dtype == torch.int64 and (indices.diff() > 0).all() and len(indices)


@given(st.lists(plain_sets(), min_size=1, max_size=4), st.sampled_from(["complement", "unique"]), st.data())
def test_shared_and_exclusive_equal_their_definitions(sets, mode, data):
    least = data.draw(st.integers(1, len(sets)))
    neurons = LanguageNeurons.from_related({str(i): built(it) for i, it in enumerate(sets)}, mode, least)
    shared = {it for it in set().union(*sets) if sum(it in other for other in sets) >= least}
    assert plain_of(neurons.shared) == shared
    for i, own in enumerate(sets):
        others = set().union(*(it for j, it in enumerate(sets) if j != i))
        assert plain_of(neurons.exclusive[str(i)]) == own - (shared if mode == "complement" else others)


@settings(max_examples=40)
@given(plain_sets(), st.integers(0, 2**32), st.integers(0, 2**32))
def test_random_sets_match_each_site_and_move_units_together(plain, seed, other_seed):
    neurons = built(plain)
    drawn = neurons.random_like(seed, MODEL)
    assert {site: len(indices) for site, indices in drawn.items()} == {site: len(it) for site, it in neurons.items()}
    assert drawn == neurons.random_like(seed, MODEL)
    for layer in (0, 1):
        if torch.equal(neurons[(layer, "gate")], neurons[(layer, "down")]):
            assert torch.equal(drawn[(layer, "gate")], drawn[(layer, "down")])


@given(plain_sets(), st.booleans())
def test_save_and_load_round_trip(tmp_path, plain, sized):
    neurons = built(plain, sized)
    neurons.save(tmp_path / "it.safetensors")
    read = NeuronSet.load(tmp_path / "it.safetensors")
    assert read == neurons and read.sizes == neurons.sizes
    neurons.to_json(tmp_path / "it.json")
    assert NeuronSet.read(tmp_path / "it.json", MODEL) == neurons
    assert not list(tmp_path.glob(".*"))


@given(
    st.dictionaries(
        st.tuples(st.integers(-2, 2**70), st.sampled_from([*PROJECTIONS, "w"])),
        st.lists(st.integers(-(2**70), 2**70) | st.floats() | st.booleans() | st.text(max_size=2), max_size=3),
        max_size=3,
    )
)
@example({(0, "q"): [2**63]})
@example({(2**63, "q"): [1]})
def test_arbitrary_sites_give_a_valid_set_or_a_value_error(tmp_path, sites):
    try:
        neurons = NeuronSet(sites)
    except ValueError:
        return
    # A set that is accepted is valid: it can be saved and loaded.
    neurons.save(tmp_path / "it.safetensors")
    assert NeuronSet.load(tmp_path / "it.safetensors") == neurons


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return the bytes of a small neuron file in each format."""
    folder = tmp_path_factory.mktemp("saved")
    neurons = NeuronSet({(0, "q"): [1, 5, 9], (1, "down"): [0, 52]}, SIZES)
    neurons.save(folder / "it.safetensors")
    neurons.to_json(folder / "it.json")
    return {name: (folder / f"it.{name}").read_bytes() for name in ("safetensors", "json")}


@settings(max_examples=200)
@given(st.sampled_from(["safetensors", "json"]), st.data())
def test_damaged_files_give_a_valid_set_or_a_one_line_error(tmp_path, saved, ending, data):
    """Truncated, or with bytes changed, inserted or lost: a valid set or a `UserError`, never anything else."""
    content = bytearray(saved[ending])
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, max(0, len(content) - 1)))
        kind = data.draw(st.sampled_from(["cut", "flip", "insert", "drop"]))
        if kind == "cut":
            content = content[:place]
        elif kind == "flip" and content:
            content[place] ^= data.draw(st.integers(1, 255))
        elif kind == "insert":
            content[place:place] = data.draw(st.binary(max_size=9))
        else:
            content[place : place + data.draw(st.integers(1, 9))] = b""
    assume(bytes(content) != saved[ending])
    file = tmp_path / f"it.{ending}"
    file.write_bytes(content)
    assert_read_or_refused(file)


@settings(max_examples=150)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=3),
        lambda it: (
            st.lists(it, max_size=3)
            | st.dictionaries(
                st.sampled_from(["format", "neurons", "q", "fwd_up", "attn_k", "attn_v", "0", "1", "7", "-1"]), it
            )
        ),
        max_leaves=12,
    )
)
@example({"attn_k": {"-1": [0]}})
@example({"attn_k": {"0": [[1]]}})
@example({"attn_k": {"0": [-7]}})
@example({"attn_q": {"0": [2**70]}})
@example({"fwd_up": {str(2**70): [1]}})
@example({"fwd_up": {"0": [1.5]}})
@example({"fwd_up": {"0": [True]}})
@example({"fwd_up": {"9" * 5000: [1]}})
@example({"attn_v": {"0": 3}})
@example({"format": "agnostic_train.neurons"})
@example({"format": "agnostic_train.neurons", "neurons": []})
def test_any_json_gives_a_set_or_a_one_line_error(tmp_path, value):
    file = tmp_path / "it.json"
    file.write_text(json.dumps(value))
    assert_read_or_refused(file)


@pytest.mark.parametrize("content", ["[" * 100_000, "9" * 5000, '{"fwd_up": {"0": [' + "9" * 5000 + "]}}"])
def test_json_beyond_the_limits_of_python_is_refused(tmp_path, content):
    file = tmp_path / "it.json"
    file.write_text(content)
    with pytest.raises(UserError, match=r"it\.json: "):
        NeuronSet.read(file, MODEL)


def assert_read_or_refused(file):
    try:
        neurons = NeuronSet.read(file, MODEL)
    except UserError as error:
        assert str(file) in str(error) and "\n" not in str(error)
    else:
        neurons.check(MODEL)


@pytest.fixture(scope="module")
def saved_counts(tmp_path_factory):
    counts = TopCounts(0.5)
    counts.add({(0, "q"): torch.rand(3, 6)})
    file = tmp_path_factory.mktemp("counts") / "it"
    counts.save(file)
    return file.read_bytes()


@settings(max_examples=60)
@given(st.data())
def test_error_of_damaged_counts_names_the_file_and_the_fix(tmp_path, saved_counts, data):
    place = data.draw(st.integers(0, len(saved_counts) - 1))
    changed = data.draw(st.binary(max_size=3))
    file = tmp_path / "counts.safetensors"
    file.write_bytes(saved_counts[:place] + changed + saved_counts[place + data.draw(st.sampled_from([1, 9, 999])) :])
    try:
        TopCounts.load(file, 0.5, torch.device("cpu"))
    except UserError as error:
        assert str(file) in str(error) and "delete it" in str(error)


@settings(max_examples=60)
@given(st.data())
def test_error_of_a_damaged_summary_names_the_folder(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("neurons")
    LanguageNeurons.from_related({"en": built({(0, "q", 1)}), "sw": built({(0, "q", 2)})}).save(folder / "it")
    file = folder / "it/summary.json"
    value = json.loads(file.read_text())
    key = data.draw(st.sampled_from(sorted(value)))
    value[key] = data.draw(
        st.none() | st.integers() | st.text(max_size=2) | st.lists(st.integers() | st.text(), max_size=2)
    )
    file.write_text(json.dumps(value))
    try:
        neurons = LanguageNeurons.load(folder / "it")
    except UserError as error:
        assert str(folder) in str(error)
    else:
        assert set(neurons.related) <= {"en", "sw"}


def test_equal_sets_give_equal_files_and_version_1_is_readable(tmp_path):
    neurons = NeuronSet({(0, "q"): [1, 5]}, SIZES)
    contents = set()
    for _ in range(8):
        neurons.save(tmp_path / "it.safetensors")
        contents.add((tmp_path / "it.safetensors").read_bytes())
    assert len(contents) == 1
    metadata = {"format": "agnostic_train.neurons", "version": "1"}
    sizes = json.dumps({f"layers.{layer}.{name}": size for (layer, name), size in SIZES.items()})
    for old, expected in ((metadata, None), (metadata | {"sizes": sizes}, SIZES)):
        save_file({"layers.0.q": torch.tensor([1, 5])}, tmp_path / "old.safetensors", old)
        read = NeuronSet.load(tmp_path / "old.safetensors")
        assert read == neurons and read.sizes == expected
