"""Programs that try to get out of the sandbox, use up the machine, or pass tests that they fail.

Each knows, in `W`, the way to what it wants: a secret file and its descriptor, a process's number,
ports and sockets that listen, places to write. One that gets there prints ESCAPED, or leaves a
trace that `test_sandbox.py` looks for. What they may print is no test's right answer.
"""

READ = """
def show(path):
    try: print(open(path, errors="replace").read()[:10000])
    except Exception as error: print(type(error).__name__)
"""
SOCKET = """
import socket
def reach(family, address, kind=socket.SOCK_STREAM):
    try:
        s = socket.socket(family, kind); s.settimeout(1)
        s.connect(address); s.send(b"x"); print("ESCAPED")
    except Exception as error: print(type(error).__name__)
"""
CALL = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def call(*args):
    result = libc.syscall(*args)
    print("ESCAPED" if result >= 0 else os.strerror(ctypes.get_errno()))
"""

HARMLESS = {
    # Without a sandbox these succeed and hurt nobody: the control.
    "read_secret_file": READ + "show(W['secret_file'])",
    "read_the_checkout": READ + "show(W['checkout'] + '/pyproject.toml')",
    "read_others_environment": READ
    + """
import os
for pid in [p for p in (os.listdir("/proc") if os.path.isdir("/proc") else ["1"]) if p.isdecimal()]:
    if int(pid) >= W['pid']: show(f"/proc/{pid}/environ")
""",
    "walk_all_files_for_the_secret": """
import os
top = "/" if not os.path.isdir(W['folder']) else W['folder']
for folder, folders, files in os.walk(top):
    folders[:] = [f for f in folders if f[:7] != "python3" and folder + f != "/usrlib"]
    for name in files:
        try: text = open(os.path.join(folder, name), "rb").read(1000)
        except OSError: continue
        if b"top-" + b"secret" in text: print(text.decode(errors="replace"))
""",
    "inherited_descriptors_read": """
import os
for fd in range(3, 256):
    try: print(os.pread(fd, 1000, 0).decode(errors="replace"))
    except OSError: pass
""",
    "inherited_descriptors_write": """
import os
for fd in range(3, 256):
    try: os.write(fd, b"ESCAPED"); print("ESCAPED")
    except OSError: pass
""",
    "write_marker": "open(W['marker'], 'w').write('x'); print('ESCAPED')",
    "write_tmp_and_home": """
import os, pathlib
for place in ("/tmp", "/var/tmp", "/dev/shm", os.path.expanduser("~"), "/etc", "/box", "/", "."):
    try: p = pathlib.Path(place, W['name']); p.write_text("x"); p.unlink(); print("ESCAPED")
    except OSError as error: print(error.strerror)
""",
    "connect_tcp": SOCKET + "reach(socket.AF_INET, ('127.0.0.1', W['port']))",
    "connect_tcp6_mapped": SOCKET + "reach(socket.AF_INET6, ('::ffff:127.0.0.1', W['port']))",
    "connect_unix": SOCKET + "reach(socket.AF_UNIX, W['unix'])",
    "connect_abstract_unix": SOCKET + "reach(socket.AF_UNIX, '\\0' + W['abstract'])",
    "send_udp": SOCKET + "reach(socket.AF_INET, ('127.0.0.1', W['udp']), socket.SOCK_DGRAM)",
    "bind_a_port": """
import socket
try: s = socket.socket(); s.bind(("127.0.0.1", 0)); s.listen(); print("ESCAPED")
except OSError as error: print(error)
""",
    "connect_by_system_call": CALL + "call(41 if os.uname().machine == 'x86_64' else 198, 2, 1, 0)",
    "symlink_and_hardlink": READ
    + """
import os
for link in (os.symlink, os.link):
    try: link(W['secret_file'], W['folder'] + "/link-" + link.__name__); print("ESCAPED")
    except OSError as error: print(error.strerror)
    show(W['folder'] + "/link-" + link.__name__)
""",
    "dot_dot_and_proc_root": READ
    + """
for way in ("/../../../..", "/proc/self/root", "/proc/1/root", "/proc/self/cwd", "/usr/../.."):
    show(way + W['secret_file'])
""",
    "run_a_shell": """
