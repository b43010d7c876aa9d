"""Human comparisons: the store, what the choices say, and the ways in and out."""

from ppo_rlhf.preferences.exchange import (
    all_pairs,
    choices_from,
    pair_rows,
    pairs_from,
    ranked_rows,
    text_of,
    write_rows,
)
from ppo_rlhf.preferences.statistics import Statistics, statistics_lines, statistics_of, win_rate
from ppo_rlhf.preferences.store import Choice, Deal, NotDealt, Pair, Progress, Prompt, Store, check_address

__all__ = [
    "Choice",
    "Deal",
    "NotDealt",
    "Pair",
    "Progress",
    "Prompt",
    "Statistics",
    "Store",
    "all_pairs",
    "check_address",
    "choices_from",
    "pair_rows",
    "pairs_from",
    "ranked_rows",
    "statistics_lines",
    "statistics_of",
    "text_of",
    "win_rate",
    "write_rows",
]
