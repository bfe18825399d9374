"""Settings: presets, flags, and the values that depend on a device."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from gpt2fast import train
from gpt2fast.errors import UserError
from gpt2fast.model import SIZES
from gpt2fast.ops import OpsConfig
from gpt2fast.training import config
from gpt2fast.training.config import PRESETS, TrainConfig

GIB = 2**30


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_size_that_passes_its_own_checks(name):
    c = PRESETS[name]
    assert c.model == SIZES[name]
    assert c.folder == Path("out") / name
    config.check(config.resolve(c, 80 * GIB))


@pytest.mark.parametrize(("steps", "warmup"), [(19073, 715), (340, 17), (10, 1), (1, 1)])
def test_warm_up_depends_on_the_steps(steps, warmup):
    assert config.resolve(TrainConfig(steps=steps), None).warmup == warmup
    assert config.resolve(TrainConfig(steps=steps, warmup=0), None).warmup == 0


def test_a_step_of_gpt2_has_half_a_million_tokens():
    assert PRESETS["gpt2"].total_batch == 524_288
    assert (PRESETS["gpt2"].beta1, PRESETS["gpt2"].beta2, PRESETS["gpt2"].grad_clip) == (0.9, 0.95, 1.0)


@pytest.mark.parametrize("name", PRESETS)
def test_settings_survive_json(name):
    c = replace(PRESETS[name], tokenizer_file=Path("a/b"), ops=OpsConfig(attention="torch"))
    assert config.from_dict(json.loads(json.dumps(config.to_dict(c)))) == c


def test_flags():
    pytest.importorskip("tyro", reason="needs tyro for the command line")
    argv = [
        "gpt2",
        "--ops.attention",
        "triton",
        "--model.n-layer",
        "3",
        "--lr",
        "1e-3",
        "--compile",
        "off",
        "--run",
        "x",
    ]
    c, source = train.read_settings(argv, "nano")
    assert (c.ops.attention, c.ops.mlp, c.model.n_layer, c.model.n_embd, c.lr, c.compile) == (
        "triton",
        None,
        3,
        768,
        1e-3,
        "off",
    )
    assert source == "preset gpt2"


@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
def test_backends(backend):
    pytest.importorskip("tyro", reason="needs tyro for the command line")
    c, _ = train.read_settings(["nano", "--backend", backend, "--ops.mlp", "compiled"], "nano")
    assert c.implementations.mlp == "compiled"
    assert c.implementations.linear == (None if backend == "auto" else backend)
    assert PRESETS["nano"].backend == "torch"


@pytest.mark.parametrize("flags", [["--backend", "compiled"], ["--backend", "fastest"], ["--ops.mlp", "auto"]])
def test_an_unknown_backend_is_refused(flags, capsys):
    pytest.importorskip("tyro", reason="needs tyro for the command line")
    with pytest.raises(SystemExit):
        train.read_settings(["nano", *flags], "nano")
    assert "invalid choice" in capsys.readouterr().err


def test_without_a_preset_the_header_names_the_default_one():
    pytest.importorskip("tyro", reason="needs tyro for the command line")
    c, source = train.read_settings(["--steps", "5"], "nano")
    assert (c.model, c.steps) == (SIZES["nano"], 5)
    assert source == "preset nano (none was named; nano, gpt2, gpt2-medium, gpt2-large, gpt2-xl)"


def test_the_batch_size_depends_on_memory():
    sizes = [config.default_batch_size(PRESETS["gpt2"], memory * GIB) for memory in (141, 80, 40, 24, 8)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 64
    assert sizes[-1] >= 1
    assert config.default_batch_size(PRESETS["gpt2-xl"], 24 * GIB) == 1
    assert config.default_batch_size(PRESETS["gpt2"], None) == 4
    assert [config.default_batch_size(PRESETS["nano"], None, ranks) for ranks in (1, 2, 8)] == [8, 4, 1]
    assert config.default_batch_size(TrainConfig(seq_len=1024, total_batch=3 * 1024), 141 * GIB) == 1


def test_an_unknown_preset_is_refused(folder):
    with pytest.raises(
        UserError, match="unknown preset 'gpt3': choose one of nano, gpt2, gpt2-medium, gpt2-large, gpt2-xl"
    ):
        train.main(["gpt3"])
