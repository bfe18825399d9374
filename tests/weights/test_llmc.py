"""llm.c's .bin, versions 3 and 5: read bit for bit, and refused if header and size do not fit."""

import numpy as np
import pytest
import torch

from gpt2fast.errors import UserError
from gpt2fast.weights.foreign import read_foreign
from tests.tools import foreign_files
from tests.tools.foreign_files import CONFIG, assert_same_tensors, random_tensors


@pytest.mark.parametrize(("version", "dtype"), [(3, torch.float32), (5, torch.bfloat16)])
def test_llmc(tmp_path, version, dtype):
    (tmp_path / "gpt2.bin").write_bytes(foreign_files.llmc_file(CONFIG, random_tensors(), version))
    found = read_foreign(tmp_path / "gpt2.bin")
    assert found.config == CONFIG
    assert_same_tensors(found.tensors, {name: tensor.to(dtype).float() for name, tensor in random_tensors().items()})


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        (1, 1, "has version 1: write it in version 3"),
        (1, 5, "header means .* bytes, but it has"),
        (2, 9, "header means"),
        (3, 0, "impossible header: vocab_size is 0"),
        (3, 129, "128 rows cannot hold a vocabulary of 129"),
        (4, 2**31 - 1, "header means"),
        (5, 3, "n_embd 16 is not a multiple of n_head 3"),
        (6, -16, "n_embd is -16"),
        (7, 256, "header means"),
    ],
)
def test_llmcs_header_must_fit_the_file(tmp_path, field, value, match):
    header = np.frombuffer(bytearray(foreign_files.llmc_file(CONFIG, random_tensors(), 3)), np.int32)
    header[field] = value
    (tmp_path / "gpt2.bin").write_bytes(header.tobytes())
    with pytest.raises(UserError, match=match):
        read_foreign(tmp_path / "gpt2.bin")
    (tmp_path / "gpt2.bin").write_bytes(header.tobytes()[:100])
    with pytest.raises(UserError, match="100 bytes are less than its header"):
        read_foreign(tmp_path / "gpt2.bin")
