"""Paired differences, compared with brute force over all resamples and all coin tosses."""

from itertools import product

import numpy as np
import pytest

from agnostic_train.evaluation.paired_comparison import compare_scores, mcnemar_p_value


def test_difference_counts_and_p_value():
    first, second = [1, 1, 0, 1, 0, 1], [0, 1, 1, 0, 0, 0]
    result = compare_scores(first, second)
    assert result["difference"] == pytest.approx(-2 / 6)
    assert (result["num_first_better"], result["num_second_better"]) == (3, 1)
    assert result["p_value"] == pytest.approx(10 / 16)


def test_lower_is_better():
    result = compare_scores([0.5, 2.0, 3.0], [1.5, 2.0, 1.0], higher_is_better=False)
    assert result["difference"] == pytest.approx(-1 / 3)
    assert (result["num_first_better"], result["num_second_better"]) == (1, 1)
    assert result["p_value"] is None


def test_interval_is_that_of_the_bootstrap():
    first, second = [0.0, 1.0, 0.3, 0.2, 0.9], [0.7, 0.2, 0.4, 0.9, 1.3]
    changes = np.array(second) - np.array(first)
    every_mean = [changes[list(drawn)].mean() for drawn in product(range(5), repeat=5)]
    expected = np.quantile(every_mean, [0.025, 0.975])
    actual = compare_scores(first, second)["interval"]
    assert actual == pytest.approx(expected, abs=0.04)
    assert actual == compare_scores(first, second)["interval"]


@pytest.mark.parametrize("split", [(0, 0), (0, 1), (2, 5), (5, 2), (4, 4), (0, 9)])
def test_mcnemar_equals_all_tosses_of_a_fair_coin(split):
    tosses = sum(split)
    heads = [sum(it) for it in product((0, 1), repeat=tosses)]
    expected = sum(abs(it - tosses / 2) >= abs(split[0] - tosses / 2) for it in heads) / 2**tosses
    assert mcnemar_p_value(*split) == pytest.approx(expected)


def test_mcnemar_of_many_items():
    assert 0 < mcnemar_p_value(4000, 6000) < 1e-80


@pytest.mark.parametrize(("first", "second"), [([], []), ([1, 0], [1])])
def test_unpaired_scores_are_refused(first, second):
    with pytest.raises(ValueError, match="paired"):
        compare_scores(first, second)
