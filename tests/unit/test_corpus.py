"""From text to sentences to batches, and a clear error for every broken file."""

import bz2
import gzip
import hashlib
import itertools
import json
import lzma
import shutil
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zstandard
from conftest import tiny_llama
from datasets import Dataset
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, PreTrainedTokenizerFast, PythonBackend

from agnostic_train import batches_of, detect_neurons, perplexity
from agnostic_train.corpus import streaming
from agnostic_train.corpus.documents import split_documents, texts_of
from agnostic_train.corpus.encoding import Encoder
from agnostic_train.corpus.evaluation_text import read_test_text
from agnostic_train.corpus.hub import check_dataset
from agnostic_train.corpus.local_files import local_sentences
from agnostic_train.corpus.purposes import load_corpus
from agnostic_train.errors import UserError
from agnostic_train.pipeline.training_text import training_examples
from agnostic_train.quickstart.tiny_model import build_tokenizer
from agnostic_train.recipe import CorpusSection, TrainingSection

SENTENCES = [f"sentence number {index} is here" for index in range(40)]


def write(directory, language, **splits):
    for split, lines in splits.items():
        (directory / f"{language}.{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def section(**changes):
    return CorpusSection(**{"path": "p", "languages": ["en"], "detection_sentences": 10, **changes})


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, "en", train=SENTENCES[:30], valid=SENTENCES[30:])
    return tmp_path


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer that adds a beginning-of-sequence token by itself, like Llama's."""
    tokenizer = build_tokenizer([*SENTENCES, "习惯 çà ñandú"], vocab_size=300)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


def test_purposes_have_disjoint_text(folder):
    text = load_corpus(section(path=str(folder))).texts["en"]
    assert len(text.detection) == 10 and len(text.training) == 20
    assert sorted(text.detection + text.training) == sorted(SENTENCES[:30])
    assert text.validation == SENTENCES[30::2] and text.test == SENTENCES[31::2]
    again = load_corpus(section(path=str(folder))).texts["en"]
    assert again == text and load_corpus(section(seed=1, path=str(folder))).texts["en"].detection != text.detection
    write(folder, "en", test=["a test sentence"])
    text = load_corpus(section(training_sentences=5, path=str(folder))).texts["en"]
    assert text.validation == SENTENCES[30:] and text.test == ["a test sentence"] and len(text.training) == 5


def test_sample_of_a_language_does_not_depend_on_other_languages(folder):
    write(folder, "sw", train=SENTENCES[:30], valid=SENTENCES[30:])
    corpus = load_corpus(section(languages=["sw", "en"], path=str(folder)))
    assert corpus.texts["en"] == load_corpus(section(path=str(folder))).texts["en"]
    assert set(corpus.hashes) == {f"{name}.{split}.txt" for name in ("en", "sw") for split in ("train", "valid")}


def test_empty_lines_and_duplicates_are_dropped(folder):
    write(folder, "en", train=[*SENTENCES[:30], "", "  ", *SENTENCES[:9]])
    assert len(load_corpus(section(path=str(folder))).texts["en"].training) == 20


def test_byte_order_mark_is_dropped_and_unicode_separators_end_no_line(folder):
    (folder / "en.train.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*SENTENCES[:30], "a\u2028b"]).encode())
    text = load_corpus(section(path=str(folder))).texts["en"]
    assert sorted(text.detection + text.training) == sorted([*SENTENCES[:30], "a\u2028b"])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda folder: write(folder, "en", valid=["only one"]), r"en\.valid\.txt: one sentence can't be shared"),
        (lambda folder: (folder / "en.valid.txt").unlink(), r"'en' has no file .*en\.valid\.txt"),
        (
            lambda folder: (folder / "en.train.txt").write_bytes(b"good\n\xff\xfe"),
            r"en\.train\.txt: line 2 isn't UTF-8",
        ),
        (lambda folder: (folder / "en.train.txt").write_text("\n\n"), r"en\.train\.txt: has no sentence"),
        (lambda folder: write(folder, "en", train=SENTENCES[:9]), r"corpus\.detection_sentences: 10 asked .* has 9"),
        (
            lambda folder: write(folder, "en", train=SENTENCES),
            "10 sentences of 'en' are in two .*'sentence number 30",
        ),
        (lambda folder: write(folder, "en", test=SENTENCES[:1]), "1 sentences of 'en' are in two"),
    ],
)
def test_errors_name_the_broken_text(folder, change, message):
    change(folder)
    with pytest.raises(UserError, match=message):
        load_corpus(section(path=str(folder)))


def test_missing_folder_and_too_few_sentences_are_refused(folder):
    with pytest.raises(UserError, match=r"corpus\.path: .*nowhere isn't a folder"):
        load_corpus(section(path=str(folder / "nowhere")))
    for purpose in ("validation", "test"):
        with pytest.raises(UserError, match=rf"corpus\.{purpose}_sentences: 6 asked for, 'en' has 5"):
            load_corpus(section(**{f"{purpose}_sentences": 6}, path=str(folder)))


def config(**changes):
    return LlamaConfig(**{"vocab_size": 400, "max_position_embeddings": 64, **changes})


def test_batches_are_padded_and_hold_each_sentence_once(tokenizer):
    encoder = Encoder.of(tokenizer, section(), config())
    texts = ["a", "a longer sentence here", "习惯", "number 7 is here"]
    batches = encoder.batches(texts, "text", 3, skip_special_tokens=True)
    assert [len(batch["input_ids"]) for batch in batches] == [3, 1]
    seen = []
    for batch in batches:
        for row in range(len(batch["input_ids"])):
            real = batch["attention_mask"][row].bool()
            ids = batch["input_ids"][row]
            assert (ids[~real] == tokenizer.pad_token_id).all() and ids[0] == tokenizer.bos_token_id
            assert batch["special_tokens_mask"][row].nonzero().flatten().tolist() == [0]
            text = tokenizer.decode(ids[real], skip_special_tokens=True)
            assert batch["num_bytes"][row] == len(text.encode())
            seen.append(text)
    assert sorted(seen) == sorted(texts)


