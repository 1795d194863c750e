"""A reuse plan measured on the model, and what it costs in the clip.

Command:  python docs/examples/calibrate.py
Takes:    two minutes on two cores; the embedded model.
Writes:   plan.json
"""

import sora_jax
from sora_jax.metrics import psnr

pipe = sora_jax.Pipeline.from_pretrained()
measured = pipe.calibrate("a red circle moves right on a blue background", evaluations=16)
measured.write("plan.json", overwrite=True)

prompt = "a green square grows on a black background"
exact = pipe(prompt, seed=0)
reused = pipe(prompt, seed=0, plan="plan.json")
near = psnr(reused.frames[0], exact.frames[0])
print(f"{exact.evaluations_B[0]:.0f} evaluations, and {reused.evaluations_B[0]:.0f} with the plan: {near:.1f} dB")
assert reused.evaluations_B[0] == 16
