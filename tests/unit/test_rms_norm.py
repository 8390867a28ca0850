"""The closed form of a norm's output without one entry, compared with the norm of the vector without that entry."""

import pytest
import torch
from conftest import padded_batch
from test_families import family_model
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from agnostic_train.detection.detect import detect_neurons
from agnostic_train.detection.self_check import verify_impacts
from agnostic_train.impact import query_key
from agnostic_train.impact.hooks import unverified_impacts
from agnostic_train.impact.rms_norm import growth_without, rms_eps
from agnostic_train.model.decoder import find_decoder

NORMS = {
    "Qwen 3": Qwen3RMSNorm(6, eps=1e-5),
    "Gemma 3": Gemma3RMSNorm(6, eps=1e-3),
    "torch": nn.RMSNorm(6, eps=1e-6),
}
LIKE = torch.zeros(1)


@pytest.fixture(params=NORMS)
def norm(request):
    module = NORMS[request.param]
    torch.manual_seed(0)
    nn.init.normal_(module.weight)
    return module


class Rounded(nn.RMSNorm):
    """An RMSNorm that always returns bfloat16."""

    def forward(self, x):
        return super().forward(x).bfloat16()


class Squashed(nn.Module):
    """A module with an epsilon that isn't a norm."""

    eps = 1e-6

    def forward(self, x):
        return x.tanh()


def test_rms_norms_are_recognised(norm):
    assert rms_eps(norm, 6, LIKE) in (1e-5, 1e-3, 1e-6)


@pytest.mark.parametrize("other", [nn.LayerNorm(6), Squashed(), nn.Identity(), nn.RMSNorm(6), Rounded(6, eps=1e-6)])
def test_other_modules_are_not_recognised(other):
    """They include torch's RMSNorm without a given epsilon, because it has no fixed one."""
    assert rms_eps(other, 6, LIKE) is None


def test_epsilon_that_the_module_does_not_use_is_noticed(norm):
    class Other(nn.Module):
        eps = 0.1

        def forward(self, x):
            return norm(x)

    assert rms_eps(Other(), 6, LIKE) is None


@torch.no_grad()
@pytest.mark.parametrize("spread", [0.0, 1.0, 8.0])
def test_growth_equals_that_of_the_norm(norm, spread):
    """Holds from equal entries to one entry that is nearly all of its vector, and for a zero vector."""
    heads = torch.randn(2, 3, 5, 6, dtype=torch.float64).sign() * 10 ** (spread * torch.rand(2, 3, 5, 6).double() / 2)
    heads[0, 0, 0] = 0
    growth = growth_without(heads.float(), rms_eps(norm, 6, LIKE))
    assert growth.shape == heads.shape and growth.dtype == torch.float32 and (growth >= 1).all()
    whole = norm(heads.float())
    for entry in range(6):
        kept = torch.ones(6)
        kept[entry] = 0
        expected = norm(heads.float() * kept)
        output = whole * kept * growth[..., entry, None]
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["Qwen3", "Gemma 3 text"])
def test_closed_form_equals_replaying_the_norm(family, monkeypatch):
    model, batch = family_model(family), padded_batch([1, 5, 11])
    closed = unverified_impacts(model, batch, ["q", "k"])
    monkeypatch.setattr(query_key, "MAX_GROWTH", 0)
    for site, expected in unverified_impacts(model, batch, ["q", "k"]).items():
        assert not torch.equal(closed[site], expected)
        torch.testing.assert_close(closed[site], expected, rtol=1e-4, atol=1e-5 * expected.max().item())


def dominated(family, times, alone=False):
    """Return a model with the first entry of each query and key head scaled by `times`; alone: the others are zero."""
    model = family_model(family)
    with torch.no_grad():
        for layer in find_decoder(model).layers:
            for name in ("q", "k"):
                weight = layer.projections[name].linear.weight.view(-1, layer.head_dim, model.config.hidden_size)
                weight[:, 0] *= times
                if alone:
                    weight[:, 1:] = 0
    return model


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-4), (torch.float16, 5e-3), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("times", [1, 10, 100, 1_000])
@pytest.mark.parametrize("family", ["Qwen3", "Gemma 3 text"])
def test_growth_does_not_amplify_rounding_errors(family, times, dtype, error):
    """Errors are relative to the site's largest impact, in the first layer, which no other layer's rounding reaches."""
    model, batch = dominated(family, times).to(dtype), padded_batch([1, 5, 11])
    impacts = unverified_impacts(model, batch, ["q", "k"])
    expected = unverified_impacts(model.double(), batch, ["q", "k"])
    for site in [(0, "q"), (0, "k")]:
        assert (impacts[site] - expected[site]).abs().max() < error * expected[site].max()


@pytest.mark.parametrize("times", [1, 100, 1e4])
def test_heads_of_one_entry_pass_the_self_check(times):
    comparisons = verify_impacts(dominated("Qwen3", times, alone=True), padded_batch([1, 5, 30]))
    assert max(it.error for it in comparisons) < 1e-4


def test_every_neuron_is_computed_exactly_where_growth_is_too_large():
    batch = padded_batch([5, 11])
    neurons = detect_neurons(dominated("Qwen3", 1e5), {"a": [batch]}, 0.1, progress=False)
    assert neurons.exact_share == {"q": 1.0, "k": 1.0}
