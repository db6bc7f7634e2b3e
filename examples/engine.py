"""The engine alone: one copy of the weights that samples, and that scores what was sampled."""

import torch

from gearshift import SamplingParams, load, pack, render_prompt

engine = load("embedded", seed=0)  # or a folder, such as that of a run
prompt = render_prompt(engine.tokenizer, [{"role": "user", "content": "Name a colour."}])

with engine.generating():
    params = SamplingParams(n=4, temperature=1.0, max_new_tokens=12)
    [completions] = engine.generate([prompt], params)
for completion in completions:
    text = engine.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
    print(repr(text), completion.finish_reason, round(sum(completion.logprobs), 2))

# The same tokens in the training gear: their log-probabilities, with a graph for gradients.
rows = [(prompt + c.token_ids, [0] * len(prompt) + [1] * len(c.token_ids)) for c in completions]
with engine.training():
    scores = engine.logprobs(pack(rows).to(engine.device))
sampled = torch.tensor([p for c in completions for p in c.logprobs])
print("largest difference between the gears:", (scores.logprobs.cpu() - sampled).abs().max().item())
