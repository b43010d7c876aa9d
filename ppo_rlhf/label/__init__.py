"""A leaf: the labelling app, pages in a browser over a store of preferences."""

from ppo_rlhf.label.app import LabelSettings, is_name, make_app
from ppo_rlhf.label.serve import check_host, serve

__all__ = ["LabelSettings", "check_host", "is_name", "make_app", "serve"]
