"""The corpora that are known by name, and the user's own files.

    shakespeare   TinyShakespeare, one file; split and tokens as in nanoGPT's data/shakespeare/prepare.py
    fineweb-edu   10 billion tokens of FineWeb-Edu, from the Hugging Face hub; cut as build-nanogpt's fineweb.py does
    fineweb       10 billion tokens of FineWeb, from the hub, as used by llm.c and modded-nanogpt
    openwebtext   a copy of GPT-2's training text, from the hub; nanoGPT's documents, but another validation split

A corpus from the hub is streamed: at most one of its files is on this machine at a time, and the position in the
stream is a few numbers. Each download can be replaced by files that were fetched by hand.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import islice
from pathlib import Path

from gpt2fast.data import texts
from gpt2fast.data.texts import Piece
from gpt2fast.errors import RunError, UserError
from gpt2fast.files.download import download

Reading = tuple[Iterator[Piece], Callable[[], dict | None]]  # pieces; the source's state after the last one taken


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A corpus and what is known about it. Without `url` and `hub` it is any files."""

    url: str | None = None
    sha256: str | None = None
    hub: dict | None = None
    """Arguments for datasets.load_dataset."""
    files: str = ""
    """The folder of its files in the hub's repository."""
    split: str
    """The split in words, for the manifest."""
    val_every: int = 0
    """Every val_every-th document is for validation; 0: none."""
    val_first: bool = False
    """The first shard is the validation split."""
    separated: bool = True
    """Write <|endoftext|> before each document."""
    tokens: int = 0
    """Approximate number of tokens, for the progress bar."""
    known: dict[str, int] = field(default_factory=dict)
    """Counts that others published; "shards" are of 10^8 tokens."""


CORPORA = {
    "shakespeare": Corpus(
        url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        split="the first 90% of the characters train, the others validate",
        separated=False,
        tokens=338_025,
        known={"train": 301_966, "val": 36_059},
    ),
    "fineweb-edu": Corpus(
        hub={"path": "HuggingFaceFW/fineweb-edu", "name": "sample-10BT"},
        files="sample/10BT",
        split="the first shard validates, the others train",
        val_first=True,
        tokens=9_950_000_000,
        known={"shards": 100},
    ),
    "fineweb": Corpus(
        hub={"path": "HuggingFaceFW/fineweb", "name": "sample-10BT"},
        files="sample/10BT",
        split="the first shard validates, the others train",
        val_first=True,
        tokens=10_350_000_000,
        known={"shards": 104},  # 1 + 103 in llm.c's and modded-nanogpt's copy
    ),
    "openwebtext": Corpus(
        hub={"path": "Skylion007/openwebtext"},
        files="plain_text",
        split="every 2000th document validates, the others train",
        val_every=2000,
        tokens=9_040_017_095,
        known={"documents": 8_013_769, "tokens": 9_040_017_095},  # 9,035,582,198 + 4,434,897 in nanoGPT's split
    ),
}


@dataclass(frozen=True)
class Source:
    """A corpus and the place it is read from."""

    name: str
    corpus: Corpus
    about: dict
    """The source, for the manifest."""
    identity: dict
    """Values that must be unchanged when a killed run is resumed."""
    bytes: int
    """Total size of its files in bytes; 0 if unknown."""
    read: Callable[[Path, int, dict | None], Reading]
    """read(folder, start, state): the pieces after the first `start`. Downloads are put into `folder`."""


def open_files(paths: Sequence[Path], suffixes: Sequence[str], field: str, val_fraction: float) -> Source:
    """Open the user's files and folders as a corpus. UserError if there are none."""
    every = round(1 / val_fraction) if val_fraction else 0
    split = f"every {every}th document, or the end of each of fewer texts, validates" if every else "all train"
    return _files("files", Corpus(split=split, val_every=every), paths, suffixes, field)


def open_corpus(name: str, stand_in: Path | None, suffixes: Sequence[str], field: str) -> Source:
    """Open a corpus of the table, read from `stand_in` if given. UserError if `stand_in` cannot be that corpus."""
    corpus = CORPORA[name]
    if corpus.url:
        return _single(name, corpus, stand_in, suffixes)
    if stand_in:
        return _files(name, corpus, [stand_in], suffixes, field)
    return _hub(name, corpus, field)


