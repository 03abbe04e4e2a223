"""Runs a program that a model wrote and says whether it came to its end.

    python sandbox.py PROGRAM.py        the verdict on one file

A program passes when its last line was reached without an exception: neither sys.exit(0) before
the tests nor any text on stdout counts.

NOT A SECURITY BOUNDARY. It is made for the accidents of code that nobody has read. For a model
that you do not trust run all of eval.py in a container or a virtual machine that holds nothing of
value. What a program gets, and what holds it (Linux only):

    wall time, CPU time, memory,      limits of the kernel; memory, CPU time and file size are those
    file size, open files, processes  of each process, not of all together
    its own empty folder              removed afterwards; the only place that it can write to, where
                                      Landlock is there (Linux 5.13) or it runs as another user
    no stdin, hardly an environment   input() finds the end of the file
    no network                        where namespaces are there (else no TCP, from Linux 6.7 on)
    no other processes                cannot signal those outside and is killed with all it started,
                                      where namespaces are there or it runs as another user
    another user                      one of its own for each program, if this is started by root

What a system lacks is said in `notes`. Nothing here protects from: reading any file that you can
read (as root: any file); filling the disk with many files; using much memory in many processes at
once; changing the mode or times of your files, where this is not started by root; flaws of the
kernel; and code that cheats on purpose, for it runs in one process with its tests: it can return
objects that equal everything, or search its process for the way to report success.
"""

# Few, and others where they are used: the supervisor is started for every program.
import ctypes
import fcntl
import json
import os
import resource
import select
import signal
import struct
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, NamedTuple

# What holds a program beyond the limits of the kernel, where the system has it.
LAYERS = ("user", "namespaces", "landlock")


class Limits(NamedTuple):
    """What one program may use."""

    seconds: float = 10.0  # wall time
    cpu_seconds: int = 11  # of each process
    memory: int = 2 << 30  # bytes of address space, of each process
    processes: int = 32  # threads count, too
    file_bytes: int = 16 << 20  # of each file
    files: int = 64  # open at once
    output: int = 1 << 16  # bytes of stdout and stderr that are kept
    layers: tuple[str, ...] = LAYERS  # fewer only to try what remains without them


class Outcome(NamedTuple):
    passed: bool
    why: str  # "passed", the exception, the time limit, the signal
    output: str = ""  # the beginning of stdout and stderr
    notes: tuple[str, ...] = ()  # what this system could not hold


def run(program: str, limits: Limits = Limits()) -> Outcome:  # noqa: B008
    """Run the text of a program by itself; it passes when it reaches its end.

    Raises OSError where this is not Linux, and where a limit cannot be set.
    """
    import subprocess
    import tempfile

    if sys.platform != "linux":
        raise OSError("programs of a model are run on Linux only")
    folder = tempfile.mkdtemp(prefix="sandbox-")
    request = json.dumps({"program": program, "folder": folder, "limits": limits}).encode()
    # A small process of its own: forking this one would share its memory, threads and GPU.
    supervisor = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, SUPERVISE], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, env={})
    try:
        answer, error = supervisor.communicate(request, limits.seconds + 20)
    except subprocess.TimeoutExpired:  # it was stopped
        answer = error = b""
    finally:
        supervisor.kill()  # nothing happens to one that has ended
        supervisor.communicate()
        remove(folder)
    if error:  # its own, as where no process can be started
        raise OSError(error.decode(errors="replace").strip().splitlines()[-1])
    if not answer:
        return Outcome(False, "the program killed or stopped its supervisor")
    passed, why, output, notes = json.loads(answer)
    return Outcome(passed, why, output, tuple(notes))


def run_all(programs: list[str], limits: Limits = Limits(),  # noqa: B008
            jobs: int | None = None, progress: Callable[[Iterable], Iterable] = iter
            ) -> list[Outcome]:
    """Run the programs, `jobs` at a time (default: one for each core), in their order.

    `progress` is handed the iterable of outcomes, as tqdm is.
    """
    from concurrent.futures import ThreadPoolExecutor

    pool = ThreadPoolExecutor(jobs or os.cpu_count())
    try:
        return list(progress(pool.map(lambda program: run(program, limits), programs)))
    finally:
        pool.shutdown(cancel_futures=True)


