"""Learn from pairs of answers, the better one first: DPO and its kin, without rollouts."""

from gearshift import train_dpo

GUESTS = ("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana")
rows = [
    {
        "prompt": f"Greet {guest}.",
        "chosen": f"Good evening, {guest}. It is a pleasure to see you.",
        "rejected": f"{guest}? Oh, you again.",
    }
    for guest in GUESTS
]

result = train_dpo(
    "embedded",
    rows[2:],
    heldout=rows[:2],  # the share of these pairs that the policy orders rightly is the accuracy
    algorithm="dpo",  # or cdpo, ipo, kto, orpo, simpo
    output="runs/greetings_dpo",
    epochs=2,
    batch_size=4,
    optimizer={"lr": 1e-5},
)
print("accuracy on pairs that were held out:", result.accuracy)