import os, subprocess
try: print(subprocess.run(["/bin/sh", "-c", "cat " + W['secret_file']], capture_output=True).stdout)
except Exception as error: print(error)
try: os.execv("/bin/cat", ["cat", W['secret_file']])
except OSError as error: print(error)
""",
}

HARMFUL = {
    "fork_bomb": "import os\nwhile True:\n    os.fork()",
    "fork_bomb_that_goes_on": """
import os
while True:
    try: os.fork()
    except OSError: pass
""",
    "thread_bomb": """
import threading, time
for _ in range(10000):
    threading.Thread(target=time.sleep, args=(60,)).start()
print("ESCAPED")
""",
    "spawn_bomb": """
import subprocess, sys
for _ in range(100): subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("ESCAPED")
""",
    "memory_bomb": "x = bytearray(8 << 30); print('ESCAPED')",
    "memory_bomb_in_steps": "x = []\nwhile True: x.append(bytearray(1 << 20))",
    "memory_by_mmap": """
import mmap
kept = [mmap.mmap(-1, 64 << 20) for _ in range(64)]
for m in kept: m.write(b"x" * (64 << 20))
print("ESCAPED")
""",
    "memory_that_no_limit_counts": """
import ctypes, os
print("ESCAPED" if hasattr(os, "memfd_create") and os.memfd_create("x") >= 0 else "")
""",
    "infinite_loop": "while True: pass",
    "sleep_for_ever": "import time\ntime.sleep(10 ** 6)",
    "deaf_to_signals": """
import signal, time
for s in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}: signal.signal(s, signal.SIG_IGN)
while True: time.sleep(1)
""",
    "busy_in_c": "x = 9 ** 9 ** 9",
    "catastrophic_regex": "import re\nre.match(r'(a+)+$', 'a' * 60 + 'b')",
    "raise_the_limits": """
import resource
for name in ("AS", "CPU", "FSIZE", "NOFILE", "MEMLOCK"):
    what = getattr(resource, "RLIMIT_" + name)
    try: resource.setrlimit(what, (resource.RLIM_INFINITY,) * 2); print("ESCAPED")
    except Exception as error: print(error)
""",
    "output_flood": "while True: print('x' * 10000)",
    "error_flood": "import sys\nwhile True: sys.stderr.write('x' * 10000)",
    "output_of_odd_bytes": """
import sys
sys.stdout.buffer.write(b"\\x1b[2J\\x1b]0;title\\x07\\0\\xff\\xfe" * 10 + bytes(range(256)))
""",
    "huge_file": """
import os
for place in (W['marker'], "/tmp/x", "/dev/shm/x", "/box/x", "/x"):
    try:
        with open(place, "wb") as f: f.truncate(1 << 40); f.write(b"x" * (1 << 30))
        print("ESCAPED")
    except OSError as error: print(error.strerror)
""",
    "a_million_files": """
for n in range(1_000_000): open(f"{W['folder']}/n{n}", "w").close()
print("ESCAPED")
""",
    "read_shadow": READ + "show('/etc/shadow'); show('/etc/passwd'); show('/proc/1/environ')",
    "devices": """
import os
for name in ("mem", "kmem", "sda", "vda", "port", "kvm", "tty", "ptmx", "fuse", "net/tun"):
    try: os.open("/dev/" + name, os.O_RDWR); print("ESCAPED")
    except OSError as error: print(error.strerror)
""",
    "make_a_device": """
import os, stat
try: os.mknod("/box/mem", stat.S_IFCHR | 0o600, os.makedev(1, 1)); print("ESCAPED")
except OSError as error: print(error)
""",
    "kill_a_bystander": """
import os
for pid in (W['pid'], W['parent']):
    try: os.kill(pid, 9); print("ESCAPED")
    except OSError as error: print(error.strerror)
""",
    "kill_all": """
import os, signal
for pid in (-1, 0, 1, os.getppid()):
    try: os.kill(pid, signal.SIGKILL)
    except OSError as error: print(error.strerror)
""",
    "kill_init_and_parent_group": """
import os, signal
for pid in (1, os.getppid()):
    for s in (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM):
        try: os.kill(pid, s)
        except OSError as error: print(error.strerror)
try: os.killpg(W['parent'], 9); print("ESCAPED")
except OSError as error: print(error.strerror)
""",
    "ptrace": CALL
    + """
n = 101 if os.uname().machine == 'x86_64' else 117
call(n, 16, W['pid'], 0, 0); call(n, 16, 1, 0, 0)
""",
    "read_anothers_memory": CALL
    + """
