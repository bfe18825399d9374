"""Files and folders are complete or absent."""

import os

import pytest

from gpt2fast.files import atomic


def test_a_file_is_replaced_completely(tmp_path):
    path = tmp_path / "a.json"
    atomic.write_atomic(path, "old")
    atomic.write_atomic(path, b"new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, step):
    path = tmp_path / "a.json"
    path.write_text("old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="No space left"):
        atomic.write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_content_reaches_the_disk_before_the_name_does(tmp_path, monkeypatch):
    """The order decides what a power cut leaves: sync the content, rename, sync the folder."""
    seen = []
    real_fsync, real_replace, real_rename = os.fsync, os.replace, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (seen.append("sync"), real_fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append("rename"), real_replace(a, b)))
    monkeypatch.setattr(os, "rename", lambda a, b: (seen.append("rename"), real_rename(a, b)))
    atomic.write_atomic(tmp_path / "a", "x")
    assert seen == ["sync", "rename", "sync"]
    seen.clear()
    temporary = tmp_path / ".b.tmp"
    temporary.mkdir()
    (temporary / "one").write_text("1")
    (temporary / "two").write_text("2")
    atomic.publish(temporary, tmp_path / "b")
    assert seen == ["sync", "sync", "sync", "rename", "sync"]
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["one", "two"]


def test_a_folder_loses_its_name_before_its_files(tmp_path, monkeypatch):
    folder = tmp_path / "step_00000001"
    folder.mkdir()
    (folder / "a").write_text("x")
    monkeypatch.setattr(atomic.shutil, "rmtree", lambda *_, **__: None)  # killed before anything is deleted
    atomic.remove_folder(folder)
    assert not folder.exists()
    assert [p.name for p in tmp_path.iterdir()] == [".step_00000001.deleted"]
