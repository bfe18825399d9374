"""What inspect prints and draws is in the weights and in metrics.jsonl; figures are checked by their data."""

import json
import math

import numpy as np
import pytest
import torch

from gpt2fast import inspect
from gpt2fast.data import dataset, shards
from gpt2fast.errors import RunError, UserError
from gpt2fast.inspect import InspectConfig
from gpt2fast.train import train
from gpt2fast.training.record import read_record
from gpt2fast.training.run import read_metrics
from gpt2fast.weights import load
from gpt2fast.weights.foreign import Weights
from tests.tools import tiny


def test_the_table_has_every_tensor(weights):
    lines = [line.split("  ") for line in inspect.tensor_table(weights).splitlines()]
    rows = {line[0]: [part.strip() for part in line[1:] if part.strip()] for line in lines[1:]}
    assert list(rows) == [*weights.tensors, "total"]
    for name, tensor in weights.tensors.items():
        x = tensor.numpy().astype(np.float64)
        shape, n, mean, std = rows[name]
        assert shape == " x ".join(map(str, x.shape))
        assert n == f"{x.size:,}"
        assert (mean, std) == (f"{x.mean():.6f}", f"{x.std():.6f}")
    assert rows["total"] == [f"{50257 * 16 + 16 * 16 + 12 * 16 * 16 + 13 * 16 + 2 * 16:,}"]
    assert len({len(line) for line in inspect.tensor_table(weights).splitlines()[:-1]}) == 1  # aligned


def test_a_mean_is_summed_in_float64():
    tensor = torch.full((2**20,), 1.0)
    tensor[0] = 2.0**24
    weights = Weights(tiny.MODEL, {"a": tensor}, "")
    assert f"{tensor.numpy().astype(np.float64).mean():.6f}" in inspect.tensor_table(weights)


def test_what_the_tied_head_saves(weights):
    total, tied = 50257 * 16 + 16 * 16 + 12 * 16 * 16 + 13 * 16 + 2 * 16, 50257 * 16
    text = inspect.tied_head(weights)
    assert (
        f"saves {tied:,} parameters ({tied * 4 / 1e6:.1f} MB in fp32), {100 * tied / total:.0f}% of {total:,}" in text
    )


def test_tokens_that_are_not_in_the_data_are_marked(finished, weights):
    shard = dataset.open_folder(finished.folder.parents[1] / "data", 50257).train[0]
    never, how = inspect.never_trained(weights, finished.folder)
    assert np.array_equal(never, np.setdiff1d(np.arange(50257), shard))
    assert how == "not in the training data"
    wte = weights.tensors["wte.weight"]
    rest, marked = inspect.draw_tokens(wte, never, how, "x").axes[0].get_lines()
    assert np.array_equal(marked.get_xdata(), never)
    assert np.array_equal(marked.get_ydata(), wte.norm(dim=1)[never].numpy())
    assert np.array_equal(rest.get_xdata(), np.unique(shard))
    assert f"{len(never):,} never trained" in marked.get_label()


def test_without_the_data_never_trained_tokens_are_guessed(tmp_path):
    c = tiny.config(tmp_path, steps=40, model=tiny.GPT2_WORDS)
    for name in ("train", "val"):  # tokens that text may contain
        path = tmp_path / "data" / f"{name}.bin"
        shards.write_shard(path, shards.open_shard(path, 50257) + np.uint16(1000))
    train(c)
    seen = np.unique(dataset.open_folder(tmp_path / "data", 50257).train[0])
    never, how = inspect.never_trained(load.read_weights(c.folder), None)
    assert "guess" in how
    assert len(np.intersect1d(never, seen)) <= 0.05 * len(seen)
    assert len(never) >= 0.99 * (50257 - len(seen))
    assert set(inspect.NO_TEXT) <= set(never)
    assert inspect.never_trained(Weights(tiny.MODEL, {"wte.weight": torch.zeros(64, 8)}, ""), None)[0] is None
    assert len(inspect.draw_tokens(torch.ones(64, 8), None, "", "x").axes[0].get_lines()) == 1


def test_changed_data_is_not_used(tmp_path):
    c = tiny.config(tmp_path, steps=1, warmup=1)
    train(c)
    tiny.write_data(tmp_path / "data", seed=5)
    assert "guess" in inspect.never_trained(load.read_weights(c.folder), c.folder)[1]


