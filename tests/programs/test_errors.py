"""An error is shown as one line, and gives the exit code."""

import pytest

from gpt2fast import command
from gpt2fast.errors import RunError, UserError
from tests.tools import tiny

pytest.importorskip("tyro", reason="needs tyro for the command line")


def test_an_error_is_one_line_and_exit_code_2(folder, run_module):
    done = run_module("gpt2fast.train", *tiny.FLAGS, "--seq-len", "32", cwd=folder)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: --seq-len 32 is longer")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("error", "code"), [(UserError("a\n b"), 2), (RunError("a\n b"), 1)], ids=["user", "run"])
def test_the_exit_code_is_that_of_the_error(capsys, error, code):
    def fail(argv):
        raise error

    with pytest.raises(SystemExit) as exit:
        command.run_main(fail)
    assert exit.value.code == code
    assert capsys.readouterr().err == "error: a b\n"
