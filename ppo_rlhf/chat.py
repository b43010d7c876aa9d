"""A dialogue with a policy: turns and how they become prompts, answers as they are drawn, their score and KL."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ppo_rlhf.compute import default_device
from ppo_rlhf.core import approx_kl
from ppo_rlhf.data import prompt_texts_and_ids
from ppo_rlhf.errors import UserError
from ppo_rlhf.messages import Message
from ppo_rlhf.models import context_length, load_policy, right_padded
from ppo_rlhf.policy import response_logprobs
from ppo_rlhf.reward_settings import RewardSource
from ppo_rlhf.rewards import RewardFunction, load_reward
from ppo_rlhf.sampling import decode, pieces_of, responses_of
from ppo_rlhf.saved_runs import policy_source, reward_source, run_folder, run_settings, sampling_settings
from ppo_rlhf.settings import SamplingSettings
from ppo_rlhf.train.inputs import load_reference
from ppo_rlhf.train.scoring import scores_of

MAX_NEW_TOKENS = 256  # of an answer, where no run says otherwise; at most half of the context


@dataclass(frozen=True)
class Turn:
    """What was said, and what the policy answered, in tokens as it was drawn."""

    said: str
    messages: list[Message]  # that the policy read, what was said among them
    prompt: str
    prompt_ids: list[int]
    answer: str
    answer_ids: list[int]
    finished: bool  # stopped by itself, not cut off or interrupted


class Chat:
    """A policy and the turns so far.

    With a chat template they are a conversation, else one text, which goes on, a turn on a line.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: SamplingSettings,
        *,
        system: str | None = None,
        keep_history: bool = True,
        seed: int = 0,
    ) -> None:
        """keep_history: of each answer the policy reads all turns before it. seed: of the answers."""
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.keep_history = keep_history
        self.turns: list[Turn] = []
        self.num_forgotten = 0  # turns that the last answer could not see, for want of room
        self._generator = torch.Generator().manual_seed(seed)
        self.system = system

    @property
    def has_template(self) -> bool:
        """Whether turns are rendered by a chat template."""
        return self.tokenizer.chat_template is not None

    @property
    def system(self) -> str | None:
        """What stands before all turns."""
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        if text is not None and not self.has_template:
            raise UserError("the policy has no chat template, so there is no place for a system message.")
        self._system = text

    def answer(self, said: str) -> Iterator[str]:
        """The answer, piece by piece; the turn is kept when the last one has come, or the iterator is closed.

        Turns that do not fit into the model's context beside the answer are left out, the oldest first. Raises
        UserError where this one alone does not.
        """
        messages, prompt, prompt_ids = self._fitting(said)
        noise = torch.rand(1, self.settings.max_new_tokens, generator=self._generator)
        ids: list[int] = []
        finished = False

        def tokens() -> Iterator[int]:
            nonlocal finished
            for step, drawn in enumerate(decode(self.model, self.tokenizer, [prompt_ids], self.settings, noise)):
                ids.append(int(drawn.ids[0, step]))
                finished = bool(drawn.finished[0])
                yield ids[-1]

        try:
            yield from pieces_of(self.tokenizer, tokens())
        finally:
            if ids:
                text = str(self.tokenizer.decode(ids, skip_special_tokens=True))
                self.turns.append(Turn(said, messages, prompt, prompt_ids, text, ids, finished))

    def regenerate(self) -> Iterator[str]:
        """Another answer in the place of the last one. Raises UserError where there is none."""
        if not self.turns:
            raise UserError("there is no answer yet.")
        last = self.turns.pop()
        before = len(self.turns)
        try:
            yield from self.answer(last.said)
        finally:
            if len(self.turns) == before:  # stopped before its first token
                self.turns.append(last)

    def save(self, path: Path) -> None:
        """One row with `messages`, as the supervised stage reads them. Raises UserError where it cannot be written."""
        row = json.dumps({"messages": self._messages(self.turns)}, ensure_ascii=False)
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(row + "\n")
        except FileExistsError:
            raise UserError(f"{path} exists already; give another name.") from None
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}.") from error

    def _fitting(self, said: str) -> tuple[list[Message], str, list[int]]:
        """What the policy reads: messages, their text, its tokens."""
        turns = self.turns if self.keep_history else []
        room = context_length(self.model) - self.settings.max_new_tokens
        for first in range(len(turns) + 1):
            messages = [*self._messages(turns[first:]), {"role": "user", "content": said}]
            row = {"prompt": messages if self.has_template else "\n".join(each["content"] for each in messages)}
            (prompt,), (ids,) = prompt_texts_and_ids([row], self.tokenizer, setting="chat")
            if len(ids) <= room:
                self.num_forgotten = first
                return messages, prompt, ids
        raise UserError(f"that is {len(ids)} tokens; {room} fit beside an answer: say less, or lower --max-new-tokens.")

    def _messages(self, turns: list[Turn]) -> list[Message]:
        messages = [{"role": "system", "content": self.system}] if self.system is not None else []
        for turn in turns:
            messages += [{"role": "user", "content": turn.said}, {"role": "assistant", "content": turn.answer}]
        return messages


