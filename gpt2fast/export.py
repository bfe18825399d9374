"""Write weights in another program's format: `python -m gpt2fast.export out/gpt2 --out exported/gpt2`.

    huggingface    a folder that GPT2LMHeadModel.from_pretrained and pipeline load: model.safetensors, config.json,
                   generation_config.json, and the tokenizer's files if the vocabulary is GPT-2's
    llm.c          one file, .bin: version 3 in fp32, version 5 in bf16

The output is complete or absent, and never replaces anything.
"""

import json
import os
import shutil
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from gpt2fast.command import parse, run_main
from gpt2fast.data import tokenizer
from gpt2fast.errors import RunError, UserError
from gpt2fast.files.atomic import check_new, publish, sync
from gpt2fast.files.locked import locked
from gpt2fast.model import INIT_STD, VOCAB_SIZE, GPTConfig
from gpt2fast.weights import llmc
from gpt2fast.weights.foreign import Weights
from gpt2fast.weights.huggingface import FIXED, SIZES
from gpt2fast.weights.layout import TRANSPOSED
from gpt2fast.weights.load import read_weights

END = "<|endoftext|>"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write weights in another program's format."""

    source: str
    """A run's folder, or any weights that gpt2fast reads: a file, a folder, or the name of a model on the hub."""
    out: Path = Path("exported")
    """Folder to make, or for llm.c the file, which ends in .bin."""
    format: Literal["huggingface", "llm.c"] = "huggingface"
    """huggingface: a folder for transformers; llm.c: one model file."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Number format; bf16 rounds to 8 bits of precision and halves the size."""


def export(c: ExportConfig) -> tuple[Weights, list[str]]:
    """Read the weights and write them. Return them and the names of the files.

    UserError on bad input, RunError if they cannot be written; nothing is left then.
    """
    check_new(c.out)
    if (c.format == "llm.c") != (c.out.suffix == ".bin"):
        wanted = "a file ending in .bin" if c.format == "llm.c" else "a folder, so without .bin"
        raise UserError(f"--out is {c.out}: the format {c.format} needs {wanted}: change --out")
    weights = read_weights(c.source)
    try:
        c.out.parent.mkdir(parents=True, exist_ok=True)
        write = write_llmc if c.format == "llm.c" else write_huggingface
        return weights, write(weights, c.out, DTYPES[c.dtype])
    except (OSError, SafetensorError) as error:
        raise RunError(f"cannot write {c.out} ({error}): free some space, or change --out") from None


def write_llmc(weights: Weights, path: Path, dtype: torch.dtype) -> list[str]:
    """Write a model file of llm.c. Return the names of the files, here one."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            llmc.write_bin(file, weights.config, weights.tensors, dtype)
        sync(temporary)
        os.rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)
    return [path.name]


def write_huggingface(weights: Weights, folder: Path, dtype: torch.dtype) -> list[str]:
    """Write a folder for transformers; the head is tied to wte and not stored again. Return the names of the files."""
    texts = {"config.json": _json(model_config(weights.config, dtype))}
    texts["generation_config.json"] = _json(_special_tokens(weights.config))
    texts |= _tokenizer_files(weights.config)
    partial = folder.with_name(f"{folder.name}.partial")
    with locked(partial):
        try:
            for old in partial.iterdir():
                if old.name != "lock":
                    old.unlink()
            for name, text in texts.items():
                (partial / name).write_text(text, encoding="utf-8", newline="\n")
            tensors = {
                f"transformer.{name}": (tensor.T if name.endswith(TRANSPOSED) else tensor).to(dtype).contiguous()
                for name, tensor in weights.tensors.items()
            }
            save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
            # safetensors makes its files readable to their owner only
            (partial / "model.safetensors").chmod(stat.S_IMODE((partial / "config.json").stat().st_mode))
            (partial / "lock").unlink(missing_ok=True)
            publish(partial, folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return ["model.safetensors", *texts]


def model_config(config: GPTConfig, dtype: torch.dtype) -> dict:
    """Return config.json as transformers writes it for GPT2LMHeadModel; without dropout, as in our training."""
    kind = str(dtype).removeprefix("torch.")
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **{theirs: getattr(config, ours) for ours, theirs in SIZES.items()},
        **{name: values[0] for name, values in FIXED.items() if values[0] is not None},
        "n_inner": None,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "initializer_range": INIT_STD,
        "tie_word_embeddings": True,
        "use_cache": True,
        "dtype": kind,
        "torch_dtype": kind,  # its name until transformers 4.56
        **_special_tokens(config),
    }


def _special_tokens(config: GPTConfig) -> dict:
    """Return the settings of the special tokens: transformers would assume 50256 for both in any vocabulary."""
    token = tokenizer.EOT if config.vocab_size == VOCAB_SIZE else None
    return {"bos_token_id": token, "eos_token_id": token}


def _tokenizer_files(config: GPTConfig) -> dict[str, str]:
    """Return name -> content of the files that transformers makes GPT-2's tokenizer of.

    merges.txt is OpenAI's vocab.bpe; vocab.json numbers the same tokens, written with the same characters. None of them
    if the vocabulary is not GPT-2's, or vocab.bpe cannot be found.
    """
    if config.vocab_size != VOCAB_SIZE:
        return {}
    try:
        merges = tokenizer.vocab_bpe().decode()
    except UserError:
        return {}
    characters = [chr(b) for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    characters += [chr(256 + n) for n in range(256 - len(characters))]  # the order of the bytes is tokenizer.py's
    tokens = [*characters, *(line.replace(" ", "") for line in merges.splitlines()[1:]), END]
    settings = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": config.block_size, "add_prefix_space": False}
    return {
        "vocab.json": json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False),
        "merges.txt": merges,
        "tokenizer_config.json": _json(settings | dict.fromkeys(("bos_token", "eos_token", "unk_token"), END)),
    }


def _json(values: dict) -> str:
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def main(argv: Sequence[str]) -> None:
    c = parse(ExportConfig, argv, "gpt2fast.export")
    weights, written = export(c)
    print(f"from    {weights.where}")
    print(f"wrote   {c.out}: {', '.join(written)}")
    if c.format == "huggingface" and "vocab.json" not in written:
        print("note    without a tokenizer: the vocabulary is not GPT-2's, or vocab.bpe was not found")


if __name__ == "__main__":
    run_main(main)
