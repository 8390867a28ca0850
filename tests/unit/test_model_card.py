"""The model card has metadata that the Hub reads, and no secrets or local paths."""

from huggingface_hub import ModelCard

from agnostic_train.export.model_card import model_card
from agnostic_train.recipe import CorpusSection, ModelSection, Recipe, TrainingSection


def card_of(name="my/model", evaluation=None, languages=("no", "sw"), **arguments):
    recipe = Recipe(
        model=ModelSection(name=name),
        corpus=CorpusSection(path="text", languages=list(languages)),
        training=TrainingSection(languages=list(languages), arguments=arguments),
        output_dir="out",
    )
    training = {"strategy": "shared", "reason": "shared of sw", "neurons": {"q": 2, "k": 0}}
    return model_card(recipe, training, evaluation=evaluation)


def test_norwegian_language_code_and_metadata():
    text = card_of(logging_steps=5.0, learning_rate=1e-3)
    card = ModelCard(text)
    assert card.data.language == ["no", "sw"] and card.data.base_model == "my/model"
    assert card.data.library_name == "transformers" and card.data.tags == ["agnostic-train"]
    assert "# model, enhanced" not in text and "# my/model, enhanced for no, sw" in text
    assert "- update: compact\n" in card_of()
    assert "update: compact; logging_steps 5, learning_rate 0.001" in text and "neurons trained: q 2\n" in text


def test_only_codes_of_languages_are_in_the_metadata():
    """The hub refuses any others, and with them the whole upload."""
    languages = ["swh_Latn", "zh-Hant", "sw", "swh", "Klingon", "हिन्दी", "a|b", "my-corpus", "pt_BR"]
    assert ModelCard(card_of(languages=languages)).data.language == ["swh", "zh", "sw", "pt"]
    assert ModelCard(card_of(languages=["a|b", "EN"])).data.language is None
    row = {"before": {"bits_per_byte": 2.0}, "after": {"bits_per_byte": 1.9}, "bits_per_byte_change": -0.05}
    assert r"| a\|b * | 2.0000 | 1.9000 | -5.0% |" in card_of(languages=["a|b", "en"], evaluation={"a|b": row})


def test_card_holds_no_local_path(tmp_path):
    (tmp_path / "zero3.json").write_text("{}")
    text = card_of(str(tmp_path / "base"), deepspeed=str(tmp_path / "zero3.json"))
    assert str(tmp_path) not in text and "# base, enhanced for no, sw" in text and "deepspeed zero3.json" in text


def test_card_holds_no_token():
    text = card_of(hub_token="hf_secret", max_steps=5)
    assert "hf_secret" not in text and "hub_token" not in text and "max_steps 5" in text


def test_small_change_keeps_its_sign():
    row = {"before": {"bits_per_byte": 2.0}, "after": {"bits_per_byte": 1.9996}}
    text = card_of(
        evaluation={"no": row | {"bits_per_byte_change": -0.0002}, "en": row | {"bits_per_byte_change": -0.02}}
    )
    assert "| no * | 2.0000 | 1.9996 | -0.02% |" in text and "| en | 2.0000 | 1.9996 | -2.0% |" in text
