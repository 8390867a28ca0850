"""The reference of the recipe keys agrees with the dataclasses."""

import sys

from agnostic_train.recipe_keys import recipe_keys


def test_reference_is_current(pytestconfig, monkeypatch):
    monkeypatch.syspath_prepend(pytestconfig.rootpath / "scripts")
    import recipe_reference

    text = recipe_reference.reference()
    assert recipe_reference.FILE.read_text() == text, "run python scripts/recipe_reference.py"
    for key in recipe_keys():
        assert text.count(f"| `{key}` |") == 1
    assert "| `training.strategy` |" in text and "shared+exclusive, related, random" in text and "| required |" in text
    sys.modules.pop("recipe_reference")
