"""Measure models on rows of your own: a figure with its 95% interval, and every answer."""

from gearshift import evaluate

rows = [
    {"prompt": f"What is {a} + {b}? Answer with the number alone.", "answer": str(a + b)}
    for a in range(2, 6)
    for b in range(1, 5)
]


def exact(prompts, completions, answer, **columns):
    return [float(text.strip() == right) for text, right in zip(completions, answer)]


found = evaluate("embedded", rows, exact, max_new_tokens=8)
low, high = found.interval
print(f"{found.metric} {found.value:.2f} [{low:.2f}, {high:.2f}] of {found.episodes} prompts")
for answer in found.samples[:3]:
    print(answer["prompt"], "->", repr(answer["completion"]), answer["reward"])
