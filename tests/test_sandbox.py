"""sandbox.py: programs at their worst; the caller lives, the verdict is right, nothing stays."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

import sandbox
from sandbox import LAYERS, Limits, run, run_all

REPO = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs run on Linux only")
SHORT = Limits(seconds=1.2, memory=400 << 20)
PATIENT = SHORT._replace(seconds=60)  # for what ends by itself, on a busy machine


def left_over(folder):
    """Living processes whose environment names the folder: what a sandbox in it has started."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.fsencode(folder) in Path(f"/proc/{name}/environ").read_bytes():
                found.append(name)
        except OSError:
            continue
    return found


@pytest.fixture
def place(monkeypatch):
    """Where the folders of programs are made; at the end none is there, and no process."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)
        assert not left_over(folder)
        assert not list(Path(folder).glob("sandbox-*"))


@pytest.fixture(scope="module")
def notes():
    """What this system cannot hold."""
    return " ".join(run("").notes)


# What each does ends in sys.exit(0) where it goes on at all: none may pass. The word is in `why`.
ATTACKS = {
    "exit": ("import sys; sys.exit(0)", "SystemExit"),
    "hard exit": ("import os; os._exit(0)", "exit code 0 before its last line"),
    "wrong": ("assert 1 + 1 == 3, 'no'", "AssertionError: no"),
    "no python": ("def f(:", "SyntaxError"),
    "zero byte": ("x = 1\0", "null bytes"),
    "half a pair": ("x = '\ud800'", "SyntaxError"),
    "too deep to compile": ("-" * 100_000 + "1", ""),
    "prompt": ("input('name? ')", "EOFError"),
    "infinite loop": ("while True: pass", "timed out after 1.2 s"),
    "loop that excepts": ("while True:\n try:\n  while True: pass\n except BaseException: pass",
                          "timed out"),
    "ignores signals": ("import signal, time\nfor s in range(1, 65):\n try: signal.signal(s, "
                        "signal.SIG_IGN)\n except (OSError, ValueError): pass\ntime.sleep(99)",
                        "timed out"),
    "memory": ("x = bytearray(10**10)", "MemoryError"),
    "memory bit by bit": ("x = []\nwhile True: x.append(bytearray(10**8))", "MemoryError"),
    "recursion": ("def f(): f()\nf()", "RecursionError"),
    "unlimited recursion": ("import sys; sys.setrecursionlimit(10**9)\n"
                            "class A:\n def __repr__(self): return repr(self)\nrepr(A())", ""),
    "big file": ("open('x', 'wb').write(bytes(50 << 20))", "File too large"),
    "many files open": ("x = [open('/dev/null') for _ in range(1000)]", "Too many open files"),
    "flood": ("while True: print('x' * 10_000)", "timed out"),
    "bad exception": ("class E(Exception):\n def __str__(self): raise self\nraise E()",
                      "cannot be printed"),
    "interrupt": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    "kills itself": ("import os; os.kill(os.getpid(), 9); import sys; sys.exit(0)", ""),
    "kills its group": ("import os; os.kill(0, 9); import sys; sys.exit(0)", ""),
    "kills everyone": ("import os, sys\nif os.getpid() == 1: os.kill(-1, 9)\nsys.exit(0)", ""),
    "closes all pipes": ("import os; os.closerange(0, 100)", ""),
    "stops": ("import os, signal; os.kill(os.getpid(), signal.SIGSTOP); import sys; sys.exit(0)",
              ""),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attack(place, name):
    program, word = ATTACKS[name]
    patient = word and "timed out" not in word
    outcome = run(program, PATIENT if patient else SHORT)
    assert not outcome.passed and word in outcome.why


def test_fork_bomb(place, notes):
    if "number of processes" in notes:
        pytest.skip("this system does not limit the processes of root")
    program = ("import os, sys, time\nforks = 0\nfor _ in range(100):\n try:\n"
               "  if os.fork() == 0: time.sleep(99)\n  forks += 1\n"
               " except BlockingIOError: pass\nprint(forks)\nsys.exit(0)")
    outcome = run(program, PATIENT._replace(processes=20))
    assert outcome.why == "SystemExit: 0" and not left_over(place)
    assert 0 < int(outcome.output) < 20
    assert run("while True:\n try: __import__('os').fork()\n except OSError: pass",
               SHORT._replace(processes=20)).why == "timed out after 1.2 s"


@pytest.mark.parametrize("layers", [LAYERS, ("user",), ("landlock",), ()], ids=repr)
def test_children_that_left_the_group_are_killed(place, layers):
    """Forked twice, sessions of their own, signals ignored, all descriptors closed."""
    program = ("import os, signal, time\nfor i in range(6):\n if os.fork() == 0:\n  os.setsid()\n"
               "  signal.signal(signal.SIGTERM, signal.SIG_IGN)\n  os.closerange(0, 64)\n"
               "  if os.fork() == 0:\n   os.setsid()\n   time.sleep(99)\n  time.sleep(99)\n"
               "time.sleep(0.2)\n")
    began = time.monotonic()
    assert run(program, PATIENT._replace(layers=layers)).passed
    assert not left_over(place) and time.monotonic() - began < 60


@pytest.mark.parametrize("target", ["os.getppid()", "-os.getpgid(os.getppid() or 0)", "parent"])
def test_parent_lives(place, notes, target):
    """Whatever number the program kills: its parent, its parent's group, or this very process."""
    if "can kill" in notes:
        pytest.skip("this system does not keep the programs from killing")
    program = f"import os, sys\nparent = {os.getpid()}\nos.kill({target}, 9)\nsys.exit(0)"
    assert not run(program, PATIENT).passed
    assert run("").passed


