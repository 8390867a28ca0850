"""From sentences to token ids and padded batches."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from statistics import fmean

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from agnostic_train.errors import UserError
from agnostic_train.recipe import CorpusSection

Example = dict[str, np.ndarray]
"""A sequence to train on: its `input_ids`, int32, which take a quarter of the memory that a list of them would."""

# Sentences a call of the tokenizer: what it returns takes far more memory than their tokens.
_AT_ONCE = 1000
SAMPLE = 200
"""Of how many sentences the length is looked at, where an estimate will do."""

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Encoder:
    """Turns sentences into token ids, by the recipe's corpus keys and the model's limits.

    add_bos: None leaves it to the tokenizer. max_length: in tokens; longer sentences are cut, and counted. vocab_size: of
    the model, None if that isn't known.
    """

    tokenizer: PreTrainedTokenizerBase
    add_bos: bool | None
    max_length: int | None
    pad_id: int
    vocab_size: int | None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, section: CorpusSection, config) -> "Encoder":
        """An encoder for a model's config; says once what it had to decide.

        Raises:
            UserError: no token to pad with, no beginning-of-sequence token where one is asked for.
        """
        config = config.get_text_config()
        pad_id = _pad_id(tokenizer)
        if section.add_bos and tokenizer.bos_token_id is None:
            raise UserError("corpus.add_bos: the tokenizer has no beginning-of-sequence token; set it to false")
        positions = getattr(config, "max_position_embeddings", None)
        limits = [limit for limit in (section.max_length, positions) if limit]
        if section.max_length and min(limits) < section.max_length:
            logger.warning_once(
                f"corpus.max_length: the model has {positions} positions; sentences are cut at so many tokens"
            )
        return cls(tokenizer, section.add_bos, min(limits, default=None), pad_id, config.vocab_size)

    def encode(self, sentences: Sequence[str], purpose: str) -> list[dict]:
        """One dict a sentence: `input_ids`, `special_tokens_mask` (lists of int), `num_bytes` (int).

        num_bytes counts the UTF-8 bytes that the kept tokens cover.
        """
        return list(self._encoded(sentences, purpose))

    def _encoded(self, sentences: Sequence[str], purpose: str, to_train: bool = False) -> Iterator[dict]:
        """As `encode`; `to_train`, `input_ids` alone, closed by the end-of-sequence token."""
        tokenizer, num_cut = self.tokenizer, 0
        with_offsets = tokenizer.is_fast and not to_train
        for start in range(0, len(sentences), _AT_ONCE):
            part = list(sentences[start : start + _AT_ONCE])
            encoded = tokenizer(
                part,
                return_special_tokens_mask=True,
                return_offsets_mapping=with_offsets,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )
            for place, sentence in enumerate(part):
                offsets = encoded["offset_mapping"][place] if with_offsets else None
                ids, special, offsets = self._begun(
                    encoded["input_ids"][place], encoded["special_tokens_mask"][place], offsets
                )
                if to_train and tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
                    ids = [*ids, tokenizer.eos_token_id]
                if not ids:
                    raise UserError(
                        f"{purpose}: the tokenizer makes no token of number {start + place + 1}, {sentence[:60]!r}; take it "
                        "out"
                    )
                kept = ids[: self.max_length]
                num_cut += len(kept) < len(ids)
                if self.vocab_size is not None and max(kept) >= self.vocab_size:
                    raise UserError(
                        f"model.name: its tokenizer gives token {max(kept)}, the model's vocabulary has "
                        f"{self.vocab_size}; the two don't belong together"
                    )
                if to_train:
                    yield {"input_ids": kept}
                    continue
                text = sentence
                if len(kept) < len(ids):
                    text = self._covered(sentence, kept, offsets)
                num_bytes = len(text.encode())
                yield {"input_ids": kept, "special_tokens_mask": special[: len(kept)], "num_bytes": num_bytes}
        if num_cut:
            # Several stages read the same text: once is enough.
            logger.warning_once(f"{purpose}: {num_cut} of {len(sentences)} sentences cut at {self.max_length} tokens")

    def _begun(
        self, ids: list[int], special: list[int], offsets: list[tuple[int, int]] | None
    ) -> tuple[list[int], list[int], list[tuple[int, int]] | None]:
        """What the tokenizer made of a sentence, with the beginning-of-sequence token or without, as `add_bos` says."""
        bos = self.tokenizer.bos_token_id
        if self.add_bos and ids[:1] != [bos]:
            return [bos, *ids], [1, *special], None if offsets is None else [(0, 0), *offsets]
        # One that the text itself spells out isn't special, and stays.
        if self.add_bos is False and ids[:1] == [bos] and special[0]:
            return ids[1:], special[1:], None if offsets is None else offsets[1:]
        return ids, special, offsets

    def _covered(self, sentence: str, kept: list[int], offsets: Sequence[tuple[int, int]] | None) -> str:
        """The text of the tokens that are kept. offsets: of all tokens; None of a slow tokenizer."""
        if offsets is None:
            return self.tokenizer.decode(kept, skip_special_tokens=True)
        return sentence[: max((end for _, end in offsets[: len(kept)]), default=0)]

    def batches(
        self, sentences: Sequence[str], purpose: str, batch_size: int, skip_special_tokens: bool = False
    ) -> list[dict[str, torch.Tensor]]:
        """Padded batches of sentences of similar length, the longest first.

        What the longest need in memory shows at once, and the self-check sees them. The composition of the batches depends
        on the sentences and `batch_size` alone. skip_special_tokens adds the `special_tokens_mask` that leaves such
        tokens out of impacts.

        Returns: each with `input_ids` and `attention_mask`, int64 (batch, length), `num_bytes` and `sentence_index`,
            int64 (batch,).
        """
        rows = sorted(enumerate(self.encode(sentences, purpose)), key=lambda row: -len(row[1]["input_ids"]))
        batches = []
        for start in range(0, len(rows), batch_size):
            indices, part = zip(*rows[start : start + batch_size], strict=True)
            batch = self._padded(part) | {
                "num_bytes": torch.tensor([row["num_bytes"] for row in part]),
                "sentence_index": torch.tensor(indices),
            }
            if skip_special_tokens:
                special = [torch.tensor(row["special_tokens_mask"]) for row in part]
                batch["special_tokens_mask"] = pad_sequence(special, batch_first=True)
            batches.append(batch)
        return batches

    def examples(self, sentences: Sequence[str], purpose: str) -> list[Example]:
        """Sentences to train on, as `input_ids`, each closed by the end-of-sequence token."""
        return [_example(row["input_ids"]) for row in self._encoded(sentences, purpose, to_train=True)]

    def packed_examples(self, sentences: Sequence[str], purpose: str) -> list[Example]:
        """Sentences to train on, as `input_ids` of `max_length` tokens, one sentence joined to the next, none cut off.

        Each is closed by the end-of-sequence token. The last sequence is shorter, and left out if it is one token.

        Raises:
            UserError: the tokenizer has no end-of-sequence token.
        """
        assert self.max_length is not None
        self.check_packing()
        rows = replace(self, max_length=None)._encoded(sentences, purpose, to_train=True)
        tokens = chain.from_iterable(row["input_ids"] for row in rows)
        # The last call finds no token left, and its empty list ends the sequences.
        packed = [_example(ids) for ids in iter(lambda: list(islice(tokens, self.max_length)), [])]
        return packed[:-1] if len(packed) > 1 and len(packed[-1]["input_ids"]) == 1 else packed

    def sentences_packed(self, sentences: Sequence[str], purpose: str) -> float:
        """About how many sentences a packed sequence takes, by the length of the first of them."""
        assert self.max_length is not None
        first = replace(self, max_length=None)._encoded(sentences[:SAMPLE], purpose, to_train=True)
        return self.max_length / fmean(len(row["input_ids"]) for row in first)

    def check_packing(self) -> None:
        """Raises `UserError` if the tokenizer has no end-of-sequence token."""
        if self.tokenizer.eos_token_id is None:
            raise UserError(
                "training.packing: the tokenizer has no end-of-sequence token to stand between sentences; set it to false"
            )

    def collate(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """A training batch: `input_ids`, `attention_mask` and `labels` (-100 at padding), int64 (batch, length)."""
        batch = self._padded(rows)
        return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}

    def _padded(self, rows: Sequence[dict]) -> dict[str, torch.Tensor]:
        ids = [torch.as_tensor(row["input_ids"], dtype=torch.int64) for row in rows]
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_id),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        }


def batches_of(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int = 16,
    max_length: int | None = None,
    add_bos: bool | None = None,
) -> list[dict[str, torch.Tensor]]:
    """Makes padded batches of one language's texts, as `detect_neurons`, `perplexity` and the others take them.

    Texts of similar length come together, the longest first. A batch holds `input_ids` and `attention_mask`, int64
    (texts, length), `num_bytes`, for bits per byte, and `sentence_index`, each text's place in `texts`, int64 (texts,).

    Args:
        texts: each is what detection calls a sentence, whatever it is; a sentence a text is what the paper has.
        tokenizer: the model's own. Special tokens are added as it does by itself, except by `add_bos`.
        batch_size: texts per batch.
        max_length: in tokens: what is longer is cut, and a log line counts how many were. Without it, the tokenizer's
            own limit, if it has one.
        add_bos: whether texts begin with the beginning-of-sequence token; as the tokenizer does by default.

    Raises:
        UserError: a text of which the tokenizer makes no token, or a tokenizer without a token to pad with.
        TypeError: one text where several were expected, or what isn't text.
        ValueError: `batch_size` or `max_length` is below 1.
    """
    if isinstance(texts, (str, Mapping)):
        what = "one" if isinstance(texts, str) else "a mapping: take one language's, or one column"
        raise TypeError(f"texts: expected several texts, such as a list, not {what}")
    texts = list(texts)
    if strange := [it for it in texts if not isinstance(it, str)]:
        raise TypeError(f"texts: expected text, got {type(strange[0]).__name__}")
    if batch_size < 1 or (max_length is not None and max_length < 1):
        raise ValueError(f"batch_size and max_length must be at least 1, not {batch_size} and {max_length}")
    if add_bos and tokenizer.bos_token_id is None:
        raise UserError("add_bos: the tokenizer has no beginning-of-sequence token")
    # A tokenizer without a limit gives a number that no text reaches.
    limit = tokenizer.model_max_length if max_length is None else max_length
    encoder = Encoder(tokenizer, add_bos, limit, _pad_id(tokenizer), vocab_size=None)
    return encoder.batches(texts, "texts", batch_size)


def _example(ids: Sequence[int]) -> Example:
    return {"input_ids": np.array(ids, dtype=np.int32)}


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id
    if tokenizer.eos_token_id is None:
        raise UserError("model.name: its tokenizer has neither a pad nor an end-of-sequence token; set one")
    logger.warning("the tokenizer has no pad token: padding with its end-of-sequence token, always masked")
    return tokenizer.eos_token_id
