"""Shared by the web page and the API server: open a port, and run a web application on it until Ctrl-C."""

import ipaddress
import socket
import sys

import fastapi
import uvicorn

from litmoe.cli import UserError


def listen(host: str, port: int) -> socket.socket:
    """Open the address of a server.

    Raises:
        UserError: the address can't be used.
    """
    if not 0 <= port < 2**16:
        raise UserError(f"--port is {port}; expected 0 (any free port) to 65535.")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        # Opened here and not by uvicorn, so that a used port is reported before the models are loaded.
        return socket.create_server((host, port), family=family)
    except (OSError, ValueError) as error:  # ValueError: the host has a NUL character or an empty label
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot serve on {host}, port {port}: {reason}. Use another --port (0 for any free port) or --host."
        ) from None


def url_of(sock: socket.socket) -> str:
    """Return ``http://HOST:PORT`` of an address from `listen`."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(app: fastapi.FastAPI, sock: socket.socket, announcement: str) -> None:
    """Print the announcement, and serve an application at an address from `listen` until Ctrl-C."""
    host = sock.getsockname()[0]
    if not is_loopback(host):
        print(f"Warning: everyone on the network can use the models at {host}. There is no password.", file=sys.stderr)
    print(f"{announcement} Ctrl-C stops the server.", flush=True)
    # One second, because an open page keeps its connection until the server closes it.
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
    uvicorn.Server(config).run(sockets=[sock])


def is_loopback(host: str) -> bool:
    """Return whether only this computer can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_private_name(host: str) -> bool:
    """Return whether no site of the internet can have this name: an IP address, localhost, or one ending in .internal.

    Containers reach their computer as host.docker.internal.
    """
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith((".localhost", ".internal"))
    return True
