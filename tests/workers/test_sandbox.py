import contextlib
import importlib.util
import os
import pathlib
import resource
import socket
import sysconfig
import threading
import time

import hostile
import pytest
from waiting import until

from jaxrl_llm.workers.sandbox import jail, levels, programs
from jaxrl_llm.workers.sandbox.jail import Bounds, Jail, JailError, Part
from jaxrl_llm.workers.sandbox.levels import Sandbox, SandboxError
from jaxrl_llm.workers.sandbox.programs import (
    BrokenTests,
    Calling,
    Printing,
    calls,
    run,
    same_output,
    verdicts,
)

PATIENT = {"wall_s": 300.0, "cpu_s": 300.0}


def holds(level):
    try:
        levels.enclosure(Sandbox(level=level))
    except SandboxError as error:
        pytest.skip(str(error))
    return level


@pytest.fixture(scope="module", params=["bwrap", "landlock"])
def level(request):
    yield holds(request.param)
    programs.release()


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"secret")
    return path


@pytest.fixture
def found(weights, tmp_path):
    """What hostile programs look for: all of it is there."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        local = stack.enter_context(socket.socket(socket.AF_UNIX))
        local.bind(str(tmp_path / "server"))
        local.listen()
        yield {
            "WEIGHTS": str(weights),
            "ANSWERS": importlib.util.find_spec("jaxtyping").origin,
            "PYTHON": os.path.realpath("/proc/self/exe"),
            "PORT": server.getsockname()[1],
            "SOCKET": str(tmp_path / "server"),
        }


def about(path):
    found = path.stat()
    return found.st_mode, found.st_uid, found.st_nlink, found.st_mtime_ns


def test_no_hostile_program_does_what_it_means_to(level, found, weights):
    before = about(weights)
    sandbox = Sandbox(level=level, jobs=2, **PATIENT)

    def tried(runner, name):
        return name, runner.run(hostile.act(name, **found), "", float("inf"))

    outcomes = programs.each(tried, list(hostile.ACTS), sandbox)
    for name, ran in outcomes:
        assert b"DONE" not in ran.stdout, name
        assert not ran.why, f"{name}: {ran.why}"  # it was refused, not lost or late
        assert b"SyntaxError" not in ran.stderr and b"NameError" not in ran.stderr, name
    assert weights.read_bytes() == b"secret"
    assert about(weights) == before
    assert run("print(1)", "", sandbox).stdout == b"1\n"


def test_the_same_programs_do_it_without_a_sandbox(found):
    sandbox = Sandbox(level="none", jobs=2, **PATIENT)

    def tried(runner, name):
        return name, runner.run(hostile.act(name, **found), "", float("inf"))

    for name, ran in programs.each(tried, hostile.HARMLESS_WITHOUT, sandbox):
        assert b"DONE" in ran.stdout, (name, ran.stderr)
    programs.release()


@pytest.mark.slow
def test_whatever_does_not_end_is_ended(level):
    sandbox = Sandbox(level=level, jobs=5, cpu_s=1.0, wall_s=0.25, output_mib=1.0)

    def tried(runner, name):
        return name, runner.run(hostile.endless(name), "", float("inf"))

    start = time.monotonic()
    for name, ran in programs.each(tried, list(hostile.ENDLESS), sandbox):
        assert ran.why or ran.status, name
        assert b"DONE" not in ran.stdout, name
        assert len(ran.stdout) + len(ran.stderr) < 2**22, name
    assert time.monotonic() - start < 60.0
    assert run("print(1)", "", sandbox).stdout == b"1\n"
    programs.release()
    assert not list(children())


def children():
    """The command lines of this process' children that run jails."""
    for thread in pathlib.Path("/proc/self/task").iterdir():  # each has its own
        with contextlib.suppress(OSError):
            for pid in (thread / "children").read_text().split():
                line = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
                if b"told = json.loads" in line:
                    yield line


def test_no_verdict_can_be_forged(level):
    sandbox = Sandbox(level=level, jobs=2, wall_s=20.0)
    tests = Calling(tests=("assert f(2) == 4",))
    sources = {"right": "def f(x): return x * 2", **hostile.FORGERS}
    found = verdicts([(source, tests) for source in sources.values()], sandbox)
    passed = {
        name: verdict.passed for name, verdict in zip(sources, found, strict=True)
    }
    assert passed == {name: int(name == "right") for name in sources}


def test_a_program_that_kills_its_jail_has_failed_and_the_next_one_runs():
    sandbox = Sandbox(level="none", jobs=1)  # elsewhere it cannot
    ran = run("import os; os.kill(os.getppid(), 9)", "", sandbox)
    assert "the jail has ended" in ran.why
    assert run("print(1)", "", sandbox).stdout == b"1\n"
    programs.release()


