"""Turning sentences into token ids and padded batches."""

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
from agnostic_train.processes import process_index
from agnostic_train.recipe import CorpusSection

Example = dict[str, np.ndarray]
"""A sequence to train on: its `input_ids` as int32, which take a quarter of the memory of a list."""

# Sentences per tokenizer call, limited because its output takes far more memory than the token ids alone.
_SENTENCES_AT_ONCE = 1000
SAMPLE = 200
"""The number of sentences whose length is measured where an estimate is enough."""

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Encoder:
    """Turns sentences into token ids, following the recipe's corpus keys and the model's limits.

    Attributes:
        add_bos: whether sentences begin with the beginning-of-sequence token; None leaves it to the tokenizer.
        max_length: in tokens; longer sentences are cut, and the log says how many. None means no limit.
        vocab_size: the size of the model's vocabulary; None if it isn't known.
    """

    tokenizer: PreTrainedTokenizerBase
    add_bos: bool | None
    max_length: int | None
    pad_id: int
    vocab_size: int | None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, section: CorpusSection, config) -> "Encoder":
        """Makes an encoder for a model's config, and logs what it had to decide.

        Raises:
            UserError: the tokenizer has no token to pad with, or none to begin with though `corpus.add_bos` is true.
        """
        config = config.get_text_config()
        pad_id = _pad_id(tokenizer)
        if pad_id >= config.vocab_size:
            eos_id = tokenizer.eos_token_id
            logger.warning_once(
                f"the tokenizer pads with token {pad_id}, the model's vocabulary has {config.vocab_size}: padding with "
                "another token, always masked"
            )
            pad_id = eos_id if eos_id is not None and eos_id < config.vocab_size else 0
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
        """Encodes each sentence as a dict: `input_ids`, `special_tokens_mask` (lists of int), `num_bytes` (int).

        `num_bytes` counts the UTF-8 bytes that the kept tokens cover. `purpose` names the text in messages.
        """
        return list(self._encoded(sentences, purpose))

    def _encoded(self, sentences: Sequence[str], purpose: str, to_train: bool = False) -> Iterator[dict]:
        """Yields what `encode` lists; with `to_train`, `input_ids` alone, with an end-of-sequence token added."""
        tokenizer, num_cut = self.tokenizer, 0
        with_offsets = tokenizer.is_fast and not to_train
        for start in range(0, len(sentences), _SENTENCES_AT_ONCE):
            part = list(sentences[start : start + _SENTENCES_AT_ONCE])
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
                        f"{purpose}: the tokenizer makes no tokens for sentence {start + place + 1}, "
                        f"{sentence[:60]!r}; take it out"
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
        if num_cut and process_index() == 0:
            # Once, although several stages and processes encode the same text.
            logger.warning_once(f"{purpose}: {num_cut} of {len(sentences)} sentences cut at {self.max_length} tokens")

    def _begun(
        self, ids: list[int], special: list[int], offsets: list[tuple[int, int]] | None
    ) -> tuple[list[int], list[int], list[tuple[int, int]] | None]:
        """Adds or removes the beginning-of-sequence token of an encoded sentence, as `add_bos` says."""
        bos = self.tokenizer.bos_token_id
        if len(special) != len(ids):  # the mask of some slow tokenizers leaves out the tokens that they add
            all_special = set(self.tokenizer.all_special_ids)
            special = [int(token in all_special) for token in ids]
        if self.add_bos and ids[:1] != [bos]:
            return [bos, *ids], [1, *special], None if offsets is None else [(0, 0), *offsets]
        # If the text itself spells out the token, it isn't marked as special, and is kept.
        if self.add_bos is False and ids[:1] == [bos] and special[:1] == [1]:
            return ids[1:], special[1:], None if offsets is None else offsets[1:]
        return ids, special, offsets

    def _covered(self, sentence: str, kept: list[int], offsets: Sequence[tuple[int, int]] | None) -> str:
        """Returns the text of the kept tokens. `offsets` are those of all tokens, None with a slow tokenizer."""
        if offsets is None:
            return self.tokenizer.decode(kept, skip_special_tokens=True)
        return sentence[: max((end for _, end in offsets[: len(kept)]), default=0)]

    def batches(
        self, sentences: Sequence[str], purpose: str, batch_size: int, skip_special_tokens: bool = False
    ) -> list[dict[str, torch.Tensor]]:
        """Padded batches of sentences of similar length, the longest first.

        The longest come first so that a lack of memory shows at once, and so that the self-check sees them. The
        composition of the batches depends only on the sentences and `batch_size`.

        Args:
            skip_special_tokens: adds `special_tokens_mask`, int64 (batch, length), which leaves special tokens out of
                impacts.

        Returns: batches of `input_ids` and `attention_mask`, int64 (batch, length), `num_bytes` and `sentence_index`,
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
        """Encodes sentences to train on, each ended by the end-of-sequence token (unless cut, or without one)."""
        return [_example(row["input_ids"]) for row in self._encoded(sentences, purpose, to_train=True)]

    def packed_examples(self, sentences: Sequence[str], purpose: str) -> list[Example]:
        """Encodes sentences to train on and joins them into sequences of `max_length` tokens.

        Each sentence ends with the end-of-sequence token. None is cut: it continues in the next sequence. The last
        sequence is shorter, and left out if it is one token.

        Raises:
            UserError: the tokenizer has no end-of-sequence token.
        """
        assert self.max_length is not None
        self.check_packing()
        rows = replace(self, max_length=None)._encoded(sentences, purpose, to_train=True)
        tokens = chain.from_iterable(row["input_ids"] for row in rows)
        # When no tokens are left, the lambda returns an empty list, which ends the iteration.
        packed = [_example(ids) for ids in iter(lambda: list(islice(tokens, self.max_length)), [])]
        return packed[:-1] if len(packed) > 1 and len(packed[-1]["input_ids"]) == 1 else packed

    def sentences_packed(self, sentences: Sequence[str], purpose: str) -> float:
        """Estimates how many sentences a packed sequence holds, from the lengths of the first `SAMPLE` of them."""
        assert self.max_length is not None
        first = replace(self, max_length=None)._encoded(sentences[:SAMPLE], purpose, to_train=True)
        return self.max_length / fmean(len(row["input_ids"]) for row in first)

    def check_packing(self) -> None:
        """Raises `UserError` if the tokenizer has no end-of-sequence token."""
        if self.tokenizer.eos_token_id is None:
            raise UserError(
                "training.packing: the tokenizer has no end-of-sequence token to separate sentences; set it to false"
            )

    def collate(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """Makes a training batch: `input_ids`, `attention_mask`, `labels` (-100 at padding), int64 (batch, length)."""
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
    """Makes padded batches of one language's texts, for `detect_neurons`, `perplexity` and similar functions.

    Texts of similar length are batched together, the longest first. A batch holds `input_ids` and `attention_mask`,
    int64 (batch, length), `num_bytes`, for bits per byte, and `sentence_index`, each text's index in `texts`, int64
    (batch,).

    Args:
        texts: each text counts as one sentence in detection, whatever its length; the paper uses single sentences.
        tokenizer: the model's own. It adds its usual special tokens; only `add_bos` changes this.
        batch_size: texts per batch.
        max_length: in tokens; longer texts are cut, and a log line says how many. By default the tokenizer's own limit,
            if it has one.
        add_bos: whether texts begin with the beginning-of-sequence token; by default the tokenizer decides.

    Raises:
        UserError: the tokenizer makes no tokens for a text, has no token to pad with, or no beginning-of-sequence token
            though `add_bos` is true.
        TypeError: `texts` is a single text or a mapping, or holds something other than text.
        ValueError: `batch_size` or `max_length` is below 1.
    """
    if isinstance(texts, (str, Mapping)):
        received = "one" if isinstance(texts, str) else "a mapping: take one language's, or one column"
        raise TypeError(f"texts: expected several texts, such as a list, not {received}")
    texts = list(texts)
    if non_texts := [it for it in texts if not isinstance(it, str)]:
        raise TypeError(f"texts: expected text, got {type(non_texts[0]).__name__}")
    if batch_size < 1 or (max_length is not None and max_length < 1):
        raise ValueError(f"batch_size and max_length must be at least 1, not {batch_size} and {max_length}")
    if add_bos and tokenizer.bos_token_id is None:
        raise UserError("add_bos: the tokenizer has no beginning-of-sequence token")
    # If a tokenizer has no limit, its model_max_length is a number that no text reaches.
    limit = int(tokenizer.model_max_length) if max_length is None else max_length
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