def remove(folder: str) -> None:
    """Take a folder away, whatever modes and depth a program gave to what is in it."""
    import subprocess

    try:
        os.rmdir(folder)
    except OSError:
        for command in (["chmod", "-R", "u+rwx"], ["rm", "-rf"]):
            subprocess.run([*command, "--", folder], stderr=subprocess.DEVNULL, check=False)


# ---------------------------------------------------------------------------- inside the program

# The random token waits unread in a pipe until the end, so that no variable, argument or file of
# the process holds it; the numbers of the two pipes are random, too. The program is a module of
# another name than __main__, as in EvalPlus: what stands under that test is not run.
RUNNER = """
import os, sys, types

def main():
    read, write, leave = os.read, os.write, os._exit
    with open(0, "rb") as file:
        token, verdict = map(int, file.readline().split())
        program = file.read()
    os.open(os.devnull, os.O_RDONLY)  # becomes 0
    sys.argv = ["program"]
    sys.modules["program"] = module = types.ModuleType("program")
    try:
        exec(compile(program, "program", "exec"), module.__dict__)
    except BaseException as error:
        try:
            said = f"{type(error).__name__}: {error}"
        except BaseException:
            said = "an exception that cannot be printed"
        report = said.encode(errors="replace")[:500]
    else:
        report = read(token, 64)
    try:
        sys.stdout.flush()
    except BaseException:
        pass  # closed by the program
    write(verdict, report)
    leave(0)  # waits for no thread

main()
"""


# -------------------------------------------------------------------------------- the supervisor

SUPERVISE = "--supervise"  # the argument that makes this file the supervisor; not for users

# From linux/sched.h, prctl.h, capability.h and landlock.h; os.unshare needs Python 3.12.
CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 1 << 27, 1 << 28, 1 << 29, 1 << 30
PR_SET_PDEATHSIG, PR_SET_KEEPCAPS, PR_CAPBSET_READ, PR_SET_CHILD_SUBREAPER = 1, 8, 23, 36
PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE = 38, 47, 2
CAP_DAC_READ_SEARCH = 2
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446  # system calls


def libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def checked(result: int) -> int:
    """The result of a system call; OSError where it failed."""
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def prctl(option: int, *values: int) -> int:
    longs = [ctypes.c_ulong(v) for v in (*values, 0, 0, 0, 0)[:4]]
    return checked(libc().prctl(option, *longs))


class User(NamedTuple):
    uid: int
    reads_all: bool  # by a capability: interpreter or folder lies where only root can read


def user_of_its_own(folder: str) -> User | None:
    """A user that no other process has, where root starts this and can make one; it keeps nothing
    of root's, but where it must to reach interpreter and folder the capability to read."""
    if os.geteuid():
        return None
    uid = 2_000_000_000 + os.getpid()  # above the ranges of people, services and containers
    try:
        os.seteuid(uid)
    except OSError:
        return None
    reaches = all(os.access(path, os.R_OK, effective_ids=True)
                  for path in (sys.executable, os.__file__, os.path.dirname(folder)))
    os.seteuid(0)
    if reaches or prctl(PR_CAPBSET_READ, CAP_DAC_READ_SEARCH):
        return User(uid, not reaches)
    return None


def become(user: User) -> None:
    """Give up root for good."""
    os.setgroups([])
    os.setresgid(user.uid, user.uid, user.uid)
    prctl(PR_SET_KEEPCAPS, int(user.reads_all))
    os.setresuid(user.uid, user.uid, user.uid)
    if user.reads_all:
        bit = 1 << CAP_DAC_READ_SEARCH
        header = struct.pack("=Ii", 0x20080522, 0)
        checked(libc().capset(header, struct.pack("=6I", bit, bit, bit, 0, 0, 0)))
        prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_DAC_READ_SEARCH)


def enter_namespaces() -> bool:
    """No network, and process numbers of their own, for what is forked from here; False where the
    system does not let us. An ordinary user needs a namespace of users for that."""
    uid, gid = os.geteuid(), os.getegid()
    flags = CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET | (CLONE_NEWUSER if uid else 0)
    if libc().unshare(flags) < 0:
        return False
    if uid:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"),
                           ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    return True


