"""The fault scenarios: what they send, how they judge what comes back, and one of them for real."""

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.faults import __main__ as faults
from benchmarks.faults import soak
from benchmarks.faults.faulty_service import FaultyTokenizer, holds_mark
from benchmarks.faults.fuzz.bytes import MUTATIONS, mutate
from benchmarks.faults.fuzz.campaign import Tally
from benchmarks.faults.fuzz.cases import Case, good_body, make_case
from benchmarks.faults.fuzz.formats import ATTACKS
from benchmarks.faults.sigterm import _outcome
from benchmarks.harness.service import LaunchError, launch
from benchmarks.probes.checks import Findings, Options
from benchmarks.probes.inputs import MARK_RGB, Inputs, load_inputs, make_inputs, mixed_request
from benchmarks.probes.wire import Answer, request

NUM_CASES = 400
PROBLEM = {"type": "urn:x", "title": "X", "status": 422, "detail": "No.", "request_id": "1"}


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return load_inputs(Options(), (4, 8, 8), 64)


def problem(status: int = 422, **changes: Any) -> Answer:
    document = {**PROBLEM, "status": status, **changes}
    headers = {"content-type": "application/problem+json", "x-request-id": "1"}
    return Answer(status, headers, json.dumps(document).encode(), 100, complete=True)


def case(framed: bool = True, method: str = "POST") -> Case:
    return Case(0, "/encode", "png", "attack", request(method, "/encode"), framed)


def test_cases_are_reproducible_and_differ(inputs: Inputs) -> None:
    again = make_inputs(inputs.photos, inputs.latents.shape, inputs.side, 0)
    first = [make_case(inputs, 0, index) for index in range(NUM_CASES)]
    assert first == [make_case(again, 0, index) for index in range(NUM_CASES)]
    assert len({found.message for found in first}) > 0.95 * NUM_CASES
    assert make_case(inputs, 1, 0) != first[0]
    assert {found.kind for found in first} == set(ATTACKS)
    assert 0.8 < sum(found.framed for found in first) / NUM_CASES < 1


@pytest.mark.parametrize("kind", ATTACKS)
def test_attacks_and_good_bodies_are_bytes(inputs: Inputs, kind: str) -> None:
    for seed in range(50):
        assert isinstance(ATTACKS[kind](random.Random(seed), inputs), bytes)
        assert good_body(random.Random(seed), inputs, kind)


def test_mutations_bear_short_bodies() -> None:
    for seed in range(200):
        mutated, names = mutate(random.Random(seed), b"ab"[: seed % 3], [b"", b"other"])
        assert isinstance(mutated, bytes)
        assert set(names.split("+")) <= set(MUTATIONS)


def test_good_requests_are_framed_truly(inputs: Inputs) -> None:
    for seed in range(20):
        head, _, body = mixed_request(inputs, random.Random(seed)).partition(b"\r\n\r\n")
        assert f"Content-Length: {len(body)}".encode() in head


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (Answer(200, {}, b"", 50, complete=True), None),
        (problem(), None),
        (problem(detail='File "x.py"'), "bad_problems"),
        (problem(request_id="2"), "bad_problems"),
        (problem(more=1), "bad_problems"),
        (Answer(422, {"content-type": "text/html"}, b"no", 50, complete=True), "bad_problems"),
        (Answer(400, {"content-type": "text/plain; charset=utf-8"}, b"no", 50, complete=True), "unread"),
        (problem(500), "server_errors"),
        (problem(504), "busy"),
        (problem(503), "bad_problems"),
        (Answer(), "silent"),
        (Answer(200, {}, b"", 50), "silent"),
    ],
)
def test_the_tally_judges(answer: Answer, fault: str | None) -> None:
    tally = Tally()
    told = tally.add(case(), answer)
    names = ("bad_problems", "busy", "server_errors", "silent", "unread")
    assert next((name for name in names if getattr(tally, name)), None) == fault
    assert (told is None) == (fault in (None, "busy", "unread"))


