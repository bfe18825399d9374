"""Settings: presets, flags, and what follows from a device."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gpt2fast import config, device, flops
from gpt2fast.config import PRESETS, TrainConfig
from gpt2fast.errors import UserError
from gpt2fast.model import SIZES
from gpt2fast.ops import OpsConfig

GIB = 2**30


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_size_that_passes_its_own_checks(name):
    c = PRESETS[name]
    assert c.model == SIZES[name]
    assert c.folder == Path("out") / name
    config.check(config.resolve(c, 80 * GIB))


@pytest.mark.parametrize(("steps", "warmup"), [(19073, 715), (340, 17), (10, 1), (1, 1)])
def test_warm_up_follows_from_the_steps(steps, warmup):
    assert config.resolve(TrainConfig(steps=steps), None).warmup == warmup
    assert config.resolve(TrainConfig(steps=steps, warmup=0), None).warmup == 0


def test_gpt2_takes_half_a_million_tokens_a_step():
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
    c, source = config.parse(argv, "nano")
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
    c, _ = config.parse(["nano", "--backend", backend, "--ops.mlp", "compiled"], "nano")
    assert c.implementations.mlp == "compiled"
    assert c.implementations.linear == (None if backend == "auto" else backend)
    assert PRESETS["nano"].backend == "torch"


@pytest.mark.parametrize("flags", [["--backend", "compiled"], ["--backend", "fastest"], ["--ops.mlp", "auto"]])
def test_no_such_backend(flags, capsys):
    pytest.importorskip("tyro", reason="needs tyro for the command line")
    with pytest.raises(SystemExit):
        config.parse(["nano", *flags], "nano")
    assert "invalid choice" in capsys.readouterr().err


def test_what_auto_became_is_read_back(tmp_path):
    c = replace(PRESETS["nano"], backend="auto", ops=OpsConfig(mlp="compiled"))
    resolved = {"ops": {"mlp": "compiled"}, "precision": "bf16", "compile": False, "unigram_entropy": 5.8}
    resolved |= {"data_fingerprint": "0" * 16}
    text = json.dumps({"config": config.to_dict(c), "resolved": resolved})
    (tmp_path / "config.json").write_text(text)
    assert config.read_record(tmp_path) == (c, resolved)


def test_without_a_preset_the_header_says_which_was_taken():
    pytest.importorskip("tyro", reason="needs tyro for the command line")
    c, source = config.parse(["--steps", "5"], "nano")
    assert (c.model, c.steps) == (SIZES["nano"], 5)
    assert source == "preset nano (none was named; nano, gpt2, gpt2-medium, gpt2-large, gpt2-xl)"


def test_the_batch_size_follows_from_memory():
    sizes = [config.default_batch_size(PRESETS["gpt2"], memory * GIB) for memory in (141, 80, 40, 24, 8)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 64
    assert sizes[-1] >= 1
    assert config.default_batch_size(PRESETS["gpt2-xl"], 24 * GIB) == 1
    assert config.default_batch_size(PRESETS["gpt2"], None) == 4
    assert [config.default_batch_size(PRESETS["nano"], None, ranks) for ranks in (1, 2, 8)] == [8, 4, 1]
    assert config.default_batch_size(TrainConfig(seq_len=1024, total_batch=3 * 1024), 141 * GIB) == 1


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert device.pick_device("auto").type == "cpu"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert device.pick_device("auto").type == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device.pick_device("auto").type == "cuda"
    assert device.pick_device("cuda:1").index == 1
    with pytest.raises(UserError, match="cuda:2 was asked for, and torch sees 2"):
        device.pick_device("cuda:2")


@pytest.mark.parametrize(("capability", "precision"), [((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")], ids=str)
def test_precision_on_cuda(monkeypatch, capability, precision):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA Toy")
    cuda = torch.device("cuda")
    assert device.pick_precision("auto", cuda) == precision
    assert device.pick_precision("fp32", cuda) == "fp32"
    if precision == "fp16":
        with pytest.raises(UserError, match="NVIDIA Toy has no bf16 units"):
            device.pick_precision("bf16", cuda)


def test_what_is_interpreted_runs_in_fp32():
    cpu = torch.device("cpu")
    assert device.pick_precision("auto", cpu, interpreted=True) == "fp32"
    assert device.pick_precision("fp32", cpu, interpreted=True) == "fp32"
    with pytest.raises(
        UserError, match=r"interpreter \(TRITON_INTERPRET=1\) computes bf16 wrongly: use --precision fp32"
    ):
        device.pick_precision("bf16", cpu, interpreted=True)


def test_flops_are_those_of_the_literature():
    gpt2 = SIZES["gpt2"]
    assert flops.parameters(gpt2) == 124_439_808
    assert flops.flops_per_token(gpt2, 1024) / 1e6 == pytest.approx(859.9, abs=0.05)
    assert flops.mfu(700_000, gpt2, 1024, flops.peak_flops("NVIDIA H200", "bf16")) == pytest.approx(0.608, abs=0.001)


@pytest.mark.slow
def test_flops_agree_with_torchs_counter():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from gpt2fast import reference
    from gpt2fast.model import GPT, GPTConfig
    from gpt2fast.ops import Ops

    c = GPTConfig(n_layer=2, n_head=2, n_embd=64, block_size=128, vocab_size=1024)
    # the counter cannot look into cpu's operators
    ops = Ops(**{name: getattr(reference, name) for name in Ops.__dataclass_fields__})
    model, idx = GPT(c, ops), torch.zeros(1, 128, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # older ones count no CPU's flash
        model(idx, idx).backward()
    # Not matmuls, though 6 N counts them: positions, biases and LayerNorm
    counted = counter.get_total_flops() / 128
    matmul = 6 * (2 * 12 * 64 * 64 + 1024 * 64)
    attention = 12 * 2 * 64 * 128
    assert counted == matmul + attention


def test_an_unknown_device_has_no_mfu():
    for name, precision in (
        ("NVIDIA H200 NVL", "bf16"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16"),
        ("Intel", "fp32"),
    ):
        assert flops.mfu(1e6, SIZES["gpt2"], 1024, flops.peak_flops(name, precision)) is None
    assert flops.peak_flops("NVIDIA H200", "fp32", tf32=True) > flops.peak_flops("NVIDIA H200", "fp32")
