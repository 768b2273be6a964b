"""Asks a language model to judge answers: any endpoint of OpenAI's chat completions; its replies are kept in a file."""

import concurrent.futures
import dataclasses
import hashlib
import http.client
import json
import os
import pathlib
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from vl3_jax.errors import InputError, printable
from vl3_jax.storage.journal import Journal

_PROMPTS = pathlib.Path(__file__).with_name("judge_prompts.json")
_REFUSED = (301, 302, 303, 307, 308, 400, 401, 403, 404, 405, 422)  # asking again does not help
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_MAX_REPLY = 2**20  # bytes


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Refuses to follow a redirection, which would take the key to another host."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        return None


_OPENER = urllib.request.build_opener(_NoRedirects)


class JudgeError(Exception):
    """The judge gave no usable reply to one question."""


@dataclasses.dataclass(frozen=True)
class JudgeSettings:
    """Where a judge is and how it is asked.

    Attributes:
      url: Base URL of an OpenAI-compatible API, such as https://api.openai.com/v1.
      model: Name of the model.
      key_variable: Environment variable with the API key; without it no key is sent.
      prompts: File of prompts instead of the own ones.
      cache: File that keeps all replies, so that nothing is asked twice.
      threads: Number of questions asked at a time.
      attempts: How often a question is asked until there is a reply with a verdict.
      timeout: Seconds to wait for a reply.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    prompts: str | None = None
    cache: str = "judge.jsonl"
    threads: int = 8
    attempts: int = 10
    timeout: float = 60.0

    def __post_init__(self):
        if not self.url.startswith(("http://", "https://")):
            raise InputError(f"judge {self.url!r}: give a URL that begins with http:// or https://")
        if not self.model:
            raise InputError("a judge needs the name of its model; give --judge-model")
        for name in ("threads", "attempts", "timeout"):
            if getattr(self, name) <= 0:
                raise InputError(f"{name} of the judge is {getattr(self, name)}; give a number above 0")


class Judge:
    """A judge; an instance is what `Scoring.judge` takes. It may be asked from several threads."""

    def __init__(self, settings: JudgeSettings, pause: float = 1.0):
        """Opens the file of replies.

        Args:
          settings: The settings.
          pause: Seconds before a question is asked again; they double each time, up to a minute.

        Raises:
          InputError: The prompts or the file of replies cannot be read.
        """
        self.settings, self._pause = settings, pause
        self._prompts = read_prompts(settings.prompts)
        try:
            pathlib.Path(settings.cache).parent.mkdir(parents=True, exist_ok=True)
            self._journal = Journal(settings.cache, _check_entry, "not a reply of a judge; remove the line")
        except OSError as error:
            raise InputError(f"{settings.cache}: {error.strerror or error}; choose another file of replies") from None
        self._replies: dict[str, str] = {entry["key"]: entry["reply"] for entry in self._journal.entries}
        self._pending: dict[str, concurrent.futures.Future[str]] = {}
        self._lock = threading.Lock()

    def __call__(self, name: str, fields: Mapping[str, Any]) -> str:
        """Returns the reply to a prompt.

        Args:
          name: Name of the prompt.
          fields: Values of its placeholders.

        Raises:
          InputError: The endpoint refuses the request.
          JudgeError: No attempt gave a reply with a verdict.
        """
        body, expect = self._request(name, fields)
        key = hashlib.sha256(self.settings.url.encode() + b"\n" + body).hexdigest()
        with self._lock:
            if key in self._replies:
                return self._replies[key]
            pending = self._pending.get(key)
            if pending is None:
                own = self._pending[key] = concurrent.futures.Future()
        if pending is not None:  # another thread asks the same
            return pending.result()
        try:
            reply = self._ask(body, expect)
            self._journal.append({"key": key, "prompt": name, "reply": reply})
            with self._lock:
                self._replies[key] = reply
            own.set_result(reply)
            return reply
        except BaseException as error:
            own.set_exception(error)
            raise
        finally:
            with self._lock:
                del self._pending[key]

    def close(self) -> None:
        """Closes the file of replies."""
        self._journal.close()

    def _request(self, name: str, fields: Mapping[str, Any]) -> tuple[bytes, str]:
        prompt = self._prompts[name]
        roles = [role for role in ("system", "user") if role in prompt]
        messages = [{"role": role, "content": _filled(prompt[role], fields)} for role in roles]
        body = {"model": self.settings.model, "messages": messages, **prompt["params"]}
        return json.dumps(body, sort_keys=True).encode(), prompt["expect"]

    def _ask(self, body: bytes, expect: str) -> str:
        problem = ""
        for attempt in range(self.settings.attempts):
            if attempt:
                time.sleep(min(self._pause * 2 ** (attempt - 1), 60.0))
            try:
                reply = self._post(body)
            except urllib.error.HTTPError as error:
                with error:
                    problem = f"HTTP {error.code} {error.read(_MAX_REPLY).decode(errors='replace').strip()}".rstrip()
                if error.code in _REFUSED:
                    raise InputError(f"{self.settings.url}: {printable(problem)}; check judge, model and key") from None
                continue
            except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError, IndexError) as error:
                problem = printable(error)
                continue
            if re.search(expect, reply, re.DOTALL):
                return reply
            problem = f"no verdict in {printable(reply)!r}"
        raise JudgeError(f"judge: {problem} after {self.settings.attempts} attempts")

    def _post(self, body: bytes) -> str:
        headers = {"Content-Type": "application/json"}
        key = os.environ.get(self.settings.key_variable)
        if key:
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.settings.url.rstrip('/')}/chat/completions", body, headers)
        with _OPENER.open(request, timeout=self.settings.timeout) as response:
            reply = json.loads(response.read(_MAX_REPLY))
        return str(reply["choices"][0]["message"]["content"]).strip()


def read_prompts(path: str | os.PathLike | None) -> dict[str, dict[str, Any]]:
    """Reads a file of prompts, `{name: {"system", "user", "params", "expect"}}`.

    Args:
      path: The file; None for the own prompts. Those that it lacks keep the own wording.

    Raises:
      InputError: The file cannot be read or is malformed.
    """
    own = json.loads(_PROMPTS.read_text(encoding="utf-8"))
    if path is None:
        return own
    try:
        prompts = json.loads(pathlib.Path(path).read_bytes())
        valid = isinstance(prompts, dict) and all(isinstance(prompt["user"], str) for prompt in prompts.values())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; give a JSON file of prompts") from None
    except (ValueError, TypeError, KeyError):
        valid, prompts = False, {}
    unknown = [name for name in prompts if name not in own] if valid else []
    if not valid or unknown:
        reason = f"unknown prompt {unknown[0]!r}" if unknown else 'not of the form {name: {"user": text}}'
        raise InputError(f"{path}: {reason}; known are {', '.join(own)}")
    for name, prompt in prompts.items():
        lacking = _placeholders(own[name]) - _placeholders(prompt)
        if lacking:
            raise InputError(f"{path}: prompt {name!r} lacks {{{min(lacking)}}}; add it")
    return {name: _defaults(prompt) | prompts[name] if name in prompts else prompt for name, prompt in own.items()}


def _defaults(prompt: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a prompt of a file need not state."""
    return {key: prompt[key] for key in ("params", "expect")}


def _placeholders(prompt: Mapping[str, Any]) -> set[str]:
    return set(_PLACEHOLDER.findall(prompt.get("system", "") + prompt["user"]))


def _filled(text: str, fields: Mapping[str, Any]) -> str:
    return _PLACEHOLDER.sub(lambda found: str(fields.get(found[1], found[0])), text)


def _check_entry(entry: Any) -> Any:
    if not isinstance(entry, dict) or not isinstance(entry.get("key"), str) or not isinstance(entry.get("reply"), str):
        raise ValueError("no reply")
    return entry
