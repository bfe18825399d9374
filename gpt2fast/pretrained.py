"""A model with weights, from wherever a person has them: what sample, evaluate, export and inspect begin with."""

from pathlib import Path

import torch

from gpt2fast import auto, checkpoint, config, ops
from gpt2fast.errors import UserError
from gpt2fast.model import GPT
from gpt2fast.ops import Backend


def load(source: str | Path, device: torch.device, backend: Backend = "auto") -> tuple[GPT, str]:
    """The model on `device`, and where its weights lie. `source`: a run's folder, whose newest checkpoint is taken.

    `backend` auto: what the run was trained with, where this device has it; else torch.
    """
    folder = Path(source)
    settings, resolved = config.read_record(folder)
    found = checkpoint.list_checkpoints(folder / "checkpoints")
    if not found:
        raise UserError(f"{folder} holds no checkpoint yet: let the run reach its first one")
    _, path = found[-1]
    checkpoint.read_state(path)
    chosen = settings.implementations
    if backend != "auto":
        chosen = ops.OpsConfig().with_backend(backend)
    elif settings.backend == "auto":  # what was fastest in training, where this device has it
        chosen = auto.recall(chosen, resolved["ops"], device.type) or chosen
    model = GPT(settings.model, ops.build(chosen, device.type))
    checkpoint.load_model(path, model)
    return model.to(device), str(path)