def test_a_supervisor_that_dies_is_a_verdict(place, monkeypatch):
    """As where nothing keeps a program from killing it."""
    kill = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    monkeypatch.setattr(sandbox, "__file__", str(place / "dies.py"))
    (place / "dies.py").write_text(kill)
    assert "supervisor" in run("").why


@pytest.mark.parametrize("act", [
    "open(path, 'w').write('yours')", "open(path, 'a').write('yours')", "os.truncate(path, 0)",
    "os.remove(path)", "os.rename(path, path + '2')", "os.symlink(path, 'l'); open('l', 'w')",
    "os.mkdir(path + '2')", "os.link(path, 'l')"])
def test_files_outside_are_unharmed(place, act):
    """Even of those that everyone may write."""
    if sandbox.landlock_version() < 3:
        pytest.skip("no Landlock, or one that lets files be truncated")
    outside = place / "outside"
    outside.mkdir()
    os.chmod(outside, 0o777)
    mine = outside / "file"
    mine.write_text("mine")
    os.chmod(mine, 0o666)
    outcome = run(f"import os\npath = {str(mine)!r}\n{act}", PATIENT)
    assert "PermissionError" in outcome.why or "Invalid cross-device" in outcome.why
    assert mine.read_text() == "mine" and os.listdir(outside) == ["file"]


def test_files_of_root_are_unharmed_without_landlock(place):
    if os.geteuid() or run("").notes:
        pytest.skip("for root where it can take another user")
    (place / "file").write_text("mine")
    outcome = run(f"open({str(place / 'file')!r}, 'w')", PATIENT._replace(layers=("user",)))
    assert "PermissionError" in outcome.why and (place / "file").read_text() == "mine"


@pytest.mark.parametrize("layers", [("namespaces",), ("landlock",)], ids=repr)
def test_no_network(place, layers):
    with socket.create_server(("127.0.0.1", 0)) as server:
        call = f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}))"
        if "the network is open to the programs" in run("", Limits(layers=layers)).notes:
            pytest.skip(f"no {layers[0]} against the network here")
        assert run(call, PATIENT._replace(layers=())).passed  # there is something to reach
        assert "Error: [Errno" in run(call, PATIENT._replace(layers=layers)).why


