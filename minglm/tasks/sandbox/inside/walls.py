"""What stands round a run, by level: how its first process is started."""

import json
import os
import re
import sys
import tempfile
from typing import Any

import first
import system
import view

FLAGS = ("-s", "-S", "-P", "-B")  # no packages but the standard library's, nothing from the environment
_OUTER = os.path.dirname(os.path.abspath(__file__))


def prepare(settings: dict[str, Any]) -> dict[str, Any]:
    """In the nursery, once: what all runs share. Adds to the settings what `start` needs.

    Raises OSError where this machine lacks what the level needs.
    """
    level = settings["level"]
    root = os.getuid() == 0
    if level in ("bubblewrap", "namespaces"):
        _check_kernel(os.uname().release)
    settings["readable"] = view.readable(*settings["programs"])
    if level == "namespaces" or (level == "bubblewrap" and root):
        settings["proc"] = os.open("/proc", os.O_PATH | os.O_DIRECTORY)
        _leave_the_machine(settings, root)
    return settings


def _check_kernel(release: str) -> None:
    """Older kernels count the processes of all runs together, so a limit for one would stop others."""
    version = tuple(int(part) for part in re.findall(r"[0-9]+", release)[:2])
    if version < (5, 14):
        raise OSError(f"Linux {release} found, 5.14 or later needed")


def _leave_the_machine(settings: dict[str, Any], root: bool) -> None:
    """Namespaces that all runs share, empty of everything; root is given up for good.

    No run gets a network of its own, for none gets a network. It must not be root's process that starts the runs: the
    kernel would count none of root's processes.
    """
    shared = system.NEW_MOUNTS | system.NEW_NET | system.NEW_IPC | system.NEW_NAMES
    if not root:
        ids = os.getuid(), os.getgid()
        system.unshare(system.NEW_USER | shared)
        _map_user(settings["proc"], ids, ids)
    else:
        system.unshare(shared)
    system.set_host_name("sandbox")
    view.enter(settings["empty_folder"], settings["readable"], with_proc=settings["level"] == "bubblewrap")
    if root:
        nobody = 65534
        os.setgroups([])
        os.setresgid(nobody, nobody, nobody)
        os.setresuid(nobody, nobody, nobody)
        system.set_dumpable(True)  # or /proc/self would stay root's


def _map_user(proc: int, inside: tuple[int, int], outside: tuple[int, int]) -> None:
    """inside, outside: user and group."""
    maps = [f"{new} {old} 1" for new, old in zip(inside, outside, strict=True)]
    for name, text in (("setgroups", "deny"), ("uid_map", maps[0]), ("gid_map", maps[1])):
        place = os.open(f"self/{name}", os.O_WRONLY, dir_fd=proc)
        os.write(place, text.encode())
        os.close(place)


def start(settings: dict[str, Any], pipes: dict[str, int]) -> tuple[int, str | None]:
    """In a guard: start the first process. -> its id, and the folder on this machine that the guard has to remove."""
    return _START[settings["level"]](settings, pipes)


def _start_in_namespaces(settings: dict[str, Any], pipes: dict[str, int]) -> tuple[int, None]:
    ids = os.getuid(), os.getgid()
    pid = system.clone(system.NEW_USER | system.NEW_PIDS | system.NEW_MOUNTS)
    if pid == 0:
        first.arrange(pipes | {"proc": settings["proc"]})

        def prepare() -> None:
            _map_user(first.PROC, (1000, 1000), ids)
            os.close(first.PROC)
            system.die_with_parent()
            options = f"size={settings['disk_bytes']},nr_inodes=4096,mode=700"
            system.mount("box", view.BOX, "tmpfs", system.NO_SUID | system.NO_DEVICES, options)

        first.serve(view.BOX, settings["level"], [], prepare)
    return pid, None


def _start_in_bubblewrap(settings: dict[str, Any], pipes: dict[str, int]) -> tuple[int, None]:
    pid = os.fork()
    if pid == 0:
        first.arrange(pipes)
        inside = [os.path.realpath(sys.executable), *FLAGS, _OUTER, "first", json.dumps({"level": settings["level"]})]
        command = ["bwrap", *_bubblewrap_options(settings), "--", *inside]
        first.serve(view.BOX, settings["level"], [], lambda: os.execv(settings["bubblewrap"], command))
    return pid, None


def _bubblewrap_options(settings: dict[str, Any]) -> list[str]:
    options = ["--unshare-all", "--die-with-parent", "--as-pid-1", "--new-session", "--hostname", "sandbox", "--clearenv"]
    options += ["--uid", "1000", "--gid", "1000", "--cap-drop", "ALL", "--setenv", "PYTHONHASHSEED", "0"]
    for path in settings["readable"]:
        options += ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind", path, path]
    for path in view.DEVICES:
        options += ["--dev-bind", path, path]
    options += ["--size", str(settings["disk_bytes"]), "--tmpfs", view.BOX]
    if not any(path.startswith("/tmp/") for path in settings["readable"]):
        options += ["--symlink", "box", "/tmp"]
    return [*options, "--remount-ro", "/", "--chdir", view.BOX]


def _start_in_folder(settings: dict[str, Any], pipes: dict[str, int]) -> tuple[int, str]:
    """Landlock, or no walls at all: a new folder among the machine's."""
    box = tempfile.mkdtemp(prefix="sandbox-")
    pid = os.fork()
    if pid == 0:
        first.arrange(pipes)
        system.die_with_parent()
        system.adopt_orphans()
        first.serve(box, settings["level"], settings["readable"])
    return pid, box


_START = {
    "bubblewrap": _start_in_bubblewrap,
    "namespaces": _start_in_namespaces,
    "landlock": _start_in_folder,
    "none": _start_in_folder,
}
