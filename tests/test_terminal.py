"""Chat in the terminal: driven through pipes, as `python -m minglm chat FOLDER` runs it, and on a pseudo-terminal."""

import functools
import io
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from by_heart import CONCLUSION, SCRIPT, THOUGHT, learnt

from minglm.engine.engine import Engine
from minglm.engine.sampling import SamplingParams
from minglm.terminal import Terminal, visible

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    model, tokenizer = learnt()
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def talk(*lines: str, max_tokens: int = 60, max_context: int = 400) -> tuple[str, list[dict]]:
    """What is shown, and the conversation at the end."""
    model, tokenizer = learnt()
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    target = io.StringIO()
    engine = Engine(model, tokenizer, max_running=1)
    terminal = Terminal(engine, tokenizer, params, max_context, io.StringIO("".join(f"{line}\n" for line in lines)), target)
    terminal.run()
    assert not engine.has_work
    engine.check_invariants()
    return target.getvalue(), terminal.messages


def test_an_answer_and_its_speed_are_shown():
    shown, messages = talk("hello")
    assert "Hello! How are you?\n[" in shown and " tokens/s]" in shown
    assert messages == [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "Hello! How are you?"}]


@pytest.mark.parametrize("command, thinks", [("/think", True), ("/nothink", False), ("/auto", True)])
def test_modes_decide_whether_it_thinks(command, thinks):
    shown, messages = talk(command, "2+2?")
    assert (f"[thinking]\n{THOUGHT}\n[end of thinking]\n{CONCLUSION}\n" in shown) == thinks
    assert messages[-1].get("reasoning_content") == (THOUGHT if thinks else None) and messages[-1]["content"] == CONCLUSION


def test_reset_forgets_and_help_names_every_command():
    shown, messages = talk("hello", "/reset", "/help", "script")
    assert messages[0]["content"] == "script" and messages[1]["content"] == SCRIPT and len(messages) == 2
    assert all(command in shown for command in ("/think", "/nothink", "/auto", "/reset", "/save", "/help", "Ctrl-C"))


def test_an_unknown_command_is_no_message_and_quit_leaves():
    shown, messages = talk("/thinkk", "/quit", "hello")
    assert "/thinkk is no command" in shown and messages == []


def test_save_writes_the_conversation_and_never_over_a_file(tmp_path):
    path = tmp_path / "chat.json"
    shown, messages = talk("hello", f"/save {path}", f"/save {path}", f"/save {tmp_path / 'no' / 'folder'}")
    assert json.loads(path.read_text(encoding="utf-8")) == {"messages": messages}
    assert f"(saved: {path})" in shown and shown.count("not saved") == 2


def test_a_conversation_too_long_is_refused_and_can_be_begun_anew():
    shown, messages = talk("word " * 500, "hello", max_context=300)
    assert "/reset begins anew" in shown and [message["content"] for message in messages] == ["hello", "Hello! How are you?"]


def test_an_answer_that_is_cut_off_says_so():
    shown, messages = talk("sing", max_tokens=10)
    assert "[10 tokens, " in shown and "cut off at the limit]" in shown and messages[-1]["content"].startswith("la la")


def test_control_characters_are_shown_and_not_obeyed():
    assert visible("a\x1b[2Jb\tc\nd\x07\x9b\x7f é") == "a␛[2Jb\tc\nd␇\ufffd\ufffd é"


def start(folder: Path, **pipes) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "minglm",
        "chat",
        str(folder),
        "--device",
        "cpu",
        "--temperature",
        "0",
        "--max-tokens",
        "900",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "dumb"}
    # A shell's background jobs ignore Ctrl-C, and their children inherit that; the child is to be as it is in a terminal.
    heeds_interrupts = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, cwd=ROOT, env=environment, preexec_fn=heeds_interrupts, **pipes)


class Reader:
    """What a process writes, as it comes."""

    def __init__(self, descriptor: int):
        self.descriptor, self.text = descriptor, ""

    def until(self, wanted: str, seconds: float = 60) -> str:
        """Everything up to `wanted`, which is taken away."""
        end = time.monotonic() + seconds
        while wanted not in self.text:
            assert time.monotonic() < end, f"never wrote {wanted!r}; wrote {self.text[-500:]!r}"
            if select.select([self.descriptor], [], [], 0.2)[0]:
                piece = os.read(self.descriptor, 65536)
                assert piece, f"ended before {wanted!r}; wrote {self.text[-500:]!r}"
                self.text += piece.decode("utf-8", "replace")
        before, _, self.text = self.text.partition(wanted)
        return before


def test_interrupt_stops_the_answer_and_not_the_program(folder):
    process = start(folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    reader = Reader(process.stdout.fileno())
    process.stdin.write(b"sing\n")
    process.stdin.flush()
    reader.until("la la la")
    process.send_signal(signal.SIGINT)
    assert "cut off" not in reader.until(", stopped]")
    out, _ = process.communicate(b"/reset\nhello\n", timeout=60)
    assert "How are you?" in reader.text + out.decode() and process.returncode == 0


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no pseudo-terminals on this system")
def test_on_a_terminal_thinking_is_dim_and_end_of_input_leaves(folder):
    ours, theirs = os.openpty()
    process = start(folder, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    reader = Reader(ours)
    reader.until("> ")
    os.write(ours, b"2+2?\n")
    reader.until("\x1b[2m")
    assert THOUGHT in reader.until("\x1b[0m")
    assert CONCLUSION in reader.until("tokens/s]")
    reader.until("> ")
    time.sleep(0.5)  # readline has written its prompt, and then begins to wait
    process.send_signal(signal.SIGINT)
    reader.until("(Ctrl-D leaves)")
    reader.until("> ")
    os.write(ours, b"\x04")
    assert process.wait(20) == 0
    os.close(ours)


def test_a_folder_without_a_model_is_refused_with_what_to_do(tmp_path):
    command = [sys.executable, "-m", "minglm", "chat", *([str(tmp_path)])]
    for arguments in (command, command[:-1]):
        done = subprocess.run(
            arguments, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
        )
        assert done.returncode == 2 and "no checkpoint" in done.stderr
