"""Scaling from two replicas to one under load: how long clients see no answer.

    python -m deploy.ray_serve.scale_down

Clients encode photos without a pause, with the retries of drorae-client. The report has the longest time
between two answers to any of them, and the longest time for one answer, before, during and after the removal.
The exit status is 1 where there was a pause above `--limit-s` from the removal on, or an image was lost.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from deploy.clients import Clients
from deploy.ray_serve.cluster import local_cluster
from drorae_client import Client, DroraeError

PHOTO = Path(__file__).parents[2] / "samples/bridge.jpg"
TIMEOUT_S = 120


class Answer(NamedTuple):
    """When a request was sent and answered, on the clock of `time.monotonic`, and why it failed, if so."""

    sent_s: float
    done_s: float
    error: str = ""


class Load(Clients):
    """Clients that encode one photo after the other, from entering to leaving.

    Args:
        url: of the service.
        in_flight: number of clients.
    """

    def __init__(self, url: str, in_flight: int) -> None:
        self.answers: list[Answer] = []
        self._url = url
        super().__init__(in_flight)

    def _run(self, number: int) -> None:
        photo = PHOTO.read_bytes()
        with Client(self._url, timeout=TIMEOUT_S) as client:
            while not self._stopped.is_set():
                sent_s = time.monotonic()
                error = ""
                try:
                    client.encode(photo)
                except DroraeError as caught:
                    error = str(caught)
                self.answers.append(Answer(sent_s, time.monotonic(), error))


class Pauses(NamedTuple):
    """Of a part of the load, seconds.

    Attributes:
        num_answers: in it.
        between: the longest time in it without any answer.
        one: the longest time for one of its answers.
    """

    num_answers: int
    between: float
    one: float

    def __str__(self) -> str:
        return (
            f"{self.num_answers} answers, longest pause {self.between:.2f} s, slowest answer {self.one:.2f} s"
        )


def pauses(answers: Sequence[Answer], begin_s: float, end_s: float) -> Pauses:
    """The pauses of a span of time, which counts as ended where nothing more comes."""
    done = sorted(answer.done_s for answer in answers if begin_s <= answer.done_s <= end_s)
    moments = [begin_s, *done, end_s]
    between = max(later - earlier for earlier, later in itertools.pairwise(moments))
    slow = [one.done_s - one.sent_s for one in answers if begin_s <= one.done_s <= end_s]
    return Pauses(len(done), between, max(slow, default=0.0))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the check."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", default="mini", help="of the replicas (default mini)")
    parser.add_argument("--in-flight", type=int, default=8, help="requests at once (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=20, help="of load before and after (default 20)")
    parser.add_argument("--limit-s", type=float, default=3, help="longest pause allowed (default 3)")
    arguments = parser.parse_args(argv)
    variables = {"DRORAE_CHECKPOINT": arguments.checkpoint, "DRORAE_HANG_TIMEOUT_S": "120"}
    with local_cluster(**variables) as cluster:
        cluster.scale(2)
        begin_s = time.monotonic()
        with Load(cluster.url, arguments.in_flight) as load:
            time.sleep(arguments.seconds)
            removed_s = time.monotonic()
            cluster.scale(1)
            gone_s = time.monotonic()
            time.sleep(arguments.seconds)
            end_s = time.monotonic()
    print(f"two replicas: {pauses(load.answers, begin_s, removed_s)}")
    during = pauses(load.answers, removed_s, gone_s)
    print(f"one goes, {gone_s - removed_s:.1f} s: {during}")
    after = pauses(load.answers, gone_s, end_s)
    print(f"one replica: {after}")
    errors = [answer.error for answer in load.answers if answer.error]
    print(f"images lost: {len(errors)}", *errors[:3], sep="\n")
    return int(bool(errors) or max(during.between, after.between) > arguments.limit_s)


if __name__ == "__main__":
    sys.exit(main())
