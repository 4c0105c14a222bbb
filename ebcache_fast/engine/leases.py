"""Leases of buffer sets: who has one, which lie idle, and what gives way to the limits of an engine."""

from collections.abc import Callable

from ebcache_fast.engine.buffer_set import BufferSet
from ebcache_fast.engine.buffers import BufferSpec
from ebcache_fast.engine.options import EngineOptions
from ebcache_fast.errors import CacheLimitError, InputError, TrajectoryError


class Leases:
    """The buffer sets of one engine, each lent to one trajectory at a time; those used longest ago give way first.

    Whoever calls it sees to it that no other thread does.
    """

    def __init__(self, options: EngineOptions) -> None:
        self._options = options
        self._idle: list[BufferSet] = []  # the one used last at the end
        self._leased: list[BufferSet] = []

    @property
    def all(self) -> list[BufferSet]:
        """Every buffer set, idle or lent."""
        return [*self._idle, *self._leased]

    @property
    def graphs(self) -> int:
        """Number of graphs that all of them hold."""
        return sum(buffer_set.graphs for buffer_set in self.all)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the caches that all of them hold."""
        return sum(buffer_set.buffers.cache.nbytes for buffer_set in self.all)

    def lend(self, spec: BufferSpec, cache_bytes: int, make: Callable[[], BufferSet]) -> BufferSet:
        """Lend an idle buffer set of this spec, or one that ``make`` makes, with caches of so many bytes.

        Raises TrajectoryError at the limit of trajectories, CacheLimitError at that of caches, and InputError, as
        ``make`` does, where there is too little memory even if nothing lies idle.
        """
        buffer_set = next((idle for idle in reversed(self._idle) if idle.spec == spec), None)
        if buffer_set is None:
            self._make_room()
            self._keep_to_the_limit(spec, cache_bytes)
            buffer_set = self._allocate(make)
        else:
            self._idle.remove(buffer_set)
        self._leased.append(buffer_set)
        return buffer_set

    def take_back(self, buffer_set: BufferSet) -> None:
        """Let a lent one lie idle; one that was forgotten meanwhile stays so."""
        if buffer_set in self._leased:
            self._leased.remove(buffer_set)
            self._idle.append(buffer_set)

    def let_go(self) -> None:
        """Free the memory, and the graphs, of all that lie idle."""
        self._idle.clear()

    def forget(self) -> None:
        """Know none of them any more; a lent one is its trajectory's alone."""
        self._idle.clear()
        self._leased.clear()

    def room_for_graphs(self, wanted: int = 0) -> int:
        """Count the graphs that there is room for; idle ones give way until there is room for ``wanted``."""
        while self._idle and self._options.max_graphs - self.graphs < wanted:
            del self._idle[0]
        return self._options.max_graphs - self.graphs

    def _make_room(self) -> None:
        limit = self._options.max_trajectories
        if len(self._leased) >= limit:
            raise TrajectoryError(
                f"{limit} trajectories are in progress, as many as max_trajectories={limit} allows; finish one, or "
                "raise the limit"
            )
        if len(self.all) >= limit:
            del self._idle[0]

    def _keep_to_the_limit(self, spec: BufferSpec, needed: int) -> None:
        limit = self._options.max_cache_bytes
        if limit is None:
            return
        while self._idle and self.cache_bytes + needed > limit:
            del self._idle[0]
        if (total := self.cache_bytes + needed) > limit:
            raise CacheLimitError(
                f"the caches of {spec.rows} rows take {needed} bytes, and with those in use {total}, above "
                f"max_cache_bytes={limit}; sample fewer at once, or raise the limit"
            )

    def _allocate(self, make: Callable[[], BufferSet]) -> BufferSet:
        try:
            return make()
        except InputError:  # too little memory
            if not self._idle:
                raise
        self._idle.clear()
        return make()
