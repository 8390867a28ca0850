"""Text that is used only for evaluation: languages that are only measured, and parallel text."""

from contextlib import nullcontext

import pytest

from agnostic_train.corpus.evaluation_text import parallel_text, read_test_text, seen_in_training
from agnostic_train.corpus.purposes import load_corpus
from agnostic_train.errors import UserError
from agnostic_train.recipe import CorpusSection


def section(**changes):
    return CorpusSection(**{"path": "text", "languages": ["en", "sw"], "detection_sentences": 2, **changes})


@pytest.fixture
def folder(tmp_path):
    for language in ("en", "sw"):
        for split, count in (("train", 6), ("valid", 4)):
            lines = [f"{language} {split} {index}" for index in range(count)]
            (tmp_path / f"{language}.{split}.txt").write_text("\n".join(lines))
    (tmp_path / "th.valid.txt").write_text("ก\nข\nค\nง\n", encoding="utf-8")
    (tmp_path / "parallel").mkdir()
    for language in ("en", "sw", "th"):
        (tmp_path / f"parallel/{language}.txt").write_text("\n".join(f"{language} line {it}" for it in range(5)) + "\n")
    return tmp_path


def test_language_that_is_only_measured_needs_no_train_text(folder):
    sentences, hashes = read_test_text(section(path=str(folder)), "th")
    assert sentences == ["ข", "ง"] and list(hashes) == ["th.valid.txt"]
    (folder / "th.test.txt").write_text("one\ntwo\nthree")
    assert read_test_text(section(test_sentences=2, path=str(folder)), "th")[0] == ["one", "two"]
    with pytest.raises(UserError, match=r"corpus.test_sentences: 4 asked for, .*th.test.txt has 3"):
        read_test_text(section(test_sentences=4, path=str(folder)), "th")
    with pytest.raises(UserError, match=r"evaluation.languages: 'xx' has no file .*xx.test.txt"):
        read_test_text(section(path=str(folder)), "xx")
    (folder / "xx.valid.txt").write_text("only one\n")  # used as validation text, which leaves none to test on
    with pytest.raises(UserError, match=r"evaluation.languages: .*xx.valid.txt has no sentence of 'xx' to test on"):
        read_test_text(section(path=str(folder)), "xx")


def test_parallel_lines_stay_aligned(folder):
    corpus = load_corpus(section(path=str(folder)))
    everything = parallel_text(folder / "parallel", corpus, ["en", "sw", "th", "de"], None, 0)
    assert everything.keys() == {"en", "sw", "th"} and everything["sw"][4] == "sw line 4"
    drawn = parallel_text(folder / "parallel", corpus, ["en", "th"], 3, 7)
    numbers = [[line.split()[-1] for line in lines] for lines in drawn.values()]
    assert numbers[0] == numbers[1] and len(numbers[0]) == 3
    assert drawn == parallel_text(folder / "parallel", corpus, ["en", "th"], 3, 7)
    # A line that one language lacks is left out of all languages.
    (folder / "parallel/sw.txt").write_text("a\n\nc\nd\ne")
    assert [len(it) for it in parallel_text(folder / "parallel", corpus, ["en", "sw"], None, 0).values()] == [4, 4]


def test_parallel_line_whose_sentences_were_all_trained_on_is_refused(folder):
    corpus = load_corpus(section(path=str(folder)))
    corpus.texts["sw"].training.extend(["One.", "Two!"])  # as if the training text had been split into sentences
    for first, split, is_refused in (
        ("One. Two!", True, True),
        ("One. Two!", False, False),
        ("One. New!", True, False),
    ):
        (folder / "parallel/sw.txt").write_text("\n".join([first, "b", "c", "d", "e"]))
        with pytest.raises(UserError, match="1 lines of") if is_refused else nullcontext():
            parallel_text(folder / "parallel", corpus, ["en", "sw"], None, 0, split)


def test_errors_of_parallel_text(folder):
    corpus = load_corpus(section(path=str(folder)))

    def read(name="parallel", count=None):
        return parallel_text(folder / name, corpus, ["en", "sw"], count, 0)

    with pytest.raises(UserError, match=r"evaluation.parallel: .*none isn't a folder"):
        read("none")
    (folder / "blank").mkdir()
    for language in ("en", "sw"):
        (folder / f"blank/{language}.txt").write_text("\n \n")
    with pytest.raises(UserError, match=r"evaluation.parallel: no line of .*blank has text in all of en, sw"):
        read("blank")
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match=r"evaluation.parallel: .*empty has no file for any of en, sw"):
        read("empty")
    with pytest.raises(UserError, match=r"evaluation.parallel_sentences: 6 asked for, .* has 5"):
        read(count=6)
    (folder / "parallel/sw.txt").write_text("\n".join(["sw train 3", "b", "c", "d", "e"]))
    with pytest.raises(UserError, match=r"1 lines of .*sw.txt are in the train or valid text, such as 'sw train 3'"):
        read()
    for blank in ("\n", "\n\n\n"):  # some files end with blank lines
        (folder / "parallel/sw.txt").write_text("\n".join("abcde") + blank)
        assert read()["sw"] == list("abcde")
    (folder / "parallel/en.txt").write_text("a line\n\n")
    (folder / "parallel/sw.txt").write_text("mstari\nmwingine\n")
    assert read() == {"en": ["a line"], "sw": ["mstari"]}
    (folder / "parallel/en.txt").write_text("\n".join(f"en line {it}" for it in range(5)))
    (folder / "parallel/sw.txt").write_text("a\nb")
    with pytest.raises(UserError, match=r"sw.txt has 2 lines, en.txt 5"):
        read()


def test_text_that_is_trained_on_under_another_language_is_named():
    texts = {"test": {"en": ["one", "moja", "two", "mbili"], "sw": ["moja"]}, "parallel": {"th": ["หนึ่ง"]}}
    assert list(seen_in_training(texts, {"sw": ["mbili", "moja", "tatu"], "th": ["two"]})) == [
        "test text of en: 2 of 4 sentences are also in the training text of sw, such as 'moja'",
        "test text of en: 1 of 4 sentences are also in the training text of th, such as 'two'",
    ]


def test_parallel_line_without_a_sentence_is_no_repetition(folder):
    """With `split_sentences`, parts without a letter or digit are no sentences."""
    (folder / "parallel/sw.txt").write_text("habari\n...\nkwaheri")
    (folder / "parallel/en.txt").write_text("hello\n...\nbye")
    corpus = load_corpus(section(split_sentences=True, path=str(folder)))
    text = parallel_text(folder / "parallel", corpus, ["en", "sw"], None, 0, split_sentences=True)
    assert text["sw"] == ["habari", "...", "kwaheri"]
