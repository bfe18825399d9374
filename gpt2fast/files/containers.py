"""Read safetensors, torch's pickles and NumPy's archives from untrusted sources.

Nothing in a file is executed, and no header can make the tensors much larger than the file.
"""

import contextlib
import pickletools
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from typing import IO

import numpy as np
import torch
from numpy.lib import format as npy
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gpt2fast.errors import UserError
from gpt2fast.files.checked import open_file

# What a state_dict consists of. torch.load with weights_only allows more, for example bytearray(10**12).
NAMES = {"collections OrderedDict", "torch Size", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"}
LARGEST_PICKLE = 2**22  # bytes without the numbers; a million opcodes may take 50 times as much memory
UNPACKED = 8  # an .npz may unpack to this many times its size; zlib halves fp32 numbers that were bf16
SLACK = 2**20  # bytes that a small file may exceed these limits by


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file: name -> tensor, memory-mapped. UserError if it is truncated or damaged."""
    try:
        open_file(path).close()
        return load_file(path)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{path} is truncated or damaged ({error}): copy or download it again") from None


def read_pickle(path: Path) -> dict:
    """Read the dictionary that torch.save wrote to `path`, its tensors memory-mapped.

    UserError if it contains code, which never runs, if it is damaged, or if it has torch's format before 1.6.
    """
    try:
        with open_file(path) as file:
            if file.read(2) == b"\x80\x02":  # a pickle; a zip file of one since torch 1.6
                raise UserError(
                    f"{path} is in the format of torch before 1.6: load it with torch.load and save it again with "
                    "torch.save of torch 1.6 or newer"
                )
            _check_zip(file, path)
            stored = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UserError:
        raise
    except UnpicklingError as error:
        raise UserError(f"{path} is truncated or damaged: copy or download it again") from error
    except Exception as error:  # a damaged pickle may raise anything
        raise UserError(
            f"{path} is truncated or damaged ({type(error).__name__}: {error}): copy or download it again"
        ) from None
    if not isinstance(stored, Mapping):
        raise UserError(f"{path} holds a {type(stored).__name__}: save a state_dict")
    return dict(stored)


def _check_zip(file: IO[bytes], path: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        if len(set(names)) < len(names) or any(info.compress_type for info in archive.infolist()):
            raise ValueError("a member is there twice or compressed, which torch.save never writes")
        for name in names:
            if name.endswith("/data.pkl"):
                with archive.open(name) as member:
                    _check_opcodes(member, path)


def _check_opcodes(file: IO[bytes], path: Path) -> None:
    """Look at every opcode of a pickle without executing any. UserError if one would import something but data."""
    for opcode, value, _ in pickletools.genops(file):
        if opcode.name in ("GLOBAL", "INST", "STACK_GLOBAL") and not _is_data(str(value)):
            raise UserError(
                f"{path} is a pickle that would run code ({str(value).replace(' ', '.')}), so it is not loaded: "
                "if you trust it, load it with torch.load and save model.state_dict() alone with torch.save"
            )
        if file.tell() > LARGEST_PICKLE:
            raise ValueError(f"a pickle of more than {LARGEST_PICKLE:,} bytes, without the numbers")


def _is_data(name: str) -> bool:
    module, _, member = name.partition(" ")
    return name in NAMES or (module == "torch" and (member.endswith("Storage") or member in _DTYPES))


_DTYPES = {"float16", "bfloat16", "float32", "float64", "int64", "int32", "uint8", "bool"}


def check_tensors(values: Mapping, path: Path) -> None:
    """Raise UserError unless `values` is {name: dense CPU tensor} of no more bytes than the file can hold.

    A stride of 0, or one storage that many tensors share, makes large tensors from a small file.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{path} holds a {type(values).__name__} in place of a state_dict: save model.state_dict()")
    for name, value in values.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            raise UserError(
                f"{path}: {name!r} is a {type(value).__name__}, not a tensor: save model.state_dict() alone"
            )
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise UserError(f"{path}: {name!r} is sparse, quantized or on another device: save a plain tensor")
    total, size = sum(value.nbytes for value in values.values()), path.stat().st_size
    if total > 2 * size + SLACK:  # the tied head may count twice
        raise UserError(f"{path} has {size:,} bytes, but its tensors {total:,}: save a clone of each")


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Read a NumPy archive: name -> array. One of NPZ_ERRORS if it is damaged or unpacks to much more than its size."""
    with open_file(path) as file, zipfile.ZipFile(file) as archive:
        members, size = archive.infolist(), path.stat().st_size
        total = sum(info.file_size for info in members)
        if total > UNPACKED * size + SLACK:
            raise ValueError(f"{size:,} bytes unpack to {total:,}, more than {UNPACKED} times as many")
        return {info.filename.removesuffix(".npy"): _array(archive, info) for info in members}


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    """Read one member as NumPy does, but check it first: NumPy allocates what the header says before it reads."""
    with archive.open(info) as file:
        check_npy(file, info.file_size)
    with archive.open(info) as file:
        return npy.read_array(file, allow_pickle=False)


def check_npy(file: IO[bytes], size: int) -> None:
    """Raise ValueError unless the array that an .npy header describes fits into `size` bytes, header included."""
    version = npy.read_magic(file)
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"unknown version {version} of NumPy's format")
    found = None
    with contextlib.suppress(tokenize.TokenError, SyntaxError, TypeError, OverflowError, MemoryError, RecursionError):
        found = read(file)  # by ast.literal_eval, whose parser raises MemoryError on deep nesting
    if found is None:
        raise ValueError("unreadable header")
    shape, _, dtype = found
    if dtype.hasobject or min(shape, default=0) < 0 or prod(shape) * dtype.itemsize + file.tell() > size:
        raise ValueError(f"{dtype} of shape {shape} does not fit into {size:,} bytes")


# zipfile raises RuntimeError too: for a password, or an unknown compression
NPZ_ERRORS = (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError)
