"""The learning rate search."""

import math
from operator import itemgetter

import pytest

from agnostic_train.evaluation.tuning import default_rates, num_trainings, tune

of_sw = itemgetter("sw")


def around(best, diverges_above=math.inf):
    """Return a measurement that worsens with the rate's distance to `best` in powers of three, and the rates tried."""
    tried = []

    def measure(rate):
        tried.append(rate)
        if rate > diverges_above:
            return None
        distance = abs(math.log(rate / best, 3))
        return {"sw": -0.1 + 0.01 * distance, "en": rate}

    return measure, tried


def test_best_rate_within_the_grid_is_taken():
    measure, tried = around(1e-3)
    tuning = tune(measure, default_rates(1e-3), of_sw)
    assert tuning.learning_rate == pytest.approx(1e-3) and not tuning.at_end and len(tried) == 3
    assert list(tuning.tried) == sorted(tuning.tried)


@pytest.mark.parametrize("best, num_tried, at_end", [(3e-3, 4, False), (9e-3, 5, False), (1, 5, True), (1e-6, 5, True)])
def test_grid_is_extended_while_the_best_rate_is_at_its_end(best, num_tried, at_end):
    measure, tried = around(best)
    tuning = tune(measure, default_rates(1e-3), of_sw)
    assert len(tried) == num_tried and tuning.at_end is at_end
    nearest = min(tried, key=lambda rate: abs(math.log(rate / best)))
    assert tuning.learning_rate == nearest


def test_objective_decides():
    measure, _ = around(3e-3)
    of_both = tune(measure, [1e-3, 3e-3], lambda changes: changes["sw"] + changes["en"])
    assert of_both.learning_rate != tune(measure, [1e-3, 3e-3], itemgetter("en")).learning_rate


def test_single_rate_is_taken():
    measure, tried = around(1.0)
    tuning = tune(measure, [1e-3], of_sw)
    assert tuning.learning_rate == 1e-3 and tried == [1e-3] and not tuning.at_end


def test_diverging_rates_are_passed_over():
    measure, tried = around(1e-3, diverges_above=5e-4)
    tuning = tune(measure, [1e-3, 3e-3], of_sw)
    assert tuning.learning_rate == pytest.approx(1e-3 / 3) and tuning.tried[1e-3] is None and min(tried) < 2e-4
    nothing = tune(lambda rate: None, [1e-3, 3e-3], of_sw)
    assert nothing.learning_rate is None and len(nothing.tried) == 4 and set(nothing.tried.values()) == {None}


@pytest.mark.parametrize("rates", [[1e-3], [1e-3, 3e-3], default_rates(1e-3)])
def test_num_trainings_bounds_the_rates_tried(rates):
    """The fewest trainings occur with the best rate within the grid, the most with it far beyond."""
    within, beyond = (len(tune(around(best)[0], rates, of_sw).tried) for best in (1e-3, 1.0))
    least, most = num_trainings(num_strategies=7, num_rates=len(rates), num_seeds=3)
    assert most == 7 * (beyond + 3) and least == 7 * (within + 3)


def test_num_trainings_of_the_default():
    assert num_trainings(7, 3, 3) == (42, 56)
