"""The checks: what each one looks at, from where on it speaks and why there, what causes it, and what helps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ppo_rlhf.doctor import looks
from ppo_rlhf.doctor.looks import EXACT, ROUNDED
from ppo_rlhf.records import Record, records_of


@dataclass(frozen=True)
class Check:
    """One thing that goes wrong in runs."""

    name: str
    stages: tuple[str, ...]  # where it applies
    threshold: str  # from where on it speaks, and why there
    cause: str
    remedy: str
    look: Callable[[Record], str | None]


@dataclass(frozen=True)
class Finding:
    """A check that spoke."""

    check: Check
    folder: Path
    step: int
    evidence: str

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        told = asdict(self.check) | {"folder": str(self.folder), "step": self.step, "evidence": self.evidence}
        return {name: value for name, value in told.items() if name not in ("look", "stages")}


def examine(folder: Path) -> list[Finding]:
    """All findings in a run's folder, or a pipeline's. Raises UserError for a folder that holds no run."""
    findings = []
    for record in records_of(folder):
        for check in CHECKS:
            evidence = check.look(record) if record.stage in check.stages else None
            if evidence is not None:
                findings.append(Finding(check, record.folder, record.step, evidence))
    return findings


PPO, BOTH = ("ppo",), ("ppo", "classic")
CHECKS = (
    Check(
        "bad numbers",
        ("sft", "reward", *BOTH),
        "Any step skipped, or any metric that is null: a sound run has none.",
        "A loss, a reward, a log-ratio or a gradient was not finite: a learning rate too high, or a reward too large.",
        "Read bad_samples.jsonl (of sft, reward and ppo); lower optimizer.lr; bound the reward; in fp16 use bf16.",
        looks.bad_numbers,
    ),
    Check(
        "negative KL",
        PPO,
        "The mean of the last ten steps lies below -0.05 nats and three standard errors below 0: the KL of the sampled "
        "distribution is never negative, only its estimate is, by noise.",
        "Responses are not sampled from the distribution whose log-probabilities train: top-k, top-p, another "
        "temperature, a penalty on repetition.",
        "Set sampling.top_k=0 and sampling.top_p=1; use one temperature everywhere.",
        looks.negative_kl,
    ),
    Check(
        "first ratio is not 1",
        BOTH,
        f"Above {EXACT} in float32 (observed there: 7e-6), above {ROUNDED} in bf16 and fp16 (observed: 5e-2). "
        "Before its first step an update's ratios are those of a policy to itself.",
        "The policy that trains is not the one whose log-probabilities the rollout kept: something random or rounded "
        "acts in its forward pass, or something moved its weights in between.",
        "Turn dropout off; leave the policy alone in reward functions and callbacks; compare at precision=no.",
        looks.first_ratio,
    ),
    Check(
        "sampler is not the policy",
        PPO,
        f"Above {ROUNDED} nats a token over the last five steps (the run's own sampler: 5e-7 in float32, 3e-3 in bf16)."
        " Trained on are the policy's own log-probabilities in any case.",
        "A server samples from other weights than the policy's, or at another temperature, or tells log-probabilities "
        "from before the temperature.",
        "See that the server gets the weights of each step; start vLLM with --logprobs-mode processed_logprobs.",
        looks.other_sampler,
    ),
    Check(
        "dropout left on",
        PPO,
        f"The first ratio is not 1, and in the first rollout the policy differs from its frozen start by over {EXACT} "
        f"nats a token ({ROUNDED} in bf16), though in evaluation mode the two are one.",
        "Something random acts in training mode alone.",
        "Set the model's dropout probabilities to 0 before training, those in your own modules too.",
        looks.dropout,
    ),
    Check(
        "stop token is masked",
        PPO,
        "The last trained token of every finished response, four at least, is text. One stop token would do to silence "
        "it: it is trained or it is not.",
        "The mask was inferred from the ids, where padding and eos are one id: the policy never learns to stop.",
        "Take the mask from generation; give the tokenizer a pad token of its own.",
        looks.masked_stop_token,
    ),
    Check(
        "reward hacking",
        PPO,
        "The score rose while the gold score fell from its best quarter by over a quarter of its spread, or responses "
        "doubled, or a quarter more of their token pairs repeat (response/repetition); each beyond three standard "
        "errors. Healthy runs stay within a tenth.",
        "The policy found what the reward model overrates.",
        "Raise kl_coef or set kl_target; stop earlier, at the best evaluation (folder best); train the reward model on "
        "samples of this policy.",
        looks.reward_hacking,
    ),
    Check(
        "KL running away",
        PPO,
        "Over 1 nat a token, where each token is e times likelier than under the reference (healthy runs: up to 0.6), "
        "or over three times kl_target.",
        "The penalty is too weak for the reward's scale, or steps are too long.",
        "Raise kl_coef, or set kl_target; lower optimizer.lr or ppo.num_epochs; check the reward's scale.",
        looks.kl_running_away,
    ),
    Check(
        "entropy collapse",
        BOTH,
        "Below a tenth of what it started with (healthy language runs keep 80 %, control 40 %). In control only while "
        "the return does not rise, since a good policy may be deterministic there; densities are left out.",
        "The policy gives one answer to everything; what it does not try it cannot learn.",
        "Raise kl_coef, or ppo.entropy_coef; lower optimizer.lr; look for a reward that one phrase earns.",
        looks.entropy_collapse,
    ),
    Check(
        "clip fraction too high",
        BOTH,
        "Over 30 % in the second half of the run (healthy: up to 15 %): most of the gradient is thrown away.",
        "Each update moves the policy out of the clip range.",
        "Lower optimizer.lr or ppo.num_epochs; raise the batch size; set ppo.target_kl.",
        looks.clip_fraction,
    ),
    Check(
        "stop rate falling",
        PPO,
        "By 25 percentage points since before the run: far beyond the noise of a few hundred responses.",
        "Responses that are cut off are paid as well as others, or the stop token is not trained.",
        "Set missing_eos (rule set, or subtract with a value above 0); raise sampling.max_new_tokens if responses need "
        "more room.",
        looks.stop_rate_falling,
    ),
    Check(
        "length collapse",
        PPO,
        "To under a third of the length before the run (healthy runs: down to a half).",
        "The reward, or a price on what is cut off, favours saying nothing; every token costs KL.",
        "Score by what is said, not by its length; lower the price of a missing eos, or kl_coef.",
        looks.length_collapse,
    ),
    Check(
        "value function explains nothing",
        BOTH,
        "Explained variance 0 at every step; or below -0.5 in the last quarter and above 0.1 in none. A little below 0 "
        "is usual where one score pays a short response (the demo at value_coef=0.1: -0.1 to -0.3, at 1: 0.2), and far "
        "below 0 where a control task is solved and returns no longer vary; both are harmless.",
        "The value function is not trained, or chases returns that change faster than it learns.",
        "Raise ppo.value_coef; lower optimizer.lr; scale the reward; use value_model=separate.",
        looks.value_function,
    ),
    Check(
        "whitening batch too small",
        BOTH,
        "Fewer than 8 rows: mean and variance of a handful of advantages are those of its largest one.",
        "Advantages are divided by the spread of too few of them.",
        "Raise batch_size (num_envs or horizon in control), or leave ppo.whiten_advantages at rollout.",
        looks.whitening_batch,
    ),
    Check(
        "reward does not read this vocabulary",
        PPO,
        "Rank correlation of score and gold score over the held-out responses at most 0.1 at every evaluation (seen "
        "with shuffled ids: 0.00 ± 0.05; with sound reward models: 0.4 and more). Needs a gold reward or a judge.",
        "The reward model reads ids of another vocabulary, or text in another template, or was not trained.",
        "Give the reward model the tokenizer that it was trained with; score texts, never the policy's ids.",
        looks.reward_vocabulary,
    ),
    Check(
        "constant reward",
        BOTH,
        "All scores seen in the second half of the run are equal, eight at least; in control all returns of the run.",
        "Nothing to learn from: every advantage is 0, and the KL penalty alone moves the policy.",
        "Call the reward on a few responses by hand; reward what can be reached from where the policy starts.",
        looks.constant_reward,
    ),
    Check(
        "reference moved",
        PPO,
        "Its weights' norm changes by over a millionth, or the KL to it stays exactly 0 while the policy moves.",
        "The reference shares its weights with the policy, or was replaced by a later one.",
        "Pass a frozen copy: reference=copy.deepcopy(policy), and leave it alone.",
        looks.reference_moved,
    ),
    Check(
        "gradient clipped at every step",
        ("sft", "reward", *BOTH),
        "Over ten times the limit at every step, ten steps at least. Clipping by a little at every step is common and "
        "harmless; by this much the step's length says nothing of the gradient's any more.",
        "max_grad_norm is far below the loss's scale.",
        "Raise max_grad_norm; scale the reward; lower value_coef.",
        looks.gradient_clipped,
    ),
)
