"""What every command does alike: one line, exit codes, and nothing that a terminal would obey."""

import json
import os
import signal

import pytest

from sora_jax import shell

ESCAPE, CSI, OVERRIDE = "\x1b", "\x9b", "\N{RIGHT-TO-LEFT OVERRIDE}"


def command_that(error: BaseException):
    def command(arguments):
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("a\nb"), 2, "sora-jax: error: a b"),
        (FileNotFoundError(2, "No such file or directory", "gone"), 2, "sora-jax: error: gone: No such file or directory"),
        (FileExistsError("clip exists"), 2, "sora-jax: error: clip exists"),
        (
            PermissionError(13, "Permission denied", "clip"),
            1,
            "sora-jax: error: clip: Permission denied; check the permissions of the file and of its folders",
        ),
        (
            OSError(28, "No space left on device"),
            1,
            "sora-jax: error: No space left on device; make room and run the same command again",
        ),
        (MemoryError(), 1, "sora-jax: error: out of memory; use a smaller size, fewer frames or a smaller batch"),
        (KeyError("lacks seed"), 1, "sora-jax: error: lacks seed"),
        (RuntimeError("x" * 1000), 1, f"sora-jax: error: RuntimeError: {'x' * 400}; --debug shows where"),
        (ValueError("x" * 5000), 2, f"sora-jax: error: {'x' * 2000} ..."),
        (KeyboardInterrupt(), 130, "sora-jax: error: interrupted"),
        (SystemExit(143), 143, "sora-jax: error: interrupted"),
        (ValueError(f"{ESCAPE}[31m{CSI}{OVERRIDE}"), 2, "sora-jax: error: \\u001b[31m\\u009b\\u202e"),
    ],
)
def test_a_failure_is_one_line_and_its_code(error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]):
    assert shell.run(command_that(error), []) == code
    out, err = capsys.readouterr()
    assert (out, err) == ("", line + "\n")


def test_debug_shows_where_and_changes_no_code(capsys: pytest.CaptureFixture[str]):
    assert shell.run(command_that(ValueError("bad")), ["--debug"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert (lines[0], lines[-1]) == ("Traceback (most recent call last):", "sora-jax: error: bad")


def test_a_report_keeps_its_lines_where_a_command_has_reports(capsys: pytest.CaptureFixture[str]):
    assert shell.run(command_that(ValueError("2 faults\n  a\n  b")), [], reports=True) == 2
    assert capsys.readouterr().err == "sora-jax: error: 2 faults\n  a\n  b\n"


def test_warnings_are_notes(capsys: pytest.CaptureFixture[str]):
    import warnings

    def command(arguments):
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("slow\nand steady", stacklevel=1)
        return 0

    before = warnings.showwarning
    assert shell.run(command, []) == 0
    assert capsys.readouterr().err == "sora-jax: warning: slow and steady\n"
    assert warnings.showwarning is before


def test_sigterm_unwinds_and_says_so(capsys: pytest.CaptureFixture[str]):
    cleaned = []

    def command(arguments):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:
            cleaned.append(True)

    before = signal.getsignal(signal.SIGTERM)
    assert shell.run(command, []) == 143
    assert cleaned
    assert capsys.readouterr().err == "sora-jax: error: interrupted\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_is_printed_is_obeyed_by_no_terminal(capsys: pytest.CaptureFixture[str]):
    hostile = {"caption": f"{ESCAPE}]0;title\x07{CSI}2J{OVERRIDE}\udcff\r\b\x00\u2028", "plain": "Käse 漢字 👩\u200d🚀 |\\"}
    shell.result(json.dumps(hostile, ensure_ascii=False))
    shell.note(hostile["caption"])
    with pytest.raises(SystemExit):
        shell.Parser(prog="sora-jax test").read([hostile["caption"]])
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 2
    assert json.loads(out) == hostile
    assert "Käse 漢字 👩\u200d🚀" in out
    for text in (out, err):
        assert not {character for character in text if shell.printable(character) != character}
        assert not set(text) & {ESCAPE, CSI, OVERRIDE, "\r", "\b", "\x07", "\x00", "\udcff"}


def test_options_stand_anywhere_and_negative_values_are_values(capsys: pytest.CaptureFixture[str]):
    parser = shell.Parser(prog="sora-jax test")
    parser.add_argument("prompts", nargs="*")
    parser.add_argument("-o")
    parser.add_argument("--budget")
    assert vars(parser.read(["a", "-o", "x", "b"])) == {"prompts": ["a", "b"], "o": "x", "budget": None}
    assert parser.read(["--budget", "-3GB"]).budget == "-3GB"
    assert parser.read(["--budget", "-.5"]).budget == "-.5"
    assert parser.read(["-o", "x", "--", "-a", "--budget", "-1"]).prompts == ["-a", "--budget", "-1"]
    with pytest.raises(SystemExit, match="2"):
        parser.read(["--budget"])
    assert capsys.readouterr().err == ("sora-jax: error: argument --budget: expected one argument (see sora-jax test --help)\n")


def test_things_are_counted_in_english():
    assert [shell.counted(number, "fault") for number in (0, 1, 2)] == ["0 faults", "1 fault", "2 faults"]
