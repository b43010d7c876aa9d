"""The README and the pages of docs/, and what stands in their code blocks."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]
READMES = sorted(ROOT.glob("README*.md"))
DOCUMENTS = [*READMES, *sorted(ROOT.glob("docs/*.md"))]
PROGRAMS = ("ppo-rlhf", "python", "torchrun", "make")


def fenced_blocks(text, *languages):
    return re.findall(rf"^```(?:{'|'.join(languages)})\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def commands_in(text):
    """The command lines in the shell's fenced blocks and in indented ones, as words."""
    lines = [line for block in fenced_blocks(text, "bash", "sh", "console") for line in block.splitlines()]
    lines += re.findall(r"^ {4}(\S.*)$", text, flags=re.MULTILINE)
    told = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines if line.startswith(PROGRAMS)]
    return [words for words in told if words[0] in PROGRAMS]