def test_a_program_reads_and_prints(level):
    sandbox = Sandbox(level=level, jobs=1)
    source = (
        "import sys\nprint(int(input()) + 1)\nprint('e', file=sys.stderr)\nsys.exit(3)"
    )
    ran = run(source, "41\n", sandbox)
    assert (ran.stdout, ran.stderr, ran.status) == (b"42\n", b"e\n", 3)
    assert "took too long" in run("while True: pass", "", sandbox, time.monotonic()).why


def test_a_program_may_use_asyncio(level):
    source = "import asyncio\nasync def f(): print(await asyncio.sleep(0, 3))\n"
    ran = run(f"{source}asyncio.run(f())", "", Sandbox(level=level, jobs=1))
    assert ran.stdout == b"3\n"


def test_every_run_is_the_same_and_none_sees_another(level):
    sandbox = Sandbox(level=level, jobs=1)
    source = (
        "import random, math\n"
        "print(random.random(), hash('x'), getattr(math, 'left', None))\nmath.left = 1"
    )
    assert len({run(source, "", sandbox).stdout for _ in range(3)}) == 1


def test_printing_is_judged_word_by_word(level):
    sandbox = Sandbox(level=level, jobs=2)
    doubles = "n = float(input())\nprint(n * 2 if n < 4 else 'no')"
    tests = Printing(inputs=("1", "4", "3"), outputs=("2\n", "8", "6.00"))
    (first,) = verdicts([(doubles, tests)], sandbox)
    assert (first.passed, first.of) == (1, 3)
    assert first.why == "test 1: printed 'no\\n', not '8'"
    (every,) = verdicts([(doubles, tests)], sandbox, all_tests=True)
    assert every.passed == 2
    (failed,) = verdicts([("print(1/0)", tests)], sandbox)
    assert "ZeroDivisionError" in failed.why
    assert verdicts([(doubles, tests)], sandbox, until=0.0) == [None]


@pytest.mark.parametrize(
    "found, wanted, same",
    [
        ("1 2\n", "1  2", True),
        ("1.0", "1", True),
        ("1e0", "1", True),
        ("1 2", "1", False),
        ("nan", "nan", True),
        ("nan", "NaN", False),
        ("Yes", "YES", False),
        ("", "", True),
    ],
)
def test_outputs_are_the_same_up_to_space_and_ways_of_writing(found, wanted, same):
    assert same_output(found, wanted) == same


CLASSES = """
class Stack:
    def __init__(self): self.values = []
    def push(self, value): self.values.append(value)
    def __len__(self): return len(self.values)
    def __contains__(self, value): return value in self.values

def numbers():
    n = 0
    while True:
        yield n
        n += 1

def few(): yield from range(2)

def grow(values, more): values.append(more); return {"n": len(values)}

def fails(x): raise KeyError(x)

def first(pairs, key=None): return [p for p in pairs if key is None or p[0] == key][0]
"""


def test_tests_use_what_a_program_defines_as_if_it_were_theirs(level):
    tests = (
        "s = Stack()\ns.push((1, 'a'))\nassert len(s) == 1 and (1, 'a') in s",
        "assert s.values == [(1, 'a')] and s != Stack() and s == s",
        "g = numbers()\nassert [next(g), next(g)] == [0, 1]",
        "assert list(few()) == [0, 1]",
        "assert list(zip(numbers(), 'ab')) == [(0, 'a'), (1, 'b')]",
        "v = [1]\nassert grow(v, 2) == {'n': 2} and v == [1, 2]",
        "try:\n    fails(1)\n    assert False\nexcept KeyError:\n    pass",
        "def inner():\n    assert first([(1, 2.5), (2, {3})], 2) == (2, {3})\ninner()",
        "assert helper(2) == 3",
    )
    given = Calling(setup="def helper(x): return x + 1", tests=tests)
    (verdict,) = verdicts([(CLASSES, given)], Sandbox(level=level), all_tests=True)
    assert (verdict.passed, verdict.of, verdict.why) == (len(tests), len(tests), None)


def test_functions_and_the_class_solution_are_called_with_plain_arguments(level):
    tests = calls("add", [[1, 2], [[1], [2]]], [3, [1, 2]])
    sources = [
        "def add(a, b): return a + b",
        "class Solution:\n    def add(self, a, b): return (1, 2) if a != 1 else 3",
        "def add(a, b): return a",
        "x = 1",
    ]
    found = verdicts([(s, tests) for s in sources], Sandbox(level=level))
    assert [v.passed for v in found] == [2, 2, 0, 0]
    assert "NameError: name 'add' is not defined" in found[3].why


@pytest.mark.parametrize(
    "tests, cause",
    [
        (Calling(tests=("assert f(",)), "SyntaxError"),
        (Calling(tests=("import no_such_module",)), "No module named 'no_such_module'"),
        (Calling(setup="1 / 0", tests=("f(1)",)), "ZeroDivisionError"),
        (Calling(tests=("assert f(lambda: 1)",)), "gives the program a function"),
    ],
)
def test_tests_that_fail_by_themselves_are_an_error(tests, cause, level):
    with pytest.raises(BrokenTests, match=cause):
        verdicts([("def f(x): return x", tests)], Sandbox(level=level))


