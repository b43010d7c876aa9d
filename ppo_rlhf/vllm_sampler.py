"""Sampling by a vLLM server, over its HTTP API; the policy's weights go there before each rollout.

Follows vLLM 0.28: `/v1/completions`, and of its development mode `/collective_rpc` and `/reset_prefix_cache`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_rlhf.errors import UserError
from ppo_rlhf.http_client import HTTPClient, beginning_of
from ppo_rlhf.models import save_model
from ppo_rlhf.prompts import PromptBatch
from ppo_rlhf.run import in_main_process
from ppo_rlhf.sampling import FinishedRows, Responses, SamplingSettings, responses_of, stop_ids_of

TOKEN = "token_id:"  # how the server spells token 7 where it is asked for ids: token_id:7
Line = tuple[list[int], list[float], bool]  # a response's ids, their log-probabilities, whether it stopped by itself


class VLLMSampler:
    """A sampler: each call gives the server the policy's weights, and asks it for a response to each prompt.

    Prompts and responses travel as token ids. Each row is a request of its own with a seed of its own, from its noise,
    so that equal prompts get different responses; the server batches them, and reads equal beginnings once.
    """

    def __init__(
        self,
        url: str,
        *,
        weights_folder: str | None = None,
        timeout: float = 600.0,
        retries: int = 4,
        pause: float = 1.0,
        concurrency: int = 256,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """url: of the server, without /v1. weights_folder: that both machines see, for the weights on their way; None:
        one for temporary files, where the server runs on this machine. concurrency: requests under way at a time.
        timeout, retries, pause, headers: of `HTTPClient`.

        Raises UserError for numbers that make no sense, and for a folder or a server that is not there.
        """
        if concurrency < 1:
            raise UserError(f"sampler {url}: concurrency={concurrency} must be at least 1.")
        if weights_folder is not None and not Path(weights_folder).is_dir():
            raise UserError(f"sampler {url}: there is no folder weights_folder={weights_folder}.")
        self.url = url.rstrip("/")
        self.weights_folder, self.concurrency = weights_folder, concurrency
        self.client = HTTPClient(f"sampler {url}", timeout=timeout, retries=retries, pause=pause, headers=headers)
        self.client.ask(f"{self.url}/health", wanted="sign of health")

    def __call__(
        self,
        language_model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: PromptBatch,
        settings: SamplingSettings,
        noise: Tensor,
        *,
        on_finished: FinishedRows | None = None,
        group_size: int = 1,
    ) -> Responses:
        """As `ppo_rlhf.sampling.sample`; on_finished gets its groups in the order of the rows.

        Raises UserError, which names the server, when it does not answer, or not with tokens.
        """
        in_main_process(lambda: self._renew_weights(language_model))
        asked = asked_of(settings, stop_ids_of(settings, tokenizer))
        rows = [ids[mask].tolist() for ids, mask in zip(prompts.ids, prompts.mask, strict=True)]
        seeds = (noise[:, 0] * 2**31).long().tolist()
        done: list[Line] = []

        def line_of(row: int) -> Line:
            question = {**asked, "prompt": rows[row], "seed": seeds[row]}
            answer = self.client.ask(f"{self.url}/v1/completions", question, wanted="responses")
            return self._line(answer, settings.max_new_tokens)

        def responses(first: int) -> Responses:
            ids, logprobs, finished = zip(*done[first:], strict=True)
            return responses_of(ids, finished, tokenizer, prompts.ids.device, logprobs=logprobs)

        told = 0
        with ThreadPoolExecutor(self.concurrency) as threads:
            for line in threads.map(line_of, range(len(rows))):
                done.append(line)
                if on_finished is not None and (len(done) - told == group_size or len(done) == len(rows)):
                    on_finished(list(range(told, len(done))), responses(told))
                    told = len(done)
        return responses(0)

    def _renew_weights(self, language_model: PreTrainedModel) -> None:
        """The server reads the weights from a folder that it has not seen, and forgets what it computed by the last."""
        with tempfile.TemporaryDirectory(prefix="policy-", dir=self.weights_folder) as folder:
            save_model(language_model, Path(folder), merge=True)
            reload = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
            self.client.ask(f"{self.url}/collective_rpc", reload, wanted="new weights to its workers")
            self.client.ask(f"{self.url}/reset_prefix_cache", {}, wanted="fresh cache")

    def _line(self, answer: httpx2.Response, max_new_tokens: int) -> Line:
        """Raises UserError for an answer without ids and log-probabilities of a response."""
        try:
            (choice,) = answer.json()["choices"]
            ids = [int(token.removeprefix(TOKEN)) for token in choice["logprobs"]["tokens"]]
            logprobs = [float(number) for number in choice["logprobs"]["token_logprobs"]]
            if 1 <= len(ids) == len(logprobs) <= max_new_tokens:
                return ids, logprobs, choice["finish_reason"] == "stop"
            problem = f"{len(ids)} tokens with {len(logprobs)} log-probabilities, of {max_new_tokens} at most"
        except (AttributeError, KeyError, TypeError, ValueError):
            problem = f"no token ids, but {beginning_of(answer)}"
        raise UserError(f"sampler {self.url} answered {problem}.")


def asked_of(settings: SamplingSettings, stop_ids: list[int]) -> dict[str, Any]:
    """What all requests share. Nothing is left to the server's defaults, which may be those of a generation_config."""
    return {
        "n": 1,
        "max_tokens": settings.max_new_tokens,
        "temperature": settings.temperature,
        "top_k": settings.top_k or -1,
        "top_p": settings.top_p,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "stop": list(settings.stop_strings),
        "include_stop_str_in_output": True,
        "stop_token_ids": stop_ids,
        "ignore_eos": True,  # unless it is among the stop ids
        "logprobs": 1,
        "return_tokens_as_token_ids": True,
    }
