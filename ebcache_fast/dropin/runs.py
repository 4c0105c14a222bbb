"""All runs in progress of one model: which of them a call belongs to, and which have memory for caches."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import NamedTuple

from torch import Tensor

from ebcache_fast.dropin.given import Given, place_of
from ebcache_fast.dropin.lane import Lane, Lanes

FRESH = "a run did not begin with the first step"
AGAIN = "a timestep came again"
LEFT_OUT = "steps were left out"
UNPLANNED = "a timestep is not in the plan"
ALIKE = "runs of the same tensors can't be told apart"
GAVE_WAY = "more runs took turns than max_trajectories"

Key = tuple[Hashable, ...]  # what a run is of: its labels first, the number of its prompts last, or 0 for none


class Turn(NamedTuple):
    """What a call is to the runs in progress."""

    key: Key
    given: Tensor
    step: int | None  # None where its timestep is not in the plan
    lanes: Lanes  # among which its run is, if it is known
    lane: Lane | None  # to run in; None where it needs a new one
    why: str | None = None  # everything has to be computed; None where the plan can be followed
    is_only: bool = False  # there is no other run that it could be of
    is_alike: bool = False  # nothing tells whose call it is
    is_end: bool = False  # of a run in rising order


class Runs:
    """Runs in progress, told apart by the tensors that their callers hold.

    Calls with the same tensors are of the same run. Once its tensors are gone, a run is over if it kept them from call
    to call; else it may make them anew, and go on with others that hold the same. Where several runs share their
    tensors, or make them anew, `Lanes` tells whose call it is, or that nothing does.

    limit: so many lanes at most; the one called longest ago gives way. release: takes back a lane's memory.
    """

    def __init__(self, limit: int, release: Callable[[Lane], None]) -> None:
        self._limit, self._release = limit, release
        self._held: dict[tuple[Key, Hashable], tuple[Given, Lanes]] = {}
        self._anew: OrderedDict[Key, Lanes] = OrderedDict()  # whose tensors are gone
        self._forgotten = Lanes()  # what such runs left that are not known any more
        self._lanes: OrderedDict[Lane, None] = OrderedDict()  # the one called last at the end

    @property
    def keys(self) -> set[Key]:
        """What there are runs of."""
        return {key for (key, _), (_, lanes) in self._held.items() if lanes.runs} | set(self._anew)

    def find(self, key: Key, given: Tensor, step: int | None, *, is_full: bool) -> Turn:
        """Whose call this is; ``is_full``: the plan computes everything in it, so that it needs no caches."""
        lanes = self._with(key, given)
        if lanes is not None:
            lanes.is_held = True
            return _turn(key, given, step, lanes, Lanes(), is_full=is_full)
        self._sort_out()
        return _turn(key, given, step, self._anew.get(key) or Lanes(), self._forgotten, is_full=is_full)

    def trusted(self, kind: Key, given: Tensor) -> Turn | None:
        """The next step of the only run of these tensors, whatever they hold; ``kind`` is a key's but for the labels.

        None where there is no such run, or another beside it.
        """
        place = place_of(given)
        found = [(key, held[1]) for (key, at), held in self._held.items() if at == place and key[1:] == kind]
        found = [(key, lanes) for key, lanes in found if lanes.runs]
        if len(found) != 1 or found[0][1].runs != 1 or not found[0][1].at:
            return None
        ((key, lanes),) = found
        lanes.is_held = True
        ((step, lane),) = lanes.at.items()
        return Turn(key, given, step, lanes, lane)

    def make_room(self) -> None:
        """Let the lane that was called longest ago give way if there is no room for another."""
        if len(self._lanes) >= self._limit:
            self.give_way()

    def give_way(self) -> bool:
        """Drop the lane that was called longest ago; whether there was one."""
        lane = next(iter(self._lanes), None)
        if lane is None:
            return False
        if lane.lanes is not None:
            lane.lanes.gave_way = True
        self.drop(lane, lose=True)
        return True

    def drop_all(self) -> None:
        """Let all lanes go."""
        while self.give_way():
            pass

    def add(self, lane: Lane) -> None:
        """Count a new lane; `move` says where its run stands."""
        self._lanes[lane] = None

    def drop(self, lane: Lane, *, lose: bool = False) -> None:
        """Let a lane go; ``lose`` where its run may go on."""
        if lane.lanes is not None:
            lane.lanes.remove(lane, lose=lose)
        del self._lanes[lane]
        self._release(lane)

    def disown(self, turn: Turn) -> None:
        """Before a call that nothing tells the run of: its lane's caches are nobody's, after an unplanned step all."""
        if turn.is_alike:
            for lane in list(turn.lanes.at.values()):
                if lane is turn.lane:
                    turn.lanes.remove(lane, lose=True)
                elif turn.step is None:
                    self.drop(lane, lose=True)

    def move(self, turn: Turn, lane: Lane, steps: int) -> None:
        """After a call: let its run, of ``steps`` steps, stand where it is now."""
        stood = lane.expected or next(iter(turn.lanes.lost), 0)
        if lane.lanes is not None:
            lane.lanes.remove(lane)
        self._leave(turn, steps)
        lane.is_doubtful = False
        expected = stood if turn.step is None else turn.step + 1
        is_over = turn.is_end or expected == steps
        if is_over or (turn.is_alike and turn.why is not None):  # which alone would not have these caches
            self.drop(lane)
            if turn.step is not None and not is_over:
                self._home(turn).lost[expected] += 1
            return
        if turn.step is not None:
            lane.goes_back = turn.step == lane.expected - 2 if lane.expected else turn.step > 0
        self._lanes.move_to_end(lane)
        if (before := self._home(turn).put(lane, expected)) is not None:
            self.drop(before)

    def pass_by(self, turn: Turn, steps: int) -> None:
        """After a call that was answered without caches: its run may go on, without any."""
        if turn.step is None:
            return
        if turn.is_only and turn.lane is not None:
            self.drop(turn.lane)
        self._leave(turn, steps)
        if turn.step + 1 < steps:
            self._home(turn).lost[turn.step + 1] += 1

    def _with(self, key: Key, given: Tensor) -> Lanes | None:
        """The runs that these tensors are known to be of, none of them any more after the last."""
        held, lanes = self._held.get((key, place_of(given)), (None, None))
        return lanes if held is not None and held.is_alive else None

    def _leave(self, turn: Turn, steps: int) -> None:
        """Forget where the run of a call stood, if that is known; after its last step it may come back to that."""
        lanes = turn.lanes
        lanes.is_repeating |= turn.is_alike or turn.why == AGAIN
        comes_back = steps in lanes.ends
        if turn.is_only:
            lanes.lost.clear()
            lanes.ends.clear()
        if lanes.is_repeating and not comes_back and turn.step == steps - 1:
            self._home(turn).ends.add(steps)
        if self._anew.get(turn.key) is lanes and not (lanes.runs or lanes.ends):
            del self._anew[turn.key]

    def _home(self, turn: Turn) -> Lanes:
        """Where the run of a call is kept: among those of its tensors."""
        place = turn.key, place_of(turn.given)
        _, lanes = self._held.get(place, (None, None))
        if lanes is None or not (lanes is turn.lanes or lanes.runs):
            lanes = Lanes(is_made_anew=turn.step != 0, is_repeating=turn.lanes.is_repeating)
            self._held[place] = Given(turn.given), lanes
        return lanes

    def _sort_out(self) -> None:
        """Runs whose tensors are gone are over, or may make them anew."""
        for place, (given, lanes) in list(self._held.items()):
            if given.is_alive:
                continue
            del self._held[place]
            if lanes.is_held:
                self._drop_all(lanes)
            elif lanes.runs or lanes.ends:
                self._pool(place[0], lanes)
        while len(self._anew) > self._limit:
            _, lanes = self._anew.popitem(last=False)
            lanes.lost.update(list(lanes.at))
            self._forgotten.take(lanes)
            self._drop_all(lanes)

    def _pool(self, key: Key, lanes: Lanes) -> None:
        pool = self._anew.setdefault(key, Lanes())
        self._anew.move_to_end(key)
        pool.take(lanes)
        for lane in list(lanes.at.values()):
            lanes.remove(lane)
            # Loops hold prompts, and often make labels anew.
            lane.is_doubtful = bool(key[-1]) and not lanes.is_made_anew
            if (before := pool.put(lane, lane.expected)) is not None:
                self.drop(before)

    def _drop_all(self, lanes: Lanes) -> None:
        for lane in list(lanes.at.values()):
            self.drop(lane)


def _turn(key: Key, given: Tensor, step: int | None, lanes: Lanes, forgotten: Lanes, *, is_full: bool) -> Turn:
    """What a call of this step is, among these runs and those that were forgotten."""
    turn = Turn(key, given, step, lanes, None)
    known = lanes.runs + forgotten.runs + (step is not None and step + 1 in lanes.ends | forgotten.ends)
    only = next(iter(lanes.at.values()), None) if known == 1 else None
    if step == 0:
        is_end = only is not None and only.rises
        return turn._replace(lane=only if is_end else lanes.at.get(0), is_only=is_end, is_end=is_end)
    if step is not None and not forgotten.may_make(step) and (lane := lanes.next_of(step)):
        return turn._replace(lane=lane)
    if known > 1:
        why = UNPLANNED if step is None else None if is_full else ALIKE
        return turn._replace(lane=lanes.spare(step), why=why, is_alike=True)
    turn = turn._replace(lane=only, is_only=True)
    if step is None:
        return turn._replace(why=UNPLANNED)
    if only is None:
        return turn._replace(why=GAVE_WAY if lanes.gave_way else FRESH)
    if only.is_doubtful or not only.expected:
        return turn._replace(why=FRESH)
    return turn._replace(why=AGAIN if step < only.expected else LEFT_OUT)
