// Runs every test vector of an export and yields a row for each: its name, and whether it passed.

import { Leap, cosine, guided, moved, noise, pixels, times } from "./numbers.mjs";
import { caption, scored } from "./text.mjs";

const MOST_OFF = { times: 1e-3, noise: 1e-5, guidance: 1e-5, cosines: 1e-5 };
const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);
const off = (a, b) => Math.max(0, ...a.map((x, i) => Math.abs(x - b[i])));

// PSNR (peak: the largest magnitude expected) and relative L2 error.
export function difference(expected, got) {
  let error = 0, norm = 0, peak = 0;
  for (let i = 0; i < expected.length; i++) {
    error += (expected[i] - got[i]) ** 2;
    norm += expected[i] ** 2;
    peak = Math.max(peak, Math.abs(expected[i]));
  }
  if (error === 0) return { psnr: 200, relative: 0 };
  return { psnr: 20 * Math.log10(peak / Math.sqrt(error / expected.length)), relative: Math.sqrt(error / norm) };
}

async function* functions(model) {
  for (const stage of model.manifest.stages) {
    for (const one of stage.functions) {
      const arrays = model.arrays(one.vectors);
      const inputs = new Map(one.inputs.map(({ name }) => [name, arrays.get(`in/${name}`)]));
      const outputs = await model.call(stage, one, inputs);
      for (const { name } of one.outputs) {
        const limits = one.checks.find((check) => check.output === name);
        let expected = arrays.get(`out/${name}`).data, got = outputs.get(name).data;
        if (inputs.has(name)) {
          const before = inputs.get(name).data;
          [expected, got] = [expected, got].map((after) => Float64Array.from(after, (x, i) => x - before[i]));
        }
        const { psnr, relative } = difference(expected, got);
        const passed = psnr >= limits.floor_db && relative <= limits.ceiling_l2;
        yield { name: `${stage.name} ${one.name} ${name}: ${psnr.toFixed(1)} dB`, passed };
      }
    }
  }
}

function* host(model, content) {
  const { scores, length } = model.manifest.tokens, most = model.manifest.sampling.num_timesteps;
  for (const { prompt, scores: asked, scored: told } of content.scores) {
    yield { name: `scores ${JSON.stringify(told)}`, passed: scored(prompt, asked) === told };
  }
  for (const { prompt, caption: told } of content.captions) {
    const made = caption(prompt, scores);
    yield { name: `caption ${JSON.stringify(made)}`, passed: made === told };
  }
  for (const { caption: text, ids, mask } of content.tokens) {
    yield { name: `tokens of ${JSON.stringify(text)}`, passed: same(model.tokenizer.encode(text, length), { ids, mask }) };
  }
  for (const { seed, shape, first, last } of content.noise) {
    const made = [...noise(seed, shape.reduce((a, b) => a * b))];
    const worst = Math.max(off(made.slice(0, first.length), first), off(made.slice(-last.length), last));
    yield { name: `noise of seed ${seed}: off by ${worst}`, passed: worst <= MOST_OFF.noise };
  }
  for (const { num_steps: steps, shift, times: told } of content.times) {
    const worst = off(times(steps, shift, most), told);
    yield { name: `${steps} times of shift ${shift}: off by ${worst}`, passed: worst <= MOST_OFF.times };
  }
  for (const one of content.guidance) {
    const made = [...guided(Float32Array.from([...one.conditional, ...one.unconditional]), one.guidance)];
    yield { name: `guidance ${one.guidance}`, passed: off(made, one.guided) <= MOST_OFF.guidance };
  }
  for (const one of content.leap) {
    const leap = new Leap(one.leap, one.num_steps, one.merge_steps), made = one.velocities.map((v) => leap.leaps(v));
    const cosines = one.cosines.map((c, i) => (c === null ? null : cosine(one.velocities[i], one.velocities[i - 1])));
    const compared = cosines.filter((c) => c !== null), told = one.cosines.filter((c) => c !== null);
    yield { name: `cosines with ${one.merge_steps} merged, ${one.leap.mode} leap`, passed: off(compared, told) <= MOST_OFF.cosines };
    const at = made.includes(true) ? made.indexOf(true) : null;
    yield { name: `${one.leap.mode} leap with ${one.merge_steps} merged: step ${at}`, passed: at === one.leaps_at };
    yield { name: "merge switch", passed: same(one.merged, one.velocities.map((_, i) => i < one.merge_steps)) };
  }
  const { velocities, leaps_at: last } = content.leap[0], { times: visited, start, end } = content.loop;
  const d = [...visited, 0].map((time) => Math.fround(time / most));
  const made = velocities.slice(0, last + 1).reduce((z, v, i) => moved(z, v, d, i, i === last), Float32Array.from(start));
  yield { name: "loop that leaps", passed: off([...made], end) <= 2e-6 };
  yield { name: "pixels", passed: same([...pixels(content.pixels.values)], content.pixels.pixels) };
}

async function* clip(model, told, arrays) {
  const size = model.size(told.size), seen = [], floor = 90;
  const numbers = { num_steps: told.num_steps, guidance: told.guidance, merge_steps: told.merge_steps };
  numbers.leap = { ...model.manifest.sampling.leap, mode: told.leap };
  const z = await model.sample(told.prompt, size, arrays.get("noise_BTHWC").data, numbers, seen);
  const made = { v_0_BTHWC: seen[0], v_1_BTHWC: seen[1], z_BTHWC: z, frames_Bthw3: await model.decode(z, size) };
  for (const [name, array] of Object.entries(made)) {
    const { psnr } = difference(arrays.get(name).data, array);
    yield { name: `the clip's ${name}: ${psnr.toFixed(1)} dB`, passed: psnr >= floor };
  }
}

async function* given(model, told, arrays) {
  const size = model.size(told.size), floor = 90;
  const encoded = await model.encode(arrays.get("image_Bthw3"), size);
  const latents = difference(arrays.get("encoded_BTHWC").data, encoded);
  yield { name: `a given frame's latents: ${latents.psnr.toFixed(1)} dB`, passed: latents.psnr >= floor };
  const start = Float32Array.from(arrays.get("noise_BTHWC").data);
  start.set(encoded);
  const numbers = { num_steps: told.num_steps, guidance: told.guidance, merge_steps: told.merge_steps };
  numbers.leap = { ...model.manifest.sampling.leap, mode: told.leap };
  const z = await model.sample(told.prompt, size, start, numbers, [], arrays.get("frame_mask_BT").data);
  const { psnr } = difference(arrays.get("z_BTHWC").data, z);
  yield { name: `the clip with a given frame: ${psnr.toFixed(1)} dB`, passed: psnr >= floor };
}

export async function* rows(model) {
  const { host: file, clip: arrays, given: frames } = model.manifest.vectors, content = JSON.parse(model.bytes(file).toString("utf8"));
  yield* host(model, content);
  yield* functions(model);
  if (arrays !== null) yield* clip(model, content.clip, model.arrays(arrays));
  if (frames) yield* given(model, content.clip, model.arrays(frames));
}
