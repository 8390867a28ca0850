"""Exported checkpoints load like any other, and report whether a frozen weight has changed."""

import copy
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from conftest import UPDATES, padded_batch, tiny_llama
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_families import family_model
from test_tuner import adapted, fill
from transformers import AutoModelForCausalLM, AutoTokenizer

from agnostic_train.errors import UserError
from agnostic_train.export import checkpoint
from agnostic_train.export import trained as trained_module
from agnostic_train.export.checkpoint import export_checkpoint
from agnostic_train.export.frozen_weights import check_frozen_weights
from agnostic_train.export.trained import Trained
from agnostic_train.model.decoder import find_decoder
from agnostic_train.model.weights import bit_patterns
from agnostic_train.neurons.neuron_set import NeuronSet
from agnostic_train.quickstart.tiny_model import build_tokenizer
from agnostic_train.training.compact import NeuronConfig
from agnostic_train.training.delta import Delta, adapter_deltas, read_deltas, weight_deltas
from agnostic_train.training.equal_lora import equal_lora

CHOSEN = NeuronSet({(0, "q"): [1, 17], (1, "down"): [0, 52]})


def trained(base):
    model = copy.deepcopy(base)
    with torch.no_grad():
        decoder = find_decoder(model)
        for site, indices in CHOSEN.items():
            projection = decoder.projection(site)
            projection.linear.weight.index_fill_(projection.neuron_dim, indices, 0.5)
    model.trained_neurons = CHOSEN
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_merged_checkpoint_loads_like_any_other(tmp_path, tied):
    base = tiny_llama(tie_word_embeddings=tied)
    model = trained(base)
    tokenizer = build_tokenizer(["a b c"], vocab_size=300)
    check = export_checkpoint(model, tmp_path / "out", base=base, tokenizer=tokenizer, model_card="# card\n")
    assert check.status == "identical" and check.chosen_moved == 1.0 and check.changed == ()
    total = sum(parameter.numel() for parameter in model.parameters())
    assert check.num_chosen == 4 * 42 and check.num_compared == total - 4 * 42
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    batch = padded_batch([5, 9])
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a").input_ids == tokenizer("a").input_ids
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert (
        manifest["frozen_weights"]["status"] == "identical" and (tmp_path / "out/README.md").read_text() == "# card\n"
    )


def test_check_names_changed_frozen_weights():
    base = tiny_llama()
    model = trained(base)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[2, 3] += 1e-6
        model.model.norm.weight[0] *= -1
    check = check_frozen_weights(Trained.of(model, base, CHOSEN))
    assert check.status == "changed"
    assert check.changed == ("model.layers.0.self_attn.q_proj.weight", "model.norm.weight")


def test_weights_are_compared_bit_by_bit(tmp_path):
    """0 and -0 differ, and a NaN that the base already has is equal."""
    base = tiny_llama()
    with torch.no_grad():
        base.model.norm.weight[0] = torch.nan
        base.model.norm.weight[1] = 0.0
    model = trained(base)
    assert check_frozen_weights(Trained.of(model, base)).status == "identical"
    assert export_checkpoint(model, tmp_path / "out", base=base).status == "identical"
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out").model.norm.weight
    assert torch.equal(bit_patterns(written.detach()), bit_patterns(base.model.norm.weight.detach()))
    with torch.no_grad():
        model.model.norm.weight[1] = -0.0
    check = check_frozen_weights(Trained.of(model, base))
    assert check.status == "changed" and check.changed == ("model.norm.weight",)


def test_half_precision_export_is_checked_in_its_precision(tmp_path):
    base = tiny_llama().bfloat16()
    base.save_pretrained(tmp_path / "base")
    model = trained(AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32))
    check = export_checkpoint(model, tmp_path / "out", base=tmp_path / "base", dtype="bfloat16")
    assert (
        json.loads((tmp_path / "out/manifest.json").read_text())["base"] == "base"
    )  # a published file must not contain a path
    assert check.status == "identical"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.dtype == torch.bfloat16 and model.dtype == torch.float32
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(loaded.state_dict()[name], base.state_dict()[name])


