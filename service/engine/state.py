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


class Stages:
    """The stage that an engine is at, and what it says there.

    Attributes:
        broken: whether a device hung or died, rather than a checkpoint or a setting being wrong.
    """

    def __init__(self, retry_after_s: int) -> None:
        self.broken = False
        self._state = EngineState.LOADING
        self._retry_after_s = retry_after_s

    @property
    def state(self) -> EngineState:
        """The stage of its life."""
        return self._state

    @property
    def closing(self) -> bool:
        """Whether it will never take work again."""
        return self.broken or self._state in (EngineState.DRAINING, EngineState.STOPPED)

    def check_ready(self) -> None:
        """Refuse work that cannot be taken now.

        Raises:
            UnavailableError: not ready.
        """
        if self._state is not EngineState.READY:
            raise self.unavailable()

    def unavailable(self) -> UnavailableError:
        """The error for work that is not taken now."""
        details = {
            EngineState.LOADING: "The model is still loading.",
            EngineState.FAILED: "The model could not be loaded; the service's log says why.",
        }
        detail = FAILED_AT_WORK if self.broken else details.get(self._state, _DRAINING)
        return UnavailableError(detail, {"Retry-After": str(self._retry_after_s)})
