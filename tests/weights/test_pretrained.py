"""A model from whatever a person names: a run, one of its checkpoints, or the weights of others."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from gpt2fast import config, export, ops, pretrained, weights
from gpt2fast.decode import Sampling, generate
from gpt2fast.errors import UserError
from gpt2fast.export import ExportConfig
from gpt2fast.model import GPT
from gpt2fast.train import train
from tests.tools import foreign, tiny
from tests.tools.foreign import CONFIG, random_tensors

CPU = torch.device("cpu")
IDX = torch.tensor([[1, 2, 3]])
REAL_SIZE = """
import torch
from transformers import GPT2Config, GPT2LMHeadModel
model = GPT2LMHeadModel(GPT2Config())
model.save_pretrained("safetensors")
model.config.save_pretrained("pickle")
torch.save(model.state_dict(), "pickle/pytorch_model.bin")
with torch.no_grad():
    torch.save(model.eval()(torch.arange(5)[None]).logits, "logits.pt")
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run's folder with checkpoints of steps 10 and 20."""
    c = tiny.config(tmp_path_factory.mktemp("run"))
    train(c)
    return c.folder


def same(a: GPT, b: GPT) -> bool:
    tensors, others = a.state_dict(), b.state_dict()
    return list(tensors) == list(others) and all(torch.equal(tensors[name], others[name]) for name in tensors)


def test_a_run_is_its_newest_checkpoint(run):
    newest = run / "checkpoints" / "step_00000020"
    model, where = pretrained.load(run, CPU)
    assert where == str(newest)
    for source in (str(run), newest, newest / "model.safetensors"):
        assert same(pretrained.load(source, CPU)[0], model)
        assert pretrained.read(source).config == tiny.MODEL
        assert pretrained.read(source).where == str(newest)
    older, where = pretrained.load(run / "checkpoints" / "step_00000010", CPU)
    assert where.endswith("step_00000010")
    assert not same(older, model)


def test_a_checkpoint_that_was_moved_needs_no_run(run, tmp_path):
    shutil.copytree(run / "checkpoints" / "step_00000020", tmp_path / "moved")
    assert same(pretrained.load(tmp_path / "moved", CPU)[0], pretrained.load(run, CPU)[0])


def test_a_run_without_a_checkpoint_and_a_folder_without_a_run(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="holds no checkpoint yet: let the run reach its first one"):
        pretrained.load(tmp_path, CPU)
    (tmp_path / "checkpoints").rmdir()
    with pytest.raises(UserError, match="holds no run and no weights that are known"):
        pretrained.load(tmp_path, CPU)


def test_a_damaged_checkpoint_is_refused(run, tmp_path):
    moved = Path(shutil.copytree(run / "checkpoints" / "step_00000020", tmp_path / "moved"))
    data = bytearray((moved / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (moved / "model.safetensors").write_bytes(data)
    for source in (moved, moved / "model.safetensors"):
        with pytest.raises(UserError, match="is damaged .model.safetensors does not match its checksum"):
            pretrained.read(source)


def test_others_weights_make_a_model_that_can_be_trained(tmp_path):
    model, where = pretrained.load(foreign.huggingface_folder(tmp_path / "a"), CPU)
    assert where == str(tmp_path / "a")
    assert model.config == CONFIG
    for name, tensor in random_tensors().items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert not model.wte.weight[CONFIG.vocab_size :].any()
    model(IDX, IDX).backward()
    assert all(p.grad is not None and p.is_contiguous() for p in model.parameters())


def test_out_of_a_run_and_in_again(run, tmp_path):
    model, _ = pretrained.load(run, CPU)
    for out, format in (("hf", "huggingface"), ("a.bin", "llm.c")):
        export.export(ExportConfig(source=str(run), out=tmp_path / out, format=format))
        again, _ = pretrained.load(tmp_path / out, CPU)
        assert again.config == model.config
        assert same(again, model)
        assert torch.equal(again(IDX), model(IDX))


def test_the_backend_is_the_runs_or_the_one_named(run, tmp_path, monkeypatch):
    built = []
    build = ops.build
    monkeypatch.setattr(ops, "build", lambda chosen, device: built.append(chosen) or build(chosen, device))
    trained = config.read_config(run).implementations
    foreign.huggingface_folder(tmp_path / "a")
    for source, backend in ((run, "auto"), (run, "torch"), (tmp_path / "a", "auto"), (tmp_path / "a", "torch")):
        pretrained.load(source, CPU, backend)
    torch_only = ops.OpsConfig().with_backend("torch")
    assert [chosen.with_backend("torch") for chosen in built] == [trained, torch_only, torch_only, torch_only]


def test_a_run_of_interpreted_kernels_is_known_as_one(run, tmp_path, monkeypatch):
    """And so written and evaluated in fp32: the interpreter computes bf16 wrongly."""
    moved = Path(shutil.copytree(run, tmp_path / "moved"))
    record = json.loads((moved / "config.json").read_text())
    record["config"]["ops"]["attention"] = "triton"
    (moved / "config.json").write_text(json.dumps(record))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    interpreted = [ops.interpreted(pretrained.implementations(source, CPU, "auto")) for source in (run, moved)]
    assert interpreted == [False, True]


@pytest.mark.kernel
def test_foreign_weights_in_our_kernels_write_what_torch_writes(tmp_path, device):
    wide = foreign.GPTConfig(n_layer=2, n_head=1, n_embd=16, block_size=8, vocab_size=50)
    settings = json.loads(foreign.huggingface_config(wide))
    tensors = random_tensors(wide)
    tensors["wpe.weight"] *= 20  # or one token would follow itself for ever
    folder = foreign.huggingface_folder(tmp_path / "a", foreign.conv1d(tensors), **settings)
    texts = []
    for backend in ("torch", "triton"):
        model, _ = pretrained.load(folder, device, backend)
        assert (model.ops.cached_attention.__module__ == "gpt2fast.kernels.attention_decode") == (backend == "triton")
        texts.append(generate(model, [[3, 1], [7]], 6, Sampling(temperature=0)).tolist())
    assert texts[0] == texts[1]
    assert len(set(texts[0][0])) > 1


def test_heads_that_the_kernels_cannot_take_are_refused(tmp_path):
    narrow = foreign.GPTConfig(n_layer=1, n_head=2, n_embd=4, block_size=8, vocab_size=9)
    settings = json.loads(foreign.huggingface_config(narrow))
    folder = foreign.huggingface_folder(tmp_path / "a", foreign.conv1d(random_tensors(narrow)), **settings)
    assert pretrained.load(folder, CPU)[0].config == narrow
    with pytest.raises(UserError, match="triton's attention takes"):
        pretrained.load(folder, CPU, "triton")


@pytest.mark.long
def test_the_real_size(tmp_path):
    pytest.importorskip("transformers", reason="it makes the model")
    foreign.run_transformers(REAL_SIZE, tmp_path)
    found = weights.read(tmp_path / "safetensors")
    other = weights.read(tmp_path / "pickle").tensors
    assert found.config == foreign.GPTConfig()
    assert all(torch.equal(tensor, other[name]) for name, tensor in found.tensors.items())
    model, _ = pretrained.load(tmp_path / "pickle", CPU)
    torch.testing.assert_close(model(torch.arange(5)[None]), torch.load(tmp_path / "logits.pt"))
