"""Train a reward model on pairs of answers, and let it score other answers."""

from gearshift import score, train_reward_model

GUESTS = ("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana")
rows = [
    {
        "prompt": f"Greet {guest}.",
        "chosen": f"Good evening, {guest}. It is a pleasure to see you.",
        "rejected": f"{guest}? Oh, you again.",
    }
    for guest in GUESTS
]

result = train_reward_model(
    "embedded",
    rows[2:],
    heldout=rows[:2],
    output="runs/greetings_reward",
    epochs=2,
    batch_size=4,
)
print("accuracy on pairs that were held out:", result.accuracy)

answers = ["Good evening, Ian.", "Ian? You again."]
print(score(result, ["Greet Ian.", "Greet Ian."], answers))
