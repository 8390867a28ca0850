"""Impacts of all neurons in one forward pass, by hooks on the stock modules; no modeling code is copied.

Feed-forward, v and o impacts come from hooks on `down_proj` and `o_proj`. Q and k impacts need the attention's inputs
after rotation: during the pass the model runs an attention function registered with transformers' `AttentionInterface`,
the library's own extension point. This function computes the same output and also measures the impacts.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from agnostic_train.choices import Attention, check_choice
from agnostic_train.errors import UserError
from agnostic_train.impact.activations import ActivationMeter
from agnostic_train.impact.attention import AttentionInputs, value_impacts
from agnostic_train.impact.feed_forward import column_norms, hidden_unit_impacts, weight_norms
from agnostic_train.impact.pass_cache import PassCache
from agnostic_train.impact.pruning import Work
from agnostic_train.impact.query_key import QueryKeyImpacts
from agnostic_train.model.batches import Batch, model_inputs, real_and_counted
from agnostic_train.model.decoder import (
    FEED_FORWARD_PROJECTIONS,
    PROJECTIONS,
    Decoder,
    Layer,
    Projection,
    Site,
    check_projections,
    find_decoder,
)
from agnostic_train.model.inference import left_as_found

DEFAULT_MEMORY_GB = 2.0
_IMPLEMENTATION = "agnostic_train_impact"


def unverified_impacts(
    model: nn.Module, batch: Batch, projections: Sequence[str] | None = None, attention: Attention = "exact"
) -> dict[Site, Tensor]:
    """`neuron_impacts` without the self-check: correct only for families that pass it."""
    with left_as_found(model), ImpactMeter(model, projections, attention) as meter:
        return meter.measure(batch)


class ImpactMeter:
    """Measures the impacts of batch after batch with hooks installed once; a context manager.

    Inside it the model runs another attention implementation: leave it before using the model for anything else.

    Args:
        memory_gb: bound on the temporaries of the q and k impacts, in GiB.
        top_ratio: prune q and k: the impacts then only tell which neurons are the `num_top` largest of their sentence.
            They are 0 for neurons proven outside. For neurons proven inside they are, on a GPU or with a norm over all
            heads, the middle of a proven interval. If None, every impact is exact.
        activations: also measure the neurons' activations.
        Other arguments: as for `neuron_impacts`.

    Attributes:
        activations: the activations of the latest batch; None if they aren't measured.
    """

    def __init__(
        self,
        model: nn.Module,
        projections: Sequence[str] | None = None,
        attention: Attention = "exact",
        memory_gb: float = DEFAULT_MEMORY_GB,
        top_ratio: float | None = None,
        activations: bool = False,
    ):
        projections = check_projections(projections, model)
        check_choice("attention", attention, Attention)
        self.model = model
        self.decoder: Decoder = find_decoder(model)
        self.decoder.check_on_devices("detection")
        self.projections = projections
        self.activations = ActivationMeter(self.decoder.layers) if activations else None
        self._stack = ExitStack()
        self._cache = PassCache()
        self._observers = [
            LayerObserver(layer, projections, attention, memory_gb, top_ratio, self._cache)
            for layer in self.decoder.layers
        ]

    def __enter__(self) -> "ImpactMeter":
        with ExitStack() as stack:
            for observer in self._observers:
                stack.enter_context(observer.installed())
            if "q" in self.projections or "k" in self.projections:
                stack.enter_context(observed_attention(self._observers, self.decoder.backbone))
            if self.activations is not None:
                stack.enter_context(self.activations.installed())
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception) -> None:
        self._stack.close()

    @property
    def work(self) -> dict[str, Work]:
        """By `q` and `k`, how much has been computed so far, out of all; see `top_ratio`."""
        # Read first: the layers, and thus their counts, may be on several devices.
        return {name: sum((it.query_key.work[name].read() for it in self._observers), Work()) for name in ("q", "k")}

    @property
    def unpruned(self) -> list[Layer]:
        """The layers to which pruning doesn't apply: all their neurons were computed."""
        return [it.layer for it in self._observers if it.query_key.unprunable]

    def measure(self, batch: Batch) -> dict[Site, Tensor]:
        """Runs the decoder on the batch and returns each site's impacts.

        Returns: (layer, projection) -> float32 (sentences, neurons). Sites may share a tensor.
        """
        inputs = model_inputs(self.model, batch)
        real, counted = real_and_counted(inputs, batch)
        self._cache.clear()
        for observer in self._observers:
            observer.begin(real, counted)
        if self.activations is not None:
            self.activations.begin(counted)
        self.decoder.backbone(**inputs)
        return {
            (observer.layer.index, name): observer.impacts[name]
            for observer in self._observers
            for name in PROJECTIONS
            if name in observer.impacts
        }


