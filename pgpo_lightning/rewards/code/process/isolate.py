"""Namespaces, user ids and limits of the processes that run answers. Linux; elsewhere every part is reported as missing.

Two ways lead to the same state. Root creates namespaces with its own rights, and a test's process changes to a user id that no
other process has. Any other user creates them in a user namespace, and a test's process gives up the rights it has there.
``RLIMIT_NPROC`` does not bind root, and otherwise counts all processes of a user; in both ways here it counts those of one test.
"""

import ctypes
import os
import resource
import signal
import stat
import sys
import time
from contextlib import suppress
from typing import Any

WORK = "/answer"
"""Working folder of a test, where the file system is private."""

USER_IDS = 1_000_000_000
"""A worker of root gives its tests the user id of this number plus its own process id."""

_NEWNS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x00020000, 0x08000000, 0x10000000, 0x20000000, 0x40000000
_RDONLY, _BIND, _REC, _PRIVATE, _NOSUID, _NODEV, _REMOUNT = 0x1, 0x1000, 0x4000, 0x40000, 0x2, 0x4, 0x20
_DETACH = 2
_SET_PDEATHSIG, _SET_DUMPABLE, _SET_CHILD_SUBREAPER, _SET_NO_NEW_PRIVS = 1, 4, 36, 38
_SYS_MOUNT_SETATTR = 442  # the same on all architectures

_libc: Any = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *args: Any) -> int:
    """Call a function of the C library.

    Raises:
        OSError: If it fails, or if this system does not have it.
    """
    function = getattr(_libc, name, None)
    if function is None:
        raise OSError(f"this system has no {name}")
    result = function(*args)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return int(result)


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    texts = [None if text is None else os.fsencode(text) for text in (source, target, kind, options)]
    _call("mount", texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3])


def _prctl(option: int, value: int) -> None:
    _call("prctl", option, value, 0, 0, 0)


