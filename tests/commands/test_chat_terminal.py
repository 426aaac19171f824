"""``lora-ms chat`` in a pseudo-terminal: Ctrl-C ends an answer and not the program, and lines can be edited."""

import os
import pty
import re
import select
import signal
import subprocess
import time

import pytest

CTRL_C, UP, ENTER = b"\x03", b"\x1b[A", b"\r"


class Terminal:
    """A program in a terminal of its own."""

    def __init__(self, argv: list[str], env: dict[str, str]):
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            argv, stdin=slave, stdout=slave, stderr=slave, env=env, start_new_session=True, preexec_fn=self._own(slave)
        )
        os.close(slave)
        self.text = ""

    @staticmethod
    def _own(slave: int):
        import fcntl
        import termios

        return lambda: fcntl.ioctl(slave, termios.TIOCSCTTY, 0)  # so that Ctrl-C of this terminal is a signal for it

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def until(self, pattern: str, seconds: float = 100) -> str:
        """What it shows up to ``pattern``, which is taken off."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.text)):
            if not select.select([self.master], [], [], max(0, end - time.monotonic()))[0]:
                raise AssertionError(f"no {pattern!r} in {self.text!r}")
            try:
                self.text += os.read(self.master, 4096).decode("utf-8", "replace")
            except OSError:
                raise AssertionError(f"it ended ({self.process.wait()}) with {self.text!r}") from None
        before, self.text = self.text[: found.end()], self.text[found.end() :]
        return before


@pytest.fixture
def chat(python, python_env, root):
    """The bundled model, whose answers go on for long: no end token is likely enough under such a penalty."""
    argv = [python, "-m", "lora_ms.cli", "chat", "--load_checkpoint", str(root / "examples/tiny/model")]
    argv += ["--do_sample", "True", "--temperature", "50", "--top_k", "0", "--max_new_tokens", "400"]
    settings = {"TERM": "xterm", "COLUMNS": "80", "LORA_MS_GRAPH_CACHE": "False"}  # so that it compiles, and says so
    terminal = Terminal(argv, {**python_env, **settings})
    yield terminal
    terminal.process.kill()
    terminal.process.wait()
    os.close(terminal.master)


def test_ctrl_c_three_times_and_a_line_again(chat):
    chat.until("> ")
    for turn, line in enumerate((b"tell me a story", b"go on", b"tell me more")):
        chat.type(line + ENTER)
        chat.until(line.decode() + r"\r\n")
        if turn == 0:
            chat.until(r"compiling generation[^\n]* 1 x 1 [^\n]*\n")  # it says what it waits for
        chat.until(r"\S{3}")  # the answer is under way
        chat.type(CTRL_C)
        chat.until(r"stopped\r\n> ", 20)
        assert chat.process.poll() is None
    chat.type(UP)
    chat.until("tell me more")  # the line before
    chat.type(b"\x15/exit" + ENTER)  # Ctrl-U clears it
    assert chat.process.wait(20) == 0


def test_python_has_its_handler_again(python, python_env, root):
    """After generate(), SIGINT raises KeyboardInterrupt, and SIGTERM ends the process."""
    program = """
import os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job has it ignored
from lora_ms import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("examples/tiny/model")
for _ in range(3):
    model.generate([[5, 6, 7]], max_new_tokens=3)
    try:
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000): pass
        print("not interrupted")
    except KeyboardInterrupt:
        print("interrupted", flush=True)
os.kill(os.getpid(), signal.SIGTERM)
"""
    done = subprocess.run(
        [python, "-c", program], cwd=root, env=python_env, capture_output=True, text=True, timeout=200
    )
    assert done.stdout.splitlines()[-3:] == ["interrupted"] * 3, done.stdout + done.stderr
    assert done.returncode == -signal.SIGTERM


def test_ctrl_c_stays_ignored(python, python_env, root):
    """What a shell lets its background jobs ignore is ignored after generate(), too."""
    program = """
import os, signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
from lora_ms import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("examples/tiny/model")
model.generate([[5, 6, 7]], max_new_tokens=3)
os.kill(os.getpid(), signal.SIGINT)
print("goes on")
"""
    done = subprocess.run(
        [python, "-c", program], cwd=root, env=python_env, capture_output=True, text=True, timeout=200
    )
    assert (done.stdout.splitlines()[-1], done.returncode) == ("goes on", 0), done.stderr
