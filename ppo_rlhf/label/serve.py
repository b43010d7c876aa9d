"""The server of the labelling app: one process, ended by Ctrl-C or by the button at the end."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable
from dataclasses import replace
from urllib.parse import quote

import uvicorn

from ppo_rlhf.errors import UserError
from ppo_rlhf.label.app import LabelSettings, make_app
from ppo_rlhf.preferences import Store

LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
LAST_PAGE = 1.0  # seconds
PATIENCE = 3  # seconds that open requests get when the server ends


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine can reach a server at this host."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_host(host: str, token: str | None) -> None:
    """Raises UserError for a host beyond this machine without a token, and for an empty one."""
    if token == "":
        raise UserError("--token is empty; give one that cannot be guessed.")
    if token is None and not is_loopback(host):
        raise UserError(f"--host {host} can be reached from other machines: give a --token that the annotators know.")


def serve(
    store: Store,
    settings: LabelSettings,
    *,
    host: str,
    port: int,
    announce: Callable[[str], None],
    finishable: bool = False,
) -> None:
    """Serves until Ctrl-C, or with finishable until somebody says that all is done. announce: gets the page's address.

    port: 0 takes a free one. Raises UserError for a host beyond this machine without a token, or a port that cannot be
    had.
    """
    check_host(host, settings.token)
    if settings.token is None:  # a token is safe behind any name, such as a proxy's
        settings = replace(settings, hosts=LOCAL_NAMES | {host.lower()})
    listening = _listen(host, port)
    authority = f"[{host}]" if ":" in host else host
    key = "" if settings.token is None else f"?token={quote(settings.token, safe='')}"

    def finish() -> None:  # once the last page has its style sheet
        asyncio.get_running_loop().call_later(LAST_PAGE, setattr, server, "should_exit", True)

    app = make_app(store, settings, finish=finish if finishable else None)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="off",
            timeout_graceful_shutdown=PATIENCE,
        )
    )
    announce(f"http://{authority}:{listening.getsockname()[1]}/{key}")
    try:
        server.run(sockets=[listening])
    except KeyboardInterrupt:
        pass  # how a server is ended
    finally:
        listening.close()


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens already, so that the address is right when it is announced."""
    if not 0 <= port < 2**16:
        raise UserError(f"--port {port} must lie between 0 and 65535.")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen(128)
        except OSError:
            listening.close()
            raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"--host {host} --port {port} cannot be used: {reason}; try another port.") from error
    return listening
