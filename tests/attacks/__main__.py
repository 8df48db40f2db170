"""Attack a checkout with hostile input, faults and wrong usage; print a table of what held."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shutil
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.attacks import kit
from tests.attacks.context import Ctx
from tests.attacks.fork_server import Server

SECTIONS = (
    *("writes", "wrong_data", "slow_data", "found_data", "rows", "kinds", "secrets"),
    *("exposure", "sources", "shown", "moved", "records", "usage", "held", "hostile_rows"),
    *("first_use", "first_files", "messages", "cards"),
)
Results = dict[str, dict[str, Any]]


def one(attack: kit.Attack, root: Path, folder: Path) -> Results:
    """What came of each of an attack's ids."""
    began = time.monotonic()
    ctx = None
    try:
        ctx = Ctx(root, folder, attack.id)
        got = attack.fn(ctx)
        if not isinstance(got, dict):
            got = {attack.id: got}
    except Exception as error:
        line = traceback.extract_tb(error.__traceback__)[-1].lineno
        told = f"harness: {type(error).__name__}: {error} @ {line}"
        got = {each: ("error", told) for each in attack.ids}
        traceback.print_exc()
    finally:
        if ctx:
            ctx.close()
    seconds = round(time.monotonic() - began, 1)
    return {each: result(attack, each, got, seconds) for each in attack.ids}


def result(attack: kit.Attack, each: str, got: dict[str, Any], seconds: float) -> dict[str, Any]:
    verdict, seen = got.get(each, ("error", "no result"))
    if isinstance(verdict, bool):
        verdict = kit.HELD if verdict else kit.BROKEN
    seen = re.sub(r"[\x00-\x1f\x7f]+", " ", str(seen))[:400].replace("|", "/")
    told = f"{each:28} {verdict:7} {seconds:6}s {seen[:260]}"
    print(f"[{time.strftime('%H:%M:%S')}] {told}", file=sys.stderr, flush=True)
    title = attack.titles.get(each, attack.title)
    return {"id": each, "attack": title, "verdict": verdict, "seen": seen, "secs": seconds}


def hit(attack: kit.Attack, patterns: list[str]) -> bool:
    """Whether one of the ids or prefixes with a star is one of the attack's."""
    return any(
        name == each or (each.endswith("*") and name.startswith(each[:-1]))
        for each in patterns
        for name in (attack.id, *attack.ids)
    )


def table(results: Results) -> str:
    lines = ["| id | attack | verdict | seen |", "| --- | --- | --- | --- |"]
    for each in (each for attack in kit.ATTACKS.values() for each in attack.ids):
        if each in results:
            lines.append("| " + " | ".join(map(str, list(results[each].values())[:4])) + " |")
    return "\n".join(lines) + "\n"


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.attacks", description=__doc__)
    parser.add_argument("folder", type=Path, help="where the attacks work")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[2])
    parser.add_argument("--only", nargs="+", default=[], help="ids, or prefixes ending in *")
    parser.add_argument("--skip", nargs="+", default=[], help="likewise")
    parser.add_argument("--results", type=Path, help="a JSON file, to which results are added")
    parser.add_argument("--md", type=Path, help="a file for the table")
    parser.add_argument("--missing", action="store_true", help="leave out what --results has")
    parser.add_argument("--jobs", type=int, default=2, help="generators that run at once")
    parser.add_argument("--list", action="store_true")
    given = sys.argv[1:]
    if given and not given[-1].startswith("-"):  # `--only ID ... FOLDER` would take the folder too
        given = [given[-1], *given[:-1]]
    return parser.parse_args(given)


def chosen_by(asked: argparse.Namespace, results: Results) -> list[kit.Attack]:
    def wanted(attack: kit.Attack) -> bool:
        if asked.only and not hit(attack, asked.only):
            return False
        done = all(results.get(each, {}).get("verdict", "error") != "error" for each in attack.ids)
        return not hit(attack, asked.skip) and not (asked.missing and done)

    return [attack for attack in kit.ATTACKS.values() if wanted(attack)]


def main() -> int:
    asked = options()
    for section in SECTIONS:
        importlib.import_module(f"tests.attacks.{section}")
    results: Results = {}
    if asked.results and asked.results.exists():
        results = json.loads(asked.results.read_text())
    chosen = chosen_by(asked, results)
    if asked.list:
        for attack in chosen:
            print(attack.id, attack.ids if attack.ids != [attack.id] else "", attack.title)
        return 0
    root, folder = asked.root.resolve(), asked.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for base in folder.glob("_base-*/"):  # what another state of the checkout made
        shutil.rmtree(base)
    kit.slots(asked.jobs)

    def go(attack: kit.Attack) -> None:
        results.update(one(attack, root, folder))
        if asked.results:
            asked.results.write_text(json.dumps(dict(results), indent=1) + "\n")

    with ThreadPoolExecutor(asked.jobs + 1) as pool:  # light ones go on beside the heavy ones
        list(pool.map(go, chosen))
    for server in Server.all.values():
        server.p.stdin.close()
    if asked.md:
        asked.md.write_text(table(results))
    print(table(results))
    return int(any(each["verdict"] in (kit.BROKEN, "error") for each in results.values()))


if __name__ == "__main__":
    sys.exit(main())
