"""Imports run one way: a module uses only modules that stand before it."""

import ast

ORDER = [
    "files", "choices", "versions", "peft_import", "recipe", "recipe_file", "sources", "encoding", "corpus", "decoder", "memory", "random_moves", "activity", "neurons", "deactivation", "processes", "inference",
    "impact", "self_check", "lape", "top_counts", "detection", "stability", "perplexity", "bootstrap", "ablation", "agnostic_score", "emergence", "equal_lora", "strategy", "training",
    "trained", "frozen_weights", "export", "comparison", "tuning", "evaluation", "paired_comparison", "task_loading", "task_evaluation", "tables", "figures", "report", "model_card",
    "loading", "quickstart", "materials", "manifest", "tracking", "settings", "fitting", "trials", "pilot", "stages", "stage_inputs", "pipeline", "dry_run", "cli", "__main__",
]  # fmt: skip
ORDER_OF_TRAINING = ["chosen", "mask", "compact", "delta", "callbacks", "guarded", "trainer"]
ORDER_OF_STAGES = ["context", "detect", "score", "pilot", "train", "export", "evaluate", "report", "compare"]
ORDER_OF_COMPACT = ["peft_type", "config", "product", "layer", "model"]
WITHIN = {"training": ORDER_OF_TRAINING, "stages": ORDER_OF_STAGES}


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
            elif parts[0] in WITHIN and other[1] != parts[1]:
                order = WITHIN[parts[0]]
                assert order.index(other[1]) < order.index(parts[1]), f"{file} imports {other}"
            elif "compact" in parts and parts[-1] != "__init__":
                assert ORDER_OF_COMPACT.index(other[2]) < ORDER_OF_COMPACT.index(parts[2]), f"{file} imports {other}"
    assert seen == set(ORDER)


def test_nothing_is_read_or_written_that_could_run_code(pytestconfig):
    """Our own files are safetensors, JSON and YAML of the safe kind; of a Trainer's pickles, plain values alone."""
    loads = 0
    for file in (pytestconfig.rootpath / "agnostic_train").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None) or ""}
                assert not names & {"pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle"}, file
            elif isinstance(node, ast.Call):
                call = ast.unparse(node.func)
                assert call not in ("eval", "exec", "torch.save", "np.save", "yaml.load"), file
                keywords = {it.arg: ast.unparse(it.value) for it in node.keywords}
                if call == "torch.load":
                    loads += 1
                    assert keywords["weights_only"] == "True", file
                elif call == "YAML":
                    loads += 1
                    assert keywords["typ"] == "'safe'", file
    assert loads == 2
