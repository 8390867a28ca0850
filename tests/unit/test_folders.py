"""A folder is written only if it is absent, empty or holds our own files; anything else is left untouched."""

import errno
import json
import os

import pytest
from conftest import tiny_llama
from filelock import FileLock

from agnostic_train.errors import UserError
from agnostic_train.export.checkpoint import export_checkpoint, is_exported
from agnostic_train.files import remove_own, sole_user, whole_directory
from agnostic_train.neurons.language_neurons import LanguageNeurons
from agnostic_train.neurons.neuron_set import NeuronSet


def everything_below(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def save_neurons(folder):
    LanguageNeurons.from_related({"a": NeuronSet({(0, "q"): [0, 1]}), "b.c": NeuronSet({(0, "q"): [0]})}).save(folder)


def export(folder):
    export_checkpoint(tiny_llama(), folder, model_card="# card\n")


@pytest.mark.parametrize("write", [save_neurons, export])
def test_folder_with_foreign_files_is_refused(tmp_path, write):
    out = tmp_path / "out"
    for make in (
        lambda: (out / "thesis.txt").write_text("years of work"),
        lambda: (out / "checkpoint-100").mkdir() or (out / "checkpoint-100/model.safetensors").write_text("hours"),
        # A run's output_dir has this file too.
        lambda: (out / "manifest.json").write_text(json.dumps({"stages": {}})),
        lambda: (out / "manifest.json").write_text("{"),
    ):
        out.mkdir()
        make()
        before = everything_below(tmp_path)
        with pytest.raises(UserError, match=rf"{out}: would be replaced, but holds .*move that away") as caught:
            write(out)
        assert everything_below(tmp_path) == before and list(tmp_path.iterdir()) == [out]
        assert "\n" not in str(caught.value)
        for file in before:
            file.unlink()
        for folder in [it for it in out.rglob("*") if it.is_dir()]:
            folder.rmdir()
        out.rmdir()


@pytest.mark.parametrize("write", [save_neurons, export])
def test_own_folder_is_replaced_unless_it_holds_a_foreign_file(tmp_path, write):
    (tmp_path / "out").mkdir()
    write(tmp_path / "out")
    write(tmp_path / "out")
    (tmp_path / "out/thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"holds thesis\.txt"):
        write(tmp_path / "out")
    assert (tmp_path / "out/thesis.txt").read_text() == "years of work"


def test_old_folder_is_restored_if_the_new_one_cannot_be_moved(tmp_path, monkeypatch):
    save_neurons(tmp_path / "out")
    before = everything_below(tmp_path / "out")
    original = os.rename

    def failing(source, target):
        if str(source).endswith(".tmp"):
            raise OSError("the disk went away")
        original(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="the disk went away"):
        save_neurons(tmp_path / "out")
    assert everything_below(tmp_path / "out") == before and list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_folder_moved_away_by_a_killed_process_is_restored(tmp_path):
    for name, content in ((".neurons.0123abcd.old", "old"), (".neurons.0123abcd.tmp", "half of the new one")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(content)
    with sole_user(tmp_path):
        assert (tmp_path / "neurons/summary.json").read_text() == "old"
        assert {it.name for it in tmp_path.iterdir()} == {"neurons", ".lock"}


def test_only_own_files_are_removed(tmp_path):
    folder = tmp_path / "lora"
    export(folder)
    # Some tokenizers write a folder of their own.
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"files": [*manifest["files"], "templates"]}))
    (folder / "templates").mkdir()
    (folder / "templates/one.jinja").write_text("x")
    (folder / "mine.txt").write_text("mine")
    remove_own(folder, is_exported)
    assert [it.name for it in folder.iterdir()] == ["mine.txt"]
    (folder / "mine.txt").unlink()
    for path in (folder, tmp_path / "absent"):
        remove_own(path, is_exported)
        assert not path.exists()


def test_interrupt_after_a_folder_was_replaced_leaves_the_new_one(tmp_path, monkeypatch):
    original = os.rename

    def interrupted(source, target):
        original(source, target)
        if str(source).endswith(".tmp"):
            raise KeyboardInterrupt

    (tmp_path / "out").mkdir()
    (tmp_path / "out/old.txt").write_text("old")
    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), whole_directory(tmp_path / "out", lambda path: True) as folder:
        (folder / "new.txt").write_text("new")
    assert [it.name for it in (tmp_path / "out").iterdir()] == ["new.txt"]


def test_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(FileLock, "acquire", fail)
    with (
        pytest.raises(UserError, match=f"output_dir: {tmp_path} can't be locked .No locks available.; use"),
        sole_user(tmp_path),
    ):
        pass


def test_partial_folder_of_another_run_is_left_until_that_run_ends(tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    with sole_user(other):
        (other / ".neurons.0123abcd.tmp").mkdir()
        with sole_user(tmp_path):
            assert (other / ".neurons.0123abcd.tmp").exists()
    with sole_user(other):
        assert [it.name for it in other.iterdir()] == [".lock"]


def test_symbolic_link_to_a_folder_is_kept(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    save_neurons(tmp_path / "out")
    save_neurons(tmp_path / "out")
    assert (tmp_path / "out").is_symlink() and LanguageNeurons.load(tmp_path / "disk").languages == ["a", "b.c"]
    assert {it.name for it in tmp_path.iterdir()} == {"disk", "out"}


def test_export_of_another_kind_is_replaced(tmp_path):
    model = tiny_llama()
    model.trained_neurons = NeuronSet({(0, "q"): [1]})
    for to in ("merged", "lora", "delta", "merged"):
        export_checkpoint(model, tmp_path / "out", to=to, base=tiny_llama())
    assert not (tmp_path / "out/adapter_config.json").exists()


def test_file_that_appears_during_writing_is_kept(tmp_path):
    with pytest.raises(UserError, match=r"holds late\.txt"), whole_directory(tmp_path / "out") as temporary:
        (temporary / "ours.txt").write_text("ours")
        (tmp_path / "out").mkdir()
        (tmp_path / "out/late.txt").write_text("late")
    assert [it.name for it in (tmp_path / "out").iterdir()] == ["late.txt"] and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("write", [save_neurons, export])
def test_written_files_have_the_permissions_of_any_new_file(tmp_path, write):
    """The safetensors library makes its files readable to their owner only."""
    (tmp_path / "new").touch()
    write(tmp_path / "out")
    assert {it.stat().st_mode for it in (tmp_path / "out").iterdir()} == {(tmp_path / "new").stat().st_mode}
    NeuronSet({(0, "q"): [0]}).save(tmp_path / "one.safetensors")
    assert (tmp_path / "one.safetensors").stat().st_mode == (tmp_path / "new").stat().st_mode


def test_private_folder_stays_private(tmp_path):
    before = os.umask(0o077)
    try:
        save_neurons(tmp_path / "out")
    finally:
        os.umask(before)
    assert {it.stat().st_mode & 0o777 for it in (tmp_path / "out").iterdir()} == {0o600}
