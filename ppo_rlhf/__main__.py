"""`python -m ppo_rlhf` is `ppo-rlhf`."""

from ppo_rlhf.cli import entry_point

if __name__ == "__main__":
    entry_point()
