"""Text of a model: prompts, the end of a text, streaming, the command line, and what is refused."""

import io
import re
import sys

import pytest
import torch

from gpt2fast import sample
from gpt2fast.data import tokenizer
from gpt2fast.errors import UserError
from gpt2fast.model import GPT, GPTConfig
from gpt2fast.ops import OpsConfig, build
from gpt2fast.sample import SampleConfig
from gpt2fast.train import train
from gpt2fast.weights.foreign import Weights
from tests.tools import tiny

ENCODING = tokenizer.load()
COMMAND = "needs tyro for the command line"


@pytest.fixture(scope="module")
def model() -> GPT:
    model = GPT(tiny.GPT2_WORDS, build(OpsConfig()))
    with torch.no_grad():
        model.wte.weight.mul_(20)  # an untrained model is so uncertain that every seed gives another text
    return model


@pytest.fixture
def written(monkeypatch):
    """Return a function that sets what the model writes: the tokens of each text, padded with <|endoftext|>."""

    def plant(*texts: list[int]) -> None:
        width = max(map(len, texts))
        rows = torch.tensor([[*text, *[tokenizer.EOT] * (width - len(text))] for text in texts])

        class Planted:
            def __init__(self, model, prompts, n, sampling, *, seeds, precision, stop):
                self.rows = rows[[seed - 1337 for seed in seeds]]

            def stream(self, every):
                yield self.rows[:, :1]
                yield from self.rows[:, 1:].split(every, 1)

        monkeypatch.setattr(sample, "Decoder", Planted)
        model = GPT(tiny.GPT2_WORDS, build(OpsConfig()))
        weights = Weights(tiny.GPT2_WORDS, model.state_dict(), "a-run")
        monkeypatch.setattr(sample, "read_weights", lambda source: weights)

    return plant


def run(capsys, *arguments) -> tuple[str, str]:
    """Run the command. Return stdout and stderr."""
    pytest.importorskip("tyro", reason=COMMAND)
    sample.main(["a-run", "--device", "cpu", *map(str, arguments)])
    return capsys.readouterr()


# prompts
@pytest.mark.parametrize(
    ("text", "prompts"),
    [
        ("one", ["one"]),
        ("one\n", ["one"]),
        (" one\n\n two \n\n", [" one\n\n two \n"]),
        ("one\n<|endoftext|>\ntwo\nlines\n", ["one", "two\nlines"]),
        ("one<|endoftext|>\n\ntwo<|endoftext|>", ["one", "\ntwo"]),
        ("---\nöne", ["---\nöne"]),
    ],
)
def test_a_file_or_standard_input_gives_prompts(text, prompts, tmp_path, monkeypatch):
    (tmp_path / "p.txt").write_text(text, encoding="utf-8")
    assert sample.read_prompts(SampleConfig(source="", prompt_file=str(tmp_path / "p.txt"))) == prompts
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert sample.read_prompts(SampleConfig(source="", prompt_file="-")) == prompts


def test_without_a_file_there_is_one_prompt():
    assert sample.read_prompts(SampleConfig(source="")) == ["\n"]
    assert sample.read_prompts(SampleConfig(source="", prompt="")) == [""]


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (None, r"--prompt-file .*p.txt cannot be read \(No such file or directory\): name a text file"),
        (b"", r"--prompt-file .*p.txt holds no text: write a prompt into it, or use --prompt"),
        (b"<|endoftext|>\n", "holds no text"),
        (b"abc\xff", r"is not UTF-8 \(byte 3\): convert it"),
    ],
)
def test_a_file_without_a_prompt_is_refused(data, error, tmp_path):
    if data is not None:
        (tmp_path / "p.txt").write_bytes(data)
    with pytest.raises(UserError, match=error):
        sample.read_prompts(SampleConfig(source="", prompt_file=str(tmp_path / "p.txt")))


def test_a_prompt_must_fit_into_the_window(model):
    assert sample.encode_prompts(ENCODING, ["a" + " a" * 14], model) == [[tokenizer.EOT, 64, *[257] * 14]]
    with pytest.raises(UserError, match=r"prompt 2 has 17 tokens with <.endoftext.> before it, and the model reads 16"):
        sample.encode_prompts(ENCODING, ["a", "a" + " a" * 15], model)


def test_the_vocabulary_must_be_gpt2s():
    other = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=16, block_size=8, vocab_size=65), build(OpsConfig()))
    with pytest.raises(UserError, match="the model has a vocabulary of 65, and GPT-2's tokenizer has 50257"):
        sample.encode_prompts(ENCODING, ["a"], other)