@pytest.mark.parametrize("add_bos, begins", [(None, True), (True, True), (False, False)])
def test_add_bos_overrides_the_tokenizer(tokenizer, add_bos, begins):
    encoder = Encoder.of(tokenizer, section(add_bos=add_bos), config())
    ids = encoder.examples(["a b"], "text")[0]["input_ids"].tolist()
    assert (ids[0] == tokenizer.bos_token_id) is begins
    assert ids.count(tokenizer.bos_token_id) == int(begins) and ids[-1] == tokenizer.eos_token_id


def test_add_bos_leaves_other_special_tokens_unchanged(tokenizer):
    with_eos = build_tokenizer([*SENTENCES, "習慣"], vocab_size=300)
    special = [("<s>", with_eos.bos_token_id), ("</s>", with_eos.eos_token_id)]
    with_eos.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=special
    )
    rows = {}
    for add_bos in (None, True, False):
        (rows[add_bos],) = Encoder.of(with_eos, section(add_bos=add_bos), config()).encode(["a bc"], "text")
    assert (
        rows[None] == rows[True] and rows[None]["special_tokens_mask"][0] == rows[None]["special_tokens_mask"][-1] == 1
    )
    assert rows[False] == {**{key: it[1:] for key, it in rows[None].items() if key != "num_bytes"}, "num_bytes": 4}
    (cut,) = Encoder.of(with_eos, section(add_bos=False, max_length=2), config()).encode(["a bc"], "text")
    assert cut["input_ids"] == rows[False]["input_ids"][:2]
    assert cut["num_bytes"] == len(with_eos.decode(cut["input_ids"]).encode())
    # A beginning token spelt out in the text is kept as text.
    without_bos = build_tokenizer(SENTENCES, vocab_size=300)
    without_bos.backend_tokenizer.post_processor = processors.ByteLevel()
    for it in (tokenizer, without_bos):
        (spelt,) = Encoder.of(it, section(add_bos=False), config()).encode(["<s>a"], "text")
        assert spelt["input_ids"][0] == it.bos_token_id != spelt["input_ids"][1]


def test_long_sentences_are_truncated_and_counted(tokenizer, caplog):
    from agnostic_train.corpus import encoding

    encoding.logger.addHandler(caplog.handler)
    encoder = Encoder.of(tokenizer, section(max_length=6), config())
    rows = encoder.encode(["a", "ñandú ñandú ñandú ñandú ñandú"], "the text")
    assert Encoder.of(tokenizer, section(max_length=50), config(max_position_embeddings=5)).max_length == 5
    encoding.logger.removeHandler(caplog.handler)
    assert set(caplog.messages) == {
        "the text: 1 of 2 sentences cut at 6 tokens",
        "corpus.max_length: the model has 5 positions; sentences are cut at so many tokens",
    }
    assert len(rows[1]["input_ids"]) == 6
    assert rows[1]["num_bytes"] == len(
        "ñandú ñ".encode()
    )  # a token that holds half a character counts as the whole character
    assert Encoder.of(tokenizer, section(), config(max_position_embeddings=5)).max_length == 5
    # A beginning token that the tokenizer doesn't add itself has no offset in the text.
    bare = build_tokenizer(SENTENCES, vocab_size=300)
    bare.backend_tokenizer.post_processor = processors.ByteLevel()
    for length in (2, 3, 6):
        (row,) = Encoder.of(bare, section(max_length=length, add_bos=True), config()).encode(["a bc def ghij"], "text")
        assert row["input_ids"][0] == bare.bos_token_id and len(row["input_ids"]) == length
        assert row["num_bytes"] == len(bare.decode(row["input_ids"], skip_special_tokens=True).encode())


def test_encoding_in_parts_gives_the_same_result(tokenizer, monkeypatch, caplog):
    from agnostic_train.corpus import encoding

    encoder = Encoder.of(tokenizer, section(max_length=6, add_bos=True), config())
    texts = [*SENTENCES[:7], "a"]

    def encoded():
        examples = encoder.examples(texts, "text") + encoder.packed_examples(texts, "text")
        return encoder.encode(texts, "text"), [it["input_ids"].tolist() for it in examples]

    whole = encoded()
    encoding.logger.addHandler(caplog.handler)
    monkeypatch.setattr(encoding, "_SENTENCES_AT_ONCE", 3)
    monkeypatch.setattr(encoding.logger, "warning_once", encoding.logger.warning)
    assert encoded() == whole
    encoding.logger.removeHandler(caplog.handler)
    assert set(caplog.messages) == {"text: 7 of 8 sentences cut at 6 tokens"}
    bare = Encoder.of(tokenizer, section(add_bos=False), config())
    with pytest.raises(UserError, match="text: the tokenizer makes no tokens for sentence 5, ''"):
        bare.encode([*texts[:4], "", "a"], "text")


def test_tokenizer_without_a_pad_token_pads_with_masked_eos(tokenizer):
    bare = build_tokenizer(SENTENCES, vocab_size=300)
    bare.pad_token = None
    encoder = Encoder.of(bare, section(), config())
    batch = encoder.collate([{"input_ids": [5, 2]}, {"input_ids": [5, 6, 7, 2]}])
    assert batch["input_ids"][0].tolist() == [5, 2, 2, 2] and batch["attention_mask"][0].tolist() == [1, 1, 0, 0]
    assert batch["labels"][0].tolist() == [5, 2, -100, -100] and torch.equal(batch["labels"][1], batch["input_ids"][1])
    # A pad token that was added without resizing the model.
    bare.add_special_tokens({"pad_token": "[PAD]"})
    for size, expected in ((bare.pad_token_id, 2), (2, 0)):
        assert Encoder.of(bare, section(), config(vocab_size=size)).pad_id == expected
    bare.pad_token = None
    bare.eos_token = None
    with pytest.raises(UserError, match="neither a pad nor an end-of-sequence token"):
        Encoder.of(bare, section(), config())
    bare.bos_token = None
    bare.pad_token = "<pad>"
    with pytest.raises(UserError, match=r"corpus\.add_bos"):
        Encoder.of(bare, section(add_bos=True), config())


