"""Two processes give the sets and numbers of one, and an interrupted detection equals an uninterrupted one."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import padded_batch, tiny_llama
from launched import launched
from safetensors import safe_open

from agnostic_train.detection import counting
from agnostic_train.detection.detect import detect_neurons
from agnostic_train.export.checkpoint import export_checkpoint
from agnostic_train.files import write_json
from agnostic_train.fingerprints import fingerprint
from agnostic_train.neurons.language_neurons import LanguageNeurons
from agnostic_train.neurons.neuron_set import NeuronSet
from agnostic_train.scores import ablation
from agnostic_train.scores.emergence import Checkpoint, follow_checkpoints
from agnostic_train.scores.perplexity import perplexity


def corpora():
    """Return three batches for one language and one for the other, so that one of two processes has none."""
    sizes = {"a": ([5, 9, 3], [8], [4, 6]), "b": ([7, 7],)}
    return {
        language: [
            padded_batch(lengths, seed=index) | {"num_bytes": torch.tensor(lengths)}
            for index, lengths in enumerate(batches)
        ]
        for language, batches in sizes.items()
    }


def detect(model, **settings):
    return detect_neurons(model, corpora(), 0.2, 0.6, progress=False, **settings)


def measure(directory: Path):
    dist.init_process_group("gloo")
    model = tiny_llama()
    neurons = detect(model)
    lape = detect(model, method="lape", lape_ratio=0.2)
    result = perplexity(model, corpora()["a"])
    if dist.get_rank() == 1:
        neurons.save(directory / "neurons")
        lape.save(directory / "lape")
        torch.save((result.sentence_nats, result.sentence_tokens, result.num_bytes), directory / "perplexity.pt")


def resume_ablation(directory: Path):
    """The second process no longer finds the files, as if the first one had gone on and deleted them."""
    dist.init_process_group("gloo")
    model, sets = tiny_llama(), {"x": NeuronSet({(0, "up"): [1]})}
    whole = ablation.ablate(model, sets, corpora(), resume_dir=directory)
    if dist.get_rank() == 1:
        Path.exists = lambda path: False
    ablation.perplexity = None  # nothing is left to measure
    rows = [{"checkpoint": "a", "step": 1}]
    file = directory / f"{fingerprint('key')[:16]}.json"
    if dist.get_rank() == 0:
        write_json(file, rows[0])
    assert follow_checkpoints([Checkpoint("a", 1)], None, lambda it: "key", directory) == rows
    assert ablation.ablate(model, sets, corpora(), resume_dir=directory).to_json() == whole.to_json()


def test_processes_agree_on_what_an_interrupted_score_kept(tmp_path):
    launched(tmp_path, __file__, f"it.resume_ablation(it.Path({str(tmp_path / 'kept')!r}))")


def test_two_processes_give_the_results_of_one(tmp_path):
    launched(tmp_path, __file__, f"it.measure(it.Path({str(tmp_path)!r}))")
    model = tiny_llama()
    assert LanguageNeurons.load(tmp_path / "neurons") == detect(model)
    assert LanguageNeurons.load(tmp_path / "lape") == detect(model, method="lape", lape_ratio=0.2)
    nats, tokens, num_bytes = torch.load(tmp_path / "perplexity.pt", weights_only=True)
    result = perplexity(model, corpora()["a"])
    torch.testing.assert_close(nats, result.sentence_nats)
    assert torch.equal(tokens, result.sentence_tokens) and num_bytes == result.num_bytes


def export_on_each(directory: Path):
    dist.init_process_group("gloo")
    base, model = tiny_llama(), tiny_llama()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[1] += 1
    model.trained_neurons = NeuronSet({(0, "q"): [1]})
    check = export_checkpoint(model, directory, base=base)
    assert (check.status, check.chosen_moved) == ("identical", 1.0)


def test_first_process_exports(tmp_path):
    launched(tmp_path, __file__, f"it.export_on_each(it.Path({str(tmp_path / 'out')!r}))")
    assert (tmp_path / "out/model.safetensors").exists()


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_interrupted_detection_equals_an_uninterrupted_one(tmp_path, monkeypatch, stop_after):
    model = tiny_llama()
    whole = detect(model)
    original, measured = counting.ImpactMeter.measure, []

    def interrupted(self, batch):
        if sum(measured) == stop_after and len(self.projections) > 1:
            raise KeyboardInterrupt
        measured.append(len(self.projections) > 1)
        return original(self, batch)

    monkeypatch.setattr(counting.ImpactMeter, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        detect(model, resume_dir=tmp_path)
    measured.clear()
    monkeypatch.setattr(counting.ImpactMeter, "measure", lambda *args: (measured.append(1), original(*args))[1])
    assert detect(model, resume_dir=tmp_path, verify=False) == LanguageNeurons(
        whole.related, whole.shared, whole.exclusive, {**whole.settings, "verified": False}
    )
    assert len(measured) == 4 - stop_after


def test_interrupt_between_batches_keeps_the_counts(tmp_path):
    def batches(stop):
        yield from corpora()["a"][:2]
        if stop:
            raise KeyboardInterrupt
        yield from corpora()["a"][2:]

    model = tiny_llama()
    with pytest.raises(KeyboardInterrupt):
        detect_neurons(model, {"a": batches(True)}, verify=False, progress=False, resume_dir=tmp_path)
    (file,) = tmp_path.iterdir()
    with safe_open(file, "pt") as counts:
        assert counts.metadata()["num_batches"] == "2"
