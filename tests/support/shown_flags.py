"""The flags that a command line shows, and argument lists that use them."""

import ast
import itertools
import re

EXAMPLES = {
    "INT": "2",
    "FLOAT": "0.5",
    "SECONDS": "0.5",
    "STEPS": "2",
    "DATE": "2025-01-31",
    "VALUE": "1",
    "[VALUE, ...]": "[data]",
    "{KEY: VALUE}": "{}",
}


def spec(script):
    """What a completion script by tyro knows."""
    return ast.literal_eval(re.search(r"^COMPLETION_SPEC = (.*)$", script, re.M)[1])


def by_flag(found):
    """The options of a spec, or of a verb in one, by flag."""
    return {
        flag: option
        for option in found["options"]
        for flag in option["flags"]
        if flag not in ("-h", "--help")
    }


def is_switch(option):
    return option["type"] in ("flag", "boolean")


def all_used(options):
    """Argument lists that together use every flag, and every choice of each: in each
    list every option once."""
    ways = []
    for flags in dict.fromkeys(tuple(option["flags"]) for option in options.values()):
        option = options[flags[0]]
        shown, _, _ = option["description"].partition(" • ")
        word = re.split(r"[|\s]", shown.strip("[]").replace("{None}|", ""))[0]
        values = option.get("choices") or [EXAMPLES.get(word, "x")]
        named = [[flags[0], value] for value in values]
        ways.append([[flag] for flag in flags] if is_switch(option) else named)
    most = max(map(len, ways), default=1)
    return [
        list(itertools.chain.from_iterable(way[i % len(way)] for way in ways))
        for i in range(most)
    ]


def check_given(found, arguments):
    """Whether the values `found` by name are those that arguments give, each once."""
    for flag, word in itertools.pairwise([*arguments, "--"]):
        if flag[:2] != "--":
            continue
        name = flag[2:].replace("-", "_")
        switched = word[:2] == "--"
        if switched and name not in found:
            assert found[name.removeprefix("no_")] is False, flag
        elif switched:
            assert found[name] is True, flag
        else:
            value = found[name]
            words = [str(x) for x in (value if isinstance(value, tuple) else [value])]
            assert words == [word], flag
