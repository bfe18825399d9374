"""CONTRIBUTING.md names what there is: links, files, programs and their flags. The programs have tests of their own."""

import re
import shlex

from conftest import CHECKOUT

TEXT = (CHECKOUT / "CONTRIBUTING.md").read_text()
COMMANDS = [
    command.strip()
    for block in re.findall(r"^ *```bash\n(.*?)^ *```$", TEXT, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
    for command in re.split(r"&&", line)
]
PROGRAMS = {"python3", "source", ".venv/bin/pip", "pip", "ruff", "mypy", "mv", ".ci/run", "python"}


def test_it_is_one_page_and_its_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert len(links) > 10
    assert [link for link in links if not (CHECKOUT / link).exists()] == []
    assert len(TEXT.partition("<!-- dependencies -->")[0].splitlines()) <= 120  # behind it the table of a program


def test_commands_name_programs_files_and_flags_that_exist():
    assert len(COMMANDS) > 15
    for command in COMMANDS:
        program, *words = shlex.split(command)
        assert program in PROGRAMS, command
        if program != "python":
            continue
        module = words[1].replace(".", "/") + ".py" if words[0] == "-m" else words[0]
        if words[1:2] == ["pytest"]:
            missing = [word for word in words[2:] if not (CHECKOUT / word).is_file()]
            assert missing == [], command
            continue
        source = (CHECKOUT / module).read_text()
        flags = [word for word in words if word.startswith("--")]
        assert [flag for flag in flags if f'"{flag}"' not in source] == [], command


def test_the_readme_leads_to_it():
    assert "](CONTRIBUTING.md)" in (CHECKOUT / "README.md").read_text()
