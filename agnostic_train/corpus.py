"""Text in several languages: from files to sentences for each purpose, and from sentences to padded batches."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from agnostic_train.files import UserError, hash_file
from agnostic_train.recipe import CorpusSection

logger = logging.get_logger(__name__)

PURPOSES = ("detection", "training", "validation", "test")


@dataclass(frozen=True)
class LanguageText:
    """One language's sentences by purpose; no sentence serves two.

    detection and training come from the train file, validation selects (scores, strategies), test only judges.
    """

    language: str
    detection: list[str]
    training: list[str]
    validation: list[str]
    test: list[str]


@dataclass(frozen=True)
class Corpus:
    """Every language's text, and the SHA-256 of each file that it came from."""

    texts: dict[str, LanguageText]
    hashes: dict[str, str]

    @property
    def languages(self) -> list[str]:
        return list(self.texts)


def load_corpus(section: CorpusSection, path: str | Path) -> Corpus:
    """Reads `{lang}.train.txt`, `{lang}.valid.txt` and, if there, `{lang}.test.txt`: a sentence a line.

    Without a test file every second line of valid is the test text, and only the others ever select anything. Empty
    lines and repeated sentences are dropped; the order is drawn by `corpus.seed`.

    Args:
        section: the recipe's `corpus`.
        path: the folder.

    Raises:
        UserError: a missing, empty or non-UTF-8 file, fewer sentences than asked for, or text in two splits.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"corpus.path: {path} isn't a folder")
    texts, hashes = {}, {}
    for language in section.languages:
        splits = {}
        for split in ("train", "valid", "test"):
            file = path / f"{language}.{split}.txt"
            if split == "test" and not file.exists():
                continue
            splits[split] = _read_sentences(file, language)
            hashes[file.name] = hash_file(file)
        if "test" not in splits:
            if len(splits["valid"]) < 2:
                raise UserError(
                    f"{path / f'{language}.valid.txt'}: one sentence can't be shared by validation and test"
                )
            splits["test"], splits["valid"] = splits["valid"][1::2], splits["valid"][0::2]
        _check_disjoint(language, splits, path)
        texts[language] = _by_purpose(section, language, splits, path)
    return Corpus(texts, hashes)


def _read_sentences(file: Path, language: str) -> list[str]:
    try:
        lines = file.read_bytes().decode("utf-8-sig").split("\n")
    except FileNotFoundError:
        raise UserError(f"corpus.languages: {language!r} has no file {file}; add it or take the language out") from None
    except IsADirectoryError:
        raise UserError(f"{file}: a folder, where the text of {language!r} was expected") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 at byte {error.start}; convert it, for example with iconv") from None
    sentences = list(dict.fromkeys(filter(None, (line.strip() for line in lines))))
    if not sentences:
        raise UserError(f"{file}: has no sentence; a sentence a line is expected")
    return sentences


def _check_disjoint(language: str, splits: dict[str, list[str]], path: Path) -> None:
    seen: dict[str, str] = {}
    shared: list[str] = []
    for split, sentences in splits.items():
        shared += [sentence for sentence in sentences if seen.setdefault(sentence, split) != split]
    if shared:
        examples = "; ".join(repr(sentence[:60]) for sentence in shared[:3])
        raise UserError(
            f"{path}: {len(shared)} sentences of {language!r} stand in two of its train, valid and test text, such as "
            f"{examples}; take them out of one"
        )


def _by_purpose(section: CorpusSection, language: str, splits: dict[str, list[str]], path: Path) -> LanguageText:
    # A generator of its own per language: adding a language doesn't change another's sample.
    train = list(splits["train"])
    random.Random(f"{section.seed} {language}").shuffle(train)
    wanted = {
        "detection": (train, section.detection_sentences, "train"),
        "validation": (splits["valid"], section.validation_sentences, "valid"),
        "test": (splits["test"], section.test_sentences, "test"),
    }
    taken = {}
    for purpose, (sentences, count, split) in wanted.items():
        if count is not None and len(sentences) < count:
            raise UserError(
                f"corpus.{purpose}_sentences: {count} asked for, {language!r} has {len(sentences)} {split} sentences "
                f"in {path}"
            )
        taken[purpose] = sentences[:count]
    training = train[section.detection_sentences :][: section.training_sentences]
    return LanguageText(language, training=training, **taken)


@dataclass(frozen=True)
class Encoder:
    """Turns sentences into token ids, by the recipe's corpus keys and the model's limits.

    add_bos: None leaves it to the tokenizer. max_length: in tokens; longer sentences are cut, and counted.
    """

    tokenizer: PreTrainedTokenizerBase
    add_bos: bool | None
    max_length: int | None
    pad_id: int
    vocab_size: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, section: CorpusSection, config) -> "Encoder":
        """An encoder for a model's config; says once what it had to decide.

        Raises:
            UserError: no token to pad with, no beginning-of-sequence token where one is asked for.
        """
        config = config.get_text_config()
        pad_id = tokenizer.pad_token_id
        if pad_id is None:
            pad_id = tokenizer.eos_token_id
            if pad_id is None:
                raise UserError("model.name: its tokenizer has neither a pad nor an end-of-sequence token; set one")
            logger.warning("the tokenizer has no pad token: padding with its end-of-sequence token, always masked")
        if section.add_bos and tokenizer.bos_token_id is None:
            raise UserError("corpus.add_bos: the tokenizer has no beginning-of-sequence token; set it to false")
        limits = [limit for limit in (section.max_length, getattr(config, "max_position_embeddings", None)) if limit]
        return cls(tokenizer, section.add_bos, min(limits, default=None), pad_id, config.vocab_size)

    def encode(self, sentences: Sequence[str], purpose: str, add_eos: bool = False) -> list[dict]:
        """One dict a sentence: `input_ids`, `special_tokens_mask` (lists of int), `num_bytes` (int).

        num_bytes counts the UTF-8 bytes that the kept tokens cover.
        """
        if not sentences:
            return []
        tokenizer = self.tokenizer
        encoded = tokenizer(
            list(sentences),
            add_special_tokens=self.add_bos is not False,
            return_special_tokens_mask=True,
            return_offsets_mapping=tokenizer.is_fast,
            return_attention_mask=False,
            verbose=False,
        )
        rows, num_cut = [], 0
        for index, sentence in enumerate(sentences):
            ids, special = encoded["input_ids"][index], encoded["special_tokens_mask"][index]
            ends = [end for _, end in encoded["offset_mapping"][index]] if tokenizer.is_fast else None
            if self.add_bos and ids[:1] != [tokenizer.bos_token_id]:
                ids, special = [tokenizer.bos_token_id, *ids], [1, *special]
                ends = ends and [0, *ends]
            if add_eos and tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
                ids, special = [*ids, tokenizer.eos_token_id], [*special, 1]
                ends = ends and [*ends, len(sentence)]
            if self.max_length is not None and len(ids) > self.max_length:
                num_cut += 1
                ids, special = ids[: self.max_length], special[: self.max_length]
                kept = (
                    sentence[: max(ends[: self.max_length])]
                    if ends
                    else tokenizer.decode(ids, skip_special_tokens=True)
                )
                num_bytes = len(kept.encode())
            else:
                num_bytes = len(sentence.encode())
            if not ids:
                raise UserError(f"{purpose}: the tokenizer makes no token of {sentence[:60]!r}; take the line out")
            if max(ids) >= self.vocab_size:
                raise UserError(
                    f"model.name: its tokenizer gives token {max(ids)}, the model's vocabulary has {self.vocab_size}; "
                    "the two don't belong together"
                )
            rows.append({"input_ids": ids, "special_tokens_mask": special, "num_bytes": num_bytes})
        if num_cut:
            logger.warning(f"{purpose}: {num_cut} of {len(rows)} sentences cut at {self.max_length} tokens")
        return rows

    def batches(
        self, sentences: Sequence[str], purpose: str, batch_size: int, skip_special_tokens: bool = False
    ) -> list[dict[str, torch.Tensor]]:
        """Padded batches of sentences of like length, the longest first: `input_ids`, `attention_mask` int64 (batch, length), `num_bytes`.

        What the longest need in memory shows at once, and the self-check sees them. Their composition depends on the sentences and `batch_size` alone. skip_special_tokens adds the
        `special_tokens_mask` that leaves such tokens out of impacts.
        """
        rows = sorted(self.encode(sentences, purpose), key=lambda row: -len(row["input_ids"]))
        batches = []
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            batch = self._padded(part) | {"num_bytes": torch.tensor([row["num_bytes"] for row in part])}
            if skip_special_tokens:
                special = [torch.tensor(row["special_tokens_mask"]) for row in part]
                batch["special_tokens_mask"] = pad_sequence(special, batch_first=True)
            batches.append(batch)
        return batches

    def collate(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """A training batch: `input_ids`, `attention_mask` and `labels` (-100 at padding), int64 (batch, length)."""
        batch = self._padded(rows)
        return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}

    def _padded(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_id),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        }


def training_examples(encoder: Encoder, corpus: Corpus, languages: Sequence[str]) -> list[dict[str, list[int]]]:
    """The training sentences of some languages as `input_ids`, each closed by the end-of-sequence token."""
    examples = []
    for language in languages:
        sentences = corpus.texts[language].training
        if not sentences:
            raise UserError(
                f"corpus.detection_sentences: detection takes every train sentence of {language!r} and leaves none "
                "to train on; lower it or add text"
            )
        rows = encoder.encode(sentences, f"training text of {language}", add_eos=True)
        examples += [{"input_ids": row["input_ids"]} for row in rows]
    return examples
