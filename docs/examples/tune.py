"""A recipe for one model: the way of sampling that comes closest to its exact flow with so many evaluations, searched.

Command:  python docs/examples/tune.py
Takes:    three minutes on two cores; the embedded model.
Writes:   prompts.txt, recipes/recipe-6.json, tuned.mp4

A minute is enough to see how it goes; leave --minutes out, and name more prompts, for a recipe that you mean to use.
"""

from pathlib import Path

import sora_jax
from sora_jax.commands.main import main
from sora_jax.pipeline.recipe import Recipe

PROMPTS = [
    "a red circle moves right on a blue background",
    "a green square grows on a black background",
    "a blue triangle moves up on a white background",
    "a yellow circle stays still on a red background",
    "a white square moves left slowly on a green background",
    "a small cyan triangle shrinks on a black background",
]
Path("prompts.txt").write_text("\n".join(PROMPTS) + "\n")

search = ["tune", "pocket", "--evaluations", "6", "--prompts", "prompts.txt", "-o", "recipes", "--minutes", "1", "--overwrite"]
assert main(search) == 0
recipe = Recipe.read("recipes/recipe-6.json")
print(f"{recipe.measured['name']}: {recipe.measured['error_db']:.1f} dB with {recipe.evaluations} evaluations")
for rival in recipe.compared:
    print(f"{rival['behind_db']:.1f} dB ahead of {rival['name']}")

pipe = sora_jax.Pipeline.from_pretrained()
clip = pipe(PROMPTS[0], recipe="recipes/recipe-6.json", seed=1)
clip.save("tuned.mp4", overwrite=True)
print(clip)
assert clip.evaluations_B[0] <= recipe.evaluations
