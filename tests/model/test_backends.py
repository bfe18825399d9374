"""GPT-2 on the triton backend has the losses of the torch backend: with each op swapped, and with all."""

from dataclasses import asdict

import pytest
import torch

from gpt2fast.model import GPT, GPTConfig
from gpt2fast.ops import NAMES, OpsConfig, build
from gpt2fast.training import optim
from gpt2fast.training.run import read_metrics
from gpt2fast.training.step import TrainingStep
from tests.tools import tiny
from tests.tools.accuracy import assert_as_accurate

pytestmark = pytest.mark.kernel

CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=64, block_size=40, vocab_size=300)  # padded by 20
STEPS = 10
SWAPS = {name: OpsConfig(**{name: "triton"}) for name in NAMES} | {"all": OpsConfig().with_backend("triton")}
runs: dict[tuple, torch.Tensor] = {}


def losses(config: OpsConfig, precision: str, device: torch.device) -> torch.Tensor:
    """Return the losses of STEPS steps of AdamW on one batch: in float64, fp32 or under bf16 autocast."""
    key = (tuple(asdict(config.with_backend("torch")).values()), precision)
    if key not in runs:
        model = GPT(CONFIG, build(config, device.type)).to(device)
        if precision == "fp64":
            model = model.double()
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(CONFIG.vocab_size, (2, 41), generator=generator).to(device)
        take_step = TrainingStep(model, optim.adamw(model, 0.1), precision="fp32" if precision == "fp64" else precision)
        batches = iter([(tokens[:, :-1], tokens[:, 1:])] * STEPS)
        runs[key] = torch.stack([take_step(batches, 3e-3)[0].detach().cpu() for _ in range(STEPS)])
    return runs[key]


@pytest.mark.long
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("swap", SWAPS)
def test_losses_are_as_accurate_as_the_torch_backends(swap, precision, device):
    truth, base = losses(OpsConfig(), "fp64", device).double(), losses(OpsConfig(), precision, device)
    got = losses(SWAPS[swap], precision, device)
    assert truth[-1] < truth[0] - 1.0
    assert_as_accurate(got, truth, base, name=f"losses with {swap} swapped")


@pytest.mark.long
def test_the_training_program_gives_the_torch_backends_losses(run_module, tmp_path):
    """`TRITON_INTERPRET=1 python -m gpt2fast.train nano --backend triton`, smaller; fp32 is chosen by itself."""
    pytest.importorskip("tyro", reason="needs tyro for the command line")
    tiny.write_data(tmp_path / "data")
    flags = [*tiny.FLAGS, "--model.n-embd", "32", "--steps", "3", "--warmup", "1"]
    losses = {}
    for backend in ("torch", "triton"):
        precision = "fp32" if backend == "torch" else "auto"
        own = ["--backend", backend, "--run", backend, "--precision", precision]
        done = run_module("gpt2fast.train", *flags, *own, env={"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""})
        if "pip install 'numpy<2.4'" in done.stderr:
            pytest.skip(done.stderr)
        assert done.returncode == 0, done.stderr
        assert "precision   fp32" in done.stdout
        assert f"ops         {backend}" in done.stdout
        rows = read_metrics(tmp_path / "out" / backend / "metrics.jsonl")
        losses[backend] = [row[name] for row in rows for name in ("loss", "val_loss") if name in row]
    assert len(losses["torch"]) > 3
    assert losses["triton"] == pytest.approx(losses["torch"], abs=2e-5)
