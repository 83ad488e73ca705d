"""Bytes that a compiled program moves between devices, read from its HLO.

A loop's collectives count as often as the loop runs. The compiler may write one
collective several times, as its start, its fused middle and its end; all carry one
channel and count once.
"""

import math
import re

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_COLLECTIVE = re.compile(
    r" = (?P<type>.*?) (?P<kind>all-gather|all-reduce|reduce-scatter|all-to-all"
    r"|collective-permute|ragged-all-to-all|collective-broadcast)(-start)?\("
)
_CALLED = re.compile(
    r"(?:body|calls|to_apply|called_computation|true_computation"
    r"|false_computation)=%?([\w.-]+)"
)
_LISTED = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+))[a-z0-9]*\[([\d,]*)\]")


def received(text: str, num_devices: int) -> int:
    """Bytes that each device receives in one run of the program.

    Of g devices in a group each receives (g - 1) / g of what an all-gather or
    all-to-all makes, g - 1 times what a reduce-scatter leaves it, and 2 (g - 1) / g of
    what is all-reduced, as rings do. A loop whose condition has no number counts as
    one run.
    """
    lines = _computations(text)
    [entry] = [name for name, (is_entry, _) in lines.items() if is_entry]
    times: dict[str, int] = {}
    _count(entry, 1, lines, times)
    found: dict[str, int] = {}
    for name, runs in times.items():
        for line in lines[name][1]:
            match = _COLLECTIVE.search(line)
            if match:
                channel = re.search(r"channel_id=(\d+)", line)
                key = channel[1] if channel else f"{name} {line}"
                moved = runs * _bytes(match, line, num_devices)
                found[key] = max(found.get(key, 0), moved)
    return sum(found.values())


def _computations(text: str) -> dict[str, tuple[bool, list[str]]]:
    found: dict[str, tuple[bool, list[str]]] = {}
    body: list[str] = []
    for line in text.splitlines():
        start = _COMPUTATION.match(line)
        if start:
            body = []
            found[start[2]] = (start[1] is not None, body)
        else:
            body.append(line)
    return found


def _count(name: str, runs: int, lines, times: dict[str, int]) -> None:
    """Adds to `times` how often `name` and all that it calls run."""
    times[name] = times.get(name, 0) + runs
    for line in lines[name][1]:
        called = _CALLED.findall(line)
        for names in _LISTED.findall(line):
            called += [other.strip().lstrip("%") for other in names.split(",")]
        inner = runs * (_trips(line, lines) if " while(" in line else 1)
        for other in called:
            if other in lines:
                _count(other, inner, lines, times)


def _trips(line: str, lines) -> int:
    known = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', line)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%?([\w.-]+)", line)
    if condition is None:
        return 1
    limits = _limits(condition[1], lines) or _constants(condition[1], lines).values()
    return max([1, *limits])


def _limits(name: str, lines) -> list[int]:
    """Numbers that a scalar must be less than in `name` or in what it calls."""
    numbers, found = _constants(name, lines), []
    for line in lines[name][1]:
        less = re.search(r"= pred\[\]\S* compare\((.*?)\), direction=LT", line)
        names = re.findall(r"%([\w.-]+)", less[1]) if less else []
        found += [numbers[other] for other in names if other in numbers]
        for other in _CALLED.findall(line):
            found += _limits(other, lines) if other in lines else []
    return found


def _constants(name: str, lines) -> dict[str, int]:
    """Whole numbers in a computation, by the name of the instruction."""
    known = r"%([\w.-]+) = s32\[\]\S* constant\((\d+)\)"
    pairs = (re.search(known, line) for line in lines[name][1])
    return {pair[1]: int(pair[2]) for pair in pairs if pair}


def _bytes(match: re.Match, line: str, num_devices: int) -> int:
    sizes = [
        (8 if kind == "pred" else int(bits)) * math.prod(map(int, filter(None, dims)))
        // 8
        for kind, bits, dims in (
            (k, b, d.split(",")) for k, b, d in _ARRAY.findall(match["type"])
        )
    ]  # fmt: skip
    started, kind = match[3] is not None, match["kind"]
    # A start's result has its operands first; the last part is what it makes.
    size = max(sizes, default=0) if started else sum(sizes)
    group = _group_size(line, num_devices)
    match kind:
        case "all-gather" | "all-to-all" | "ragged-all-to-all":
            return size * (group - 1) // group
        case "all-reduce":
            return 2 * size * (group - 1) // group
        case "reduce-scatter":
            return size * (group - 1) if not started else size * (group - 1) // group
        case _:
            return size


def _group_size(line: str, num_devices: int) -> int:
    named = re.search(r"replica_groups=(?:@?\w*)?mesh\[(.*?)\] \{(.*?)\}", line)
    if named:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        axes = re.findall(r"'(\w+)'", named[2])
        return math.prod(int(sizes[axis]) for axis in axes)
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]", line)
    if iota:
        return int(iota[1])
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    return listed[1].count(",") + 1 if listed else num_devices
