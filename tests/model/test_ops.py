"""The choice of implementations: every op is looked up by name, and a missing one is refused at start-up."""

import sys
from types import ModuleType

import pytest
import torch

from gpt2fast import cpu, ops, reference
from gpt2fast.errors import UserError
from gpt2fast.model import GPT, GPTConfig
from gpt2fast.ops import NAMES, OpsConfig, build


@pytest.fixture
def kernels(monkeypatch) -> ModuleType:
    """A stand-in for gpt2fast.kernels that defines the names of Ops, each as a different object.

    Also one for gpt2fast.kernels.epilogue, with an mlp of its own and an imported linear.
    """
    module, epilogue = ModuleType("gpt2fast.kernels"), ModuleType("gpt2fast.kernels.epilogue")
    for name in (*NAMES, "cached_attention"):
        setattr(module, name, lambda *args: args)
    epilogue.mlp, epilogue.linear = lambda *args: args, module.linear
    module.interpreter_fault = lambda: None
    monkeypatch.setitem(sys.modules, "gpt2fast.kernels", module)
    monkeypatch.setitem(sys.modules, "gpt2fast.kernels.epilogue", epilogue)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return module


def test_the_seven_names():
    assert NAMES == (
        "embedding", "layer_norm", "add_layer_norm", "attention", "mlp", "linear", "linear_cross_entropy"
    )  # fmt: skip
    assert tuple(vars(OpsConfig())) == NAMES


def test_the_backend_sets_only_ops_that_are_none():
    config = OpsConfig(attention="torch").with_backend("triton")
    assert vars(config) == dict.fromkeys(NAMES, "triton") | {"attention": "torch"}


def test_auto_leaves_ops_that_are_none():
    assert OpsConfig(attention="triton").with_backend("auto") == OpsConfig(attention="triton")


def test_a_compiled_op_is_compiled_only_where_it_is_differentiated(monkeypatch):
    seen = []

    def compile(fn, **options):
        seen.append((fn, options))
        return lambda *args: "compiled"

    monkeypatch.setattr(torch, "compile", compile)
    mixed = build(OpsConfig(mlp="compiled"))
    assert [options for _, options in seen] == [{"dynamic": False}]
    torchs = build(OpsConfig())
    assert (seen[0][0], mixed.linear) == (torchs.mlp, torchs.linear)
    x, w, b = torch.ones(1, 4), torch.ones(4, 4), torch.ones(4)
    assert mixed.mlp(x, w, b, w, b) == "compiled"
    with torch.no_grad():
        assert torch.equal(mixed.mlp(x, w, b, w, b), torchs.mlp(x, w, b, w, b))


def test_compiled_ops_inside_a_compiled_step_are_one_graph():
    compiled = build(OpsConfig().with_backend("compiled"))
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=8, vocab_size=64), compiled)
    idx = torch.arange(8)[None]
    torch.compile(model, fullgraph=True, backend="aot_eager")(idx, idx).backward()
    assert model.wte.weight.grad is not None


@pytest.mark.parametrize("name", NAMES)
def test_each_op_is_the_chosen_modules_function_of_that_name(name, kernels):
    assert getattr(build(OpsConfig()), name) is getattr(cpu, name)
    assert getattr(build(OpsConfig().with_backend("torch")), name) is getattr(cpu, name)
    assert getattr(build(OpsConfig(), "cuda:1"), name) is getattr(build(OpsConfig(), "mps"), name)
    assert getattr(build(OpsConfig(), "cuda"), name) is getattr(reference, name)
    assert getattr(build(OpsConfig().with_backend("triton")), name) is getattr(kernels, name)


def test_cached_attention_is_from_the_module_of_attention(kernels):
    assert build(OpsConfig(attention="triton")).cached_attention is kernels.cached_attention
    others = OpsConfig(attention="compiled").with_backend("triton")
    assert build(others, "cuda").cached_attention is reference.cached_attention
    assert build(others).cached_attention is cpu.cached_attention


@pytest.mark.parametrize("name", NAMES)
def test_one_op_can_differ_from_all_others(name, kernels):
    mixed = build(OpsConfig(**{name: "triton"}))
    assert {op: getattr(mixed, op) for op in NAMES} == {op: getattr(kernels if op == name else cpu, op) for op in NAMES}


def test_an_op_without_implementation_is_refused_by_name(kernels):
    del kernels.attention
    with pytest.raises(UserError, match=r"triton has no implementation of attention: use --ops.attention torch"):
        build(OpsConfig().with_backend("triton"))
    assert build(OpsConfig(attention="torch").with_backend("triton")).mlp is kernels.mlp


