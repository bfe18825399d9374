"""Save and load checkpoints: folders of safetensors and JSON, complete or absent. No pickle.

    checkpoints/step_00000340/
        model.safetensors        weights under OpenAI's names, the vocabulary 50257 wide
        optimizer.safetensors    exp_avg.<name>, exp_avg_sq.<name>, step.<name>
        state.json               step, position of the loader, every random generator, loss scale, config, ops
        manifest.json            size and sha256 of the other files

A checkpoint is written under a temporary name in the same folder, synced and renamed. safetensors, like torch.load,
does not notice a flipped bit: hence the checksums.
"""

import hashlib
import json
import os
import random
import re
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from gpt2fast.errors import RunError, UserError
from gpt2fast.files import checked, containers
from gpt2fast.files.atomic import publish, remove_folder
from gpt2fast.machine.world import ALONE, World, unwrapped
from gpt2fast.model import GPT

_NAME = re.compile(r"step_(\d{8,})")
_FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
_STATE = {  # None passes: --resume and sample say themselves what is missing
    "step": int, "position": int, "seconds": float, "scaler": dict, "data_fingerprint": str, "config": dict,
    "rng": dict, "ops": dict,
}  # fmt: skip
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Return (step, path) of every complete checkpoint in `folder`, oldest first."""
    found = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir()] if folder.is_dir() else []
    return sorted((int(match[1]), path) for match, path in found if match)


def save(
    folder: Path, step: int, model: GPT, optimizer: torch.optim.Optimizer, state: dict, keep: int, world: World = ALONE
) -> Path:
    """Save checkpoint `step` in `folder`, delete all but the newest `keep`, and return its path.

    `state` is plain JSON. Every rank calls this and rank 0 writes; the files do not depend on the number of ranks. A
    checkpoint that exists is left as it is. RunError if it cannot be written; earlier checkpoints are untouched then.
    """
    final = folder / f"step_{step:08d}"
    moments = _moments(model, unwrapped(optimizer))
    if unwrapped(optimizer) is not optimizer:
        moments = world.gather_tensors(moments)
    if world.main and not final.exists():
        _write(final, model, moments, {"step": step, "rng": _rng_state(), **state})
        for _, path in list_checkpoints(folder)[:-keep]:
            remove_folder(path)
    world.barrier()
    return final


def _write(final: Path, model: GPT, moments: dict[str, Tensor], state: dict) -> None:
    folder = final.parent
    temporary = folder / f".{final.name}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(_on_cpu(model.state_dict()), temporary / "model.safetensors")
        save_file(_on_cpu(moments), temporary / "optimizer.safetensors")
        (temporary / "state.json").write_text(json.dumps(state))
        manifest = {
            name: {"bytes": (temporary / name).stat().st_size, "sha256": _sha256(temporary / name)} for name in _FILES
        }
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
        for path in temporary.iterdir():
            path.chmod(0o666 & ~_umask())  # safetensors makes its files readable to their owner only
        publish(temporary, final)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if not isinstance(error, OSError | SafetensorError):
            raise  # out of memory, Ctrl-C: they leave nothing half-written either
        kept = list_checkpoints(folder)
        raise RunError(
            f"checkpoint {final} could not be saved ({error}): free some space, then continue with --resume "
            + (f"from {kept[-1][1].name}, which is whole" if kept else "(no earlier checkpoint exists)")
        ) from None


def read_state(path: Path) -> dict:
    """Check every file against the manifest and return state.json. UserError if a file is missing or damaged."""
    try:
        manifest = checked.read_json(path / "manifest.json")
        damaged = [name for name in _FILES if _sha256(path / name) != manifest[name]["sha256"]]
        if not damaged:
            state = checked.read_json(path / "state.json")
            for name, kind in _STATE.items():
                checked.check(name, state.get(name), kind | None)
            return state
        what = f"{', '.join(damaged)} does not match its checksum"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
    raise UserError(f"checkpoint {path} is damaged ({what}): delete that folder to resume from the one before it")


def load_weights(path: Path, model: GPT) -> None:
    """Load a checkpoint's weights into `model`. UserError, which names the tensors, if they do not fit."""
    _load(model, _read(path / "model.safetensors"), path)


