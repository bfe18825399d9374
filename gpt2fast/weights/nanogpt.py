"""Read nanoGPT's ckpt.pt, and any bare state_dict with its names.

    {"model": state_dict, "model_args": {n_layer, n_head, n_embd, block_size, bias, vocab_size}, ...}

A bare state_dict has no "model_args"; the shape is then inferred. nanoGPT trains with a vocabulary of 50304, which is
50257 rounded up to a multiple of 64. Rows from 50257 on are not tokens and are left out: softmax loses 47 columns,
whose probability training has made almost zero.

Source: train.py and model.py of github.com/karpathy/nanoGPT.
"""

from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import Tensor

from gpt2fast.errors import UserError
from gpt2fast.files import checked
from gpt2fast.files.containers import check_tensors, read_pickle
from gpt2fast.model import GPTConfig
from gpt2fast.weights.layout import unpadded

NAME = "ckpt.pt"
_EMBEDDINGS = ("wte.weight", "wpe.weight", "lm_head.weight")


def read_ckpt(path: Path) -> tuple[GPTConfig | None, dict[str, Tensor]]:
    """Return the shape, if there are "model_args", and the tensors under the file's names. UserError if damaged."""
    stored = read_pickle(path)
    tensors = stored.get("model", stored)
    check_tensors(tensors, path)
    tensors = dict(tensors)
    if "model_args" not in stored:
        return None, tensors
    try:
        args = dict(stored["model_args"])
        config = checked.fill(GPTConfig, {field.name: args[field.name] for field in fields(GPTConfig)})
        config = replace(config, vocab_size=unpadded(config.vocab_size))
    except (KeyError, TypeError, ValueError, UserError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: model_args describe no GPT-2 ({reason}): save it again") from None
    if args.get("bias") is False:  # a bias of zero is the same function
        weights = [name for name in tensors if name.endswith(".weight") and not name.endswith(_EMBEDDINGS)]
        tensors |= {f"{name.removesuffix('weight')}bias": torch.zeros(tensors[name].shape[:1]) for name in weights}
    return config, tensors
