"""Runs a command on several ranks: ``python -m tests.training.launch JSON``.

The ranks are forks of one process that has loaded everything, so that torch is imported once. JSON is an
object with ``command``, its ``options``, ``size``, and ``kill_at``: which call of the tokenizer's encoder
kills a rank with SIGKILL; 0 for never. Exits with the highest status or signal number of a rank.
"""

import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from model.tokenizer import Tokenizer
from training.evaluation.evaluate import EvaluationOptions, evaluate_command
from training.evaluation.latent_statistics import StatisticsOptions, statistics_command

COMMANDS = {
    "stats": (StatisticsOptions, statistics_command),
    "evaluate": (EvaluationOptions, evaluate_command),
}


def main() -> int:
    job = json.loads(sys.argv[1])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(job["size"]), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    children = []
    for rank in range(job["size"]):
        pid = os.fork()
        if pid == 0:
            os.environ.update(shared, RANK=str(rank), LOCAL_RANK=str(rank))
            os._exit(run(job))
        children.append(pid)
    return max(abs(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])) for pid in children)


def run(job: dict[str, Any]) -> int:
    options = dict(job["options"])
    options["data"] = [Path(path) for path in options["data"]]
    options["output"] = options.get("output") and Path(options["output"])
    if job.get("kill_at"):
        kill_at_call(job["kill_at"])
    kind, command = COMMANDS[job["command"]]
    status = command(kind(**options, device="cpu"))  # type: ignore[operator]
    sys.stdout.flush()
    return int(status)


def kill_at_call(number: int) -> None:
    encode, calls = Tokenizer.tokens, 0

    def counted(self: Tokenizer, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(self, *args)

    Tokenizer.tokens = counted  # type: ignore[method-assign]


if __name__ == "__main__":
    sys.exit(main())
