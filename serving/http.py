"""HTTP clients that agree about proxies: what is near is reached directly, whatever `http_proxy` and `no_proxy` say."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from typing import Any
from urllib.parse import urlsplit

import httpx


def client(url: str, **options: Any) -> httpx.Client:
    """A client for the host of `url`: through the environment's proxy only where `is_near` is false."""
    return httpx.Client(trust_env=not is_near(url), **options)


def authorization(api_key: str) -> dict[str, str]:
    """The headers of one who has a key, or none ("")."""
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def is_near(url: str) -> bool:
    """Whether every address of the URL's host is a loopback, private or link-local one. A host without an address here
    is far: a proxy may know it."""
    try:
        found = socket.getaddrinfo(urlsplit(url).hostname or "", None)
    except (OSError, ValueError):
        return False
    addresses = [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
    return bool(addresses) and all(a.is_loopback or a.is_private or a.is_link_local for a in addresses)


def is_loopback(host: str) -> bool:
    """Whether what listens at `host` is reached from this machine alone."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def base_url(endpoint: str) -> str:
    """`http://host:port` and `http://host:port/v1` both name an endpoint; this is the latter form."""
    return endpoint.rstrip("/").removesuffix("/v1") + "/v1"
