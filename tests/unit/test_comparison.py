"""Changes, intervals and differences of strategies, against loops over resamples."""

import numpy as np
import pytest
import torch

from agnostic_train.bootstrap import resample_counts
from agnostic_train.comparison import _AT_ONCE, compare_strategies, relative_change, resampled_changes
from agnostic_train.perplexity import Perplexity


def measured(values):
    nats = torch.tensor(values, dtype=torch.float64)
    return Perplexity(nats, torch.ones(len(nats), dtype=torch.int64), 10 * len(nats))


def of_noise(generator, base, factor, spread):
    return measured(
        (base.sentence_nats * (factor + spread * torch.randn(len(base.sentence_nats), generator=generator))).tolist()
    )


def test_a_change_is_that_of_bits_per_byte():
    before, after = measured([1.0, 2.0, 5.0]), measured([1.0, 1.0, 4.0])
    assert relative_change(before, after) == pytest.approx(after.bits_per_byte / before.bits_per_byte - 1)


def test_resampled_changes_by_brute_force():
    generator = torch.Generator().manual_seed(0)
    before = measured(torch.rand(7, generator=generator).tolist())
    after = [of_noise(generator, before, 0.9, 0.1) for _ in range(2)]
    seed_counts = resample_counts(2, _AT_ONCE + 3, seed=5)
    runs, drawn = resampled_changes(before, after, seed_counts, draw_seed=11)
    assert runs.tolist() == pytest.approx([it.nats / before.nats - 1 for it in after])
    for start, size in ((0, _AT_ONCE), (_AT_ONCE, 3)):
        sentences = torch.randint(7, (size, 7), generator=torch.Generator().manual_seed(11 + start)).tolist()
        for index in (0, size - 1):
            base = sum(float(before.sentence_nats[it]) for it in sentences[index])
            expected, weights = 0.0, seed_counts[start + index].tolist()
            for weight, run in zip(weights, after, strict=True):
                expected += weight / sum(weights) * sum(float(run.sentence_nats[it]) for it in sentences[index]) / base
            assert float(drawn[start + index]) == pytest.approx(expected - 1)


def test_what_is_noise_and_what_is_not():
    generator = torch.Generator().manual_seed(1)
    before = {
        language: measured((1 + torch.rand(200, generator=generator)).tolist()) for language in ("sw", "en", "de")
    }
    # Two strategies of equal gain in Swahili, one clearly better; English and German suffer under that one alone.
    factors = {"a": (0.95, 1.0), "b": (0.951, 1.001), "c": (0.8, 1.3)}
    after = {
        name: {
            seed: {it: of_noise(generator, before[it], own if it == "sw" else other, 0.05) for it in before}
            for seed in (3, 4, 5)
        }
        for name, (own, other) in factors.items()
    }
    result = compare_strategies(before, after, ["sw"], num_resamples=2000)
    for name, (own, other) in factors.items():
        strategy = result["strategies"][name]
        for language, factor in (("sw", own), ("en", other), ("de", other)):
            change = strategy["languages"][language]
            assert change["by_seed"].keys() == {"3", "4", "5"}
            assert change["mean"] == pytest.approx(np.mean(list(change["by_seed"].values())))
            assert change["mean"] == pytest.approx(factor - 1, abs=0.01)
            assert change["interval"][0] < change["mean"] < change["interval"][1]
        groups = strategy["groups"]
        means = {it: strategy["languages"][it]["mean"] for it in before}
        assert groups["enhanced"]["mean"] == pytest.approx(means["sw"])
        assert groups["others"]["mean"] == pytest.approx((means["en"] + means["de"]) / 2)
        assert groups["all"]["mean"] == pytest.approx(sum(means.values()) / 3)
    beyond = {(*it["strategies"], it["group"]): it["beyond_noise"] for it in result["differences"]}
    assert len(beyond) == 9
    assert not beyond["a", "b", "enhanced"] and beyond["a", "c", "enhanced"] and beyond["b", "c", "others"]
    assert result["best"]["enhanced"] == ["c"] and result["best"]["others"] == ["a", "b"]


def test_pairing_sees_what_separate_intervals_do_not():
    """Both strategies' intervals are wide, for sentences differ; the difference is the same on every sentence."""
    generator = torch.Generator().manual_seed(2)
    before = {"sw": measured((1 + torch.rand(50, generator=generator)).tolist()), "en": measured([1.0] * 50)}
    a = of_noise(generator, before["sw"], 0.9, 0.5)
    b = measured((a.sentence_nats + 0.01 * before["sw"].sentence_nats).tolist())
    after = {name: {0: {"sw": it, "en": before["en"]}} for name, it in (("a", a), ("b", b))}
    result = compare_strategies(before, after, ["sw"], num_resamples=500)
    low, high = result["strategies"]["a"]["languages"]["sw"]["interval"]
    assert high - low > 0.1
    difference = next(it for it in result["differences"] if it["group"] == "enhanced")
    assert difference["mean"] == pytest.approx(-0.01) and difference["beyond_noise"]
    assert not next(it for it in result["differences"] if it["group"] == "others")["beyond_noise"]
