"""W3C trace context: which distributed trace a request belongs to.

``traceparent`` is ``version-traceid-parentid-flags`` in lower-case hexadecimal, and ``tracestate`` a list
of vendors' own ``key=value`` members (https://www.w3.org/TR/trace-context/). A request gets a span id of
its own under the trace that its client names, or under a fresh one.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

TRACEPARENT_HEADER = "traceparent"
TRACESTATE_HEADER = "tracestate"
MAX_TRACESTATE_CHARS = 512
"""The length that the specification asks everyone to pass on."""

_MAX_MEMBERS = 32
_MAX_MEMBER_CHARS = 128  # longer members are the first to go where the list is too long
_MAX_RECEIVED_CHARS = 8192
_SAMPLED = 1
_random = random.Random()  # our own: a program that seeds the module's would make ids repeat
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-[\x20-\x7e]*)?")
_MEMBER = re.compile(
    r"([a-z][a-z0-9_\-*/]{0,255}|[a-z0-9][a-z0-9_\-*/]{0,240}@[a-z][a-z0-9_\-*/]{0,13})"
    r"=([\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e])"
)


@dataclass(frozen=True, slots=True)
class TraceContext:
    """A request's place in a trace.

    Attributes:
        trace_id: 32 hexadecimal digits, shared by the whole trace.
        span_id: 16 hexadecimal digits, this request's own.
        parent_id: the span id that the client sent, empty where it sent none.
        sampled: whether whoever began the trace records it.
        tracestate: the client's ``tracestate``, empty where there is none to pass on.
    """

    trace_id: str
    span_id: str
    parent_id: str = ""
    sampled: bool = False
    tracestate: str = ""

    @classmethod
    def fresh(cls, sampled: bool = False) -> "TraceContext":
        """The beginning of a trace."""
        return cls(random_hex(32), random_hex(16), sampled=sampled)

    @classmethod
    def of(
        cls, traceparents: Sequence[str], tracestates: Sequence[str] = (), sample_fresh: bool = False
    ) -> "TraceContext":
        """Continue the trace of a request, or begin one.

        Args:
            traceparents: values of all ``traceparent`` headers; other than one valid value begins a
                trace and ignores ``tracestates``.
            tracestates: values of all ``tracestate`` headers, in order.
            sample_fresh: whether a trace that begins here is recorded; a client's own flag is kept.
        """
        parent = _parse(traceparents[0]) if len(traceparents) == 1 else None
        if parent is None:
            return cls.fresh(sample_fresh)
        trace_id, parent_id, flags = parent
        return cls(
            trace_id,
            random_hex(16),
            parent_id,
            bool(flags & _SAMPLED),
            parse_tracestate(tracestates) if tracestates else "",
        )

    @property
    def traceparent(self) -> str:
        """The header that names this request's span."""
        return f"00-{self.trace_id}-{self.span_id}-{'01' if self.sampled else '00'}"


def random_hex(num_digits: int) -> str:
    """A random id that is not all zeros, in lower-case hexadecimal; unique, but no secret."""
    return f"{_random.randrange(1, 16**num_digits):0{num_digits}x}"


def parse_tracestate(values: Sequence[str]) -> str:
    """The list to pass on, of at most 512 characters: empty where anything in it is malformed.

    A list that is too long loses whole members: first those of over 128 characters, then the last ones.
    """
    joined = ",".join(values)
    if len(joined) > _MAX_RECEIVED_CHARS:
        return ""
    members = [member for part in joined.split(",") if (member := part.strip(" \t"))]
    if len(members) > _MAX_MEMBERS:
        return ""
    matches = [_MEMBER.fullmatch(member) for member in members]
    keys = {match[1] for match in matches if match is not None}
    if len(keys) != len(members):  # malformed or repeated
        return ""
    if len(",".join(members)) > MAX_TRACESTATE_CHARS:
        members = [member for member in members if len(member) <= _MAX_MEMBER_CHARS]
    while len(",".join(members)) > MAX_TRACESTATE_CHARS:
        members.pop()
    return ",".join(members)


def _parse(traceparent: str) -> tuple[str, str, int] | None:
    """Trace id, parent id and flags, or None where the header is invalid."""
    match = _TRACEPARENT.fullmatch(traceparent)
    if match is None:
        return None
    version, trace_id, parent_id, flags, rest = match.groups()
    if version == "ff" or (version == "00" and rest is not None):  # later versions may append fields
        return None
    if not trace_id.strip("0") or not parent_id.strip("0"):
        return None
    return trace_id, parent_id, int(flags, 16)
