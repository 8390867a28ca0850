"""The model card's metadata is YAML that the hub reads."""

from huggingface_hub import ModelCard

from agnostic_train.export.model_card import model_card
from agnostic_train.recipe import CorpusSection, ModelSection, Recipe, TrainingSection


def card_of(name="my/model", **arguments):
    recipe = Recipe(
        model=ModelSection(name=name),
        corpus=CorpusSection(path="text", languages=["no", "sw"]),
        training=TrainingSection(languages=["no", "sw"], arguments=arguments),
        output_dir="out",
    )
    return model_card(recipe, {"strategy": "shared", "reason": "shared of sw", "neurons": {"q": 2, "k": 0}})


def test_norwegian_is_a_language():
    text = card_of(logging_steps=5.0, learning_rate=1e-3)
    card = ModelCard(text)
    assert card.data.language == ["no", "sw"] and card.data.base_model == "my/model"
    assert card.data.library_name == "transformers" and card.data.tags == ["agnostic-train"]
    assert "update: compact; logging_steps 5, learning_rate 0.001" in text and "neurons trained: q 2\n" in text


def test_a_card_holds_no_path(tmp_path):
    (tmp_path / "zero3.json").write_text("{}")
    text = card_of(str(tmp_path / "base"), deepspeed=str(tmp_path / "zero3.json"))
    assert str(tmp_path) not in text and "# base, enhanced for no, sw" in text and "deepspeed zero3.json" in text
