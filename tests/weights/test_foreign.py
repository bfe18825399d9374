"""Other projects' weights: each format bit for bit, the model against transformers' logits, damaged files refused."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gpt2fast.errors import UserError
from gpt2fast.model import GPT, SIZES
from gpt2fast.ops import OpsConfig, build
from gpt2fast.weights.foreign import read_foreign
from tests.tools import foreign_files
from tests.tools.accuracy import assert_as_accurate
from tests.tools.foreign_files import CONFIG, OPENAI, assert_same_tensors, conv1d, nanogpt_checkpoint, random_tensors

BY_HUGGING_FACE = """
import copy, torch
from transformers import GPT2Config, GPT2LMHeadModel
config = GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=8, vocab_size=50, bos_token_id=0, eos_token_id=0)
model = GPT2LMHeadModel(config).eval()
with torch.no_grad():
    for p in model.parameters():
        p.normal_(0, 0.05)
model.save_pretrained("safetensors")
model.transformer.save_pretrained("without-prefix")
model.save_pretrained("in-parts", max_shard_size="10KB")
state = dict(model.state_dict())
assert "lm_head.weight" in state
masks = {f"transformer.h.0.attn.{name}": torch.ones(1, 1, 8, 8).tril() for name in ("bias", "masked_bias")}
config.save_pretrained("pickle")
torch.save(state | masks, "pickle/pytorch_model.bin")
idx = torch.randint(50, (3, 8))
with torch.no_grad():
    results = {"idx": idx, "base": model(idx).logits, "truth": copy.deepcopy(model).double()(idx).logits}
torch.save(results | {"state": state}, "results.pt")
for dtype in (torch.bfloat16, torch.float16):
    copy.deepcopy(model).to(dtype).save_pretrained(str(dtype))
