"""The page's routes, for any FastAPI application: `GET /playground` and its files below it.

The page asks the application it came from, by relative addresses, so it works below a route prefix too. Its policy lets
it reach nothing else.
"""

from __future__ import annotations

from fastapi import APIRouter, HTTPException, Response

from serving.playground.saved import ASSETS, empty_page

PAGE = "index.html"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
#: What is served, by name. `saved.html` is what the page saves answers in.
_FILES = {path.name: path.read_bytes() for path in ASSETS.iterdir()} | {"saved.html": empty_page().encode()}

router = APIRouter()


@router.get("/playground")
async def page() -> Response:
    return _answer(PAGE)


@router.get("/playground/{name}")
async def asset(name: str) -> Response:
    if name not in _FILES or name == PAGE:
        raise HTTPException(404)
    return _answer(name)


def _answer(name: str) -> Response:
    media_type = TYPES[name[name.rindex(".") :]]
    return Response(_FILES[name], media_type=media_type, headers=HEADERS)