class Isolation:
    """How this worker's tests are separated from the machine.

    Args:
        missing: What could not be had, one phrase each.
        private: Whether tests have namespaces of their own: processes, network, file system.
        user_id: User id of the tests' processes, or None for the worker's.
    """

    def __init__(self) -> None:
        self.missing: list[str] = []
        self.private = False
        self.user_id: int | None = None
        self._own_processes = -1  # namespace in which the worker forks once a test is over

    def enter(self, wanted: bool, readable: list[str]) -> None:
        """Isolate this process. In namespaces it returns in a child, while the parent waits and ends with its status.

        Args:
            wanted: Whether to try namespaces.
            readable: Files and folders that tests may read, absolute paths.

        Raises:
            PermissionError: If answers would run as root, who could end every process of the machine.
        """
        root = os.geteuid() == 0
        identity = os.getpid()
        if wanted:
            try:
                self._namespaces(root, readable)
                self.private = True
            except OSError as error:
                self.missing.append(
                    f"no namespaces ({error.strerror or error}), so answers can read files, use the network and leave processes"
                )
        else:
            self.missing.append("no namespaces (`isolation` is processes)")
        if self.private:
            self._become_first_process()
        else:
            try:
                _prctl(_SET_CHILD_SUBREAPER, 1)  # orphans of a test come here, where they are found and ended
            except OSError as error:
                self.missing.append(f"no way to find processes that leave their group ({error})")
        if root:
            self._choose_user(USER_IDS + identity % USER_IDS)

    def _namespaces(self, root: bool, readable: list[str]) -> None:
        user, group = os.getuid(), os.getgid()
        everything = _NEWNS | _NEWIPC | _NEWNET | _NEWPID
        # Tried in a child first: what fails half way would leave the worker in a state between.
        if pid := os.fork():
            _, status = os.waitpid(pid, 0)
            if status:
                number = os.waitstatus_to_exitcode(status)
                raise OSError(number, os.strerror(number) if number > 0 else "unknown error")
            self._unshare(root, everything, user, group, readable)
        else:
            number = 1
            try:
                self._unshare(root, everything, user, group, readable)
                if os.fork() == 0:
                    os._exit(0)
                number = 0 if os.wait()[1] == 0 else 1
            except OSError as error:
                number = error.errno or 1
            finally:
                os._exit(number)

    def _unshare(self, root: bool, flags: int, user: int, group: int, readable: list[str]) -> None:
        _call("unshare", flags if root else flags | _NEWUSER)
        if not root:
            for name, text in (
                ("setgroups", "deny"),
                ("uid_map", f"{user} {user} 1"),
                ("gid_map", f"{group} {group} 1"),
            ):
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(text)
        _mount("none", "/", None, _REC | _PRIVATE)
        _private_root(readable)

    def _become_first_process(self) -> None:
        """Fork into the namespace of processes. Its first process is the worker: with it all others end."""
        pid = os.fork()
        if pid:
            os.closerange(0, 3)  # or the end of the worker would not close its pipes
            os.closerange(3, 64)
            status = os.waitpid(pid, 0)[1]
            os._exit(0 if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))
        _prctl(_SET_PDEATHSIG, signal.SIGKILL)

    def _choose_user(self, user_id: int) -> None:
        """Check that a process of another user id can read the standard library, and have the tests be such processes."""
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.setgroups([])
                os.setresgid(user_id, user_id, user_id)
                os.setresuid(user_id, user_id, user_id)
                with open(os.__file__, "rb"):
                    code = 0
            finally:
                os._exit(code)
        if os.waitpid(pid, 0)[1] == 0:
            self.user_id = user_id
        else:
            raise PermissionError(
                "programs of answers must not run as root, and no other user can read Python's standard library at "
                f"{os.path.dirname(os.__file__)}. Run as another user, or allow namespaces (`isolation` auto)"
            )

    def open_test(self) -> str:
        """Make an empty working folder, and let the next fork be the first process of a new namespace; return the folder.

        Raises:
            OSError: If there is no room for a folder.
        """
        if self.private:
            if self._own_processes < 0:
                # `/proc` is not visible any more; a handle of the own process names its namespaces too.
                self._own_processes = os.pidfd_open(os.getpid())
            _mount("tmpfs", WORK, "tmpfs", _NOSUID | _NODEV, "size=64m,nr_inodes=4096,mode=777")
            _call("unshare", _NEWPID)
            return WORK
        import tempfile

        folder = tempfile.mkdtemp(prefix="pgpo-code-")
        if self.user_id is not None:
            os.chown(folder, self.user_id, self.user_id)
        return folder

    def close_test(self, folder: str | None) -> None:
        """Remove the working folder and return to the worker's own namespace of processes."""
        if self.private:
            _call("setns", self._own_processes, _NEWPID)
            _call("umount2", os.fsencode(WORK), _DETACH)
        elif folder is not None:
            import shutil

            shutil.rmtree(folder, ignore_errors=True)

    def restrict(self, folder: str | None, limits: dict[str, float]) -> None:
        """Restrict this process, which is to run an answer.

        Args:
            folder: Working folder.
            limits: ``cpu`` in seconds; ``memory``, ``file`` in bytes; ``processes``.
        """
        os.umask(0)
        os.chdir(folder or "/")
        cpu = int(limits["cpu"]) + 2  # the worker ends it before; this is for the case that the worker cannot
        for name, value in (
            ("RLIMIT_CPU", cpu), ("RLIMIT_AS", int(limits["memory"])), ("RLIMIT_FSIZE", int(limits["file"])),
            ("RLIMIT_CORE", 0), ("RLIMIT_NOFILE", 256), ("RLIMIT_STACK", min(256 * 2**20, int(limits["memory"]) // 4)),
            ("RLIMIT_NPROC", self._most_processes(int(limits["processes"]))),
        ):  # fmt: skip
            _limit(name, value)
        if self.user_id is not None:
            os.setgroups([])
            os.setresgid(self.user_id, self.user_id, self.user_id)
            os.setresuid(self.user_id, self.user_id, self.user_id)
        elif self.private:
            _drop_capabilities()
        if os.geteuid() == 0:
            raise PermissionError("a program of an answer must not run as root")
        if sys.platform == "linux":
            _prctl(_SET_NO_NEW_PRIVS, 1)
            _prctl(_SET_PDEATHSIG, signal.SIGKILL)

    def _most_processes(self, allowed: int) -> int:
        """Return the value of RLIMIT_NPROC: without a user id or namespace of its own a test shares the count of its user."""
        if self.private or self.user_id is not None:
            return allowed
        return allowed + _tasks_of(os.getuid())

    def end_orphans(self, group: int) -> None:
        """End what a test has left. In a namespace of processes the kernel has done so already."""
        if self.private:
            return
        _kill_group(group)
        if self.user_id is not None and os.fork() == 0:
            try:  # to all processes of this user id at once: none of them can fork in between
                os.setresgid(self.user_id, self.user_id, self.user_id)
                os.setresuid(self.user_id, self.user_id, self.user_id)
                os.kill(-1, signal.SIGKILL)
            finally:
                os._exit(0)
        for _ in range(200):
            try:
                if os.waitpid(-1, os.WNOHANG)[0]:
                    continue
            except ChildProcessError:  # none is left
                return
            children = _children(os.getpid())
            for child in children:
                if self.user_id is None:
                    _kill_group(child)
            if not children:
                time.sleep(0.001)


def _private_root(readable: list[str]) -> None:
    """Make a file system of nothing but `readable`, read-only, and an empty working folder; it becomes the root."""
    new = "/proc"  # covered by the new root: a folder that exists everywhere, also where no disk has room for another
    sources = [(path, os.open(path, os.O_PATH | os.O_NOFOLLOW)) for path in _apart(readable)]
    devices = [(f"/dev/{name}", os.open(f"/dev/{name}", os.O_PATH)) for name in ("null", "zero", "random", "urandom")]
    links = {path: os.readlink(path) for path, _ in sources if os.path.islink(path)}
    handles = os.open("/proc/self/fd", os.O_PATH | os.O_DIRECTORY)
    _mount("tmpfs", new, "tmpfs", _NOSUID | _NODEV, "size=1m,mode=755")
    old_mask = os.umask(0o022)
    for path, handle in [*sources, *devices]:
        target = new + path
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if path in links:
            os.symlink(links[path], target)
            continue
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            os.makedirs(target, exist_ok=True)
        else:
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
        os.fchdir(handles)
        _mount(str(handle), target, None, _BIND | _REC)
    for _, handle in [*sources, *devices]:
        os.close(handle)
    os.close(handles)
    os.makedirs(new + WORK, exist_ok=True)
    os.umask(old_mask)
    _read_only(new)
    os.chdir(new)
    _call("pivot_root", b".", b".")  # the old root lies over the new one, and is taken off
    _call("umount2", b".", _DETACH)
    os.chdir("/")


def _apart(paths: list[str]) -> list[str]:
    """Return the paths that exist, without those within another; a link counts as itself."""
    found: list[str] = []
    for path in sorted({os.path.normpath(path) for path in paths if os.path.lexists(path)}):
        if not any(path.startswith(f"{other}/") for other in found):
            found.append(path)
    return found


def _read_only(root: str) -> None:
    attributes = (ctypes.c_uint64 * 4)(
        _RDONLY | _NOSUID, 0, 0, 0
    )  # struct mount_attr: set, clear, propagation, user namespace
    recursive = 0x8000
    _call("syscall", _SYS_MOUNT_SETATTR, -100, os.fsencode(root), recursive, ctypes.byref(attributes), 32)


def _drop_capabilities() -> None:
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    _call("capset", ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)()))


def _limit(name: str, value: int) -> None:
    number = getattr(resource, name, None)
    if number is None:
        return
    hard = resource.getrlimit(number)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    with suppress(ValueError, OSError):  # not every system has every limit
        resource.setrlimit(number, (value, value if name != "RLIMIT_CPU" else value + 1))


def _kill_group(group: int) -> None:
    for kill in (os.killpg, os.kill):
        try:
            kill(group, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue


def _processes() -> list[tuple[int, int]]:
    """Return all processes as (id, id of the parent)."""
    found = []
    try:
        names = os.listdir("/proc")
    except OSError:
        return []
    for name in names:
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    found.append((int(name), int(file.read().rpartition(b")")[2].split()[1])))
            except OSError:
                continue
    return found


def _children(process: int) -> list[int]:
    return [child for child, parent in _processes() if parent == process]


def _tasks_of(user: int) -> int:
    count = 0
    for process, _ in _processes():
        try:
            if os.stat(f"/proc/{process}").st_uid == user:
                count += len(os.listdir(f"/proc/{process}/task"))
        except OSError:
            continue
    return count
