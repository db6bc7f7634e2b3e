"""Supervised fine-tuning on examples of your own: prompts with the answers that you want."""

from datetime import date, timedelta

from gearshift import generate, train_sft

days = [date(1990, 1, 1) + timedelta(days=137 * number) for number in range(64)]
rows = [
    {"prompt": f"Write this date as YYYY-MM-DD: {day:%d %B %Y}", "completion": day.isoformat()}
    for day in days
]

result = train_sft(
    "embedded",  # a small model without a download; or a folder, or a Hugging Face name
    rows,  # or a file, or a data set of the library `datasets`
    output="runs/dates_sft",
    epochs=2,
    batch_size=8,
    optimizer={"lr": 1e-4},
)
print("loss:", [round(step["loss"], 2) for step in result.metrics])
print(generate(result, "Write this date as YYYY-MM-DD: 24 December 2031", temperature=0))
