"""Read Hugging Face's GPT-2: a folder of config.json and model.safetensors or pytorch_model.bin, here or on the hub.

Names may begin with "transformer."; c_attn, c_proj and c_fc are (in, out), as in Conv1D; the head is tied to wte and
usually not stored. config.json can describe models that differ from GPT-2 as computed here: these are refused.

Source: modeling_gpt2.py and configuration_gpt2.py of github.com/huggingface/transformers.
"""

import re
from pathlib import Path

from torch import Tensor

from gpt2fast.errors import UserError
from gpt2fast.files import checked
from gpt2fast.files.containers import check_tensors, read_pickle, read_safetensors
from gpt2fast.model import EPS, GPTConfig

HUB = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
READERS = {"model.safetensors": read_safetensors, "pytorch_model.bin": read_pickle}
SIZES = {  # ours -> theirs
    "n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd", "block_size": "n_positions",
    "vocab_size": "vocab_size",
}  # fmt: skip
FIXED = {  # setting -> the values that are GPT-2; the first is transformers' default
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of tanh-GELU
    "layer_norm_epsilon": (EPS,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "quantization_config": (None,),
}
SUFFIXES = (".bin", ".pt", ".npz", ".index", ".safetensors")  # with one of these it is a file, not a hub name
_PART = re.compile(r"\w[\w.-]*", re.ASCII)
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def find_weights(folder: Path) -> str | None:
    """Return the name of the weights' file in `folder`, or of the index of the files they are split into; else None."""
    names = [name for file in READERS for name in (file, f"{file}.index.json")]
    return next((name for name in names if (folder / name).is_file()), None)


def read_folder(folder: Path, name: str) -> tuple[GPTConfig | None, dict[str, Tensor]]:
    """Return the shape, if there is a config.json, and the tensors under the file's names.

    `name` is what `find_weights` returned. UserError if a file is damaged.
    """
    config = config_beside(folder / name)
    read = READERS[name.removesuffix(".index.json")]
    tensors: dict[str, Tensor] = {}
    for path in _parts(folder / name) if name.endswith(".json") else [folder / name]:
        part = read(path)
        check_tensors(part, path)
        tensors |= part
    return config, tensors


def _parts(index: Path) -> list[Path]:
    try:
        names = sorted(set(checked.read_json(index)["weight_map"].values()))
        if not all(_PART.fullmatch(name) for name in names):
            raise ValueError("a file outside the folder")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is damaged ({type(error).__name__}: {error}): download it again") from None
    return [index.with_name(name) for name in names]


def config_beside(path: Path) -> GPTConfig | None:
    """Read the shape from config.json beside `path`; None if there is none. UserError if it does not describe GPT-2."""
    path = path.with_name("config.json")
    if not path.is_file():
        return None
    try:
        stored = dict(checked.read_json(path))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}): write or download it again") from None
    if stored.get("model_type") != "gpt2":
        raise UserError(f"{path}: model_type is {stored.get('model_type')!r}: only 'gpt2' can be read")
    values: dict = {ours: stored.get(theirs) for ours, theirs in SIZES.items()}
    for name, value in values.items():
        if type(value) is not int:
            raise UserError(f"{path}: {SIZES[name]} is {value!r}: it must be a whole number")
    fixed = FIXED | {"n_inner": (None, 4 * values["n_embd"])}
    for name, known in fixed.items():
        if (value := stored.get(name, known[0])) not in known:
            raise UserError(f"{path}: {name} is {value!r}: GPT-2 has {' or '.join(repr(one) for one in known)}")
    try:
        return GPTConfig(**values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def hub_name(source: str) -> str | None:
    """Return owner/name on the hub if `source` can be such a name; else None."""
    if source in HUB:
        return HUB[source]
    return source if _ID.fullmatch(source) and Path(source).suffix not in SUFFIXES else None


def download_model(name: str, source: str) -> Path:
    """Return the folder in the hub's cache with config.json and the weights of owner/name; download them if need be.

    UserError, which says what to do by hand, if that fails; `source` is what the user named.
    """
    by_hand = (
        f"download config.json and model.safetensors from https://huggingface.co/{name} into a folder, and name it"
    )
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(
            f"{source} is not a path, and the hub needs a package: pip install 'gpt2fast[hub]'; or {by_hand}"
        ) from None
    try:
        for file in READERS:
            stem, suffix = file.split(".")
            folder = Path(snapshot_download(name, allow_patterns=["config.json", f"{stem}*.{suffix}*"]))
            if find_weights(folder):
                return folder
    except Exception as error:  # no network, no such model, no access, a full disk: one remedy
        reason = str(error).partition("\n")[0][:200]
        raise UserError(
            f"{source} is not a path, and {name} could not be downloaded ({type(error).__name__}: {reason}): {by_hand}"
        ) from None
    raise UserError(f"{name} on the hub has neither {' nor '.join(READERS)}: name another model")