def test_command_line(finished, run_module, tmp_path):
    pytest.importorskip("tyro", reason="needs tyro for the command line")
    from matplotlib.image import imread

    other = tiny.config(tmp_path, steps=2, warmup=1, run="other")
    train(other)
    done = run_module("gpt2fast.inspect", finished.folder, other.folder, check=True)
    written = sorted((tmp_path / "out" / "inspect").rglob("*.png"))
    assert [path.relative_to(tmp_path / "out" / "inspect").as_posix() for path in written] == [
        *(f"{name}/{kind}.png" for name in ("other",) for kind in ("positions", "similarity", "tokens")),
        "runs.png",
        *(f"tiny/{kind}.png" for kind in ("positions", "similarity", "tokens")),
    ]
    for path in written:
        height, width, _ = imread(path).shape
        assert 400 < height < width < 2000
        assert f"picture  {path.relative_to(tmp_path)}" in done.stdout
    assert "h.0.attn.c_attn.weight  48 x 16" in done.stdout
    assert "step_00000020\n" in done.stdout
    assert "tied head: " in done.stdout
    run_module("gpt2fast.inspect", finished.folder, check=True)  # it replaces its own pictures


def test_a_label_says_what_a_run_was_computed_with(finished, tmp_path):
    assert inspect.run_label(finished.folder, "a") == "a: torch, fp32"
    record = json.loads((finished.folder / "config.json").read_text())
    record["resolved"] |= {"compile": True, "ops": record["resolved"]["ops"] | {"mlp": "triton"}}
    (tmp_path / "config.json").write_text(json.dumps(record))
    assert inspect.run_label(tmp_path, "b") == "b: torch, mlp=triton, fp32, compiled"


def test_folder_names():
    assert inspect.folder_names(["out/a", "out/b/", "gpt2"]) == ["a", "b", "gpt2"]
    assert inspect.folder_names(["x/a", "y/a", "out/b"]) == ["x_a", "y_a", "b"]
    with pytest.raises(UserError, match="named twice"):
        inspect.folder_names(["out/a", "./out/a/"])


def copy_run(finished, folder, metrics):
    """Make a run without checkpoints."""
    folder.mkdir()
    (folder / "config.json").write_bytes((finished.folder / "config.json").read_bytes())
    (folder / "metrics.jsonl").write_text(metrics)
    return folder


def test_a_run_without_checkpoints_has_curves(finished, tmp_path):
    metrics = (finished.folder / "metrics.jsonl").read_text()
    folder = copy_run(finished, tmp_path / "young", metrics + '{"step": 21, "lo')  # cut off by a kill
    out = tmp_path / "pictures"
    texts = inspect.inspect(InspectConfig(sources=(str(folder),), out=out))
    assert texts == [f"{folder}: no checkpoint yet, so no weights", f"picture  {out / 'runs.png'}"]
    assert [path.name for path in out.iterdir()] == ["runs.png"]
    assert read_metrics(folder / "metrics.jsonl") == [json.loads(line) for line in metrics.splitlines()]


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ("", "no row of a training step"),
        ('{"step": 1, "val_loss": 3.0}\n', "no row of a training step"),
        ('{"step": 1, "lo\n{"step": 2, "loss": 1.0}\n', "line 1 is damaged"),
        ('{"step": 1, "loss": 1.0}\n{"loss": 1.0}\n', "line 2 is damaged.*step"),
        ('{"step": "1", "loss": 1.0}\n', "line 1 is damaged"),
        ("[]\n", "line 1 is damaged"),
        ("\xff\n", "line 1 is damaged"),
    ],
)
def test_damaged_metrics_are_refused(finished, tmp_path, metrics, message):
    folder = copy_run(finished, tmp_path / "run", "")
    (folder / "metrics.jsonl").write_bytes(metrics.encode("latin-1"))
    with pytest.raises(UserError, match=message):
        inspect.inspect(InspectConfig(sources=(str(folder),), out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_inspected_is_refused(finished, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="nowhere/x/y"):  # found before the good one is drawn
        inspect.inspect(InspectConfig(sources=(str(finished.folder), "nowhere/x/y"), out=out))
    with pytest.raises(UserError, match="nothing to inspect"):
        inspect.inspect(InspectConfig(sources=(), out=out))
    assert not out.exists()
    out.mkdir()
    (out / "runs.png").write_bytes(b"mine")
    with pytest.raises(UserError, match="runs.png exists and is not our picture"):
        inspect.inspect(InspectConfig(sources=(str(finished.folder),), out=out))
    assert [path.name for path in out.iterdir()] == ["runs.png"]
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="choose another folder with --out"):
        inspect.inspect(InspectConfig(sources=(str(finished.folder),), out=tmp_path / "file" / "x"))


def test_training_draws_loss_png(finished):
    from matplotlib.image import imread

    assert imread(finished.folder / "loss.png").shape == (540, 960, 4)
    assert math.isfinite(read_record(finished.folder)[1]["unigram_entropy"])
