"""Reward functions that a run names. Nothing is imported that takes time."""

import os
import re
import signal
import sys
import threading
import time

import waiting


def small_ids(completion_ids: list[list[int]]) -> list[float]:
    """The share of tokens with an id below 100; stops at `waiting.at_the_gate`."""
    waiting.at_the_gate()
    return [sum(token < 100 for token in ids) / len(ids) for ids in completion_ids]


class Unspeakable(Exception):
    """An error that cannot be shown."""

    def __str__(self):
        raise RuntimeError("no text")

    __repr__ = __str__


class Unsendable(Exception):
    """An error that no other process can read."""

    def __init__(self, one, two):
        super().__init__(one)
        self.lock = threading.Lock()


def sleeps(completions):
    time.sleep(3600)


def spins(completions):
    while True:
        pass


def backtracks(completions):
    re.match(r"(a|a)*$", "a" * 60 + "b")
    return [0.0] * len(completions)


def powers(completions):
    return [float(9**9**9 % 7)] * len(completions)


def deaf(completions):
    for number in (signal.SIGTERM, signal.SIGINT):
        try:
            signal.signal(number, signal.SIG_IGN)
        except ValueError:  # not in a main thread
            pass
    time.sleep(3600)


def waits_for_itself(completions):
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def leaves(completions):
    sys.exit("reward leaves")


def leaves_with_0(completions):
    sys.exit(0)


def interrupts(completions):
    raise KeyboardInterrupt


def raises(completions):
    raise RuntimeError("reward raises")


def raises_without_text(completions):
    raise Unspeakable


def raises_what_cannot_be_sent(completions):
    raise Unsendable(1, 2)


def raises_much(completions):
    raise ValueError("x" * 10**8)


def recurses(completions):
    return recurses(completions)


def returns_none(completions):
    return None


def returns_text(completions):
    return "1" * len(completions)


def returns_too_few(completions):
    return [1.0] * (len(completions) - 1)


def returns_too_many(completions):
    return [1.0] * (len(completions) + 1)


def returns_nan(completions):
    return [float("nan")] * len(completions)


def returns_infinity(completions):
    return [float("inf")] * len(completions)


def returns_words(completions):
    return ["good"] * len(completions)


def returns_complex(completions):
    return [1j] * len(completions)


def returns_lists(completions):
    return [[1.0]] * len(completions)


def returns_forever(completions):
    while True:
        yield 1.0


def returns_a_function(completions):
    return [lambda: 1.0] * len(completions)


def allocates(completions):
    kept = []
    while True:
        kept.append(bytearray(64 * 2**20))


def prints(completions):
    while True:
        print("x" * 2**16)


# In a process of its own only: whoever does this in the trainer's is the trainer.


def ends_the_process(completions):
    os._exit(0)


def kills_the_process(completions):
    os.kill(os.getpid(), signal.SIGKILL)


def closes_everything(completions):
    os.closerange(3, 256)
    return [0.0] * len(completions)


def breaks_the_process(completions):
    import ctypes

    ctypes.string_at(0)
