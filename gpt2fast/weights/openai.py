"""Read OpenAI's own release: TensorFlow's checkpoint files, without TensorFlow, or an .npz with the same names.

    model.ckpt.index                  a sorted table in LevelDB's format: name -> shape, dtype, place in the data
    model.ckpt.data-00000-of-00001    the numbers, one tensor after the other
    hparams.json                      n_vocab, n_ctx, n_embd, n_head, n_layer

A table ends with 48 bytes: the places (offset, size) of two blocks and a magic number. The second block is the index of
all others. A block consists of entries (length of the prefix shared with the last key, the rest of the key, the value),
the offsets of restarts, and their number; a byte for the compression and a checksum follow it. The checksum is checked.
Tensors have checksums too, but 500 MB take too long in Python: only their place and size are checked.

Sources: tensorflow/core/lib/io/format.cc, tensorflow/core/protobuf/tensor_bundle.proto.
"""

import re
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpt2fast.errors import UserError
from gpt2fast.files import checked, containers
from gpt2fast.model import GPTConfig

MAGIC = 0xDB4775248B80FB57
FOOTER = 48
LARGEST = 2**22  # bytes of an index; GPT-2's have a few thousand
LONGEST_NAME = 1000  # bytes; each name may repeat all of the last one, which is quadratic in the file's size
DIMENSIONS = 8
DTYPES = {1: ("<f4", torch.float32), 14: ("<i2", torch.bfloat16), 19: ("<f2", torch.float16)}
HPARAMS = {"n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd", "block_size": "n_ctx", "vocab_size": "n_vocab"}
_NAME = re.compile(r"model/(?:h(\d+)/)?(.+?)(?:/([gbw]))?")  # model/wte, model/ln_f/g, model/h0/attn/c_attn/w


def find_index(folder: Path) -> Path | None:
    """Return the *.index in `folder`; None if there is none. UserError if there are several."""
    found = sorted(folder.glob("*.index"))
    if len(found) > 1:
        raise UserError(f"{folder} holds {len(found)} TensorFlow checkpoints: name one, for instance {found[-1]}")
    return found[0] if found else None


def read_tensorflow(index: Path) -> tuple[GPTConfig | None, dict[str, Tensor]]:
    """Return the shape, if there is an hparams.json, and the tensors under our names, memory-mapped.

    Matrices are (in, out). UserError if a file is missing or damaged.
    """
    try:
        with checked.open_file(index) as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise ValueError(f"more than {LARGEST:,} bytes")
        table = _read_table(content)
        shards = dict(_fields(table.pop(b""))).get(1, 1)
        data: dict[int, np.ndarray] = {}
        for entry in table.values():
            shard = dict(_fields(entry)).get(3, 0)
            if shard not in data:
                path = index.with_name(f"{index.stem}.data-{shard:05d}-of-{shards:05d}")
                checked.open_file(path).close()
                data[shard] = np.memmap(path, np.uint8, "c")
        tensors = {name.decode(): _tensor(entry, data) for name, entry in table.items()}
        if sum(tensor.nbytes for tensor in tensors.values()) > sum(map(len, data.values())):
            raise ValueError("overlapping tensors")
    except OSError as error:
        raise UserError(f"{error.filename or index} cannot be read ({error.strerror}), and {index} needs it") from None
    except (ValueError, LookupError, TypeError, OverflowError, RuntimeError) as error:
        raise UserError(f"{index} is damaged or not a TensorFlow checkpoint ({error}): download it again") from None
    return _config_beside(index), _in_our_names(tensors)


def read_numpy(path: Path) -> tuple[GPTConfig | None, dict[str, Tensor]]:
    """Return the same for an .npz. UserError if it is damaged."""
    try:
        tensors = {name: torch.from_numpy(array) for name, array in containers.read_npz(path).items()}
    except containers.NPZ_ERRORS as error:
        raise UserError(f"{path} is damaged or not a NumPy archive ({error}): write or download it again") from None
    return _config_beside(path), _in_our_names(tensors)


