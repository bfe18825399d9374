"""Load weights from a run or any other source, and build the model: for sample, evaluate, export and inspect."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from gpt2fast import ops
from gpt2fast.errors import UserError
from gpt2fast.files import checked, containers
from gpt2fast.model import GPT, GPTConfig
from gpt2fast.ops import Backend, OpsConfig
from gpt2fast.weights import checkpoint
from gpt2fast.weights.foreign import Weights, assemble, read_foreign


def load_model(
    source: str | Path, device: torch.device, backend: Backend = "auto", say: Callable[[str], None] = print
) -> GPT:
    """Return the model of `source` (see `read_weights`) on `device`, with the ops of `choose_ops`."""
    weights = read_weights(source)
    return build_model(weights, choose_ops(weights, device, backend, say), device)


def read_weights(source: str | Path) -> Weights:
    """Read the weights of a run (its newest checkpoint), of one checkpoint, or of what else `read_foreign` accepts.

    UserError if they are missing, damaged or not GPT-2's; a checkpoint must match its checksums.
    """
    path = _checkpoint(Path(source))
    if path is None:
        return read_foreign(source)
    state = checkpoint.read_state(path)
    try:
        model = checked.fill(GPTConfig, state["config"]["model"])
        state["ops"] = _recorded_ops(path, state)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}/state.json describes no model ({reason}): use another checkpoint") from None
    weights = assemble(model, containers.read_safetensors(path / "model.safetensors"), str(path))
    return replace(weights, state=state)


def _checkpoint(path: Path) -> Path | None:
    """Return the checkpoint that `path` means; None if it is not one of our runs. UserError if the run has none yet."""
    folder = path.parent if path.name == "model.safetensors" else path
    if (folder / "manifest.json").is_file() and (folder / "model.safetensors").is_file():
        return folder
    if not any((path / name).exists() for name in ("checkpoints", "metrics.jsonl")):
        return None
    found = checkpoint.list_checkpoints(path / "checkpoints")
    if not found:
        raise UserError(f"{path} holds no checkpoint yet: let the run reach its first one")
    return found[-1][1]


def _recorded_ops(path: Path, state: dict) -> OpsConfig:
    """Return the implementations that the checkpoint was trained with.

    Older runs have them in config.json instead of state.json; without it, they are torch's.
    """
    if state.get("ops") is not None:
        return checked.fill(OpsConfig, state["ops"])
    record = path.parent.parent / "config.json"
    if path.parent.name != "checkpoints" or not record.is_file():
        return OpsConfig()
    values = checked.read_json(record)
    named = checked.fill(OpsConfig, values["config"]["ops"]).with_backend(values["config"]["backend"])
    measured = checked.fill(OpsConfig, values["resolved"]["ops"])  # what --backend auto chose for the others
    return OpsConfig(**{op: getattr(named, op) or getattr(measured, op) for op in ops.NAMES})


def choose_ops(weights: Weights, device: torch.device, backend: Backend, say: Callable[[str], None]) -> OpsConfig:
    """Return the implementations for --backend: with auto, those that the checkpoint was trained with.

    If one of these cannot run on `device`, torch's is used instead, and `say` gets a note. UserError if the named
    backend cannot take the model's sizes.
    """
    if backend != "auto":
        chosen = OpsConfig().with_backend(backend)
        ops.check_sizes(chosen, weights.config.n_embd, weights.config.n_embd // weights.config.n_head)
    elif weights.state is None:
        chosen = OpsConfig()
    else:
        chosen, why = ops.runnable(weights.state["ops"], device.type)
        if why:
            say(f"note: {weights.where} was trained with {why}: torch is used instead")
    return chosen


def build_model(weights: Weights, chosen: OpsConfig, device: torch.device) -> GPT:
    """Return the model of `weights` on `device` with the `chosen` ops."""
    built = ops.build(chosen, device.type)
    with torch.device("meta"):  # draws no initial weights, and takes memory on `device` only
        model = GPT(weights.config, built)
    model.to_empty(device=device)
    model.load_state_dict(weights.tensors)
    return model
