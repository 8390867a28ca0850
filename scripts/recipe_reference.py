"""Writes recipes/REFERENCE.md, the list of all recipe keys, from the dataclasses that define them.

A test checks that the file is current.
"""

import argparse
from pathlib import Path

from agnostic_train.recipe_keys import SECTIONS, key_table

HEAD = """# Every key of a recipe

Written by `python scripts/recipe_reference.py` from `agnostic_train/recipe.py`: don't edit it here. In a YAML file a
key belongs in its section; as a flag it is `--section.key=value`, and a flag wins over the file. `training` also takes
every key of transformers' `TrainingArguments` except `output_dir`, `report_to`, `run_name` and `project`, which the
recipe sets by other keys, and `push_to_hub`, `resume_from_checkpoint`, `parallelism_config` and `greater_is_better`.
Relative paths, in recipes and flags, start at the folder in which the command runs.
"""
FILE = Path(__file__).resolve().parent.parent / "recipes/REFERENCE.md"


def reference() -> str:
    """The page's text."""
    parts = [HEAD]
    for section in ["", *SECTIONS]:
        rows = [row for row in key_table() if row.key.rpartition(".")[0] == section]
        heading = f"## {section}" if section else "## At the top"
        lines = [
            f"| `{row.key}` | {_cell(row.description)} | {_cell(row.choices)} | {_cell(row.default)} |" for row in rows
        ]
        parts.append(
            "\n".join(
                [heading, "", "| key | description | choices | default |", "| --- | --- | --- | --- |", *lines, ""]
            )
        )
    return "\n".join(parts)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def make_parser() -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=__doc__)


def main() -> None:
    make_parser().parse_args()
    FILE.write_text(reference(), encoding="utf-8")


if __name__ == "__main__":
    main()
