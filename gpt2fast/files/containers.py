"""The containers of named tensors, safetensors, torch's pickles and NumPy's archives: opened so that nothing in them
can run, and that no header makes them larger than the file that it stands in.
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

# What a state_dict is made of. torch.load allows more, bytearray(10**12) for one.
NAMES = {"collections OrderedDict", "torch Size", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"}
LARGEST_PICKLE = 2**22  # bytes without the numbers: what a million opcodes leave in memory is 50 times as large
UNPACKED = 8  # times its size: so much may an .npz hold; fp32 that was bf16 is halved by zlib
SLACK = 2**20


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Memory-mapped. UserError if the file is not whole."""
    try:
        open_file(path).close()
        return load_file(path)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{path} is truncated or damaged ({error}): copy or download it again") from None


def read_pickle(path: Path) -> dict:
    """Read the dictionary that torch.save wrote to `path`, its tensors memory-mapped.

    UserError if it contains code, which never runs, if it is not sound, or if it is in torch's format before 1.6.
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
        raise UserError(f"{path} holds a {type(stored).__name__}: a state_dict is needed")
    return dict(stored)


def _check_zip(file: IO[bytes], path: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        if len(set(names)) < len(names) or any(info.compress_type for info in archive.infolist()):
            raise ValueError("a member that stands there twice or is compressed: torch.save writes none")
        for name in names:
            if name.endswith("/data.pkl"):
                with archive.open(name) as member:
                    _check_opcodes(member, path)


def _check_opcodes(file: IO[bytes], path: Path) -> None:
    """Look at every opcode of a pickle without executing any. UserError if one would import something but data."""
    for opcode, value, _ in pickletools.genops(file):
        if opcode.name in ("GLOBAL", "INST", "STACK_GLOBAL") and not _is_data(str(value)):
            raise UserError(
                f"{path} is a pickle that wants to run code ({str(value).replace(' ', '.')}), so it is not loaded: "
                "if you trust it, load it with torch.load and save model.state_dict() alone with torch.save"
            )
        if file.tell() > LARGEST_PICKLE:
            raise ValueError(f"a pickle of more than {LARGEST_PICKLE:,} bytes, without the numbers")


def _is_data(name: str) -> bool:
    module, _, member = name.partition(" ")
    return name in NAMES or (module == "torch" and (member.endswith("Storage") or member in _DTYPES))


_DTYPES = {"float16", "bfloat16", "float32", "float64", "int64", "int32", "uint8", "bool"}


def check_tensors(values: Mapping, path: Path) -> None:
    """UserError unless this is {name: tensor}, dense, and of no more numbers than the file can hold: a stride of 0, or
    a storage that all share, makes many of few."""
    if not isinstance(values, Mapping):
        raise UserError(f"{path} holds a {type(values).__name__} where a state_dict is needed")
    for name, value in values.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            raise UserError(
                f"{path}: {name!r} is a {type(value).__name__}, no tensor: torch.save model.state_dict() alone"
            )
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise UserError(f"{path}: {name!r} is sparse, quantized or on another device: save a plain tensor")
    total, size = sum(value.nbytes for value in values.values()), path.stat().st_size
    if total > 2 * size + SLACK:  # the tied head may count twice
        raise UserError(f"{path} has {size:,} bytes, and its tensors {total:,}: save each by itself, as a clone")


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an archive. ValueError, BadZipFile, zlib.error, EOFError or OSError if it is not sound."""
    with open_file(path) as file, zipfile.ZipFile(file) as archive:
        members, size = archive.infolist(), path.stat().st_size
        total = sum(info.file_size for info in members)
        if total > UNPACKED * size + SLACK:
            raise ValueError(f"{size:,} bytes that unpack to {total:,}: such weights are none")
        return {info.filename.removesuffix(".npy"): _array(archive, info) for info in members}


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    """As NumPy would read it; but that makes the array that a header promises before it looks what there is."""
    with archive.open(info) as file:
        check_npy(file, info.file_size)
    with archive.open(info) as file:
        return npy.read_array(file, allow_pickle=False)


def check_npy(file: IO[bytes], size: int) -> None:
    """ValueError unless the header of an .npy file promises what `size` bytes, header included, can hold."""
    version = npy.read_magic(file)
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"version {version} of NumPy's format")
    found = None
    with contextlib.suppress(tokenize.TokenError, SyntaxError, TypeError, OverflowError, MemoryError, RecursionError):
        found = read(file)  # by ast.literal_eval, to whose parser deep nesting is a lack of memory
    if found is None:
        raise ValueError("its header is none")
    shape, _, dtype = found
    if dtype.hasobject or min(shape, default=0) < 0 or prod(shape) * dtype.itemsize + file.tell() > size:
        raise ValueError(f"{dtype} of shape {shape} in {size:,} bytes")


# zipfile raises RuntimeErrors too: of a password, of a compression that it does not know
NPZ_ERRORS = (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError)