n = 310 if os.uname().machine == 'x86_64' else 270
call(n, W['pid'], 0, 0, 0, 0, 0); call(n, 1, 0, 0, 0, 0, 0)
""",
    "own_memory_by_proc": """
try: open("/proc/self/mem", "r+b"); print("ESCAPED")
except OSError as error: print(error)
""",
    "daemon": """
import os, time
try:
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(3); open(W['marker'], "w").write("x")
        os._exit(0)
    print("ESCAPED")
except OSError as error: print(error)
""",
    "new_namespaces": CALL
    + """
for flag in (0x10000000, 0x00020000, 0x40000000, 0x20000000, 0x10020000): print(libc.unshare(flag))
call(272 if os.uname().machine == 'x86_64' else 97, 0x10000000)
call(435, 0, 0)
""",
    "mount": CALL
    + """
for place, kind in ((b"/usr", b"tmpfs"), (b"/box", b"proc")):
    print(libc.mount(b"none", place, kind, 0, None))
print(libc.mount(b"none", b"/", None, 32, None), libc.umount2(b"/usr/lib", 2))
call(165 if os.uname().machine == 'x86_64' else 40, b"none", b"/usr", b"tmpfs", 0, 0)
call(430, b"tmpfs", 0); call(428, -100, b"/", 1)
""",
    "chroot_and_pivot": CALL
    + """
try: os.chroot("/usr"); print("ESCAPED")
except OSError as error: print(error)
call(155 if os.uname().machine == 'x86_64' else 41, b"/usr", b"/usr/lib")
""",
    "become_root": """
import os
for step in (lambda: os.setuid(0), lambda: os.setgid(0), lambda: os.setresuid(0, 0, 0),
             lambda: os.setgroups([0])):
    try: step(); print("ESCAPED")
    except OSError as error: print(error)
""",
    "set_the_clock": """
import time
try: time.clock_settime(time.CLOCK_REALTIME, 0); print("ESCAPED")
except OSError as error: print(error)
""",
    "keyrings": CALL
    + "call(250 if os.uname().machine == 'x86_64' else 219, 0, -3, 1)\n"
    + "call(248 if os.uname().machine == 'x86_64' else 217, b'user', b'a', b'b', 1, -3)",
    "kernel_doors": CALL
    + """
x86 = os.uname().machine == 'x86_64'
for n in (425, 321 if x86 else 280, 298 if x86 else 241, 323 if x86 else 282, 304 if x86 else 265,
          29 if x86 else 194, 313 if x86 else 273, 434, 438, 303 if x86 else 264):
    call(n, 0, 0, 0, 0, 0)
""",
    "x32_numbers": CALL
    + """
if os.uname().machine != 'x86_64': raise SystemExit
call(0x40000000 + 41, 2, 1, 0)  # a filter that knows one numbering lets this pass
""",
    "calls_of_32_bits": """
import ctypes, mmap, os
if os.uname().machine != 'x86_64': raise SystemExit
code = b"\\xb8\\x02\\x00\\x00\\x00\\xcd\\x80\\xc3"  # mov eax, 2 (fork); int 0x80; ret
page = mmap.mmap(-1, 4096, prot=7); page.write(code)
where = ctypes.addressof(ctypes.c_char.from_buffer(page))
print("ESCAPED" if ctypes.CFUNCTYPE(ctypes.c_int)(where)() >= 0 else "")
""",
    "terminal_injection": """
import fcntl, termios
for fd in range(3):
    try: fcntl.ioctl(fd, termios.TIOCSTI, b"x"); print("ESCAPED")
    except OSError as error: print(error)
""",
    "dns_and_far_addresses": SOCKET
    + """
for name in ("localhost", "example.com"):
    try: print(socket.getaddrinfo(name, 80)); print("ESCAPED")
    except OSError as error: print(error)
reach(socket.AF_INET, ("127.0.0.53", 53)); reach(socket.AF_INET, ("192.0.2.1", 80))
""",
    "raw_and_netlink": SOCKET
    + """
for family, kind, protocol in ((17, 3, 768), (2, 3, 1), (16, 3, 0), (38, 5, 0), (40, 1, 0)):
    try: socket.socket(family, kind, protocol); print("ESCAPED")
    except OSError as error: print(error)
""",
    "crash_the_interpreter": "import ctypes\nctypes.string_at(0)",
    "deep_source": "(" * 100000,
    "deep_recursion_in_c": "import sys\nsys.setrecursionlimit(10**9)\ndef f(): return f()\nf()",
    "change_python_itself": """