@pytest.mark.parametrize("to", ["merged", "lora", "delta"])
def test_export_into_the_folder_of_its_base_is_refused(tmp_path, to):
    """The base may itself be an export, which is the only copy of an earlier training."""
    export_checkpoint(trained(tiny_llama()), tmp_path / "first", base=tiny_llama())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    wrapped = get_peft_model(model, NeuronConfig(neurons=CHOSEN, task_type="CAUSAL_LM"))
    wrapped.save_pretrained(tmp_path / "adapter")
    CHOSEN.save(tmp_path / "adapter/neurons.safetensors")
    for given in (wrapped, tmp_path / "adapter"):
        with pytest.raises(UserError, match="first holds the model that the training started from"):
            export_checkpoint(given, tmp_path / "first", to=to)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "first")


def test_frozen_weights_beyond_the_range_of_the_dtype_are_refused(tmp_path):
    base = tiny_llama()
    with torch.no_grad():
        base.model.embed_tokens.weight[3, 4] = 1e6
    with pytest.raises(UserError, match=r"embed_tokens.weight: weights beyond the range of float16; .* export.dtype"):
        export_checkpoint(trained(base), tmp_path / "out", base=base, dtype="float16")
    assert not (tmp_path / "out").exists()
    assert export_checkpoint(trained(base), tmp_path / "out", base=base, dtype="bfloat16").status == "identical"


def test_tied_embeddings_are_written_once_in_another_dtype(tmp_path):
    export_checkpoint(trained(tiny_llama(tie_word_embeddings=True)), tmp_path / "out", dtype="bfloat16")
    with safe_open(tmp_path / "out/model.safetensors", framework="pt") as tensors:
        assert "lm_head.weight" not in tensors.keys()  # noqa: SIM118 (not iterable itself)


def test_export_without_a_base_or_neurons_is_unverified(tmp_path):
    base = tiny_llama()
    reloaded = trained(base)
    del reloaded.trained_neurons  # a reloaded checkpoint has none
    CHOSEN.save(tmp_path / "neurons.safetensors")
    check = export_checkpoint(reloaded, tmp_path / "c", base=base, neurons=tmp_path / "neurons.safetensors")
    assert check.status == "identical" and check.chosen_moved == 1
    assert export_checkpoint(trained(base), tmp_path / "a").status == "unverified"
    assert export_checkpoint(tiny_llama(), tmp_path / "b", base=base).status == "unverified"
    assert json.loads((tmp_path / "a/manifest.json").read_text())["frozen_weights"]["status"] == "unverified"


def test_invalid_arguments_leave_no_files(tmp_path):
    model = trained(tiny_llama())
    for settings, message in (
        ({"to": "onnx"}, r"export\.to"),
        ({"dtype": "float33"}, r"export\.dtype"),
        ({"dtype": "int8"}, r"export\.dtype"),
        ({"base": tiny_llama(intermediate_size=64)}, "another shape"),
    ):
        with pytest.raises(UserError, match=message):
            export_checkpoint(model, tmp_path / "out", **settings)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrapped", [lambda it: torch.compile(it, backend="eager"), torch.nn.DataParallel])
def test_wrapped_model_is_exported_as_the_model_inside(tmp_path, wrapped):
    model = adapted(tiny_llama(), CHOSEN)
    for inner, to in ((model, "a"), (model.get_base_model(), "b")):
        assert export_checkpoint(wrapped(inner), tmp_path / to).status == "identical"
        batch = padded_batch([5])
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / to)
        torch.testing.assert_close(loaded(**batch).logits, model.eval()(**batch).logits)


def test_models_that_cannot_be_exported_are_refused(tmp_path):
    model = adapted(tiny_llama(), CHOSEN)
    model.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    with pytest.raises(UserError, match="save it with safe_serialization=True"):
        export_checkpoint(tmp_path / "pickled", tmp_path / "out", base=tiny_llama())
    with pytest.raises(TypeError, match="expected a model .* not a NoneType"):
        export_checkpoint(None, tmp_path / "out")
    with pytest.raises(UserError, match="weights are offloaded"):
        export_checkpoint(cpu_offload(tiny_llama()), tmp_path / "out", base=tiny_llama())
    layers = tiny_llama()
    layers.model.layers[0] = torch.compile(layers.model.layers[0], backend="eager")
    with pytest.raises(UserError, match="torch.compile has wrapped it, or layers of it"):
        export_checkpoint(layers, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_error_names_a_base_that_does_not_fit_its_config(tmp_path):
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    base.config.intermediate_size = 64
    base.config.save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="base: .*base has weights of other shapes than its config.json says"):
        export_checkpoint(adapted(tiny_llama(), CHOSEN), tmp_path / "out", base=tmp_path / "base")


