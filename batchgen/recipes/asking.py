"""Rows from a language model: asks a function or a server, and keeps every answer in a file."""

from __future__ import annotations

import hashlib
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any

from batchgen.errors import InputError, Interrupted, SpecError
from batchgen.recipes.field_section import Ask, Provider
from batchgen.recipes.reasons import Refused
from batchgen.spec.sections import MAX_TEXT
from batchgen.spec.tree import canonical_json

GROUP = "batchgen.ask"  # of entry points, see docs/recipes.md
AT_ONCE = 8
ATTEMPTS = 5
TIMEOUT_S = 120.0
MOST_BYTES = 4 << 20
_MAY_PASS = (408, 409, 425, 429, 500, 502, 503, 504, 529)

# A function that answers: it gets the question with its settings, and the number of the answer.
Answerer = Callable[["Question", int], str]


@dataclass(frozen=True)
class Question:
    """A text that is asked, and the settings that its answers depend on."""

    prompt: str
    system: str
    model: str
    temperature: float
    max_tokens: int

    def digest(self, number: int) -> str:
        """SHA-256 of the question and the number of the answer: the name of an answer."""
        facts = [self.prompt, self.system, self.model, self.temperature, self.max_tokens, number]
        return hashlib.sha256(canonical_json(facts).encode()).hexdigest()


