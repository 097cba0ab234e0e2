"""A terminal that a page is typed into: its commands run here and now, its server in a process of its own, until Ctrl-C."""

import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

from typer.testing import CliRunner

from alula.cli.app import app

BLOCK = re.compile(r"^```(bash|python|text)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
SERVE = "from alula.cli import main; main()"
PAGES_ADDRESS = "http://127.0.0.1:8000"


class Terminal:
    """Types the blocks of a page in the working directory.

    A Python block becomes the file that its first line names. ``MODEL=...`` sets what ``$MODEL`` stands for.

    Attributes:
        screen: all that was printed, on both streams.
        small: patterns in what is typed and what stands in their place, so that a page for real work runs in seconds.
    """

    def __init__(self, *, small: dict[str, str]) -> None:
        self.small, self.screen = small, ""
        self.variables: dict[str, str] = {}
        self.server: subprocess.Popen[str] | None = None
        self.address = PAGES_ADDRESS

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *error: object) -> None:
        if self.server is not None and self.server.poll() is None:
            self.server.kill()
            self.server.communicate()

    def type_page(self, text: str) -> None:
        """Every block in order; of a block of output, all words must have been on the screen."""
        for number, (language, block) in enumerate(BLOCK.findall(text)):
            if language == "text":
                missing = set(re.findall(r"[A-Za-z]{3,}", block)) - set(re.findall(r"[A-Za-z]{3,}", self.screen))
                assert not missing, f"block {number + 1} shows {missing}, but none of the commands said so:\n{self.screen}"
                continue
            code = block.replace(PAGES_ADDRESS, self.address)
            for pattern, replacement in self.small.items():
                code = re.sub(pattern, replacement, code, flags=re.MULTILINE)
            if language == "python":
                Path(re.match(r"# (\w+\.py)", code)[1]).write_text(code, encoding="utf-8")
                continue
            for line in code.splitlines():
                self.type_line(line)

    def type_line(self, line: str) -> None:
        """One command; it must end well."""
        for name, value in self.variables.items():
            line = line.replace(f"${name}", value)
        match shlex.split(line, comments=True):
            case []:
                pass
            case ["python3", "-m", "venv", _] | ["source", _] | ["pip", "install", *_]:
                pass  # done before the tests
            case [setting] if "=" in setting:
                name, _, value = setting.partition("=")
                self.variables[name] = value
            case ["python", file]:
                with redirect_stdout(StringIO()) as said:
                    runpy.run_path(file, run_name="__main__")
                self.screen += said.getvalue()
            case ["alula", "serve", *words]:
                self.start_server(words)
            case ["alula", *words]:
                result = CliRunner().invoke(app, words)
                assert result.exit_code == 0, f"{line}\n{result.output}"
                self.screen += result.output
            case _:
                raise AssertionError(f"Nobody knows how to type {line!r} here. Teach `Terminal` to.")

    def start_server(self, words: list[str]) -> None:
        """Starts it on a free port and waits until it says that it serves."""
        command = [sys.executable, "-c", SERVE, "serve", *words, "--port", "0"]
        self.server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
        line = next((line for line in self.server.stderr if "Serving" in line), "")
        assert line, "The server ended before it served."
        self.address = re.search(r"http://[\w.:]+", line)[0]
        self.screen += line.replace(self.address, PAGES_ADDRESS)

    def interrupt_server(self) -> None:
        """Ctrl-C where it runs; it must end well."""
        self.server.send_signal(signal.SIGINT)
        self.screen += self.server.communicate(timeout=60)[1]
        assert self.server.returncode == 0
