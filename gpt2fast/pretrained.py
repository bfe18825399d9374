"""A model with weights, from wherever a person has them: what sample, evaluate, export and inspect begin with."""

from pathlib import Path

import torch

from gpt2fast import auto, checkpoint, config, containers, ops, records, weights
from gpt2fast.errors import UserError
from gpt2fast.model import GPT, GPTConfig
from gpt2fast.ops import Backend
from gpt2fast.weights import Weights


def load(source: str | Path, device: torch.device, backend: Backend = "auto") -> tuple[GPT, str]:
    """The model on `device`, and where its weights lie. `source`: see `read`.

    `backend` auto: what a run was trained with, where this device has it; else torch.
    """
    found = read(source)
    chosen = implementations(source, device, backend)
    ops.check_sizes(chosen, found.config.n_embd, found.config.n_embd // found.config.n_head)
    built = ops.build(chosen, device.type)
    with torch.device("meta"):  # no initial weights are drawn, and memory is taken on the device only
        model = GPT(found.config, built)
    model.to_empty(device=device)
    model.load_state_dict(found.tensors)
    return model, found.where


def read(source: str | Path) -> Weights:
    """The weights of a run (its newest checkpoint), of one checkpoint, or of whatever else `weights.read` knows.

    UserError if they are not sound: a checkpoint must match its checksums.
    """
    path = _checkpoint(Path(source))
    if path is None:
        return weights.read(source)
    try:
        model = records.fill(GPTConfig, checkpoint.read_state(path)["config"]["model"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}/state.json describes no model ({type(error).__name__}: {error})") from None
    return weights.assemble(model, containers.read_safetensors(path / "model.safetensors"), str(path))


def _checkpoint(path: Path) -> Path | None:
    """The checkpoint that `path` means; None if it is no run of ours. UserError if the run has none yet."""
    folder = path.parent if path.name == "model.safetensors" else path
    if (folder / "manifest.json").is_file() and (folder / "model.safetensors").is_file():
        return folder
    if not any((path / name).exists() for name in ("checkpoints", "metrics.jsonl")):
        return None
    found = checkpoint.list_checkpoints(path / "checkpoints")
    if not found:
        raise UserError(f"{path} holds no checkpoint yet: let the run reach its first one")
    return found[-1][1]


def implementations(source: str | Path, device: torch.device, backend: Backend) -> ops.OpsConfig:
    """What `load` computes with."""
    if backend != "auto":
        return ops.OpsConfig().with_backend(backend)
    found = _checkpoint(Path(source))
    if found is None or found.parent.name != "checkpoints" or not (found.parent.parent / "config.json").is_file():
        return ops.OpsConfig()
    settings, resolved = config.read_record(found.parent.parent)
    chosen = settings.implementations
    if settings.backend == "auto":  # what was fastest in training, where this device has it
        return auto.recall(chosen, resolved["ops"], device.type) or chosen
    return chosen
