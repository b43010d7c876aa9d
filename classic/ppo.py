"""PPO on control tasks: `train` from Python, `run` as `python -m classic train` calls it, one loop for both."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from classic.config import Algorithm, EnvironmentSettings, TrainConfig
from classic.envs import IN_TORCH, Environments, make_environments, solved_at
from classic.evaluate import Evaluator
from classic.pictures import Painter, painter_of
from classic.policy import Policy, load, require_spaces
from classic.presets import preset_for
from classic.rollout import Collector, Trajectory, experience_of
from classic.trpo import trust_region_update
from ppo_rlhf.core import Experience, adapt_kl_coef_ppo_penalty, explained_variance
from ppo_rlhf.errors import UserError
from ppo_rlhf.micro_batches import MicroBatch
from ppo_rlhf.optimizer import learning_rate, make_optimizer, set_learning_rate
from ppo_rlhf.run import LoopState, Run, begin, make_accelerator, read_config
from ppo_rlhf.seeding import keyed_generator, keyed_seed
from ppo_rlhf.update import measured_kl, ppo_update

Callback = Callable[[int, Mapping[str, float]], None]  # called after each update with its number and metrics
EnvironmentMaker = str | Callable[..., Any]  # an id, or what makes one environment

GPU_WIDTH = 512  # hidden units from which a GPU repays its latency though the environments are on the CPU
GPU_ENVS = 2048  # environments in torch from which it repays it on small networks


@dataclass
class Learner:
    """What the loop trains, and with what."""

    config: TrainConfig
    policy: Policy
    optimizer: Any
    collector: Collector
    accelerator: Accelerator
    micro_batch: MicroBatch


def train(
    env: EnvironmentMaker,
    *,
    algorithm: Algorithm | None = None,
    num_steps: int | None = None,
    seed: int | None = None,
    output_dir: str | None = None,
    config: TrainConfig | None = None,
    policy: Policy | None = None,
    callbacks: Iterable[Callback] = (),
) -> Policy:
    """Trains a policy on an environment's id, or on a callable that makes one; → the final policy.

    config: by default the environment's preset for the algorithm where there is one. algorithm, num_steps, seed,
    output_dir: in place of the configuration's. Without output_dir nothing is written and nothing evaluated. policy:
    one to go on with, such as one around your own nn.Module. Whole rollouts only, at least one, at most num_steps.

    Raises UserError for what cannot be trained.
    """
    name = env if isinstance(env, str) else getattr(env, "__name__", "environment")
    config = config or preset_for(name, algorithm)
    given: dict[str, Any] = {"algorithm": algorithm, "num_steps": num_steps, "seed": seed, "output_dir": output_dir}
    config = replace(config, env_id=name, **{key: value for key, value in given.items() if value is not None})
    if config.output_dir is not None:
        return run(config, env=env, policy=policy, callbacks=callbacks)[0]
    accelerator = make_accelerator(None, precision=config.precision, log_with=(), cpu=device_of(config, env) == "cpu")
    learner = learner_of(config, env, policy, accelerator)
    try:
        state = LoopState(kl_coef=config.penalty.kl_coef)
        while state.step < config.num_updates:
            state, metrics = improve(learner, state)
            for callback in callbacks:
                callback(state.step, metrics)
    finally:
        learner.collector.envs.close()
    return accelerator.unwrap_model(learner.policy).eval()


def run(
    config: TrainConfig,
    *,
    env: EnvironmentMaker | None = None,
    policy: Policy | None = None,
    callbacks: Iterable[Callback] = (),
) -> tuple[Policy, dict[str, Any]]:
    """The same in a run folder: metrics, evaluations, checkpoints, final and best policy; → with the run's summary."""
    env = config.env_id if env is None else env
    start = begin(config, "classic", cpu=device_of(config, env) == "cpu", longer=asks_for_more(config))
    if start is None:
        return load(str(config.output_dir)), {"finished": config.output_dir}
    learner = learner_of(config, env, policy, start.accelerator)
    with contextlib.ExitStack() as closing:
        closing.callback(learner.collector.envs.close)
        judge = Evaluator(
            env,
            episodes=config.eval_episodes,
            seed=keyed_seed(config.seed, "evaluation"),
            settings=config.environment,
            device=learner.policy.device,
        )
        closing.callback(judge.close)
        painter = painter_of(env, learner.policy, config)
        if painter is not None:
            closing.callback(painter.close)
        with start.run(num_steps=config.num_updates) as folder:
            state = folder.resume()
            if state is None:
                state = LoopState(kl_coef=config.penalty.kl_coef, before=judge(learner.policy).metrics)
                paint(folder, learner, painter, state)
            elif state.tensors:
                learner.collector.load_state_dict(state.tensors)
            while state.step < config.num_updates:
                state, metrics = improve(learner, state)
                paint(folder, learner, painter, state)
                state = evaluate_and_save(folder, learner, judge, state, metrics)
                for callback in callbacks:
                    callback(state.step, metrics)
                folder.stop_if_asked(replace(state, tensors=learner.collector.state_dict()))
            if not state.after:  # resumed beyond its end
                state = evaluated(folder, learner, judge, state)
            folder.save_model("policy", learner.policy.save)
            return learner.policy.eval(), folder.finish(summary_of(state, config))


