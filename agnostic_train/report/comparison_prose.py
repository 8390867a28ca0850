"""What comparisons of strategies say in sentences, the pilot's among them.

`comparison` is the content of `comparison.json`.
"""

from collections.abc import Mapping

GROUP_TITLES = {
    "enhanced": "Enhanced",
    "also_trained": "Also in the training text",
    "others": "Others",
    "also_measured": "Only measured",
    "all": "All",
}


def selection(comparison: dict) -> str:
    """How learning rates were chosen."""
    by_all = comparison["select_by"] == "all"
    words = f"the lowest bits per byte of {'all detected' if by_all else 'the enhanced'} languages on validation text"
    if comparison["select_by"] == "objective" and comparison["groups"].keys() & {"others", "also_trained"}:
        words += penalty(comparison["max_forgetting"])
    return words


def penalty(max_forgetting: float) -> str:
    """What is weighed against a gain, as the end of a sentence about the bits per byte of the enhanced languages."""
    return f", with a penalty if those of another detected language rise by more than {100 * max_forgetting:.3g}%"


def twin_sentences(same: Mapping[str, str]) -> list[str]:
    """Which strategies aren't listed, because an earlier one chooses the same neurons. same: the earlier ones."""
    return [f"{name} chooses the same neurons as {twin}, and isn't listed separately" for name, twin in same.items()]


def verdicts(comparison: dict, text: str) -> list[str]:
    """On a kind of text, which languages are in each group and, if seeds tell, which strategies are best in it."""
    compared = comparison["texts"][text]
    names = compared["strategies"].keys()
    sentences = []
    for group, best in compared["best"].items():
        measured = ", ".join(it for it in comparison["groups"][group] if it in comparison["before"][text])
        if len(comparison["seeds"]) == 1 or len(names) == 1:
            sentences.append(f"{GROUP_TITLES[group]}: {measured}.")
        elif len(best) == len(names):
            sentences.append(f"{GROUP_TITLES[group]} ({measured}): no strategy is better than another beyond noise.")
        else:
            best = ", ".join(best)
            sentences.append(f"{GROUP_TITLES[group]} ({measured}): no strategy is better beyond noise than {best}.")
    return sentences


def remarks(comparison: dict) -> list[str]:
    """What the tables leave out or don't show: twins, diverged strategies, and rates at an end of those tried."""
    sentences = [f"{sentence}." for sentence in twin_sentences(comparison["same"])]
    for name in comparison["diverged"]:
        where = "with some seed at its best rate" if name in comparison["tuning"] else "at every rate"
        sentences.append(f"{name} diverged {where}, and isn't compared.")
    for name, tuned in comparison["tuning"].items():
        if tuned["at_end"]:
            sentences.append(f"The rate of {name} is at an end of those tried; a better one may lie beyond it.")
    return sentences