def landlock_version() -> int:
    """0 where the kernel has none."""
    return max(0, libc().syscall(LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1))


def landlock(version: int) -> None:
    """Let this process write nowhere but in the folder that it is in; no TCP (version 4), and no
    signals to processes outside (version 6)."""
    write = 0b1_1111_1111_0010  # write a file; remove and make entries of every kind
    write |= (1 << 13) * (version >= 2) | (1 << 14) * (version >= 3)  # rename across, truncate
    handled = struct.pack("=QQQ", write, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    rules = checked(libc().syscall(LANDLOCK_CREATE, handled, ctypes.c_size_t(size), 0))
    for path, rights in ((".", write), (os.devnull, 1 << 1)):
        place = os.open(path, os.O_PATH)
        rule = struct.pack("=Qi", rights, place)
        checked(libc().syscall(LANDLOCK_ADD, rules, 1, rule, 0))
        os.close(place)
    checked(libc().syscall(LANDLOCK_RESTRICT, rules, 0))
    os.close(rules)


def processes() -> dict[int, tuple[int, int, int]]:
    """(parent, owner, number of threads) of every process."""
    found = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
            found[int(name)] = int(fields[1]), os.stat(f"/proc/{name}").st_uid, int(fields[17])
        except (OSError, IndexError):  # it has ended meanwhile
            continue
    return found


class Sandbox(NamedTuple):
    """What holds the program on this system."""

    folder: str
    limits: Limits
    user: User | None
    namespaces: bool
    landlock: int  # its version; 0: none
    others: int  # threads of other programs that the limit of processes counts

    @property
    def notes(self) -> tuple[str, ...]:
        said = []
        if not (self.namespaces or self.landlock >= 4):
            said.append("the network is open to the programs")
        elif not self.namespaces:
            said.append("the network is open to the programs, but for TCP")
        if not (self.landlock or self.user):
            said.append("files outside of their folder are protected by their modes alone")
        if not (self.namespaces or self.user or self.landlock >= 6):
            said.append("the programs can kill other processes of this user")
        if not (self.user or os.geteuid()):
            said.append("the number of processes is not limited, since this is root")
        return tuple(said)


def sandbox_of(folder: str, limits: Limits) -> Sandbox:
    user = user_of_its_own(folder) if "user" in limits.layers else None
    namespaces = "namespaces" in limits.layers and enter_namespaces()
    others = 0
    if not namespaces:  # the kernel counts all that the user runs
        uid = os.geteuid()
        others = sum(n for _, owner, n in processes().values() if owner == uid)
    return Sandbox(folder, limits, user, namespaces,
                   landlock_version() if "landlock" in limits.layers else 0,
                   0 if user else others)


def start(box: Sandbox, stdin: int, output: int) -> None:
    """In the child: put on all limits and become the program. Does not return."""
    limits = box.limits
    os.setsid()
    os.chdir(box.folder)
    for what, most in ((resource.RLIMIT_AS, limits.memory), (resource.RLIMIT_CORE, 0),
                       (resource.RLIMIT_CPU, limits.cpu_seconds),
                       (resource.RLIMIT_FSIZE, limits.file_bytes),
                       (resource.RLIMIT_NOFILE, limits.files),
                       (resource.RLIMIT_NPROC, limits.processes + box.others)):
        hard = resource.getrlimit(what)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))
    if box.user:
        become(box.user)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # after the change of user, which clears it
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    if box.landlock:
        landlock(box.landlock)
    for here, there in ((stdin, 0), (output, 1), (output, 2)):
        os.dup2(here, there)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.execve(sys.executable, [sys.executable, "-I", "-B", "-c", RUNNER], {
        "HOME": box.folder, "TMPDIR": box.folder, "PATH": os.defpath, "LC_ALL": "C.UTF-8",
        "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"})


