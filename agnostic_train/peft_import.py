"""Tells PEFT of the neuron adapter as soon as it is imported, and not before: importing PEFT takes seconds."""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_TUNER = "agnostic_train.training.compact"
"""Registers its type when it is imported. Nothing that it imports outside its folder may import PEFT in turn."""


class _PeftImport(MetaPathFinder):
    """Finds nothing itself, but has PEFT's import followed by the tuner's."""

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

        # On the loader itself: what asks a module for its loader, such as pkgutil, still meets the real one.
        spec.loader.exec_module = load_both  # type: ignore[method-assign]
        return spec


def register_with_peft() -> None:
    """Registers the tuner at once if PEFT is there already, and otherwise when it comes."""
    if "peft" in sys.modules:
        importlib.import_module(_TUNER)
    elif not any(isinstance(finder, _PeftImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PeftImport())