def test_incomplete_base_is_refused(tmp_path):
    """transformers would fill the missing weights with random numbers, which would be compared with themselves."""
    tiny_llama().save_pretrained(tmp_path / "base")
    weights = load_file(tmp_path / "base/model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, tmp_path / "base/model.safetensors", {"format": "pt"})
    adapted(tiny_llama(), CHOSEN).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="base: .*base lacks 1 weights .* such as model.layers.1.mlp.down_proj.weight"):
        export_checkpoint(tmp_path / "adapter", tmp_path / "out", base=tmp_path / "base")
    assert not (tmp_path / "out").exists()


TO = ("merged", "lora", "delta")
STRANGER = """
import sys
import weakref
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2]).eval()
assert "agnostic_train" not in sys.modules
torch.save(model(input_ids=torch.tensor([[3, 14, 15, 9, 26]])).logits.detach(), sys.argv[3])
"""


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=torch.tensor([[3, 14, 15, 9, 26]])).logits


@pytest.fixture(params=["adapter", "folder of an adapter", "trained with masks", "fused weights", "original variable"])
def exported(request, tmp_path):
    """Export one trained model to all targets; return (base's folder, expected logits, folder by target, checks)."""
    base = family_model("Phi-3") if request.param == "fused weights" else tiny_llama(tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    if request.param == "trained with masks":
        model, settings = trained(base), {"base": base}
    else:
        neurons = NeuronSet({(0, "q"): [1, 17], (0, "v"): [2], (1, "up"): [28]}) if "fused" in request.param else CHOSEN
        model, settings = adapted(copy.deepcopy(base), neurons), {}
    expected = logits(model)
    if request.param == "folder of an adapter":
        model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        model.save_pretrained(tmp_path / "adapter")
        model = tmp_path / "adapter"
    if request.param == "original variable":
        model = model.get_base_model()
    before = None if isinstance(model, Path) else copy.deepcopy(model.state_dict())
    checks = [export_checkpoint(model, tmp_path / to, to=to, **settings) for to in TO]
    if before is not None:
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return tmp_path / "base", expected, {to: tmp_path / to for to in TO}, checks


def test_all_targets_give_the_logits_of_the_trained_model(exported):
    base, expected, folders, checks = exported
    for check in checks:
        assert check.status == "identical" and check.chosen_moved == check.chosen_surviving == 1.0
    models = {
        "merged": AutoModelForCausalLM.from_pretrained(folders["merged"]),
        **{
            to: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folders[to])
            for to in ("delta", "lora")
        },
    }
    tied = models["merged"].config.tie_word_embeddings
    assert (models["merged"].lm_head.weight is models["merged"].get_input_embeddings().weight) is tied
    results = {to: logits(model) for to, model in models.items()}
    for result in results.values():
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    for to, folder in folders.items():
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["format"] == to and manifest["frozen_weights"]["status"] == "identical"


def test_lora_loads_without_this_package(tmp_path):
    model = adapted(tiny_llama(), CHOSEN)
    tiny_llama().save_pretrained(tmp_path / "base")
    export_checkpoint(model, tmp_path / "lora", to="lora")
    command = [sys.executable, "-c", STRANGER, tmp_path / "base", tmp_path / "lora", tmp_path / "logits.pt"]
    subprocess.run(command, check=True, cwd=tmp_path)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_adapter_is_at_least_float32(tmp_path, dtype):
    export_checkpoint(adapted(tiny_llama().to(dtype), CHOSEN), tmp_path / "delta", to="delta")
    values = {it.dtype for it in load_file(tmp_path / "delta/adapter_model.safetensors").values()} - {torch.int64}
    manifest_dtype = json.loads((tmp_path / "delta/manifest.json").read_text())["dtype"]
    assert values == {getattr(torch, manifest_dtype)} == {torch.promote_types(dtype, torch.float32)}


