"""Photos through one asynchronous pipeline: ``python asyncio_pipeline.py [--url URL] PHOTO...``."""

import argparse
import asyncio
from contextlib import aclosing

from drorae_client import AsyncClient


async def main() -> None:
    """Print how far the fusion changes each reconstruction."""
    parser = argparse.ArgumentParser()
    parser.add_argument("photos", nargs="+")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    arguments = parser.parse_args()
    photos = arguments.photos
    async with AsyncClient(arguments.url) as client, aclosing(client.encode_many(photos)) as results:
        position = 0
        async for latents in results:
            photo = photos[position]
            # Two further requests at once, while the next photos are encoded.
            decoded, base = await asyncio.gather(
                client.decode(latents), client.reconstruct(photo, latent="base")
            )
            difference = abs(decoded.array.astype(int) - base.array.astype(int)).mean()
            print(f"{photo}: the fusion changes {difference:.1f} of 255")
            position += 1


asyncio.run(main())
