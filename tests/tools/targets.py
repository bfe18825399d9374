"""The readers of untrusted files: for each of them small valid files, the call, and how to repair checksums."""

import functools
import gzip
import hashlib
import io
import json
import os
import random as python_random
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

from gpt2fast import ops
from gpt2fast.data import encode, loader, shards, texts, tokenizer, writer
from gpt2fast.data.dataset import count_tokens, open_folder, unigram_entropy
from gpt2fast.inference import hellaswag
from gpt2fast.model import GPT
from gpt2fast.training import config, optim, record
from gpt2fast.training.config import PRESETS
from gpt2fast.weights import checkpoint, load
from gpt2fast.weights.foreign import read_foreign
from gpt2fast.weights.openai import _masked_crc32c
from tests.tools import foreign_files, tiny
from tests.tools.command_lines import CommandLine, run_program
from tests.tools.damage import Files, Target
from tests.tools.foreign_files import OPENAI


class Code:
    """Unpickling this makes the folder "ran"."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def read_weights(name: str = "") -> Callable[[Path], object]:
    """Return a call that reads the weights and every number in them, as a model would."""
    return lambda folder: [float(t.sum()) for t in read_foreign(folder / name).tensors.values()]


def hugging_face() -> Files:
    return {"config.json": foreign_files.huggingface_config().encode(), "model.safetensors": save(conv1d())}


def in_parts() -> Files:
    items = list(conv1d().items())
    parts = {"a.safetensors": dict(items[:14]), "b.safetensors": dict(items[14:])}
    index = {"metadata": {}, "weight_map": {name: part for part, some in parts.items() for name in some}}
    files = {part: save(some) for part, some in parts.items()}
    return files | {
        "config.json": foreign_files.huggingface_config().encode(),
        "model.safetensors.index.json": json.dumps(index).encode(),
    }


def conv1d() -> dict[str, torch.Tensor]:
    return foreign_files.conv1d(foreign_files.random_tensors())


def pickled(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def pytorch_bin(more: Callable[[], dict] = dict) -> Callable[[], Files]:
    return lambda: {
        "config.json": foreign_files.huggingface_config().encode(),
        "pytorch_model.bin": pickled(conv1d() | more()),
    }


def nanogpt() -> Files:
    sizes = {name: getattr(foreign_files.CONFIG, name) for name in ("n_layer", "n_head", "n_embd", "block_size")}
    args = {**sizes, "vocab_size": 50, "bias": False, "dropout": 0.0}
    tensors = {f"transformer.{n}": t for n, t in foreign_files.random_tensors().items() if not n.endswith("bias")}
    return {"ckpt.pt": pickled({"model": tensors, "model_args": args, "iter_num": 3})}


def openai(*names: str) -> Callable[[], Files]:
    return lambda: {name: (OPENAI / name).read_bytes() for name in ("hparams.json", *names)}


@functools.cache
def blocks() -> list[tuple[int, int]]:
    """Return the start of each block of the index, and the place of its checksum: after its kind, 0."""
    whole = (OPENAI / "model.ckpt.index").read_bytes()
    starts = (0, *range(len(whole) - 250, len(whole)))
    ends = [i + 1 for i in range(len(whole) - 4) if whole[i] == 0]
    return [
        (start, end)
        for end in ends
        for start in (starts if end > len(whole) - 250 else (0,))
        if whole[end : end + 4] == _masked_crc32c(whole[start:end]).to_bytes(4, "little")
    ]


def mend_table(files: Files) -> Files:
    """Recompute the checksum of each block."""
    name, whole = "model.ckpt.index", TARGETS["openai"].sound["model.ckpt.index"]
    if not isinstance(files[name], bytes) or len(files[name]) != len(whole):
        return files
    table = bytearray(files[name])
    for start, end in blocks():
        table[end : end + 4] = _masked_crc32c(bytes(table[start:end])).to_bytes(4, "little")
    return files | {name: bytes(table)}


def small_run() -> tuple[GPT, torch.optim.Optimizer]:
    model = GPT(foreign_files.CONFIG, ops.build(ops.OpsConfig()), 0)
    return model, optim.adamw(model, 0.1)


def our_checkpoint() -> Files:
    model, optimizer = small_run()
    idx = torch.arange(8)[None]
    model(idx, idx).backward()
    optimizer.step()
    settings = config.to_dict(replace(PRESETS["nano"], model=foreign_files.CONFIG))
    state = {"position": 3, "seconds": 1.5, "scaler": {}, "data_fingerprint": "0" * 16, "config": settings}
    with tempfile.TemporaryDirectory() as folder:
        path = checkpoint.save(Path(folder), 3, model, optimizer, state, keep=1)
        return {file.name: file.read_bytes() for file in path.iterdir()}


def mend_manifest(files: Files) -> Files:
    if files["manifest.json"] != TARGETS["checkpoint"].sound["manifest.json"]:
        return files
    manifest = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in files.items()
        if isinstance(content, bytes) and name != "manifest.json"
    }
    return files | {"manifest.json": json.dumps(manifest).encode()}


def read_checkpoint(folder: Path) -> object:
    """Read as sample does, and then as --resume does."""
    weights = load.read_weights(folder)
    state = checkpoint.read_state(folder)
    model, optimizer = small_run()
    before = python_random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        checkpoint.load_training(folder, model, optimizer, state)
    finally:
        python_random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
    idx = torch.arange(8)[None]
    model(idx, idx).backward()
    optimizer.step()
    return weights, state["data_fingerprint"].strip(), state["seconds"] + 1.0, dict(state["scaler"])


def run_record() -> Files:
    facts = {"parameters": 1, "unigram_entropy": 5.5, "data_fingerprint": "0" * 16}
    found = {"config": config.to_dict(PRESETS["nano"]), "resolved": asdict(tiny.choices()) | facts}
    return {"config.json": json.dumps(found).encode()}


def read_a_record(folder: Path) -> object:
    """Read, and use the record as resume, inspect and evaluate do."""
    settings, resolved = record.read_record(folder)
    config.check(config.resolve(settings, 2**34))
    json.dumps(config.to_dict(settings))
    if not resolved:
        return None
    return list(resolved["ops"].values()), f"{resolved['unigram_entropy']:.2f}", ", ".join([resolved["precision"]])


def hellaswag_rows() -> Files:
    rows = [{"ctx": "A man", "endings": ["sits.", "runs.", "is.", "\ud83d\ude00"], "label": i % 4} for i in range(4)]
    return {"rows.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode()}


def text_files() -> Files:
    text = "".join(f"Line {i} of it, with \u00e9 and \u4e2d.\n" for i in range(60)).encode()
    return {"a.txt": text, "b.txt.gz": gzip.compress(text, mtime=0)}


def jsonl_files() -> Files:
    rows = b"".join(json.dumps({"text": f"Row {i} \ud83d\ude00", "n": [i]}).encode() + b"\n" for i in range(9))
    return {"a.jsonl": rows, "b.jsonl.gz": gzip.compress(rows, mtime=0)}


def read_text(folder: Path) -> object:
    pieces = list(texts.read_pieces(texts.find_files([folder], (".txt", ".jsonl")), "text", 3))
    return encode.encode_pieces(tokenizer.load(), pieces, True)


IDENTITY = {"source": "files", "shard-tokens": 50}


def half_prepared() -> Files:
    with tempfile.TemporaryDirectory() as folder:
        made = writer.Writer(Path(folder), 50, None, False, IDENTITY)
        for i in range(9):
            tokens = np.arange(17 + i, dtype=np.uint16)
            made.add([texts.Piece("x" * 40, True, i % 4 == 3)], [tokens], None)
        return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def resume_preparing(folder: Path) -> object:
    made = writer.Writer(folder, 50, None, False, IDENTITY)
    made.resume()
    made.add([texts.Piece("x", True)], [np.arange(60, dtype=np.uint16)], made.done.state)
    return json.dumps(made.finish())


def shard(kind: str) -> Callable[[], Files]:
    def make() -> Files:
        tokens = np.arange(300, dtype="<u2")
        file = io.BytesIO()
        np.save(file, tokens)
        head = np.zeros(256, "<i4")
        head[:3] = shards.MAGIC, 1, len(tokens)
        content = {"npy": file.getvalue(), "raw": tokens.tobytes(), "bin": head.tobytes() + tokens.tobytes()}[kind]
        suffix = "npy" if kind == "npy" else "bin"
        return {f"train.{suffix}": content, f"val.{suffix}": content}

    return make


def read_shards(folder: Path) -> object:
    dataset = open_folder(folder, 50257)
    counts = count_tokens(dataset.train, 50257)
    with np.errstate(invalid="ignore"):
        return unigram_entropy(counts), loader.Loader(dataset.train, 2, 8, 50257, shuffle=True).batch(1)


TARGETS = {
    "shard llm.c": Target(shard("bin"), read_shards),
    "shard npy": Target(shard("npy"), read_shards),
    "shard nanoGPT": Target(shard("raw"), read_shards),
    "safetensors": Target(hugging_face, read_weights()),
    "safetensors in parts": Target(in_parts, read_weights()),
    "pickle": Target(pytorch_bin(), read_weights()),
    "pickle with code": Target(pytorch_bin(lambda: {"x": Code()}), read_weights()),
    "nanoGPT": Target(nanogpt, read_weights()),
    "llm.c": Target(lambda: {"a.bin": foreign_files.llmc_file(foreign_files.CONFIG, foreign_files.random_tensors(), 3)},
                    read_weights("a.bin")),
    "openai": Target(openai("model.ckpt.index", "model.ckpt.data-00000-of-00001"), read_weights(), mend_table),
    "openai npz": Target(openai("model.npz"), read_weights("model.npz")),
    "checkpoint": Target(our_checkpoint, read_checkpoint, mend_manifest),
    "config.json": Target(run_record, read_a_record),
    "HellaSwag": Target(hellaswag_rows, lambda folder: hellaswag.read_examples(folder / "rows.jsonl")),
    "text": Target(text_files, read_text),
    "jsonl": Target(jsonl_files, read_text),
    "half prepared": Target(half_prepared, resume_preparing, writes=True),
    "command line": CommandLine(lambda: {"argv.json": b"[]"}, run_program),
}  # fmt: skip
