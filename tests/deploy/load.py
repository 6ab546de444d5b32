"""Clients that ask for pictures and keep a ledger: what was asked, what came."""

import hashlib
import http.client
import json
import threading
import time
from dataclasses import dataclass, field

# Seeds repeat, so that pictures drawn by different replicas can be compared.
SEEDS = 16


@dataclass
class Entry:
    """One request: seconds of time.monotonic(), and a status of 0 where none came."""

    began: float
    ended: float
    seed: int
    status: int
    picture: str
    why: str = ""


def ask(connection, method, path, body=None, headers=None):
    """Status, headers and body of one request; the connection stays open where it may."""
    connection.request(method, path, body, headers or {})
    reply = connection.getresponse()
    return reply.status, reply.headers, reply.read()


@dataclass
class Load:
    """A number of clients in a closed loop; connect() is asked for a connection each time there is none."""

    connect: callable
    clients: int = 4
    pause: float = 0.02
    headers: dict = field(default_factory=dict)
    keep: bool = True
    steps: int = 2
    entries: list = field(default_factory=list)

    def __enter__(self):
        self.over = threading.Event()
        self.threads = [threading.Thread(target=self._client, args=(k,)) for k in range(self.clients)]
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        for thread in self.threads:
            thread.join()

    def _client(self, number):
        connection, seed = None, number
        headers = {"Content-Type": "application/json", "Accept": "image/png", **self.headers}
        while not self.over.is_set():
            seed = (seed + 1) % SEEDS
            body = {"prompt": "a red house by the sea", "seed": seed, "steps": self.steps}
            body |= {"width": 64, "height": 64}
            began, status, picture, why = time.monotonic(), 0, b"", ""
            try:
                connection = connection or self.connect()
                status, _, picture = ask(
                    connection, "POST", "/invocations", json.dumps(body), headers
                )
                if status != 200:
                    why = picture[:200].decode(errors="replace")
            except (OSError, http.client.HTTPException) as error:
                why = f"{type(error).__name__}: {error}"
            if connection and not (self.keep and status == 200):
                connection.close()
                connection = None
            digest = hashlib.sha256(picture).hexdigest()
            self.entries.append(Entry(began, time.monotonic(), seed, status, digest, why))
            time.sleep(self.pause)

    def lost(self, since=0.0):
        """Requests begun since then that brought no picture."""
        return [entry for entry in self.entries if entry.began >= since and entry.status != 200]

    def differing(self):
        """Seeds of which there is more than one picture."""
        drawn = {}
        for entry in self.entries:
            if entry.status == 200:
                drawn.setdefault(entry.seed, set()).add(entry.picture)
        return {seed for seed, pictures in drawn.items() if len(pictures) > 1}
