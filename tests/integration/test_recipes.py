"""--dry-run of every shipped recipe with a stand-in for its model, and the launchers as far as they run here."""

import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from accelerate.commands.config.config_args import load_config_from_file
from packaging.version import Version
from public_models import CONFIGS, PUBLISHED, write_stand_ins
from small_run import RECIPE, write_inputs
from transformers import AutoTokenizer, Qwen3MoeConfig

from agnostic_train.cli import main
from agnostic_train.model.memory import GIB
from agnostic_train.pipeline.plan import make_plan
from agnostic_train.recipe_file import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
MODELS = sorted(path.name for path in RECIPES.iterdir() if path.name in CONFIGS)
OF_MODELS = sorted(path for model in MODELS for path in (RECIPES / model).iterdir())
LANGUAGES = ["en", "zh", "de", "fr", "th", "sw"]


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """Write models of public sizes without weights, a small model with weights, and text in the paper's languages."""
    root = tmp_path_factory.mktemp("stand-ins")
    write_inputs(root)
    write_stand_ins(root, AutoTokenizer.from_pretrained(root / "model"))
    for language in LANGUAGES:
        for split, count in (("train", 60), ("valid", 20)):
            lines = [f"{language} {split} {index} " + "word " * (index % 7) for index in range(count)]
            (root / f"text/{language}.{split}.txt").write_text("\n".join(lines))
    return root