def _in_our_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors. A matrix is stored as the kernel of a convolution of width 1: (1, in, out) -> (in, out)."""
    ours = {}
    for name, tensor in tensors.items():
        if match := _NAME.fullmatch(name):
            layer, module, kind = match.groups()
            block = "" if layer is None else f"h.{layer}."
            name = f"{block}{module.replace('/', '.')}.{'bias' if kind == 'b' else 'weight'}"
        ours[name] = tensor[0] if tensor.dim() == 3 and len(tensor) == 1 else tensor
    return ours


def _config_beside(path: Path) -> GPTConfig | None:
    path = path.with_name("hparams.json")
    if not path.is_file():
        return None
    try:
        stored = checked.read_json(path)
        return checked.fill(GPTConfig, {ours: stored[theirs] for ours, theirs in HPARAMS.items()})
    except (OSError, ValueError, LookupError, TypeError, UserError) as error:
        raise UserError(f"{path} describes no GPT-2 ({type(error).__name__}: {error}): download it again") from None


def _tensor(entry: bytes, data: dict[int, np.ndarray]) -> Tensor:
    """Decode a BundleEntryProto: fields 1 dtype, 2 shape, 3 shard, 4 offset, 5 size, 7 slices."""
    fields = dict(_fields(entry))
    known, offset, size, shard = fields.get(1), fields.get(4, 0), fields.get(5, 0), data[fields.get(3, 0)]
    shape = [dict(_fields(dim)).get(1, 0) for number, dim in _fields(fields.get(2, b"")) if number == 2]
    if len(shape) > DIMENSIONS:
        raise ValueError(f"a tensor of {len(shape)} dimensions")
    if known not in DTYPES or 7 in fields:
        raise ValueError(f"a tensor of unknown dtype {known}, or in slices")
    numbers, dtype = DTYPES[known]
    if size != prod(shape) * dtype.itemsize or offset % dtype.itemsize or offset + size > len(shard):
        raise ValueError(f"{size} bytes at {offset} do not fit a tensor of shape {shape} in data of {len(shard)} bytes")
    return torch.from_numpy(shard[offset : offset + size].view(numbers)).view(dtype).view(shape)


def _read_table(file: bytes) -> dict[bytes, bytes]:
    footer = _cut(file, len(file) - FOOTER, FOOTER)
    if int.from_bytes(footer[-8:], "little") != MAGIC:
        raise ValueError("no magic number at the end")
    _, i = _varint(footer, 0)
    _, i = _varint(footer, i)
    blocks = _read_block(file, footer[i:]).values()
    if sum(_varint(handle, _varint(handle, 0)[1])[0] for handle in blocks) > len(file):
        raise ValueError("overlapping blocks")
    return {key: value for handle in blocks for key, value in _read_block(file, handle).items()}


def _read_block(file: bytes, handle: bytes) -> dict[bytes, bytes]:
    """Return key -> value of a block. `handle`: its offset and size, as varints."""
    offset, i = _varint(handle, 0)
    size, _ = _varint(handle, i)
    block, checksum = _cut(file, offset, size + 1), _cut(file, offset + size + 1, 4)
    if block[-1] != 0 or _masked_crc32c(block) != int.from_bytes(checksum, "little"):
        raise ValueError("a block is compressed, or its checksum is wrong")
    restarts = int.from_bytes(_cut(block, size - 4, 4), "little")
    entries = _cut(block, 0, size - 4 - 4 * restarts)
    found, key, i = {}, b"", 0
    while i < len(entries):
        kept, i = _varint(entries, i)
        more, i = _varint(entries, i)
        length, i = _varint(entries, i)
        if kept + more > LONGEST_NAME:
            raise ValueError(f"a name of {kept + more} bytes")
        key = _cut(key, 0, kept) + _cut(entries, i, more)
        found[key] = _cut(entries, i + more, length)
        i += more + length
    return found


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (number, value) for each field of a protocol buffer; a value is an int or bytes."""
    i = 0
    value: int | bytes
    while i < len(message):
        tag, i = _varint(message, i)
        kind = tag & 7
        if kind == 0:
            value, i = _varint(message, i)
        else:
            n, i = _varint(message, i) if kind == 2 else ({1: 8, 5: 4}[kind], i)
            value = _cut(message, i, n)
            i += n
        yield tag >> 3, value


def _varint(data: bytes, i: int) -> tuple[int, int]:
    """Decode the varint at position i: 7 bits per byte, the lowest first. Return it, and the position after it."""
    value = shift = 0
    while data[i] & 128:
        if shift > 63:
            raise ValueError("an integer of more than 64 bits")
        value, shift, i = value | (data[i] & 127) << shift, shift + 7, i + 1
    return value | data[i] << shift, i + 1


def _cut(data: bytes, i: int, n: int) -> bytes:
    if not 0 <= i <= i + n <= len(data):
        raise ValueError(f"{n} bytes at {i} are outside of {len(data)}")
    return data[i : i + n]


def _masked_crc32c(data: bytes) -> int:
    """Return the CRC32C checksum (Castagnoli), rotated and shifted as TensorFlow stores it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC_TABLE[(crc ^ byte) & 255]
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _crc_of_byte(crc: int) -> int:
    for _ in range(8):
        crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc


_CRC_TABLE = [_crc_of_byte(byte) for byte in range(256)]