def test_delta_equals_the_file_that_peft_saves(tmp_path):
    model = adapted(tiny_llama(), CHOSEN)
    model.save_pretrained(tmp_path / "peft")
    export_checkpoint(model, tmp_path / "ours", to="delta")
    ours, peft = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "peft"))
    assert ours.keys() == peft.keys() and all(torch.equal(ours[name], peft[name]) for name in ours)
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "peft")]
    assert configs[0]["rows"] == configs[1]["rows"] and configs[0]["columns"] == configs[1]["columns"]


def test_survivors_are_a_share_of_what_moved(tmp_path):
    base = tiny_llama()
    model = copy.deepcopy(base)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, ::2] += 0.5
    check = export_checkpoint(model, tmp_path / "out", base=base, neurons={(0, "up"): [3]})
    assert (check.chosen_moved, check.chosen_surviving, check.against) == (0.5, 1.0, "base")
    alone = export_checkpoint(adapted(neurons=CHOSEN), tmp_path / "alone")
    assert alone.against == "frozen weights"


def test_merging_rounds_once_and_reports_what_survives(tmp_path):
    """A third of changes of 1e-4 to bfloat16 weights of 0.02 is lost to rounding."""
    base = tiny_llama(initializer_range=0.02, hidden_size=252).bfloat16()
    neurons = NeuronSet({(0, "up"): range(53), (1, "down"): range(53)})
    model = get_peft_model(base, NeuronConfig(neurons=neurons))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=1e-4)
    rounded = export_checkpoint(model, tmp_path / "rounded")
    assert rounded.status == "identical" and rounded.chosen_moved == 1.0
    assert rounded.chosen_surviving == pytest.approx(0.675, abs=0.02)
    whole = export_checkpoint(model, tmp_path / "whole", dtype="float32")
    assert whole.chosen_surviving == 1.0
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    exact = layer.base_layer.weight.float() + layer.get_delta_weight("default")
    for folder, dtype in (("rounded", torch.bfloat16), ("whole", torch.float32)):
        weight = (
            AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype="auto").model.layers[0].mlp.up_proj.weight
        )
        assert torch.equal(weight, exact.to(dtype))


def test_errors_name_what_cannot_be_exported(tmp_path):
    merged = adapted(tiny_llama(), CHOSEN)
    merged.merge_adapter()
    two = adapted(tiny_llama(), CHOSEN)
    two.add_adapter("second", NeuronConfig(neurons=CHOSEN))
    two.base_model.set_adapter(["default", "second"])
    lora = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "lora")
    adapted(tiny_llama(), CHOSEN).save_pretrained(tmp_path / "ours")
    get_peft_model(tiny_llama(), NeuronConfig(neurons=CHOSEN), "own").save_pretrained(tmp_path / "named")
    tiny_llama().save_pretrained(tmp_path / "cut")
    os.truncate(tmp_path / "cut/model.safetensors", 100)
    inputs = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for model, settings, message in (
        (merged, {}, "unmerge_adapter"),
        (two, {}, "several adapters are active"),
        (lora, {}, "merge them first"),
        (trained(tiny_llama()), {"to": "lora"}, "give that model as base"),
        (tmp_path / "lora", {}, "a LORA adapter"),
        (tmp_path / "none", {}, "none: no such folder"),
        (tmp_path, {}, "no readable neuron adapter"),
        (tmp_path / "named", {}, "no readable neuron adapter .* in subfolders, such as own"),
        (tmp_path / "ours", {}, "give it as base"),
        (tmp_path / "ours", {"base": tmp_path / "none"}, "base: no such folder"),
        (tmp_path / "ours", {"base": tmp_path / "cut"}, "base: can't load the weights of .*/cut"),
        (tmp_path / "ours", {"base": tiny_llama(hidden_size=36)}, "base: model.layers.0.self_attn.q_proj.weight"),
    ):
        with pytest.raises(UserError, match=message):
            export_checkpoint(model, tmp_path / "out", **settings)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == inputs


