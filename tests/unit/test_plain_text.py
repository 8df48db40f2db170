"""Text from data, file names or other machines reaches the terminal without control characters."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import batchgen
from batchgen.cli import main
from batchgen.cli.echo import echo_json
from batchgen.output.ledger import Ledger
from batchgen.plain_text import plain
from batchgen.storage import open_store
from tests.datasets_on_disk import plan_for, write_prompts
from tests.fuzzing import fuzz

TITLE = "\x1b]0;mine\x07"


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (f"a{TITLE}b", r"a\x1b]0;mine\x07b"),
        ("two\nlines\tand \r\n one", "two\nlines\tand \r\n one"),
        ("50 %\r99 %", r"50 %\x0d99 %"),
        ("\x9b31m\x7f", r"\x9b31m\x7f"),
        ("bad\udcff.parquet", r"bad\xff.parquet"),
        ("\ud800 \u202etxt.exe", r"\ud800 \u202etxt.exe"),
        ("é 図 👩‍🚀 سلام", "é 図 👩‍🚀 سلام"),
    ],
)
def test_what_a_terminal_would_act_on_is_shown(given: str, shown: str) -> None:
    assert plain(given) == shown


@fuzz()
@given(st.text(st.characters(), max_size=40))
def test_any_text_becomes_printable_and_stays_so(text: str) -> None:
    shown = plain(text)
    shown.encode()
    assert plain(shown) == shown
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", shown)


def test_json_escapes_what_a_terminal_would_act_on(capsys: pytest.CaptureFixture[str]) -> None:
    tree = {"name": f"{TITLE}\x7f\x9b"}
    echo_json(tree)
    printed = capsys.readouterr().out
    assert json.loads(printed) == tree
    assert plain(printed) == printed


@pytest.mark.parametrize("words", [("status", "out/{}"), ("plan", "--input", "{}.parquet", "--{}")])
def test_a_message_is_plain(words: tuple[str, ...], tmp_path: Path) -> None:
    result = CliRunner().invoke(main, [word.format(TITLE) for word in words])
    assert result.exit_code == 1
    assert r"\x1b]0;mine\x07" in result.output and "\x1b" not in result.output


def test_logs_and_failures_are_plain(tmp_path: Path) -> None:
    plan = plan_for(write_prompts(tmp_path / "in.parquet", 4), tmp_path / "out")
    ledger = Ledger(open_store(str(tmp_path / "out")))
    ledger.freeze(plan, plan.spec)
    ledger.log(1, [f"a shard {TITLE}failed"])
    result = CliRunner().invoke(main, ["logs", str(tmp_path / "out")])
    assert r"\x1b]0;mine\x07" in result.output and "\x1b" not in result.output


def test_commands_have_one_way_to_the_terminal() -> None:
    for path in (Path(batchgen.__file__).parent / "cli").glob("*.py"):
        if path.name != "echo.py":
            assert not re.search(r"click\.s?echo|print\(|sys\.std", path.read_text()), path
