"""The embedded default's model: a tiny Llama trained from scratch on the phrasebook, with little Swahili.

It is trained at first use and cached under a hash of all that it depends on. Nothing is downloaded.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from agnostic_train.files import whole_directory
from agnostic_train.quickstart.phrasebook import LANGUAGES, phrasebook, write_phrasebook
from agnostic_train.versions import installed_version

SEED = 0
NUM_STEPS = 700
BATCH_SIZE = 64
LEARNING_RATE = 3e-3
SHARE_OF_SENTENCES = {"en": 1.0, "zh": 1.0, "de": 1.0, "fr": 1.0, "sw": 0.03}
"""Fraction of each language's training sentences that the model sees: little Swahili leaves something to enhance."""

_PAD, _BOS, _EOS = "<pad>", "<s>", "</s>"


def cache_directory() -> Path:
    """The folder for this version's corpus and model, in `$AGNOSTIC_TRAIN_CACHE` or the user's cache folder."""
    root = os.environ.get("AGNOSTIC_TRAIN_CACHE")
    if root is None:
        root = str(Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "agnostic_train")
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(source.read_bytes())
    for package in ("torch", "transformers", "tokenizers"):
        digest.update(f"{package} {installed_version(package)}".encode())
    return Path(root) / f"quickstart-{digest.hexdigest()[:16]}"


def quickstart_corpus() -> Path:
    """The folder of the phrasebook's text files, written at first use."""
    return _made_once("corpus", lambda folder: write_phrasebook(folder, SEED))


def quickstart_model() -> Path:
    """The folder of the tiny model's checkpoint, trained at first use (about a minute on two cores)."""
    return _made_once("model", _write_model)


def _write_model(folder: Path) -> None:
    texts = phrasebook(SEED)["train"]
    sentences = [
        sentence
        for language in LANGUAGES
        for sentence in texts[language][: int(SHARE_OF_SENTENCES[language] * len(texts[language]))]
    ]
    tokenizer = build_tokenizer(sentences)
    train_model(tokenizer, sentences).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _made_once(name: str, make: Callable[[Path], object]) -> Path:
    """Returns a folder of the cache, made at first use: the first process makes it while others wait."""
    directory = cache_directory() / name
    if not directory.exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(directory.with_suffix(".lock")):
            if not directory.exists():
                with whole_directory(directory) as temporary:
                    make(temporary)
    return directory


def build_tokenizer(sentences: Sequence[str], vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer that adds no special tokens by itself.

    With `<s>` before every sentence, the model would have to predict each first token without context, and training
    on one language would mainly teach it that text is in that language.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_PAD, _BOS, _EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=_PAD, bos_token=_BOS, eos_token=_EOS, model_max_length=64
    )


def train_model(tokenizer: PreTrainedTokenizerFast, sentences: Sequence[str]) -> LlamaForCausalLM:
    """Trains a grouped-query Llama of about 1.4 M parameters on whole sentences, from random weights."""
    set_seed(SEED)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=160,
            intermediate_size=448,
            num_hidden_layers=4,
            num_attention_heads=5,
            num_key_value_heads=1,
            head_dim=32,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    examples = [{"input_ids": [*ids, tokenizer.eos_token_id]} for ids in tokenizer(list(sentences))["input_ids"]]

    def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id),
            "labels": pad_sequence(ids, batch_first=True, padding_value=-100),
        }

    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=NUM_STEPS,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="cosine",
            warmup_steps=NUM_STEPS // 20,
            weight_decay=0.1,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            dataloader_pin_memory=torch.accelerator.is_available(),
            seed=SEED,
        )
        trainer = Trainer(model, arguments, train_dataset=examples, data_collator=collate)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return model.to("cpu")
