"""A second host, in JavaScript and written from docs/host_program.md, does what the pipeline does.

It needs Node and, once, ``npm install --ignore-scripts`` in tests/export/javascript_host, which is used by nothing else.
"""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from sora_jax import Pipeline
from sora_jax.export import exporter
from sora_jax.export.stages import PARTS
from sora_jax.inputs import prompt
from tests.support.exports import PROMPT, psnr_db

pytest.importorskip("jsonschema", reason="manifests are validated with jsonschema (extra stablehlo, onnx or coreml)")

HOST = Path(__file__).with_name("javascript_host")
PROMPTS = [
    "A RED circle moves right on a blue background",
    "two squares 1920x1080 at 12:30 , 50% off; rock'n'roll",
    "100%25 caf%C3%A9 + cr%e8me a+b",
    "see www.example.com/page or http://a.org/x?y=1, mail me@here.net",
    "jc6640vc abc123 7a8 ab1cd 123456789 #12 #123456 1.5x2.25x",
    "free shipping worldwide free shipping free download click for more page 12 image.png img.jpeg pictures",
    'an-old_man-with_a-dash under_line -start: \'quoted\' "twice""more"..... end',
    "naïve façade, 東京 の 夜, Москва 2х3, ﬁre ① ½ x² résumé — “curly” ‘single’ «guillemets»",
    "ｆｕｌｌ　ｗｉｄｔｈ！ ǆ ŉ ﬃ ﬅ e\u0301",
    "<p>para</p><!-- not this --> <script>x<1</script>a &lt;tag&gt; &quot;word&quot; &#65;&#x42; R&D",
    "<person> walks a dog.Then stops,turns/around",
    "192.168.1.1 is home @user and ip 10.0.0.1 ; a\\nb c\\td",
    "   .hidden  . dot  . ",
    "a b c​d e",
    "camera motion: zoom in. aesthetic score: 5.0. already there",
]

needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="Node is not installed")


def run(*arguments: str, given: str = "") -> str:
    done = subprocess.run(
        ["node", str(HOST / "main.mjs"), *arguments], input=given, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_node
def test_captions_are_cleaned_as_the_page_says():
    found = json.loads(run("captions", given=json.dumps(PROMPTS)))
    scores = {"aes": 6.5, "flow": 5.0, "camera_motion": "pan right"}
    expected = [prompt.prompt_at_loop(prompt.prepare_prompt(text, **scores), 0) for text in PROMPTS]
    assert found == expected


@needs_node
@pytest.mark.slow
def test_the_page_suffices_for_every_vector_and_pockets_clip(tmp_path):
    for module in ("jax2onnx", "onnx", "onnxruntime"):
        pytest.importorskip(module, reason="the onnx extra is not installed")
    if not (HOST / "node_modules" / "onnxruntime-web").is_dir():
        pytest.skip("onnxruntime-web is not installed: npm install --ignore-scripts in tests/export/javascript_host")
    out, frames = tmp_path / "out", tmp_path / "frames"
    settings = {"num_steps": 8, "merge_steps": 4, "leap": "dynamic"}
    exporter.export(None, out, target="onnx", settings=settings, stages=PARTS, guidance_rows=1, pairs_per_package=2)
    rows = run(str(out)).splitlines()
    assert len(rows) > 50
    assert any(row.startswith("pass  the clip with a given frame") for row in rows)
    assert all(row.startswith("pass  ") for row in rows)
    run(str(out), PROMPT, "1", "8", str(frames))
    expected = Pipeline.from_pretrained()(PROMPT, seed=1, num_steps=8, merge_steps=4, leap="dynamic").frames
    assert psnr_db(expected, np.frombuffer(frames.read_bytes(), np.uint8).reshape(expected.shape)) >= 60.0
