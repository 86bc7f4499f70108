"""Where requests go: the base URL, and the proxy that the environment names for it."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import NamedTuple
from urllib.parse import SplitResult, urlsplit
from urllib.request import (  # type: ignore[attr-defined]  # typeshed omits the last
    getproxies,
    proxy_bypass,
    proxy_bypass_environment,
)

from qwen3_embeddings.errors import ConfigurationError


class Environment(NamedTuple):
    """What the environment says about connections. Engines that differ in it are not shared.

    Attributes:
        proxy: URL of the proxy, or None.
        ca_file: ``SSL_CERT_FILE``.
        ca_folder: ``SSL_CERT_DIR``.
    """

    proxy: str | None
    ca_file: str | None
    ca_folder: str | None

    @classmethod
    def read(cls, base_url: str) -> Environment:
        """Read the settings for requests to `base_url`."""
        files = [os.environ.get(name) or None for name in ("SSL_CERT_FILE", "SSL_CERT_DIR")]
        return cls(environment_proxy(base_url), *files)


_ROUTES = ("/embeddings", "/models", "/chat/completions", "/completions")


def normal_url(base_url: str) -> str:
    """Return the root of the API that `base_url` means, without a slash at the end.

    A URL without a path gets ``/v1``. A route of the API at the end is removed, since people copy
    ``http://host/v1/embeddings`` from examples.

    Raises:
        ConfigurationError: `base_url` is not a URL, or holds a user, a query or a fragment.
    """
    url = base_url.strip().rstrip("/")
    for route in _ROUTES:
        url = url.removesuffix(route).rstrip("/")
    try:
        parts = urlsplit(url)
        usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
        usable = usable and not any(character.isspace() for character in url)
    except ValueError:
        usable = False
    if not usable:
        raise ConfigurationError("base_url is not a URL. Write http://host:port/v1 or https://…")
    if parts.username is not None or parts.query or parts.fragment:
        raise ConfigurationError(
            "base_url holds a user, a query or a fragment, which would show in logs. Pass "
            "api_key, or default_headers={'Authorization': 'Basic …'}, instead."
        )
    return url if parts.path else f"{url}/v1"


def environment_proxy(base_url: str) -> str | None:
    """Return the URL of the proxy that the environment names for `base_url`, if any.

    ``NO_PROXY`` is read as requests and curl read it, which httpx does not.

    Raises:
        ConfigurationError: it is a SOCKS proxy. httpx-aiohttp speaks to it as to an HTTP proxy and
            would send it the key in plain text.
    """
    parts, proxies = urlsplit(base_url), getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy or _bypassed(parts, proxies.get("no", "")):
        return None
    if proxy.lower().startswith("socks"):
        raise ConfigurationError(
            "SOCKS proxies are not supported, and HTTP_PROXY, HTTPS_PROXY or ALL_PROXY names one. "
            "Set NO_PROXY for the host or use an HTTP proxy."
        )
    return proxy if "://" in proxy else f"http://{proxy}"


def _bypassed(parts: SplitResult, no_proxy: str) -> bool:
    """Whether requests to a URL go around the proxy.

    The standard library reads names, suffixes and ``*`` between commas. Spaces between entries,
    ranges of addresses, and addresses with a port or in brackets are added here.
    """
    host = parts.hostname or ""
    if proxy_bypass(host):
        return True
    entries = re.split(r"[,\s]+", no_proxy)
    place = f"[{host}]" if ":" in host else host
    places = [host, place] if parts.port is None else [host, place, f"{place}:{parts.port}"]
    separated = {"no": ",".join(entries)}
    if any(proxy_bypass_environment(place, separated) for place in places):
        return True
    with contextlib.suppress(ValueError):
        address = ip_address(host)
        return any(address in network for network in _networks(entries))
    return False


def _networks(entries: list[str]) -> Iterator[IPv4Network | IPv6Network]:
    for entry in entries:
        with contextlib.suppress(ValueError):
            if "/" in entry:
                yield ip_network(entry, strict=False)
