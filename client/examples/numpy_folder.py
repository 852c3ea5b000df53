"""A folder of photos to one NumPy file: ``python numpy_folder.py PHOTOS OUT.npy [URL]``."""

import sys
from pathlib import Path

import numpy as np

from drorae_client import Client

folder, output, *url = sys.argv[1:]
photos = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in (".jpg", ".png", ".webp"))
with Client(*url, timeout=600) as client:
    shape = client.info().latent_shape
    # Written as it comes, so that a data set needs no memory of its own size.
    latents = np.lib.format.open_memmap(output, "w+", np.float16, (len(photos), *shape))
    for index, result in enumerate(client.encode_many(photos, progress=True)):
        latents[index] = result.array[0]
latents.flush()
print(f"{output}: {latents.shape}")