class LayerObserver:
    """One layer's hooks, which pass what they observe during a forward pass to the computation of impacts.

    Args:
        cache: shared by the layers of a model.
        Other arguments: as for `ImpactMeter`.
    """

    def __init__(
        self,
        layer: Layer,
        projections: Sequence[str],
        attention: Attention,
        memory_gb: float,
        top_ratio: float | None = None,
        cache: PassCache | None = None,
    ):
        self.layer = layer
        self.projections = set(projections) & set(layer.projections)
        self._cache = PassCache() if cache is None else cache
        self.query_key = QueryKeyImpacts(
            layer,
            [name for name in ("q", "k") if name in self.projections],
            attention,
            memory_gb,
            top_ratio,
            self._cache,
        )
        # State of one pass: `begin` sets the first three, hooks set the others, before anything reads them.
        self.real = self.counted = torch.empty(0)
        self.impacts: dict[str, Tensor] = {}
        self._cos_sin: tuple[Tensor, Tensor]
        self._projected: dict[str, Tensor] = {}
        with torch.no_grad():
            self._norms = {
                name: weight_norms(layer.projections[name].effective_weight())
                for name, readers in (("o", {"o"}), ("down", set(FEED_FORWARD_PROJECTIONS)))
                if self.projections & readers
            }

    def begin(self, real: Tensor, counted: Tensor) -> None:
        # A model may be spread over several devices; each layer is measured on its own device.
        device = self.layer.projections["down"].linear.weight.device
        self.real, self.counted, self.impacts = real.to(device), counted.to(device), {}

    @contextmanager
    def installed(self) -> Iterator[None]:
        layer_projections = self.layer.projections
        linears = {name: projection.linear for name, projection in layer_projections.items()}
        handles = []
        if self.projections & set(FEED_FORWARD_PROJECTIONS):
            # Before hooks that switch columns off: only the weights are then as if zero, not the input.
            handles.append(linears["down"].register_forward_pre_hook(self._see_hidden, prepend=True))
        if self.projections & {"v", "o"}:
            handles.append(linears["o"].register_forward_pre_hook(self._see_heads, prepend=True))
        if self.projections & {"q", "k"}:
            handles.append(self.layer.attention.register_forward_pre_hook(self._see_positions, with_kwargs=True))
            for name in ("q", "k"):
                handles.append(linears[name].register_forward_hook(self._keep_projected(layer_projections[name])))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _report(self, projection: str, impacts: Tensor) -> None:
        if projection in self.projections:
            self.impacts[projection] = impacts

    def _see_hidden(self, module: nn.Module, args: tuple[Tensor]) -> None:
        impacts = hidden_unit_impacts(args[0], self._norms["down"], self.counted)
        for name in FEED_FORWARD_PROJECTIONS:
            self._report(name, impacts)

    def _see_heads(self, module: nn.Module, args: tuple[Tensor]) -> None:
        norms = column_norms(args[0], self.counted)
        if "v" in self.projections:
            self._report("v", value_impacts(norms, self.layer.num_kv_heads, self.layer.head_dim))
        if "o" in self.projections:
            # The change is rank one, as in the feed-forward network.
            self._report("o", norms * self._norms["o"])

    def _see_positions(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if kwargs.get("position_embeddings") is None:
            raise UserError(
                f"model.name: {type(module).__name__} isn't called with position_embeddings; "
                "the exact impact of such a family isn't supported yet"
            )
        self._cos_sin = kwargs["position_embeddings"]

    def _keep_projected(self, projection: Projection) -> Callable:
        def keep(module: nn.Module, args: tuple, output: Tensor) -> None:
            self._projected[projection.name] = projection.output(output)

        return keep

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, softcap: float | None
    ) -> Tensor:
        """Computes the attention's output, (batch, length, query heads, head_dim), and records q and k impacts."""
        visibility = self._cache.visibility(mask, self.real)
        inputs = AttentionInputs.clean(query, key, value, visibility, scaling, softcap)
        if not self.query_key.names:
            return inputs.output().transpose(1, 2).to(query.dtype)
        impacts, output = self.query_key.measure(inputs, self.counted, self._projected, self._cos_sin)
        self.impacts |= impacts
        self._projected.clear()
        return output.transpose(1, 2).to(query.dtype).contiguous()


_observer_of: WeakKeyDictionary[nn.Module, LayerObserver] = WeakKeyDictionary()


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """The attention function that the model runs while its impacts are measured."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _observer_of[module].attend(query, key, value, attention_mask, scaling, softcap), None


def _mask(*args, **kwargs) -> Tensor:
    """transformers' boolean mask, always materialised: the shortcut `None` would hide a sliding window."""
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


AttentionInterface.register(_IMPLEMENTATION, _attention)
AttentionMaskInterface.register(_IMPLEMENTATION, _mask)


@contextmanager
def observed_attention(observers: Sequence[LayerObserver], *others: nn.Module) -> Iterator[None]:
    """Makes the observers' attention modules, and `others` that build their masks, run the measuring attention."""
    modules = [*others, *(observer.layer.attention for observer in observers)]
    configs = list({id(module.config): module.config for module in modules}.values())
    implementations = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = _IMPLEMENTATION
        for observer in observers:
            _observer_of[observer.layer.attention] = observer
        yield
    finally:
        for config, implementation in zip(configs, implementations, strict=True):
            config._attn_implementation = implementation
        for observer in observers:
            _observer_of.pop(observer.layer.attention, None)