def test_no_answer_is_due_where_none_can_be() -> None:
    tally = Tally()
    assert tally.add(case(framed=False), Answer()) is None
    assert tally.add(case(method="HEAD"), Answer(405, {}, b"", 50)) is None
    assert (tally.silent, tally.bad_problems) == (0, 0)


def test_outcomes_under_sigterm() -> None:
    retry = {"content-type": "application/problem+json", "x-request-id": "1", "retry-after": "1"}
    refused = Answer(503, retry, problem(503).body, 100, complete=True)
    answers = [Answer(), Answer(num_bytes=7), Answer(200, complete=True, num_bytes=9), refused, problem(500)]
    assert [_outcome(answer) for answer in answers] == ["reset", "cut", "ok", "refused", "other"]


def test_bars() -> None:
    findings = Findings("x")
    findings.report("a", 1)
    findings.exactly("b", 1, 1)
    findings.at_most("c", math.nan, 1)
    findings.at_least("d", 2, 3)
    assert [(check.bar, check.met) for check in findings.checks] == [
        ("", None),
        ("= 1", True),
        ("<= 1", False),
        (">= 3", False),
    ]


def sample(seconds: float, rss_bytes: float) -> soak.Sample:
    return soak.Sample(seconds, round(rss_bytes), 1, 1, 0, 0)


def test_growth_is_that_of_the_last_two_thirds() -> None:
    flat_in_the_end = [sample(t, 1e9 + 1e8 * min(t, 10)) for t in range(30)]
    assert abs(soak.growth(flat_in_the_end)) < 1e-9
    rising = [sample(t, 1e9 + 1e7 * t) for t in range(30)]
    assert soak.growth(rising) == pytest.approx(19 * 1e7 / (1e9 + 1e7 * 19.5))
    assert math.isnan(soak.growth(rising[:2]))


def test_the_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    soak.draw([sample(t, 1e9) for t in range(5)], tmp_path / "new" / "soak.png")
    assert (tmp_path / "new" / "soak.png").read_bytes().startswith(b"\x89PNG")


def test_faults_wait_for_the_marked_colour() -> None:
    photos = torch.rand((3, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    assert not holds_mark(photos)
    assert not holds_mark(torch.full((2, 3, 8, 8), 0.5))
    assert not holds_mark(torch.zeros((2, 4, 8, 8)))
    photos[1] = torch.tensor(MARK_RGB).view(3, 1, 1) / 255
    assert holds_mark(photos)


def test_every_operation_passes_the_fault() -> None:
    class Inner:
        name = "inner"

        def __getattr__(self, name: str) -> Any:
            return lambda batch, **options: (name, options)

    seen: list[int] = []
    faulty = FaultyTokenizer(Inner(), lambda batch: seen.append(len(batch)))  # type: ignore[arg-type]
    batch = torch.zeros((2, 3, 8, 8))
    assert faulty.encode(batch, latent="base") == ("encode", {"latent": "base"})
    assert faulty.decode(batch) == ("decode", {})
    assert faulty.reconstruct(batch) == ("reconstruct", {})
    assert faulty.name == "inner"
    assert seen == [2, 2, 2]


def test_a_service_that_does_not_start_shows_why() -> None:
    with pytest.raises(LaunchError, match=r"status 2[\s\S]*BATCH_SIZE"), launch({"batch_size": "-1"}):
        pass


@pytest.mark.slow
def test_a_small_fuzz(run: Any, tmp_path: Path) -> None:
    arguments = ("fuzz", "--count", "40", "--seed", "1", "--save", str(tmp_path / "failures"))
    rows = {row["quantity"]: row for row in run(faults.main, *arguments)}
    assert rows["requests"]["value"] == "40"
    assert {row["met"] for row in rows.values()} == {"", "yes"}
    assert {row["scenario"] for row in rows.values()} == {"fuzz"}
    assert np.isfinite(float(rows["seconds"]["value"]))
    assert not (tmp_path / "failures").exists()