def test_epilogue_implements_mlp_only(kernels):
    mixed = build(OpsConfig(mlp="epilogue").with_backend("triton"))
    assert mixed.mlp is sys.modules["gpt2fast.kernels.epilogue"].mlp
    assert mixed.linear is kernels.linear
    assert build(OpsConfig(mlp="epilogue")).linear is cpu.linear
    with pytest.raises(UserError, match=r"epilogue has no implementation of linear: use --ops.linear torch"):
        build(OpsConfig(linear="epilogue"))


def test_several_missing_ops_are_all_named(kernels):
    del kernels.mlp, kernels.linear
    with pytest.raises(UserError, match="mlp, linear"):
        build(OpsConfig().with_backend("triton"))


@pytest.mark.parametrize("name", ["triton", "epilogue"])
@pytest.mark.parametrize("value", [None, "0"], ids=["unset", "0"])
def test_triton_on_a_cpu_is_refused_unless_it_is_interpreted(value, name, kernels, monkeypatch):
    if value is None:
        monkeypatch.delenv("TRITON_INTERPRET")
    else:
        monkeypatch.setenv("TRITON_INTERPRET", value)
    with pytest.raises(UserError, match=r"needs a CUDA GPU.* on cpu: use --backend torch, or set TRITON_INTERPRET=1"):
        build(OpsConfig(mlp=name), "cpu")
    module = kernels if name == "triton" else sys.modules["gpt2fast.kernels.epilogue"]
    assert build(OpsConfig(mlp=name), "cuda").mlp is module.mlp


def test_triton_that_is_not_installed_is_refused(kernels, monkeypatch):
    monkeypatch.setattr(ops, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"needs the package triton \(Linux: pip install triton\): install it or use --backend torch"
    ):
        build(OpsConfig(linear="triton"))
    with pytest.raises(UserError, match=r"needs the package triton"):
        build(OpsConfig(mlp="epilogue"))
    assert build(OpsConfig()).linear is cpu.linear


def test_an_interpreter_that_cannot_run_the_kernels_is_refused(kernels):
    kernels.interpreter_fault = lambda: "it is broken: repair it"
    with pytest.raises(UserError, match="it is broken: repair it"):
        build(OpsConfig(linear="triton"))


def test_only_triton_ops_are_interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert ops.interpreted(OpsConfig(mlp="triton").with_backend("torch"))
    assert ops.interpreted(OpsConfig(mlp="epilogue").with_backend("torch"))
    assert not ops.interpreted(OpsConfig().with_backend("torch"))
    monkeypatch.delenv("TRITON_INTERPRET")
    assert not ops.interpreted(OpsConfig().with_backend("triton"))


def test_sizes_that_a_kernel_does_not_support_are_refused():
    from gpt2fast.kernels.attention_forward import D_RANGE
    from gpt2fast.kernels.layernorm import MAX_N

    assert (ops.HEAD_DIMENSIONS, ops.MAX_WIDTH) == (D_RANGE, MAX_N)
    triton = OpsConfig().with_backend("triton")
    ops.check_sizes(triton, 768, 64)
    ops.check_sizes(OpsConfig(attention="torch", layer_norm="torch", add_layer_norm="torch"), 10**6, 8)
    with pytest.raises(UserError, match=r"n_head = 8 dimensions, and triton's attention supports 16 to 256.*torch"):
        ops.check_sizes(triton, 768, 8)
    with pytest.raises(
        UserError, match=r"triton's add_layer_norm supports at most 16384: use --ops.add-layer-norm torch"
    ):
        ops.check_sizes(OpsConfig(add_layer_norm="triton"), 16385, 64)


def test_an_unknown_implementation_is_refused():
    with pytest.raises(
        UserError, match="unknown implementation 'cuda': use torch, compiled, triton, or for mlp epilogue"
    ):
        build(OpsConfig(linear="cuda"))


def test_names_in_a_checkpoint_do_not_depend_on_the_ops(kernels):
    config = GPTConfig(n_layer=2, n_head=2, n_embd=8, block_size=8, vocab_size=64)
    torch_model, triton_model = (GPT(config, build(OpsConfig().with_backend(name))) for name in ("torch", "triton"))
    assert list(torch_model.state_dict()) == list(triton_model.state_dict())
    assert not any("ops" in name for name in torch_model.state_dict())
