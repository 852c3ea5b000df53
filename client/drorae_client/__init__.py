"""Client of the DRoRAE image tokenizer service: photos to latents and back, without torch.

from drorae_client import Client

with Client("http://127.0.0.1:8000") as client:
    latents = client.encode("photo.jpg")
    client.decode(latents).pil()[0].save("decoded.png")
"""

from drorae_client.async_client import AsyncClient
from drorae_client.client import Client
from drorae_client.errors import (
    AnswerError,
    DeadlineError,
    DroraeError,
    InputError,
    ServiceError,
    UnreachableError,
)
from drorae_client.wire.results import Info, Latents, Pictures

__all__ = [
    "AnswerError",
    "AsyncClient",
    "Client",
    "DeadlineError",
    "DroraeError",
    "Info",
    "InputError",
    "Latents",
    "Pictures",
    "ServiceError",
    "UnreachableError",
]