def test_tokenizer_of_another_model_is_refused(tokenizer):
    with pytest.raises(UserError, match="vocabulary has 20; the two don't belong together"):
        Encoder.of(tokenizer, section(), config(vocab_size=20)).encode(["a"], "text")


def test_training_without_remaining_sentences_is_refused(folder, tokenizer):
    encoder = Encoder.of(tokenizer, section(), config())
    english = TrainingSection(languages=["en"])
    assert (
        len(training_examples(encoder, {"en": load_corpus(section(path=str(folder))).texts["en"].training}, english))
        == 20
    )
    with pytest.raises(UserError, match=r"corpus\.detection_sentences: detection takes every train sentence of 'en'"):
        training_examples(
            encoder,
            {"en": load_corpus(section(detection_sentences=30, path=str(folder))).texts["en"].training},
            english,
        )


def test_packed_sequences_join_whole_sentences(tokenizer):
    encoder = Encoder.of(tokenizer, section(max_length=7), config())
    texts = ["a", *SENTENCES[:9], "习惯 çà ñandú " * 5]
    packed = [row["input_ids"].tolist() for row in encoder.packed_examples(texts, "text")]
    assert {len(ids) for ids in packed[:-1]} == {7} and 2 <= len(packed[-1]) <= 7
    whole = [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in texts]
    joined, expected = [*chain(*packed)], [*chain(*whole)]
    assert joined == expected[: len(joined)] and len(expected) - len(joined) <= 1
    # A last sequence of one token has nothing to predict.
    ids = whole[0] * 2
    (first,) = Encoder.of(tokenizer, section(max_length=len(ids) - 1), config()).packed_examples(["a", "a"], "text")
    assert first["input_ids"].tolist() == ids[:-1]
    both_languages = TrainingSection(languages=["en", "sw"], packing=True)
    assert len(training_examples(encoder, {"en": texts, "sw": texts}, both_languages)) == 2 * len(packed)
    tokenizer = build_tokenizer(SENTENCES, vocab_size=300)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="training.packing: the tokenizer has no end-of-sequence token"):
        Encoder.of(tokenizer, section(max_length=7), config()).packed_examples(texts, "text")


@pytest.mark.parametrize(
    ("languages", "mixture", "expected"),
    [
        (["sw"], {"sw": 4, "en": 1}, {"sw": 8, "en": 2}),  # all of sw, and the first of en
        (["sw"], {"en": 0.75, "sw": 0.25}, {"sw": 8, "en": 24}),  # too little of en, so it repeats
        (["sw", "en"], {"sw": 1, "en": 1}, {"sw": 16, "en": 16}),
        (["sw", "en"], {"sw": 1, "en": 3}, {"sw": 8, "en": 24}),
        (["sw"], {"sw": 1000, "en": 1}, {"sw": 8, "en": 1}),
    ],
)
def test_mixture_gives_each_language_its_share(languages, mixture, expected, tokenizer):
    """Each language gets its share, and all text of the enhanced languages is used at least once."""
    encoder = Encoder.of(tokenizer, section(), config())
    texts = {"sw": SENTENCES[:8], "en": SENTENCES[8:24]}
    rows = [tuple(it["input_ids"]) for it in training_examples(
        encoder, texts, TrainingSection(languages=languages, mixture=mixture)
    )]  # fmt: skip
    assert len(rows) == sum(expected.values())
    for language, count in expected.items():
        own = [tuple(it["input_ids"]) for it in encoder.examples(texts[language], "text")]
        counts = Counter(row for row in rows if row in own)
        assert counts == Counter(own[place % len(own)] for place in range(count))


def table(folder, name, rows):
    """Write rows as JSON lines or parquet, according to the name's ending."""
    data = Dataset.from_list(rows)
    if name.endswith("parquet"):
        data.to_parquet(folder / name)
    else:
        data.to_json(folder / name, force_ascii=False)


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_json_lines_and_parquet_are_read_as_documents(folder, ending):
    expected = load_corpus(section(path=str(folder))).texts["en"]
    for split in ("train", "valid"):
        (folder / f"en.{split}.txt").unlink()
    documents = ["\n".join(SENTENCES[start : start + 3]) for start in range(0, 30, 3)]
    table(folder, f"en.train.{ending}", [{"content": document, "id": 1} for document in documents])
    table(folder, f"en.valid.{ending}", [{"content": sentence, "id": 1} for sentence in SENTENCES[30:]])
    assert load_corpus(section(text_column="content", path=str(folder))).texts["en"] == expected
    with pytest.raises(UserError, match=rf"en\.train\.{ending}: no column 'text'; .* content, id"):
        load_corpus(section(path=str(folder)))
    (folder / f"en.train.{ending}").write_text("{broken")
    with pytest.raises(UserError, match=rf"en\.train\.{ending}: (not readable|line 1 isn't JSON)"):
        load_corpus(section(path=str(folder)))
    write(folder, "en", train=SENTENCES[:30])
    with pytest.raises(UserError, match=rf"en\.train\.txt: the folder also has en\.train\.{ending}"):
        load_corpus(section(path=str(folder)))


COMPRESS = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress, ".zst": zstandard.compress}


