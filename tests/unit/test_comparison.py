"""Changes, intervals and differences of strategies, compared with loops over resamples."""

import numpy as np
import pytest
import torch

from agnostic_train.evaluation.comparison import (
    compare_strategies,
    group_means,
    language_groups,
    relative_change,
    resampled_changes,
)
from agnostic_train.scores.bootstrap import _AT_ONCE
from agnostic_train.scores.perplexity import Perplexity

SW = {"enhanced": ["sw"], "others": ["en", "de"], "all": ["sw", "en", "de"]}


def measured(values):
    nats = torch.tensor(values, dtype=torch.float64)
    return Perplexity(nats, torch.ones(len(nats), dtype=torch.int64), 10 * len(nats))


def of_noise(generator, base, factor, spread):
    return measured(
        (base.sentence_nats * (factor + spread * torch.randn(len(base.sentence_nats), generator=generator))).tolist()
    )


def test_change_is_that_of_bits_per_byte():
    before, after = measured([1.0, 2.0, 5.0]), measured([1.0, 1.0, 4.0])
    assert relative_change(before, after) == pytest.approx(after.bits_per_byte / before.bits_per_byte - 1)


def test_resampled_changes_equal_brute_force():
    generator = torch.Generator().manual_seed(0)
    before = measured(torch.rand(7, generator=generator).tolist())
    after = [of_noise(generator, before, 0.9, 0.1) for _ in range(2)]
    runs, drawn = resampled_changes(before, after, _AT_ONCE + 3, draw_seed=11)
    assert runs.tolist() == pytest.approx([it.nats / before.nats - 1 for it in after])
    for start, size in ((0, _AT_ONCE), (_AT_ONCE, 3)):
        sentences = torch.randint(7, (size, 7), generator=torch.Generator().manual_seed(11 + start)).tolist()
        for index in (0, size - 1):
            base = sum(float(before.sentence_nats[it]) for it in sentences[index])
            for run, value in zip(after, drawn[start + index].tolist(), strict=True):
                assert value == pytest.approx(sum(float(run.sentence_nats[it]) for it in sentences[index]) / base - 1)


def test_differences_beyond_noise_and_best_strategies():
    generator = torch.Generator().manual_seed(1)
    before = {
        language: measured((1 + torch.rand(200, generator=generator)).tolist()) for language in ("sw", "en", "de")
    }
    # Two strategies gain equally in Swahili, the third clearly more; English and German suffer under the third only.
    factors = {"a": (0.95, 1.0), "b": (0.951, 1.001), "c": (0.8, 1.3)}
    after = {
        name: {
            seed: {it: of_noise(generator, before[it], own if it == "sw" else other, 0.05) for it in before}
            for seed in (3, 4, 5)
        }
        for name, (own, other) in factors.items()
    }
    result = compare_strategies(before, after, SW, num_resamples=2000)
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


def test_languages_in_the_training_text_are_not_others():
    assert language_groups(["sw"], ["en", "sw"], ["en", "sw", "de"], ["th"]) == {
        "enhanced": ["sw"],
        "also_trained": ["en"],
        "others": ["de"],
        "also_measured": ["th"],
        "all": ["en", "sw", "de", "th"],
    }
    assert list(language_groups(["sw"], ["sw"], ["en", "sw"], [])) == ["enhanced", "others", "all"]


def test_groups_count_only_measured_languages():
    """Parallel text may lack some of a group's languages, or all of them."""
    groups = {"enhanced": ["sw"], "others": ["en", "fr"], "also_measured": ["th"]}
    assert group_means({"en": 0.25, "fr": 0.75, "th": 0.5}, groups) == {"others": 0.5, "also_measured": 0.5}
    before = {"en": measured([1.0, 2.0]), "th": measured([1.0, 1.0])}
    after = {"a": {1: {"en": measured([2.0, 2.5]), "th": measured([1.0, 0.5])}}}
    result = compare_strategies(before, after, groups, num_resamples=10)
    means = {name: it["mean"] for name, it in result["strategies"]["a"]["groups"].items()}
    assert means == pytest.approx({"others": 0.5, "also_measured": -0.25}) and list(result["best"]) == list(means)


def test_pairing_narrows_the_interval_of_a_difference():
    """Both strategies' intervals are wide because sentences differ, but the difference is equal on every sentence."""
    generator = torch.Generator().manual_seed(2)
    before = {"sw": measured((1 + torch.rand(50, generator=generator)).tolist()), "en": measured([1.0] * 50)}
    a = of_noise(generator, before["sw"], 0.9, 0.5)
    b = measured((a.sentence_nats + 0.01 * before["sw"].sentence_nats).tolist())
    after = {name: {0: {"sw": it, "en": before["en"]}} for name, it in (("a", a), ("b", b))}
    result = compare_strategies(before, after, SW, num_resamples=500)
    low, high = result["strategies"]["a"]["languages"]["sw"]["interval"]
    assert high - low > 0.1
    difference = next(it for it in result["differences"] if it["group"] == "enhanced")
    assert difference["mean"] == pytest.approx(-0.01)
    # One seed tells nothing about the noise between trainings.
    assert {it["beyond_noise"] for it in result["differences"]} == {None}
    assert result["best"]["enhanced"] == ["a", "b"]
    low, high = difference["interval"]
    assert low == pytest.approx(-0.01) == high


