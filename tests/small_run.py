"""Fixtures of the integration tests: a small corpus, model and recipe, and the command line in this process."""

import shutil

import pytest
from conftest import tiny_llama

from agnostic_train.cli import main
from agnostic_train.quickstart.phrasebook import phrasebook
from agnostic_train.quickstart.tiny_model import build_tokenizer

RECIPE = """
model: {{name: {root}/model}}
corpus: {{path: {root}/text, languages: [en, sw], detection_sentences: 20, validation_sentences: 10}}
detection: {{top_ratio: 0.2, consistency: 0.5}}
score: {{controls: 1}}
training:
  languages: [sw]
  max_steps: 6
  per_device_train_batch_size: 4
  learning_rate: 1e-2
  logging_steps: 2
  save_steps: 3
  disable_tqdm: true
output_dir: {root}/out
"""


def write_inputs(root):
    """Write `root/text` and `root/model`."""
    (root / "text").mkdir()
    texts = phrasebook(num_train=200, num_valid=30, num_test=30)
    for language in ("en", "sw"):
        for split in ("train", "valid"):
            (root / f"text/{language}.{split}.txt").write_text("\n".join(texts[split][language]), encoding="utf-8")
    tokenizer = build_tokenizer(texts["train"]["en"] + texts["train"]["sw"], vocab_size=400)
    model = tiny_llama(vocab_size=len(tokenizer), initializer_range=0.1)
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """Return a folder with text and a model, which the tests copy."""
    root = tmp_path_factory.mktemp("template")
    write_inputs(root)
    return root


@pytest.fixture
def root(template, tmp_path):
    shutil.copytree(template, tmp_path / "it")
    (tmp_path / "it/recipe.yaml").write_text(RECIPE.format(root=tmp_path / "it"))
    return tmp_path / "it"


def run(root, stage, *flags):
    """Run the command line on `root/recipe.yaml` in this process; return its exit status."""
    return main([stage, str(root / "recipe.yaml"), *flags])


def assert_mistake(root, stage, flags, message, capsys):
    """Check that the command line ends with status 2 and a one-line error that contains `message`."""
    try:
        status = run(root, stage, *flags)
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("agnostic-train: error: ")]
    assert status == 2 and len(lines) == 1 and message in lines[0] and "Traceback" not in error