@pytest.mark.parametrize("packed", COMPRESS)
def test_compressed_text_is_read(folder, packed):
    expected = load_corpus(section(path=str(folder))).texts
    rows = "\n".join(json.dumps({"text": sentence}) for sentence in SENTENCES[:30])
    (folder / f"en.train.jsonl{packed}").write_bytes(COMPRESS[packed](rows.encode()))
    with pytest.raises(UserError, match=rf"en\.train\.txt: the folder also has en\.train\.jsonl{packed}"):
        load_corpus(section(path=str(folder)))
    (folder / "en.train.txt").unlink()
    valid = folder / "en.valid.txt"
    (folder / f"en.valid.txt{packed}").write_bytes(COMPRESS[packed](valid.read_bytes()))
    valid.unlink()
    assert load_corpus(section(path=str(folder))).texts == expected
    for name in ("en.valid.txt", "en.train.jsonl"):
        file = folder / f"{name}{packed}"
        whole = file.read_bytes()
        for broken in (b"no such format", whole[: len(whole) // 2]):
            file.write_bytes(broken)
            with pytest.raises(UserError, match=rf"{name}{packed}: not readable") as caught:
                load_corpus(section(path=str(folder)))
            assert "\n" not in str(caught.value)
        file.write_bytes(whole)


def by_files(hub, pattern, **changes):
    return load_corpus(streamed(hub, config_pattern=None, data_files=pattern, languages=["sw"], **changes)).texts["sw"]


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
def test_json_lines_files_of_a_dataset_are_streamed(tmp_path, packed):
    """OSCAR-2301 and MADLAD-400 have such files: compressed, with other keys that differ, beside a loading script."""
    hub = tmp_path / "hub"
    (hub / "sw_meta").mkdir(parents=True)
    (hub / "hub.py").write_text("raise RuntimeError('must not run')")
    others = ({"url": "a"}, {"meta": {"id": 1}}, {"meta": [1]}, {"meta": None})
    for part in range(2):
        rows = [json.dumps({"content": f"sw {part} {it}"} | others[it % 4]) for it in range(30)]
        file = hub / f"sw_meta/part_{part}.jsonl{packed}"
        file.write_bytes(COMPRESS.get(packed, bytes)("\n".join([*rows, ""]).encode()))
    text = by_files(hub, f"{{lang}}_meta/*.jsonl{packed}", text_column="content")
    assert len(text.training) == 20 and all(sentence.startswith("sw ") for sentence in text.training)
    assert {sentence.split()[1] for sentence in text.training} == {"0", "1"}
    assert by_files(hub, f"{hub}/{{lang}}_meta/*.jsonl{packed}", text_column="content") == text
    with pytest.raises(UserError, match=r"corpus\.dataset: .*no column 'text'; corpus\.text_column is one of content"):
        by_files(hub, f"{{lang}}_meta/*.jsonl{packed}")
    (hub / f"sw_meta/part_2.jsonl{packed}").write_bytes(COMPRESS.get(packed, bytes)(b"[1]"))
    with pytest.raises(UserError, match=r"corpus\.dataset: .*part_2\.jsonl.*: line 1 holds list, not an object"):
        by_files(hub, f"{{lang}}_meta/*_2.jsonl{packed}")


def test_arrow_parquet_and_text_files_of_a_dataset_are_streamed(tmp_path):
    rows = Dataset.from_list([{"text": f"sw {number}"} for number in range(50)])
    rows.save_to_disk(tmp_path / "hub/sw")
    rows.to_parquet(tmp_path / "hub/sw/part.parquet")
    (tmp_path / "hub/sw/part.txt").write_text("\n".join(rows["text"]))
    for ending in ("arrow", "parquet", "txt"):
        assert len(by_files(tmp_path / "hub", f"{{lang}}/*.{ending}").training) == 20


def test_absolute_file_patterns_are_streamed_alike_from_a_folder_or_format(hub):
    plain = by_files(hub, "{lang}/*.jsonl")
    for source in (str(hub), "json"):
        assert by_files(source, f"{hub}/{{lang}}/*.jsonl") == plain


def test_error_names_the_purpose_with_too_little_streamed_text(hub):
    for counts, message in (
        (
            {"validation_sentences": None},
            r"corpus\.validation_sentences: 1000 asked for by default, .* has only 76 more",
        ),
        ({"test_sentences": 100}, r"corpus\.test_sentences: 100 asked for, .* has only 81 more of 'sw'; lower it"),
    ):
        with pytest.raises(UserError, match=message):
            load_corpus(streamed(hub, languages=["sw"], **counts))


def test_hub_files_are_requested_by_name_and_revision(monkeypatch):
    requests = []

    def load(*args, **kwargs):
        requests.append((args, kwargs["data_files"]))
        raise ConnectionError("no network here")

    monkeypatch.setattr("agnostic_train.corpus.hub.load_dataset", load)
    for revision, name in ((None, "a/b"), ("refs/pr/1", "a/b@refs%2Fpr%2F1")):
        with pytest.raises(UserError, match="can't stream a/b, files sw_meta.*: ConnectionError: no network here"):
            by_files("a/b", "{lang}_meta/*.jsonl.zst", revision=revision)
        assert requests.pop() == (("text",), {"train": f"hf://datasets/{name}/sw_meta/*.jsonl.zst"})


def test_json_lines_can_differ_in_their_other_keys(folder):
    """Lines of web crawls do, and some have no text at all."""
    (folder / "en.train.txt").unlink()
    rows = [{"text": sentence, "meta": {"url": "a"}} for sentence in SENTENCES[:15]]
    rows += [{"url": "b", "text": sentence, "meta": [1]} for sentence in SENTENCES[15:30]] + [{"url": "c"}]
    (folder / "en.train.jsonl").write_text("\n".join([*map(json.dumps, rows), ""]), encoding="utf-8-sig")
    assert len(load_corpus(section(path=str(folder))).texts["en"].training) == 20
    (folder / "en.train.jsonl").write_text('{"text": "a"}\n[1]')
    with pytest.raises(UserError, match=r"en\.train\.jsonl: line 2 holds list, not an object"):
        load_corpus(section(path=str(folder)))


def test_parts_of_a_document_are_joined(folder):
    (folder / "en.train.txt").unlink()
    rows = [{"text": [{"text": sentence}, {"text": f"{sentence} again"}]} for sentence in SENTENCES[:30]]
    table(folder, "en.train.jsonl", rows)
    assert len(load_corpus(section(path=str(folder))).texts["en"].training) == 50


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_rows_without_text_are_skipped(folder, ending):
    (folder / "en.train.txt").unlink()
    rows = [{"text": sentence} for sentence in SENTENCES[:30]]
    table(folder, f"en.train.{ending}", [rows[0], {"text": None}, *rows[1:], {"text": None}])
    assert len(load_corpus(section(path=str(folder))).texts["en"].training) == 20
    (folder / f"en.train.{ending}").unlink()
    parts = [{"text": [{"text": sentence}, {"text": None}]} for sentence in SENTENCES[:30]]
    table(folder, f"en.train.{ending}", parts)
    assert len(load_corpus(section(path=str(folder))).texts["en"].training) == 20
    (folder / f"en.train.{ending}").unlink()
    table(folder, f"en.train.{ending}", [{"text": 5}])
    with pytest.raises(UserError, match="column 'text' holds int, not text"):
        load_corpus(section(path=str(folder)))


@pytest.mark.parametrize("value", [[["one", "two"]], [1, "two"], [{"text": {"a": "b"}}], {"text": "one"}])
def test_nested_values_are_refused(folder, value):
    """Rather than trained on as Python's text of them."""
    (folder / "en.train.txt").unlink()
    (folder / "en.train.jsonl").write_text(json.dumps({"text": value}))
    with pytest.raises(UserError, match=r"column 'text' holds (list|int|dict), not text"):
        load_corpus(section(path=str(folder)))


def test_half_a_surrogate_pair_is_replaced(folder):
    (folder / "en.train.txt").unlink()
    lines = [json.dumps({"text": sentence}) for sentence in SENTENCES[:29]] + [r'{"text": "cut \ud83d"}']
    (folder / "en.train.jsonl").write_text("\n".join(lines))
    text = load_corpus(section(path=str(folder))).texts["en"]
    assert "cut \ufffd" in [*text.detection, *text.training]


def test_column_may_be_missing_in_some_rows_or_all(folder):
    (folder / "en.train.txt").unlink()
    rows = [{"id": 1}, *({"text": sentence} for sentence in SENTENCES[:30]), {"id": 2}]
    (folder / "en.train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert len(load_corpus(section(path=str(folder))).texts["en"].training) == 20
    endless = ({"id": 1, f"key {it}": 2} for it in itertools.count())
    with pytest.raises(UserError, match="there: no column 'text'; corpus.text_column is one of id, key 0, key 1,"):
        next(texts_of(endless, "text", "there"))


def test_empty_parquet_file_has_no_sentence(folder):
    (folder / "en.train.txt").unlink()
    Dataset.from_dict({"text": []}).to_parquet(str(folder / "en.train.parquet"))
    with pytest.raises(UserError, match=r"en\.train\.parquet: has no sentence"):
        load_corpus(section(path=str(folder)))


@pytest.mark.parametrize("name", ["en.test.TXT", "en.test.json", "en.test.txt.lz4"])
def test_test_text_of_an_unknown_kind_is_refused(folder, name):
    """Without an error, half of valid would take its place."""
    (folder / name).write_text("one\n")
    with pytest.raises(UserError, match=f"{folder}/{name}: of no kind that is read"):
        load_corpus(section(path=str(folder)))
    (folder / name).unlink()
    (folder / "en.test.txt").symlink_to(folder / "nowhere")
    with pytest.raises(UserError, match=rf"{folder}/en.test.txt: a broken link"):
        load_corpus(section(path=str(folder)))
    with pytest.raises(UserError, match=rf"{folder}/en.test.txt: a broken link"):
        read_test_text(section(path=str(folder)), "en")


def test_split_sentences_splits_lines(folder):
    write(folder, "en", train=[*SENTENCES[:20], "One. Two? 三。四！ Five"])
    text = load_corpus(section(split_sentences=True, path=str(folder))).texts["en"]
    assert {"One.", "Two?", "三。", "四！", "Five"} < {*text.detection, *text.training}


@pytest.fixture
def hub(tmp_path):
    """A local folder with the layout of a Hub repository: a config per language, and files matched by a pattern."""
    root = tmp_path / "hub"
    configs = []
    for language in ("en", "sw"):
        (root / language).mkdir(parents=True)
        documents = [{"text": f"{language} {n} first\n{language} {n} second\nsame"} for n in range(40)]
        table(root, f"{language}/part.jsonl", documents)
        configs.append(f"- config_name: {language}\n  data_files: {language}/part.jsonl")
    (root / "README.md").write_text("---\nconfigs:\n" + "\n".join(configs) + "\n---\n")
    return root


def streamed(hub, **changes):
    counts = dict(detection_sentences=10, training_sentences=20, validation_sentences=6, test_sentences=5)
    source = {"dataset": str(hub), "config_pattern": "{lang}"}
    return CorpusSection(**{"languages": ["sw", "en"], **counts, **source, **changes})


def test_hub_dataset_is_streamed_by_config_or_files(hub):
    corpus = load_corpus(streamed(hub))
    text = corpus.texts["sw"]
    parts = [text.test, text.validation, text.detection, text.training]
    assert [len(part) for part in parts] == [5, 6, 10, 20]
    every = [sentence for part in parts for sentence in part]
    assert len(set(every)) == 41 and all(sentence.startswith("sw") or sentence == "same" for sentence in every)
    documents = [{sentence.split()[1] for sentence in part if sentence != "same"} for part in parts]
    assert all(not (a & b) for i, a in enumerate(documents) for b in documents[:i])
    assert load_corpus(streamed(hub)) == corpus and load_corpus(streamed(hub, seed=1)) != corpus
    by_files = load_corpus(streamed(hub, config_pattern=None, data_files="{lang}/*.jsonl"))
    assert by_files.texts == corpus.texts


def test_only_trained_languages_stream_training_text(hub, tmp_path):
    keep = tmp_path / ".corpus"
    whole = load_corpus(streamed(hub, training_sentences=500), keep=keep)
    assert [len(text.training) for text in whole.texts.values()] == [60, 60]
    corpus = load_corpus(streamed(hub, training_sentences=500), keep=keep, trained=["sw"])
    assert corpus.texts["sw"] == whole.texts["sw"]
    assert corpus.texts["en"] == replace(whole.texts["en"], training=[])
    shutil.rmtree(hub)
    # Text that was read before stays, even if the Hub's dataset has changed or gone.
    assert load_corpus(streamed(hub, training_sentences=500), keep=keep, trained=["sw"]) == corpus
    assert load_corpus(streamed(hub, training_sentences=None), keep=keep, trained=[]).texts == {
        language: replace(text, training=[]) for language, text in whole.texts.items()
    }


def test_training_text_is_streamed_again_after_the_other_purposes(tmp_path, monkeypatch):
    """If a changed dataset is streamed again for the other purposes, kept training text could be among theirs."""
    documents = [f"document {index}" for index in range(40)]
    monkeypatch.setattr(streaming, "hub_documents", lambda *_: iter(documents))
    small_section = section(
        path=None, dataset="some/data", config_pattern="{lang}", detection_sentences=4, training_sentences=5,
        validation_sentences=3, test_sentences=3,
    )  # fmt: skip
    streams = []
    for _ in range(2):
        streams.append(streaming.streamed_by_purpose(small_section, "en", True, tmp_path, progress=False))
        for file in tmp_path.glob("corpus-en-*"):
            file.unlink()
        documents.reverse()
    assert [it["training"][0] for it in streams] == ["document 10", "document 29"]


def test_streamed_text_is_kept(hub, tmp_path):
    """Kept text is read without the dataset; another choice of text is streamed again."""
    keep = tmp_path / "out/.corpus"
    corpus = load_corpus(streamed(hub), keep=keep)
    held_out = read_test_text(streamed(hub, languages=["sw"]), "en", keep=keep)
    assert len(list(keep.iterdir())) == 5
    shutil.rmtree(hub)
    same = streamed(hub, languages=["en"], max_length=5, batch_size=3)
    assert load_corpus(same, keep=keep).texts == {"en": corpus.texts["en"]}
    assert load_corpus(streamed(hub), keep=keep) == corpus
    other_counts = streamed(hub, languages=["sw"], detection_sentences=3, training_sentences=7, validation_sentences=2)
    assert read_test_text(other_counts, "en", keep=keep) == held_out
    for changes in ({"seed": 1}, {"training_sentences": 21}, {"revision": "v2"}, {"text_column": "content"}):
        with pytest.raises(UserError, match="no such folder"):
            load_corpus(streamed(hub, **changes), keep=keep)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"languages": ["xx"]}, r"corpus\.dataset: can't stream .*config xx"),
        ({"dataset": "/nowhere/at/all"}, r"corpus\.dataset: no such folder /nowhere/at/all"),
        (
            {"data_files": "{lang}/*.jsonl", "config_pattern": None, "languages": ["swh"]},
            r"no document of 'swh'; corpus.languages must",
        ),
        ({"text_column": "content"}, "no column 'content'; corpus.text_column is one of text"),
        ({"training_sentences": None}, r"corpus\.training_sentences: a streamed dataset has no end"),
        ({"detection_sentences": 500}, r"corpus\.detection_sentences: 500 asked for, .* has only 70 more of 'sw'"),
        ({"data_files": "{lang}/none.jsonl", "config_pattern": None}, "can't stream"),
    ],
)
def test_error_names_a_missing_dataset_or_column(hub, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        load_corpus(streamed(hub, **changes))
    assert "\n" not in str(caught.value)


def test_tokenizer_with_gaps_in_its_ids():
    gap = Tokenizer(models.WordLevel({"<pad>": 0, "a": 1, "b": 7}, unk_token="<pad>"))
    gap.pre_tokenizer = pre_tokenizers.Whitespace()
    batches = batches_of(["a b"], PreTrainedTokenizerFast(tokenizer_object=gap, pad_token="<pad>"))
    assert batches[0]["input_ids"].tolist() == [[1, 7]]


def test_batches_of_keeps_each_text_with_its_index(tokenizer):
    texts = ["ñandú", *SENTENCES[:4], "习惯"]
    batches = batches_of(iter(texts), tokenizer, batch_size=4)
    assert [len(batch["input_ids"]) for batch in batches] == [4, 2]
    places = torch.cat([batch["sentence_index"] for batch in batches]).tolist()
    assert sorted(places) == list(range(6))
    for batch in batches:
        for ids, mask, size, place in zip(
            *(batch[name] for name in ("input_ids", "attention_mask", "num_bytes", "sentence_index")), strict=True
        ):
            assert ids[mask.bool()].tolist() == tokenizer(texts[place])["input_ids"]
            assert size == len(texts[place].encode()) and (ids[~mask.bool()] == tokenizer.pad_token_id).all()
    assert batches_of([], tokenizer) == []
    assert {batch["input_ids"].shape[1] for batch in batches_of(texts, tokenizer, max_length=3)} == {3}
    model = tiny_llama(vocab_size=len(tokenizer))
    result = perplexity(model, batches)
    assert result.bits_per_byte > 0 and len(result.sentence_nats) == 6
    neurons = detect_neurons(
        model, {"a": batches, "b": batches_of(SENTENCES[4:8], tokenizer)}, top_ratio=0.3, consistency=0.5
    )
    assert neurons.languages == ["a", "b"] and len(neurons.shared)


def test_batches_of_refuses_wrong_arguments(tokenizer):
    with pytest.raises(TypeError, match="expected several texts"):
        batches_of("one text", tokenizer)
    with pytest.raises(TypeError, match="not a mapping: take one language's"):
        batches_of({"en": ["one text"]}, tokenizer)
    with pytest.raises(TypeError, match="texts: expected text, got dict"):
        batches_of(Dataset.from_list([{"text": "one text"}]), tokenizer)
    with pytest.raises(ValueError, match="must be at least 1, not 0 and None"):
        batches_of(["a"], tokenizer, batch_size=0)
    without_special_tokens = build_tokenizer(SENTENCES, vocab_size=300)
    without_special_tokens.backend_tokenizer.post_processor = processors.ByteLevel()
    with pytest.raises(UserError, match=r"texts: the tokenizer makes no tokens for sentence \d, ''"):
        batches_of([""], without_special_tokens)


class SlowTokenizer(PythonBackend):
    """A token per letter; like some remote tokenizers, its special-token mask lacks the token that it adds."""

    def __init__(self, **options):
        self.letters = ["<s>", "</s>", "<pad>", *"abc"]
        super().__init__(bos_token="<s>", eos_token="</s>", pad_token="<pad>", **options)

    @property
    def vocab_size(self):
        return len(self.letters)

    def get_vocab(self):
        return {letter: index for index, letter in enumerate(self.letters)}

    def _tokenize(self, text, **options):
        return list(text)

    def _convert_token_to_id(self, token):
        return self.letters.index(token)

    def _convert_id_to_token(self, index):
        return self.letters[index]

    def build_inputs_with_special_tokens(self, first, second=None):
        return [self.bos_token_id, *first]


def test_add_bos_with_a_mask_that_lacks_added_tokens():
    slow = SlowTokenizer()
    rows = {
        it: Encoder.of(slow, section(add_bos=it), config()).encode(["abc"], "text")[0] for it in (None, True, False)
    }
    assert rows[None] == rows[True] == {"input_ids": [0, 3, 4, 5], "special_tokens_mask": [1, 0, 0, 0], "num_bytes": 3}
    assert rows[False] == {"input_ids": [3, 4, 5], "special_tokens_mask": [0, 0, 0], "num_bytes": 3}
    with pytest.raises(UserError, match="the tokenizer makes no tokens for sentence 1"):
        Encoder.of(slow, section(add_bos=False), config()).encode([""], "text")


def test_kept_text_without_offsets_is_decoded_without_special_tokens(tokenizer):
    encoder = Encoder.of(tokenizer, section(max_length=4), config())
    kept = tokenizer("a bc def")["input_ids"][:4]
    assert encoder._covered("a bc def", kept, None) == tokenizer.decode(kept[1:])


def test_no_second_eos_if_the_tokenizer_adds_one():
    with_eos = build_tokenizer(SENTENCES, vocab_size=300)
    with_eos.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {with_eos.eos_token}", special_tokens=[(with_eos.eos_token, with_eos.eos_token_id)]
    )
    ids = Encoder.of(with_eos, section(), config()).examples(["a b"], "text")[0]["input_ids"].tolist()
    assert ids.count(with_eos.eos_token_id) == 1 and ids == with_eos("a b")["input_ids"]


