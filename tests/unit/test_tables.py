"""Tables of results: each number in its own column."""

from itertools import pairwise

import pytest

from agnostic_train.evaluation.task_results import TaskResult, compare_tasks
from agnostic_train.files import read_json
from agnostic_train.report.page import comparison_text
from agnostic_train.report.tables import ablation_table, evaluation_table


def row(perplexity):
    return {"perplexity": perplexity, "bits_per_byte": perplexity / 10}


def test_ablation_table_gives_the_ratio_of_perplexities():
    off = {"none": 4.0, "shared": 6.0}
    table = ablation_table({name: {"neurons": 1, "languages": {"a": row(value)}} for name, value in off.items()})
    assert [(it["off"], it["times"]) for it in table] == [("none", 1.0), ("shared", 1.5)]


def test_evaluation_table_separates_before_and_after():
    change = {"bits_per_byte_change": -1 / 9, "interval": [-0.2, -0.1], "num_sentences": 3}
    (table_row,) = evaluation_table({"languages": {"a": {"before": row(9.0), "after": row(8.0), **change}}})
    assert (table_row["perplexity_before"], table_row["perplexity_after"]) == (9.0, 8.0)
    assert (table_row["bits_per_byte_before"], table_row["bits_per_byte_after"]) == (0.9, 0.8)
    assert (table_row["text"], table_row["change"], table_row["low"], table_row["high"], table_row["sentences"]) == (
        "test",
        -1 / 9,
        -0.2,
        -0.1,
        3,
    )


@pytest.mark.parametrize(("higher_is_better", "wins"), [(True, 1), (None, 1), (False, 0)])
def test_metric_without_a_direction_is_better_when_higher(higher_is_better, wins):
    def result(score):
        metric = {"value": score, "standard_error": None, "higher_is_better": higher_is_better}
        return TaskResult(1, None, 0, 1, 0, {"acc,none": metric}, ["item"], {"acc,none": [score]})

    tasks = compare_tasks({"one": {"t": result(0.0)}, "two": {"t": result(1.0)}})
    assert tasks["t"]["comparisons"][0]["num_second_better"] == wins


def test_comparison_text_names_strategies_that_choose_the_same_neurons(pytestconfig):
    comparison = read_json(pytestconfig.rootpath / "recipes/real_text/comparison.json")
    assert "related chooses the same neurons as shared+exclusive" in comparison_text(comparison)
    assert "the same neurons" not in comparison_text(comparison | {"same": {}})
    text = comparison_text(comparison | {"same": {"related": "shared"}})
    assert "related chooses the same neurons as shared, and isn't listed separately." in text


def test_comparison_text_on_parallel_text_without_the_enhanced_languages(pytestconfig):
    """Its groups lack the enhanced languages, too: no number may move under another heading."""
    comparison = read_json(pytestconfig.rootpath / "recipes/real_text/comparison.json")
    parallel = comparison["texts"]["parallel"]
    for row in parallel["strategies"].values():
        del row["languages"]["sw"], row["groups"]["enhanced"]
    del parallel["best"]["enhanced"], comparison["before"]["parallel"]["sw"]
    parallel["differences"] = [it for it in parallel["differences"] if it["group"] != "enhanced"]
    lines = comparison_text(comparison).split("## Parallel text")[1].splitlines()
    header, row = (next(line for line in lines if line.startswith(f"| {it} |")) for it in ("strategy", "shared"))
    assert header == "| strategy | en | zh | de | fr | th | others | only measured | all |" and header.count(
        "|"
    ) == row.count("|")
    assert sum(line.startswith("| shared - ") for line in lines) == 5


@pytest.mark.parametrize("select_by", ["objective", "target", "all"])
@pytest.mark.parametrize("seeds", [[1], [1, 2, 3]])
@pytest.mark.parametrize("others", [["en", "zh", "de", "fr"], []])
def test_comparison_text_has_whole_tables(pytestconfig, select_by, seeds, others):
    comparison = read_json(pytestconfig.rootpath / "recipes/real_text/comparison.json")
    comparison |= {"select_by": select_by, "seeds": seeds}
    comparison["tuning"]["lora"]["tried"][0] |= {"validation": None, "groups": None, "largest_forgetting": None}
    if not others:
        del comparison["groups"]["others"]
        for compared in comparison["texts"].values():
            compared["differences"] = [it for it in compared["differences"] if it["group"] != "others"]
            for groups in (compared["best"], *(it["groups"] for it in compared["strategies"].values())):
                del groups["others"]
    lines = comparison_text(comparison).splitlines()
    for previous, line in pairwise(lines):
        if previous.startswith("|") and line.startswith("|"):
            assert previous.count("|") == line.count("|")
    header = next(line for line in lines if line.startswith("| strategy | weights trained"))
    assert ("others" in header) is bool(others) and ("| all |" in header) is (select_by == "all")
    assert ("largest rise" in header) is (select_by == "objective" and bool(others))
    assert ("- All: en, zh, sw, de, fr, th." in lines) is (len(seeds) == 1)
    assert sum(line.startswith("| lora |") and "diverged" in line for line in lines) == 1


def test_comparison_text_gives_shares_of_the_training_text(pytestconfig):
    comparison = read_json(pytestconfig.rootpath / "recipes/real_text/comparison.json")
    assert "of the training text" not in comparison_text(comparison | {"mixture": {"sw": 1.0}})
    assert "of the training text, sw 80%, en 20%;" in comparison_text(comparison | {"mixture": {"sw": 4.0, "en": 1.0}})
