"""Section 4: secrets that are taken literally, stored or shown."""

from __future__ import annotations

from typing import Any

import yaml

from tests.attacks.context import Ctx
from tests.attacks.edits import send
from tests.attacks.kit import BROKEN, HELD, OTHER, PY, Result, attack

S = "S3CRETxyzzy9"


def refused(
    ctx: Ctx, *args: Any, stdin: Any = None, harmless: bool = False, env: Any = None
) -> Any:
    o = ctx.cli("plan", "--input", ctx.dir / "p.parquet", "--output", ctx.dir / "o", *args, env=env)
    shown = S in o.text
    if harmless:
        return o.rc == 0 and not o.tb, f"rc {o.rc} {o.msg(100) if o.rc else ''}"
    return (
        o.rc == 1 and not shown and not o.tb,
        f"rc {o.rc}{', SECRET SHOWN' if shown else ''}{' TRACEBACK' if o.tb else ''}",
    )


LITERALS = {
    "headers": ["--set", f"storage_options.http.headers.Authorization=Bearer {S}"],
    "cookies": ["--set", f"storage_options.http.client_kwargs.cookies={{sid: {S}}}"],
    "auth": ["--set", f"storage_options.http.client_kwargs.auth=[u, {S}]"],
    "endpoint": ["--set", f"storage_options.s3.endpoint_url=http://user:{S}@host:9000"],
    "list-of-dicts": ["--set", f"storage_options.s3.client_kwargs.x=[{{secret: {S}}}]"],
    "uri_roots": ["--set", f"input.uri_roots=[https://u:{S}@host/photos]"],
    "url-password": ["--input", f"https://127.0.0.1:1/x.parquet?password={S}"],
    "url-api-key": ["--input", f"https://127.0.0.1:1/x.parquet?api-key={S}"],
    "url-code": ["--input", f"https://127.0.0.1:1/x.parquet?code={S}"],
    "url-slash": ["--output", f"s3://KEY:abc/{S}@bucket/out"],
    "url-chained": ["--input", f"simplecache::ftp://u:{S}@127.0.0.1:1/x.parquet"],
}


NEW_LITERALS = {
    "x-api-key-header": [
        "--set",
        f"storage_options.https.client_kwargs.headers={{X-Api-Key: {S}}}",
    ],
    "proxy": ["--set", f"storage_options.s3.config_kwargs.proxies.https=http://u:{S}@proxy:3128"],
    "odd-name": ["--set", f"storage_options.s3.client_kwargs.whatever={S}"],
    "connection-string": ["--set", f"storage_options.az.connection_string=AccountKey={S}"],
    "tuple-nest": ["--set", f"storage_options.s3.a.b.c.d=[[[{S}]]]"],
    "number": ["--set", "storage_options.s3.secret=1234567890123"],
    "uri-root-query": ["--set", f"input.uri_roots=[https://host/photos?token={S}]"],
    "output-sig": ["--output", f"az://c/out?sig={S}"],
    "fragment": ["--input", f"https://127.0.0.1:1/x.parquet#access_token={S}"],
    "userinfo-only": ["--output", f"s3://{S}@bucket/out"],
    "at-in-secret": ["--output", f"s3://KEY:ab@{S}@bucket/out"],
    "encoded": ["--input", f"https://u%3A{S}%40127.0.0.1:1/x.parquet"],
    "model-path": ["--model", f"https://u:{S}@host/model"],
    "semicolon": ["--input", f"https://127.0.0.1:1/x.parquet;jsessionid={S}"],
    "default-in-ref": ["--set", f"storage_options.s3.secret=${{X:-{S}}}"],
    "partial-ref": ["--set", f"storage_options.s3.secret=${{X}}{S}"],
    "X-Amz": ["--input", f"https://127.0.0.1:1/x.parquet?X-Amz-Signature={S}"],
    "storage-option-key": ["--set", f"storage_options.s3.key=AK{S}"],
    "token-true": ["--set", f"storage_options.gs.token={{client_secret: {S}}}"],
    "lora-url": ["--set", f"model.loras=[{{path: 'https://u:{S}@h/x'}}]"],
}


