"""The log's two forms."""

import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from service.telemetry.logs import ACCESS_FIELDS, JsonFormatter

ROOT = Path(__file__).parents[3]
PROGRAM = """
import logging, warnings
from service.telemetry import logs
logs.configure("info", {form!r})
logger = logging.getLogger("service.x")
logger.debug("not shown")
logger.info("hello %s", "world")
logging.getLogger("uvicorn.error").info("not shown")
try:
    1 / 0
except ZeroDivisionError:
    logger.exception("two\\nlines")
warnings.warn("old")
"""


def record(**extra: Any) -> logging.LogRecord:
    made = logging.makeLogRecord({"name": "service.x", "levelno": 30, "levelname": "WARNING"})
    made.__dict__.update({"msg": "to %s", "args": ("whom",), "created": 1_700_000_000.25, **extra})
    return made


def test_a_record_is_an_object() -> None:
    assert json.loads(JsonFormatter().format(record())) == {
        "time": "2023-11-14T22:13:20.250Z",
        "level": "warning",
        "logger": "service.x",
        "message": "to whom",
    }


def test_the_fields_of_the_access_line_and_no_others() -> None:
    fields = dict.fromkeys(ACCESS_FIELDS, 1)
    document = json.loads(JsonFormatter().format(record(**fields, client="10.0.0.1", color_message="x")))
    assert set(document) == {"time", "level", "logger", "message", *ACCESS_FIELDS}


def test_what_is_no_json_is_text() -> None:
    assert json.loads(JsonFormatter().format(record(route=Path("/x"))))["route"] == "/x"


def run(form: str) -> str:
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(form=form)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert finished.stdout == ""
    return finished.stderr


def test_json_is_one_object_a_line() -> None:
    documents = [json.loads(line) for line in run("json").splitlines()]
    assert [document["level"] for document in documents] == ["info", "error", "warning"]
    hello, failure, warning = documents
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", hello["time"])
    assert hello["message"] == "hello world"
    assert failure["message"] == "two\nlines"
    assert failure["exception"].startswith("Traceback")
    assert failure["exception"].endswith("ZeroDivisionError: division by zero")
    assert "old" in warning["message"]


def test_text() -> None:
    lines = run("text").splitlines()
    assert re.fullmatch(r"[-\d]{10} [:\d]{8},\d{3} INFO service\.x: hello world", lines[0])
    assert "not shown" not in "".join(lines)


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_program_keeps_its_own_logging(form: str) -> None:
    """The handlers of pytest are in place: nothing is added to them."""
    from service.telemetry import logs

    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    try:
        logs.configure("info", form)  # type: ignore[arg-type]
        assert root.handlers == before
    finally:
        root.setLevel(level)
        logging.captureWarnings(False)