def watch(pid: int, output: int, verdict: int, limits: Limits
          ) -> tuple[bytes, bytes, str]:
    """What the runner reported, what the program printed, and how it ended without a report; until
    the first of report, end and time limit."""
    said, text, ending = b"", b"", f"timed out after {limits.seconds:g} s"
    deadline, pipes, ended = time.monotonic() + limits.seconds, {output, verdict}, False
    while not said and not ended and time.monotonic() < deadline:
        done, status, used = os.wait4(pid, os.WNOHANG)
        if ended := done != 0:
            code = os.waitstatus_to_exitcode(status)
            ending = (f"used more than {limits.cpu_seconds} s of CPU time"
                      if used.ru_utime + used.ru_stime > 0.9 * limits.cpu_seconds else
                      f"was killed by {signal.Signals(-code).name}" if code < 0 else
                      f"ended with exit code {code} before its last line")
        # After the end once more, for what it left in the pipes.
        for pipe in select.select(pipes, (), (), 0 if ended else 0.02)[0]:
            piece = os.read(pipe, 1 << 16)
            if not piece:  # closed by the program
                pipes.remove(pipe)
            elif pipe == verdict:
                said = piece
            else:  # read on beyond the limit, lest the program waits
                text += piece[: limits.output - len(text)]
    return said, text, ending


def kill_all(box: Sandbox) -> bool:
    """End the program and all that it started; False if something is left after five seconds."""
    if box.user and not box.namespaces and os.fork() == 0:
        os.setresuid(*[box.user.uid] * 3)
        os.kill(-1, signal.SIGKILL)  # every process of that user at once
        os._exit(0)
    for _ in range(500):
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
            # Some are left; those without a parent have become children of this process. The
            # first process of a namespace takes all others with it.
            alive, mine = processes(), {os.getpid()}
            while more := {p for p, (parent, *_) in alive.items() if parent in mine} - mine:
                mine |= more
            for one in mine - {os.getpid()}:
                with suppress(OSError):
                    os.kill(one, signal.SIGKILL)
            time.sleep(0.002)
            continue
        return True
    return False


def supervise(program: str, folder: str, limits: list) -> Outcome:
    """Run the program in the folder under these limits."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    box = sandbox_of(folder, Limits(*limits))
    if box.user:
        os.chown(folder, box.user.uid, box.user.uid)
    token = os.urandom(16).hex().encode()
    (output, program_output), (verdict, report), (answer, question) = (os.pipe() for _ in range(3))
    os.write(question, token)
    # Inherited, as 0, 1 and 2 are, under numbers that nobody can know.
    answer, report = (fcntl.fcntl(pipe, fcntl.F_DUPFD, 12 + number % (box.limits.files - 16))
                      for pipe, number in zip((answer, report), os.urandom(2), strict=True))
    stdin = os.memfd_create("program")
    with open(stdin, "wb", closefd=False) as file:
        file.write(f"{answer} {report}\n".encode() + program.encode(errors="surrogatepass"))
    os.lseek(stdin, 0, os.SEEK_SET)
    pid = os.fork()
    if not pid:
        try:
            start(box, stdin, program_output)
        except BaseException as error:
            os.write(report, token + str(error).encode())
        os._exit(1)
    for fd in (program_output, report, answer, question):
        os.close(fd)
    said, text, ending = watch(pid, output, verdict, box.limits)
    notes = box.notes if kill_all(box) else (*box.notes, "some processes could not be ended")
    passed, failed = said == token, said.removeprefix(token)
    if failed and failed != said:
        raise OSError(f"the sandbox could not be set up: {failed.decode()}")
    why = "passed" if passed else said.decode(errors="replace").strip(": \n") or ending
    return Outcome(passed, why, text.decode(errors="replace"), notes)


def main(argv: list[str] | None = None) -> None:
    import argparse
    import math
    from pathlib import Path

    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=Path, help="a file of Python")
    parser.add_argument("--seconds", type=float, default=Limits().seconds,
                        help="wall time (default: %(default)g)")
    args = parser.parse_args(argv)
    try:
        outcome = run(args.program.read_text(encoding="utf-8"), Limits(
            args.seconds, math.ceil(args.seconds) + 1))
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"{args.program}: {error}")
    for note in outcome.notes:
        print(f"note: {note}")
    print(outcome.output + outcome.why)
    sys.exit(not outcome.passed)


if __name__ == "__main__":
    if sys.argv[1:] == [SUPERVISE]:
        print(json.dumps(supervise(**json.load(sys.stdin))))
    else:
        main()
