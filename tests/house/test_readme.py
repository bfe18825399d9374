"""Every command of the README runs, made short, and links lead somewhere. CI runs two of them from nothing, by name."""

import re
import shlex

import pytest

from tests.tools import tiny
from tests.tools.checkout import CHECKOUT
from tests.tools.hellaswag import write_jsonl

pytest.importorskip("tyro", reason="needs tyro for the command lines")
README = (CHECKOUT / "README.md").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
COMMANDS = ["python -m gpt2fast.train"] + [
    line for block in BLOCKS for line in block.splitlines() if not line.startswith("python3 -m venv")
]
OF_RANKS = [command for command in COMMANDS if "torchrun" in command or "ranks" in command]
# These programs run in tests of their own, whose minutes need not be spent twice.
HAVE_TESTS = [f"benchmarks.{name}" for name in ("ladder", "peers", "generate", "kernels", "aot", "scale")]
HAVE_TESTS += [f"tests.long.{name}" for name in ("kills", "soak", "options", "fuzz")]
# What is added to keep a command short: of a flag that is given twice, the last counts.
SHORT = {
    "gpt2fast.train": "--steps 4 --val-batches 1 --sample-tokens 3",
    "gpt2fast.train --resume": "--steps 6",
    "gpt2fast.train --help": "",
    "gpt2fast.sample": "--tokens 3",
    "gpt2fast.prepare README.md": "",
    "gpt2fast.prepare": "--from README.md --shard-tokens 4000",  # no download, and more than one shard
    "gpt2fast.export": "",
    "gpt2fast.evaluate": "--max-batches 1",
    "gpt2fast.evaluate out/gpt2": "--data none --max-examples 2 --from hellaswag_val.jsonl",
    "gpt2fast.inspect": "",
    "gpt2fast.train gpt2": "--model.n-layer 1 --model.n-head 2 --model.n-embd 32 --model.block-size 64 --batch-size 1 "
    "--seq-len 64 --total-batch 64 --steps 1 --val-batches 1 --sample-tokens 3",
    "tests.long.ranks": "--sizes 2 --file rows/ranks.jsonl "
    "--flags '--data data --model.vocab-size 256 --model.n-layer 1 --total-batch 1024 --steps 2 --warmup 1'",
    "benchmarks.report": "--check",  # and not a README written by a test
    **dict.fromkeys(HAVE_TESTS, "--help"),
    "benchmarks.floor": "",
    "benchmarks.gpu": "",
    "benchmarks.tune": "",
    "gpt2fast.train --backend triton": f"{shlex.join(tiny.FLAGS[1:])} --model.n-embd 32 "
    "--model.vocab-size 50257 --data stdlib --steps 3",
}
LAUNCHERS = {"python": [], "torchrun": ["-m", "torch.distributed.run"]}


def test_ci_finds_its_two_commands_by_name():
    """And runs what a reader sees first."""
    for name, end in (("train", "python -m gpt2fast.train"), ("test", "python -m pytest -n 2 --dist loadfile")):
        command = readme_command(name)
        assert command.startswith("python3 -m venv .venv &&")
        assert command.endswith(end)
        assert f"readme_command {name}" in (CHECKOUT / ".ci" / "run").read_text()


def readme_command(name: str) -> str:
    """As .ci/run finds it: the line after the fence that follows <!-- command: NAME -->."""
    return re.search(rf"<!-- command: {name} -->\n```bash\n(.*)\n```", README)[1]


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_every_link_leads_somewhere(document):
    text = (CHECKOUT / document).read_text()
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert links
    assert [link for link in links if not (CHECKOUT / link).exists()] == []


def test_each_fault_in_the_table_has_the_test_that_it_names():
    lines = re.search(r"<!-- faults -->\n(.*?)<!-- /faults -->", README, re.DOTALL)[1].splitlines()[2:]
    named = [re.fullmatch(r"\| .* \| `(test_\w+)` \|", line)[1] for line in lines]
    tests = "".join(path.read_text() for path in (CHECKOUT / "tests").rglob("test_*.py"))
    assert len(named) == len(set(named)) > 10
    assert [name for name in named if f"def {name}(" not in tests] == []


def key_of(command: str) -> str:
    """Its line in SHORT."""
    words = shlex.split(command.partition(" -m ")[2])
    return next(key for key in (" ".join(words[:2]), " ".join([words[0], *words[2:4]]), words[0]) if key in SHORT)


def test_every_command_is_made_short_on_purpose():
    assert {key_of(command) for command in COMMANDS} == set(SHORT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A reader's, in which all commands run."""
    path = tmp_path_factory.mktemp("reader")
    (path / "README.md").write_text("A text of one's own. " * 2000)
    write_jsonl(path / "hellaswag_val.jsonl")
    return path


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in OF_RANKS])
def test_the_commands_run_in_the_order_in_which_they_stand(command, folder, run_python):
    """Each needs what those before it left."""
    run_short(command, folder, run_python)


@pytest.mark.long
def test_those_of_many_ranks_do(folder, run_python):
    """In one test: workers share the long ones out, each with a folder of its own."""
    for command in OF_RANKS:
        run_short(command, folder, run_python)


def run_short(command, folder, run_python) -> None:
    variables = dict(word.split("=", 1) for word in shlex.split(command) if re.match(r"[A-Z_]+=", word))
    launcher, _, ours = command.partition(" -m ")
    program, *options = shlex.split(launcher)[len(variables) :]
    assert program in LAUNCHERS
    key = key_of(command)
    done = run_python(
        *LAUNCHERS[program], *options, "-m", *shlex.split(ours), *shlex.split(SHORT[key]),
        cwd=folder, env={"CUDA_VISIBLE_DEVICES": "", **variables},
    )  # fmt: skip
    if "pip install 'numpy<2.4'" in done.stderr:
        pytest.skip(done.stderr)
    expected = 2 if key in ("benchmarks.gpu", "benchmarks.tune") else 0  # they say that there is no GPU
    assert done.returncode == expected, f"{done.stdout}\n{done.stderr}"


def test_the_first_of_them_left_a_picture(folder):
    assert (folder / "out" / "nano" / "loss.png").exists()
