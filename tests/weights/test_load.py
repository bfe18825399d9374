"""A model is loaded from a run, one of its checkpoints, or other projects' weights."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from gpt2fast import export, ops
from gpt2fast.errors import UserError
from gpt2fast.export import ExportConfig
from gpt2fast.inference.decode import Sampling, generate
from gpt2fast.model import GPT
from gpt2fast.train import train
from gpt2fast.weights import load
from gpt2fast.weights.foreign import read_foreign
from tests.tools import foreign_files, tiny
from tests.tools.foreign_files import CONFIG, random_tensors

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


def test_a_run_means_its_newest_checkpoint(run):
    newest = run / "checkpoints" / "step_00000020"
    model, where = load.load_model(run, CPU), load.read_weights(run).where
    assert where == str(newest)
    for source in (str(run), newest, newest / "model.safetensors"):
        assert same(load.load_model(source, CPU), model)
        assert load.read_weights(source).config == tiny.MODEL
        assert load.read_weights(source).where == str(newest)
    assert not same(load.load_model(run / "checkpoints" / "step_00000010", CPU), model)


def test_a_checkpoint_that_was_moved_needs_no_run(run, tmp_path):
    shutil.copytree(run / "checkpoints" / "step_00000020", tmp_path / "moved")
    assert same(load.load_model(tmp_path / "moved", CPU), load.load_model(run, CPU))


def test_a_run_without_a_checkpoint_and_a_folder_without_a_run(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="holds no checkpoint yet: let the run reach its first one"):
        load.load_model(tmp_path, CPU)
    (tmp_path / "checkpoints").rmdir()
    with pytest.raises(UserError, match="holds no run and no known weights"):
        load.load_model(tmp_path, CPU)


def test_a_damaged_checkpoint_is_refused(run, tmp_path):
    moved = Path(shutil.copytree(run / "checkpoints" / "step_00000020", tmp_path / "moved"))
    data = bytearray((moved / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (moved / "model.safetensors").write_bytes(data)
    for source in (moved, moved / "model.safetensors"):
        with pytest.raises(UserError, match="is damaged .model.safetensors does not match its checksum"):
            load.read_weights(source)


def test_a_model_with_foreign_weights_can_be_trained(tmp_path):
    folder = foreign_files.huggingface_folder(tmp_path / "a")
    model, where = load.load_model(folder, CPU), load.read_weights(folder).where
    assert where == str(tmp_path / "a")
    assert model.config == CONFIG
    for name, tensor in random_tensors().items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert not model.wte.weight[CONFIG.vocab_size :].any()
    model(IDX, IDX).backward()
    assert all(p.grad is not None and p.is_contiguous() for p in model.parameters())


def test_an_exported_run_is_read_back_exactly(run, tmp_path):
    model = load.load_model(run, CPU)
    for out, format in (("hf", "huggingface"), ("a.bin", "llm.c")):
        export.export(ExportConfig(source=str(run), out=tmp_path / out, format=format))
        again = load.load_model(tmp_path / out, CPU)
        assert again.config == model.config
        assert same(again, model)
        assert torch.equal(again(IDX), model(IDX))


def recorded(run: Path, folder: Path, **state) -> Path:
    """Copy the run and change state.json of its newest checkpoint; None removes a value."""
    copy = Path(shutil.copytree(run, folder))
    path = copy / "checkpoints" / "step_00000020"
    values = json.loads((path / "state.json").read_text()) | state
    (path / "state.json").write_text(json.dumps({name: x for name, x in values.items() if x is not None}))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["state.json"]["sha256"] = hashlib.sha256((path / "state.json").read_bytes()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest))
    return copy


def chosen(source: Path, backend: str = "auto", said: list | None = None) -> ops.OpsConfig:
    return load.choose_ops(load.read_weights(source), CPU, backend, [].append if said is None else said.append)


def test_the_ops_are_those_of_training_or_of_a_named_backend(run, tmp_path):
    compiled = dict.fromkeys(ops.NAMES, "torch") | {"mlp": "compiled"}
    trained = recorded(run, tmp_path / "compiled", ops=compiled)
    moved = shutil.copytree(trained / "checkpoints" / "step_00000020", tmp_path / "moved")
    foreign_files.huggingface_folder(tmp_path / "a")
    torch_only = ops.OpsConfig().with_backend("torch")
    said: list[str] = []
    assert chosen(run, said=said) == torch_only
    assert chosen(trained, said=said) == chosen(moved, said=said) == ops.OpsConfig(**compiled)
    assert chosen(trained, "torch") == torch_only
    assert chosen(tmp_path / "a", said=said).with_backend("torch") == torch_only
    assert said == []


def test_torch_replaces_what_cannot_run_here_and_a_line_says_so(run, tmp_path, monkeypatch):
    """Trained on a GPU, sampled on a laptop."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    ours = dict.fromkeys(ops.NAMES, "triton") | {"mlp": "epilogue", "linear": "compiled"}
    trained, said = recorded(run, tmp_path / "triton", ops=ours), []
    found = chosen(trained, said=said)
    assert found == ops.OpsConfig(**dict.fromkeys(ops.NAMES, "torch") | {"linear": "compiled"})
    assert said == [
        f"note: {trained}/checkpoints/step_00000020 was trained with embedding=triton, layer_norm=triton, "
        "add_layer_norm=triton, attention=triton, mlp=epilogue, linear_cross_entropy=triton, which cannot run here "
        "(the triton backend needs a CUDA GPU, and this run is on cpu): torch is used instead"
    ]
    assert same(load.load_model(trained, CPU, say=said.append), load.load_model(run, CPU))
    _, why = ops.runnable(ops.OpsConfig().with_backend("triton"), "cpu")
    assert why.startswith("triton ops, which cannot run here (")
    with pytest.raises(UserError, match="triton"):  # named explicitly: refused
        load.load_model(trained, CPU, "triton")