def test_token_ids_from_the_vocabulary_size_on_are_refused(tokenizer):
    largest = max(tokenizer("a")["input_ids"])
    assert Encoder.of(tokenizer, section(), config(vocab_size=largest + 1)).encode(["a"], "text")
    with pytest.raises(UserError, match="don't belong together"):
        Encoder.of(tokenizer, section(), config(vocab_size=largest)).encode(["a"], "text")


def test_sentences_are_split_at_end_marks():
    text = "One. Two! Three? Four… 五。六！七？八"
    assert list(split_documents([text], True)) == ["One.", "Two!", "Three?", "Four…", "五。", "六！", "七？", "八"]
    # Closing quotes and brackets end a sentence; marks alone are none.
    chinese = "他说：“好！！”然后走了。真的？！是。（对。）好。……”"
    expected = ["他说：“好！！”", "然后走了。", "真的？！", "是。", "（对。）", "好。……”"]
    assert list(split_documents([chinese, "... !", "？！\n“”"], True)) == expected
    assert list(split_documents(["... !", chinese], False)) == ["... !", chinese]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("वाक्य एक है। दूसरा है॥ तीसरा", ["वाक्य एक है।", "दूसरा है॥", "तीसरा"]),
        ("یہ ایک ہے۔دوسرا کیا؟ تیسرا", ["یہ ایک ہے۔", "دوسرا کیا؟", "تیسرا"]),
        ("አንድ ነው።ሁለት ነው፧ ሦስት", ["አንድ ነው።", "ሁለት ነው፧", "ሦስት"]),
        ("တစ်။ နှစ်။", ["တစ်။", "နှစ်။"]),
        ("धर्मः॥१॥ कर्म॥ २ ॥ एक। 5 दो।", ["धर्मः॥१॥", "कर्म॥ २ ॥", "एक।", "5 दो।"]),
        ("Pi is 3.14. «Да!» Нет?", ["Pi is 3.14.", "«Да!» Нет?"]),
    ],
)
def test_sentences_end_at_the_stops_of_their_script(text, expected):
    assert list(split_documents([text], True)) == expected