def _files(name: str, corpus: Corpus, paths: Sequence[Path], suffixes: Sequence[str], field: str) -> Source:
    files = texts.find_files(paths, suffixes)
    stats = [file.stat() for file in files]
    total = sum(stat.st_size for stat in stats)
    listing = "".join(f"{file}:{stat.st_size}:{stat.st_mtime_ns}\n" for file, stat in zip(files, stats))

    def read(_folder: Path, start: int, _state: dict | None) -> Reading:
        return islice(texts.read_pieces(files, field, corpus.val_every), start, None), lambda: None

    about = {"paths": [str(path) for path in paths], "files": len(files), "bytes": total}
    identity = {"files": hashlib.sha256(listing.encode()).hexdigest(), "piece": texts.PIECE}
    return Source(name, corpus, about, identity, total, read)


def _single(name: str, corpus: Corpus, stand_in: Path | None, suffixes: Sequence[str]) -> Source:
    """Open a corpus of one small file, split by characters."""

    def load(path: Path) -> tuple[str, str]:
        text = "".join(piece.text for piece in texts.read_pieces([path], "text", 0))
        return text, hashlib.sha256(text.encode()).hexdigest()

    def read(folder: Path, start: int, _state: dict | None) -> Reading:
        path = file or folder / "download.txt"
        if not file:
            assert corpus.url
            assert corpus.sha256
            by_hand = f"Fetch it by hand, then run: python -m gpt2fast.prepare {name} --from input.txt"
            download(corpus.url, path, corpus.sha256, by_hand)
        text, _ = load(path)
        if not file:
            path.unlink()
        cut = int(len(text) * 0.9)
        return iter([Piece(text[:cut], True), Piece(text[cut:], False, val=True)][start:]), lambda: None

    file, digest = None, corpus.sha256
    about: dict = {"url": corpus.url}
    if stand_in:
        files = texts.find_files([stand_in], suffixes)
        if len(files) > 1:
            raise UserError(f"{name} is one file, but {stand_in} holds {len(files)}: name one of them with --from")
        file, digest, about = files[0], load(files[0])[1], {"paths": [str(stand_in)]}
    identity = {"sha256": digest}
    return Source(name, corpus, about | identity, identity, 0, read)


def _hub(name: str, corpus: Corpus, field: str) -> Source:
    hub = corpus.hub or {}
    repository = hub["path"]
    by_hand = (
        f"fetch its files by hand: hf download {repository} --repo-type dataset --include '{corpus.files}/*.parquet' "
        f"--local-dir downloads, then run: python -m gpt2fast.prepare {name} --from downloads/{corpus.files}"
    )
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(f"{name} needs the package datasets: pip install 'gpt2fast[datasets]', or {by_hand}") from None

    def read(_folder: Path, start: int, state: dict | None) -> Reading:
        with _hub_errors(repository, by_hand):
            dataset = load_dataset(**hub, split="train", streaming=True)
            if state is not None:
                dataset.load_state_dict(state)
        return pieces(dataset, start), dataset.state_dict

    def pieces(dataset, start: int) -> Iterator[Piece]:
        with _hub_errors(repository, by_hand):
            for number, row in enumerate(dataset, start + 1):
                text = texts.check_text(row.get(field), f"{repository}, row {number}", field)
                yield Piece(text, True, corpus.val_every > 0 and number % corpus.val_every == 0)

    identity = {"hub": corpus.hub, "datasets": version("datasets")}  # the form of its state depends on the version
    return Source(name, corpus, {"hub": corpus.hub}, identity, 0, read)


@contextlib.contextmanager
def _hub_errors(repository: str, by_hand: str) -> Iterator[None]:
    """Turn whatever `datasets` and the packages below it raise into one RunError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        what = (str(error).splitlines() or [""])[0][:200]
        raise RunError(
            f"{repository} could not be read from the Hugging Face hub ({type(error).__name__}: {what}). "
            f"Try again, or {by_hand}"
        ) from None


def compare_counts(manifest: dict) -> dict[str, tuple[int, int]]:
    """Return name -> (found, known) for the counts that are known of a corpus that was prepared completely."""
    corpus = CORPORA.get(manifest["source"]["name"])
    if corpus is None or manifest["source"].get("sha256") != corpus.sha256:
        return {}
    shards = manifest["train"]["shards"] + manifest["val"]["shards"]
    found = {split: manifest[split]["tokens"] for split in ("train", "val")}
    found |= {name: manifest[name] for name in ("tokens", "documents")}
    if max(shard["tokens"] for shard in shards) == 10**8:
        found["shards"] = len(shards)
    return {name: (found[name], known) for name, known in corpus.known.items() if name in found}
