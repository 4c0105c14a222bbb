"""A run of each mutant, and of each test that kills one without it."""

import itertools
import queue
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeVar

from bench.mutants.errors import MutationError
from bench.mutants.find import Mutant
from bench.mutants.tree import find_tests
from bench.mutants.worker import Run, Worker

TIMES = 10  # a test of a mutant may work so many times as long as it did before ...
LIMIT = 60.0  # ... or this many seconds of processor time, if it is new; so too what comes before and between tests
CANARY = "raise AssertionError('this file is seen')\n"

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Outcome(StrEnum):
    """What became of a mutant."""

    KILLED = "killed"
    TIMEOUT = "timeout"  # killed, by taking too long
    SURVIVED = "survived"
    BROKEN = "broken"  # pytest itself failed: nothing is known


@dataclass(frozen=True)
class Result:
    """A mutant, what became of it, and by which test."""

    mutant: Mutant
    outcome: Outcome
    seconds: float
    by: str
    tail: str


@dataclass
class Pace:
    """What is known of each test: how long it takes, and how many mutants of which function it has killed so far."""

    slack: float  # seconds
    seconds: dict[str, float] = field(default_factory=dict)
    kills: Counter[tuple[str, str, str]] = field(default_factory=Counter)  # of (file, function, test)
    sound: set[str] = field(default_factory=set)  # tests that are known to pass unmutated

    def limits(self, files: Sequence[str], mutant: Mutant) -> dict[str, float]:
        """The seconds that tests of these files may take; first those likely to kill the mutant, then the quickest."""
        tests = [test for test in self.seconds if test.partition("::")[0] in files]
        tests.sort(key=lambda test: (-self.kills[mutant.file, mutant.function, test], self.seconds[test]))
        return {test: self.slack + TIMES * self.seconds[test] for test in tests}

    def learn(self, mutant: Mutant, run: Run) -> None:
        """Keep the times of the tests that passed, and who killed the mutant."""
        for test, seconds in run.tests.items():
            if test != run.killer:
                self.seconds.setdefault(test, seconds)
        if run.killer is not None:
            self.kills[mutant.file, mutant.function, run.killer] += 1


def try_all(
    staff: Sequence[Worker], mutants: Sequence[Mutant], slack: float, tell: Callable[[str], None]
) -> list[Result]:
    """Run every mutant against its tests; ``tell`` hears of each as it ends.

    MutationError if a test that kills a mutant fails unmutated too, or if tests do not notice a file of theirs that
    can't be imported: then they run against other kernels than the copy's.
    """
    tree = staff[0].tree
    tests = {file: find_tests(tree, file) for file in dict.fromkeys(mutant.file for mutant in mutants)}
    pace = Pace(slack)
    place = itertools.count(1)

    def attempt(worker: Worker, mutant: Mutant) -> Result:
        result = _attempt(worker, mutant, tests[mutant.file], pace)
        tell(f"{next(place)}/{len(mutants)} {result.outcome:8} {result.seconds:6.1f} s {mutant.id} {result.by}")
        return result

    _each(staff, lambda worker, file: _check_import(worker, file, tests[file]), tests)
    return _each(staff, attempt, mutants)


def _each(staff: Sequence[Worker], do: Callable[[Worker, Item], Answer], items: Iterable[Item]) -> list[Answer]:
    """A map over items in which each call has a worker to itself."""
    idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
    for worker in staff:
        idle.put(worker)

    def with_worker(item: Item) -> Answer:
        worker = idle.get()
        try:
            return do(worker, item)
        finally:
            idle.put(worker)

    with ThreadPoolExecutor(len(staff)) as threads:
        try:
            return list(threads.map(with_worker, items))
        except BaseException:
            for worker in staff:
                worker.stop()  # the threads would wait for it
            raise


def _check_import(worker: Worker, file: str, tests: Sequence[str]) -> None:
    """See that a file's tests can be imported, and that they import it."""
    run = worker.run([*tests, "--collect-only"], {}, LIMIT)
    if run.status != 0:
        raise MutationError(f"{', '.join(tests)} can't be collected (status {run.status}); mend it first:\n{run.tail}")
    with worker.replaced(file, CANARY):
        run = worker.run([*tests, "--collect-only"], {}, LIMIT)
    if run.status == 0:
        raise MutationError(f"{', '.join(tests)} can be imported although {file} can't: it tests another one")


def _attempt(worker: Worker, mutant: Mutant, tests: Sequence[str], pace: Pace) -> Result:
    source = (worker.tree / mutant.file).read_text()
    with worker.replaced(mutant.file, mutant.applied(source)):
        run = worker.run(tests, pace.limits(tests, mutant), LIMIT)
    pace.learn(mutant, run)
    if run.killer is not None and run.killer not in pace.sound:
        _check_unmutated(worker, run.killer, pace)
    return Result(mutant, outcome_of(run), run.seconds, _ending(run), run.tail)


def _check_unmutated(worker: Worker, test: str, pace: Pace) -> None:
    """See that a test that killed a mutant passes without one."""
    run = worker.run([test], {}, LIMIT)
    if run.status != 0:
        raise MutationError(f"{test} does not pass unmutated (status {run.status}); mend it first:\n{run.tail}")
    pace.seconds.update(run.tests)
    pace.sound.add(test)


def outcome_of(run: Run) -> Outcome:
    """What a run of a mutant's tests says of it."""
    match run.status:
        case 0:
            return Outcome.SURVIVED
        case 1 | 2:  # a test failed, or could not be imported
            return Outcome.KILLED
        case status if status < 0:
            return Outcome.TIMEOUT if run.timed_out else Outcome.KILLED
    return Outcome.BROKEN


def _ending(run: Run) -> str:
    how = [signal.Signals(-run.status).name] if run.status < 0 else []
    return ", ".join([run.killer or "before any test", *how]) if run.status else ""
