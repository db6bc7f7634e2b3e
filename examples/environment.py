"""An environment of several turns: find a number by guessing, and learn from the reward."""

from gearshift import TextEnvironment, train_rl


class Guess(TextEnvironment):
    """The user thinks of a number from 1 to 20 and says whether a guess is too low or too high."""

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)  # it seeds self.np_random
        self.number, self.left = int(self.np_random.integers(1, 21)), 5
        text = "I think of a number from 1 to 20. Guess it; answer with one number only."
        # `row` names the problem: without it all episodes, which start alike, would count as one.
        return text, {"messages": [{"role": "user", "content": text}], "row": self.number}

    def step(self, action):
        """Answer -> (what the user says next, reward, terminated, truncated, info)."""
        self.left -= 1
        guess = int(action) if action.strip().isdecimal() else None
        if guess == self.number:
            return "", 1.0, True, False, {"success": True}
        hint = "Higher." if guess and guess < self.number else "Lower."
        return hint, 0.0, False, self.left == 0, {"success": False}


result = train_rl(
    "embedded",
    environment=Guess,
    algorithm="rloo",
    output="runs/guess",
    steps=2,
    rollout={"prompts": 4, "group_size": 4, "max_new_tokens": 8},
    eval={"limit": 16, "max_new_tokens": 8},
)
print({policy: figures["success"] for policy, figures in result.heldout.items()})
