"""The HTTP service: images to latents and back. See ``service.app.create_app`` and ``service.server.run``."""
