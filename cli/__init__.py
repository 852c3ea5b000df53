"""The ``drorae`` command: thin subcommands over the other packages."""