def test_cpu_time(place):
    outcome = run("while True: pass", PATIENT._replace(cpu_seconds=1))
    assert outcome.why == "used more than 1 s of CPU time"


def test_output_is_cut_and_kept(place):
    outcome = run("import sys\nprint('a' * 300_000)\nprint('b', file=sys.stderr)", Limits())
    assert outcome.passed and outcome.output == "a" * (1 << 16)
    assert run("print('hi'); 1 / 0").output == "hi\n"


# What a program is given, from inside; each line is a program that must pass.
GIVEN = {
    "empty folder of its own": "import os; assert os.listdir() == [] and 'sandbox-' in os.getcwd()",
    "folder to write to": "open('x', 'w').write('y'); assert open('x').read() == 'y'",
    "temporary files": "import tempfile\nwith tempfile.TemporaryFile() as f: f.write(b'x')",
    "little environment": "import os; assert 'SECRET' not in os.environ and len(os.environ) < 8",
    "no argument": "import sys; assert sys.argv == ['program']",
    "isolated": "import sys; assert sys.flags.isolated",
    "few descriptors": "import os; assert len(os.listdir('/proc/self/fd')) == 6",  # 1 lists them
    "null": "import sys; assert sys.stdin.read() == ''; open('/dev/null', 'w').write('x')",
    "module": "import dataclasses\n@dataclasses.dataclass\nclass A:\n x: 'int' = 3\n"
              "assert A().x == 3 and A.__module__ == __name__ != '__main__'",
    "pickle": "import pickle\nclass A: pass\nassert type(pickle.loads(pickle.dumps(A()))) is A",
    "threads": "import threading, time\nfor daemon in (True, False):\n"
               " threading.Thread(target=time.sleep, args=(99,), daemon=daemon).start()",
    "pool": "from concurrent.futures import ThreadPoolExecutor\n"
            "assert list(ThreadPoolExecutor(8).map(abs, [-1, 2])) == [1, 2]",
    "subprocess": "import subprocess, sys\n"
                  "assert subprocess.check_output([sys.executable, '-c', 'print(1)']) == b'1\\n'",
    "no stdout": "import os, sys; sys.stdout.close(); os.close(1); os.close(2)",
    "broken stdout": "import sys; sys.stdout = None",
    "at exit": "import atexit, time; atexit.register(time.sleep, 99)",
    "no way to become root": "import os\ntry: os.setuid(0)\nexcept OSError: pass\n"
                             "else: assert os.getuid() or not STRICT",
    "letters": "assert 'ä€😀'.encode() == b'\\xc3\\xa4\\xe2\\x82\\xac\\xf0\\x9f\\x98\\x80'",
}


@pytest.mark.parametrize("name", GIVEN)
def test_given(place, notes, monkeypatch, name):
    monkeypatch.setenv("SECRET", "x")
    program = GIVEN[name].replace("STRICT", str("processes" not in notes))
    assert run(program, PATIENT)[:2] == (True, "passed")


def test_the_folder_goes_whatever_is_in_it(place):
    program = ("import os\nos.mkdir('shut'); open('shut/x', 'w'); os.chmod('shut', 0)\n"
               "for _ in range(1050):\n os.mkdir('d'); os.chdir('d')\n")
    assert run(program, PATIENT).passed  # the fixture looks for the folder


FAKES = {
    "prints": "for word in ('passed', 'ok', '0', 'True'): print(word)",
    # Everything that the process shows of itself, written to every descriptor.
    "searches": "import gc, os, sys\nsaid = [open(f'/proc/self/{n}', 'rb').read() for n in "
                "('cmdline', 'environ')]\nframe = sys._getframe()\nwhile frame:\n"
                " for found in (frame.f_locals, frame.f_globals):\n"
                "  said += [str(v).encode()[:64] for v in found.values()]\n frame = frame.f_back\n"
                "said += [str(o).encode()[:64] for o in gc.get_objects() if type(o) in (tuple, "
                "list) and len(o) < 4]\nfor fd in range(64):\n try:\n  for s in said:\n"
                "   os.write(fd, s)\n except OSError: pass",
    "reads its source": "import inspect, sys\nopen(__file__).read()",
    "reads stdin": "import os\nos.lseek(0, 0, 0)\nassert not os.read(0, 99)",
    "forks and leaves": "import os\nif os.fork(): os._exit(0)\nimport time; time.sleep(0.1)",
}


