"""Our sampler beside `generate` of transformers, in turns in one process: python examples/benchmarks/sampling_speed.py

    python examples/benchmarks/sampling_speed.py --device cuda --cases "gpt2 64"

Models with random weights; nothing is downloaded. CPU seconds of this process on one thread (on a GPU seconds of the
clock), medians of --repeats turns. Responses of the cases `stops` and `waiting` end at one of 205 of 4,096 ids, after
20 tokens on average, a sixth of the limit; in the latter four batches wait. `flips` is the share of rows in which
float32 drew another response than float64 from the same noise.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from ppo_rlhf.prompts import PromptBatch
from ppo_rlhf.sampling import SamplingSettings, sample
from ppo_rlhf.seeding import keyed_generator, uniform_rows


@dataclass(frozen=True)
class Case:
    """What is sampled."""

    model: Callable[[], PreTrainedModel]
    batch_size: int
    max_new_tokens: int = 64
    stops: int = 0  # how many of the ids end a response
    batches: int = 1  # of prompts; `generate` takes one after the other, ours fills up as rows end


SMALL = {"vocab_size": 4096, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, "max_position_embeddings": 256}


def tiny_gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(n_embd=128, n_layer=4, n_head=4, **SMALL))


def tiny_llama() -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            **SMALL,
        )
    )


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config())


CASES = {
    "tiny": Case(tiny_gpt2, 32),
    "llama": Case(tiny_llama, 32),
    "stops": Case(tiny_gpt2, 32, max_new_tokens=128, stops=205),
    "waiting": Case(tiny_gpt2, 32, max_new_tokens=128, stops=205, batches=4),
    "gpt2": Case(gpt2, 8),
    "gpt2 64": Case(gpt2, 64, max_new_tokens=128),
}


def tokenizer_of(size: int) -> PreTrainedTokenizerFast:
    """One word an id."""
    words = {f"w{number}": number for number in range(size)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w1")), eos_token="w0", pad_token="w1"
    )


def prompts_of(case: Case, vocabulary: int) -> PromptBatch:
    """Prompts of 8 to 32 tokens."""
    generator = keyed_generator("prompts")
    size = case.batch_size * case.batches
    lengths = torch.randint(8, 33, (size, 1), generator=generator)
    ids = torch.randint(2, vocabulary, (size, 32), generator=generator)
    mask = torch.arange(32) >= 32 - lengths
    return PromptBatch(ids, mask, [""] * size, list(range(size)))


def ours(
    model: PreTrainedModel, prompts: PromptBatch, settings: SamplingSettings, noise: Tensor, tokenizer: Any
) -> Any:
    """→ how long each response is, and their ids, a list each."""
    responses = sample(model, tokenizer, prompts, settings, noise)
    lines = [line[kept].tolist() for line, kept in zip(responses.ids, responses.mask, strict=True)]
    return responses.mask.sum(1), lines


def generated(model: PreTrainedModel, prompts: PromptBatch, settings: SamplingSettings, stops: list[int]) -> Tensor:
    """→ how long each response of `generate` is."""
    ids = model.generate(
        prompts.ids.to(model.device),
        attention_mask=prompts.mask.long().to(model.device),
        do_sample=True,
        top_k=0,
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=stops,
        pad_token_id=1,
    )[:, prompts.ids.shape[1] :].cpu()
    ended = torch.isin(ids, torch.tensor(stops)).int()
    return torch.where(ended.any(1), ended.argmax(1) + 1, ids.shape[1])


def clock(device: str) -> float:
    """CPU seconds of this process; on a GPU seconds of the clock, its work done."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def measure(case: Case, options: argparse.Namespace) -> dict[str, float]:
    """Medians of both, in turns."""
    torch.manual_seed(0)
    model = case.model().eval().to(options.device)
    vocabulary = model.config.vocab_size
    prompts, tokenizer = prompts_of(case, vocabulary), tokenizer_of(vocabulary)
    stops = list(range(case.stops)) or [vocabulary + 1]  # no id of the vocabulary: nothing stops
    settings = SamplingSettings(
        max_new_tokens=case.max_new_tokens, stop_token_ids=tuple(stops), batch_size=case.batch_size
    )
    seconds: dict[str, list[float]] = {"generate": [], "ours": []}
    tokens: dict[str, list[int]] = {"generate": [], "ours": []}
    for turn in range(options.repeats + 1):  # the first is for warming up
        for name in seconds:
            torch.set_float32_matmul_precision("highest" if name == "generate" else options.precision)
            model.set_attn_implementation("sdpa" if name == "generate" else options.attention)
            torch.manual_seed(turn)
            start = clock(options.device)
            if name == "generate":
                size = case.batch_size
                parts = [prompts[start : start + size] for start in range(0, len(prompts), size)]
                lengths = torch.cat([generated(model, part, settings, stops) for part in parts])
            else:
                noise = uniform_rows(prompts.rows, case.max_new_tokens, turn)
                lengths, ids = ours(model, prompts, settings, noise, tokenizer)
            if turn:
                seconds[name].append(clock(options.device) - start)
                tokens[name].append(int(lengths.sum()))
    chosen = max if options.best else statistics.median
    result = {
        f"{name} tokens/s": chosen([n / s for n, s in zip(tokens[name], seconds[name], strict=True)])
        for name in seconds
    }
    result["mean length"] = statistics.mean(tokens["ours"] + tokens["generate"]) / len(prompts)
    result["ratio"] = result["ours tokens/s"] / result["generate tokens/s"]
    _, exact = ours(model.double(), prompts, settings, noise, tokenizer)
    result["flips"] = statistics.mean(line != other for line, other in zip(ids, exact, strict=True))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES)[:-1])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--precision", choices=["highest", "high", "medium"], default="highest", help="of our products")
    parser.add_argument("--attention", choices=["eager", "sdpa"], default="eager", help="of our models")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--best", action="store_true", help="the best turns instead of medians: where others use the machine"
    )
    parser.add_argument("--json", action="store_true", help="one object on the last line")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    print("| case | generate, tokens/s | ours, tokens/s | ratio | mean length | flips |\n|---|---|---|---|---|---|")
    for name in options.cases:
        results[name] = row = measure(CASES[name], options)
        print(
            f"| {name} | {row['generate tokens/s']:.0f} | {row['ours tokens/s']:.0f} | {row['ratio']:.2f} "
            f"| {row['mean length']:.1f} | {row['flips']:.3f} |"
        )
    if options.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
