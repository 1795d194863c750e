"""``sora-jax page``: a local page on which a model is tried: clips from texts, images and clips, and ways of sampling compared.

Invariant: everything that can be refused is refused before Gradio is imported; the page makes what `generate` makes.  Its parts
are `sora_jax.commands.web`.
"""

import dataclasses
import importlib.util
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

from sora_jax import files, shell
from sora_jax.commands import options
from sora_jax.commands.user_cache import preview_folder, use_compile_cache
from sora_jax.pipeline import command_line
from sora_jax.pipeline.model_file import ModelFile
from sora_jax.pipeline.option import Option, declared
from sora_jax.pipeline.recipe import MAKE_ONE, Recipe
from sora_jax.streaming.budget import parse_budget

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_REMOVALS, _REMOVAL_S = 20, 0.02  # attempts to remove a folder into which a step may still write, and the wait between


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(options.MemoryBudget, options.Attention, options.CompileCache):
    """What the command line asks for."""

    model: Annotated[
        str | None,
        Option("Model directory, or pocket: the embedded model, which is the default.", metavar="MODEL_DIR", positional=True),
    ] = None
    port: Annotated[int, Option("Port of the page.", metavar="N", within=(1, 65535))] = 7860
    host: Annotated[str, Option("Address to listen on; one beyond this machine demands --auth.", metavar="ADDRESS")] = (
        _LOOPBACK[0]
    )
    auth: Annotated[
        str | None,
        Option("Name and password that the page demands; the password is read from a file.", metavar="NAME:FILE"),
    ] = None
    folder: Annotated[
        Path | None, Option("Folder that keeps the clips (default: a temporary one, removed at the end).", metavar="DIR")
    ] = None

    recipes: Annotated[
        Path | None, Option("Folder of recipes that may be chosen, as sora-jax tune writes them.", metavar="DIR")
    ] = None

    def check(self) -> None:
        """Refuses a page that anybody could reach, and a budget that is none.

        Raises:
          ValueError: says what is expected.
        """
        if self.host not in _LOOPBACK and self.auth is None:
            raise ValueError(
                f"--host {self.host} can be reached from other machines; add --auth NAME:FILE, or leave --host out."
            )
        if self.memory_budget is not None:
            parse_budget(self.memory_budget)

    @property
    def credentials(self) -> tuple[str, str] | None:
        """Name and password, None where the page demands none.

        Raises:
          ValueError: --auth names no file, or an empty one.
        """
        if self.auth is None:
            return None
        name, _, path = self.auth.partition(":")
        if not name or not path:
            raise ValueError(f"--auth is {self.auth!r}; expected NAME:FILE, the password in the file's first line.")
        files.refuse_missing(path, "password file")
        lines = Path(path).read_text("utf-8", "replace").splitlines()
        if not lines or not lines[0].strip():
            raise ValueError(f"{path} is empty; expected the password in its first line.")
        return name, lines[0].strip()

    def known_recipes(self) -> dict[str, Path]:
        """Returns the recipes of the folder by the names of their files.

        Raises:
          FileNotFoundError: the folder has none.
          ValueError: a file is something else.
        """
        if self.recipes is None:
            return {}
        found = {path.name: path for path in sorted(self.recipes.glob("recipe*.json"))}
        if not found:
            raise FileNotFoundError(f"no recipe in {self.recipes}; {MAKE_ONE} {self.recipes}")
        for path in found.values():
            Recipe.read(path)
        return found


def command(arguments: Sequence[str]) -> None:
    """Reads the command line and serves the page until it is interrupted."""
    parser = command_line.make_parser(
        "sora-jax page", "Serves a local page on which a model is tried.", {"": declared(Arguments)}
    )
    run(command_line.read(parser, arguments, Arguments))


def run(asked: Arguments) -> None:
    """Serves the page; Ctrl-C ends it at once.

    Raises:
      ValueError: an option is wrong, or the extra is not installed.
      OSError: the port is taken, or the folder cannot be written.
    """
    asked.check()
    credentials = asked.credentials
    recipes = asked.known_recipes()
    model = ModelFile.read(asked.model)
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("the page needs Gradio: pip install 'sora_jax[page]'.")
    _refuse_taken(asked.host, asked.port)
    if asked.folder is not None:
        asked.folder.mkdir(parents=True, exist_ok=True)
        files.refuse_unwritable(asked.folder)
    folder = asked.folder if asked.folder is not None else Path(tempfile.mkdtemp(prefix="sora_jax-page-"))
    use_compile_cache(asked.compile_cache)
    from sora_jax.commands.web.gallery import SERVED  # brings JAX along

    closing: list[Callable[[], None]] = []

    def clean_up() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not leave the folder behind
        files.remove_partial(folder)
        gone = folder if asked.folder is None else folder / SERVED
        for close in closing:
            close()
        for _ in range(_REMOVALS):
            shutil.rmtree(gone, ignore_errors=True)
            time.sleep(_REMOVAL_S)
            if not gone.exists():
                break

    shell.interruptibly(lambda: _serve(asked, model, folder.resolve(), credentials, recipes, closing), clean_up)


def _serve(
    asked: Arguments,
    model: ModelFile,
    folder: Path,
    credentials: tuple[str, str] | None,
    recipes: Mapping[str, Path],
    closing: list[Callable[[], None]],
) -> None:
    """Serves until the process ends; puts into ``closing`` what an interrupt calls to end what is computed."""
    from sora_jax.commands.web import server
    from sora_jax.commands.web.studio import Studio
    from sora_jax.pipeline.pipeline import Pipeline

    server.prepare(folder)
    pipeline = Pipeline.open(model, memory_budget=asked.memory_budget, attention=asked.attention or "auto")
    studio = Studio(pipeline, folder, previews=preview_folder(), recipes=recipes)
    closing.append(studio.close)
    _, address = server.serve(studio, host=asked.host, port=asked.port, auth=credentials)
    shell.result(address)
    threading.Event().wait()


def _refuse_taken(host: str, port: int) -> None:
    """Refuses a port on which another program listens, or an address that this machine does not have."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(f"{host}:{port} cannot be listened on ({error.strerror}); choose another --port.") from error
