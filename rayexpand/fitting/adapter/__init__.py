"""Fine-tuning a generator on a dataset: plan.py says what, latents.py and feed.py make what is shown, run.py is the
loop, sheet.py its picture, artifact.py puts them together."""
