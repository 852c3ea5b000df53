"""``python -m service``: serve with the settings of the environment."""

import sys

from service.processes.startup import prepare


def main() -> int:
    """Read the environment and serve; returns the exit status."""
    prepare()
    if sys.argv[1:]:  # the engine's process starts its fronts so
        from service.server import run_front

        return run_front(*map(int, sys.argv[1:]))
    from pydantic import ValidationError

    from service.server import leave_if_stuck, run
    from service.settings import ENV_PREFIX, Settings

    try:
        settings = Settings()
    except ValidationError as exc:
        first = exc.errors(include_url=False)[0]
        name = str(first["loc"][0]).upper() if first["loc"] else ""
        sys.stderr.write(f"drorae: {ENV_PREFIX + name if name else 'settings'}: {first['msg']}\n")
        return 2
    status = run(settings)
    leave_if_stuck(status)
    return status


if __name__ == "__main__":
    sys.exit(main())
