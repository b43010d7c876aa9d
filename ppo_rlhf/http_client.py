"""Questions to a server over HTTP, asked again while they fail for what may pass."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import httpx2

from ppo_rlhf.errors import UserError

RETRIED = {408, 425, 429, 500, 502, 503, 504}  # told by a server that may do better when it is asked again
LONGEST_PAUSE = 30.0  # seconds


class HTTPClient:
    """GET, and POST of JSON, with retries. A mistake or a server that stays ill is one line, which names it."""

    def __init__(
        self, name: str, *, timeout: float, retries: int, pause: float, headers: Mapping[str, str] | None = None
    ) -> None:
        """name: of the server in messages. timeout: seconds that one request may take. retries: of a request that
        failed for what may pass: no connection, no answer in time, or a status such as 429 and 503. pause: seconds
        before the first, twice as many before each further one.

        Raises UserError for numbers that make no sense.
        """
        if retries < 0:
            raise UserError(f"{name}: retries={retries} must be at least 0.")
        if timeout <= 0:
            raise UserError(f"{name}: timeout={timeout} must be above 0 seconds.")
        self.name = name
        self.retries, self.pause = retries, pause
        self.client = httpx2.Client(timeout=timeout, headers=headers)

    def ask(self, url: str, asked: dict[str, Any] | None = None, *, wanted: str) -> httpx2.Response:
        """The answer to what is posted; without that to a GET. wanted: what the UserError says is missing."""
        pause = self.pause
        for attempt in range(self.retries + 1):
            try:
                answer = self.client.get(url) if asked is None else self.client.post(url, json=asked)
                if answer.is_success:
                    return answer
                problem = f"status {answer.status_code}: {beginning_of(answer)}"
                passing = answer.status_code in RETRIED
            except httpx2.TransportError as error:
                problem, passing = f"{type(error).__name__}: {error}", True
            except (httpx2.HTTPError, httpx2.InvalidURL, TypeError, ValueError) as error:  # what is no JSON
                raise UserError(f"{self.name} cannot be asked: {error}") from error
            if not passing:
                break
            if attempt < self.retries:
                time.sleep(min(pause, LONGEST_PAUSE))
                pause *= 2
        raise UserError(f"{self.name} gave no {wanted} in {attempt + 1} attempts; the last: {problem}")


def beginning_of(answer: httpx2.Response) -> str:
    """The first words of an answer, on one line."""
    return " ".join(answer.text.split())[:200]
