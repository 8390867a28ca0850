"""Estimating the GPU memory that a model takes from its sizes. The formulas are in recipes/README.md, too.

All are in bytes, for one process that holds a whole model. b: bytes per weight; T: tokens per batch; L: its padded
length; h, q, f, V: widths of the hidden state, queries, feed-forward and vocabulary; n: the widths of a layer's norms.

    weights      b * parameters
    trainable    (16 + b) * chosen entries: value, gradient and AdamW's two moments in float32, and a copy in the
                 weights' dtype; if all weights have gradients, 3 * b * parameters
    activations  per layer T * (4 * sum(n) + b * (2 * h + 4 * q + 3 * f)), + T * 8 * heads * L if attention is 'eager',
                 + T * b * (q + f) if all weights have gradients; with gradient checkpointing, T * b * h per layer and
                 the above for one layer
    logits       in training T * V * (2 * b + 8): logits and their gradient, and log-probabilities and their gradient in
                 float32, + T * V * b if logits are soft-capped; if they are only scored, T * V * b + max(L,
                 SCORED_AT_ONCE) * V * 8
"""

from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PreTrainedModel

from agnostic_train.model.decoder import Decoder, Site

GIB = 2**30
SCORED_AT_ONCE = 512
"""The number of tokens whose logits `perplexity` casts to float32 at a time: of a vocabulary of 128k, 0.5 MB each."""
SLACK = 1.1
"""A factor on every estimate, for the allocator's overhead and for what the formulas leave out."""


@dataclass(frozen=True)
class MemoryModel:
    """A model's sizes, as the formulas need them. Widths are those of the largest layer.

    Attributes:
        num_parameters: tied weights count once.
        num_projected: the parameters of all projections: those in which neurons may be chosen.
        norm_widths: the sum over a layer's norms.
        entry_sizes: by site, the number of weights of a neuron.
    """

    num_parameters: int
    num_projected: int
    weight_bytes: int
    num_layers: int
    hidden: int
    queries: int
    feed_forward: int
    vocabulary: int
    norm_widths: int
    num_heads: int
    is_eager: bool
    caps_logits: bool
    entry_sizes: Mapping[Site, int]

    @classmethod
    def of(cls, model: PreTrainedModel, decoder: Decoder) -> "MemoryModel":
        """Reads the sizes from a model, which may be on the meta device."""
        hidden = decoder.layers[0].projections["o"].linear.out_features
        norm_widths = []
        for layer, block in zip(decoder.layers, decoder.backbone.layers, strict=True):
            own = {id(norm): layer.projections[name].num_neurons for name, norm in layer.norms.items()}
            norms = [module for module in block.modules() if "Norm" in type(module).__name__]
            norm_widths.append(sum(own.get(id(norm), hidden) for norm in norms))
        entry_sizes = {site: decoder.projection(site).entry_size for site in decoder.sizes}
        return cls(
            num_parameters=sum(parameter.numel() for parameter in model.parameters()),
            num_projected=sum(entry_sizes[site] * size for site, size in decoder.sizes.items()),
            weight_bytes=model.dtype.itemsize,
            num_layers=len(decoder.layers),
            hidden=hidden,
            queries=max(layer.projections["q"].num_neurons for layer in decoder.layers),
            feed_forward=max(layer.projections["up"].num_neurons for layer in decoder.layers),
            vocabulary=model.get_output_embeddings().out_features,
            norm_widths=max(norm_widths),
            num_heads=max(layer.num_query_heads for layer in decoder.layers),
            is_eager=model.config.get_text_config()._attn_implementation == "eager",
            caps_logits=getattr(model.config.get_text_config(), "final_logit_softcapping", None) is not None,
            entry_sizes=entry_sizes,
        )

    @property
    def weights(self) -> int:
        return self.weight_bytes * self.num_parameters

    def adapter_state(self, num_trainable: int) -> int:
        """Returns the bytes of an adapter's trainable values, their gradients and optimizer state."""
        return (16 + self.weight_bytes) * num_trainable

    def state_in_place(self, num_trainable: int) -> int:
        """Returns the bytes of the gradients and optimizer state of weights that are trained themselves."""
        return 3 * self.weight_bytes * num_trainable

    def layer_activations(self, num_tokens: int, length: int, all_weights: bool = False) -> int:
        """Returns the bytes that one layer keeps for its backward pass over `num_tokens` in sequences of `length`."""
        attention = 8 * self.num_heads * length if self.is_eager else 0
        inputs = self.queries + self.feed_forward if all_weights else 0
        plain = 2 * self.hidden + 4 * self.queries + 3 * self.feed_forward + inputs
        return num_tokens * (4 * self.norm_widths + self.weight_bytes * plain + attention)

    def activations(self, num_tokens: int, length: int, checkpointing: bool, all_weights: bool) -> int:
        layer = self.layer_activations(num_tokens, length, all_weights)
        if checkpointing:
            return self.num_layers * num_tokens * self.weight_bytes * self.hidden + layer
        return self.num_layers * layer

    def trained_logits(self, num_tokens: int) -> int:
        return num_tokens * self.vocabulary * ((2 + self.caps_logits) * self.weight_bytes + 8)

    def scored_logits(self, num_tokens: int, length: int) -> int:
        return self.vocabulary * (num_tokens * self.weight_bytes + max(length, SCORED_AT_ONCE) * 8)
