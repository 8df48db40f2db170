"""Section 5: what a local run shows to others on its machine."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import stat as st_
import struct
import sys
import time
from pathlib import Path
from typing import Any

from tests.attacks.context import Ctx
from tests.attacks.kit import BROKEN, HELD, OTHER, Result, attack, slot
from tests.attacks.processes import alive, descendants, wait_until

NOT_LOOPBACK = re.compile(r"^(127\.|\[::1\]|\[::ffff:127\.)")


def listening(pids: set[int]) -> dict[str, int]:
    """Local address -> pid of sockets that these processes listen on."""
    inodes = {}
    for pid in pids:
        try:
            for fd in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    t = os.readlink(f"/proc/{pid}/fd/{fd}")
                    if t.startswith("socket:["):
                        inodes[t[8:-1]] = pid
        except OSError:
            pass
    found = {}
    import socket as so

    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            p = line.split()
            if p[3] == "0A" and p[9] in inodes:
                a, port = p[1].split(":")
                raw = b"".join(
                    struct.pack("<I", int(a[i : i + 8], 16)) for i in range(0, len(a), 8)
                )
                ip = so.inet_ntop(so.AF_INET if len(raw) == 4 else so.AF_INET6, raw)
                found[f"{ip}:{int(port, 16)}"] = inodes[p[9]]
    return found


def comm(pid: Any) -> Any:
    try:
        return (
            Path(f"/proc/{pid}/cmdline")
            .read_bytes()
            .replace(b"\0", b" ")
            .decode(errors="replace")[:90]
        )
    except OSError:
        return "?"


def wide(folder: Path) -> list[str]:
    """Paths that others may write to, or (files, sockets) read."""
    bad = []
    for p in [folder, *folder.rglob("*")][:20000]:
        with contextlib.suppress(OSError):
            m = p.lstat().st_mode
            if st_.S_ISLNK(m):
                continue
            if m & 0o002 and not m & 0o1000:
                bad.append(f"{oct(m & 0o7777)} {p}")
    return bad


def reachable_by_others(p: Path) -> bool:
    """Every parent lets others through."""
    return all(q.stat().st_mode & 0o001 for q in p.parents)


def ports(pids: set[int], r: dict[str, Any]) -> None:
    ls = listening(pids)
    wide_ls = {
        a: comm(q) for a, q in ls.items() if not a.startswith(("127.", "::1:", "::ffff:127."))
    }
    r["5-ports"] = (
        bool(ls) and not wide_ls,
        f"{len(ls)} listening, {len(wide_ls)} of them not on loopback: "
        + "; ".join(f"{a} {c.split('/')[-1][:22]}" for a, c in list(wide_ls.items())[:8]),
    )


def token_of(pids: set[int], r: dict[str, Any]) -> Any:
    """The file of the token in use."""
    # the token in use
    envs = b"".join(Path(f"/proc/{q}/environ").read_bytes() for q in pids if alive(q))
    tp = re.search(rb"RAY_AUTH_TOKEN_PATH=([^\0]+)", envs)
    token = Path(tp.group(1).decode()) if tp else Path.home() / ".ray/auth_token"
    inenv = b"RAY_AUTH_TOKEN=" in envs
    if token.exists():
        mode = token.stat().st_mode & 0o777
        r["5-token"] = (
            mode & 0o077 == 0,
            f"{token} {oct(mode)}, {'also' if inenv else 'not'} in the environment",
        )
    else:
        r["5-token"] = (
            HELD if inenv else BROKEN,
            f"no {token}; token in the environment: {inenv}",
        )
    return token


def as_nobody(ctx: Ctx, session: Any, token: Any, r: dict[str, Any]) -> None:
    # as nobody
    script = f"""
import os, socket, glob
r=[]
try: open({str(token)!r}).read(); r.append('TOKEN READ')
except OSError as e: r.append('token: '+type(e).__name__)
s={str(session)!r}
try: os.listdir(s); r.append('SESSION LISTED')
except OSError as e: r.append('list: '+type(e).__name__)
a, b = s+'/runtime_resources', s+'/rr2'
try: os.rename(a, b); os.rename(b, a); r.append('RENAMED')
except OSError as e: r.append('rename: '+type(e).__name__)
for f in glob.glob(s+'/sockets/*'):
    try: k=socket.socket(socket.AF_UNIX); k.connect(f); r.append('SOCKET OPEN '+os.path.basename(f))
    except OSError as e: r.append(os.path.basename(f)+': '+type(e).__name__)
for f in glob.glob('/dev/shm/plasma*')+glob.glob('/dev/shm/*ray*'):
    try: open(f,'rb').read(1); r.append('SHM READ '+f)
    except OSError as e: pass
