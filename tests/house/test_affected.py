"""The long tests that CI runs for a change."""

import subprocess

import pytest

from tests.tools import affected
from tests.tools.affected import EVERYTHING, LEANS, MUTANTS, base_of, of_one
from tests.tools.checkout import CHECKOUT
from tests.tools.mutation import planted
from tests.tools.rooms import FILES


def found(*paths: str) -> set[str]:
    return set(affected.affected(paths))


def planted_in(tests: set[str]) -> set[str]:
    """Return the modules whose mutants are in `tests`."""
    return {test.partition("[")[2].partition(":")[0] for test in tests if test.startswith(MUTANTS)}


def test_a_kernel_affects_its_mutants_and_the_tests_of_all_kernels():
    tests = found("kernels/tanh_gelu.py")
    assert planted_in(tests) == {"kernels/tanh_gelu.py"}
    assert len([test for test in tests if test.startswith(MUTANTS)]) == len(planted()["kernels/tanh_gelu.py"])
    files = {test for test in tests if not test.startswith(MUTANTS)}
    assert files == {
        "tests/kernels/test_tanh_gelu.py", "tests/kernels/test_every_kernel.py", "tests/model/test_backends.py",
        "tests/benchmarks/test_aot.py",
    }  # fmt: skip


def test_a_test_file_affects_the_mutants_that_it_must_catch():
    tests = found("tests/kernels/test_epilogue.py")
    assert planted_in(tests) == {"kernels/epilogue.py", "kernels/matmul.py"}
    assert "tests/kernels/test_epilogue.py" in tests


def test_a_file_of_mutants_affects_them():
    assert planted_in(found("tests/model/mutants_cpu.py")) == {"gpt2fast/cpu.py"}


@pytest.mark.parametrize(
    ("path", "test"),
    [
        ("gpt2fast/weights/checkpoint.py", "tests/long/test_kills.py"),
        ("gpt2fast/weights/openai.py", "tests/long/test_fuzz.py"),
        ("gpt2fast/machine/world.py", "tests/long/test_hosts.py"),
        ("tests/long/soak.py", "tests/long/test_soak.py"),
        ("tests/long/process.py", "tests/long/test_kills.py"),
        ("tests/machine/conftest.py", "tests/machine"),
        ("tests/long/test_hosts.py", "tests/long/test_hosts.py"),
        ("README.md", "tests/house/test_readme.py"),
    ],
)
def test_a_change_affects_the_tests_that_depend_on_it(path, test):
    assert test in found(path)


def test_documents_and_results_affect_nothing_else():
    assert found("README.md") == {"tests/house/test_readme.py"}
    assert found("CONTRIBUTING.md", "benchmarks/NOTES.md", "benchmarks/results/cpu/a.jsonl") == set()


@pytest.mark.parametrize(
    "path", ["tests/tools/affected.py", "tests/tools/tiny.py", "tests/conftest.py", "pyproject.toml", ".ci/run"]
)
def test_the_rule_the_tools_and_the_settings_affect_everything(path):
    assert found("README.md", path) == {EVERYTHING}


def test_a_deleted_file_affects_nothing():
    assert found("tests/kernels/test_gone.py", "gpt2fast/gone.py") == set()


def test_all_listed_files_exist():
    for test, patterns in LEANS.items():
        assert (CHECKOUT / test).is_file()
        for pattern in patterns.split():
            assert list(CHECKOUT.glob(pattern)), pattern
    for module in FILES:
        assert all((CHECKOUT / test.partition("::")[0]).is_file() for test in of_one(module))


@pytest.fixture
def git(tmp_path, monkeypatch):
    """git(*words, date=) runs git in a repository with one commit of the day before."""

    def run(*words, date="2026-01-02T12:00:00Z"):
        env = {
            "GIT_COMMITTER_DATE": date,
            "GIT_AUTHOR_DATE": date,
            "GIT_CONFIG_GLOBAL": "/dev/null",
            "PATH": "/usr/bin:/bin",
        }
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(["git", *who, *words], cwd=tmp_path, env=env, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    monkeypatch.setattr(affected, "CHECKOUT", tmp_path)
    run("init", "-q", "-b", "main")
    (tmp_path / "a").touch()
    run("add", "a")
    run("commit", "-qm", "a", date="2026-01-01T12:00:00Z")
    return run


def test_the_base_is_the_last_commit_that_origin_has(git):
    theirs = git("rev-parse", "HEAD")
    git("update-ref", "refs/remotes/origin/main", theirs)
    git("commit", "-qm", "b", "--allow-empty")
    assert base_of() == theirs


@pytest.mark.parametrize("pushed", [True, False])
def test_the_base_is_the_last_commit_of_the_day_before_if_origin_has_all_or_is_unknown(git, pushed):
    before = git("rev-parse", "HEAD")
    for name in "bc":
        git("commit", "-qm", name, "--allow-empty")
    if pushed:
        git("update-ref", "refs/remotes/origin/main", "HEAD")
    assert base_of() == before


def test_the_base_is_the_first_commit_on_the_first_day(git):
    assert base_of() == git("rev-parse", "HEAD")
    git("commit", "-qm", "b", "--allow-empty", date="2026-01-01T13:00:00Z")
    assert base_of() == git("rev-list", "--max-parents=0", "HEAD")
