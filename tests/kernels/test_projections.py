"""mlp and linear, composed of torch's matmuls and our GELU, against the reference at the same dtype."""

from functools import partial

import pytest

from gpt2fast import reference
from gpt2fast.kernels import linear, mlp
from tests.tools.accuracy import assert_kernel_is_as_accurate, outputs_and_gradients
from tests.tools.inputs import DTYPES, normal

pytestmark = pytest.mark.kernel


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 5, 48), (7, 48), (1, 48), (0, 48)], ids=str)
@pytest.mark.parametrize("name", ["mlp", "linear", "linear without bias"])
def test_as_accurate_as_torch(name, shape, dtype, device):
    n = partial(normal, dtype=DTYPES[dtype], device=device)
    C, F = 48, 200
    weights = {
        "mlp": [n(F, C) / 8, n(F), n(C, F) / 8, n(C)],
        "linear": [n(F, C) / 8, n(F)],
        "linear without bias": [n(F, C) / 8],
    }[name]
    ours, theirs = (mlp, reference.mlp) if name == "mlp" else (linear, reference.linear)

    def base(inputs, cotangents):
        return outputs_and_gradients(theirs, inputs, cotangents)

    assert_kernel_is_as_accurate(ours, theirs, [n(*shape), *weights], base=base)
