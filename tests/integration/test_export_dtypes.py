"""An export in a wider dtype keeps what training changed, and is measured in the dtype it was written in."""

import gc
import shutil
import weakref
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from small_run import RECIPE, root, run, template  # noqa: F401 (fixtures)
from transformers import AutoModelForCausalLM, PreTrainedModel

from agnostic_train.files import read_json
from agnostic_train.model.loading import load_model
from agnostic_train.pipeline import materials
from agnostic_train.pipeline.plan import make_plan
from agnostic_train.pipeline.stages import evaluate, export
from agnostic_train.recipe_file import load_recipe

HALF = ["--model.dtype=bfloat16", "--export.dtype=float32"]


def weight_phases(recipe, **flags):
    plan = make_plan(load_recipe(recipe, {name.replace("__", "."): it for name, it in flags.items()}), "run")
    return {phase.name: phase.weights / plan.memory.num_parameters for phase in plan.phases}


def test_after_measures_the_exported_checkpoint_in_its_dtype(root, monkeypatch):
    measured = {}
    original = evaluate.measure

    def watched(model, texts, label):
        measured[label] = model.dtype
        return original(model, texts, label)

    monkeypatch.setattr(evaluate, "measure", watched)
    assert run(root, "evaluate", *HALF) == 0
    assert measured == {"before": torch.bfloat16, "after": torch.float32}
    after = read_json(root / "out/evaluation.json")["languages"]["sw"]["after"]
    # Rounded to model.dtype, the checkpoint is another model.
    AutoModelForCausalLM.from_pretrained(root / "out/enhanced", dtype=torch.bfloat16).save_pretrained(root / "rounded")
    assert run(root, "evaluate", *HALF, f"--evaluation.checkpoints={root / 'rounded'}") == 0
    rounded = read_json(root / "out/evaluation.json")["checkpoints"][str(root / "rounded")]["test"]["sw"]
    assert rounded["perplexity"] != after["perplexity"]


def test_kept_task_results_depend_on_the_dtype(root, monkeypatch):
    """The same files in another dtype are another model, also for kept results of lm-eval."""
    identities = []

    def watched(models, *rest, identity, **settings):
        identities.append({name: identity(name) for name in models})
        return {"tasks": {}}

    monkeypatch.setattr(evaluate, "evaluate_tasks", watched)
    monkeypatch.setattr("agnostic_train.pipeline.materials.Materials.task_suite", SimpleNamespace(names=[]))
    assert run(root, "evaluate", *HALF) == run(root, "evaluate", HALF[0]) == run(root, "evaluate") == 0
    half, exported_in_half, whole = identities
    assert half["before"] == exported_in_half["before"] != whole["before"]
    assert half["after"] != exported_in_half["after"] != whole["after"]


def test_plan_counts_the_exported_dtype(root):
    recipe = root / "recipe.yaml"
    plain = weight_phases(recipe, model__dtype="bfloat16")
    assert plain["evaluate"] == 2 and plain["score"] == 2
    wide = weight_phases(recipe, model__dtype="bfloat16", export__dtype="float32")
    assert wide["evaluate"] == 4 and wide["export"] == 2
    narrow = weight_phases(recipe, export__dtype="bfloat16")
    assert narrow["evaluate"] == 4 and narrow["export"] == 4
    # The base, and the LoRA's base in float32; the exported weights are in main memory.
    lora = weight_phases(recipe, model__dtype="bfloat16", training__strategy="lora")
    assert lora["export"] == 2 + 4


def test_lora_is_merged_in_float32_before_rounding(root):
    assert run(root, "export", "--training.strategy=lora", "--training.learning_rate=1e-4", *HALF) == 0
    base = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.bfloat16).float()
    exact = PeftModel.from_pretrained(base, root / "out/adapter").merge_and_unload().state_dict()
    enhanced = AutoModelForCausalLM.from_pretrained(root / "out/enhanced", dtype="auto")
    assert enhanced.dtype == torch.float32
    assert all(torch.equal(value, exact[name]) for name, value in enhanced.state_dict().items())
    flags = ["--training.strategy=lora", "--training.learning_rate=1e-4", HALF[0]]
    assert run(root, "export", *flags) == 0
    enhanced = AutoModelForCausalLM.from_pretrained(root / "out/enhanced", dtype="auto")
    assert enhanced.dtype == torch.bfloat16  # the model's dtype, unless the recipe says otherwise
    assert all(torch.equal(value, exact[name].bfloat16()) for name, value in enhanced.state_dict().items())


def test_models_are_measured_one_at_a_time(root, monkeypatch):
    alive: list[weakref.ref] = []
    most = []
    original = PreTrainedModel.from_pretrained.__func__

    def watched(cls, *args, **settings):
        gc.collect()
        most.append(sum(it() is not None for it in alive))
        result = original(cls, *args, **settings)
        alive.append(weakref.ref(result[0] if isinstance(result, tuple) else result))
        return result

    assert run(root, "export") == 0
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(watched))
    shutil.copytree(root / "out/enhanced", root / "enhanced")
    entries = f"{root / 'model'},{root / 'enhanced'}"
    assert run(root, "evaluate", f"--evaluation.checkpoints={entries}") == 0
    assert most == [0, 0, 0, 0]
    alive.clear(), most.clear()
    assert run(root, "score", f"--model.checkpoints={entries}") == 0
    assert most == [0, 0, 0]


@pytest.mark.parametrize("flags", [[], ["--training.update=mask"], ["--training.strategy=lora"]])
def test_export_keeps_weights_that_a_family_keeps_in_float32(root, monkeypatch, flags):
    def mixed(*arguments):
        model = load_model(*arguments)
        model.model.norm.float().register_forward_hook(lambda module, inputs, output: output.bfloat16())
        with torch.no_grad():
            model.model.norm.weight.fill_(1 + 2**-20)
        return model

    for module in (materials, export):
        monkeypatch.setattr(module, "load_model", mixed)
    assert run(root, "export", "--model.dtype=bfloat16", *flags) == 0
    written = load_file(root / "out/enhanced/model.safetensors")
    norm = written.pop("model.norm.weight")
    assert norm.dtype == torch.float32 and (norm == 1 + 2**-20).all()
    assert {it.dtype for it in written.values()} == {torch.bfloat16}


def test_checkpoint_that_an_engine_saved_in_float32_is_exported_as_the_base_is(root, monkeypatch):
    monkeypatch.setattr(export, "load_model", lambda *arguments: load_model(*arguments).float())
    assert run(root, "export", "--model.dtype=bfloat16", "--training.update=mask") == 0
    assert {it.dtype for it in load_file(root / "out/enhanced/model.safetensors").values()} == {torch.bfloat16}
