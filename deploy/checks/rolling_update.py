"""A rolling update under load: real replicas behind a real HAProxy, each replaced as Kubernetes does it.

    python -m deploy.checks.rolling_update --requests 10000

A new replica starts and becomes ready; an old one is no longer named, sleeps as its preStop hook says, is
told SIGTERM and ends. Clients send requests all the while. A request that was accepted and has no answer is
lost, and the exit status is 1.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from deploy.checks.names import NameServer
from deploy.checks.replicas import (
    ROOT,
    Balancer,
    CheckError,
    Replica,
    balancer,
    find_haproxy,
    free_port,
    replica,
    wait_for,
)
from deploy.checks.traffic import Traffic, photo_requests

NEEDS_HAPROXY = "haproxy is not installed: apt-get install haproxy"


@dataclass
class Result:
    """What a rolling update did to the requests that were sent meanwhile.

    Attributes:
        num_replaced: replicas.
        answered: requests with status 200 and a whole answer.
        refused: answers 429, which promise nothing.
        lost: all else, by what came.
        seconds: from a request to its answer, of those answered.
        duration_s: of the whole.
    """

    num_replaced: int = 0
    answered: int = 0
    refused: int = 0
    lost: dict[str, int] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    duration_s: float = 0.0

    @property
    def num_lost(self) -> int:
        """Requests that were accepted and not answered as they should be."""
        return sum(self.lost.values())

    def __str__(self) -> str:
        cuts = statistics.quantiles(self.seconds, n=100) if len(self.seconds) > 1 else [0.0] * 99
        lines = [
            f"replaced {self.num_replaced} replicas in {self.duration_s:.0f} s",
            f"answered {self.answered}, refused with 429 {self.refused}, lost {self.num_lost}",
            f"p50 {cuts[49]:.2f} s, p99 {cuts[98]:.2f} s, slowest {max(self.seconds, default=0):.2f} s",
        ]
        return "\n".join([*lines, *(f"lost {count}: {what}" for what, count in self.lost.items())])


class Deployment:
    """Replicas behind a balancer, each at an address of its own.

    Args:
        stack: ends all of it.
        haproxy: the program.
        num_replicas: at first, and after each replacement.
        settings: of the replicas, as ``DRORAE_*`` variables.

    Raises:
        CheckError: a replica does not become ready.
    """

    def __init__(self, stack: ExitStack, haproxy: str, num_replicas: int, settings: dict[str, str]) -> None:
        self._stack = stack
        self._settings = settings
        self._port = free_port()
        self._hosts = (f"127.0.0.{number}" for number in itertools.count(2))
        self._names = stack.enter_context(NameServer([]))
        self.replicas = [self._start() for _ in range(num_replicas)]
        for one in self.replicas:
            one.wait_until_ready()
        self._publish()
        self.balancer: Balancer = stack.enter_context(balancer(haproxy, self._port, self._names))
        self._wait_until_up()

    def replace(self, old: Replica, pre_stop_s: float) -> None:
        """A new replica for an old one, which is never missed.

        Raises:
            CheckError: the new one does not become ready, or the old one does not end as it should.
        """
        new = self._start()
        new.wait_until_ready()
        self.replicas.append(new)
        self._publish()
        self._wait_until_up()
        self.replicas.remove(old)
        self._publish()
        time.sleep(pre_stop_s)
        old.stop()

    def _start(self) -> Replica:
        return self._stack.enter_context(replica(next(self._hosts), self._port, **self._settings))

    def _publish(self) -> None:
        self._names.addresses = [one.host for one in self.replicas]

    def _wait_until_up(self) -> None:
        """Until the balancer sends requests to every replica."""
        wanted = len(self.replicas)
        wait_for(f"{wanted} replicas behind HAProxy", lambda: self.balancer.num_up() >= wanted)


def update(
    haproxy: str,
    num_requests: int,
    in_flight: int,
    num_replicas: int,
    pre_stop_s: float,
    settings: dict[str, str],
) -> Result:
    """Replace every replica under load, and go on until enough requests were sent.

    Args:
        haproxy: the program.
        num_requests: least number of answers; a tenth of them come before the first replacement.
        in_flight: requests at once.
        num_replicas: that are replaced.
        pre_stop_s: from a replica's last mention to its SIGTERM, seconds.
        settings: of the replicas.

    Raises:
        CheckError: replicas or balancer do not do their part.
    """
    result = Result()
    with ExitStack() as stack:
        deployment = Deployment(stack, haproxy, num_replicas, settings)
        started_s = time.monotonic()
        with Traffic(deployment.balancer.port, photo_requests(ROOT / "samples"), in_flight) as traffic:
            for old in tuple(deployment.replicas):
                traffic.wait_for_more(num_requests // 10)
                deployment.replace(old, pre_stop_s)
                result.num_replaced += 1
                print(f"replaced {old.url}; {traffic.total} answers so far", flush=True)
            traffic.wait_for_more(num_requests - traffic.total)
        result.duration_s = time.monotonic() - started_s
    result.answered, result.refused = traffic.outcomes.pop("200", 0), traffic.outcomes.pop("429", 0)
    result.lost, result.seconds = dict(traffic.outcomes), traffic.seconds
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the check; the exit status is 0 when no request was lost."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=10_000, help="least number (default %(default)s)")
    parser.add_argument("--in-flight", type=int, default=16, help="requests at once (default %(default)s)")
    parser.add_argument("--replicas", type=int, default=2, help="number that is replaced (default 2)")
    parser.add_argument("--pre-stop-s", type=float, default=5, help="of the preStop hook (default 5)")
    parser.add_argument("--checkpoint", default="mini", help="of the replicas (default mini)")
    arguments = parser.parse_args(argv)
    haproxy = find_haproxy()
    if haproxy is None:
        print(f"rolling_update: {NEEDS_HAPROXY}", file=sys.stderr)
        return 2
    settings = {
        "DRORAE_CHECKPOINT": arguments.checkpoint,
        "DRORAE_CPU_WORKERS": "1",
        "DRORAE_BATCH_SIZE": "8",
        "DRORAE_LOG_LEVEL": "warning",
    }
    try:
        result = update(
            haproxy,
            arguments.requests,
            arguments.in_flight,
            arguments.replicas,
            arguments.pre_stop_s,
            settings,
        )
    except CheckError as error:
        print(f"rolling_update: {error}", file=sys.stderr)
        return 1
    print(result)
    return 1 if result.num_lost else 0


if __name__ == "__main__":
    sys.exit(main())
