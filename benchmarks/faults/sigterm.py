"""SIGTERM under load: accepted requests are answered, and the process ends with status 0."""

import asyncio
import logging
import random
import signal
import time
from collections import Counter
from collections.abc import Sequence

from benchmarks.faults.fuzz.campaign import inputs_for
from benchmarks.harness.service import LaunchError, Service, launch
from benchmarks.probes.checks import Check, Findings, Options
from benchmarks.probes.inputs import encode_request
from benchmarks.probes.wire import Answer, Connection

logger = logging.getLogger(__name__)

NUM_ROUNDS, QUICK_ROUNDS = 20, 2
NUM_CLIENTS = 16
MOMENTS_S = (0.3, 3.0)
"""When the signal comes, seconds after the clients began."""
_DRAIN_S = 30.0
_EXIT_SLACK_S = 5.0


def run_sigterm(options: Options) -> list[Check]:
    """The scenario: `NUM_ROUNDS` services at saturation, each ended at a random moment."""
    findings, outcomes = Findings("sigterm"), Counter[str]()
    rng = random.Random(options.seed)
    settings = {"drain_timeout_s": f"{_DRAIN_S:g}", "log_level": "error", **options.settings}
    statuses, times_s = [], []
    num_rounds = QUICK_ROUNDS if options.quick else NUM_ROUNDS
    for number in range(num_rounds):
        with launch(settings) as service:
            photos = [encode_request(photo) for photo in inputs_for(service, options).photos]
            found, status, seconds = asyncio.run(_round(service, photos, rng.uniform(*MOMENTS_S)))
        outcomes += found
        statuses.append(status)
        times_s.append(seconds)
        logger.info("sigterm: round %d, status %d after %.2f s, %s", number + 1, status, seconds, dict(found))
    findings.report("rounds", num_rounds)
    findings.at_least("requests answered 200", outcomes["ok"], num_rounds)
    findings.report("requests refused with 503", outcomes["refused"])
    findings.report("connections refused before a request was sent", outcomes["not connected"])
    findings.exactly("answers cut off", outcomes["cut"], 0)
    findings.exactly("requests sent that got no byte of an answer", outcomes["reset"], 0)
    findings.exactly("answers of another kind", outcomes["other"], 0)
    findings.exactly("exit statuses other than 0", sum(status != 0 for status in statuses), 0)
    findings.at_most("longest time to exit, seconds", max(times_s), _DRAIN_S + _EXIT_SLACK_S)
    findings.report("median time to exit, seconds", sorted(times_s)[num_rounds // 2])
    return findings.checks


async def _round(
    service: Service, photos: Sequence[bytes], moment_s: float
) -> tuple[Counter[str], int, float]:
    """Outcomes of all requests, exit status, and seconds from the signal to the end."""
    outcomes = Counter[str]()
    clients = [asyncio.create_task(_client(service, photos, n, outcomes)) for n in range(NUM_CLIENTS)]
    await asyncio.sleep(moment_s)
    started_s = time.monotonic()
    service.process.send_signal(signal.SIGTERM)
    try:
        status = await asyncio.to_thread(service.wait, 2 * _DRAIN_S)
    except LaunchError:
        logger.exception("the service runs on")
        status = -1
    seconds = time.monotonic() - started_s
    for client in clients:
        if status == -1:
            client.cancel()
    await asyncio.gather(*clients, return_exceptions=True)
    return outcomes, status, seconds


async def _client(service: Service, photos: Sequence[bytes], number: int, outcomes: Counter[str]) -> None:
    """One request after the other on one connection, until the service is gone."""
    while True:
        try:
            connection = await Connection.open(service.url)
        except OSError:
            outcomes["not connected"] += 1
            return
        answer = Answer()
        while True:
            number += 1
            await connection.send(photos[number % len(photos)])
            answer = await connection.receive()
            outcomes[_outcome(answer)] += 1
            if answer.ends_connection:
                break
        connection.close()
        if answer.status != 200:
            return


def _outcome(answer: Answer) -> str:
    if answer.num_bytes == 0:
        return "reset"
    if not answer.complete:
        return "cut"
    if answer.status == 200:
        return "ok"
    return "refused" if answer.status == 503 and answer.problem_fault() is None else "other"
