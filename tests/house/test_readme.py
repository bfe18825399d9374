"""The documents: every command in them runs, shortened; every link has a target; the files and tests they list exist.

CI runs two of the commands in an empty environment, by name.
"""

import re
import shlex
import shutil

import pytest
import torch

from gpt2fast import reference
from tests.tools import tiny
from tests.tools.checkout import CHECKOUT
from tests.tools.hellaswag import write_jsonl

pytest.importorskip("tyro", reason="needs tyro for the command lines")
README = (CHECKOUT / "README.md").read_text()
# README first: a reader runs its commands before those of the other documents
WITH_COMMANDS = [CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").glob("*.md")), CHECKOUT / "benchmarks/README.md"]
WITH_LINKS = [*WITH_COMMANDS, CHECKOUT / "CONTRIBUTING.md", CHECKOUT / "benchmarks/NOTES.md"]
LONGEST = 10_000  # bytes of the README; details are in docs/


def blocks(language: str) -> list[str]:
    fence = re.compile(rf"^```{language}\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [block for document in WITH_COMMANDS for block in fence.findall(document.read_text())]


# Each command once, although several documents may show it
COMMANDS = list(dict.fromkeys(
    ["python -m gpt2fast.train"]
    + [line for block in blocks("bash") for line in block.splitlines() if not line.startswith("python3 -m venv")]
))  # fmt: skip
OF_RANKS = [command for command in COMMANDS if "torchrun" in command or "ranks" in command]
# Other tests run these programs, which takes minutes.
HAVE_TESTS = [f"benchmarks.{name}" for name in ("ladder", "peers", "generate", "kernels", "aot")]
HAVE_TESTS += [f"tests.long.{name}" for name in ("kills", "soak", "options", "fuzz")]
INTERPRETED = f"{shlex.join(tiny.FLAGS[1:-2])} --model.n-embd 32 --model.vocab-size 50257 --data stdlib --steps 3"
# The flags that shorten a command: if a flag is given twice, the last one counts.
SHORT = {
    "gpt2fast.train": "--steps 4 --val-batches 1 --sample-tokens 3",
    "gpt2fast.train --resume": "--steps 6",
    "gpt2fast.train --help": "",
    "gpt2fast.sample": "--tokens 3",
    "gpt2fast.prepare README.md": "",
    "gpt2fast.prepare": "--from corpus.txt --shard-tokens 4000",  # no download, and more than one shard
    "gpt2fast.export": "",
    "gpt2fast.evaluate": "--max-batches 1",
    "gpt2fast.evaluate out/gpt2": "--data none --max-examples 2 --from hellaswag_val.jsonl",
    "gpt2fast.inspect": "",
    "gpt2fast.train gpt2": "--model.n-layer 1 --model.n-head 2 --model.n-embd 32 --model.block-size 64 --batch-size 1 "
    "--seq-len 64 --total-batch 64 --steps 1 --val-batches 1 --sample-tokens 3",
    "gpt2fast.train --backend triton": INTERPRETED,
    "gpt2fast.train --ops.layer-norm triton": INTERPRETED,
    "tests.long.ranks": "--sizes 2 --file rows/ranks.jsonl "
    "--flags='--data data --model.vocab-size 256 --model.n-layer 1 --total-batch 1024 --steps 2 --warmup 1'",
    "pytest benchmarks": "--collect-only -q -p no:cacheprovider",
    "benchmarks.report": "--check",  # so that a test writes no document
    **dict.fromkeys(HAVE_TESTS, "--help"),
    "benchmarks.floor": "",
    "benchmarks.gpu": "",
    "benchmarks.tune": "",
}
LAUNCHERS = {"python": [], "torchrun": ["-m", "torch.distributed.run"]}
LINK = re.compile(r"\]\(([^)#\s]*)#?([^)\s]*)\)")


def test_ci_finds_its_two_commands_by_name():
    for name, end in (("train", "python -m gpt2fast.train"), ("test", "python -m pytest -n 2 --dist loadfile")):
        command = readme_command(name)
        assert command.startswith("python3 -m venv .venv &&")
        assert command.endswith(end)
        assert f"readme_command {name}" in (CHECKOUT / ".ci" / "run").read_text()


def readme_command(name: str) -> str:
    """Return the command that .ci/run finds: the line after the fence that follows <!-- command: NAME -->."""
    return re.search(rf"<!-- command: {name} -->\n```bash\n(.*)\n```", README)[1]


def test_the_readme_is_short():
    assert len(README.encode()) <= LONGEST


@pytest.mark.parametrize("document", WITH_LINKS, ids=lambda path: str(path.relative_to(CHECKOUT)))
def test_every_link_has_a_target(document):
    """The target is a file or folder of the checkout, and a heading if the link names one."""
    dead = []
    for path, anchor in LINK.findall(document.read_text()):
        target = document.parent / path if path else document
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            dead.append(f"{path}#{anchor}" if anchor else path)
    assert dead == []


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives to the headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_links_to_every_document():
    linked = {(CHECKOUT / path).resolve() for path, _ in LINK.findall(README)}
    assert [path for path in WITH_LINKS[1:] if path not in linked] == []


def test_the_table_of_files_to_read_has_their_lengths():
    """Each length is right within 10%, and the total is the sum."""
    table = re.search(r"<!-- afternoon -->\n(.*?)<!-- /afternoon -->", README, re.DOTALL)[1]
    named = [(path, int(lines)) for path, lines in re.findall(r"^\| \[.*?\]\((.*?)\) \| (\d+) \|", table, re.MULTILINE)]
    total = int(re.search(r"^\| \*\*all\*\* \| \*\*(.*?)\*\* \|", table, re.MULTILINE)[1].replace(",", ""))
    lengths = {path: len((CHECKOUT / path).read_text().splitlines()) for path, _ in named}
    wrong = {path: (lines, lengths[path]) for path, lines in named if abs(lines - lengths[path]) > 0.1 * lengths[path]}
    assert len(named) == table.count("\n") - 3  # without header, rule and total
    assert wrong == {}
    assert total == sum(lines for _, lines in named)


def test_each_test_in_the_table_of_faults_exists():
    text = (CHECKOUT / "docs/faults.md").read_text()
    lines = re.search(r"<!-- faults -->\n(.*?)<!-- /faults -->", text, re.DOTALL)[1].splitlines()[2:]
    named = [re.fullmatch(r"\| .* \| `(test_\w+)` \|", line)[1] for line in lines]
    tests = "".join(path.read_text() for path in (CHECKOUT / "tests").rglob("test_*.py"))
    assert len(named) == len(set(named)) > 10
    assert [name for name in named if f"def {name}(" not in tests] == []


@pytest.mark.kernel
def test_python_blocks_run(device):
    calls = []

    def my_attention(qkv, n_head):
        calls.append(n_head)
        return reference.attention(qkv, n_head)

    q, k, v = torch.randn(3, 1, 2, 16, 16, device=device)
    names = {"q": q, "k": k, "v": v, "my_attention": my_attention}
    for block in blocks("python"):
        exec(block, names)
    assert names["o"].shape == q.shape
    assert names["model"](torch.zeros(1, 2, dtype=torch.long)).shape == (1, 2, 50257)
    assert len(calls) == names["model"].config.n_layer


def key_of(command: str) -> str:
    """Return the key of a command in SHORT."""
    words = shlex.split(command.partition(" -m ")[2])
    return next(key for key in (" ".join(words[:2]), " ".join([words[0], *words[2:4]]), words[0]) if key in SHORT)


def test_every_command_is_in_short_and_no_other():
    assert {key_of(command) for command in COMMANDS} == set(SHORT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder in which all commands run, with the documents, and files that replace downloads."""
    path = tmp_path_factory.mktemp("reader")
    shutil.copy(CHECKOUT / "README.md", path)
    shutil.copytree(CHECKOUT / "docs", path / "docs")
    (path / "corpus.txt").write_text("A text of one's own. " * 2000)
    write_jsonl(path / "hellaswag_val.jsonl")
    return path


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in OF_RANKS])
def test_commands_run_in_the_documents_order(command, folder, run_python):
    """A command may need the files that earlier ones have written."""
    run_short(command, folder, run_python)


@pytest.mark.long
def test_commands_with_several_ranks_run(folder, run_python):
    """In one test, since xdist distributes the long tests over workers, and each worker has its own folder."""
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
        cwd=CHECKOUT if key == "pytest benchmarks" else folder, env={"CUDA_VISIBLE_DEVICES": "", **variables},
    )  # fmt: skip
    if "pip install 'numpy<2.4'" in done.stderr:
        pytest.skip(done.stderr)
    expected = 2 if key in ("benchmarks.gpu", "benchmarks.tune") else 0  # they need a GPU
    assert done.returncode == expected, f"{done.stdout}\n{done.stderr}"


def test_the_first_command_has_drawn_a_picture(folder):
    assert (folder / "out" / "nano" / "loss.png").exists()
