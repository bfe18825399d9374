"""The default corpus: the source code of Python's standard library, which needs no download.

Tests and vendored packages are left out, and leading groups of four spaces become tabs: GPT-2's vocabulary has no token
for an indentation, so 41% of the raw source's tokens would be single spaces, and the loss would look far too good.
About 3.8 million tokens of 2.9 characters. They differ between Python versions; the fingerprint, which is printed,
tells whether two runs read the same tokens.
"""

import os
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gpt2fast.data import tokenizer
from gpt2fast.errors import UserError

NAME = "stdlib"
LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "ensurepip", "site-packages", "dist-packages", "__pycache__"}
VAL_EVERY = 20  # every 20th file is the validation split
_INDENT = re.compile(r"^(?: {4})+", re.MULTILINE)


def documents(root: Path) -> Iterator[str]:
    """Yield the corpus, a file at a time, in an order that does not depend on the file system."""
    paths = sorted(path.relative_to(root).as_posix() for path in _python_files(root))
    for path in paths:
        text = (root / path).read_text(encoding="utf-8", errors="replace")
        if text.strip():
            yield _INDENT.sub(lambda indent: "\t" * (len(indent[0]) // 4), text)


def _python_files(root: Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in LEFT_OUT]
        yield from (Path(folder) / name for name in files if name.endswith(".py"))


def encode_splits(vocab_file: Path | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return the training and the validation split, each (n,) uint16, with <|endoftext|> before every document.

    Takes about two seconds. UserError if Python was installed without its source, or there is no tokenizer file.
    """
    root = Path(sysconfig.get_path("stdlib"))
    texts = list(documents(root))
    if len(texts) < 2 * VAL_EVERY:
        raise UserError(
            f"only {len(texts)} files of Python's standard library are at {root}, since this Python comes without its "
            "source: train on your own text (python -m gpt2fast.prepare PATH --out DIR, then --data DIR)"
        )
    encoded = tokenizer.load(vocab_file).encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)
    splits: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for i, document in enumerate(encoded):
        splits[i % VAL_EVERY == VAL_EVERY - 1].append(np.array([tokenizer.EOT, *document], dtype=np.uint16))
    return np.concatenate(splits[0]), np.concatenate(splits[1])
