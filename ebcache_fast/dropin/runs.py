"""All runs in progress of one model: told apart by the tensors that come with their calls, and where each stands."""

from collections import OrderedDict
from collections.abc import Callable, Container, Hashable
from typing import NamedTuple

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ebcache_fast.dropin.decision import AGAIN, NOBODY, Stand, Standing, Verdict, Whose
from ebcache_fast.dropin.run_state import Group, RunState
from ebcache_fast.engine.flags import Flags
from ebcache_fast.engine.module_watch import ModuleState

Key = tuple[Hashable, ...]  # what a run is of: its labels first, the id of its prompts last, or 0 for none


def location_of(tensor: Tensor) -> Hashable:
    """Location of a tensor, the same for views of one place, as of whoever slices a prompt anew at each step."""
    storage = tensor.untyped_storage()
    return storage._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def reference_to(tensor: Tensor) -> StorageWeakRef:
    """A reference that keeps no tensor alive, but lets no other come to lie where this one does."""
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


class Turn(NamedTuple):
    """Call among the runs in progress."""

    key: Key
    held: Tensor  # by its caller, for the length of the run
    step: int | None  # None where its timestep is not in the plan
    group: Group  # in which its run is, if it is known
    verdict: Verdict
    run: RunState | None  # the verdict's