def test_native_adapter_is_merged_and_written_file_is_verified(tmp_path, monkeypatch):
    native = tiny_llama()
    native.add_adapter(NeuronConfig(neurons=CHOSEN))
    fill(native)
    expected = logits(native)
    assert export_checkpoint(native, tmp_path / "native", base=tiny_llama()).status == "identical"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)
    assert native._hf_peft_config_loaded
    # An adapter loaded by transformers leaves PEFT's weight names in the model.
    adapted(tiny_llama(), CHOSEN).save_pretrained(tmp_path / "adapter")
    tiny_llama().save_pretrained(tmp_path / "base")
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    native.load_adapter(tmp_path / "adapter")
    conversions = native._weight_conversions
    assert export_checkpoint(native, tmp_path / "native", base=tiny_llama()).status == "identical"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    torch.testing.assert_close(logits(loaded), logits(native), rtol=1e-4, atol=1e-4)
    assert native._weight_conversions is conversions and native._hf_peft_config_loaded
    original = type(native).save_pretrained

    def forgetful(self, directory, state_dict):
        original(self, directory, state_dict={**state_dict, "model.norm.weight": state_dict["model.norm.weight"] + 1})

    monkeypatch.setattr(type(native), "save_pretrained", forgetful)
    with pytest.raises(RuntimeError, match="wasn't written correctly"):
        export_checkpoint(adapted(tiny_llama(), CHOSEN), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_base_of_another_precision_is_not_identical(tmp_path):
    base, model = tiny_llama(), adapted(tiny_llama().bfloat16(), CHOSEN)
    for trained_model in (model, trained(tiny_llama()).bfloat16()):
        trained_model.trained_neurons = CHOSEN
        check = export_checkpoint(trained_model, tmp_path / "out", base=base, dtype="float32")
        # All weights differ except the norms, which are ones.
        assert check.status == "changed" and len(check.changed) == 16
        assert export_checkpoint(trained_model, tmp_path / "out", base=base, dtype="bfloat16").status == "identical"
    cast = adapted(tiny_llama(), CHOSEN)
    cast.save_pretrained(tmp_path / "whole")
    cast.to(torch.bfloat16).save_pretrained(tmp_path / "cast")
    check = export_checkpoint(tmp_path / "cast", tmp_path / "out", base=base, dtype="torch.float32")
    assert check.status == "identical" and check.num_chosen == 4 * 42
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    name = "model.layers.0.self_attn.q_proj.weight"
    assert (loaded[name] != base.state_dict()[name]).any(1).nonzero().flatten().tolist() == [1, 17]
    export_checkpoint(tmp_path / "cast", tmp_path / "delta", to="delta", base=base)
    tensors = load_file(tmp_path / "delta/adapter_model.safetensors")
    assert {it.dtype for it in tensors.values()} == {torch.float32, torch.int64}
    assert json.loads((tmp_path / "delta/manifest.json").read_text())["neurons"] == CHOSEN.counts()


@pytest.mark.parametrize("to", TO)
def test_nonfinite_weights_are_refused(tmp_path, to):
    model = adapted(tiny_llama(), CHOSEN)
    delta = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    with torch.no_grad():
        delta[0, 0] = 1e6
    if to == "merged":
        with pytest.raises(UserError, match="aren't finite in float16"):
            export_checkpoint(model, tmp_path / "out", to=to, dtype="float16")
    with torch.no_grad():
        delta[0, 0] = torch.nan
    with pytest.raises(UserError, match="aren't finite in float32"):
        export_checkpoint(model, tmp_path / "out", to=to)
    assert list(tmp_path.iterdir()) == []


def test_errors_name_invalid_models_bases_and_dtypes(tmp_path):
    disabled, invalid = adapted(tiny_llama(), CHOSEN), adapted(tiny_llama(), CHOSEN)
    disabled.base_model.disable_adapter_layers()
    invalid.generation_config.temperature, invalid.generation_config.do_sample = 0.5, False
    nameless = copy.deepcopy(tiny_llama())
    for model, settings, message in (
        (disabled, {}, "disabled"),
        (invalid, {}, "its config or generation_config is invalid, so"),
        (nameless, {"to": "delta", "base": tiny_llama()}, "neurons: which were trained isn't known"),
        (adapted(tiny_llama(), CHOSEN), {"base": adapted(tiny_llama(), CHOSEN)}, "base: it has adapters"),
        (adapted(tiny_llama(), CHOSEN), {"dtype": 32}, "export.dtype"),
        (nameless, {"to": "lora", "base": tiny_llama(), "neurons": {}}, "neurons: the set is empty"),
        (nameless, {"base": nameless, "neurons": CHOSEN}, "base: it is the trained model itself"),
        (adapted(tiny_llama(), CHOSEN), {"dtype": "float8_e4m3fn"}, "export.dtype"),
    ):
        with pytest.raises(UserError, match=message):
            export_checkpoint(model, tmp_path / "out", **settings)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("training", ["mask", "compact"])
def test_each_weight_keeps_its_own_dtype(tmp_path, training):
    """Some families keep a few weights in float32; rounding them would change frozen weights."""
    base = tiny_llama().bfloat16()
    base.model.norm.float()
    with torch.no_grad():
        base.model.norm.weight += 2**-20
    model = trained(base) if training == "mask" else adapted(copy.deepcopy(base), CHOSEN)
    check = export_checkpoint(model, tmp_path / "out", base=base)
    assert check.status == "identical" and check.chosen_moved > 0.9
    written = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(written.pop("model.norm.weight"), base.model.norm.weight.detach())
    assert {it.dtype for it in written.values()} == {torch.bfloat16}
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert manifest["dtype"] == config["dtype"] == "bfloat16"
    with torch.no_grad():
        base.model.norm.weight[0] += 2**-20
    assert export_checkpoint(model, tmp_path / "out", base=base).changed == ("model.norm.weight",)
    assert export_checkpoint(model, tmp_path / "out", base=base, dtype="bfloat16").status == "identical"


@pytest.mark.parametrize("dtype", ["bfloat16", None])
def test_one_float32_sum_exists_at_a_time(tmp_path, monkeypatch, dtype):
    """All sums together would take twice the memory of a model in half precision."""
    model = adapted(tiny_llama().bfloat16(), NeuronSet({(i, p): [0, 3] for i in (0, 1) for p in ("q", "up", "down")}))
    sums, most = [], []
    original = Delta.added_to

    def watched(self, weight):
        most.append(sum(it() is not None for it in sums))
        result = original(self, weight)
        sums.append(weakref.ref(result))
        return result

    monkeypatch.setattr(Delta, "added_to", watched)
    expected = copy.deepcopy(model).merge_and_unload().state_dict()
    del most[:], sums[:]
    export_checkpoint(model, tmp_path / "out", dtype=dtype)
    assert len(most) == 2 * 6 and max(most) == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.items())


