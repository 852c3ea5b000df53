"""``python -m drorae_client``: the ``drorae-client`` command."""

from drorae_client.command import program

program()