class Runs:
    """Runs in progress, told apart by the tensors that their callers hold.

    Calls with the same tensors are of the same run. Once its tensors are gone, a run is over if it kept them from call
    to call; else it may make them anew, and go on with others that hold the same. Where several runs share their
    tensors, or make them anew, `decide` says whose call it is.

    limit: so many runs have caches at most; the one called longest ago gives way. release: takes back a run's memory.
    """

    def __init__(self, limit: int, release: Callable[[RunState], None], decide: Callable[..., Verdict]) -> None:
        self._limit, self._release, self._decide = limit, release, decide
        self._held: dict[tuple[Key, Hashable], tuple[StorageWeakRef, Group]] = {}
        self._anew: OrderedDict[Key, Group] = OrderedDict()  # whose tensors are gone
        self._forgotten = Group()  # what such runs left that are not known any more
        self._runs: OrderedDict[RunState, None] = OrderedDict()  # the one called last at the end

    def prompts(self) -> Container[Hashable]:
        """The ids of prompts that there are runs of."""
        return {key[-1] for (key, _), (_, group) in self._held.items() if not group.is_empty} | {
            key[-1] for key in self._anew
        }

    def find(
        self, key: Key, held: Tensor, step: int | None, weights: ModuleState, flags: Flags, *, is_full: bool
    ) -> Turn:
        """Decide whose call this is; ``is_full``: the plan computes everything in it, so that it needs no caches."""
        reference, group = self._held.get((key, location_of(held)), (None, None))
        forgotten = NOBODY
        if group is None or reference is None or reference.expired():  # type: ignore[no-untyped-call]
            self._sort_out()
            group = self._anew.get(key) or Group()
            forgotten = Standing({}, self._forgotten.lost, self._forgotten.ends)
        else:
            group.is_held = True
        at = {expected: stand_of(run, weights, flags) for expected, run in group.at.items()}
        standing = Standing(at, group.lost, group.ends, group.gave_way)
        verdict = self._decide(step, standing, forgotten, is_full=is_full)
        return Turn(key, held, step, group, verdict, None if verdict.run is None else group.at[verdict.run])

    def next_in_order(self, kind: Key, held: Tensor) -> Turn | None:
        """The next step of the only run of these tensors, whatever they hold; ``kind`` is a key's but for the labels.

        None where there is no such run, or another beside it.
        """
        location = location_of(held)
        found = [(key, group) for (key, at), (_, group) in self._held.items() if at == location and key[1:] == kind]
        found = [(key, group) for key, group in found if not group.is_empty]
        if len(found) != 1:
            return None
        ((key, group),) = found
        if len(group.at) != 1 or group.lost.total():
            return None
        group.is_held = True
        ((step, run),) = group.at.items()
        return Turn(key, held, step, group, Verdict(Whose.NEXT, step), run)

    def make_room(self) -> None:
        """Let the run that was called longest ago give way if there is no room for another."""
        if len(self._runs) >= self._limit:
            self.give_way()

    def give_way(self) -> bool:
        """Drop the run that was called longest ago; True if there was one."""
        run = next(iter(self._runs), None)
        if run is None:
            return False
        if run.group is not None:
            run.group.gave_way = True
        self.drop(run, lose=True)
        return True

    def drop_all(self) -> None:
        """Let all runs go."""
        while self.give_way():
            pass

    def add(self, run: RunState) -> None:
        """Count a new run; `move` says where it stands."""
        self._runs[run] = None

    def drop(self, run: RunState, *, lose: bool = False) -> None:
        """Let a run's caches go; ``lose`` where it may go on."""
        if run.group is not None:
            run.group.remove(run, lose=lose)
        del self._runs[run]
        self._release(run)

    def disown(self, turn: Turn) -> None:
        """Take the caches from the run that nothing tells a coming call of, after an unplanned step from all."""
        for run in list(turn.group.at.values()):
            if run is turn.run:
                turn.group.remove(run, lose=True)
            elif turn.step is None:
                self.drop(run, lose=True)

    def move(self, turn: Turn, run: RunState, steps: int) -> None:
        """Let the run of a call, of ``steps`` steps, stand where it is after it."""
        group, step, (whose, *_, why) = turn.group, turn.step, turn.verdict
        if whose is Whose.NEXT and group.is_held and group is run.group and step is not None and step + 1 < steps:
            group.at[step + 1] = group.at.pop(step)  # as of nearly all calls
            run.expected, run.goes_back, run.is_doubtful = step + 1, False, False
            self._runs.move_to_end(run)
            return
        stood = run.expected or next(iter(group.lost), 0)
        if run.group is not None:
            run.group.remove(run)
        self._leave(turn, steps)
        run.is_doubtful = False
        expected = stood if step is None else step + 1
        is_over = whose is Whose.ENDS or expected == steps
        if is_over or (whose is Whose.ALIKE and why is not None):  # which alone would not have these caches
            self.drop(run)
            if step is not None and not is_over:
                self._home(turn).lost[expected] += 1
            return
        if step is not None:
            run.goes_back = step == run.expected - 2 if run.expected else step > 0
        self._runs.move_to_end(run)
        if (before := self._home(turn).put(run, expected)) is not None:
            self.drop(before)

    def pass_by(self, turn: Turn, steps: int) -> None:
        """Note a call that was answered without caches: its run may go on, without any."""
        if turn.step is None:
            return
        if turn.verdict.is_only and turn.run is not None:
            self.drop(turn.run)
        self._leave(turn, steps)
        if turn.step + 1 < steps:
            self._home(turn).lost[turn.step + 1] += 1

    def _leave(self, turn: Turn, steps: int) -> None:
        """Forget where the run of a call stood, if that is known; after its last step it may come back to that."""
        group, verdict = turn.group, turn.verdict
        group.is_repeating |= verdict.whose is Whose.ALIKE or verdict.why == AGAIN
        comes_back = steps in group.ends
        if verdict.is_only:
            group.lost.clear()
            group.ends.clear()
        if group.is_repeating and not comes_back and turn.step == steps - 1:
            self._home(turn).ends.add(steps)
        if self._anew.get(turn.key) is group and group.is_empty and not group.ends:
            del self._anew[turn.key]

    def _home(self, turn: Turn) -> Group:
        """The group that the run of a call is kept in: that of its tensors."""
        place = turn.key, location_of(turn.held)
        _, group = self._held.get(place, (None, None))
        if group is None or (group is not turn.group and group.is_empty):
            group = Group(is_made_anew=turn.step != 0, is_repeating=turn.group.is_repeating)
            self._held[place] = reference_to(turn.held), group
        return group

    def _sort_out(self) -> None:
        """End the runs whose tensors are gone, or keep those that may make them anew."""
        for place, (reference, group) in list(self._held.items()):
            if not reference.expired():  # type: ignore[no-untyped-call]
                continue
            del self._held[place]
            if group.is_held:
                self._drop_all(group)
            elif not group.is_empty or group.ends:
                self._pool(place[0], group)
        while len(self._anew) > self._limit:
            _, group = self._anew.popitem(last=False)
            group.lost.update(list(group.at))
            self._forgotten.take(group)
            self._drop_all(group)

    def _pool(self, key: Key, group: Group) -> None:
        pool = self._anew.setdefault(key, Group())
        self._anew.move_to_end(key)
        pool.take(group)
        for run in list(group.at.values()):
            group.remove(run)
            # Loops hold prompts, and often make labels anew.
            run.is_doubtful = bool(key[-1]) and not group.is_made_anew
            if (before := pool.put(run, run.expected)) is not None:
                self.drop(before)

    def _drop_all(self, group: Group) -> None:
        for run in list(group.at.values()):
            self.drop(run)


def stand_of(run: RunState, weights: ModuleState, flags: Flags) -> Stand:
    """Describe a run in plain values, given weights and settings of now."""
    changed = None
    if run.weights != weights:
        changed = "weights changed within a run"
    elif run.trajectory.buffer_set.spec.flags != flags:  # under which it began
        changed = "torch's settings or functions changed within a run"
    return Stand(run.is_doubtful, run.goes_back and run.expected == 2, changed)