def test_neurons_trained_earlier_count_as_chosen(tmp_path):
    """An adapter on a model that was trained before: all trained neurons may differ from the first base, no others."""
    base = tiny_llama()
    second = NeuronSet({(0, "q"): [1, 4], (1, "up"): [7]})
    model = adapted(trained(base), second)
    check = export_checkpoint(model, tmp_path / "out", base=base)
    assert check.status == "identical" and check.chosen_moved == 1.0
    assert json.loads((tmp_path / "out/manifest.json").read_text())["neurons"] == (CHOSEN | second).counts()
    with pytest.raises(UserError, match="base: neurons were trained before this adapter"):
        export_checkpoint(model, tmp_path / "delta", "delta")
    del model.get_base_model().trained_neurons
    assert export_checkpoint(model, tmp_path / "out", base=base).status == "changed"
    assert export_checkpoint(model, tmp_path / "out", base=base, neurons=CHOSEN | second).status == "identical"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="some that the adapter trains aren't among them"):
        export_checkpoint(model, tmp_path / "out", base=base, neurons=CHOSEN)
    for to in ("lora", "delta"):
        export_checkpoint(model, tmp_path / to, to, base=base, neurons=CHOSEN | second)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / to)
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("second", [CHOSEN, NeuronSet({(0, "q"): [1, 4], (1, "up"): [7]})], ids=["same", "other"])
@pytest.mark.parametrize("first", UPDATES)
def test_second_training_of_a_model(tmp_path, first, second):
    """An export with a base holds both trainings; one without holds the second, and doesn't name the first's base."""
    tiny_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    between = trained(base) if first == "mask" else adapted(copy.deepcopy(base), CHOSEN).merge_and_unload()
    assert between.trained_neurons == CHOSEN
    model = adapted(copy.deepcopy(between), second)
    for to in ("merged", "lora", "delta"):
        assert export_checkpoint(model, tmp_path / to, to, base=tmp_path / "base").status == "identical"
        loaded = (AutoModelForCausalLM if to == "merged" else AutoPeftModelForCausalLM).from_pretrained(tmp_path / to)
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(UserError, match="doesn't name the model that it was trained on; give it as base"):
        export_checkpoint(tmp_path / "saved", tmp_path / "out")
    folders = [tmp_path / "saved"]
    if second == CHOSEN:  # with other neurons, a base is needed
        export_checkpoint(model, tmp_path / "alone", "delta")
        folders.append(tmp_path / "alone")
    for folder in folders:
        loaded = PeftModel.from_pretrained(copy.deepcopy(between), folder)
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
        assert not PeftConfig.from_pretrained(folder).base_model_name_or_path
    assert model.merge_and_unload().trained_neurons == CHOSEN | second


