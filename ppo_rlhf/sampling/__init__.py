"""Sampling: responses to prompts, token by token, by a sampler of our own or one that takes its place."""

from ppo_rlhf.sampling.decoding import decode
from ppo_rlhf.sampling.responses import Responses, pieces_of, responses_of, texts_of
from ppo_rlhf.sampling.sampler import FinishedRows, Sampler, sample, stream
from ppo_rlhf.sampling.tokens import check_stop_ids, draw, stop_ids_of, warn_of_truncation
from ppo_rlhf.settings import SamplingSettings

__all__ = [
    "FinishedRows",
    "Responses",
    "Sampler",
    "SamplingSettings",
    "check_stop_ids",
    "decode",
    "draw",
    "pieces_of",
    "responses_of",
    "sample",
    "stop_ids_of",
    "stream",
    "texts_of",
    "warn_of_truncation",
]
