"""Write weights in other projects' formats: random values everywhere, since a zero or one would hide a lost tensor."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from gpt2fast.model import GPTConfig
from gpt2fast.weights.layout import shapes
from tests.tools import programs

CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=50)
OPENAI = Path(__file__).parent / "openai_tf"  # written by TensorFlow
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def random_tensors(config: GPTConfig = CONFIG, seed: int = 0) -> dict[str, Tensor]:
    """Return random fp32 tensors with our names and shapes."""
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.05 * torch.randn(shape, generator=generator) for name, shape in shapes(config).items()}


def conv1d(tensors: dict[str, Tensor], prefix: str = "transformer.") -> dict[str, Tensor]:
    """Return the tensors with Hugging Face's names and transposed weights."""
    return {
        prefix + name: (tensor.T if name.endswith(TRANSPOSED) else tensor).clone().contiguous()
        for name, tensor in tensors.items()
    }


def huggingface_config(config: GPTConfig = CONFIG, **changes) -> str:
    """Return a minimal config.json."""
    stored = {
        "model_type": "gpt2", "n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd,
        "n_positions": config.block_size, "vocab_size": config.vocab_size,
    }  # fmt: skip
    return json.dumps(stored | changes)


def huggingface_folder(folder: Path, tensors: dict[str, Tensor] | None = None, **changes) -> Path:
    """Write a model's minimal files; `changes` go to config.json."""
    folder.mkdir()
    (folder / "config.json").write_text(huggingface_config(**changes))
    save_file(conv1d(random_tensors()) if tensors is None else tensors, folder / "model.safetensors")
    return folder


def llmc_file(config: GPTConfig, tensors: dict[str, Tensor], version: int) -> bytes:
    """Return a model file as llm.c's train_gpt2.py writes it, in NumPy: each kind of tensor for all layers."""
    header = np.zeros(256, np.int32)
    Vp = -(-config.vocab_size // 128) * 128
    header[:8] = (
        20240326, version, config.block_size, config.vocab_size, config.n_layer, config.n_head, config.n_embd, Vp,
    )  # fmt: skip
    modules = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    kinds = [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]
    padding = np.zeros((Vp - config.vocab_size, config.n_embd), np.float32)
    parts = [tensors["wte.weight"].numpy(), padding, tensors["wpe.weight"].numpy()]
    parts += [tensors[f"h.{i}.{kind}"].numpy() for kind in kinds for i in range(config.n_layer)]
    parts += [tensors["ln_f.weight"].numpy(), tensors["ln_f.bias"].numpy()]
    numbers = np.concatenate([part.ravel() for part in parts])
    if version == 5:
        numbers = (torch.from_numpy(numbers).bfloat16().view(torch.int16)).numpy()
    return header.tobytes() + numbers.tobytes()


def run_transformers(code: str, folder: Path) -> str:
    """Run `code` in `folder`, without access to the checkout's modules and to the hub. Return its output."""
    env = {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    return programs.run("-c", code, cwd=folder, env=env, check=True).stdout


def assert_same_tensors(got, needed) -> None:
    assert list(got) == list(needed)
    for name, tensor in needed.items():
        assert got[name].dtype == torch.float32
        assert torch.equal(got[name], tensor), name


def nanogpt_checkpoint(path: Path, config: GPTConfig, tensors, bias=True, prefix="_orig_mod.") -> None:
    """Save as nanoGPT does: (out, in), a tied head, a compiled model's prefix, the optimizer, the causal mask."""
    model = {f"{prefix}transformer.{name}": tensor for name, tensor in tensors.items()}
    model[f"{prefix}lm_head.weight"] = tensors["wte.weight"]
    model |= {f"{prefix}transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8).tril()}
    args = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd", "block_size")}
    args |= {"bias": bias, "vocab_size": len(tensors["wte.weight"]), "dropout": 0.1}
    torch.save({"model": model, "optimizer": {"state": {}}, "model_args": args, "iter_num": 3, "config": {}}, path)
