"""Deployment: the model as StableHLO programs, and a clip made by the host program from the files alone.

Command:  python docs/examples/deploy.py
Needs:    pip install '.[stablehlo]', and minutes.
Writes:   exported/, exported.mp4
"""

from sora_jax.commands.main import main

PROMPT = "a red circle moves right on a blue background"

assert (
    main(["export", "pocket", "exported", "--target", "stablehlo", "--num-frames", "17", "--vectors", "off", "--overwrite"])
    == 0
)
export = ["export", "pocket", "exported", "--target", "stablehlo", "--num-frames", "17", "--vectors", "off", "--overwrite"]
assert main(export) == 0
assert main(["run-exported", "exported", PROMPT, "--steps", "8", "-o", "exported.mp4", "--overwrite"]) == 0
