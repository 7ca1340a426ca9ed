"""`planfront serve` and `planfront worker`: processes, signals, supervision."""

from __future__ import annotations

import gc
import ipaddress
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from api.observe import set_up_logs
from api.settings import Settings
from api.store import Store, default_url, open_store
from hardware.errors import InputError

_LOG = logging.getLogger("planfront.serve")
#: Connections that are still open after a stop signal are closed after so long, in s.
GRACE_S = 10
#: Before a worker that ended is started again, in s.
_PAUSE_S = 0.2
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]", "::1"})


def serve(
    make_app: Callable[..., Any],
    *,
    host: str,
    port: int,
    database_url: str | None,
    workers: int,
    insecure: bool,
    log_format: str,
    on_ready: Callable[[str], None],
) -> None:
    """Answer requests until a signal says stop; `workers` processes search.

    `make_app` is `web.app:create_app` (or `create_api`, for an API without pages). Raises InputError for a
    database, an address or settings that cannot be used, and for an address that others can reach while
    there are no API keys.
    """
    import uvicorn

    settings = Settings.from_env()
    url = database_url or default_url()
    store = open_store(url)
    local = is_loopback(host)
    has_keys = store.has_keys()
    if not local and not has_keys and not insecure:
        store.close()
        raise InputError(
            "--host",
            f"{host} can be reached by others, and there are no API keys",
            "make one with `planfront keys create --role admin`, or say --insecure",
        )
    set_up_logs(log_format)
    app = make_app(
        settings=settings,
        store=store,
        keys_needed=has_keys or not (local or insecure),
        hosts=_LOOPBACK | {host.lower()} if local and not has_keys else None,
    )

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:
            # Streams end on their own only when their run does.
            if app.state.runs is not None and self.loop is not None:
                self.loop.call_soon_threadsafe(app.state.runs.begin_close)
            # Not the parent's: it would end this process by the same signal, before the workers are told.
            self.force_exit = self.should_exit and sig == signal.SIGINT
            self.should_exit = True

        async def serve(self, sockets: Any = None) -> None:
            import asyncio

            self.loop = asyncio.get_running_loop()
            settling = asyncio.create_task(_settle(app))
            await super().serve(sockets)
            settling.cancel()

    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=True,
        proxy_headers=False,
        timeout_graceful_shutdown=GRACE_S,
        backlog=2048,
    )
    # A thread that computes hands the interpreter on sooner: requests wait less for it.
    sys.setswitchinterval(0.001)
    server = Server(config)
    try:
        sockets = [config.bind_socket()]
    except SystemExit:  # uvicorn has logged why
        raise InputError("--port", f"{host}:{port} cannot be listened on") from None
    sockets[0].listen(2048)  # who is told the address below may come at once
    address = sockets[0].getsockname()
    shown = f"[{address[0]}]" if ":" in str(address[0]) else address[0]
    supervisor = Supervisor(url, workers, log_format)
    supervisor.start()
    on_ready(f"http://{shown}:{address[1]}")
    try:
        server.run(sockets=sockets)
    finally:
        supervisor.stop()
        store.close()


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Supervisor:
    """Worker processes, each started again when it ends; they end when this process does."""

    def __init__(self, database_url: str, count: int, log_format: str) -> None:
        self._url, self._log_format = database_url, log_format
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._keep, name=f"worker-{index}", daemon=True) for index in range(count)
        ]
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()

    def start(self) -> None:
        """Start all of them."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ask them to give back what they hold, and wait; who does not listen is killed."""
        self._stop.set()
        with self._lock:
            processes = list(self._processes)
        for process in processes:
            assert process.stdin is not None
            process.stdin.close()
        deadline = time.monotonic() + GRACE_S
        for process in processes:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
        for thread in self._threads:
            thread.join(1.0)

    def _keep(self) -> None:
        pause_s = _PAUSE_S
        while not self._stop.is_set():
            began = time.monotonic()
            with self._lock:
                if self._stop.is_set():
                    return
                process = start_worker(self._url, self._log_format)
                self._processes.add(process)
            code = process.wait()
            with self._lock:
                self._processes.discard(process)
            if self._stop.is_set():
                return
            _LOG.error("a worker ended; it is started again", extra={"exit_code": code})
            # One that dies at once, again and again, is no reason to keep the machine busy.
            pause_s = _PAUSE_S if time.monotonic() - began > 3 else min(2 * pause_s, 10.0)
            self._stop.wait(pause_s)


async def _settle(app: Any) -> None:
    """Load what every request needs, and have the collector of garbage look at it never again.

    Catalogs and modules are some hundred thousand objects that stay: going through all of them takes a tenth
    of a second, in which nobody is answered.
    """
    try:
        await app.state.service.ready()
    except Exception:
        _LOG.exception("the service is not ready")  # as /readyz says from now on
    gc.collect()
    gc.freeze()


def start_worker(database_url: str, log_format: str) -> subprocess.Popen[bytes]:
    """A worker process that stops when its standard input is closed."""
    root = str(Path(__file__).resolve().parent.parent)
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environ = {
        **os.environ,
        # Not on the command line, where every user of the machine can read it.
        "PLANFRONT_DATABASE_URL": database_url,
        "PYTHONPATH": os.pathsep.join(paths),
        "OPENBLAS_NUM_THREADS": os.environ.get("OPENBLAS_NUM_THREADS", "1"),
    }
    arguments = [sys.executable, "-m", "api.cli", "worker", "--supervised", "--log-format", log_format]
    return subprocess.Popen(arguments, stdin=subprocess.PIPE, env=environ)


def work(*, database_url: str | None, supervised: bool, log_format: str) -> None:
    """One worker in this process, until a signal (or, supervised, the end of standard input) says stop."""
    from api.worker import Worker

    # The supervisor has brought a file's schema forward; who starts a worker alone does it by command.
    settings = Settings.from_env()
    store: Store = open_store(database_url, upgrade=False)
    set_up_logs(log_format)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    if supervised:

        def watch() -> None:
            # Not through sys.stdin: its lock, held here, would break the interpreter's end.
            while os.read(0, 4096):
                pass
            stop.set()

        threading.Thread(target=watch, name="supervisor", daemon=True).start()
    try:
        Worker(store, settings, stop).run_forever()
    finally:
        store.close()
