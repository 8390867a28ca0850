"""Every language's perplexity with every set of neurons switched off: the paper's figure 4 as a table."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from agnostic_train.fingerprints import file_key, fingerprint
from agnostic_train.model.batches import Batch
from agnostic_train.model.weights import model_checksum
from agnostic_train.neurons.deactivation import deactivate
from agnostic_train.neurons.neuron_set import NeuronSet
from agnostic_train.processes import of_first_process, process_index
from agnostic_train.scores.perplexity import NonFiniteLossError, Perplexity, load_measured, perplexity, save_measured

NOTHING = "none"
"""The name of the row in which no neuron is off."""


@dataclass(frozen=True)
class Ablation:
    """Perplexities measured with sets of neurons switched off.

    Attributes:
        measured: by the set that was off (including `NOTHING`) and by language.
        num_neurons: by set, its number of neurons.
    """

    measured: dict[str, dict[str, Perplexity]]
    num_neurons: dict[str, int]

    @property
    def languages(self) -> list[str]:
        return list(self.measured[NOTHING])

    def perplexity(self, off: str, language: str, resamples: Tensor | None = None) -> Tensor | None:
        """Perplexities of a language with a set off, float64; None where that wasn't measured.

        Args:
            off: the set's name.
            resamples: (resamples, sentences), how often each sentence counts; each once by default.

        Returns: (resamples,), or a scalar without `resamples`.
        """
        result = self.measured.get(off, {}).get(language)
        if result is None:
            return None
        counts = torch.ones_like(result.sentence_nats, dtype=torch.float64) if resamples is None else resamples
        return (counts @ result.sentence_nats.double() / (counts @ result.sentence_tokens.double())).exp()

    def to_json(self) -> dict:
        """Converts to plain JSON values: per set its size, and per language perplexity and bits per byte."""
        return {
            off: {
                "neurons": self.num_neurons[off],
                "languages": {
                    language: {"perplexity": result.value, "bits_per_byte": result.bits_per_byte}
                    for language, result in row.items()
                },
            }
            for off, row in self.measured.items()
        }


def ablate(
    model: nn.Module,
    sets: Mapping[str, NeuronSet],
    batches: Mapping[str, Sequence[Batch]],
    languages: Mapping[str, Sequence[str]] | None = None,
    on_measured: Callable[[], object] = lambda: None,
    resume_dir: str | Path | None = None,
) -> Ablation:
    """Measures every language with every set off. Each set is switched off only once, and no weights are copied.

    Args:
        model: left as found.
        sets: by name; `NOTHING` is added, empty sets are left out.
        batches: per language, as for `perplexity`.
        languages: by set, the languages to measure if not all.
        on_measured: called after each language of each set.
        resume_dir: a folder that keeps each set's measurements. Those found there for the same weights, text and
            neurons aren't repeated.

    Raises:
        UserError: the neurons belong to another model.
        NonFiniteLossError: with some set off, the loss isn't finite.
    """
    rows: dict[str, dict[str, Perplexity]] = {}
    sets = {NOTHING: NeuronSet(), **{name: neurons for name, neurons in sets.items() if len(neurons)}}
    wanted = {name: (languages or {}).get(name, [*batches]) for name in sets}
    files = {} if resume_dir is None else _files(Path(resume_dir), model, sets, batches, wanted)
    # Measuring takes all processes, and each would look for a file at another time.
    kept = of_first_process([name for name, file in files.items() if file.exists()])
    for name, neurons in sets.items():
        if name in kept:
            rows[name] = load_measured(files[name])
            for _ in wanted[name]:
                on_measured()
            continue
        rows[name] = {}
        with deactivate(model, neurons):
            for language in wanted[name]:
                rows[name][language] = _perplexity(model, batches[language], name, language)
                on_measured()
        if name in files and process_index() == 0:
            save_measured(rows[name], files[name])
    return Ablation(rows, {name: len(neurons) for name, neurons in sets.items()})


def _files(
    directory: Path,
    model: nn.Module,
    sets: Mapping[str, NeuronSet],
    batches: Mapping[str, Sequence[Batch]],
    wanted: Mapping[str, Sequence[str]],
) -> dict[str, Path]:
    """The file of each set's measurements, named by the weights, text and neurons."""
    common = [model_checksum(model), {language: _text_of(it) for language, it in batches.items()}]
    files = {}
    for name, neurons in sets.items():
        off = [[*site, indices.tolist()] for site, indices in neurons.items()]
        files[name] = directory / f"{file_key([off, wanted[name], common])}.safetensors"
    return files


def _text_of(batches: Sequence[Batch]) -> str:
    """A fingerprint of everything that `perplexity` reads in a language's batches."""
    names = ("input_ids", "attention_mask", "num_bytes", "sentence_index")
    return fingerprint(
        [{it: torch.as_tensor(batch[it]).tolist() for it in names if batch.get(it) is not None} for batch in batches]
    )


def _perplexity(model: nn.Module, batches: Sequence[Batch], off: str, language: str) -> Perplexity:
    try:
        return perplexity(model, batches, name=f"text of {language!r}")
    except NonFiniteLossError:
        if off == NOTHING:
            raise
        raise NonFiniteLossError(
            f"model.dtype: with the {off} neurons off, the loss of {language!r} is NaN, infinite, or hundreds of nats "
            "a token; half precision may overflow, try float32"
        ) from None
