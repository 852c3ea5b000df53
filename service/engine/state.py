"""The stages of an engine's life, and what it says to those who come at the wrong one."""

from enum import StrEnum

from service.errors import UnavailableError

FAILED_AT_WORK = "The engine has failed and the service is about to stop; its log says why."
_DRAINING = "The service is draining and takes no new work."


class EngineState(StrEnum):
    """The stages of an engine's life."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"
    FAILED = "failed"


def unavailable(state: EngineState, broken: bool, retry_after_s: int) -> UnavailableError:
    """The error for work that an engine in this state does not take."""
    details = {
        EngineState.LOADING: "The model is still loading.",
        EngineState.FAILED: "The model could not be loaded; the service's log says why.",
    }
    detail = FAILED_AT_WORK if broken else details.get(state, _DRAINING)
    return UnavailableError(detail, {"Retry-After": str(retry_after_s)})