def files_below(*folders):
    return {path: path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*")}


def test_each_model_of_the_paper_has_two_recipes():
    assert set(CONFIGS) == set(MODELS) and len(OF_MODELS) == 18
    assert {path.name for path in OF_MODELS} == {"swahili.yaml", "paper_table1.yaml"}


@pytest.mark.parametrize("recipe", OF_MODELS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_recipe_of_a_model_has_the_papers_settings_and_stated_memory(recipe, stand_ins, tmp_path, monkeypatch, capsys):
    """The recipe follows the paper and states its memory; a dry run on local text succeeds and writes nothing."""
    monkeypatch.chdir(tmp_path)
    model = recipe.parent.name
    before = files_below(stand_ins, RECIPES)
    flags = {"model.name": str(stand_ins / model)}
    plan = make_plan(load_recipe(recipe, flags), "run")
    assert plan.memory.num_parameters / 1e9 == pytest.approx(PUBLISHED[model], abs=0.02)
    assert plan.batch == 128 and plan.length == 1024
    read = load_recipe(recipe)
    assert read.detection.top_ratio == 0.05 and read.corpus.training_sentences == 100_000
    assert read.training.arguments["learning_rate"] == 5e-5 and read.corpus.languages == LANGUAGES
    assert plan.num_steps == math.ceil(100_000 * len(read.training.languages) / 128)
    assert plan.num_sentences["sw"] == {"detection": 1000, "training": 100_000, "validation": 1000, "test": 1000}

    gib = math.ceil(max(phase.total for phase in plan.phases) / GIB)
    name = f"recipes/{model}/{recipe.name}"
    launch = f"accelerate launch --config_file recipes/accelerate/single_gpu.yaml -m agnostic_train run {name}"
    stated = int(re.search(r"with (\d+) GiB by the formulas", recipe.read_text())[1])
    # Earlier versions of transformers keep fewer of Gemma 2's capped logits.
    assert stated == gib or (gib < stated <= 1.05 * gib and Version(transformers.__version__) < Version("5.23"))
    assert launch in recipe.read_text()
    row = re.search(rf"\| `{re.escape(model)}/` \| (\d+) \| (\d+) \|", (RECIPES / "README.md").read_text())
    assert int(row[{"swahili": 1, "paper_table1": 2}[recipe.stem]]) == stated < 80

    local = ["--corpus.dataset=", f"--corpus.path={stand_ins / 'text'}", "--corpus.detection_sentences=20"]
    assert main(["run", str(recipe), "--dry-run", f"--model.name={stand_ins / model}", *local]) == 0
    printed = capsys.readouterr().out
    assert f"{plan.memory.num_parameters:,}" in printed and re.search(r"sw \* +│ +20 │ +40 │ +10 │ +10 ", printed)
    assert not list(tmp_path.iterdir()) and files_below(stand_ins, RECIPES) == before


def test_plan_of_a_vision_language_model_counts_the_text_decoder(stand_ins):
    recipe = load_recipe(RECIPES / "gemma-3-4b/swahili.yaml", {"model.name": str(stand_ins / "gemma-3-4b")})
    plan = make_plan(recipe, "run")
    assert plan.model_class == "Gemma3ForConditionalGeneration" and plan.memory.num_layers == 34
    assert plan.decoder.sizes[(33, "down")] == 10240
    text = [it for name, it in plan.decoder.backbone.named_parameters()]
    assert sum(it.numel() for it in text) / 1e9 == pytest.approx(3.88, abs=0.01)


@pytest.mark.parametrize("stage", ["detect", "score", "train", "export", "evaluate", "report"])
def test_dry_run_of_other_recipes_for_each_stage(stand_ins, tmp_path, monkeypatch, capsys, stage):
    monkeypatch.chdir(tmp_path)
    flags = [f"--model.name={stand_ins / 'model'}", f"--corpus.path={stand_ins / 'text'}"]
    flags += ["--corpus.languages=en,sw", "--corpus.detection_sentences=20", "--corpus.validation_sentences=10"]
    for recipe in ("quickstart.yaml", "real_text.yaml"):
        assert main([stage, str(RECIPES / recipe), "--dry-run", *flags]) == 0
        printed = capsys.readouterr().out
        last = printed[printed.index("GPU memory") :]
        names = ["detect", "score", "train", "export", "evaluate"]
        assert [name for name in names if f"│ {name} " in last] == names[
            : (names.index(stage) + 1 if stage in names else 5)
        ]
    assert not list(tmp_path.iterdir())


def test_dry_run_says_if_a_family_is_not_tested(stand_ins, tmp_path, capsys):
    config = Qwen3MoeConfig(
        vocab_size=1000, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, mlp_only_layers=[0],
    )  # fmt: skip
    shutil.copytree(stand_ins / "model", tmp_path / "model")
    config.architectures = ["Qwen3MoeForCausalLM"]
    config.save_pretrained(tmp_path / "model")
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(root=stand_ins))
    command = ["run", str(tmp_path / "recipe.yaml"), "--dry-run"]
    other, untested = f"--model.name={tmp_path / 'model'}", "family │ qwen3_moe, not among the tested ones"
    expected = {
        (): "family │ llama │",
        (other,): f"{untested}; `detect` first checks",
        (other, "--detection.verify=false"): f"{untested} │",
    }
    for flags, row in expected.items():
        assert main([*command, *flags]) == 0
        assert row in re.sub(" +", " ", capsys.readouterr().out)


def test_dry_run_does_not_create_the_embedded_default(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("AGNOSTIC_TRAIN_CACHE", str(tmp_path / "cache"))
    assert main(["run", str(RECIPES / "quickstart.yaml"), "--dry-run"]) == 2
    assert "made by its first run" in capsys.readouterr().err and not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--model.name=nowhere"], "model.name: can't load the config of nowhere"),
        (["--corpus.languages=en,sw,xx"], "'xx' has no file"),
        (["--training.languages=xx"], "training.languages: 'xx' isn't in"),
        (["--training.optim=adamx"], "training.optim: adamx"),
        (["--training.neurons=none.json"], "training.neurons: no such file"),
        (["--corpus.path=", "--corpus.dataset=x", "--corpus.config_pattern='{lang}'", "--corpus.training_sentences="],
         "corpus.training_sentences"),
        (["--evaluation.languages=xx"], "evaluation.languages: 'xx' has no file"),
        (["--evaluation.parallel=none"], "evaluation.parallel: none isn't a folder"),
        (["--evaluation.tasks=no_such_task"], "evaluation.tasks: "),
        (["--training.learning_rate=-1"], "training.learning_rate: must be at least 0"),
    ],
)  # fmt: skip
def test_dry_run_finds_mistakes(stand_ins, tmp_path, capsys, flags, message):
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(root=stand_ins))
    assert main(["run", str(tmp_path / "recipe.yaml"), "--dry-run", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and not (stand_ins / "out").exists()


def test_dry_run_refuses_unsupported_models_and_foreign_tokenizers(stand_ins, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(root=stand_ins))
    command = ["run", str(tmp_path / "recipe.yaml"), "--dry-run", f"--model.name={tmp_path / 'model'}"]
    shutil.copytree(stand_ins / "model", tmp_path / "model")
    config = (stand_ins / "model/config.json").read_text()
    vocabulary = re.search(r'"vocab_size": (\d+)', config)[0]
    for changed, message in (
        ('{"model_type": "gpt2", "n_embd": 16, "n_head": 2, "n_layer": 1}', "GPT2LMHeadModel has no list of decoder"),
        ('{"model_type": "nonsense"}', "model.name: can't load"),
        ('{"model_type": "t5"}', "model.name: no model can be made of the config"),
        (config.replace(vocabulary, '"vocab_size": 50'), "its tokenizer gives token"),
    ):
        (tmp_path / "model/config.json").write_text(changed)
        assert main(command) == 2
        assert message in capsys.readouterr().err


def test_plan_counts_the_neurons_of_a_file(stand_ins, tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(root=stand_ins))
    (tmp_path / "mine.json").write_text('{"format": "agnostic_train.neurons", "neurons": {"up": {"0": [1, 2]}}}')
    recipe = load_recipe(tmp_path / "recipe.yaml", {"training.neurons": str(tmp_path / "mine.json")})
    assert make_plan(recipe, "run").num_trainable == 2 * 42


def test_plan_counts_every_neuron_that_can_be_related(stand_ins, tmp_path):
    """At consistency 0.5, a neuron may be top in one of two sentences only, and each language may have its own."""
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(root=stand_ins))
    flags = {"training.languages": "en,sw", "detection.consistency": "0.5", "detection.top_ratio": "0.02"}
    plan = make_plan(load_recipe(tmp_path / "recipe.yaml", flags), "run")
    sizes = plan.decoder.sizes
    assert min(sizes.values()) < 50 < max(sizes.values())  # some sites have one top neuron, as the least
    most = {site: min(size, 2 * 2 * max(1, size // 50)) for site, size in sizes.items()}
    assert plan.num_trainable == sum(number * plan.decoder.projection(site).entry_size for site, number in most.items())
    units = {site: size for site, size in sizes.items() if site[1] in ("gate", "up", "down")}
    lape = make_plan(load_recipe(tmp_path / "recipe.yaml", {"detection.method": "lape"}), "run")
    entries = sum(plan.decoder.projection((0, it)).entry_size for it in ("gate", "up", "down"))
    assert lape.num_trainable == round(0.01 * sum(units.values()) / 3) * entries


def test_memory_of_a_comparison_is_that_of_its_largest_training(stand_ins, tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(root=stand_ins))

    def plan(stage, **flags):
        flags = {name.replace("__", "."): value for name, value in flags.items()}
        return make_plan(load_recipe(tmp_path / "recipe.yaml", flags), stage)

    def compared(*strategies):
        compare_plan = plan("compare", comparison__strategies=",".join(strategies))
        assert [phase.name for phase in compare_plan.phases] == ["detect", "compare"]
        return compare_plan.num_trainable, compare_plan.phases[-1].total

    by_strategy = {}
    for strategy in ("shared", "full"):
        alone = plan("train", training__strategy=strategy)
        by_strategy[strategy] = alone.num_trainable, alone.phases[-1].total
    assert compared("shared", "exclusive") == by_strategy["shared"]
    assert compared("shared", "full") == tuple(map(max, *by_strategy.values())) != by_strategy["shared"]


@pytest.mark.parametrize("file", sorted((RECIPES / "accelerate").iterdir()), ids=lambda path: path.stem)
def test_accelerate_reads_its_configs(file):
    config = load_config_from_file(str(file))
    assert config.num_machines == 1 and config.num_processes == (1 if file.stem in ("cpu", "single_gpu") else 8)
    kinds = {"cpu": "NO", "single_gpu": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero3": "DEEPSPEED"}
    assert str(getattr(config.distributed_type, "value", config.distributed_type)) == kinds[file.stem]
    assert (
        f"recipes/accelerate/{file.name}" in file.read_text()
        and f"`{file.name}`" in (RECIPES / "README.md").read_text()
    )


def test_accelerate_launches_a_run_on_the_cpu(stand_ins, tmp_path):
    """The run takes as many steps as the dry run predicts."""
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(root=stand_ins).replace(f"{stand_ins}/out", f"{tmp_path}/out"))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", RECIPES / "accelerate/cpu.yaml"]
    flags = {"training.max_steps": "-1", "training.num_train_epochs": "1", "training.gradient_accumulation_steps": "3"}
    command += [
        "-m",
        "agnostic_train",
        "run",
        tmp_path / "recipe.yaml",
        *(f"--{key}={it}" for key, it in flags.items()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out/report.html").exists()
    plan = make_plan(load_recipe(tmp_path / "recipe.yaml", flags), "run")
    assert plan.num_steps == 4 and "train: 4 steps" in done.stdout


SLURM = RECIPES / "slurm/launch.sh"


def test_slurm_script_starts_one_launcher_per_node(tmp_path):
    """Stand-ins for Slurm's commands and accelerate print what would run, one node after the other."""
    (tmp_path / "srun").write_text('#!/bin/bash\nshift\nfor SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done\n')
    (tmp_path / "scontrol").write_text("#!/bin/bash\necho alpha\necho beta\n")
    (tmp_path / "accelerate").write_text('#!/bin/bash\nprintf "<%s>" "$@"\necho\n')
    for name in ("srun", "scontrol", "accelerate"):
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_GPUS_ON_NODE": "8", "SLURM_NNODES": "2",
        "SLURM_JOB_ID": "43210", "SLURM_JOB_NODELIST": "alpha,beta",
    }  # fmt: skip
    command = ["bash", str(SLURM), "fsdp2", "train", "a recipe.yaml", "--training.max_steps=3"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=RECIPES.parent)
    assert done.returncode == 0, done.stderr
    expected = (
        "<launch><--config_file><recipes/accelerate/fsdp2.yaml><--num_machines><2><--num_processes><16>"
        "<--machine_rank><{}><--main_process_ip><alpha><--main_process_port><27210><-m><agnostic_train><train>"
        "<a recipe.yaml><--training.max_steps=3>"
    )
    assert done.stdout.splitlines() == [expected.format(0), expected.format(1)]
    for arguments, message in (
        ([], "usage: sbatch --nodes=N --gpus-per-node=G recipes/slurm/launch.sh CONFIG"),
        (["none", "train", "x"], f"no such config: {RECIPES.parent}/recipes/accelerate/none.yaml"),
        (["single_gpu", "train", "x"], "starts one process, but the job has 16 GPUs"),
    ):
        wrong = [*command[:2], *arguments]
        refused = subprocess.run(wrong, capture_output=True, text=True, env=environment, cwd=RECIPES.parent)
        assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1 and message in refused.stderr
    one_gpu = [*command[:2], "single_gpu", *command[3:]]
    alone = environment | {"SLURM_GPUS_ON_NODE": "1", "SLURM_NNODES": "1"}
    subprocess.run(one_gpu, capture_output=True, env=alone, cwd=RECIPES.parent, check=True)


def test_deepspeed_starts_processes_without_a_host_file():
    """Its default launcher would train separately on each node, and write the environment to a file."""
    config = load_config_from_file(str(RECIPES / "accelerate/zero3.yaml"))
    assert config.deepspeed_config["deepspeed_multinode_launcher"] == "standard"


def test_slurm_script_passes_shellcheck():
    checker = Path(sys.executable).with_name("shellcheck")
    subprocess.run(["bash", "-n", SLURM], check=True)
    if not checker.exists():
        pytest.skip("shellcheck isn't installed")
    subprocess.run([checker, SLURM], check=True)
