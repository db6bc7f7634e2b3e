"""Reinforcement learning on prompts of your own, with a reward function in the manner of TRL."""

from datetime import date, timedelta

from gearshift import train_rl

days = [date(1990, 1, 1) + timedelta(days=137 * number) for number in range(64)]
rows = [
    {"prompt": f"Write this date as YYYY-MM-DD: {day:%d %B %Y}", "answer": day.isoformat()}
    for day in days
]


def right_date(prompts, completions, answer, **columns):
    """Every argument is a list with an entry for each completion; so is what returns."""
    return [score(text.strip(), right) for text, right in zip(completions, answer)]


def score(text, right):
    if text == right:
        return 1.0
    return 0.2 * sum(a == b for a, b in zip(text.split("-"), right.split("-")))


result = train_rl(
    "embedded",  # a small model without a download; or a folder, or a Hugging Face name
    rows,
    right_date,
    algorithm="grpo",
    output="runs/dates_rl",
    steps=4,
    rollout={"prompts": 8, "group_size": 8, "max_new_tokens": 16},
    on_step=lambda step, metrics: print(f"step {step}: reward {metrics['reward']:.2f}"),
)
for policy, figures in result.heldout.items():
    print(policy, figures["metric"], round(figures["value"], 3), figures["interval"])