def test_resized_embeddings_are_exported_only_whole(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    tokenizer = build_tokenizer(["abc"], vocab_size=280)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(300)
    model = adapted(model, CHOSEN)
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(UserError, match="saved: the adapter came with other weights, such as lm_head.weight"):
        export_checkpoint(tmp_path / "saved", tmp_path / "out")
    for to in ("lora", "delta"):
        with pytest.raises(UserError, match="export.to: .* vocabulary of 300 was resized from the 61 of .*/base"):
            export_checkpoint(model, tmp_path / "out", to)
    export_checkpoint(model, tmp_path / "out", tokenizer=tokenizer)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))


def test_half_precision_model_exports_its_adapter_alone(tmp_path):
    """What rounding changed around it isn't part of the adapter, also if the base is in float32."""
    tiny_llama().save_pretrained(tmp_path / "base")
    between = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    for model in (adapted(copy.deepcopy(between), CHOSEN), adapted(between, CHOSEN)):
        export_checkpoint(model, tmp_path / "out", "delta", base=tmp_path / "base")
        written, _ = read_deltas(tmp_path / "out")
        for name, delta in adapter_deltas(model).items():
            assert torch.equal(written[name].values, delta.values)
        between.trained_neurons = CHOSEN  # now the difference of the weights is computed; there is none but rounding


def test_use_cache_is_that_of_the_base(tmp_path):
    """A Trainer sets it to False."""
    model = adapted(tiny_llama(), CHOSEN)
    model.config.use_cache = False
    export_checkpoint(model, tmp_path / "out", base=tiny_llama())
    assert json.loads((tmp_path / "out/config.json").read_text())["use_cache"]


def test_base_that_was_trained_is_not_named(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    between = adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), CHOSEN).merge_and_unload()
    model = adapted(copy.deepcopy(between), CHOSEN)
    model.save_pretrained(tmp_path / "saved")
    for trained_model in (model, tmp_path / "saved"):
        export_checkpoint(trained_model, tmp_path / "out", "delta", base=between)
        assert PeftConfig.from_pretrained(tmp_path / "out").base_model_name_or_path is None
        loaded = PeftModel.from_pretrained(copy.deepcopy(between), tmp_path / "out")
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)


