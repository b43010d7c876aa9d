"""Rollouts sampled by transformers' own `generate`.

    ppo-rlhf ppo --config ppo.yaml --sampler examples/extensions/sampler.py:generate

To hold the built-in sampler against another one.
"""

import torch

from ppo_rlhf.sampling import responses_of, stop_ids_of


@torch.no_grad()
def generate(language_model, tokenizer, prompts, settings, noise, **scoring):
    stops = stop_ids_of(settings, tokenizer)
    with torch.random.fork_rng():
        torch.manual_seed(int(noise[:, 0].double().sum() * 2**31))
        output = language_model.eval().generate(
            input_ids=prompts.ids,
            attention_mask=prompts.mask.long(),
            max_new_tokens=settings.max_new_tokens,
            do_sample=True,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            eos_token_id=stops,
            pad_token_id=tokenizer.pad_token_id,
        )
    lines = output[:, prompts.ids.shape[1] :].tolist()
    ends = [next((place for place, token in enumerate(line, 1) if token in stops), len(line)) for line in lines]
    responses = [line[:end] for line, end in zip(lines, ends, strict=True)]
    return responses_of(responses, [line[-1] in stops for line in responses], tokenizer, output.device)