# the command
def test_texts_are_printed_after_their_prompts_and_end_before_endoftext(written, capsys):
    written([11, 12], [13, tokenizer.EOT, 14], [15])
    out, err = run(capsys, "--prompt", "Hello", "--samples", "3", "--batch-size", "2")
    a, b, c = ENCODING.decode([11, 12]), ENCODING.decode([13]), ENCODING.decode([15])
    first, *texts, last = out.split("--- ")[0], *out.split(" ---\n")[1:], out.splitlines()[-1]
    assert first.startswith("a-run on cpu, ")
    assert [text.split("\n")[0] for text in texts] == [f"Hello{a}", f"Hello{b}", f"Hello{c}"]
    assert "--- 3/3 ---" in out
    assert last.startswith("read 6 tokens at ")
    assert ", wrote 4 at " in last
    assert not err


def test_each_prompt_has_its_samples_and_each_text_its_seed(written, capsys, tmp_path):
    (tmp_path / "p.txt").write_text("one<|endoftext|>two")
    written([0], [1], [2], [3])
    out, _ = run(capsys, "--prompt-file", tmp_path / "p.txt", "--samples", "2", "--tokens", "1", "--batch-size", "3")
    assert [line for line in out.splitlines()[1:-1] if "---" not in line] == ["one!", 'one"', "two#", "two$"]


def test_no_stop_continues_after_endoftext(written, capsys):
    written([13, tokenizer.EOT, 14])
    out, _ = run(capsys, "--prompt", "Hello", "--no-stop")
    assert f"\nHello{ENCODING.decode([13, tokenizer.EOT, 14])}\n" in out
    assert "<|endoftext|>" in out


def test_stream_prints_the_same_text_in_pieces(written, capsys, monkeypatch):
    """A character of several tokens is printed when it is complete, and a broken one as without --stream."""
    tokens = ENCODING.encode_ordinary("naïve 🧭 日本 end")
    broken = next(tokens[:i] for i in range(len(tokens)) if "\ufffd" in ENCODING.decode(tokens[:i]))
    written([*tokens, tokenizer.EOT], broken)
    shown = []
    real = sample.TextStream.write
    monkeypatch.setattr(sample.TextStream, "write", lambda *args, **options: real(*args, **options) or shown.append(1))
    out, err = run(capsys, "--prompt", "Hello ", "--samples", "2", "--stream")
    assert out == f"--- 1/2 ---\nHello naïve 🧭 日本 end\n--- 2/2 ---\nHello {ENCODING.decode(broken)}\n"
    assert err.startswith("a-run on cpu, ")
    assert "tokens/s, wrote" in err
    assert len(shown) > len(tokens)


def test_command_line(tmp_path, run_module):
    pytest.importorskip("tyro", reason=COMMAND)
    c = tiny.config(tmp_path, steps=3, warmup=1, run="a", model=tiny.GPT2_WORDS)
    train(c)
    arguments = [c.folder, "--tokens", "20", "--device", "cpu", "--precision", "fp32"]

    def text(*options) -> str:
        out = run_module("gpt2fast.sample", *arguments, *options, check=True).stdout
        return "\n".join(line for line in out.splitlines() if not line.startswith("read "))

    both = text("--prompt", "Hello", "--samples", "2", "--top-p", "0.9")
    about, first, second = re.split(r"\n--- \d/2 ---\n", both)
    assert "step_00000003 on cpu" in about
    assert first.startswith("Hello")
    assert first != second
    assert text("--prompt", "Hello", "--stream", "--top-p", "0.9") == f"--- 1/1 ---\n{first}"


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--tokens", "0"], "--tokens is 0: it must be at least 1"),
        (["--samples", "0"], "--samples is 0: it must be at least 1"),
        (["--temperature", "-1"], "--temperature is -1.0: it must be at least 0"),
        (["--temperature", "nan"], "--temperature is nan: it must be at least 0"),
        (["--top-k", "-1"], "--top-k is -1: it must be at least 0"),
        (["--top-p", "0"], "--top-p is 0.0: it must be above 0 and at most 1"),
        (["--top-p", "1.5"], "--top-p is 1.5: it must be above 0 and at most 1"),
        (["--batch-size", "0"], "--batch-size is 0: it must be at least 1"),
        (["--stream", "--batch-size", "2"], "--stream prints one text at a time, and --batch-size is 2: leave one out"),
        (["--prompt", "a", "--prompt-file", "b"], "--prompt and --prompt-file are both given: leave one out"),
        (["--prompt-file", "b"], r"--prompt-file b cannot be read"),
        (["--tokenizer-file", "b"], r"tokenizer file b cannot be read"),
    ],
    ids=" ".join,
)
def test_bad_flags_are_refused(flags, error, tmp_path, monkeypatch):
    pytest.importorskip("tyro", reason=COMMAND)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=error):
        sample.main([str(tmp_path), *flags])


def test_a_missing_source_is_refused(tmp_path):
    pytest.importorskip("tyro", reason=COMMAND)
    with pytest.raises(UserError):
        sample.main([str(tmp_path / "nothing")])
