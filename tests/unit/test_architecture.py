"""Imports run one way: a module uses only modules that stand before it."""

import ast

ORDER = [
    "files", "recipe", "sources", "encoding", "corpus", "decoder", "memory", "neurons", "deactivation", "inference", "processes",
    "impact", "self_check", "lape", "detection", "stability", "perplexity", "ablation", "agnostic_score", "emergence", "strategy", "training",
    "trained", "frozen_weights", "export", "evaluation", "report", "loading", "quickstart", "materials", "manifest", "settings", "pipeline", "dry_run", "cli", "__main__",
]  # fmt: skip
ORDER_OF_TRAINING = ["chosen", "mask", "compact", "delta", "callbacks", "guarded", "trainer"]
ORDER_OF_COMPACT = ["peft_type", "config", "layer", "model"]


def imported(file):
    """Names below `agnostic_train` that a file imports, as tuples."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        yield from (tuple(name.split(".")[1:]) for name in names if name.startswith("agnostic_train."))


def test_imports_run_one_way(pytestconfig):
    package = pytestconfig.rootpath / "agnostic_train"
    seen = set()
    for file in package.rglob("*.py"):
        parts = file.relative_to(package).with_suffix("").parts
        if parts == ("__init__",):
            continue
        seen.add(parts[0])
        for other in imported(file):
            if other[0] != parts[0]:
                assert ORDER.index(other[0]) < ORDER.index(parts[0]), f"{file} imports {other[0]}"
            elif parts[0] == "training" and other[1] != parts[1]:
                assert ORDER_OF_TRAINING.index(other[1]) < ORDER_OF_TRAINING.index(parts[1]), f"{file} imports {other}"
            elif "compact" in parts and parts[-1] != "__init__":
                assert ORDER_OF_COMPACT.index(other[2]) < ORDER_OF_COMPACT.index(parts[2]), f"{file} imports {other}"
    assert seen == set(ORDER)
