"""Launch settings to try: each names something in launch.py, and only that is replaced."""

import pytest
import torch

from benchmarks import settings, tune
from benchmarks.settings import Kernel, PerProcessor
from gpt2fast.kernels import launch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs the interpreter")


CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def cases():
    return settings.cases(32, 16, "nano", CPU)


def test_every_tunable_names_something_of_launch_and_a_case(cases):
    for title, kernel in settings.tunables().items():
        assert hasattr(launch, kernel.name), title
        assert kernel.op in cases
        assert len(set(map(repr, kernel.values))) == len(kernel.values) > 1


def test_only_the_call_that_is_meant_is_replaced():
    kernel = Kernel("layer_norm_rows", "add_layer_norm", "backward", [], {"backward": True})
    seen: list = []
    function = tune.replaced(kernel, "other", seen)
    assert function(768, backward=False) == launch.layer_norm_rows(768, False)
    assert function(768, True) == "other"
    assert seen == [launch.layer_norm_rows(768, True)]
    persistent = Kernel("persistent", "add_layer_norm", "backward", [], {"per_processor": 4})
    function = tune.replaced(persistent, PerProcessor(3), seen)
    assert (function(100, CPU), function(100, CPU, 2), seen[-1]) == (6, 4, PerProcessor(4))
