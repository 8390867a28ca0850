"""Imports run one way: a module uses only modules listed before it in `ORDER`."""

import ast

ORDER = {
    "": [
        "errors", "hub_names", "files", "fingerprints", "choices", "percent", "versions", "peft_import", "processes",
        "recipe", "recipe_keys", "recipe_file", "corpus", "model", "neurons", "impact", "detection", "scores",
        "training", "export", "evaluation", "report", "quickstart", "pipeline", "cli", "__main__",
    ],
    "corpus": ["documents", "local_files", "hub", "streaming", "purposes", "evaluation_text", "encoding"],
    "model": ["decoder", "memory", "weights", "batches", "inference", "reading", "loading"],
    "neurons": ["random_moves", "activity", "neuron_set", "language_neurons", "deactivation"],
    "impact": [
        "tokens", "activations", "feed_forward", "rms_norm", "kernels", "intervals", "kernel_trial", "pruning",
        "row_blocks", "visibility", "angles", "pass_cache", "attention", "attention_block", "layer_attention", "bounds",
        "layout", "norm_over_heads", "bound_sieve", "interval_sieve", "query_key", "hooks",
    ],
    "detection": ["self_check", "lape", "top_counts", "counting", "detect", "stability"],
    "scores": ["perplexity", "bootstrap", "ablation", "result", "contrast", "agnostic_score", "emergence"],
    "training": [
        "chosen", "equal_lora", "strategy", "mask", "compact", "delta", "callbacks", "checkpoints", "jit_checkpoint",
        "guarded", "trainer",
    ],
    "training.compact": ["peft_type", "config", "product", "layer", "model"],
    "export": ["trained", "frozen_weights", "merged", "adapters", "checkpoint", "model_card"],
    "evaluation": [
        "comparison", "tuning", "objective", "languages", "paired_comparison", "task_loading", "task_results",
        "task_evaluation",
    ],
    "report": [
        "tables", "fonts", "plotting", "run_figures", "score_figures", "comparison_figures", "comparison_prose", "page",
        "terminal",
    ],
    "quickstart": ["lexicon", "grammar", "phrasebook", "tiny_model"],
    "pipeline": [
        "materials", "manifest", "measured", "tracking", "settings", "checks", "resuming", "training_text", "fitting",
        "trials", "stage_inputs", "stages", "stage_table", "run", "plan", "dry_run",
    ],
    "pipeline.stages": ["context", "detect", "score", "pilot", "train", "export", "evaluate", "report", "compare"],
}  # fmt: skip
"""The modules and subpackages of each package, in import order, by the package's name below `agnostic_train`."""


def imported(file):
    """Yield the names below `agnostic_train` that a file imports, as tuples."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("agnostic_train"):
            yield from ((*node.module.split(".")[1:], alias.name) for alias in node.names)


def test_imports_run_one_way(pytestconfig):
    root = pytestconfig.rootpath / "agnostic_train"
    seen = {package: set() for package in ORDER}
    for file in root.rglob("*.py"):
        own = file.relative_to(root).with_suffix("").parts
        if own[-1] == "__init__":
            continue
        for depth, name in enumerate(own):
            seen.setdefault(".".join(own[:depth]), set()).add(name)
        for other in imported(file):
            depth = next(depth for depth, name in enumerate(own) if other[depth] != name)
            order = ORDER.get(".".join(own[:depth]), [])
            if other[depth] in order:  # else a name that the package's `__init__` defines
                assert order.index(other[depth]) < order.index(own[depth]), f"{file} imports {'.'.join(other)}"
    assert {package: seen[package] for package in ORDER} == {package: set(names) for package, names in ORDER.items()}


def test_training_does_not_import_recipe_or_text_packages(pytestconfig):
    """`tests/gpu` and the benchmarks run where these packages aren't installed."""
    root = pytestconfig.rootpath / "agnostic_train"
    todo, seen, packages = [("training", "trainer"), ("export", "checkpoint"), ("scores", "emergence")], set(), set()
    while todo:
        parts = todo.pop()
        file = root.joinpath(*parts).with_suffix(".py")
        if not file.exists():
            file = root.joinpath(*parts, "__init__.py")
        if not file.exists() or file in seen:  # a name that isn't a module is defined in its parent
            if file not in seen and len(parts) > 1:
                todo.append(parts[:-1])
            continue
        seen.add(file)
        todo += imported(file)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [it.name for it in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            packages |= {name.split(".")[0] for name in names}
    assert {"torch", "transformers", "peft", "agnostic_train"} < packages
    assert not packages & {"pydantic", "datasets", "wandb", "ruamel", "trl", "lm_eval"}


def test_no_file_format_that_can_run_code_is_used(pytestconfig):
    """Files are safetensors, JSON and safe YAML; the Trainer's pickles are loaded with `weights_only`."""
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
    assert loads
