"""Sending a webhook: signed as standardwebhooks.com says, to public addresses only.

The receiver checks `webhook-signature`, which is `v1,` and the base64 of HMAC-SHA256 over
`{webhook-id}.{webhook-timestamp}.{body}` with the run's own secret. A secret that begins with `whsec_` is the
base64 of the key, as that standard writes it; any other is the key itself.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import ipaddress
import socket
import ssl
import time
from urllib.parse import urlsplit

from api.store import Delivered

#: Of secrets that are written as the standard writes them.
SECRET_PREFIX = "whsec_"
#: For the whole of connecting and answering, in s.
TIMEOUT_S = 10.0


def signature(secret: str, webhook_id: str, timestamp: int, body: str) -> str:
    """The value of `webhook-signature`. Raises ValueError for a `whsec_` secret that is no base64."""
    signed = f"{webhook_id}.{timestamp}.{body}".encode()
    return "v1," + base64.b64encode(hmac.digest(key_of(secret), signed, hashlib.sha256)).decode()


def key_of(secret: str) -> bytes:
    """The key that a secret stands for. Raises ValueError for a `whsec_` secret that is no base64."""
    if secret.startswith(SECRET_PREFIX):
        return base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
    return secret.encode()


def problem_of_url(url: str, *, allow_private: bool) -> str | None:
    """Why an address cannot be a webhook's, in words; None when it can."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return "is not an address"
    if parts.scheme not in ("https", "http") or not parts.hostname or port == 0:
        return "must be an https:// address"
    if parts.scheme == "http" and not allow_private:
        return "must be an https:// address"
    if parts.username or parts.password:
        return "must not hold a name or password"
    if any(ord(letter) <= 32 or ord(letter) == 127 for letter in url):
        return "must not hold spaces or control characters"
    try:
        literal = ipaddress.ip_address(parts.hostname)
    except ValueError:
        if parts.hostname == "localhost" and not allow_private:
            return "must not be an address of this machine or of a private network"
        return None
    if not allow_private and not _public(literal):
        return "must not be an address of this machine or of a private network"
    return None


def send(taken: Delivered, *, allow_private: bool) -> str | None:
    """One attempt: None when it was taken with a 2xx, else what went wrong in a sentence.

    The name is resolved once and that address is used: a name that answers differently the second time
    leads nowhere else. Redirects are not followed.
    """
    problem = problem_of_url(taken.url, allow_private=allow_private)
    if problem:
        return f"the address {problem}"
    parts = urlsplit(taken.url)
    host = parts.hostname or ""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        return f"{host} is not known: {error.strerror or error}"
    addresses = [str(row[4][0]) for row in found]
    allowed = [text for text in addresses if allow_private or _public(ipaddress.ip_address(text))]
    if len(allowed) < len(addresses):
        return f"{host} leads to an address of this machine or of a private network"
    body = taken.body.encode()
    stamp = int(time.time())
    headers = {
        "Content-Type": "application/json",
        "User-Agent": "planfront",
        "webhook-id": taken.id,
        "webhook-timestamp": str(stamp),
        "Host": parts.netloc,
    }
    if taken.secret:
        headers["webhook-signature"] = signature(taken.secret, taken.id, stamp, taken.body)
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    try:
        sock = socket.create_connection((allowed[0], port), TIMEOUT_S)
        if parts.scheme == "https":
            sock = ssl.create_default_context().wrap_socket(sock, server_hostname=host)
        connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
        connection.sock = sock
        try:
            connection.request("POST", path, body=body, headers=headers)
            status = connection.getresponse().status
        finally:
            connection.close()
    except (OSError, http.client.HTTPException) as error:
        return f"no answer: {type(error).__name__} {error}"[:300]
    return None if 200 <= status < 300 else f"answered {status}"


def _public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    mapped = getattr(address, "ipv4_mapped", None) or address
    return bool(mapped.is_global and not mapped.is_multicast)
