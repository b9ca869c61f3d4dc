"""What is done to which scenario, and when it is enough."""

import argparse
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from faults import damage
from faults.calls import ERRORS, FAULTS, KILL, STOPS, Fault
from faults.trials import Trials

Item = tuple[Trials, str, Callable[[], str]]
"""A scenario, the options that repeat what is done to it, and what does it."""

_FRESH = 10
_STOPS = (signal.SIGTERM, signal.SIGUSR1)

_CALLS_OF_TEN = 7
"""Of ten trials of a short run so many hit a call; the others take new processes, or a disk."""


def schedule(
    options: argparse.Namespace, trials: Sequence[Trials], rng: random.Random
) -> Iterator[Item]:
    """Yield what the options ask for; without any, whatever chance brings, for ever."""
    if options.sweep or options.call:
        yield from _sweep(options, trials)
    elif options.kills:
        yield from (_kill(one, rng) for one in trials for _ in range(options.kills))
    else:
        while True:
            yield _any(rng.choice(trials), rng)


def _sweep(options: argparse.Namespace, trials: Sequence[Trials]) -> Iterator[Item]:
    """Yield a kill and one of the errors, in turn, for every call."""
    part, parts = (int(word) for word in options.part.split("/"))
    for one in trials:
        for number in range(part, len(one.made) + 1, parts):
            if number in (options.call or [number]):
                faults = [KILL, ERRORS[number // parts % len(ERRORS)]]
                if options.fault:
                    faults = [FAULTS[name] for name in options.fault]
                yield from (_hit(one, number, fault) for fault in faults)


def _hit(one: Trials, number: int, fault: Fault) -> Item:
    return one, f"--call {number} --fault {fault.name}", partial(one.hit, number, fault)


def _kill(one: Trials, rng: random.Random) -> Item:
    """Return a SIGKILL at a random moment; of a command with workers at times to one process.

    One of ten is a new interpreter, the others fork. A fork's decoders hold its pipes open and
    would outlive it, so alone it is not killed.
    """
    fresh, workers = rng.randrange(_FRESH) == 0, one.name == "extract"
    only = rng.choice(["", "worker", *(["main"] if fresh else [])]) if workers else ""
    return one, f"--kills 1 {only}", partial(one.kill, rng, signal.SIGKILL, only, fresh)


def _any(one: Trials, rng: random.Random) -> Item:
    if one.made and rng.randrange(10) < _CALLS_OF_TEN:
        return _hit(one, rng.randint(1, len(one.made)), rng.choice([KILL, *STOPS, *ERRORS]))
    names = ["a kill", "a stop", *damage.possible(one)]
    name = rng.choice(names)
    if name == "a kill":
        return _kill(one, rng)
    if name == "a stop":
        return one, name, partial(one.kill, rng, rng.choice(_STOPS), "", False)
    return one, name, partial(damage.hurt, one, rng, name)