@pytest.mark.parametrize("split_sentences", [True, False])
def test_lines_that_show_nothing_are_no_sentences(split_sentences):
    """Such a line has few tokens, all unlike those of the language: detection would take it for a sentence."""
    persian = "می\u200cخواهم"  # needs its zero-width non-joiner
    lines = ["\u200b", "\u200e \u200f", "\ufeff", "\u200d", "\x00", persian]
    assert list(split_documents(lines, split_sentences)) == [persian]


def test_sentences_that_documents_share_are_left_out(tmp_path, caplog):
    parts = {"train": "One a. Thank you. Two.", "valid": "Three. Thank you. Bye.", "test": "Four. Bye."}
    for split, line in parts.items():
        (tmp_path / f"en.{split}.txt").write_text(line)
    text = load_corpus(section(split_sentences=True, detection_sentences=1, path=str(tmp_path))).texts["en"]
    assert sorted([*text.detection, *text.training]) == ["One a.", "Two."]
    assert (text.validation, text.test) == (["Three.", "Thank you."], ["Four.", "Bye."])
    assert "train text of en: 1 sentences are left out" in caplog.text
    (tmp_path / "en.test.txt").write_text(parts["valid"])
    with pytest.raises(UserError, match="valid or test text of 'en' has every sentence of its valid text"):
        load_corpus(section(split_sentences=True, detection_sentences=1, path=str(tmp_path)))