def asks_for_more(config: TrainConfig) -> bool:
    """Whether a run that is resumed is to be longer than it was before."""
    before = read_config(Path(config.output_dir)) if config.resume and config.output_dir is not None else None
    if before is None:
        return False
    return replace(config, num_steps=before.get("num_steps", config.num_steps)).num_updates < config.num_updates


def improve(learner: Learner, state: LoopState) -> tuple[LoopState, dict[str, float]]:
    """One iteration of PPO: collect ► [normalise] ► gae ► whiten ► update ► adapt β; → next state, metrics."""
    config, policy, collector = learner.config, learner.policy, learner.collector
    set_learning_rate(learner.optimizer, learning_rate(config.optimizer, state.step, config.num_updates))
    started = time.perf_counter()
    noise = keyed_generator(config.seed, "rollout", state.step, device=policy.device)
    trajectory = collector.collect(policy, config.horizon, noise)
    learnt = trajectory.rewards * config.reward_scale
    if policy.reward_normalizer is not None:
        normalizer = policy.reward_normalizer
        collector.running = normalizer.update(learnt, trajectory.ended, trajectory.mask, collector.running)
        learnt = normalizer(learnt)
    experience = experience_of(
        replace(trajectory, rewards=learnt),
        policy,
        gamma=config.gamma,
        lam=config.gae_lambda,
        whiten_advantages=config.ppo.whiten_advantages == "rollout",
        bootstrap_truncations=config.bootstrap_truncations,
        rows=None if config.ppo.micro_batch_size is None else max(1, config.ppo.micro_batch_size // config.horizon),
    )
    statistics, kl_coef = update(learner, experience, state)
    policy.observe(trajectory.inputs, trajectory.mask)
    steps = config.num_envs * config.horizon
    metrics = {
        **episode_metrics(trajectory, experience),
        **statistics,
        "kl_coef": state.kl_coef if penalizes(config) else 0.0,
        "lr": learner.optimizer.param_groups[0]["lr"],
        "steps": (state.step + 1) * steps,
        "steps_per_second": steps / (time.perf_counter() - started),
    }
    return replace(state, step=state.step + 1, kl_coef=kl_coef), metrics


def update(learner: Learner, experience: Experience, state: LoopState) -> tuple[dict[str, float], float]:
    """The algorithm's update of the policy; → its statistics, and β of the next one."""
    config, policy = learner.config, learner.policy
    if config.algorithm == "trpo":
        statistics = trust_region_update(
            policy, learner.optimizer, experience, config.trust_region, seed=(config.seed, state.step)
        )
        return statistics, state.kl_coef
    penalized = penalizes(config)
    remaining = 1 - state.step / config.num_updates if config.clip_schedule == "linear" else 1
    clip_range = config.ppo.clip_range
    settings = replace(
        config.ppo,
        clip_range=clip_range * remaining if clip_range is not None and config.algorithm == "clip" else None,
        compile=config.compile,
    )
    rows = experience if penalized else replace(experience, distribution=None)
    if policy.core is None:
        rows = rows.by_step()
    statistics = ppo_update(
        policy,
        learner.optimizer,
        rows,
        settings,
        accelerator=learner.accelerator,
        generator=keyed_generator(config.seed, "shuffle", state.step),
        micro_batch=learner.micro_batch,
        kl_penalty_coef=state.kl_coef if penalized else 0.0,
        kl_divergence=policy.distribution.kl if penalized else None,
    )
    if config.algorithm != "penalty":
        return statistics, state.kl_coef
    kl = measured_kl(
        policy,
        rows,
        settings,
        accelerator=learner.accelerator,
        kl_divergence=policy.distribution.kl,
        micro_batch=learner.micro_batch,
    )
    statistics["policy/kl"] = kl
    if not statistics["optimizer_steps"]:  # a KL of 0 says nothing of β
        return statistics, state.kl_coef
    rule = config.penalty
    kl_coef = adapt_kl_coef_ppo_penalty(
        state.kl_coef, kl, target=rule.kl_target, minimum=rule.minimum, maximum=rule.maximum
    )
    return statistics, kl_coef


def penalizes(config: TrainConfig) -> bool:
    """Whether the loss has a KL penalty, with an adapted or a fixed β."""
    return config.algorithm in ("penalty", "fixed")


def episode_metrics(trajectory: Trajectory, experience: Experience) -> dict[str, float]:
    """Mean raw return and length of the episodes that ended in a rollout, where any did; how good the values are."""
    names = [*trajectory.episodes, "value/explained_variance"]
    explained = explained_variance(experience.values, experience.returns, experience.mask)
    numbers = torch.stack([*(x.float() for x in trajectory.episodes.values()), explained.float()])
    found = dict(zip(names, numbers.tolist(), strict=True))
    count, total, length = (found.pop(name) for name in ("count", "return", "length"))
    if count:
        found |= {"episode/return": total / count, "episode/length": length / count}
    return {**found, "episodes": count}


def paint(run: Run, learner: Learner, painter: Painter | None, state: LoopState) -> None:
    """A picture of the untrained policy, and `config.pictures` more evenly over the run, the last of the final one."""
    if painter is not None:
        updates, pictures = learner.config.num_updates, learner.config.pictures
        if state.step == 0 or state.step * pictures // updates > (state.step - 1) * pictures // updates:
            steps = state.step * learner.config.num_envs * learner.config.horizon
            run.log_policy_picture(state.step, {"steps": steps, **painter(learner.policy)})


def evaluate_and_save(
    run: Run, learner: Learner, judge: Evaluator, state: LoopState, metrics: dict[str, float]
) -> LoopState:
    """The end of an iteration: evaluation where one is due, the best policy kept, metrics logged, a checkpoint."""
    config = learner.config
    last = state.step == config.num_updates
    if last or is_due(config.eval_every, state.step, config):
        state = evaluated(run, learner, judge, state)
        metrics |= state.after
    run.log(state.step, metrics)
    if last or is_due(config.save_every, state.step, config):
        run.save_checkpoint(replace(state, tensors=learner.collector.state_dict()))
    return state


def evaluated(run: Run, learner: Learner, judge: Evaluator, state: LoopState) -> LoopState:
    """The state with an evaluation of the policy as it is, which is kept where it is the best so far."""
    outcome = judge(learner.policy).metrics
    if outcome["eval/return"] > state.best:
        run.save_model("best", learner.policy.save)
    return replace(state, after=outcome, best=max(state.best, outcome["eval/return"]))


def is_due(every: int, step: int, config: TrainConfig) -> bool:
    """Whether the iteration that ended passed a multiple of `every` environment steps."""
    rollout = config.num_envs * config.horizon
    return bool(every) and step * rollout // every > (step - 1) * rollout // every


def summary_of(state: LoopState, config: TrainConfig) -> dict[str, Any]:
    """The outcome in numbers: raw returns of the evaluations before, after and at the best, and what counts as solved:
    None where Gymnasium does not say, or the environment is not made as it has it.
    """
    return {
        "env_id": config.env_id,
        "algorithm": config.algorithm,
        "steps": state.step * config.num_envs * config.horizon,
        "return_before": state.before["eval/return"],
        "return_after": state.after["eval/return"],
        "return_std_after": state.after["eval/return_std"],
        "return_best": state.best,
        "return_solved": solved_at(config.env_id) if config.environment == EnvironmentSettings() else None,
    }


def learner_of(config: TrainConfig, env: EnvironmentMaker, policy: Policy | None, accelerator: Accelerator) -> Learner:
    """Environments, policy and optimizer, all from the run's seed, whatever was drawn before in the program."""
    if accelerator.num_processes > 1:
        raise UserError("classic runs in one process; for more environments raise num_envs.")
    envs = make_environments(
        env,
        num_envs=config.num_envs,
        seed=keyed_seed(config.seed, "environments"),
        device=accelerator.device,
        **config.environment.arguments(),
    )
    try:
        policy = policy or new_policy(config, envs)
        require_spaces(policy, envs, config.env_id)
        optimizer = make_optimizer(policy.to(accelerator.device), config.optimizer)
        policy, optimizer = accelerator.prepare(policy, optimizer)
        micro_batch = MicroBatch(config.ppo.micro_batch_size, accelerator, setting="ppo.micro_batch_size")
        return Learner(config, policy, optimizer, Collector(envs, policy), accelerator, micro_batch)
    except BaseException:
        envs.close()
        raise


def new_policy(config: TrainConfig, envs: Environments) -> Policy:
    """The policy that the run's seed gives, whatever torch's global generator stands at."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(keyed_seed(config.seed, "policy"))  # and no GPU's
        return Policy(
            envs.observation_space,
            envs.action_space,
            config.network,
            normalize_observations=config.normalize_observations,
            reward_gamma=config.gamma if config.normalize_rewards else None,
        )


def device_of(config: TrainConfig, env: EnvironmentMaker) -> str:
    """ "cpu" or "cuda": as asked for, else the GPU where it repays its latency.

    A small network gains by it only with many environments that live there too; a wide or convolutional one always.
    Raises UserError where a GPU is asked for and there is none.
    """
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise UserError("device=cuda: torch finds no NVIDIA GPU here; use device=auto, or cpu.")
    if config.device != "auto":
        return config.device
    wide = max(config.network.hidden_sizes, default=0) >= GPU_WIDTH or config.environment.atari
    many = env in IN_TORCH and config.num_envs >= GPU_ENVS
    return "cuda" if available and (wide or many) else "cpu"
