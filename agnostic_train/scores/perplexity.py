"""Perplexity over a corpus, and bits per byte, which can be compared across tokenizers.

A sentence's first token isn't scored, although its bytes count, so tokenizers are comparable if all begin sentences
with a token of their own. Across languages only changes are, because a character takes one to four bytes.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from agnostic_train.errors import UserError
from agnostic_train.files import whole_file
from agnostic_train.model.batches import Batch, model_inputs
from agnostic_train.model.decoder import check_predicts_tokens
from agnostic_train.model.inference import left_as_found
from agnostic_train.model.memory import SCORED_AT_ONCE
from agnostic_train.processes import gather_in_order, own_share


class NonFiniteLossError(UserError):
    """The model computes NaN or Inf: it is damaged, or its training diverged."""


# Above 709.8 nats, exp() overflows a float64.
_MAX_NATS = 700.0


@dataclass(frozen=True, eq=False)  # comparing tensors with == gives no single bool
class Perplexity:
    """Negative log-likelihoods of a corpus under a model, in nats (natural logarithms; a nat is 1 / ln 2 bits).

    Attributes:
        sentence_nats: per sentence, float64, (sentences,).
        sentence_tokens: scored tokens per sentence, int64, (sentences,).
        num_bytes: UTF-8 bytes of the sentences; None if the batches didn't carry them.
    """

    sentence_nats: Tensor
    sentence_tokens: Tensor
    num_bytes: int | None

    @property
    def nats(self) -> float:
        """Sum of the scored tokens' negative log-likelihoods."""
        return float(self.sentence_nats.sum())

    @property
    def num_tokens(self) -> int:
        """Number of scored tokens."""
        return int(self.sentence_tokens.sum())

    @property
    def value(self) -> float:
        """The perplexity, exp(nats per scored token); infinite where that overflows."""
        nats_per_token = self.nats / self.num_tokens
        return math.exp(nats_per_token) if nats_per_token < _MAX_NATS else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """nats / ln 2 / bytes; None without `num_bytes` in every batch."""
        return None if self.num_bytes is None else self.nats / math.log(2) / self.num_bytes


def perplexity(model: nn.Module, batches: Iterable[Batch], *, name: str = "text") -> Perplexity:
    """Token-weighted perplexity of a causal language model, each token scored once.

    A sentence's first real token isn't scored, since nothing real predicts it; padding is excluded. Several processes
    share the batches, and each gets the whole result.

    Args:
        model: left as found.
        batches: `input_ids` and `attention_mask` (sentences, length), optionally `num_bytes` (sentences,) and
            `sentence_index` (sentences,), each sentence's place in the corpus, by which the result is sorted.
        name: the text's name in error messages.

    Raises:
        UserError: there is no token to score, or the model doesn't predict tokens.
        NonFiniteLossError: the loss isn't finite.
        ValueError: a batch of wrong shapes or tokens, or without exactly one number per sentence.
        TypeError: `model` isn't a model; `batches` is a single batch, or batches by language.
    """
    if isinstance(batches, Mapping):
        raise TypeError("batches: got a mapping; expected the batches of one text, such as a list")
    check_predicts_tokens(model)
    with left_as_found(model):
        parts = gather_in_order(_on_cpu([_score_batch(model, batch) for batch in own_share(batches)]))
    nats, tokens = (
        torch.cat([getattr(it, name) for it in parts]) if parts else torch.zeros(0) for name in ("nats", "tokens")
    )
    if not tokens.sum():
        raise UserError(f"corpus: no token to score in the {name}; a sentence needs two tokens")
    places = [it.places for it in parts if it.places is not None]
    if len(places) == len(parts):
        order = torch.cat(places).argsort(stable=True)
        nats, tokens = nats[order], tokens[order]
    counted = [it.num_bytes for it in parts if it.num_bytes is not None]
    result = Perplexity(nats, tokens, sum(counted) if len(counted) == len(parts) else None)
    if not math.isfinite(result.nats) or result.nats / result.num_tokens > _MAX_NATS:
        raise NonFiniteLossError(
            "model.name: its loss is NaN, infinite, or hundreds of nats a token; the model is broken, or its training "
            "diverged (try a lower training.learning_rate)"
        )
    return result


