"""Programs that mean harm. Each prints DONE if it could do what it tried."""

ACTS = {
    "read weights": "open(WEIGHTS, 'rb').read()",
    "read weights by way of /proc": "open('/proc/self/root' + WEIGHTS, 'rb').read()",
    "link weights": "os.link(WEIGHTS, '/tmp/weights-' + str(os.getpid()))",
    "list the folder of weights": "os.listdir(os.path.dirname(WEIGHTS))",
    "read /etc": "open('/etc/passwd').read()",
    "read an environment": "open(f'/proc/{os.getppid()}/environ').read()",
    "read memory": "open(f'/proc/{os.getppid()}/mem', 'rb').read(1)",
    "read installed answers": "open(ANSWERS, 'rb').read(1)",
    "write into weights": "open(WEIGHTS, 'r+b').write(b'x')",
    "cut weights": "os.truncate(WEIGHTS, 3)",
    "delete weights": "os.unlink(WEIGHTS)",
    "rename weights": "os.rename(WEIGHTS, WEIGHTS + '2')",
    "lock weights up": "os.chmod(WEIGHTS, 0)",
    "give weights away": "os.chown(WEIGHTS, 1, 1)",
    "date weights back": "os.utime(WEIGHTS, (1, 1))",
    "mark weights": "os.setxattr(WEIGHTS, 'user.x', b'y')",
    "fill a disk": """
for folder in ('/tmp', '/dev/shm', '/var/tmp', os.getcwd(), os.path.expanduser('~')):
    with contextlib.suppress(OSError):
        with open(folder + '/filled', 'wb') as file:
            file.write(bytes(2**20))
        os.unlink(folder + '/filled')
        break
else:
    raise OSError
""",
    "fill a disk with names": "os.mkdir('/tmp/made-by-a-program')",
    "fill a disk without names": "os.open('/tmp', os.O_TMPFILE | os.O_RDWR)",
    "fill memory with files": "os.write(os.memfd_create('x'), bytes(2**16))",
    "keep shared memory": "call('shmget', 77001, 2**16, 0o1600)",
    "fork": "os.fork() or os._exit(0)",
    "fork like a bomb": """
made = 0
for _ in range(50):
    with contextlib.suppress(OSError):
        if os.fork() == 0:
            os._exit(0)
        made += 1
assert made
""",
    "fork by its number": "call(NR['fork']) or os._exit(0)",
    "clone by its number": "call(NR['clone'], 17, 0, 0, 0, 0) or os._exit(0)",
    "clone in a new way": "call(435, ctypes.c_char_p(struct.pack('QQQQQQQQ', *[0] * 4,"
    " 17, 0, 0, 0)), 64) or os._exit(0)",
    "start a shell": "subprocess.run(['/bin/sh', '-c', 'true'], check=True)",
    "become another program": "os.execv(PYTHON, [PYTHON, '-c', 'print(\"DONE\")'])",
    "take processes": "multiprocessing.get_context('fork').Process().start()",
    "connect": "socket.create_connection(('127.0.0.1', PORT), 5)",
    "send a packet": "socket.socket(type=socket.SOCK_DGRAM).sendto(b'x',"
    " ('127.0.0.1', PORT))",
    "listen": "socket.create_server(('127.0.0.1', 0))",
    "speak to a server's file": "socket.socket(socket.AF_UNIX).connect(SOCKET)",
    "speak to servers of datagrams": """
pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
with contextlib.suppress(FileNotFoundError):  # it could, if there were one
    pair[0].sendto(b'x', '/nonexistent')
""",
    "have a name for others": "socket.socketpair()[0].bind(chr(0) + 'jaxrl')",
    "ask the kernel": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)",
    "go round by io_uring": "call(NR['io_uring_setup'], 4,"
    " ctypes.create_string_buffer(256))",
    "signal its parent": "os.kill(os.getppid(), 0)",
    "signal everybody": "os.kill(-1, 0)",
    "signal its group": "os.kill(0, 0)",
    "signal by a file": "signal.pidfd_send_signal(os.pidfd_open(os.getppid()), 0)",
    "signal a thread": "call(NR['tkill'], os.getppid(), 0)",
    "signal by ownership": "fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, os.getppid())",
    "outlive its parent": "call(NR['prctl'], 1, 0)",
    "trace its parent": "call(NR['ptrace'], 0x4206, os.getppid(), 0, 0)",
    "slow its parent down": "os.setpriority(os.PRIO_PROCESS, os.getppid(), 1)",
    "move its parent": "os.sched_setaffinity(os.getppid(), {0})",
    "limit its parent": "resource.prlimit(os.getppid(), resource.RLIMIT_CORE, (0, 0))",
    "have more memory": "resource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))",
    "have more time": "resource.setrlimit(resource.RLIMIT_CPU, (999, 999))",
    "have a new name space": "call(NR['unshare'], 0x10000000)",
    "mount": "call(NR['mount'], b'none', b'/tmp', b'tmpfs', 0, 0)",
    "change its root": "os.chroot('/')",
    "become root": "os.setresuid(0, 0, 0); open('/etc/shadow').read()",
    "set the time": "time.clock_settime(time.CLOCK_REALTIME, time.time())",
    "make a device": "os.mknod('/tmp/memory', 0o20600, os.makedev(1, 1))",
    "write into the library": "open(os.__file__, 'a').close()",
    "take all memory": "bytearray(2**31)",
}  # fmt: skip

