"""A norm's answer to the loss of one entry, against the norm itself on the vector without the entry."""

import pytest
import torch
from conftest import padded_batch
from test_families import family_model
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from agnostic_train.impact import hooks, neuron_impacts
from agnostic_train.impact.rms_norm import growth_without, rms_eps

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


class Squashed(nn.Module):
    """Has an epsilon and a weight, and is something else."""

    eps = 1e-6

    def forward(self, x):
        return x.tanh()


def test_the_norm_is_recognised(norm):
    assert rms_eps(norm, 6, LIKE) in (1e-5, 1e-3, 1e-6)


@pytest.mark.parametrize("other", [nn.LayerNorm(6), Squashed(), nn.Identity(), nn.RMSNorm(6)])
def test_others_are_not(other):
    """Torch's own RMSNorm has no epsilon of its own unless it is told one."""
    assert rms_eps(other, 6, LIKE) is None


def test_an_epsilon_that_the_module_does_not_use_is_noticed(norm):
    class Other(nn.Module):
        eps = 0.1

        def forward(self, x):
            return norm(x)

    assert rms_eps(Other(), 6, LIKE) is None


@torch.no_grad()
@pytest.mark.parametrize("spread", [0.0, 1.0, 8.0])
def test_growth_is_the_norms(norm, spread):
    """From entries alike to one that is nearly all of its vector; a zero vector, too."""
    heads = torch.randn(2, 3, 5, 6, dtype=torch.float64).sign() * 10 ** (spread * torch.rand(2, 3, 5, 6).double() / 2)
    heads[0, 0, 0] = 0
    growth = growth_without(heads.float(), rms_eps(norm, 6, LIKE))
    assert growth.shape == heads.shape and growth.dtype == torch.float32 and (growth >= 1).all()
    whole = norm(heads.float())
    for entry in range(6):
        kept = torch.ones(6)
        kept[entry] = 0
        expected = norm(heads.float() * kept)
        found = whole * kept * growth[..., entry, None]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["Qwen3", "Gemma 3 text"])
def test_the_closed_form_is_the_replayed_one(family, monkeypatch):
    model, batch = family_model(family), padded_batch([1, 5, 11])
    closed = neuron_impacts(model, batch, ["q", "k"])
    monkeypatch.setattr(hooks.LayerObserver, "_must_replay", lambda self, name, like: True)
    for site, expected in neuron_impacts(model, batch, ["q", "k"]).items():
        assert not torch.equal(closed[site], expected)
        torch.testing.assert_close(closed[site], expected, rtol=1e-4, atol=1e-5 * expected.max().item())
