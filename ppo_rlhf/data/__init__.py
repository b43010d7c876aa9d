"""Data: rows from everything `datasets` loads, in the formats of the ecosystem, as the tokens that a model will see."""

from ppo_rlhf.data.chats import with_chat_template
from ppo_rlhf.data.formats import (
    comparisons,
    demonstrations,
    first_ids,
    prompt_and_response_ids,
    prompt_texts_and_ids,
    prompts_and_completions,
    responses_in_tokens,
)
from ppo_rlhf.data.rows import Row, Rows, held_out, renamed, stream, text_column
from ppo_rlhf.data.sources import check_preferences, is_database, load_rows, preferences_store
from ppo_rlhf.data.tokens import Example, Examples

__all__ = [
    "Example",
    "Examples",
    "Row",
    "Rows",
    "check_preferences",
    "comparisons",
    "demonstrations",
    "first_ids",
    "held_out",
    "is_database",
    "load_rows",
    "preferences_store",
    "prompt_and_response_ids",
    "prompt_texts_and_ids",
    "prompts_and_completions",
    "renamed",
    "responses_in_tokens",
    "stream",
    "text_column",
    "with_chat_template",
]
