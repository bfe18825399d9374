"""The two containers of named tensors, safetensors and torch's pickles: opened so that nothing in them can run."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gpt2fast.errors import UserError


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Memory-mapped. UserError if the file is not whole."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is truncated or damaged ({error}): copy or download it again") from None


def read_pickle(path: Path) -> dict:
    """What torch.save wrote, memory-mapped, if it is a dictionary of data alone. UserError on code, which never runs.

    Files of torch before 1.6, no zip files, are read into memory.
    """
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except UnpicklingError as error:
        text = str(error)
        if "GLOBAL" not in text:
            raise UserError(f"{path} is truncated or damaged: copy or download it again") from None
        name = text.partition("GLOBAL ")[2].split(" ")[0]
        raise UserError(
            f"{path} is a pickle that wants to run code ({name}), so it is not loaded: where you trust it, load it "
            "with torch.load and save model.state_dict() alone with torch.save"
        ) from None
    except Exception as error:  # a damaged pickle may raise anything
        raise UserError(
            f"{path} is truncated or damaged ({type(error).__name__}: {error}): copy or download it again"
        ) from None
    if not isinstance(stored, Mapping):
        raise UserError(f"{path} holds a {type(stored).__name__}: a state_dict is needed")
    return dict(stored)


def check_tensors(values: Mapping, path: Path) -> None:
    """UserError unless this is {name: tensor}."""
    if not isinstance(values, Mapping):
        raise UserError(f"{path} holds a {type(values).__name__} where a state_dict is needed")
    for name, value in values.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            raise UserError(
                f"{path}: {name!r} is a {type(value).__name__}, no tensor: torch.save model.state_dict() alone"
            )
