"""Bad input is refused in one line before anything is written; what was saved stays good."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from gpt2fast import train as program
from gpt2fast.data import dataset
from gpt2fast.errors import RunError, UserError
from gpt2fast.model import GPT
from gpt2fast.train import train
from gpt2fast.weights import checkpoint
from tests.tools import tiny

pytest.importorskip("tyro", reason="needs tyro for the command line")


def raw_shard(n):
    def damage(folder):
        (folder / "data" / "train.bin").write_bytes(np.zeros(n, np.uint16).tobytes())

    return damage


def damage_bytes(edit):
    def damage(folder):
        path = folder / "data" / "train.bin"
        path.write_bytes(edit(path.read_bytes()))

    return damage


def unreadable(folder):
    path = folder / "data" / "train.bin"
    path.unlink()
    path.symlink_to("/proc/self/mem")  # a mode of 000 would not stop root


CUDA_ABSENT = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA GPU")
# name -> (flags, damage to the data, what the line must say)
BAD = {
    "T beyond block size": (["--seq-len", "32"], None, "--seq-len 32 is longer than the model's block size 16"),
    "B*T not dividing": (["--total-batch", "100"], None, r"--total-batch 100 is not a multiple of B\*T = 2\*16 = 32"),
    "too short": ([], raw_shard(32), r"a batch needs B\*T\+1 = 33 tokens .*, and the longest shard holds 32"),
    "truncated": ([], damage_bytes(lambda raw: raw[:-2]), "counts 1000 tokens, which take 3024 bytes, but it has 3022"),
    "wrong magic": ([], damage_bytes(lambda raw: b"\x71\xda\x34\x01" + raw[4:]), "wrong magic"),
    "token too large": ([], damage_bytes(lambda raw: raw[:-2] + b"\x51\xc4"), "token 50257 at position 999"),
    "empty shard": ([], damage_bytes(lambda raw: b""), "is empty"),
    "empty folder": (["--data", "nothing"], lambda folder: (folder / "nothing").mkdir(), "holds no training shard"),
    "no folder": (["--data", "absent"], None, "data absent does not exist"),
    "text instead of shards": (["--data", "data/train.bin"], None, "is a file: name a folder of shards"),
    "unreadable": ([], unreadable, "cannot be read"),
    "device unknown": (["--device", "gpu"], None, "unknown device 'gpu'"),
    "device unsupported": (["--device", "meta"], None, "device meta is not supported"),
    "fp16 on CPU": (["--precision", "fp16"], None, "fp16 needs a CUDA GPU"),
    "learning rate": (["--lr", "nan"], None, "--lr is nan: it must be more than 0"),
    "steps": (["--steps", "0"], None, "--steps is 0: it must be at least 1"),
    "warm-up": (["--warmup", "21"], None, "--warmup 21 is longer than the run of --steps 20"),
    "run is a path": (["--run", "../x"], None, "--run is '../x': it must be a plain name"),
    "beta": (["--beta2", "1"], None, "--beta2 is 1.0: it must be below 1"),
    "heads": (["--model.n-head", "3"], None, "n_embd 16 is not a multiple of n_head 3"),
    "tokenizer file": (["--sample-every", "5", "--tokenizer-file", "data/val.bin"], None, "is not GPT-2's vocab.bpe"),
    "out is a file": (["--out", "data", "--run", "val.bin"], None, "is a file"),
    "no run to resume": (["--resume"], None, "holds no run"),
    "triton without a GPU": (["--backend", "triton"], None, "needs a CUDA GPU, .* use --backend torch, or set"),
    "CUDA absent": (["--device", "cuda"], None, "device cuda was asked for, and torch sees 0 CUDA devices"),
}  # fmt: skip


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=CUDA_ABSENT if name == "CUDA absent" else ()) for name in BAD], ids=str
)
def test_bad_input_is_refused_before_anything_is_written(folder, monkeypatch, case):
    flags, damage, message = BAD[case]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if damage:
        damage(folder)
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError, match=message):
        program.main([*tiny.FLAGS, *flags])
    assert sorted(folder.rglob("*")) == before


# ---- a run directory ----


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.n-head", "4"], "was trained with model = "),  # changes no tensor's shape
        (["--batch-size", "1"], "was trained with batch_size = 2, not 1"),
        (["--seed", "5"], "was trained with seed = 1337, not 5"),
        (["--data", "other"], "was trained with data = "),
    ],
    ids=["n_head", "batch size", "seed", "data"],
)
def test_resuming_as_another_run_is_refused(folder, capsys, flags, message):
    program.main([*tiny.FLAGS, "--stop-at", "3"])
    with pytest.raises(UserError, match=message):
        program.main(["--resume", "--run", "tiny", *flags])
    with pytest.raises(UserError, match="is not a gpt2"):
        program.main(["gpt2", "--resume", "--run", "tiny"])


def test_resuming_on_other_tokens_is_refused(folder, capsys):
    program.main([*tiny.FLAGS, "--stop-at", "3"])
    tiny.write_data(folder / "data", seed=1)
    with pytest.raises(UserError, match="has fingerprint .* restore that data"):
        program.main(["--resume", "--run", "tiny"])


def test_heads_that_a_kernel_cannot_take_are_refused_before_anything_is_written(folder, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UserError, match="n_head = 8 dimensions, and triton's attention supports 16 to 256"):
        program.main([*tiny.FLAGS, "--ops.attention", "triton"])
    assert not (folder / "out").exists()


@pytest.mark.parametrize("flags", [["--backend", "triton"], ["--ops.mlp", "triton"]], ids=["backend", "op"])
def test_resuming_with_another_backend_uses_it(folder, capsys, monkeypatch, flags):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    program.main([*tiny.FLAGS, "--stop-at", "3"])
    with pytest.raises(UserError, match="the triton backend needs a CUDA GPU"):
        program.main(["--resume", "--run", "tiny", *flags])


RECORDED = {
    "backend": ({"backend": "triton"}, "triton ops"),
    "ops": ({"backend": "auto", "ops": {"mlp": "epilogue", "linear": "torch"}}, "mlp=epilogue"),
    "optimizer": ({"optimizer": "triton", "cuda_graph": True}, "AdamW by triton"),
}


@pytest.mark.parametrize("recorded", RECORDED)
def test_resuming_where_a_recorded_implementation_cannot_run_takes_torch_and_says_so(
    folder, capsys, monkeypatch, recorded
):
    """Trained on a GPU, continued on a laptop; a flag that names an implementation is refused as ever."""
    changes, named = RECORDED[recorded]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    program.main([*tiny.FLAGS, "--stop-at", "3"])
    path = folder / "out/tiny/config.json"
    record = json.loads(path.read_text())
    ops = record["config"]["ops"] | changes.get("ops", {})
    path.write_text(json.dumps(record | {"config": record["config"] | changes | {"ops": ops}}))
    with pytest.raises(UserError, match="the triton backend needs a CUDA GPU"):
        program.main(["--resume", "--run", "tiny", "--backend", "triton"])
    assert program.main(["--resume", "--run", "tiny"]) == 0
    shown = capsys.readouterr().out
    assert f"note: run out/tiny was trained with {named}, which cannot run here (the triton backend needs a" in shown
    found = json.loads(path.read_text())
    assert set(found["resolved"]["ops"].values()) == {"torch"}
    assert found["config"]["ops"]["linear"] == ("torch" if recorded == "ops" else None)
    assert found["resolved"]["optimizer"] == "torch"


def test_a_damaged_line_of_metrics_is_refused_before_anything_is_written(folder, capsys):
    program.main([*tiny.FLAGS, "--stop-at", "3"])
    out = folder / "out/tiny"
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join([lines[0], "half\n", *lines[1:]]))
    before = (out / "config.json").read_bytes(), (out / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2 is damaged .*: delete that line"):
        program.main(["--resume", "--run", "tiny"])
    assert ((out / "config.json").read_bytes(), (out / "metrics.jsonl").read_bytes()) == before


def test_resume_needs_no_other_flag(folder, capsys):
    program.main([*tiny.FLAGS, "--stop-at", "3"])
    assert program.main(["--resume", "--run", "tiny"]) == 0
    assert checkpoint.list_checkpoints(folder / "out/tiny/checkpoints")[-1][0] == 20


# ---- a loss that is not finite ----


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(folder, capsys, monkeypatch):
    c = tiny.config(folder, log_every=100, skip_limit=4)
    real, calls = GPT.forward, [0]

    def forward(self, idx, targets=None):
        calls[0] += 1
        loss = real(self, idx, targets)
        return loss * float("nan") if torch.is_grad_enabled() and calls[0] > 3 + 13 + 3 * 2 else loss

    monkeypatch.setattr(GPT, "forward", forward)  # 3 in rehearsal, 3 validations of 2, so training step 16 is NaN
    with pytest.raises(RunError, match=r"step 19: loss nan.*--skip-limit 4.*good checkpoint is .*step_00000010"):
        train(c)
    found = checkpoint.list_checkpoints(c.folder / "checkpoints")
    assert [step for step, _ in found] == [10]
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert train(replace(c, resume=True)) == 0


def test_a_loss_that_is_not_finite_at_the_start_is_refused(folder, monkeypatch):
    monkeypatch.setattr(GPT, "forward", lambda self, x, y: self.wte.weight.sum() * float("inf"))
    with pytest.raises(UserError, match="the loss is .* at step 1"):
        train(tiny.config(folder))
    assert not (folder / "out").exists()


def test_out_of_memory_names_a_remedy(folder, monkeypatch):
    def forward(self, x, y):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(GPT, "forward", forward)
    with pytest.raises(RunError, match="--batch-size 2 and --seq-len 16: use --batch-size 1"):
        train(tiny.config(folder))


def test_a_shard_that_another_program_left_half_written_is_refused(folder):
    """Its size does not fit its header."""
    path = folder / "data" / "train.bin"
    os.truncate(path, 1500)
    with pytest.raises(UserError, match="truncated"):
        dataset.open_folder(folder / "data", 50257)
