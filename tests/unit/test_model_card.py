"""The model card's metadata is YAML that the hub reads."""

from huggingface_hub import ModelCard

from agnostic_train.export.model_card import model_card
from agnostic_train.recipe import CorpusSection, ModelSection, Recipe, TrainingSection


def test_norwegian_is_a_language():
    recipe = Recipe(
        model=ModelSection(name="my/model"),
        corpus=CorpusSection(path="text", languages=["no", "sw"]),
        training=TrainingSection(languages=["no", "sw"], arguments={"logging_steps": 5.0, "learning_rate": 1e-3}),
        output_dir="out",
    )
    text = model_card(recipe, {"strategy": "shared", "reason": "as asked for", "neurons": {"q": 2, "k": 0}})
    card = ModelCard(text)
    assert card.data.language == ["no", "sw"] and card.data.base_model == "my/model"
    assert card.data.library_name == "transformers" and card.data.tags == ["agnostic-train"]
    assert "update: compact; logging_steps 5, learning_rate 0.001" in text and "neurons trained: q 2\n" in text