def test_tests_of_a_built_in_name_are_about_the_program_s(level):
    tests = Calling(setup="import math", tests=("assert math.isclose(sum(10, 15), 6)",))
    right, wrong = "def sum(a, b): return 6", "def sum(a, b): return 7"
    by_name = calls("sum", [[10, 15]], [6])
    forged = Calling(tests=("assert abs(f(2) - 4) < 1", "assert all([f(2) == 4])"))
    hijacks = "abs = lambda x: 0\nall = lambda x: True\ndef f(x): return 9"
    jobs = [(source, tests) for source in (right, wrong, "def f(): pass", "1 / 0")]
    jobs += [(right, by_name), (wrong, by_name), (hijacks, forged)]
    found = verdicts(jobs, Sandbox(level=level), all_tests=True)
    assert [verdict.passed for verdict in found] == [1, 0, 0, 0, 1, 0, 0]


def test_what_a_program_returned_to_an_earlier_test_is_its_own_failure(level):
    tests = Calling(tests=("r = f()", "assert r + 1 == 2"))
    (found,) = verdicts([("def f(): pass", tests)], Sandbox(level=level))
    assert (found.passed, found.of) == (1, 2) and "TypeError" in found.why


def test_what_a_program_breaks_in_the_set_up_is_its_own_failure(level):
    tests = Calling(setup="x = f(1) + 1", tests=("assert x == 2",))
    found = verdicts([("def f(x): pass", tests), ("1/0", tests)], Sandbox(level=level))
    assert [v.passed for v in found] == [0, 0]


def test_a_library_is_read_where_its_folder_is_and_not_once_more(monkeypatch, tmp_path):
    """A link of a folder that is read, to a place that is not, cannot be made anew."""
    (tmp_path / "libpython3.so").touch()
    folders = [p for p in jail.system_libraries() if os.path.isdir(p)]
    for place, besides in ((folders[0], []), (tmp_path, ["libpython3.so"])):
        known = {
            "LIBDIR": str(place),
            "MULTIARCH": sysconfig.get_config_var("MULTIARCH"),
        }
        monkeypatch.setattr(sysconfig, "get_config_var", known.get)
        files = set(jail.system_libraries()) - {*folders, "/etc/ld.so.cache"}
        assert files == {str(tmp_path / name) for name in besides}
        monkeypatch.undo()


def test_auto_takes_the_first_level_that_holds(monkeypatch):
    name = levels.enclosure(Sandbox()).name
    assert name == "bwrap" if holds("bwrap") else "landlock"
    monkeypatch.setattr(levels, "_weakness", lambda found: "was tried and failed")
    monkeypatch.setattr(levels, "_found", {})
    with pytest.raises(SandboxError, match="bwrap: was tried.*landlock: .*level: none"):
        levels.enclosure(Sandbox())
    with pytest.raises(SandboxError, match="sandbox.level is bwrap"):
        levels.enclosure(Sandbox(level="bwrap"))


def test_the_probe_finds_what_a_program_could_do(weights, tmp_path):
    source = levels._PROBE.format(path=str(weights), folder=str(tmp_path))
    found = run(source, "", Sandbox(level="none")).stdout.decode()
    for name in (
        "read others' files",
        "start a process",
        "open a socket",
        "send to local servers",
    ):
        assert name in found
    programs.release()


def test_a_line_says_where_programs_run(level):
    line = levels.describe(Sandbox(level=level))
    assert f"sandbox level {level}" in line and "seccomp" in line
    assert "may read, write" in levels.describe(Sandbox(level="none"))


def test_leaving_early_ends_what_runs():
    programs.release()  # what other tests have left to wait
    sandbox = Sandbox(level="none", jobs=1, wall_s=30.0)
    levels.enclosure(sandbox)

    def work(runner, _):
        return runner.run("import time; time.sleep(1e6)", "", float("inf"))

    def stop():
        until(lambda: any(children()))  # and this thread waits for it
        os.kill(os.getpid(), 2)

    threading.Thread(target=stop).start()
    with pytest.raises(KeyboardInterrupt):
        programs.each(work, [1], sandbox)
    assert not list(children())


def test_jails_start_where_many_files_are_open():
    programs.release()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 4400:
        pytest.skip("so many files cannot be opened here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4400), hard))
    with contextlib.ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        for _ in range(4200):
            stack.callback(os.close, os.open("/dev/null", os.O_RDONLY))
        source = "import os\nprint(sorted(os.listdir('/proc/self/fd')))"
        ran = run(source, "", Sandbox(level="none", jobs=1))
        assert ran.stdout == b"['0', '1', '2', '3']\n"  # the last lists them
        programs.release()


def test_a_jail_that_is_closed_while_it_starts_does_not_stay():
    programs.release()
    jail = Jail(levels.enclosure(Sandbox(level="none")))
    jail.close()
    with pytest.raises(JailError):
        jail.run([Part(payload={"mode": "run", "source": ""})], Bounds(), float("inf"))
    assert not list(children())
