"""Download one file: complete, with the expected checksum, or not at all."""

import hashlib
import os
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from urllib.request import Request, urlopen

from tqdm import tqdm

from gpt2fast.errors import RunError

TIMEOUT = 30  # seconds without a byte
LARGEST = 2**28  # bytes; the files fetched here have a few million
CHUNK = 2**16


def download(url: str, path: Path, sha256: str, by_hand: str) -> None:
    """Download `url` to `path`. OSError if `path` cannot be written.

    RunError, which ends with `by_hand` (what to do instead), if the download fails or has another sha256.
    """
    temporary, digest = path.with_name(f".{path.name}.tmp"), hashlib.sha256()
    try:
        with temporary.open("wb") as file:
            for chunk in _chunks(url, by_hand):
                file.write(chunk)
                digest.update(chunk)
        if digest.hexdigest() != sha256:
            raise RunError(f"{url} is not the expected file: sha256 {digest.hexdigest()}, not {sha256}. {by_hand}")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _chunks(url: str, by_hand: str) -> Iterator[bytes]:
    got = 0
    try:
        with urlopen(Request(url, headers={"User-Agent": "gpt2fast"}), timeout=TIMEOUT) as response:
            size = response.headers.get("Content-Length", "0")
            size = int(size) if size.isascii() and size.isdigit() else 0
            with tqdm(total=size or None, unit="B", unit_scale=True, desc="downloading", mininterval=0.5) as bar:
                while chunk := response.read(CHUNK):
                    yield chunk
                    got += len(chunk)
                    if got > LARGEST:
                        raise HTTPException(f"more than {LARGEST:,} bytes")
                    bar.update(len(chunk))
        if got < size:  # read() returns what it has when the server closes the connection
            raise HTTPException(f"{got:,} of {size:,} bytes received")
    except (OSError, HTTPException) as error:  # HTTPError, URLError and TimeoutError are OSErrors
        reason = getattr(error, "reason", None) or error
        raise RunError(f"{url} could not be downloaded ({reason}). {by_hand}") from None