@pytest.mark.parametrize("name", FAKES)
def test_success_cannot_be_claimed(place, name):
    """Only the end of the program counts."""
    assert not run(FAKES[name] + "\nimport sys; sys.exit(0)", PATIENT).passed


def test_run_all_keeps_the_order_and_runs_side_by_side(place):
    programs = [f"import time; time.sleep({0.1 * (4 - i)}); assert {i} % 2" for i in range(4)]
    seen = []
    outcomes = run_all(programs, PATIENT, 4, lambda each: (seen.append(o) or o
                                                                     for o in each))
    assert [o.passed for o in outcomes] == [False, True, False, True] and seen == outcomes
    began = time.monotonic()
    run_all(["import time; time.sleep(2)"] * 8, PATIENT, 8)
    assert time.monotonic() - began < 16


def test_a_sandbox_that_cannot_be_set_up_is_an_error_and_no_verdict(place):
    with pytest.raises(OSError, match="could not be set up"):
        run("", Limits(processes=-100_000))


def test_other_systems_are_refused(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(OSError, match="on Linux only"):
        run("")


def test_an_ordinary_user_is_protected_as_well(place):
    """For root: the same as somebody else, by a Python that everybody can reach."""
    python = "/usr/bin/python3"
    reachable = os.path.exists(python) and os.stat(REPO / "sandbox.py").st_mode & 0o004
    if os.geteuid() or not reachable or subprocess.run(
            [python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]).returncode:
        pytest.skip("for root, with a system's Python 3.11 at least")
    script = place / "user.py"
    script.write_text(f"""
import os, sys, time
sys.path.insert(0, {str(REPO)!r})
import sandbox
sandbox.become(sandbox.User(1_999_999_999, False))
for layers in (sandbox.LAYERS, ()):
    limits = sandbox.Limits(60, layers=layers)
    assert sandbox.run("assert 1 + 1 == 2", limits).passed
    held = sandbox.run("import os, time\\nwhile True:\\n try: os.fork()\\n except OSError: "
                       "time.sleep(0.01)", limits._replace(seconds=0.7))
    assert held.why == "timed out after 0.7 s", held
    assert sandbox.run("import os, time\\nif os.fork() == 0:\\n os.setsid(); time.sleep(99)",
                       limits).passed
    killed = sandbox.run("import os, sys; os.kill(os.getppid(), 9); sys.exit(0)", limits)
    assert not killed.passed
    assert layers or "supervisor" in killed.why
def mine():
    return [p for p, (_, uid, _) in sandbox.processes().items() if uid == os.getuid()
            and open(f"/proc/{{p}}/stat").read().rpartition(")")[2].split()[0] != "Z"]
end = time.monotonic() + 5  # the last program dies with its supervisor, a moment later
while mine() != [os.getpid()]:
    assert time.monotonic() < end, mine()
""")
    os.chmod(place, 0o777)
    done = subprocess.run([python, "-I", str(script)], env={"TMPDIR": "/tmp"}, text=True,
                          capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_command_line(place, capsys):
    with pytest.raises(SystemExit) as stop:
        sandbox.main(["--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and "NOT A SECURITY BOUNDARY" in said and "container" in said
    for text, code, words in (("print(1 + 1)", 0, "2\npassed\n"), ("1 / 0", 1, "ZeroDivision")):
        (place / "p.py").write_text(text)
        with pytest.raises(SystemExit) as stop:
            sandbox.main([str(place / "p.py"), "--seconds", "8"])
        assert stop.value.code == code and words in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        sandbox.main([str(place / "none.py")])
    assert stop.value.code == 2 and "none.py" in capsys.readouterr().err
