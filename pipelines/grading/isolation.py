"""Linux isolation for one process, through libc: namespaces, a read-only root, limits, no capabilities.

Used by `sandbox_child`, which is run as a script, so it imports the standard library only. It knows nothing of what it
isolates. Every function raises OSError where the system does not allow its step.
"""

import ctypes
import os
import resource
import sys
from contextlib import suppress

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_NOATIME, MS_NODIRATIME, MS_BIND, MS_REC, MS_PRIVATE, MS_RELATIME = 1024, 2048, 4096, 16384, 1 << 18, 1 << 21
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 24, 38
NOBODY = 65534
STAGE = "/sys"  # where the new root is put together: a directory that every Linux has and the candidate does not need
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_MOUNT_FLAGS = {
    "nosuid": MS_NOSUID,
    "nodev": MS_NODEV,
    "noexec": MS_NOEXEC,
    "noatime": MS_NOATIME,
    "nodiratime": MS_NODIRATIME,
    "relatime": MS_RELATIME,
}

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: object) -> None:
    if getattr(_libc, name)(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def unshare(flags: int) -> None:
    _call("unshare", flags)


def prctl(option: int, value: int) -> None:
    _call("prctl", option, ctypes.c_ulong(value), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0))


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    encoded = [None if text is None else text.encode() for text in (source, target, kind, data)]
    _call("mount", encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3])


def become_nobody() -> None:
    """Gives up root for good: the limit on processes does not bind root."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    prctl(PR_SET_DUMPABLE, 1)


def enter_namespaces() -> None:
    """New pid (for children), network, IPC and host-name namespaces; inside a new user namespace unless root can do
    without."""
    flags = CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
    if os.geteuid() == 0:
        try:
            unshare(flags)
            return
        except PermissionError:  # root of a container without CAP_SYS_ADMIN: isolated as any other user is
            become_nobody()
    user, group = os.geteuid(), os.getegid()
    unshare(CLONE_NEWUSER | flags)
    for path, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{NOBODY} {user} 1"),
        ("gid_map", f"{NOBODY} {group} 1"),
    ):
        with open(f"/proc/self/{path}", "w") as file:
            file.write(text)


def python_paths() -> list[str]:
    """The directories that the interpreter and its shared libraries live in."""
    prefix = sys.base_prefix
    own = [f"{prefix}/lib"] if prefix in ("/usr", "/") else [prefix]
    paths = ["/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64", *own]
    return [path for path in dict.fromkeys(paths) if os.path.isdir(path)]


def _bind(path: str) -> None:
    target = STAGE + path
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
    _mount(path, target, None, MS_BIND | MS_REC)


def _make_read_only(paths: tuple[str, ...]) -> None:
    """Every mount below the staged paths, with the flags it already has (a user namespace may not drop them)."""
    with open("/proc/self/mountinfo") as file:
        mounts = [line.split() for line in file]
    for fields in mounts:
        target, options = fields[4].encode().decode("unicode_escape"), fields[5].split(",")
        if any(f"{target}/".startswith(f"{STAGE}{path}/") for path in paths):
            kept = sum(_MOUNT_FLAGS.get(option, 0) for option in options)
            _mount(None, target, None, MS_REMOUNT | MS_BIND | MS_RDONLY | kept)


def enter_root(scratch_bytes: int) -> None:
    """A root with nothing but the interpreter, read-only, and an empty scratch folder in memory, /tmp, as working
    directory."""
    unshare(CLONE_NEWNS)
    _mount(None, "/", None, MS_REC | MS_PRIVATE)
    _mount("tmpfs", STAGE, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    paths = (*python_paths(), *DEVICES)
    for path in paths:
        _bind(path)
    _make_read_only(paths)
    os.mkdir(f"{STAGE}/tmp")
    _mount("tmpfs", f"{STAGE}/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"size={scratch_bytes},nr_inodes=4096,mode=1777")
    _mount(None, STAGE, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)
    os.chdir(STAGE)
    _call("pivot_root", b".", b".")
    _call("umount2", b".", MNT_DETACH)
    os.chdir("/tmp")


class _CapabilityHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


def drop_privileges(settings: int) -> None:
    """Root becomes nobody in a user namespace of its own; then no capability is left and none can be gained.

    `settings` is a descriptor of /proc/sys/user, opened while there was a /proc; it is closed."""
    if os.geteuid() == 0:
        become_nobody()
        with suppress(OSError):  # where user namespaces are switched off, the change of user is what there is
            unshare(CLONE_NEWUSER)
    # No user namespace below this one, where capabilities could be had again. Containers often forbid the setting.
    with suppress(OSError), os.fdopen(os.open("max_user_namespaces", os.O_WRONLY, dir_fd=settings), "w") as file:
        file.write("0")
    os.close(settings)
    for capability in range(64):
        with suppress(OSError):  # beyond the kernel's last capability, or already without the right to drop
            prctl(PR_CAPBSET_DROP, capability)
    _call("capset", ctypes.byref(_CapabilityHeader(0x20080522, 0)), (ctypes.c_uint32 * 6)())
    prctl(PR_SET_NO_NEW_PRIVS, 1)


def limit(cpu_seconds: int, memory_bytes: int, processes: int, file_bytes: int) -> None:
    """Resource limits of this process and its children, soft and hard."""
    for kind, value in (
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_NPROC, processes),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (value, value))
