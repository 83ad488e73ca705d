"""Bytes that each device receives, read from the text of a compiled program.

Counts what crosses between devices: of an all-to-all or all-gather over g devices the
share of g - 1, of a collective-permute what comes from another device.
"""

import math
import re

import numpy as np

_INSTRUCTION = re.compile(
    r"= (?P<type>\(.*?\)|\S+) (?P<op>all-to-all|all-gather|collective-permute"
    r"|all-reduce|reduce-scatter|collective-broadcast|ragged-all-to-all|send|recv)(-start)?\("
    r"(?P<rest>.*)"
)
_ARRAY = re.compile(r"(pred|[a-z]+\d+)\[([\d,]*)\]")


def received(text: str, num_devices: int) -> list[int]:
    total = [0] * num_devices
    for found in _INSTRUCTION.finditer(text):
        size = sum(_bytes(*array) for array in _ARRAY.findall(found["type"]))
        rest = found["rest"]
        match found["op"]:
            case "all-to-all" | "all-gather":
                for group in _groups(rest, num_devices):
                    for device in group:
                        assert size % len(group) == 0
                        total[device] += size * (len(group) - 1) // len(group)
            case "collective-permute":
                [pairs] = re.findall(r"source_target_pairs=\{(\{[\d,{}]*\})\}", rest)
                for source, target in re.findall(r"\{(\d+),(\d+)", pairs):
                    total[int(target)] += size if source != target else 0
            case other:
                raise AssertionError(f"{other} in a program of sends")
    return total


def _bytes(dtype: str, dims: str) -> int:
    bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
    return bits // 8 * math.prod(int(n) for n in dims.split(",") if n)


def _groups(rest: str, num_devices: int) -> list[list[int]]:
    listed = re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", rest)
    if listed:
        return [
            [int(d) for d in group.split(",")]
            for group in re.findall(r"\{([\d,]+)\}", listed[1])
        ]
    iota = re.search(
        r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest
    )
    assert iota, rest
    ids = np.arange(num_devices).reshape([int(n) for n in iota[3].split(",")])
    if iota[4]:
        ids = ids.transpose([int(n) for n in iota[4].split(",")])
    return ids.reshape(int(iota[1]), int(iota[2])).tolist()
