"""The same latent here and by diffusers' remote VAE client: ``python beside_diffusers.py PHOTO [URL]``.

diffusers' client sends one request and raises whatever comes back. This one has a deadline and retries, and
says which model made a latent, so that latents of another checkpoint are refused.
"""

import sys

import torch
from diffusers.utils.remote_utils import remote_decode, remote_encode
from PIL import Image

from drorae_client import Client

photo, url = [*sys.argv[1:], "http://127.0.0.1:8000"][:2]
image = Image.open(photo).convert("RGB")

theirs = remote_encode(f"{url}/encode?format=raw", image)
with Client(url) as client:
    ours = client.encode(image)
    print("equal latents:", torch.allclose(ours.torch(), theirs, atol=1e-2))
    picture = client.decode(ours).pil()[0]
same = remote_decode(f"{url}/decode", theirs, do_scaling=False)
assert isinstance(same, Image.Image)
print("pictures:", picture.size, same.size)