print('; '.join(r))
"""
    o = ctx.exec(
        [
            "setpriv",
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
            "/usr/bin/python3" if Path("/usr/bin/python3").exists() else sys.executable,
            "-c",
            script,
        ],
        cwd="/",
    )
    if o.rc and not o.out:  # the interpreter is not readable by nobody
        o = ctx.exec(
            [
                sys.executable,
                "-c",
                "import os\nos.setgroups([]); os.setgid(65534); os.setuid(65534)\n" + script,
            ],
            cwd="/",
        )
    got = [w for w in o.out.strip().split("; ") if w.split(" ")[0].isupper()]
    r["5-nobody"] = (bool(o.out.strip()) and not got, o.out.strip() or o.err[-200:])


def killed(p: Any, pids: set[int], r: dict[str, Any]) -> None:
    os.kill(p.pid, signal.SIGKILL)
    p.wait()
    t = time.monotonic()
    wait_until(lambda: not [q for q in pids if alive(q)], 35, None, 0.5)
    left = [q for q in pids if alive(q)]
    r["7-agents"] = (
        not left,
        (
            f"{len(left)} of {len(pids)} processes live {time.monotonic() - t:.0f} s "
            f"after: {[comm(q)[-50:] for q in left[:4]]}"
        ),
    )
    for q in left:
        with contextlib.suppress(OSError):
            os.kill(q, signal.SIGKILL)


@attack(
    "5",
    "",
    {
        "5-ports": "GCS, raylet, actors, driver, metrics listen on all interfaces",
        "5-token": "~/.ray/auth_token (or the one in use) is readable by others",
        "5-session": "session folder, logs, sockets, runtime_resources are 0777 without sticky bit",
        "5-nobody": "as uid nobody: read the token, open the session's sockets, rename in it",
        "5-left": "the session folder stays after the run's normal end",
        "7-agents": "kill -9 of the driver: agents alive 35 s later; session folder stays",
        "new-5-env": (
            "command lines and /proc of the run's processes: a planted secret in a command "
            "line (by name only: none)"
        ),
        "new-5-umask": (
            "files that the run writes into the OUTPUT keep the user's umask (022: others "
            "can read data/)"
        ),
    },
)
def a5(ctx: Ctx) -> Result:
    r = {}
    src = ctx.prompts(64)
    env = {"PLANTED": "S3CRETplanted"}

    def begin(out: Path) -> Any:
        p = ctx.start(
            "run",
            "--input",
            src,
            "--output",
            out,
            "--steps",
            400,
            "--samples-per-shard",
            8,
            env=env,
        )

        def raylet() -> Any:
            kids = descendants(p.pid)
            return (
                [k for k in kids if "raylet" in comm(k).split(" ")[0]]
                and any("ray::" in comm(k) for k in kids)
                and kids
            )

        wait_until(raylet, 90, p, 0.5)
        time.sleep(6)
        return p, set(descendants(p.pid)) | {p.pid}

    with slot():
        p, pids = begin(ctx.dir / "o1")
        ports(pids, r)
        cmds = " ".join(
            Path(f"/proc/{q}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
            for q in pids
            if alive(q)
        )
        m = re.search(r"(/\S*?session_\d\S*?)[/ ]", cmds)
        session = Path(m.group(1)) if m else None
        while session and not session.name.startswith("session_"):
            session = session.parent
        r["new-5-env"] = ("S3CRETplanted" not in cmds, f"{len(pids)} processes")
        bad = wide(session) if session and session.exists() else []
        rb = [b for b in bad if reachable_by_others(Path(b.split(" ", 1)[1]))]
        r["5-session"] = (
            session is not None and not rb,
            f"{session}: {len(bad)} wide, {len(rb)} reachable by others: {rb[:3]}",
        )
        token = token_of(pids, r)
        as_nobody(ctx, session, token, r)
        p.send_signal(signal.SIGINT)
        with contextlib.suppress(Exception):
            p.wait(60)
        time.sleep(2)
        left = [q for q in pids if alive(q)]
        r["5-left"] = (
            not (session and session.exists()) and not left,
            (
                f"session folder there: {bool(session and session.exists())}; {len(left)} "
                f"processes left: {[comm(q)[:40] for q in left[:3]]}"
            ),
        )
        modes = {oct(f.stat().st_mode & 0o777) for f in (ctx.dir / "o1").rglob("*") if f.is_file()}
        plans = oct((ctx.dir / "o1/_batchgen/plan.json").stat().st_mode & 0o777)
        r["new-5-umask"] = (
            OTHER,
            f"modes of files in the output under umask 022: {modes}, plan {plans}",
        )
    with slot():
        p, pids = begin(ctx.dir / "o2")
        killed(p, pids, r)
    return r