# ---------------------------------------------------------------------------------------------- what answers are worth


class Judge:
    """Measures answers by a reward and by a reference, each loaded when it is first asked for.

    Both raise UserError where they cannot be had.
    """

    def __init__(self, chat: Chat, *, reward: RewardSource | None, reference: str | None) -> None:
        self.chat = chat
        self._sources = reward, reference

    @functools.cached_property
    def reward(self) -> RewardFunction:
        source = self._sources[0]
        if source is None:
            raise UserError("there is no reward to score by: no run names one; start with --reward.")
        return load_reward(source, setting="reward", device=self.chat.model.device)

    @functools.cached_property
    def reference(self) -> PreTrainedModel:
        source = self._sources[1]
        if source is None:
            raise UserError("there is no reference to measure KL to: no run names its start; start with --reference.")
        model = load_reference(source, self.chat.tokenizer, setting="reference")
        return model.to(self.chat.model.device).eval()  # type: ignore[arg-type]

    def score(self, turn: Turn) -> float:
        """What the reward gives. Raises UserError where there is none, or it cannot score this."""
        tokenizer = self.chat.tokenizer
        responses = responses_of([turn.answer_ids], [turn.finished], tokenizer, self.chat.model.device)
        columns: dict[str, list[Any]] = {"messages": [turn.messages]} if self.chat.has_template else {}
        return float(scores_of(self.reward, [turn.prompt], responses, columns, tokenizer, must_be_finite=False).total)

    @torch.no_grad()
    def kl(self, turn: Turn) -> float:
        """Σ log(π/π_ref) over the answer's tokens, in nats, at the dialogue's temperature: one sample of the KL."""
        where = self.chat.model.device
        prompt_ids, prompt_mask = right_padded([turn.prompt_ids], where)
        ids, mask = right_padded([turn.answer_ids], where)
        inputs = {"prompt_ids": prompt_ids, "prompt_mask": prompt_mask, "response_ids": ids, "response_mask": mask}
        logprobs, ref_logprobs = (
            response_logprobs(model, inputs, temperature=self.chat.settings.temperature)
            for model in (self.chat.model, self.reference)
        )
        return float(approx_kl(logprobs, ref_logprobs, "k1").sum())


# ------------------------------------------------------------------------------------------------------------- loading


def load_chat(
    source: str,
    *,
    sampling: Mapping[str, Any],
    system: str | None = None,
    keep_history: bool = True,
    seed: int = 0,
    reward: str | None = None,
    reference: str | None = None,
) -> tuple[Chat, Judge]:
    """A dialogue with the policy of a run, a pipeline, a folder or the Hub, and what judges its answers.

    sampling: settings in the place of the run's, or without a run of the model's generation_config. reward, reference:
    in the place of those that the run names. Raises UserError for what cannot be loaded.
    """
    folder = _folder_of_run(source)
    run = run_settings(str(folder))
    model, tokenizer = load_policy(policy_source(source), setting="chat")
    model.to(default_device()).eval()  # type: ignore[arg-type]
    settings = sampling_settings(folder) if run.get("sampling") else settings_of(model)
    chat = Chat(model, tokenizer, replace(settings, **sampling), system=system, keep_history=keep_history, seed=seed)
    start = (run.get("reference") or run.get("policy")) if "kl_coef" in run else None
    return chat, Judge(chat, reward=reward or reward_source(str(folder)), reference=reference or start)


def settings_of(model: PreTrainedModel) -> SamplingSettings:
    """How the model's own generation_config samples."""
    config = model.generation_config or GenerationConfig()
    ends = config.eos_token_id
    return SamplingSettings(
        max_new_tokens=min(config.max_new_tokens or MAX_NEW_TOKENS, context_length(model) // 2),
        temperature=config.temperature or 1.0,
        top_k=config.top_k or 0,
        top_p=config.top_p or 1.0,
        stop_token_ids=tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,),
    )


def _folder_of_run(source: str) -> Path:
    """Where the run's configuration is: also of the policy in a run's folder, given by itself."""
    folder = run_folder(source)
    inside = folder.is_dir() and not (folder / "policy").is_dir() and (folder.parent / "policy").is_dir()
    return folder.parent if inside else folder
