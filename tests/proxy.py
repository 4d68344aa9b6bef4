"""A TCP proxy in a thread, for the ways a network fails.

`black_hole` keeps every connection of now open and forwards nothing on it any more, in either direction, as a firewall that
forgot its state; new connections pass. `cut` ends all connections and refuses new ones until `reopen`.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading


class Proxy:
    """Forwards a loopback port to another; start it with `with`."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = int(self._listener.getsockname()[1])
        self._lock = threading.Lock()
        self._peers: dict[socket.socket, socket.socket] = {}
        self._silent: list[socket.socket] = []
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._stopping = False
        self._thread = threading.Thread(target=self._forward, name="proxy", daemon=True)

    def __enter__(self) -> Proxy:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stopping = True
        self._thread.join(5)
        self.cut()
        for connection in self._silent:
            connection.close()
        self._selector.close()

    def black_hole(self) -> int:
        """Return how many connections fell silent."""
        with self._lock:
            silenced = list(self._peers)
            for connection in silenced:
                self._selector.unregister(connection)
            self._silent += silenced
            self._peers.clear()
        return len(silenced) // 2

    def cut(self) -> None:
        """End all connections, and refuse new ones."""
        with self._lock:
            if self._listener.fileno() >= 0:
                self._selector.unregister(self._listener)
                self._listener.close()
            for connection in list(self._peers):
                self._end(connection)

    def reopen(self) -> None:
        """Let connections pass again, on the same port."""
        with self._lock:
            self._listener = socket.create_server(("127.0.0.1", self.port), backlog=128)
            self._selector.register(self._listener, selectors.EVENT_READ)

    def _forward(self) -> None:
        while not self._stopping:
            for key, _ in self._selector.select(0.05):
                with self._lock:
                    if key.fileobj is self._listener:
                        self._accept()
                    elif key.fileobj in self._peers:
                        self._pass_on(key.fileobj)  # type: ignore[arg-type]

    def _accept(self) -> None:
        near, _ = self._listener.accept()
        try:
            far = socket.create_connection(self._target, timeout=2)
        except OSError:
            near.close()
            return
        self._peers.update({near: far, far: near})
        for connection in (near, far):
            connection.settimeout(5)
            self._selector.register(connection, selectors.EVENT_READ)

    def _pass_on(self, source: socket.socket) -> None:
        with contextlib.suppress(OSError):
            if data := source.recv(1 << 16):
                self._peers[source].sendall(data)
                return
        self._end(source)

    def _end(self, connection: socket.socket) -> None:
        for end in (connection, self._peers.get(connection)):
            if end is not None and self._peers.pop(end, None) is not None:
                with contextlib.suppress(KeyError, ValueError):
                    self._selector.unregister(end)
                end.close()
