"""Services by name: loaded when they are first asked for, and unloaded for others where memory is limited."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from fastvar_trt.runtime.errors import OverloadedError, RequestError
from fastvar_trt.runtime.layout import passed_bytes
from fastvar_trt.runtime.manifest import WEIGHTS_FILE, Manifest
from fastvar_trt.runtime.service import Service


def needed_bytes(manifest: Manifest) -> int:
    """Memory of a loaded bundle by its manifest: weights, what chains hand on, and results; without activations."""
    chains = [variant.chain(batch) for variant in manifest.variants for batch in manifest.batches]
    return manifest.files[WEIGHTS_FILE].num_bytes + max(map(passed_bytes, chains))


class Models:
    """Bundles behind one server.

    Args:
        load: the default one's name first; each gives a service, which these take over, pipeline and all.
        read: each gives the manifest as it is now, without loading anything.
        max_memory: bytes of all that are loaded together, by `needed_bytes`; None: no limit. The one that was not used
            for longest goes first, when the requests that use it are done.
        wait_s: for those.

    Raises:
        RequestError: one that needs more than there may be.
    """

    def __init__(
        self,
        load: Mapping[str, Callable[[], Service]],
        read: Mapping[str, Callable[[], Manifest]],
        max_memory: int | None = None,
        wait_s: float = 60.0,
    ) -> None:
        self._load, self._read, self._max_memory, self._wait_s = dict(load), dict(read), max_memory, wait_s
        for name in load if max_memory is not None else ():
            self._needed(name)
        self._services: dict[str, Service] = {}  # the one that was used last is last
        self._sizes: dict[str, int] = {}  # of those that are loaded
        self._uses: dict[str, int] = dict.fromkeys(load, 0)
        self._loading = threading.Lock()  # held by who loads, and by who waits for room
        self._changed = threading.Condition()
        self._wanted: str | None = None  # what waits for room: others are not handed out meanwhile
        self._closed = False

    @classmethod
    def of(cls, service: Service, name: str = "default") -> Models:
        """One that is loaded."""
        models = cls({name: lambda: service}, {name: lambda: service.pipeline.manifest})
        models._services[name], models._sizes[name] = service, 0
        return models

    @property
    def names(self) -> tuple[str, ...]:
        """Of all, the default first."""
        return tuple(self._load)

    @property
    def loaded(self) -> dict[str, Service]:
        """Those that are loaded now."""
        with self._changed:
            return dict(self._services)

    def manifest(self, name: str | None = None) -> Manifest:
        """Of a model, which is not loaded for it; default: the first.

        Raises:
            RequestError: there is no such model.
            BundleError: its bundle cannot be read.
        """
        key = self._key(name)
        service = self.loaded.get(key)
        return self._read[key]() if service is None else service.pipeline.manifest

    @contextmanager
    def using(self, name: str | None = None) -> Iterator[Service]:
        """A service, loaded, that stays so until the block ends.

        Args:
            name: of the model; default: the first.

        Raises:
            RequestError: there is no such model.
            OverloadedError: no memory for it in time.
            FastVARError: it cannot be loaded.
        """
        service = self.acquire(name)
        try:
            yield service
        finally:
            self.release(name)

    def acquire(self, name: str | None = None) -> Service:
        """As `using`; `release` must follow. May load, and wait for others that load."""
        key = self._key(name)
        if (service := self.acquire_loaded(key)) is not None:
            return service
        with self._loading:
            if (service := self.acquire_loaded(key)) is not None:  # another has loaded it meanwhile
                return service
            size = self._needed(key) if self._max_memory is not None else 0  # of what is there now
            for unused in self._make_room(key, size):
                _end(unused)
            service = self._load[key]()
            with self._changed:
                if not self._closed:
                    self._services[key], self._sizes[key] = service, size
                    self._uses[key] += 1
                    return service
        _end(service)
        raise OverloadedError("the server stops")

    def acquire_loaded(self, name: str | None = None) -> Service | None:
        """As `acquire`, where nothing has to be waited for; else None."""
        key = self._key(name)
        with self._changed:
            if self._closed:
                raise OverloadedError("the server stops")
            if key not in self._services or self._wanted not in (None, key):
                return None
            self._services[key] = service = self._services.pop(key)
            self._uses[key] += 1
            return service

    def release(self, name: str | None = None) -> None:
        """What `acquire` gave is not used any more."""
        with self._changed:
            self._uses[self._key(name)] -= 1
            self._changed.notify_all()

    def drain(self, timeout_s: float | None = None) -> bool:
        """`Service.drain` of all."""
        limit = None if timeout_s is None else time.monotonic() + timeout_s
        done = True
        for service in self.loaded.values():
            left = None if limit is None else max(limit - time.monotonic(), 0.0)
            done &= service.drain(left)
        return done

    def stop(self) -> None:
        """`Service.close` of all; none is loaded any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for service in self.loaded.values():
            service.close()

    def close(self) -> None:
        """`stop`, and close the pipelines; may be called twice."""
        self.stop()
        for service in self.loaded.values():
            service.pipeline.close()

    def _key(self, name: str | None) -> str:
        key = self.names[0] if name is None else name
        if key not in self._load:
            raise RequestError(f"model: got {name!r}, this server has {', '.join(self.names)}")
        return key

    def _needed(self, key: str) -> int:
        """Memory of a model."""
        size = needed_bytes(self._read[key]())
        if self._max_memory is not None and size > self._max_memory:
            raise RequestError(
                f"model {key}: needs about {size / 2**20:.0f} MiB, expected at most {self._max_memory / 2**20:.0f}, "
                "the limit of all (--max-memory)"
            )
        return size

    def _make_room(self, key: str, size: int) -> list[Service]:
        """Take those out that have to go for this one, the one that was not used for longest first; with `_loading`."""
        if self._max_memory is None:
            return []
        limit = time.monotonic() + self._wait_s
        with self._changed:
            self._wanted = key
            try:
                while sum(own for name, own in self._sizes.items() if self._uses[name]) + size > self._max_memory:
                    left = limit - time.monotonic()
                    if self._closed or left <= 0:
                        raise OverloadedError(f"model {key}: no memory while others draw; try again later")
                    self._changed.wait(left)
                gone = []
                while sum(self._sizes.values()) + size > self._max_memory:
                    name = next(name for name in self._services if not self._uses[name])
                    gone.append(self._services.pop(name))
                    del self._sizes[name]
                return gone
            finally:
                self._wanted = None


def _end(service: Service) -> None:
    service.close()
    service.pipeline.close()
