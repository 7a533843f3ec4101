"""A Python that has its slow imports behind it, for programs that no test stops.

`warm_python()` is the path of a program that does what `python` does, a hundred times sooner: it
has a server run what it is given, in a process forked from one that has imported Snakemake and all
that the stages' scripts import. Fairway's modules are kept only where the checkout that they would
come from holds the very same files; else they are imported anew.
"""

import atexit
import gc
import json
import os
import runpy
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CLIENT = """
import json, os, socket, sys

request = {"arguments": sys.argv[2:], "folder": os.getcwd(), "environment": dict(os.environ)}
with socket.socket(socket.AF_UNIX) as channel:
    channel.connect(sys.argv[1])
    socket.send_fds(channel, [b" "], [0, 1, 2])
    channel.sendall(json.dumps(request).encode() + b"\\n")
    status = int(channel.recv(16) or 1)
    if status < 0:
        os.kill(os.getpid(), -status)
    sys.exit(status)
"""


@cache
def warm_python() -> str:
    """The program; its server ends with this process, and is started once."""
    folder = tempfile.TemporaryDirectory(prefix="warm")
    atexit.register(folder.cleanup)
    program, address = Path(folder.name, "python"), Path(folder.name, "socket")
    client = [sys.executable, "-ISc", CLIENT, str(address)]
    program.write_text(f'#!/bin/sh\nexec {shlex.join(client)} "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(address))
    listener.listen()
    server = subprocess.Popen(
        [sys.executable, "-P", __file__, str(listener.fileno()), str(program)],
        stdin=subprocess.PIPE, pass_fds=[listener.fileno()],
        env={**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    atexit.register(server.communicate)  # closes its input, and waits
    return str(program)


# --- the server ---------------------------------------------------------------------------------


def sources(folder: str) -> dict[str, bytes]:
    """Fairway's files in a folder of packages; none where it is not there."""
    package = Path(folder, "fairway")
    return {str(path.relative_to(package)): path.read_bytes() for path in package.rglob("*.py")}


def preload() -> None:
    """Import what Snakemake and the scripts import, and read the files that are hashed."""
    from snakemake.cli import get_argument_parser

    get_argument_parser()  # imports plugins
    import_module("smart_open")  # else only when Snakemake looks for a file
    for script in (ROOT / "workflow/scripts").glob("*.py"):
        runpy.run_path(str(script), run_name="imported")

    from fairway.code_hash import code_hash
    from fairway.recipe import complete, plugin_files
    from fairway.stages import STAGES

    config = complete({"recipe": "quickstart", "seeds": [0]}, home=ROOT)
    for name, stage in STAGES.items():
        files = plugin_files(name, config.stage_settings(name))
        code_hash(ROOT / "workflow/scripts" / stage.script, *files)


def serve(listener: socket.socket) -> dict[str, Any]:
    """Answer until this process's input is closed; returns, in a process for it, each request."""
    while True:
        if sys.stdin in select.select([listener, sys.stdin], [], [])[0]:
            sys.exit()
        channel, _ = listener.accept()
        if os.fork() == 0:
            break
        channel.close()
        while os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            os.wait()
    _, files, _, _ = socket.recv_fds(channel, 1, 3)
    request = channel.makefile().readline()
    if child := os.fork():
        if channel in select.select([channel, os.pidfd_open(child)], [], [])[0]:
            os.kill(child, signal.SIGKILL)  # for who asked is gone
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with suppress(BrokenPipeError):
            channel.sendall(str(status).encode())
        os._exit(0)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    channel.close()
    listener.close()
    return json.loads(request)


def become(request: dict[str, Any], path: list[str], own: dict[str, bytes]) -> None:
    """What `python` does with its arguments. path: sys.path of a Python that is given none."""
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    arguments = [one for one in request["arguments"] if one != "-u"]  # torchrun's
    option = arguments.pop(0) if arguments[0] in ("-m", "-c") else None
    name, sys.argv = arguments[0], [option or arguments[0], *arguments[1:]]
    given = list(filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))
    checkouts = [found for one in ("src", *given) if (found := sources(one))]
    if not checkouts or any(found != own for found in checkouts):
        for module in [one for one in sys.modules if one.split(".")[0] == "fairway"]:
            del sys.modules[module]
    first = os.getcwd() if option else str(Path(name).resolve().parent)
    sys.path[:] = [first, *given, *path]
    if option == "-c":
        exec(compile(name, "<string>", "exec"), {"__name__": "__main__"})
    elif option == "-m":
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(name, run_name="__main__")


def ended(call: Callable, *arguments) -> int:
    """The exit status with which Python ends after a call."""
    try:
        call(*arguments)
    except SystemExit as stopped:
        if isinstance(stopped.code, str):
            print(stopped.code, file=sys.stderr)
        return stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    listener, sys.executable = socket.socket(fileno=int(sys.argv[1])), sys.argv[2]
    path = list(sys.path)
    sys.path.insert(0, str(ROOT / "src"))
    preload()
    os.fsync = lambda descriptor: None  # no test cuts the power
    own = sources(str(ROOT / "src"))
    gc.freeze()  # or its collections would copy all that is shared with the processes forked
    status = ended(become, serve(listener), path, own)
    # Not as Python ends, which would copy it in order to free it.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
