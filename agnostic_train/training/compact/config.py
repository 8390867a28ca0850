"""The configuration of a neuron adapter: which rows and columns are trained, and how many per module."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from peft import PeftConfig, PeftType, TaskType
from torch import Tensor, nn

from agnostic_train.errors import UserError
from agnostic_train.model.decoder import Site
from agnostic_train.model.reading import commit_of
from agnostic_train.neurons.neuron_set import NeuronSet
from agnostic_train.training.chosen import ChosenEntries, chosen_entries

_WITH_A_NEW_HEAD = (TaskType.SEQ_CLS, TaskType.TOKEN_CLS, TaskType.QUESTION_ANS)


@dataclass
class NeuronConfig(PeftConfig):
    """Configuration of an adapter that trains chosen rows and columns: `get_peft_model(model, NeuronConfig(...))`.

    The indices are saved with the weights. `rows` and `columns` suffice to allocate tensors of the right shapes, which
    `PeftModel.from_pretrained` and `load_adapter` then fill.

    Args:
        neurons: a `NeuronSet`, a mapping to build one from, or the path of a file that `NeuronSet.read` accepts. Not
            needed to load a saved adapter.
        rows, columns: number of chosen rows and columns of each module's weight, by module name; filled from `neurons`.
        revision: the commit of the hub repository that the base was loaded from; by default, what the base knows of
            it: models that transformers itself loads may not.
        Other arguments: as for `PeftConfig`.

    Raises:
        UserError: `task_type` is one for which PEFT trains a new head, too.
    """

    neurons: NeuronSet | Mapping[Site, Iterable[int] | Tensor] | str | Path | None = field(
        default=None, metadata={"help": "The neurons to train: a NeuronSet or its file. Not saved with the adapter."}
    )
    rows: dict[str, int] = field(
        default_factory=dict,
        metadata={"help": "Number of chosen rows of each module's weight; filled from `neurons`."},
    )
    columns: dict[str, int] = field(
        default_factory=dict,
        metadata={"help": "Number of chosen columns of each module's weight; filled from `neurons`."},
    )
    revision: str | None = field(
        default=None, metadata={"help": "The revision of the base's hub repository; filled from the base model."}
    )

    target_modules = None
    """Unused, but PEFT reads it from every config; here `rows` and `columns` name the modules."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.NEURON
        if self.task_type in _WITH_A_NEW_HEAD:
            raise UserError(
                f"task_type: {self.task_type} adds a head, which a neuron adapter would neither train nor save; use "
                "CAUSAL_LM"
            )

    def to_dict(self) -> dict:
        """Returns the content of `adapter_config.json`: all fields but `neurons`, which are saved with the weights."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "neurons"}

    def resolve(self, model: nn.Module) -> dict[str, ChosenEntries]:
        """Fills `rows` and `columns` from `neurons`, and `revision`; returns the chosen entries by module name.

        Returns an empty dict for the configuration of a saved adapter, which has no `neurons`.

        Raises:
            UserError: there are no neurons, they belong to another model, or the model is a `PeftModel` already.
            TypeError, ValueError: as in `NeuronSet.of`.
        """
        if self.neurons is None:
            if not self.rows and not self.columns:
                raise UserError("neurons: give NeuronConfig a NeuronSet, or the file of one")
            return {}
        self.neurons = NeuronSet.given(self.neurons, model)
        if not len(self.neurons):
            raise UserError("neurons: the set is empty, there is nothing to train")
        if self.revision is None:
            self.revision = commit_of(model)
        chosen = chosen_entries(model, self.neurons)
        if any(name.startswith("base_model.") for name in chosen):
            raise UserError(
                "model: it is a PeftModel already; use its add_adapter, or the model inside (get_base_model)"
            )
        self.rows = {name: len(entries.index) for name, entries in chosen.items() if entries.dim == 0}
        self.columns = {name: len(entries.index) for name, entries in chosen.items() if entries.dim == 1}
        return chosen