HARMLESS = {
    "anon": ["--set", "storage_options.s3.anon=true"],
    "profile": ["--set", "storage_options.s3.profile=work"],
    "endpoint": ["--set", "storage_options.s3.endpoint_url=http://127.0.0.1:9000"],
    "region": ["--set", "storage_options.s3.client_kwargs.region_name=eu-west-1"],
    "named": ["--set", "storage_options.s3.secret=${MY_SECRET}"],
    "style": ["--set", "storage_options.s3.config_kwargs.s3.addressing_style=path"],
    "ssl": ["--set", "storage_options.s3.use_ssl=false"],
    "roots": ["--set", "input.uri_roots=[s3://photos, 'https://']"],
    "header-named": ["--set", "storage_options.http.headers.Authorization=${MY_SECRET}"],
    "project": ["--set", "storage_options.gs.project=p"],
    "account": ["--set", "storage_options.az.account_name=acc"],
}


@attack(
    "4.1",
    "",
    {
        **{f"4.1-{k}": f"a literal secret is taken and stored: {k}" for k in LITERALS},
        "4.1-harmless": "control: harmless options, and secrets by name, are taken",
        **{
            f"new-4.1-{k}": (
                f"a literal secret, other places: {' '.join(v)[:70].replace(S, 'SECRET')}"
            )
            for k, v in NEW_LITERALS.items()
        },
    },
)
def a41(ctx: Ctx) -> Result:
    ctx.prompts(4)
    r = {f"4.1-{k}": refused(ctx, *v) for k, v in LITERALS.items()}
    r |= {f"new-4.1-{k}": refused(ctx, *v) for k, v in NEW_LITERALS.items()}
    res = {k: refused(ctx, *v, harmless=True, env={"MY_SECRET": "x"}) for k, v in HARMLESS.items()}
    r["4.1-harmless"] = (
        all(g for g, _ in res.values()),
        "; ".join(f"{k}: {s}" for k, (g, s) in res.items() if not g) or "all 11 taken",
    )
    return r


@attack(
    "4.1-files",
    "",
    {
        "4.1-modes": (
            "job.yaml and plan.json of a run are 0644 (umask 022): 0600 or umask, as asked"
        ),
        "4.1-named": "a secret by name stands in no file of the output, log or command line",
        "new-4.1-storage-option": (
            "--storage-option with a literal secret, on status, resume, verify, clean"
        ),
    },
)
def a41f(ctx: Ctx) -> Result:
    r = {}
    src = ctx.prompts(4)
    out = ctx.dir / "out"
    o = ctx.cli(
        "run",
        "--input",
        src,
        "--output",
        out,
        "--steps",
        1,
        "--set",
        "storage_options.http.headers.Authorization=${PLANTED}",
        "--set",
        "storage_options.s3.secret=${PLANTED}",
        env={"PLANTED": S},
    )
    found = [
        str(p.relative_to(out))
        for p in out.rglob("*")
        if p.is_file() and S.encode() in p.read_bytes()
    ]
    r["4.1-named"] = (
        o.rc == 0 and not found and S not in o.text,
        f"rc {o.rc}, found in {found}; {o.msg(100) if o.rc else ''}",
    )
    modes = {
        p: oct((out / "_batchgen" / p).stat().st_mode & 0o777)
        for p in ("job.yaml", "plan.json")
        if (out / "_batchgen" / p).exists()
    }
    o = ctx.exec(
        [
            "bash",
            "-c",
            f"umask 077; {PY} -m batchgen run --input {src} --output {ctx.dir}/out77 --steps 1",
        ],
        heavy=True,
    )
    m77 = {
        p.name: oct(p.stat().st_mode & 0o777)
        for p in (ctx.dir / "out77/_batchgen").glob("*")
        if p.is_file() and p.stat().st_mode & 0o077
    }
    r["4.1-modes"] = (
        OTHER if not m77 and modes.get("job.yaml") == "0o644" else (not m77),
        f"umask 022: {modes}; under umask 077 wider than 0600: {m77 or 'none'}",
    )
    seen, good = [], True
    for cmd in (["status"], ["verify"], ["clean"], ["resume"]):
        o = ctx.cli(*cmd, out, "--storage-option", f"s3.secret={S}", heavy=False)
        o2 = ctx.cli(
            *cmd, out, "--storage-option", f"http.headers={{Authorization: {S}}}", heavy=False
        )
        g = all(x.rc == 1 and S not in x.text and not x.tb for x in (o, o2))
        good &= g
        seen.append(f"{cmd[0]}: {o.rc} {o2.rc}{' SHOWN' if S in o.text + o2.text else ''}")
    r["new-4.1-storage-option"] = (good, "; ".join(seen))
    return r