import os, sys
ours = "/box/gearshift/rewards/sandbox_child/main.py"
for path in (os.__file__, sys.executable, ours, "/box/program.py"):
    for step in (lambda: open(path, "a").write("#"), lambda: os.chmod(path, 0o777),
                 lambda: os.utime(path), lambda: os.unlink(path), lambda: os.chown(path, 0, 0),
                 lambda: os.rename(path, path + "x"), lambda: os.setxattr(path, "user.x", b"x")):
        try: step(); print("ESCAPED", path)
        except OSError as error: print(error.strerror)
""",
    "own_input_and_output_files": """
import os
for fd in (0, 1, 2):
    try: print(os.pread(fd, 10000, 0))
    except OSError: pass
try: os.write(0, b"x"); os.ftruncate(1, 1 << 40); print("ESCAPED")
except OSError as error: print(error)
""",
}

CHEATS = {
    # The test is `assert f(3) == 9`, or asks for 9 on standard output: none of these knows it.
    "exit_before_the_tests": "import os\nos._exit(0)",
    "sys_exit_before_the_tests": "import sys\nsys.exit(0)",
    "exit_in_the_call": "import os\ndef f(x): os._exit(0)",
    "exit_in_the_call_softly": "def f(x): raise SystemExit(0)",
    "equal_to_all": """
class Yes(int):
    __eq__ = lambda *_: True
    __ne__ = lambda *_: False
    __hash__ = lambda *_: 0
def f(x): return Yes(5)
""",
    "equal_to_all_object": "class Yes:\n    __eq__ = lambda *_: True\ndef f(x): return Yes()",
    "patched_builtins": """
import builtins, sys
builtins.AssertionError = type("Fine", (BaseException,), {})
builtins.compile = builtins.exec = lambda *_, **__: None
builtins.len = builtins.sum = builtins.abs = lambda *_: 9
sys.excepthook = lambda *_: None
def f(x): return 0
""",
    "patched_json": """
import json, sys
json.loads = lambda *_: ["f", [3], {}]
json.dumps = lambda *_: '["value", true]'
sys.modules["json"] = json
def f(x): return 0
""",
    "answers_by_hand": """
import os
for fd in range(3, 32):
    for line in (b'["value", true]\\n', b'["passed"]\\n', b'{"exit-code": 0}\\n', b'0\\n'):
        try: os.write(fd, line)
        except OSError: pass
def f(x): return 0
""",
    "raises_its_way_out": """
class Unusable(Exception): pass
Unusable.__name__ = "UnusableError"
def f(x): raise Unusable("unusable")
""",
    "raises_an_exit": "class E(Exception): pass\nE.__name__ = 'SystemExit'\ndef f(x): raise E(0)",
    "looks_for_the_expected": """
import gc, sys
def f(x):
    frame = sys._getframe()
    while frame:
        for value in list(frame.f_locals.values()) + list(frame.f_globals.values()):
            if isinstance(value, str) and "==" in value and "assert" in value:
                return eval(value.split("==")[1])
        frame = frame.f_back
    for thing in gc.get_objects():
        if isinstance(thing, dict) and "expected" in thing: return thing["expected"]
    try: text = open("/box/tests.py").read()
    except OSError: return None
    return eval(text.split("==")[1])
""",
    "tests_in_files_and_arguments": """
import glob, os, sys
def f(x):
    for path in glob.glob("/*") + glob.glob("/*/*") + ["/proc/self/cmdline", "/proc/self/environ"]:
        try: text = open(path).read()
        except Exception: continue
        if "f(3)" + " ==" in text: return 9
    return 9 if any("9" in str(a) for a in sys.argv + list(os.environ.values())) else None
""",
    "endless_answer": """
import os
def f(x):
    while True:
        for fd in range(3, 8):
            try: os.write(fd, b"[" * 100000)
            except OSError: pass
""",
    "answer_too_deep": "def f(x):\n    r = []\n    for _ in range(900): r = [r]\n    return r",
    "huge_number": "def f(x): return 10 ** 10 ** 6",
    "not_a_number": "def f(x): return float('nan')",
    "hangs_in_the_call": "def f(x):\n    while True: pass",
    "prints_a_verdict": "print('ok passed 1/1 PASSED')\nprint('exit-code: 0')",
    "no_such_function": "g = 9",
}
