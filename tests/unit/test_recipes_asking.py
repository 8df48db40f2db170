"""Rows from a language model: asked once, kept in a file, and secrets only by name."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from batchgen.errors import InputError, Interrupted, SpecError
from batchgen.recipes import asking
from batchgen.recipes.expand import expand
from batchgen.recipes.recipe import build_recipe
from tests.recipes import reasons_of, rows_of

KEY = "sk-very-secret-0123456789"


class Server(ThreadingHTTPServer):
    """A small server with OpenAI's API; ``plan`` holds the status codes of its next answers."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.plan: list[int] = []
        self.redirected = 0


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status = self.server.plan.pop(0) if self.server.plan else 200
        if self.path.startswith("/elsewhere"):
            self.server.redirected += 1
        self.send_response(status)
        if status in (302, 307):
            self.send_header("Location", "/elsewhere/chat/completions")
        if status != 200:
            self.end_headers()
            return
        self.server.seen.append(body)
        self.server.keys.append(self.headers["Authorization"])
        question = body["messages"][-1]["content"]
        text = f" {question} answer {body['seed']}\n"
        data = json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})
        self.end_headers()
        self.wfile.write(data.encode())

    do_GET = do_POST

    def log_message(self, *words: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    made = Server()
    thread = threading.Thread(target=made.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setenv("MY_URL", f"http://127.0.0.1:{made.server_port}/v1/")
    monkeypatch.setenv("MY_KEY", KEY)
    monkeypatch.setattr(asking, "ATTEMPTS", 3)
    monkeypatch.setattr(asking.time, "sleep", lambda seconds: None)
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def recipe(names: list[str], count: int = 2, **ask: Any) -> dict[str, Any]:
    provider = {"url_env": "MY_URL", "key_env": "MY_KEY", "model": "small"}
    asked = {"prompt": "a scene with {{ name }}", "count": count, "with": provider, **ask}
    return {
        "from": names,
        "variants": 3,
        "fields": {"scene": {"ask": asked}},
        "templates": "{{ scene }}, {day|night}",
    }


def test_answers_become_values_and_are_asked_once(server: Server, tmp_path: Path) -> None:
    answers = tmp_path / "rows-answers.jsonl"
    made = build_recipe(recipe(["cat", "dog"], system="be short", temperature=0.5, max_tokens=9))
    first = expand(made, str(tmp_path / "rows.parquet"), answers_path=str(answers))
    assert first.asked == len(server.seen) == 4
    assert set(server.keys) == {f"Bearer {KEY}"}
    assert server.seen[0]["model"] == "small" and server.seen[0]["temperature"] == 0.5
    assert server.seen[0]["messages"][0] == {"role": "system", "content": "be short"}
    written = (tmp_path / "rows.parquet").read_bytes()
    again = expand(made, str(tmp_path / "rows.parquet"), answers_path=str(answers))
    assert again.asked == 0 and len(server.seen) == 4
    assert (tmp_path / "rows.parquet").read_bytes() == written
    assert KEY not in answers.read_text()
    one = json.loads(answers.read_text().splitlines()[0])
    assert one["prompt"] in ("a scene with cat", "a scene with dog") and one["model"] == "small"


def test_the_variants_of_a_row_get_its_answers_in_turn(server: Server, tmp_path: Path) -> None:
    rows = rows_of(recipe(["cat"], count=3), answers_path=str(tmp_path / "a.jsonl"))
    scenes = {row["scene"] for row in rows.values()}
    assert scenes == {f"a scene with cat answer {number}" for number in range(3)}
    assert all(row["prompt"].startswith(row["scene"]) for row in rows.values())


def test_more_rows_and_more_answers_ask_only_for_those(server: Server, tmp_path: Path) -> None:
    path = str(tmp_path / "a.jsonl")
    before = rows_of(recipe(["cat"]), answers_path=path)
    after = rows_of(recipe(["cat", "dog"]), answers_path=path)
    assert len(server.seen) == 4
    assert before.items() <= after.items()
    rows_of(recipe(["cat", "dog"], count=3), answers_path=path)
    assert len(server.seen) == 6
    rows_of(recipe(["cat"], temperature=0.1), answers_path=path)
    assert len(server.seen) == 8


def test_faults_that_pass_are_tried_again(server: Server, tmp_path: Path) -> None:
    server.plan = [429, 503]
    assert len(rows_of(recipe(["cat"], count=1), answers_path=str(tmp_path / "a"))) == 3


def test_answers_are_kept_when_the_server_fails(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    server.plan = [200, 200, 500, 500, 500, 500, 500, 500, 500, 500, 500, 500, 500, 500]
    with pytest.raises(Interrupted, match="HTTP 500") as told:
        rows_of(recipe(["cat", "dog"], count=3), answers_path=str(path))
    assert KEY not in str(told.value)
    kept = len(path.read_text().splitlines())
    assert kept == 2
    server.plan = []
    assert len(rows_of(recipe(["cat", "dog"], count=3), answers_path=str(path))) == 6
    assert len(server.seen) == 6


@pytest.mark.parametrize("status", [302, 307, 401, 404])
def test_a_refusal_is_not_tried_again_and_a_redirect_gets_no_key(
    server: Server, tmp_path: Path, status: int
) -> None:
    server.plan = [status]
    with pytest.raises(Interrupted, match=f"HTTP {status}"):
        rows_of(recipe(["cat"], count=1), answers_path=str(tmp_path / "a"))
    assert server.seen == [] and server.redirected == 0


@pytest.mark.parametrize(
    ("provider", "said"),
    [
        ({"url_env": "NO_SUCH_URL", "model": "m"}, "url_env"),
        ({"url_env": "MY_URL", "model": ""}, "model"),
        ({"url_env": "MY_URL", "key_env": "NO_SUCH_KEY", "model": "m"}, "NO_SUCH_KEY"),
        ({"function": "nobody"}, "entry point of the group batchgen.ask"),
    ],
)
def test_what_is_missing_is_named(
    server: Server, tmp_path: Path, provider: dict[str, Any], said: str
) -> None:
    with pytest.raises(SpecError, match=r"fields\.scene\.ask\.with") as told:
        rows_of(recipe(["cat"], **{"with": provider}), answers_path=str(tmp_path / "a"))
    assert said in str(told.value)


def test_a_function_answers(tmp_path: Path) -> None:
    asked = []

    def answer(question: asking.Question, number: int) -> str:
        asked.append((question.prompt, number))
        return f"{question.prompt} #{number}" if "dog" not in question.prompt else "  "

    tree = recipe(["cat", "dog"], **{"with": {"function": "mine"}})
    given = {"functions": {"mine": answer}, "answers_path": str(tmp_path / "a.jsonl")}
    rows = rows_of(tree, **given)
    assert sorted(asked) == [(f"a scene with {one}", n) for one in ("cat", "dog") for n in (0, 1)]
    assert {row["row_key"] for row in rows.values()} == {"cat"}
    assert reasons_of(tree, **given) == {"no-answer": 3}
    assert len(asked) == 4


def test_a_function_that_returns_no_text_is_named(tmp_path: Path) -> None:
    tree = recipe(["cat"], **{"with": {"function": "mine"}})
    wrong: Any = lambda question, number: 7  # noqa: E731
    with pytest.raises(SpecError, match="returned a value of type int"):
        rows_of(tree, functions={"mine": wrong}, answers_path=str(tmp_path / "a"))


def test_a_line_that_is_cut_off_is_asked_again(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = rows_of(recipe(["cat"], count=3), answers_path=str(path))
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert rows_of(recipe(["cat"], count=3), answers_path=str(path)) == rows
    assert len(server.seen) == 4
    assert len(asking.Answers.read(str(path)).known) == 3
    path.write_bytes(b"{}\n" + whole)
    with pytest.raises(InputError, match="line 1 is not an answer"):
        asking.Answers.read(str(path))
