"""The experiment with ops that Inductor looks into: what it would be given, traced on a GPU that is not there."""

import json

import pytest

from tests.tools import programs

TRACE = """
import json, sys, torch
from torch._functorch.aot_autograd import aot_function
from torch._subclasses.fake_tensor import FakeTensorMode
from benchmarks import aot, visible
from gpt2fast import kernels

gelu, norm = (sys.modules["gpt2fast.kernels." + name] for name in ("tanh_gelu", "layernorm"))
graphs = []

def keep(graph, inputs):
    graphs.append(graph)
    return graph

def all_ops(x, y, w, b):  # autograd itself will not run for a device that is not there
    s, o, mean, rstd = norm.add_layer_norm_fwd(x, y, w, b, 1e-5, torch.bfloat16)
    once = norm.layer_norm_fwd(x, w, b, 1e-5, torch.bfloat16)
    back = norm.add_layer_norm_bwd(x, o, s, w, mean, rstd, torch.bfloat16), norm.layer_norm_bwd(o, x, w, mean, rstd)
    return once, back, gelu.gelu_fwd(o), gelu.gelu_bwd(o, o), gelu.bias_gelu_fwd(s, w), gelu.bias_gelu_bwd(s, s, w)

def trace():
    graphs.clear()
    with aot.compiling_for(90), FakeTensorMode():
        tensors = [torch.empty(shape, device="cuda") for shape in ((64, 768), (64, 768), (768,), (768,))]
        aot_function(all_ops, fw_compiler=keep)(*tensors)
    calls = [node for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    clones = [node.kwargs["tensors_to_clone"] for node in calls if "tensors_to_clone" in node.kwargs]
    return [str(node.target) for node in calls], clones

opaque, _ = trace()
visible.make_visible()
print(json.dumps([opaque, *trace()]))
"""


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """Calls in the graphs of four ops, forward and backward, before and after; what Inductor believes is written."""
    done = programs.run("-c", TRACE, cwd=tmp_path_factory.mktemp("traced"), env={"TRITON_INTERPRET": "0"}, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_inductor_sees_kernels_in_the_place_of_ops(traced):
    opaque, seen, _ = traced
    assert sum("gpt2fast." in call for call in opaque) == 8
    assert not any("gpt2fast" in call for call in seen)
    assert sum("triton_kernel_wrapper" in call for call in seen) == 8


def test_it_knows_which_tensors_they_write(traced):
    """Else it would clone every input, and the experiment would measure copies."""
    names = {name for clones in traced[2] for name in clones}
    assert {"o_ptr", "dx_ptr", "dw_ptr"} <= names
    assert not names & {"x_ptr", "w_ptr", "b_ptr", "do_ptr"}
