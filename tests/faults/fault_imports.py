"""What the server of forked processes imports once."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

import classic.cli
import classic.ppo
import ppo_rlhf.cli
import ppo_rlhf.report
import ppo_rlhf.train.ppo
import ppo_rlhf.train.reward_model
import ppo_rlhf.train.sft

torch.set_num_threads(1)

__all__ = ["classic", "ppo_rlhf"]