def load_training(path: Path, model: GPT, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load weights, moments and random generators exactly as they were saved; `state` is from `read_state`.

    UserError if they do not fit the model and the optimizer.
    """
    load_weights(path, model)
    moments = _read(path / "optimizer.safetensors")
    needed = {f"{moment}.{name}" for name in _names_in_order(model, optimizer) for moment in _MOMENTS}
    if moments and set(moments) != needed:
        raise UserError(
            f"checkpoint {path} has another optimizer's state (it lacks or adds {min(needed ^ set(moments))}): "
            "name the one that it was saved with"
        )
    optimizer = unwrapped(optimizer)  # ZeRO-1: each rank loads its share
    names = _names_in_order(model, optimizer)
    full = optimizer.state_dict()
    for name, shape in _moment_shapes(model, names).items() if moments else ():
        if moments[name].shape != shape:
            found = tuple(moments[name].shape)
            raise UserError(f"checkpoint {path} does not fit the model: {name} is {found}, not {tuple(shape)}")
    if moments:  # a checkpoint of step 0 has none
        rows = model.config.padded_vocab_size
        full["state"] = {
            i: {moment: _pad_rows(name, moments[f"{moment}.{name}"], rows) for moment in _MOMENTS}
            for i, name in enumerate(names)
        }
    optimizer.load_state_dict(full)
    try:
        _set_rng_state(state["rng"])
    except (ValueError, TypeError, KeyError, OverflowError, RuntimeError) as error:
        reason = f"random generators, {type(error).__name__}: {error}"
        raise UserError(f"checkpoint {path} is damaged ({reason}): delete it to resume from the one before") from None


def _load(model: GPT, tensors: dict[str, Tensor], path: Path) -> None:
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        raise UserError(f"checkpoint {path} does not fit the model: {'; '.join(lines[:3])}") from None


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return containers.read_safetensors(path)
    except UserError:
        raise UserError(f"{path} is damaged: delete that checkpoint to resume from the one before it") from None


def _moment_shapes(model: GPT, names: list[str]) -> dict[str, torch.Size]:
    """Return the shapes as stored: without the vocabulary's padding; a step is one number."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    shapes["wte.weight"] = torch.Size((model.config.vocab_size, model.config.n_embd))
    steps = {f"step.{name}": torch.Size(()) for name in names}
    return steps | {f"{moment}.{name}": shapes[name] for name in names for moment in _MOMENTS[:2]}


def _moments(model: GPT, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's tensors by parameter name, without the vocabulary's padding, where they stay zero."""
    state = optimizer.state_dict()["state"]
    tensors = {}
    for i, name in enumerate(_names_in_order(model, optimizer)):
        for moment in _MOMENTS if i in state else ():
            tensor = state[i][moment]
            tensors[f"{moment}.{name}"] = tensor[: model.config.vocab_size] if _is_padded(name, tensor) else tensor
    return tensors


def _names_in_order(model: GPT, optimizer: torch.optim.Optimizer) -> list[str]:
    """Return the parameter names in the order in which the optimizer numbers its parameters."""
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    return [name_of[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def _is_padded(name: str, tensor: Tensor) -> bool:
    return name == "wte.weight" and tensor.dim() == 2


def _pad_rows(name: str, tensor: Tensor, rows: int) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, 0, 0, rows - len(tensor))) if _is_padded(name, tensor) else tensor


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _rng_state() -> dict:
    """Return every random generator's state as JSON.

    Training itself draws only from generators that are functions of (seed, step); dropout in a fork might not.
    """
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()  # a tuple, unless legacy=False
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [str(kind), np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": _to_hex(torch.get_rng_state()),
        "cuda": [_to_hex(torch.cuda.get_rng_state())] if torch.cuda.is_available() else [],  # this process's GPU
        "mps": _to_hex(torch.mps.get_rng_state()) if torch.backends.mps.is_available() else None,
    }


def _set_rng_state(state: dict) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_from_hex(state["torch"]))
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state(_from_hex(state["cuda"][0]))
    if torch.backends.mps.is_available() and state["mps"]:
        torch.mps.set_rng_state(_from_hex(state["mps"]))


def _to_hex(state: Tensor) -> str:
    return bytes(state.tolist()).hex()


def _from_hex(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def _sha256(path: Path) -> str:
    with checked.open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
