"""The service's log on stderr: lines of text, or one JSON object per line."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, Literal

LogFormat = Literal["text", "json"]

ACCESS_FIELDS = (
    "method",
    "route",
    "status",
    "outcome",
    "duration_ms",
    "request_id",
    "trace_id",
    "span_id",
    "bytes_in",
    "bytes_out",
)
"""Fields of a record beyond its message. They never include the client's address or headers."""

_encode = json.JSONEncoder(default=str, check_circular=False).encode
_TEXT_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class JsonFormatter(logging.Formatter):
    """One object per line: time (RFC 3339, UTC), level, logger, message, `ACCESS_FIELDS`, exception."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        document: dict[str, Any] = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields = record.__dict__
        document.update({name: fields[name] for name in ACCESS_FIELDS if name in fields})
        if record.exc_info and record.exc_info[0] is not None:
            document["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            document["stack"] = self.formatStack(record.stack_info)
        return _encode(document)  # escapes line breaks, so that a record stays one line


def configure(level: str, log_format: LogFormat) -> None:
    """Log to stderr; a program that has set up logging of its own keeps it.

    Args:
        level: least severe level that is logged, such as ``info``.
        log_format: ``text``, or ``json`` for one object per line.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else logging.Formatter(_TEXT_FORMAT))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    # Neither format shows them, and they cost time at every record.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    if log_format == "json":
        logging.captureWarnings(True)  # Python prints them as several lines of text
    logging.getLogger("uvicorn").setLevel(logging.WARNING)  # its lifecycle lines say what ours do
    for name in ("python_multipart", "opentelemetry.trace"):  # clients' mistakes
        logging.getLogger(name).setLevel(logging.ERROR)
