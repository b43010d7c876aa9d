"""A reward that another machine computes, asked over HTTP."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2

from ppo_rlhf.errors import UserError

RETRIED = {408, 425, 429, 500, 502, 503, 504}  # told by a server that may do better when it is asked again
LONGEST_PAUSE = 30.0  # seconds


class HTTPReward:
    """Scores from a server:

        POST url  {"prompts": […], "responses": […], "columns": {name: […]}}   →   {"scores": […]}

    One number a response, in the same order. It is a reward function.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 60.0,
        retries: int = 4,
        pause: float = 1.0,
        batch_size: int = 64,
        concurrency: int = 4,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """timeout: seconds that one request may take. retries: of a request that failed for what may pass: no
        connection, no answer in time, or a status such as 429 and 503. pause: seconds before the first, twice as many
        before each further one. batch_size: responses of one request; concurrency: requests under way at a time.

        Raises UserError for numbers that make no sense.
        """
        least = {"retries": (retries, 0), "batch_size": (batch_size, 1), "concurrency": (concurrency, 1)}
        for name, (value, minimum) in least.items():
            if value < minimum:
                raise UserError(f"reward {url}: {name}={value} must be at least {minimum}.")
        if timeout <= 0:
            raise UserError(f"reward {url}: timeout={timeout} must be above 0 seconds.")
        self.url = url
        self.retries, self.pause = retries, pause
        self.batch_size, self.concurrency = batch_size, concurrency
        self.client = httpx2.Client(timeout=timeout, headers=headers)
        self.__name__ = "http_reward"

    def __call__(self, prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
        """Raises UserError, which names the server, when it does not answer, or not with a score for each response."""

        def scores_from(start: int) -> list[float]:
            rows = slice(start, start + self.batch_size)
            asked = {
                "prompts": prompts[rows],
                "responses": responses[rows],
                "columns": {name: values[rows] for name, values in columns.items()},
            }
            return self._scores(self._answer(asked), len(asked["responses"]))

        with ThreadPoolExecutor(self.concurrency) as threads:
            batches = list(threads.map(scores_from, range(0, len(responses), self.batch_size)))
        return [value for batch in batches for value in batch]

    def _answer(self, asked: dict[str, Any]) -> httpx2.Response:
        """The answer to one request, which is made again while it fails for what may pass."""
        pause = self.pause
        for attempt in range(self.retries + 1):
            try:
                answer = self.client.post(self.url, json=asked)
                if answer.is_success:
                    return answer
                problem = f"status {answer.status_code}: {' '.join(answer.text.split())[:200]}"
                passing = answer.status_code in RETRIED
            except httpx2.TransportError as error:
                problem, passing = f"{type(error).__name__}: {error}", True
            except (httpx2.HTTPError, httpx2.InvalidURL, TypeError, ValueError) as error:  # columns that are no JSON
                raise UserError(f"reward {self.url} cannot be asked: {error}") from error
            if not passing:
                break
            if attempt < self.retries:
                time.sleep(min(pause, LONGEST_PAUSE))
                pause *= 2
        raise UserError(f"reward {self.url} gave no scores in {attempt + 1} attempts; the last: {problem}")

    def _scores(self, answer: httpx2.Response, count: int) -> list[float]:
        """Raises UserError for an answer without a number for each response."""
        try:
            scores = answer.json()["scores"]
            if len(scores) == count:
                return [float(value) for value in scores]
            problem = f"{len(scores)} scores for {count} responses"
        except (KeyError, TypeError, ValueError):
            problem = f'not {{"scores": [numbers]}}, but {" ".join(answer.text.split())[:200]}'
        raise UserError(f"reward {self.url} answered {problem}.")