def test_validation_sentence_in_the_test_text_is_refused(tmp_path):
    for split, lines in {"train": "a", "valid": "b", "test": "b"}.items():
        (tmp_path / f"en.{split}.txt").write_text(lines)
    with pytest.raises(UserError, match="1 sentences of 'en' are in two"):
        load_corpus(section(detection_sentences=1, path=str(tmp_path)))


def test_truncated_file_of_a_dataset_is_refused(tmp_path):
    """The zstandard package, which `datasets` uses, reads such a file as if it ended there."""
    lines = [f"line {it} {hashlib.sha256(str(it).encode()).hexdigest()}" for it in range(20_000)]
    packed = zstandard.compress("\n".join(lines).encode())
    (tmp_path / "sw.txt.zst").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(UserError, match=r"sw\.txt\.zst: not readable after line \d+ \(OSError: Truncated"):
        by_files(tmp_path, "{lang}.txt.zst", training_sentences=15_000)


@pytest.mark.parametrize("ending", ["jsonl", "txt"])
def test_byte_order_mark_of_a_streamed_file_is_no_text(tmp_path, ending):
    lines = [f"line {it}" for it in range(60)]
    text = "\n".join(json.dumps({"text": it}) if ending == "jsonl" else it for it in lines)
    (tmp_path / f"sw.{ending}").write_text(text, encoding="utf-8-sig")
    for pattern in (f"{{lang}}.{ending}", f"file://{tmp_path}/{{lang}}.{ending}"):
        text = by_files(tmp_path, pattern, training_sentences=39)
        assert {*text.training, *text.detection, *text.validation, *text.test} == {*lines}


