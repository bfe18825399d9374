"""Made-up corpora: prepare them, and encode them as other projects do."""

import json

from gpt2fast import prepare
from gpt2fast.data import shards, tokenizer
from gpt2fast.prepare import PrepareConfig

PLAY = "".join(f"\nSpeaker {i}:\nWhat says the number {i * 7919}?\n" for i in range(700))
DOCUMENTS = [f"Document {i} is about {i * 7919}." + " And on." * (i % 40) for i in range(4100)]


def prepare_corpus(tmp_path, name, **options) -> tuple[dict, dict[str, list[int]]]:
    """Prepare a corpus. Return the manifest, and file name -> tokens of each shard."""
    out = tmp_path / "out"
    manifest, _ = prepare.prepare(PrepareConfig(paths=(name,), out=out, **options))
    return manifest, {path.name: shards.open_shard(path, 50257).tolist() for path in sorted(out.glob("*.bin"))}


def tokens_of(text) -> list[int]:
    return tokenizer.load().encode_ordinary(text)


def encode_documents(documents) -> list[int]:
    return [token for text in documents for token in (tokenizer.EOT, *tokens_of(text))]


def write_documents(folder):
    """Write two files, which hold DOCUMENTS in the order of their names. Return the folder."""
    folder.mkdir()
    for name, part in (("000_00001", DOCUMENTS[3000:]), ("000_00000", DOCUMENTS[:3000])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    return folder
