// node main.mjs FOLDER                           runs the test vectors of an ONNX export of float32
// node main.mjs FOLDER PROMPT SEED STEPS FILE    writes the 8-bit frames of a clip, and nothing around them
// node main.mjs captions                         reads a JSON list of prompts, prints that of the cleaned captions

import { readFileSync, writeFileSync } from "node:fs";

import { caption } from "./text.mjs";

const [folder, prompt, seed, steps, file] = process.argv.slice(2);
if (folder === "captions") {
  const prompts = JSON.parse(readFileSync(0, "utf8"));
  console.log(JSON.stringify(prompts.map((text) => caption(text, { aes: 6.5, flow: 5, camera_motion: "pan right" }))));
} else {
  const { Exported } = await import("./exported.mjs");
  const model = new Exported(folder);
  if (prompt === undefined) process.exit(await check(model));
  writeFileSync(file, await model.clip(prompt, Number(seed), { num_steps: Number(steps) }));
}

async function check(model) {
  const { rows } = await import("./vectors.mjs");
  let failed = 0;
  for await (const { name, passed } of rows(model)) {
    console.log(`${passed ? "pass" : "FAIL"}  ${name}`);
    failed += passed ? 0 : 1;
  }
  return failed ? 1 : 0;
}
