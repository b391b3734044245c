"""Commands in processes of their own, which can be stopped or killed at any change of a file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

SERVER = """
import contextlib, ctypes, json, os, sys
import accelerate, peft, sentence_transformers, torch, refrag

torch.set_num_threads(1)  # as in this file: other sums round in another order
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT

def child(job):
    seen, written = [], [None]

    def note(*what):
        seen.append(what)
        number = job["faults"].get(str(len(seen)), 0)
        if number == 9 and written[0] and os.path.isfile(written[0]):
            os.truncate(written[0], max(0, os.path.getsize(written[0]) - 7))
        if number > 0:
            os.kill(os.getpid(), number)
        elif number < 0:
            raise OSError(-number, os.strerror(-number), what[1])

    def hook(event, args):
        writes = event in CHANGES or event == "open" and isinstance(args[0], str) and args[2] & WRITING
        if writes and (args[0].startswith(job["watch"]) or not args[0].startswith("/")):
            note(event, *map(str, args[: 1 + (event == "os.rename")]))
            written[0] = args[0] if event == "open" else written[0]

    def fsync(handle, sync=os.fsync):
        path = os.readlink(f"/proc/self/fd/{handle}")
        if path.startswith(job["watch"]):
            note("fsync", path)
        sync(handle)

    os.environ.update({"REFRAG_HOME": f"{job['log']}-{os.getpid()}"} | job["env"])
    for number, path in enumerate([os.devnull, job["log"] + ".out", job["log"] + ".err"]):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
    with contextlib.suppress(OSError, AttributeError):  # permissions hold for root as well
        ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522), (ctypes.c_uint32 * 6)())
    if os.path.exists("/proc/self/fd"):
        os.fsync = fsync
    if not job["pictures"]:  # they take longer than all the rest
        sys.modules["matplotlib"] = None
    sys.addaudithook(hook)
    if job["argv"][0] == "-c":
        code = exec(job["argv"][1]) or 0
    else:
        code = refrag.main(job["argv"])
    job["watch"] = "-"
    with open(job["log"], "w") as log:
        json.dump(seen, log)
    os._exit(code)

for line in sys.stdin:
    job = json.loads(line)
    if "argv" in job:
        answer = os.fork() or child(job)
    else:
        _, status = os.waitpid(job["pid"], os.WUNTRACED)
        answer = "stopped" if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)
    print(json.dumps(answer), flush=True)
"""


class Forks:
    """Runs commands in processes of their own that need not import anything: forks of one that has done so.

    Each has caches of its own.
    A process can be told to send itself signals just before its n-th change of a file, or to fail there; SIGKILL also
    takes the last bytes of the file that was being written.
    """

    def __init__(self, folder: Path):
        self.log = folder / "log"
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        self.server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                       env=environment, text=True)

    def ask(self, **job: object) -> object:
        """Send a job and read its answer."""
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, argv: list[object], watch: Path | str = "-", faults: dict[int, int] | None = None,
              log: Path | None = None, pictures: bool = False, **env: object) -> int:
        """Start a command; returns the process id. faults: a signal, or minus an errno, by change of a file in `watch`."""
        return self.ask(argv=[str(a) for a in argv], watch=str(watch), faults=faults or {}, pictures=pictures,
                        log=str(log or self.log), env={name: str(value) for name, value in env.items()})

    def wait(self, pid: int) -> object:
        """Wait for the end: the exit code, minus the signal that killed it, or "stopped"."""
        return self.ask(pid=pid)

    def run(self, argv: list[object], *how: object, **more: object) -> object:
        """Run a command to its end: its exit code, see `wait`."""
        return self.wait(self.start(argv, *how, **more))

    @property
    def out(self) -> str:
        """What the last process has written to stdout."""
        return Path(f"{self.log}.out").read_text()

    @property
    def err(self) -> str:
        """What the last process has written to stderr."""
        return Path(f"{self.log}.err").read_text()

    def changes(self) -> list[list[str]]:
        """What the last process, which has ended by itself, did to files: [what, path, ..], in order."""
        return json.loads(self.log.read_text())

    def close(self) -> None:
        """End the server."""
        self.server.stdin.close()
        self.server.wait(timeout=30)
        self.server.stdout.close()
