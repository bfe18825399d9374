"""Read and write llm.c's model files.

    256 int32    20240326, version, maxT, V, L, NH, C, Vp, zeros
    tensors      wte (Vp, C), wpe (maxT, C), each of a block's tensors for all layers, ln_f; weights are (out, in)

Version 3 holds fp32, version 5 bf16. Vp is V rounded up to a multiple of 128; the added rows are zero. All numbers are
little-endian.
Source: train_gpt2.py of github.com/karpathy/llm.c, write_model.
"""

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from gpt2fast.errors import UserError
from gpt2fast.model import GPTConfig
from gpt2fast.weights.layout import block_shapes

MAGIC = np.array([20240326], "<i4").tobytes()
HEADER_INTS = 256
VERSIONS = {3: torch.float32, 5: torch.bfloat16}


def read_bin(path: Path) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Return the shape, and the tensors in the file's dtype, memory-mapped. UserError if size and header do not fit."""
    size = path.stat().st_size
    if size < 4 * HEADER_INTS:
        raise UserError(
            f"{path} is truncated: {size} bytes are less than its header of {4 * HEADER_INTS}: copy it again"
        )
    version, T, V, L, H, C, Vp = (int(value) for value in np.fromfile(path, "<i4", 8)[1:])
    if version not in VERSIONS:
        raise UserError(f"{path} has version {version}: write it in version 3 (fp32) or 5 (bf16)")
    try:
        config = GPTConfig(n_layer=L, n_head=H, n_embd=C, block_size=T, vocab_size=V)
    except UserError as error:
        raise UserError(f"{path} has an impossible header: {error}") from None
    if Vp < V:
        raise UserError(f"{path} has an impossible header: {Vp} rows cannot hold a vocabulary of {V}: write it again")
    dtype = VERSIONS[version]
    n = (Vp + T + 2) * C + L * sum(prod(shape) for shape in block_shapes(C).values())
    if size != 4 * HEADER_INTS + n * dtype.itemsize:
        raise UserError(
            f"{path} is truncated or damaged: its header means {4 * HEADER_INTS + n * dtype.itemsize} bytes, "
            f"but it has {size}: copy or write it again"
        )
    # mode c: torch wants writable memory, and writes never reach the file
    numbers = np.memmap(path, "<f4" if dtype == torch.float32 else "<i2", "c", 4 * HEADER_INTS)
    rest = torch.from_numpy(numbers).view(dtype)
    tensors: dict[str, Tensor] = {}
    for names, shape in _layout(config, Vp):
        part, rest = rest[: len(names) * prod(shape)], rest[len(names) * prod(shape) :]
        tensors |= zip(names, part.view(len(names), *shape))
    return config, tensors | {"wte.weight": tensors["wte.weight"][:V]}


def write_bin(file: BinaryIO, config: GPTConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Write our tensors as a model file: version 3 for fp32, 5 for bf16."""
    (version,) = (version for version, known in VERSIONS.items() if known == dtype)
    Vp = -(-config.vocab_size // 128) * 128
    header = np.zeros(HEADER_INTS, "<i4")
    header[:8] = (
        20240326, version, config.block_size, config.vocab_size, config.n_layer, config.n_head, config.n_embd, Vp,
    )  # fmt: skip
    file.write(header.tobytes())
    for names, shape in _layout(config, Vp):
        for name in names:
            numbers = tensors[name].to(dtype).contiguous()
            file.write(numbers.view(torch.int32 if dtype == torch.float32 else torch.int16).numpy().data)
            file.write(bytes((prod(shape) - numbers.numel()) * dtype.itemsize))  # the vocabulary's padding


def _layout(config: GPTConfig, Vp: int) -> Iterator[tuple[list[str], tuple[int, ...]]]:
    """Yield the tensors in the file's order: consecutive names, and the shape of each."""
    C = config.n_embd
    yield ["wte.weight"], (Vp, C)
    yield ["wpe.weight"], (config.block_size, C)
    for name, shape in block_shapes(C).items():
        yield [f"h.{i}.{name}" for i in range(config.n_layer)], shape
    yield ["ln_f.weight"], (C,)
    yield ["ln_f.bias"], (C,)