def test_files_of_a_dataset_whose_compression_is_not_our_own_are_streamed(tmp_path):
    folder = tmp_path / "a [x]"  # no pattern
    folder.mkdir()
    lines = [f"line {it}" for it in range(60)]
    (folder / "sw.txt.gzip").write_bytes(gzip.compress("\n".join(lines).encode()))
    (folder / "sw.txt").write_text("\n".join(lines))
    whole = by_files(folder, "{lang}.txt", training_sentences=39)
    assert {*whole.training, *whole.detection, *whole.validation, *whole.test} == {*lines}
    shutil.copy(folder / "sw.txt.gzip", tmp_path)
    assert {*by_files(tmp_path, "{lang}.txt.gzip").training} < {*lines}


def test_only_the_text_of_a_parquet_file_is_read(folder):
    """Other columns may be of types that `datasets` doesn't know."""
    others = pa.array([[("a", 1)]] * 3, pa.map_(pa.string(), pa.int32()))
    text = pa.array(["one", None, "two"]).dictionary_encode()
    pq.write_table(pa.table({"other": others, "text": text}), folder / "en.train.parquet")
    (folder / "en.train.txt").unlink()
    assert local_sentences(section(), folder / "en.train.parquet") == ["one", "two"]
    with pytest.raises(UserError, match=r"no column 'body'; corpus\.text_column is one of other, text"):
        local_sentences(section(text_column="body"), folder / "en.train.parquet")


def test_line_that_is_not_utf8_is_located(folder):
    (folder / "en.train.txt").unlink()
    (folder / "en.train.jsonl").write_bytes(b'{"text": "a"}\n' * 9000 + b'{"text": "\xff"}\n')
    with pytest.raises(UserError, match=r"en\.train\.jsonl: line 9001 isn't UTF-8; convert it"):
        local_sentences(section(), folder / "en.train.jsonl")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RevisionNotFoundError, "corpus.revision: me/mine has no revision 'v1'"),
        (GatedRepoError, "corpus.dataset: .* me/mine: it is gated; accept its terms .* then run `hf auth login`"),
        (RepositoryNotFoundError, "corpus.dataset: .* me/mine: no such folder, and no such dataset on the hub"),
        (ConnectionError, None),
    ],
)
def test_dataset_that_the_hub_refuses_is_named_with_its_remedy(monkeypatch, error, message):
    asked = []

    def info(api, name, revision, expand):
        asked.append((name, revision))
        raise error.__new__(error)

    monkeypatch.setattr(HfApi, "dataset_info", info)
    section = CorpusSection(dataset="me/mine", config_pattern="{lang}", revision="v1", languages=["en", "sw"])
    for name in ("a/b/c", "../nope"):
        with pytest.raises(UserError, match=f"corpus.dataset: no such folder {name}"):
            check_dataset(replace(section, dataset=name))
    with nullcontext() if message is None else pytest.raises(UserError, match=message):
        check_dataset(section)
    assert asked == [("me/mine", "v1")]