SLIPS = {
    "storage_option": {"storage_option": {"s3": {"secret": S}}},
    "output": {"output": {"url": "o", "s3": {"secret": S}}},
    "storage": {"storage": {"s3": {"secret": S}}},
    "storage-str": {"storage": {"secret": S}},
    "top": {"secret": S},
    "options-list": {"storage_options": [{"s3": {"secret": S}}]},
    "options-str": {"storage_options": f"s3:{S}"},
    "s3-str": {"storage_options": {"s3": S}},
    "input": {"input": {"path": "p.parquet", "password": S}},
    "model": {"model": {"token": S}},
    "columns": {"input": {"path": "p.parquet", "columns": {"token": S}}},
    "url-in-int": {"variants": f"https://u:{S}@h/x"},
    "task": {"task": f"https://u:{S}@h"},
    "wrongtype": {"output": [f"s3://u:{S}@b"]},
    "keys": {"storage_options": {"s3": {S: 1, "secret": "${X}y"}}},
}


@attack(
    "4.2",
    "",
    {
        **{f"4.2-{k}": f"a slip shows the secret: {k}" for k in SLIPS},
        "4.2-missing-input": "input http://h/x?api-key=X: it has no .parquet file",
        "new-4.2-set": "--set with bad YAML or unknown field that holds the secret",
    },
)
def a42(ctx: Ctx) -> Result:

    r = {}
    ctx.prompts(4)
    for k, tree in SLIPS.items():
        t = {"input": {"path": "p.parquet"}, "output": {"url": "o"}, **tree}
        f = ctx.dir / f"{k}.yaml"
        f.write_text(yaml.safe_dump(t))
        o = ctx.cli("plan", f)
        shown = S in o.text
        # a key of an option that IS the secret is a name, not a value: only seen
        r[f"4.2-{k}"] = (
            (HELD if o.rc == 1 and not shown and not o.tb else BROKEN)
            if k not in ("keys", "task")
            else (OTHER if shown else HELD),
            (
                f"rc {o.rc}{', SECRET SHOWN' if shown else ''}{' TRACEBACK' if o.tb else ''}"
                f"; {o.msg(90).replace(S, '<S>')}"
            ),
        )
    base, seen = ctx.serve(lambda q: send(q, b"", 404))
    o = ctx.cli("plan", "--input", f"{base}/x?api-key={S}", "--output", "o")
    r["4.2-missing-input"] = (
        S not in o.text and not o.tb and o.rc == 1,
        f"rc {o.rc}{', SECRET SHOWN' if S in o.text else ''}; {o.msg(90).replace(S, '<S>')}",
    )
    seen, good = [], True
    for s in (
        f"storage_options.s3.secret={{{S}",
        f"storage_options.s3.secret: {S}",
        f"storage_optons.s3.secret={S}",
        f"storage_options={S}",
        f"storage_options.s3={S}",
        f"output.url=s3://u:{S}@[b",
        f"storage_options.s3.endpoint_url=[{S}",
    ):
        o = ctx.cli(
            "plan",
            "--input",
            "p.parquet",
            *([] if s.startswith("output.") else ["--output", "o"]),
            "--set",
            s,
        )
        g = S not in o.text and o.rc == 1 and not o.tb
        good &= g
        if not g:
            seen.append(
                f"{s.replace(S, 'S')}: rc "
                f"{o.rc}{' SHOWN' if S in o.text else ''}{' TB' if o.tb else ''}"
            )
    r["new-4.2-set"] = (good, "; ".join(seen) or "7 kinds: refused, none shown")
    return r
