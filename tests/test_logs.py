"""Whoever uses the package from Python hears nothing; a command shows lines and bars."""

import subprocess
import sys

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


def test_a_log_line_does_not_fail_when_the_console_is_gone() -> None:
    code = CONSOLE_GONE.replace('list(logs.progress_bar(range(3), "steps"))', 'print("went on")')
    done = run(code)
    assert (done.returncode, done.stdout) == (0, "went on\n")
