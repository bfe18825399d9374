"""Read other projects' weights: any format -> our names, (out, in), fp32, every tensor accounted for.

    Hugging Face    config.json and model.safetensors or pytorch_model.bin, here or on the hub      huggingface.py
    OpenAI          TensorFlow's model.ckpt.index and .data, or an .npz with the same names         openai.py
    llm.c           one .bin, fp32 or bf16                                                          llmc.py
    nanoGPT         ckpt.pt, or a bare state_dict (build-nanogpt's "model", saved alone)            nanogpt.py

A format's module returns the shape of the model, if the file tells it, and tensors that may still be transposed, have
prefixes, or be in half precision. The rest is done here for all formats. Our own runs are read by load.py.

Tensors are views of memory-mapped files where possible, also transposed ones: gpt2-xl then takes no memory until a
model copies it. Writing to a tensor does not write to the file.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gpt2fast.errors import UserError
from gpt2fast.files import containers
from gpt2fast.files.checked import open_file
from gpt2fast.model import VOCAB_SIZE, GPTConfig
from gpt2fast.weights import huggingface, llmc, nanogpt, openai
from gpt2fast.weights.layout import PADDED_VOCAB_SIZE, TRANSPOSED, heads, shapes, unpadded

ACCEPTED = (
    "a run's folder or checkpoint, a Hugging Face folder (config.json, model.safetensors or pytorch_model.bin), "
    "OpenAI's TensorFlow folder (model.ckpt.index) or .npz, llm.c's .bin, nanoGPT's ckpt.pt, or a model on the hub "
    f"({', '.join(huggingface.HUB)}, owner/name)"
)
_BUFFER = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # the causal mask, which some files contain
_BLOCK = re.compile(r"h\.(\d{1,9})\.")
_FIRST = "h.0.attn.c_attn.weight"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_NAMED = 3  # at most this many names in a message


@dataclass(frozen=True)
class Weights:
    """A model's shape and its tensors under the names of `GPT.state_dict()`: fp32, on the CPU, the vocabulary unpadded.

    `where` is the place they were read from. `state` is a checkpoint's state.json, its "ops" an OpsConfig; None for
    other formats.
    """

    config: GPTConfig
    tensors: dict[str, Tensor]
    where: str
    state: dict | None = None


def read_foreign(source: str | Path) -> Weights:
    """Read the weights at `source`: a path, or, if there is no such path, a model on the hub.

    UserError if there are none, they are damaged, or they are not GPT-2's.
    """
    path = Path(source)
    if path.is_dir():
        return _read_folder(path)
    if path.is_file():
        return _read_file(path)
    if name := huggingface.hub_name(str(source)):
        folder = huggingface.download_model(name, str(source))
        found = huggingface.find_weights(folder)
        assert found, "download_model returns a folder that has them"
        return assemble(*huggingface.read_folder(folder, found), f"{name} on the hub")
    raise UserError(f"{source} does not exist: name {ACCEPTED}")


def _read_folder(folder: Path) -> Weights:
    if name := huggingface.find_weights(folder):
        return assemble(*huggingface.read_folder(folder, name), str(folder))
    if (folder / nanogpt.NAME).is_file():
        return assemble(*nanogpt.read_ckpt(folder / nanogpt.NAME), str(folder / nanogpt.NAME))
    if index := openai.find_index(folder):
        return assemble(*openai.read_tensorflow(index), str(folder))
    raise UserError(f"{folder} holds no run and no known weights: name {ACCEPTED}")


def _read_file(path: Path) -> Weights:
    try:
        with open_file(path) as file:
            head = file.read(4)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): make it a readable file") from None
    config: GPTConfig | None
    if head == llmc.MAGIC:
        config, tensors = llmc.read_bin(path)
    elif path.suffix == ".index":
        config, tensors = openai.read_tensorflow(path)
    elif path.suffix == ".npz":
        config, tensors = openai.read_numpy(path)
    elif path.suffix == ".safetensors":
        config, tensors = None, containers.read_safetensors(path)
    elif head[:2] in (b"PK", b"\x80\x02"):  # a pickle, which is in a zip file since torch 1.6
        config, tensors = nanogpt.read_ckpt(path)
    else:
        raise UserError(f"{path} is not a known file of weights: name {ACCEPTED}")
    return assemble(config or huggingface.config_beside(path), tensors, str(path))


def assemble(config: GPTConfig | None, tensors: Mapping[str, Tensor], where: str) -> Weights:
    """Convert names and layouts to ours. `config` None: infer it from the shapes; the heads come from the known sizes.

    All tensors must be present with the right shape, and there may be no others: UserError names missing, extra and
    misshapen tensors, a head that is not tied, and dtypes other than fp32, bf16 and fp16.
    """
    plain = {name.removeprefix("_orig_mod.").removeprefix("transformer."): t for name, t in tensors.items()}
    if len(plain) < len(tensors):
        raise UserError(f"{where} holds a tensor twice, with and without a prefix of its name: remove one")
    tensors = {name: tensor for name, tensor in plain.items() if not _BUFFER.fullmatch(name)}
    head = tensors.pop("lm_head.weight", None)
    if head is not None and "wte.weight" in tensors and not _equal(head, tensors["wte.weight"]):
        raise UserError(f"{where}: lm_head.weight differs from wte.weight, but GPT-2's head is tied: name a GPT-2")
    first = tensors.get(_FIRST)
    if first is not None and first.dim() == 2 and first.shape[1] == 3 * first.shape[0]:
        tensors = {n: t.T if n.endswith(TRANSPOSED) and t.dim() == 2 else t for n, t in tensors.items()}
    config = config or _infer(tensors, where)
    if config.n_layer > len(tensors):  # before building n_layer names
        raise UserError(
            f"{where}: n_layer is {config.n_layer}, but there are only {len(tensors)} tensors: use its own config.json"
        )
    wte = tensors.get("wte.weight")
    if wte is not None and wte.dim() == 2 and len(wte) == PADDED_VOCAB_SIZE and config.vocab_size == VOCAB_SIZE:
        tensors["wte.weight"] = wte[:VOCAB_SIZE]
    needed = shapes(config)
    _check(tensors, needed, where)
    return Weights(config, {name: tensors[name].float() for name in needed}, where)


def _equal(x: Tensor, y: Tensor) -> bool:
    return x.dtype == y.dtype and x.shape == y.shape and (x.data_ptr() == y.data_ptr() or torch.equal(x, y))


def _infer(tensors: Mapping[str, Tensor], where: str) -> GPTConfig:
    for name in ("wte.weight", "wpe.weight"):
        if name not in tensors or tensors[name].dim() != 2 or not tensors[name].numel():
            raise UserError(f"{where} holds no GPT-2: {name} is missing{_some(tensors, '; there is ')}: name another")
    n_layer = 1 + max((int(match[1]) for name in tensors if (match := _BLOCK.match(name))), default=-1)
    (V, C), T = tensors["wte.weight"].shape, len(tensors["wpe.weight"])
    n_head = heads(n_layer, C)
    if n_head is None:
        raise UserError(
            f"{where}: {n_layer} layers of width {C} are not a known size, and no tensor tells the number of heads: "
            "put the model's config.json beside it"
        )
    return GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=C, block_size=T, vocab_size=unpadded(V))


def _check(tensors: Mapping[str, Tensor], needed: Mapping[str, tuple[int, ...]], where: str) -> None:
    missing = [name for name in needed if name not in tensors]
    extra = [name for name in tensors if name not in needed]
    both = [name for name in needed if name in tensors]
    found = {name: tuple(tensors[name].shape) for name in both}
    misshapen = [f"{name} {found[name]} instead of {needed[name]}" for name in both if found[name] != needed[name]]
    wrong = [f"{name} is {tensors[name].dtype}" for name in both if tensors[name].dtype not in FLOATS]
    kinds = {"missing": missing, "not GPT-2's": extra, "misshapen": misshapen, "not fp32, bf16 or fp16": wrong}
    faults = [_some(names, f"{kind}: ") for kind, names in kinds.items() if names]
    if faults:
        raise UserError(f"{where} is not a GPT-2 of the shape that it describes: {'; '.join(faults)}")


def _some(names: Collection[str], before: str) -> str:
    """Join the first few names, and say how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return before + ", ".join(list(names)[:_NAMED]) + more if names else ""
