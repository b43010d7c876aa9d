"""A reward that another machine computes, asked over HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2

from ppo_rlhf.errors import UserError
from ppo_rlhf.http_client import HTTPClient, beginning_of


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
        """timeout, retries, pause, headers: of `HTTPClient`. batch_size: responses of one request; concurrency:
        requests under way at a time.

        Raises UserError for numbers that make no sense.
        """
        for name, value in {"batch_size": batch_size, "concurrency": concurrency}.items():
            if value < 1:
                raise UserError(f"reward {url}: {name}={value} must be at least 1.")
        self.url = url
        self.batch_size, self.concurrency = batch_size, concurrency
        self.client = HTTPClient(f"reward {url}", timeout=timeout, retries=retries, pause=pause, headers=headers)
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
            return self._scores(self.client.ask(self.url, asked, wanted="scores"), len(asked["responses"]))

        with ThreadPoolExecutor(self.concurrency) as threads:
            batches = list(threads.map(scores_from, range(0, len(responses), self.batch_size)))
        return [value for batch in batches for value in batch]

    def _scores(self, answer: httpx2.Response, count: int) -> list[float]:
        """Raises UserError for an answer without a number for each response."""
        try:
            scores = answer.json()["scores"]
            if len(scores) == count:
                return [float(value) for value in scores]
            problem = f"{len(scores)} scores for {count} responses"
        except (KeyError, TypeError, ValueError):
            problem = f'not {{"scores": [numbers]}}, but {beginning_of(answer)}'
        raise UserError(f"reward {self.url} answered {problem}.")
