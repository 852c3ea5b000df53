"""Pages for people, static files without a build step: the demo at ``/``, the API at ``/docs``."""
