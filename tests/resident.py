"""`llmopt` for a shell, as a process that is there with everything imported and forks for each command."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SERVER = """
import json, os, signal, socket, sys
import llmopt.pipeline.run, transformers.models.llama, transformers.models.bert
from llmopt.__main__ import main

signal.signal(signal.SIGCHLD, signal.SIG_IGN)
door = socket.socket(socket.AF_UNIX)
door.bind(sys.argv[1])
door.listen()
print("ready", flush=True)
while True:
    caller, _ = door.accept()
    if os.fork():
        caller.close()
        continue
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    said, given, *_ = socket.recv_fds(caller, 1 << 20, 3)
    for number, descriptor in enumerate(given):
        os.dup2(descriptor, number)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)
    arguments, folder, environment = json.loads(said)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    code = main(arguments)
    sys.stdout.flush()
    caller.send(bytes([code]))
    os._exit(code)
"""

CLIENT = """#!{python} -S
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as caller:
    caller.connect({door!r})
    told = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(caller, [told], [0, 1, 2])
    sys.exit((caller.recv(1) or b"\\x01")[0])
"""


def resident(folder: Path) -> Iterator[Path]:
    """Put the command `llmopt` into a folder and yield its path; it works until the next step."""
    script, door = folder / "llmopt", str(folder / "door")
    script.write_text(CLIENT.format(python=sys.executable, door=door), encoding="utf-8")
    script.chmod(0o755)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SERVER, door]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        try:
            yield script
        finally:
            server.kill()
