"""A terminal that a page is typed into: its commands run here and now, its scripts and its server in processes of their own."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from alula.cli.app import app

BLOCK = re.compile(r"^```(bash|python|text)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
SERVE = "from alula.cli import main; main()"
PAGES_ADDRESS = "http://127.0.0.1:8000"
NO_ALULA = Path(".no_alula")
"""A folder of the working directory that comes before whatever alula is installed, and refuses to be it."""


class Terminal:
    """Types the blocks of a page in the working directory.

    A Python block becomes the file that its first line names; it runs where there is no alula. ``MODEL=...`` sets what ``$MODEL``
    stands for.

    Attributes:
        said: what the last command printed, on both streams.
        small: patterns in what is typed and what stands in their place, so that a page for real work runs in seconds.
    """

    def __init__(self, *, small: dict[str, str]) -> None:
        self.small, self.said = small, ""
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
        """Every block in order; the command before a block of output must have said that, with whatever numbers."""
        for number, (language, block) in enumerate(BLOCK.findall(text)):
            if language == "text":
                assert re.search(_pattern(block), self.said, flags=re.DOTALL), f"block {number + 1} shows\n{block}\nbut came\n{self.said}"
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
                self.run_script(file)
            case ["alula", "serve", *words]:
                self.start_server(words)
            case ["alula", *words]:
                result = CliRunner().invoke(app, words)
                assert result.exit_code == 0, f"{line}\n{result.output}"
                self.said = result.output
            case _:
                raise AssertionError(f"Nobody knows how to type {line!r} here. Teach `Terminal` to.")

    def run_script(self, file: str) -> None:
        """As `python file`, where alula cannot be imported."""
        NO_ALULA.mkdir(exist_ok=True)
        NO_ALULA.joinpath("alula.py").write_text('raise ImportError("This script is to run without alula.")', encoding="utf-8")
        environment = {**os.environ, "PYTHONPATH": str(NO_ALULA.resolve())}
        done = subprocess.run([sys.executable, file], capture_output=True, text=True, env=environment)
        self.said = done.stdout + done.stderr
        assert done.returncode == 0, f"python {file}\n{self.said}"

    def start_server(self, words: list[str]) -> None:
        """Starts it on a free port and waits until it says that it serves."""
        command = [sys.executable, "-c", SERVE, "serve", *words, "--port", "0"]
        self.server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
        line = next((line for line in self.server.stderr if "Serving" in line), "")
        assert line, "The server ended before it served."
        self.address = re.search(r"http://[\w.:]+", line)[0]
        self.said = line.replace(self.address, PAGES_ADDRESS)

    def interrupt_server(self) -> None:
        """Ctrl-C where it runs; it must end well."""
        self.server.send_signal(signal.SIGINT)
        self.said = self.server.communicate(timeout=60)[1]
        assert self.server.returncode == 0


def _pattern(block: str) -> str:
    """What fits an output of this form: any numbers, anything for "...", broken into lines anywhere."""
    words = (".*?" if word == "..." else re.sub(r"\d+", r"\\d+", re.escape(word)) for word in block.split())
    return r"\s+".join(words)
