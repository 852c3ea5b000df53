"""The routes of the pages. Their files lie in this folder and are sent under a strict policy."""

import mimetypes
import os
from pathlib import Path

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from service.codecs.media_types import choose

DOCS_PATH = "/docs"
PAGE_PATH = "/"
_FOLDER = Path(__file__).parent
_SITE, _DOCS = _FOLDER / "site", _FOLDER / "docs"
_HTML, _TEXT = "text/html", "text/plain"
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src {images}; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SITE_POLICY = _POLICY.format(images="'self' blob:")
DOCS_POLICY = _POLICY.format(images="'self' data:")
"""Swagger UI's style sheet holds its icons as data."""
_LINES = """\
DRoRAE, an image tokenizer: images to latents, and back. Save a photo as photo.jpg, then:

  curl -s --data-binary @photo.jpg -o latents.safetensors {url}/encode
  curl -s --data-binary @latents.safetensors -o decoded.png {url}/decode
  curl -s --data-binary @photo.jpg -H 'Accept: image/png' -o reconstructed.png {url}/reconstruct
  curl -s --data-binary @photo.jpg '{url}/reconstruct?format=json&router=mean'
  curl -s {url}/info

Where the service has keys, add: -H "Authorization: Bearer $DRORAE_API_KEY"
{url}/docs describes every route and option. A browser shows a page at {url}/.
"""


class PageFiles(StaticFiles):
    """The files of a folder, under a policy. Those that lie there compressed are sent so.

    Args:
        folder: where they are.
        policy: value of Content-Security-Policy.
    """

    def __init__(self, folder: Path, policy: str) -> None:
        super().__init__(directory=folder)
        self._headers = {
            "Content-Security-Policy": policy,
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",  # asked for again, and not sent again
        }

    def file_response(
        self,
        full_path: str | os.PathLike[str],
        stat_result: os.stat_result,
        scope: Scope,
        status_code: int = 200,
    ) -> Response:
        response = super().file_response(full_path, stat_result, scope, status_code)
        response.headers.update(self._headers)
        _, encoding = mimetypes.guess_type(full_path)
        if encoding is not None:
            response.headers["Content-Encoding"] = encoding
        return response

    async def page(self, request: Request) -> Response:
        """The folder's ``index.html``."""
        return await self.get_response("index.html", request.scope)


def page_routes(with_page: bool) -> list[BaseRoute]:
    """The pages, which need no key: they hold nothing but the project's own files.

    Args:
        with_page: whether browsers get the demo; else they get the lines for curl, as all others do.
    """
    site, docs = PageFiles(_SITE, SITE_POLICY), PageFiles(_DOCS, DOCS_POLICY)
    offered = (_TEXT, _HTML) if with_page else (_TEXT,)

    async def root(request: Request) -> Response:
        if choose(None, request.headers.get("accept"), offered) == _HTML:
            response = await site.page(request)
        else:
            response = PlainTextResponse(_LINES.format(url=str(request.base_url).rstrip("/")))
        response.headers["Vary"] = "Accept"
        return response

    return [
        Route(PAGE_PATH, root),
        *([Mount("/page", site)] if with_page else []),
        Route(DOCS_PATH, docs.page),
        Mount(DOCS_PATH, docs),
    ]