def test_tokenizer_with_more_tokens_than_the_model_is_reported(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(checkpoint.logger, "warning", warnings.append)
    export_checkpoint(
        adapted(tiny_llama(), CHOSEN), tmp_path / "out", tokenizer=build_tokenizer(["abc"], vocab_size=280)
    )
    assert len(warnings) == 1 and "tokens, the model only 61 embeddings" in warnings[0]


def test_merging_and_unloading_in_two_steps_records_the_neurons():
    model = adapted(tiny_llama(), CHOSEN)
    model.merge_adapter()
    assert model.unload().trained_neurons == CHOSEN
    assert not hasattr(adapted(tiny_llama(), CHOSEN).unload(), "trained_neurons")


def test_folder_with_an_adapter_of_other_neurons_is_refused(tmp_path):
    adapted(neurons=CHOSEN).save_pretrained(tmp_path / "checkpoint")
    second = NeuronSet({(0, "q"): [2]})
    second.save(tmp_path / "checkpoint/neurons.safetensors")
    with pytest.raises(UserError, match="this isn't the adapter that was trained"):
        export_checkpoint(tmp_path / "checkpoint", tmp_path / "out", base=tiny_llama())
    CHOSEN.save(tmp_path / "checkpoint/neurons.safetensors")
    assert export_checkpoint(tmp_path / "checkpoint", tmp_path / "out", base=tiny_llama()).status == "identical"
    with pytest.raises(TypeError, match="tokenizer: expected a tokenizer"):
        export_checkpoint(tmp_path / "checkpoint", tmp_path / "out", base=tiny_llama(), tokenizer="name")


def test_checkpoint_with_two_adapters_of_the_trained_neurons_is_refused(tmp_path):
    """Either may be the one that was trained."""
    model = adapted(neurons=CHOSEN)
    model.add_adapter("two", NeuronConfig(neurons=CHOSEN))
    model.save_pretrained(tmp_path / "checkpoint")
    assert export_checkpoint(tmp_path / "checkpoint", tmp_path / "out", base=tiny_llama()).status == "identical"
    CHOSEN.save(tmp_path / "checkpoint/neurons.safetensors")  # as a Trainer does
    with pytest.raises(UserError, match="two/ has another adapter of the same neurons"):
        export_checkpoint(tmp_path / "checkpoint", tmp_path / "out", base=tiny_llama())
    assert export_checkpoint(tmp_path / "checkpoint/two", tmp_path / "out", base=tiny_llama()).status == "identical"


def test_difference_of_half_precision_weights_is_exact():
    base, model = tiny_llama().bfloat16(), tiny_llama().bfloat16()
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight[3] = torch.linspace(0.001, 10, 42)
    (delta,) = weight_deltas(model, base, NeuronSet({(0, "up"): [3]}), {}).values()
    assert torch.equal(delta.added_to(base.model.layers[0].mlp.up_proj.weight).bfloat16(), weight)


def test_adapter_names_the_base_rather_than_the_trained_model():
    base, model = tiny_llama(), tiny_llama()
    base.name_or_path, model.name_or_path = "the/base", "the/trained"
    assert Trained.of(model, base, CHOSEN).base_name == "the/base"


def test_adapters_name_the_commit_of_their_base(tmp_path, monkeypatch):
    """A hub repository's other revisions have other weights: an adapter on them would be another model."""
    base = tiny_llama()
    base.name_or_path, base.config._commit_hash = "me/mine", "abc123"
    lora = equal_lora(CHOSEN, base)[0]
    model = get_peft_model(base, NeuronConfig(neurons=CHOSEN))
    model.save_pretrained(tmp_path / "adapter")
    for to in ("lora", "delta"):
        export_checkpoint(model, tmp_path / to, to=to)
    configs = [tmp_path / name / "adapter_config.json" for name in ("adapter", "lora", "delta")]
    revisions = [json.loads(config.read_text())["revision"] for config in configs]
    assert [lora.revision, *revisions] == ["abc123"] * 4
    assert json.loads((tmp_path / "lora/manifest.json").read_text())["revision"] == "abc123"
    asked = []

    def read_model(name, key, revision=None, **settings):
        asked.append((name, revision))
        return tiny_llama()

    monkeypatch.setattr(trained_module, "read_model", read_model)
    export_checkpoint(tmp_path / "adapter", tmp_path / "out")
    export_checkpoint(tmp_path / "adapter", tmp_path / "out", base="me/other")
    assert asked == [("me/mine", "abc123"), ("me/other", None)]