def test_a_run_of_interpreted_kernels_is_recognised(run, tmp_path, monkeypatch):
    """So it is sampled and evaluated in fp32: the interpreter computes bf16 wrongly."""
    ours = recorded(run, tmp_path / "ours", ops=dict.fromkeys(ops.NAMES, "torch") | {"attention": "triton"})
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert [ops.interpreted(chosen(source)) for source in (run, ours)] == [False, True]


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_an_older_run_without_ops_in_state_json_is_read(run, tmp_path, backend):
    """Its config.json has them: those that were named, and those that --backend auto chose."""
    old = recorded(run, tmp_path / "old", ops=None)
    record = json.loads((old / "config.json").read_text())
    record["config"]["backend"], record["config"]["ops"]["mlp"] = backend, "compiled"
    record["resolved"]["ops"] = dict.fromkeys(ops.NAMES, "compiled") | {"attention": "torch"}
    (old / "config.json").write_text(json.dumps(record))
    others = "torch" if backend == "torch" else "compiled"
    assert chosen(old) == ops.OpsConfig(**dict.fromkeys(ops.NAMES, others) | {"mlp": "compiled", "attention": "torch"})
    (old / "config.json").unlink()
    assert chosen(old).with_backend("torch") == ops.OpsConfig().with_backend("torch")


@pytest.mark.kernel
def test_foreign_weights_generate_the_same_tokens_in_our_kernels(tmp_path, device):
    wide = foreign_files.GPTConfig(n_layer=2, n_head=1, n_embd=16, block_size=8, vocab_size=50)
    settings = json.loads(foreign_files.huggingface_config(wide))
    tensors = random_tensors(wide)
    tensors["wpe.weight"] *= 20  # or one token would repeat for ever
    folder = foreign_files.huggingface_folder(tmp_path / "a", foreign_files.conv1d(tensors), **settings)
    texts = []
    for backend in ("torch", "triton"):
        model = load.load_model(folder, device, backend)
        assert (model.ops.cached_attention.__module__ == "gpt2fast.kernels.attention_decode") == (backend == "triton")
        texts.append(generate(model, [[3, 1], [7]], 6, Sampling(temperature=0)).tolist())
    assert texts[0] == texts[1]
    assert len(set(texts[0][0])) > 1


def test_head_sizes_that_the_kernels_do_not_support_are_refused(tmp_path):
    narrow = foreign_files.GPTConfig(n_layer=1, n_head=2, n_embd=4, block_size=8, vocab_size=9)
    settings = json.loads(foreign_files.huggingface_config(narrow))
    folder = foreign_files.huggingface_folder(tmp_path / "a", foreign_files.conv1d(random_tensors(narrow)), **settings)
    assert load.load_model(folder, CPU).config == narrow
    with pytest.raises(UserError, match="triton's attention supports"):
        load.load_model(folder, CPU, "triton")


@pytest.mark.long
def test_the_real_size(tmp_path):
    pytest.importorskip("transformers", reason="it makes the model")
    foreign_files.run_transformers(REAL_SIZE, tmp_path)
    found = read_foreign(tmp_path / "safetensors")
    other = read_foreign(tmp_path / "pickle").tensors
    assert found.config == foreign_files.GPTConfig()
    assert all(torch.equal(tensor, other[name]) for name, tensor in found.tensors.items())
    model = load.load_model(tmp_path / "pickle", CPU)
    torch.testing.assert_close(model(torch.arange(5)[None]), torch.load(tmp_path / "logits.pt"))
