"""PPO for language models, the whole way: supervised fine-tuning, reward model, PPO."""

__version__ = "0.1.0"
