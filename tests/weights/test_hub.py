"""Models by their name on the hub, which is replaced by a folder here; and the message without a hub."""

import shutil
import sys
from pathlib import Path

import pytest
import torch

from gpt2fast.errors import UserError
from gpt2fast.weights.foreign import read_foreign
from tests.tools import foreign_files
from tests.tools.foreign_files import conv1d, random_tensors

hub = pytest.importorskip("huggingface_hub", reason="its snapshot_download is replaced")


def fake_hub(monkeypatch, repository: Path) -> list[str]:
    """Replace huggingface_hub by a folder. Return the list of names that were asked for, which grows."""
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append(name)
        cache = repository.parent / "cache"
        cache.mkdir(exist_ok=True)
        for path in repository.iterdir():
            if any(path.match(pattern) for pattern in allow_patterns):
                shutil.copy(path, cache)
        return str(cache)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    return asked


@pytest.mark.parametrize("source", ["gpt2-xl", "someone/gpt2"])
def test_from_the_hub(tmp_path, monkeypatch, source):
    repository = foreign_files.huggingface_folder(tmp_path / "repository")
    torch.save({"never": "downloaded"}, repository / "pytorch_model.bin")
    asked = fake_hub(monkeypatch, repository)
    found = read_foreign(source)
    assert asked == ["openai-community/gpt2-xl" if source == "gpt2-xl" else source]
    assert found.where == f"{asked[0]} on the hub"
    assert not (tmp_path / "cache" / "pytorch_model.bin").exists()
    assert torch.equal(found.tensors["wte.weight"], random_tensors()["wte.weight"])


def test_from_the_hub_without_safetensors(tmp_path, monkeypatch):
    repository = foreign_files.huggingface_folder(tmp_path / "repository")
    (repository / "model.safetensors").unlink()
    fake_hub(monkeypatch, repository)
    with pytest.raises(UserError, match="has neither model.safetensors nor pytorch_model.bin"):
        read_foreign("gpt2")
    torch.save(conv1d(random_tensors()), repository / "pytorch_model.bin")
    assert torch.equal(read_foreign("gpt2").tensors["wte.weight"], random_tensors()["wte.weight"])


def test_a_path_wins_over_the_hub(tmp_path, monkeypatch):
    asked = fake_hub(monkeypatch, tmp_path)
    monkeypatch.chdir(tmp_path)
    foreign_files.huggingface_folder(tmp_path / "gpt2")
    assert read_foreign("gpt2").where == "gpt2"
    for path in ("../gpt2-mine", "/data/gpt2", "out/model.bin", "a/b/c", "gpt3", "out/"):
        with pytest.raises(UserError, match="does not exist: name a run's folder"):
            read_foreign(path)
    assert not asked


def test_without_the_hub_the_message_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    by_hand = "download config.json and model.safetensors from https://huggingface.co/someone/gpt2 into a folder"
    with pytest.raises(UserError, match=rf"someone/gpt2 could not be downloaded \(\w+: .*\): {by_hand}"):
        read_foreign("someone/gpt2")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=rf"pip install 'gpt2fast\[hub\]'; or {by_hand}"):
        read_foreign("someone/gpt2")
