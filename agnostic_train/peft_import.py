"""Registers the neuron adapter with PEFT when PEFT is imported, and not before: importing PEFT takes seconds."""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_TUNER = "agnostic_train.training.compact"
"""The module that registers the adapter on import. What it imports from other folders must not import PEFT."""


class _PeftImport(MetaPathFinder):
    """Has the import of PEFT followed by that of the tuner; the modules themselves are found by the other finders."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "peft":
            return None
        others = [finder for finder in sys.meta_path if not isinstance(finder, _PeftImport)]
        spec = next((it for finder in others if (it := finder.find_spec(fullname, path, target))), None)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_both(module: ModuleType) -> None:
            load(module)
            importlib.import_module(_TUNER)

        # Set on the loader itself: code that asks a module for its loader, such as pkgutil, still gets the real one.
        spec.loader.exec_module = load_both  # type: ignore[method-assign]
        return spec


def register_with_peft() -> None:
    """Registers the tuner now if PEFT is already imported, and otherwise as soon as it is."""
    if "peft" in sys.modules:
        importlib.import_module(_TUNER)
    elif not any(isinstance(finder, _PeftImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PeftImport())