def of_seeds(generator, base, effect, spread):
    """Return a run in which every sentence changes by the same factor, which differs between seeds."""
    factor = 1 + effect + spread * float(torch.randn((), generator=generator))
    return measured((base.sentence_nats * factor).tolist())


@pytest.mark.parametrize(
    "spreads, num_seeds",
    [([0.01] * 7, 3), ([0.01] * 2, 3), ([0.01] * 4, 2), ([0.01] + [0.0003] * 6, 3), ([0.01] + [0.0003] * 3, 2)],
)
def test_equal_strategies_seldom_differ_beyond_noise(spreads, num_seeds):
    """If only seeds differ, a whole comparison raises a false alarm about as rarely as its level states.

    Every strategy's interval holds as often as it states, also if its seeds differ more than all others' do.
    """
    generator = torch.Generator().manual_seed(len(spreads))
    alarms, covered, repeats = 0, torch.zeros(len(spreads)), 60
    for _ in range(repeats):
        before = {"sw": measured((1 + torch.rand(40, generator=generator)).tolist())}
        after = {
            str(name): {seed: {"sw": of_seeds(generator, before["sw"], 0.0, spread)} for seed in range(num_seeds)}
            for name, spread in enumerate(spreads)
        }
        result = compare_strategies(before, after, SW, num_resamples=2000)
        alarms += any(it["beyond_noise"] for it in result["differences"] if it["group"] == "enhanced")
        intervals = [row["languages"]["sw"]["interval"] for row in result["strategies"].values()]
        covered += torch.tensor([low <= 0 <= high for low, high in intervals])
    assert alarms <= 0.1 * repeats and (covered >= 0.9 * repeats).all()


def test_difference_within_its_own_interval_is_not_beyond_noise():
    """The two seeds of one strategy differ by far the most: the noise pooled over all pairs underestimates its own."""
    base = measured([1.0] * 9)

    def at(change):
        return {"sw": measured([1 + change] * 9)}

    after = {name: {1: at(0.0), 2: at(0.0)} for name in "bcdefgh"} | {"a": {1: at(0.05), 2: at(0.07)}}
    result = compare_strategies({"sw": base}, after, SW, num_resamples=2000)
    assert not any(difference["beyond_noise"] for difference in result["differences"])
    for difference in result["differences"]:
        low, high = difference["interval"]
        assert low <= 0 <= high


def test_simultaneous_test_uses_at_least_the_pairs_own_variance():
    """Among 28 pairs of which few differ, each with five seeds, a pair's own interval excludes zero."""
    base, spread = measured([1.0] * 9), 0.01
    steps = (-1.2649, -0.6325, 0.0, 0.6325, 1.2649)  # of variance 1
    after = {name: {seed: {"sw": measured([1.0] * 9)} for seed in range(5)} for name in "bcdefgh"}
    after["a"] = {seed: {"sw": measured([1 + spread * (1.45 + step)] * 9)} for seed, step in enumerate(steps)}
    result = compare_strategies({"sw": base}, after, SW)
    of_a = [it for it in result["differences"] if "a" in it["strategies"]]
    assert len(of_a) == 14 and all(not it["interval"][0] <= 0 <= it["interval"][1] for it in of_a)
    assert not any(it["beyond_noise"] for it in of_a)
    assert all(low < 0 < high for low, high in (it["simultaneous_interval"] for it in of_a))


def test_difference_shown_by_every_seed_is_beyond_noise():
    generator = torch.Generator().manual_seed(9)
    before = {"sw": measured((1 + torch.rand(40, generator=generator)).tolist())}
    after = {
        name: {seed: {"sw": of_seeds(generator, before["sw"], effect, 0.001)} for seed in range(3)}
        for name, effect in (("a", -0.05), ("b", 0.0), ("c", 0.0))
    }
    result = compare_strategies(before, after, SW, num_resamples=2000)
    beyond = {tuple(it["strategies"]): it["beyond_noise"] for it in result["differences"] if it["group"] == "all"}
    assert beyond == {("a", "b"): True, ("a", "c"): True, ("b", "c"): False}


def test_parallel_text_is_resampled_together():
    """Lines easy in one language are easy in others: resampled separately, their mean's interval is too narrow."""
    generator = torch.Generator().manual_seed(3)
    lines = torch.randn(30, generator=generator, dtype=torch.float64)
    languages = ("en", "de", "fr", "sw")
    before = {language: measured([1.0] * 30) for language in languages}
    after = {"a": {0: {it: measured((1 + 0.1 * lines).tolist()) for it in languages}}}
    widths = []
    for aligned in (False, True):
        result = compare_strategies(
            before, after, {"all": ["en", "de", "fr", "sw"]}, aligned=aligned, num_resamples=2000
        )
        low, high = result["strategies"]["a"]["groups"]["all"]["interval"]
        widths.append(high - low)
    assert widths[1] == pytest.approx(2 * widths[0], rel=0.1)  # sqrt(4 languages)
