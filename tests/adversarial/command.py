"""Runs a command of this project in the present process, and judges how it ended."""

import contextlib
import dataclasses
import io
import traceback
from collections.abc import Sequence

from tests.adversarial.verdicts import Verdict


@dataclasses.dataclass(frozen=True)
class Run:
    """How a command ended; ``verdict`` is set where no more need be asked."""

    code: int
    out: str
    err: str
    verdict: Verdict | None = None
    detail: str = ""

    def is_clean_refusal(self, *named: str) -> bool:
        """Returns whether it was one line of printable text (or one report of faults) that names one of the texts."""
        lines = self.err.strip().splitlines()
        report = len(lines) == 1 or (": " in lines[0] and all(line.startswith("  ") for line in lines[1:])) if lines else False
        printable = all(line.isprintable() for line in lines)
        return self.code in (1, 2) and report and printable and (not named or any(name in lines[0] for name in named))


def run_command(arguments: Sequence[str]) -> Run:
    """Returns how ``sora-jax ARGUMENTS`` ended."""
    from sora_jax.commands.main import main

    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(list(arguments))
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException as error:
        return Run(70, out.getvalue(), err.getvalue(), Verdict.TRACEBACK, _last_frames(error))
    if "Traceback" in err.getvalue():
        return Run(code, out.getvalue(), err.getvalue(), Verdict.TRACEBACK, err.getvalue()[-300:])
    if "out of memory" in err.getvalue():
        return Run(code, out.getvalue(), err.getvalue(), Verdict.LARGE, err.getvalue()[-200:])
    if "--debug shows where" in err.getvalue():
        return Run(code, out.getvalue(), err.getvalue(), Verdict.TRACEBACK, f"a foreign error: {err.getvalue()[-200:]}")
    return Run(code, out.getvalue(), err.getvalue())


def _last_frames(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    where = " < ".join(f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno} {frame.name}" for frame in reversed(frames))
    return f"{type(error).__name__}: {error!s:.150} at {where}"