def knows_beginning(model: nn.Module, batches: Iterable[Batch]) -> bool:
    """Whether a model predicts the token after each sentence's first one better than a uniform guess.

    If that is a beginning-of-sequence token and the model wasn't trained with it, training mostly teaches it that.

    Args:
        model: left as found.
        batches: padded on the right.
    """
    # Later tokens have no effect on the prediction of the second one.
    beginnings = [{name: batch[name][:, :2] for name in ("input_ids", "attention_mask")} for batch in batches]
    with left_as_found(model):
        scored = _on_cpu([_score_batch(model, batch) for batch in beginnings])
    nats, num = sum(float(it.nats.sum()) for it in scored), sum(int(it.tokens.sum()) for it in scored)
    return nats <= num * math.log(model.get_output_embeddings().weight.shape[0])


def save_measured(measured: Mapping[str, Perplexity], file: str | Path) -> None:
    """Writes the results of several corpora, by name, as safetensors: each sentence's nats and tokens."""
    tensors, num_bytes = {}, {}
    for name, result in measured.items():
        tensors[f"nats.{name}"], tensors[f"tokens.{name}"] = result.sentence_nats, result.sentence_tokens
        num_bytes[name] = result.num_bytes
    with whole_file(file) as temporary:
        save_file(tensors, temporary, {"num_bytes": json.dumps(num_bytes)})


def load_measured(file: str | Path) -> dict[str, Perplexity]:
    """Reads a file that `save_measured` wrote; raises `UserError` that names the file if it can't be read."""
    try:
        with safe_open(file, framework="pt") as tensors:
            num_bytes = json.loads(tensors.metadata()["num_bytes"])
            return {
                name: Perplexity(tensors.get_tensor(f"nats.{name}"), tensors.get_tensor(f"tokens.{name}"), count)
                for name, count in num_bytes.items()
            }
    except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
        raise UserError(f"{file}: not readable ({error}); delete it, and run again") from None


class _Scored(NamedTuple):
    """One batch's sentences: nats float64, scored tokens int64, and their places in the corpus, if known."""

    nats: Tensor
    tokens: Tensor
    num_bytes: int | None
    places: Tensor | None


def _score_batch(model: nn.Module, batch: Batch) -> _Scored:
    inputs = model_inputs(model, batch)
    logits = model(**inputs).logits
    losses = _token_losses(logits[:, :-1], inputs["input_ids"][:, 1:].to(logits.device))
    scored = inputs["attention_mask"][:, 1:].bool() & inputs["attention_mask"][:, :-1].bool()
    scored = scored.to(losses.device)
    num_bytes, index = (_one_a_sentence(batch, name) for name in ("num_bytes", "sentence_index"))
    return _Scored(
        losses.masked_fill(~scored, 0).sum(1, dtype=torch.float64),
        scored.sum(1),
        None if num_bytes is None else int(num_bytes.sum()),
        None if index is None else index.cpu(),
    )


def _one_a_sentence(batch: Batch, name: str) -> Tensor | None:
    if batch.get(name) is None:
        return None
    numbers, num_sentences = torch.as_tensor(batch[name]), len(batch["input_ids"])
    if numbers.shape != (num_sentences,):
        raise ValueError(f"{name}: expected one for each of {num_sentences} sentences, got {tuple(numbers.shape)}")
    return numbers


def _on_cpu(batches: list[_Scored]) -> list[_Scored]:
    """Moves the results of several batches to the CPU, all at once: each transfer synchronises with the device."""
    if not batches:
        return []
    sizes = [len(batch.tokens) for batch in batches]
    nats, tokens = (torch.cat([getattr(it, name) for it in batches]).cpu().split(sizes) for name in ("nats", "tokens"))
    return [
        batch._replace(nats=its_nats, tokens=its_tokens)
        for batch, its_nats, its_tokens in zip(batches, nats, tokens, strict=True)
    ]


def _token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target: (batch, length), float32 or wider."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    losses = torch.empty(targets.shape, dtype=dtype, device=logits.device)
    rows = max(1, SCORED_AT_ONCE // max(1, targets.shape[1]))
    for start in range(0, len(targets), rows):
        part = slice(start, start + rows)
        # Flattened, so that the softmax is over the last dimension; otherwise it would copy the logits once more.
        losses[part] = nn.functional.cross_entropy(
            logits[part].to(dtype).flatten(0, 1), targets[part].flatten(), reduction="none"
        ).view_as(targets[part])
    return losses