@dataclass
class Answers:
    """The answers that are known, and the file that keeps them: one JSON object a line.

    Args:
        path: a local file; it is created with the first answer. Empty: they are not kept.
    """

    path: str
    known: dict[str, str] = field(default_factory=dict)
    asked: int = 0

    @classmethod
    def read(cls, path: str) -> Answers:
        """Read the file, if it exists; a last line that is cut off is ignored.

        Raises:
            InputError: the file holds something else.
        """
        answers = cls(path)
        if not os.path.exists(path):
            return answers
        with open(path, "rb") as file:
            lines = file.read().split(b"\n")
        for number, line in enumerate(lines):
            if not line.strip():
                continue
            try:
                one = json.loads(line)
                answers.known[str(one["id"])] = str(one["answer"])
            except (ValueError, KeyError, TypeError):
                if number < len(lines) - 1:
                    raise InputError(
                        f"{path} line {number + 1} is not an answer; correct it, or remove the "
                        "line, and it is asked again"
                    ) from None
        if lines[-1]:  # a process died while it wrote this line
            with open(path, "wb") as file:
                file.write(b"".join(line + b"\n" for line in lines[:-1] if line.strip()))
            if lines[-1].strip():
                answers._keep_last(lines[-1])
        return answers

    def _keep_last(self, line: bytes) -> None:
        try:
            one = json.loads(line)
            self._append(one)
        except (ValueError, KeyError, TypeError):
            pass

    def keep(self, question: Question, number: int, answer: str) -> None:
        """Add an answer, and write it to disk at once."""
        name = question.digest(number)
        self.known[name] = answer
        self.asked += 1
        facts = {"prompt": question.prompt, "system": question.system, "model": question.model}
        settings = {"temperature": question.temperature, "max_tokens": question.max_tokens}
        self._append({"id": name, **facts, **settings, "number": number, "answer": answer})

    def _append(self, one: Mapping[str, Any]) -> None:
        if not self.path:
            return
        os.makedirs(os.path.dirname(os.path.abspath(self.path)), exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(one, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


class Asking:
    """Answers the questions of one field.

    Args:
        name: of the field.
        ask: the question and who answers it.
        answers: those that are known.
        functions: name -> function, for those that are not installed as entry points.
    """

    def __init__(
        self,
        name: str,
        ask: Ask,
        answers: Answers,
        functions: Mapping[str, Answerer] | None = None,
    ) -> None:
        self._name = name
        self._ask = ask
        self._answers = answers
        self._functions = functions or {}
        self._answerer: Answerer | None = None

    def answers_to(self, prompts: Sequence[str | None]) -> dict[str, list[str] | Refused]:
        """Answer each different prompt: ``count`` answers, or why there are none.

        Raises:
            SpecError: there is no such function, or a variable is not set.
            Interrupted: the server does not answer; what was answered is kept.
        """
        questions = {one: self._question(one) for one in dict.fromkeys(prompts) if one is not None}
        missing = [
            (question, number)
            for question in questions.values()
            for number in range(self._ask.count)
            if question.digest(number) not in self._answers.known
        ]
        if missing:
            self._ask_all(missing)
        return {text: self._found(question) for text, question in questions.items()}

    def _question(self, text: str) -> Question:
        ask = self._ask
        model = ask.provider.model or f"function {ask.provider.function}"
        return Question(text, ask.system, model, ask.temperature, ask.max_tokens)

    def _found(self, question: Question) -> list[str] | Refused:
        names = [question.digest(number) for number in range(self._ask.count)]
        texts = [" ".join(self._answers.known[name].split()) for name in names]
        if not all(texts):
            return Refused("no-answer", f"fields.{self._name}: an answer is empty")
        if max(map(len, texts)) > MAX_TEXT:
            return Refused("no-answer", f"fields.{self._name}: an answer is over {MAX_TEXT:,} long")
        return texts

    def _ask_all(self, missing: Sequence[tuple[Question, int]]) -> None:
        """Ask several at a time, and keep each answer as it comes, also if another one fails."""
        if self._answerer is None:
            self._answerer = self._found_answerer()
        failure: BaseException | None = None
        with ThreadPoolExecutor(AT_ONCE) as pool:
            asked = {pool.submit(self._answerer, *one): one for one in missing}
            for future in as_completed(asked):
                if future.cancelled():
                    continue
                error = future.exception()
                if error is None:
                    self._answers.keep(*asked[future], self._checked(future.result()))
                elif failure is None:
                    failure = error
                    for one in asked:
                        one.cancel()
        if failure is not None:
            raise failure

    def _checked(self, answer: object) -> str:
        if isinstance(answer, str):
            return answer
        said = f"the function returned a value of type {type(answer).__name__}"
        where = f"fields.{self._name}.ask.with"
        raise SpecError(where, None, "a function that returns text", said=said)

    def _found_answerer(self) -> Answerer:
        provider, where = self._ask.provider, f"fields.{self._name}.ask.with"
        if provider.function is None:
            return server(provider, where)
        given = self._functions.get(provider.function)
        if given is not None:
            return given
        installed = {one.name: one for one in entry_points(group=GROUP)}
        if provider.function not in installed:
            known = ", ".join(sorted({*installed, *self._functions})) or "none"
            raise SpecError(
                f"{where}.function",
                provider.function,
                f"the name of an installed entry point of the group {GROUP} ({known})",
            )
        found: Answerer = installed[provider.function].load()
        return found


def server(provider: Provider, where: str) -> Answerer:
    """Return a function that asks a server with OpenAI's API for chat completions.

    Raises:
        SpecError: a variable is not set, or no model is named.
    """
    url = os.environ.get(provider.url_env, "").rstrip("/")
    if not url.lower().startswith(("http://", "https://")):
        allowed = f"the variable {provider.url_env} with a URL such as https://host/v1"
        raise SpecError(f"{where}.url_env", provider.url_env, allowed)
    if not provider.model:
        raise SpecError(f"{where}.model", None, "the name of a model that the server has")
    key = os.environ.get(provider.key_env, "") if provider.key_env else ""
    if provider.key_env and not key:
        allowed = f"the variable {provider.key_env}, set to the key"
        raise SpecError(f"{where}.key_env", provider.key_env, allowed)

    def answer(question: Question, number: int) -> str:
        body = {
            "model": question.model,
            "messages": [
                *([{"role": "system", "content": question.system}] if question.system else []),
                {"role": "user", "content": question.prompt},
            ],
            "temperature": question.temperature,
            "max_tokens": question.max_tokens,
            "seed": number,
        }
        return _completion(f"{url}/chat/completions", key, body, where)

    return answer


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would send the key to another host."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _completion(url: str, key: str, body: Mapping[str, Any], where: str) -> str:
    """Ask once, with retries and back-off for faults that may pass."""
    headers = {"Content-Type": "application/json", "User-Agent": "batchgen"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers, method="POST")
    opener = urllib.request.build_opener(_NoRedirect)
    said = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(min(30.0, 0.5 * 2**attempt))
        try:
            with opener.open(request, timeout=TIMEOUT_S) as answer:
                return _content(answer.read(MOST_BYTES + 1), where)
        except urllib.error.HTTPError as error:
            said = f"HTTP {error.code} {error.reason}"
            error.close()
            if error.code not in _MAY_PASS:
                break
        except OSError as error:  # also URLError: refused, reset, timed out
            said = str(getattr(error, "reason", "") or error) or type(error).__name__
    said = said.replace(key, "[secret]") if key else said
    raise Interrupted(
        f"{where}: the server at {url} does not answer ({said}); answers so far are kept, so "
        "repeat the command later"
    )


def _content(data: bytes, where: str) -> str:
    try:
        content = json.loads(data)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        raise Interrupted(
            f"{where}: the server's answer is not a chat completion ({len(data)} bytes)"
        ) from None
    return content if isinstance(content, str) else ""