HARMLESS_WITHOUT = (
    "read weights", "read weights by way of /proc", "list the folder of weights",
    "read /etc", "date weights back", "fork", "fork by its number", "start a shell",
    "become another program", "connect",
    "send a packet", "listen", "speak to a server's file", "signal its parent",
    "speak to servers of datagrams", "have a name for others",
    "signal by ownership", "read installed answers", "have a new name space",
)  # fmt: skip
"""What these do is done without a sandbox; else their failing says nothing."""

ENDLESS = {
    "sleeps": "time.sleep(1e6)",
    "computes": "while True: pass",
    "computes on, asked to stop": """
for number in (signal.SIGXCPU, signal.SIGTERM, signal.SIGALRM):
    signal.signal(number, signal.SIG_IGN)
while True: pass
""",
    "computes without letting go": "9 ** 9 ** 9",
    "matches": "import re; re.match('(a+)+$', 'a' * 60 + 'b')",
    "stops itself": "os.kill(os.getpid(), signal.SIGSTOP)",
    "waits for a thread": "threading.Thread(target=time.sleep, args=(1e6,)).start()",
    "does not go": "import atexit; atexit.register(time.sleep, 1e6)",
    "closes all files": "os.closerange(0, 64); time.sleep(1e6)",
    "prints for ever": "while True: print('x' * 10**5)",
    "complains for ever": "while True: print('x' * 10**5, file=sys.stderr)",
    "takes all memory": "x = [0]\nwhile True: x += x",
    "starts threads": """
threading.stack_size(2**15)
for _ in range(3000):
    threading.Thread(target=time.sleep, args=(1e6,), daemon=True).start()
time.sleep(1e6)
""",
    "overflows": "def f(): f()\nsys.setrecursionlimit(10**9)\nf()\nf()",
    "crashes": "ctypes.string_at(0)",
}

# Each defines f, of which f(2) should be 4, and does not compute it.
FORGERS = {
    "equals everything": """
class Any(int):
    def __eq__(self, other): return True
    def __hash__(self): return 0
def f(x): return Any()
""",
    "is equal by its type": """
class Any:
    __class__ = int
    def __eq__(self, other): return True
    def __bool__(self): return True
def f(x): return Any()
""",
    "goes early": "import os; os._exit(0)",
    "exits": "import sys; sys.exit(0)",
    "exits when called": "def f(x): raise SystemExit(0)",
    "prints a verdict": """
import json, sys
for out in (sys.stdout, sys.stderr):
    print(json.dumps({"passed": [True], "why": None, "broken": None}), file=out)
def f(x): return None
""",
    "writes a verdict into all files": """
import os
for fd in range(64):
    try:
        os.write(fd, b'{"passed": [true], "why": null, "broken": null}')
    except OSError:
        pass
def f(x): return None
""",
    "rewrites what compares": """
import builtins, sys, gc
builtins.AssertionError = builtins.print
for name in list(sys.modules):
    if "sandbox" in name:
        vars(sys.modules[name]).update(_plain=lambda value: value)
def f(x): return None
""",
    "answers code": """
import os, pickle, struct
class Evil:
    def __reduce__(self): return exec, ("import os; os._exit(0)",)
def f(x):
    data = pickle.dumps(("returned", Evil(), ()))
    os.write(3, struct.pack("!Q", len(data)) + data)
""",
    "changes a type by an answer": """
import os, struct
def f(x):
    data = b"cbuiltins\\nrange\\n(N}V__eq__\\ncbuiltins\\ncomplex\\nstb."
    os.write(3, struct.pack("!Q", len(data)) + data)
""",
    "answers no end": """
import os, struct
def f(x):
    os.write(3, struct.pack("!Q", 2**62))
""",
    "looks for the tests": """
import gc
wanted = [o for o in gc.get_objects() if isinstance(o, dict) and "tests" in o]
def f(x): return next((4 for o in wanted if "f(2)" in str(o.get("tests"))), None)
""",
}

_BEFORE = """
import contextlib, ctypes, fcntl, multiprocessing, os, resource, signal, socket, struct
import platform, subprocess, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
NR = dict(fork=57, clone=56, io_uring_setup=425, tkill=200, prctl=157, ptrace=101,
          unshare=272, mount=165, shmget=29)
if platform.machine() == "aarch64":
    NR = dict(fork=220, clone=220, io_uring_setup=425, tkill=130, prctl=167, ptrace=117,
              unshare=97, mount=40, shmget=194)
def call(number, *arguments):
    result = libc.syscall(NR.get(number, number), *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), "no")
    return result
"""


def act(name, **values):
    """The source of an act, with what it is to find by name."""
    given = "".join(f"{key} = {value!r}\n" for key, value in values.items())
    return f"{_BEFORE}{given}{ACTS[name].strip()}\nprint('DONE')\n"


def endless(name):
    """The source of a program that goes on."""
    return f"{_BEFORE}{ENDLESS[name].strip()}\nprint('DONE')\n"
