"""Prints the page of all settings: ``python docs/serving/settings.py > docs/serving/settings.md``."""

from service.settings import ENV_PREFIX, Settings

HEADER = """\
# Settings

This page is generated from `service/settings.py`; `make docs` writes it again.

Each setting is an environment variable, and a flag of `drorae serve`: `DRORAE_BATCH_SIZE=16` and
`--batch-size 16` are the same, and the flag wins. The service reads its environment once, when it starts. An
empty variable counts as unset. A value out of bounds ends the start with status 2 and names the variable.

| variable | default | meaning |
|---|---|---|
"""


def settings_page() -> str:
    """The page, Markdown."""
    rows = []
    for name, field in Settings.model_fields.items():
        default = field.default if field.default or field.default == 0 else "none"
        rows.append(f"| `{ENV_PREFIX}{name.upper()}` | {default} | {field.description} |\n")
    return HEADER + "".join(rows)


if __name__ == "__main__":
    print(settings_page(), end="")
