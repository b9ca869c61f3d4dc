"""Whoever uses the package from Python hears nothing; a command shows lines and bars."""

import os
import shlex
import subprocess
import sys

import pytest

LIBRARY = """
import logging
from karmma_pipeline import logs
logging.getLogger("karmma_pipeline.runs").info("epoch 1")
list(logs.progress_bar(range(3), "steps"))
"""
COMMAND = LIBRARY.replace("import logs\n", "import logs\nlogs.show(); logs.show()\n")
CONSOLE_GONE = COMMAND.replace("logs.show()\n", "logs.show(); import os; os.close(2)\n", 1)


def run(code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_a_library_is_silent() -> None:
    done = run(LIBRARY)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_command_shows_each_line_once_and_its_bars() -> None:
    done = run(COMMAND)
    assert done.returncode == 0
    assert done.stdout == ""
    assert done.stderr.count("epoch 1\n") == 1
    assert "steps: 100%" in done.stderr


def test_nothing_fails_when_the_console_is_gone() -> None:
    done = run(CONSOLE_GONE + 'print("went on")\n')
    assert (done.returncode, done.stdout) == (0, "went on\n")


@pytest.mark.parametrize("console", ["2>&-", "2>/dev/full", "2>&1 >&3 | head -c 1 >/dev/null"])
def test_nothing_fails_when_the_console_is_closed_full_or_a_pipe_that_ended(console: str) -> None:
    many = 'for n in range(3000): logging.getLogger("karmma_pipeline.runs").info("a line %d", n)\n'
    code = COMMAND + many + 'print("went on")\n'
    command = f'set -o pipefail; exec 3>&1; {shlex.quote(sys.executable)} -c "$CODE" {console}'
    done = subprocess.run(
        ["/bin/bash", "-c", command],
        env={**os.environ, "CODE": code},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "went on\n"), done.stderr


def test_lines_of_any_language_are_shown_in_any_locale() -> None:
    code = COMMAND.replace("epoch 1", "Sch\\u00fcler \\u03b4")
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **plain}, capture_output=True, check=False
    )
    assert done.returncode == 0
    assert rb"Sch\xfcler \u03b4" in done.stderr
