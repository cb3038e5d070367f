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
        needed: bytes of memory by name.
        max_memory: of all that are loaded together; None: no limit. The one that was not used for longest goes first,
            when the requests that use it are done.
        wait_s: for those.

    Raises:
        RequestError: one that needs more than there may be.
    """

    def __init__(
        self,
        load: Mapping[str, Callable[[], Service]],
        needed: Mapping[str, int],
        max_memory: int | None = None,
        wait_s: float = 60.0,
    ) -> None:
        self._load, self._needed, self._max_memory, self._wait_s = dict(load), dict(needed), max_memory, wait_s
        for name, size in needed.items():
            if max_memory is not None and size > max_memory:
                raise RequestError(
                    f"model {name}: needs about {size / 2**20:.0f} MiB, expected at most {max_memory / 2**20:.0f}, the "
                    "limit of all (--max-memory)"
                )
        self._services: dict[str, Service] = {}  # the one that was used last is last
        self._uses: dict[str, int] = dict.fromkeys(load, 0)
        self._loading = threading.Lock()  # held by who loads, and by who waits for it
        self._changed = threading.Condition()
        self._closed = False

    @classmethod
    def of(cls, service: Service, name: str = "default") -> Models:
        """One that is loaded."""
        models = cls({name: lambda: service}, {name: 0})
        models._services[name] = service
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
        """As `using`; `release` must follow."""
        key = self._key(name)
        with self._changed:
            if (service := self._used(key)) is not None:
                return service
        with self._loading:
            with self._changed:
                if (service := self._used(key)) is not None:  # another has loaded it meanwhile
                    return service
                self._make_room(key)
            service = self._load[key]()
            with self._changed:
                if self._closed:
                    _end(service)
                    raise OverloadedError("the server stops")
                self._services[key] = service
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
            services = list(self._services.values())
        for service in services:
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

    def _used(self, key: str) -> Service | None:
        """One that is loaded, from now on used."""
        if self._closed:
            raise OverloadedError("the server stops")
        service = self._services.pop(key, None)
        if service is not None:
            self._services[key] = service
            self._uses[key] += 1
        return service

    def _make_room(self, key: str) -> None:
        """Unload others until this one fits; with both locks held."""
        if self._max_memory is None:
            return
        limit = time.monotonic() + self._wait_s
        while sum(self._needed[name] for name in self._services) + self._needed[key] > self._max_memory:
            idle = next((name for name in self._services if not self._uses[name]), None)
            if idle is not None:
                _end(self._services.pop(idle))
            elif not self._changed.wait(max(limit - time.monotonic(), 0.0)):
                raise OverloadedError(f"model {key}: no memory while others draw; try again later")


def _end(service: Service) -> None:
    service.close()
    service.pipeline.close()