"""


@pytest.fixture(scope="module")
def by_huggingface(tmp_path_factory):
    """A folder with a folder of each kind, and results.pt: the weights, an input and its logits."""
    pytest.importorskip("transformers", reason="the yardstick here is transformers' GPT2LMHeadModel")
    folder = tmp_path_factory.mktemp("huggingface")
    foreign_files.run_transformers(BY_HUGGING_FACE, folder)
    return folder


@pytest.mark.parametrize("kind", ["safetensors", "without-prefix", "in-parts", "pickle"])
def test_hugging_face(by_huggingface, kind):
    found = read_foreign(by_huggingface / kind)
    results = torch.load(by_huggingface / "results.pt")
    assert found.config == CONFIG
    assert found.where == str(by_huggingface / kind)
    assert_same_tensors(conv1d(found.tensors), {name: results["state"][name] for name in conv1d(found.tensors)})
    model = GPT(CONFIG, build(OpsConfig()))
    model.load_state_dict(found.tensors)
    assert_as_accurate(model(results["idx"]), results["truth"], results["base"], name="logits")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_exactly(by_huggingface, dtype):
    exact = read_foreign(by_huggingface / "safetensors").tensors
    found = read_foreign(by_huggingface / str(dtype))
    assert found.config == CONFIG
    assert_same_tensors(found.tensors, {name: tensor.to(dtype).float() for name, tensor in exact.items()})


def test_a_file_by_itself_is_read_with_the_config_beside_it(tmp_path):
    needed = random_tensors()
    folder = foreign_files.huggingface_folder(tmp_path / "a")
    assert_same_tensors(read_foreign(folder / "model.safetensors").tensors, needed)
    torch.save(conv1d(needed), folder / "any.bin")
    assert read_foreign(folder / "any.bin").config == CONFIG


def test_without_a_config_the_known_sizes_tell_the_heads(tmp_path):
    config = replace(SIZES["nano"], block_size=8, vocab_size=50)
    save_file(conv1d(random_tensors(config), ""), tmp_path / "known.safetensors")
    assert read_foreign(tmp_path / "known.safetensors").config == config
    save_file(conv1d(random_tensors()), tmp_path / "unknown.safetensors")
    with pytest.raises(UserError, match="2 layers of width 16 are not a known size.*put the model's config.json"):
        read_foreign(tmp_path / "unknown.safetensors")


def test_writing_to_a_tensor_does_not_change_its_file(tmp_path):
    foreign_files.huggingface_folder(tmp_path / "a")
    nanogpt_checkpoint(tmp_path / "ckpt.pt", CONFIG, random_tensors())
    (tmp_path / "gpt2.bin").write_bytes(foreign_files.llmc_file(CONFIG, random_tensors(), 3))
    for source in (tmp_path / "a", tmp_path / "ckpt.pt", tmp_path / "gpt2.bin"):
        for tensor in read_foreign(source).tensors.values():
            tensor.zero_()
        assert_same_tensors(read_foreign(source).tensors, random_tensors())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"activation_function": "relu"}, "activation_function is 'relu': GPT-2 has 'gelu_new' or 'gelu_pytorch_tanh'"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06: GPT-2 has 1e-05"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"scale_attn_weights": False}, "scale_attn_weights is False"),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
        ({"n_inner": 100}, "n_inner is 100: GPT-2 has None or 64"),
        ({"model_type": "llama"}, "model_type is 'llama': only 'gpt2'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"n_head": None}, "n_head is None: it must be a whole number"),
        ({"n_head": 3}, "n_embd 16 is not a multiple of n_head 3"),
        ({"n_layer": 10**9}, "n_layer is 1000000000, but there are only 28 tensors"),
        ({"n_layer": 1}, "not GPT-2's: h.1.attn.c_attn.bias, .* and 9 more"),
        ({"n_layer": 3}, "missing: h.2.ln_1.weight"),
        ({"vocab_size": 51}, r"misshapen: wte.weight \(50, 16\) instead of \(51, 16\)"),
    ],
)
def test_a_config_that_is_not_gpt2_as_computed_here_is_refused(tmp_path, changes, match):
    with pytest.raises(UserError, match=match):
        read_foreign(foreign_files.huggingface_folder(tmp_path / "a", **changes))


def test_harmless_settings_are_read(tmp_path):
    settings = {"activation_function": "gelu_pytorch_tanh", "n_inner": 64, "reorder_and_upcast_attn": True}
    assert read_foreign(foreign_files.huggingface_folder(tmp_path / "a", **settings)).config == CONFIG


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t | {"lm_head.weight": t["transformer.wte.weight"] + 1}, "lm_head.weight differs from wte.weight"),
        (lambda t: {n: x for n, x in t.items() if "h.1.mlp.c_proj.bias" not in n}, "missing: h.1.mlp.c_proj.bias"),
        (lambda t: t | {"score.weight": torch.ones(2)}, "not GPT-2's: score.weight"),
        (lambda t: t | {"transformer.ln_f.bias": torch.ones(15)}, r"ln_f.bias \(15,\) instead of \(16,\)"),
        (lambda t: t | {"transformer.ln_f.bias": torch.ones(16, dtype=torch.int8)}, "ln_f.bias is torch.int8"),
        (lambda t: t | {"wpe.weight": torch.ones(8, 16)}, "holds a tensor twice"),
        (lambda t: {"a": torch.ones(1)}, "n_layer is 2, but there are only 1 tensors"),
    ],
)
def test_every_tensor_is_accounted_for(tmp_path, change, match):
    with pytest.raises(UserError, match=match):
        read_foreign(foreign_files.huggingface_folder(tmp_path / "a", change(conv1d(random_tensors()))))


def test_a_tied_head_that_is_stored_is_read(tmp_path):
    tensors = conv1d(random_tensors())
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    assert_same_tensors(
        read_foreign(foreign_files.huggingface_folder(tmp_path / "a", tensors)).tensors, random_tensors()
    )


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.npz", "model.bin", "ckpt.pt"])
def test_a_truncated_file_is_refused(tmp_path, name):
    file = io.BytesIO()
    if name.endswith(".npz"):
        shutil.copy(OPENAI / "model.npz", tmp_path / "whole.npz")
        file.write((tmp_path / "whole.npz").read_bytes())
    elif name == "model.bin":
        file.write(foreign_files.llmc_file(CONFIG, random_tensors(), 3))
    elif name == "model.safetensors":
        save_file(conv1d(random_tensors()), tmp_path / name)
        file.write((tmp_path / name).read_bytes())
    else:
        torch.save(conv1d(random_tensors()), file)
    (tmp_path / "config.json").write_text(foreign_files.huggingface_config())
    whole = file.getvalue()
    for n in sorted({0, 1, 3, 4, 100, 1500, len(whole) // 2, len(whole) - 1000, len(whole) - 4, len(whole) - 1}):
        (tmp_path / name).write_bytes(whole[:n])
        with pytest.raises(UserError, match="truncated|damaged|is not a known file of weights"):
            read_foreign(tmp_path / name)


class Code:
    """Unpickling this makes the folder "ran"."""

    def __reduce__(self):
        import os

        return os.mkdir, ("ran",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "ckpt.pt", "other.pt"])
def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": random_tensors(), "config": Code()}, name)
    for source in (name, ".") if name != "other.pt" else (name,):
        with pytest.raises(UserError, match=r"would run code \(\w+\.mkdir\).*save model.state_dict\(\) alone"):
            read_foreign(source)
    assert not Path("ran").exists()


def test_a_pickle_must_hold_a_dictionary_of_tensors(tmp_path):
    for value, match in (
        ([1], "holds a list"),
        ({"model": [1]}, "holds a list"),
        ({"a": 1}, "'a' is a int, not a tensor"),
    ):
        torch.save(value, tmp_path / "a.pt")
        with pytest.raises(UserError, match=match):
            read_foreign(tmp_path / "a.pt")


def test_unknown_files_are_refused_with_a_list_of_known_ones(tmp_path):
    with pytest.raises(UserError, match="no run and no known weights.*Hugging Face folder.*llm.c's .bin.*nanoGPT"):
        read_foreign(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(UserError, match="notes.txt is not a known file of weights"):
        read_foreign(tmp_path / "notes.txt")


def test_parts_in_another_folder_are_refused(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(UserError, match="index.json is damaged.*a file outside the folder"):
        read_foreign(tmp_path)
