// An exported folder: its verified files, its stages in ONNX Runtime, and the loop, by docs/host_program.md.

import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { join } from "node:path";

import * as ort from "onnxruntime-web";

import { Leap, guided, moved, noise, pixels, times } from "./numbers.mjs";
import { Tokenizer, caption } from "./text.mjs";

ort.env.wasm.numThreads = 1;
ort.env.logLevel = "error";

const sha256 = (bytes) => createHash("sha256").update(bytes).digest("hex");
const volume = (shape) => shape.reduce((product, length) => product * length, 1);
const KINDS = { F32: Float32Array, I32: Int32Array, U8: Uint8Array };

export class Exported {
  constructor(folder) {
    this.folder = folder;
    const text = readFileSync(join(folder, "manifest.json"), "utf8");
    this.manifest = JSON.parse(text);
    const seal = this.manifest.sha256;
    if (sha256(text.replace(seal, "0".repeat(64))) !== seal) throw new Error("manifest.json was changed");
    this.stages = new Map(this.manifest.stages.map((stage) => [stage.name, stage]));
    this.phases = new Map(this.manifest.phases.map((phase) => [phase.name, phase]));
    this.files = new Map();
    this.sessions = new Map();
    const { file } = this.manifest.tokens;
    this.tokenizer = new Tokenizer(JSON.parse(this.bytes(file).toString("utf8")));
  }

  bytes(name) {
    if (!this.files.has(name)) {
      const data = readFileSync(join(this.folder, name));
      if (sha256(data) !== this.manifest.files[name]?.sha256) throw new Error(`${name} has other bytes than recorded`);
      this.files.set(name, data);
    }
    return this.files.get(name);
  }

  // The arrays of a safetensors file: a header of JSON behind its length in eight bytes, then the data.
  arrays(name) {
    const data = this.bytes(name), start = 8 + Number(data.readBigUInt64LE(0));
    const header = JSON.parse(data.subarray(8, start).toString("utf8"));
    delete header.__metadata__;
    return new Map(Object.entries(header).map(([key, { dtype, shape, data_offsets: [begin, end] }]) => {
      const copy = Uint8Array.from(data.subarray(start + begin, start + end));
      return [key, { data: new KINDS[dtype](copy.buffer), shape }];
    }));
  }

  size(key) {
    return this.manifest.sizes.find((size) => size.key === key) ?? this.manifest.sizes[0];
  }

  function(stage, key, variant) {
    const mine = stage.functions.filter((one) => one.sizes.includes(key));
    return mine.find((one) => one.variant === variant) ?? mine.find((one) => one.variant === "main");
  }

  async call(stage, one, values) {
    const { file, weights, output_suffix: suffix = "" } = one.artefact;
    if (!this.sessions.has(file)) {
      const externalData = weights ? [{ path: weights, data: this.bytes(weights) }] : [];
      this.sessions.set(file, await ort.InferenceSession.create(this.bytes(file), { executionProviders: ["wasm"], externalData }));
    }
    const given = {};
    for (const { name, shape, dtype } of one.inputs) {
      const value = values.get(name);
      if (value.data.length !== volume(shape)) throw new Error(`${stage.name}: ${name} has ${value.shape}, not ${shape}`);
      given[name] = new ort.Tensor(dtype, value.data, shape);
    }
    const made = await this.sessions.get(file).run(given);
    return new Map(one.outputs.map(({ name, shape }) => [name, { data: made[name + suffix].data, shape }]));
  }

  async phase(name, key, values, variant = "main") {
    for (const stage of this.phases.get(name).stages.map((each) => this.stages.get(each))) {
      values = new Map([...values, ...(await this.call(stage, this.function(stage, key, variant), values))]);
    }
    return values;
  }

  // One dictionary for both rows of guidance, or one for each of them.
  rows(values) {
    if ((this.manifest.guidance_rows ?? 2) === 2) return [values];
    return [0, 1].map((row) => new Map([...values].map(([name, { data, shape }]) => {
      if (!/_R[A-Z0-9]*$/.test(name)) return [name, { data, shape }];
      const length = data.length / shape[0];
      return [name, { data: data.slice(row * length, (row + 1) * length), shape: [1, ...shape.slice(1)] }];
    })));
  }

  // The velocity of both rows, every stage for one after the other.
  async step(key, values, variant) {
    const calls = this.rows(values);
    for (const stage of this.phases.get("step").stages.map((each) => this.stages.get(each))) {
      for (const n of calls.keys()) {
        calls[n] = new Map([...calls[n], ...(await this.call(stage, this.function(stage, key, variant), calls[n]))]);
      }
    }
    return Float32Array.from(calls.flatMap((call) => [...call.get("v_RTHWC").data]));
  }

  async text(prompt, size) {
    const { length, scores } = this.manifest.tokens, { ids, mask } = this.tokenizer.encode(caption(prompt, scores), length);
    const values = new Map([
      ["ids_BL", { data: Int32Array.from(ids), shape: [1, length] }],
      ["mask_BL", { data: Float32Array.from(mask), shape: [1, length] }],
    ]);
    for (const [name, value] of Object.entries(size.conditions)) values.set(name, { data: Float32Array.of(value), shape: [1] });
    const encoded = await this.phase("text", size.key, values);
    return this.phases.has("caption") ? this.phase("caption", size.key, encoded) : encoded;
  }

  // The latents of an image, which is one frame in [-1, 1].
  async encode(image, size) {
    const frame = await this.phase("encode_frame", size.key, new Map([["frames_Bthw3", image]]));
    return (await this.phase("encode_chunk", size.key, frame, "frames_1")).get("z_BTHWC").data;
  }

  // Latents of a prompt: the numbers are the manifest's where none are told, and `seen` gets every guided velocity; frames
  // whose mask is 0 stay as they are.
  async sample(prompt, size, z, numbers, seen = [], mask = new Float32Array(size.latents[0]).fill(1)) {
    const sampling = { ...this.manifest.sampling, ...numbers }, most = sampling.num_timesteps, shape = [1, ...size.latents];
    const own = sampling.num_steps === this.manifest.sampling.num_steps;
    const visited = own ? size.times : times(sampling.num_steps, size.shift, most);
    const unit = [...visited, 0].map((time) => Math.fround(time / most));
    const leap = new Leap(sampling.leap, sampling.num_steps, sampling.merge_steps);
    const given = await this.text(prompt, size);
    given.set("frame_mask_BT", { data: mask, shape: [1, shape[1]] });
    const frame = volume(shape) / shape[1];
    for (let i = 0; i < visited.length; i++) {
      given.set("z_BTHWC", { data: z, shape }).set("t_B", { data: Float32Array.of(visited[i]), shape: [1] });
      const rows = await this.step(size.key, given, i < sampling.merge_steps ? "merged" : "full");
      const v = guided(rows, sampling.guidance).map((x, n) => (mask[Math.floor(n / frame)] > 0 ? x : 0)), leaps = leap.leaps(v);
      seen.push(v);
      z = moved(z, v, unit, i, leaps);
      if (leaps) break;
    }
    return z;
  }

  async decode(z, size) {
    const [, rows, columns, channels] = size.latents, frames = [];
    let start = 0;
    for (const { frames: count, latents, variant } of size.chunks) {
      const length = latents * rows * columns * channels;
      const chunk = { data: z.slice(start, start + length), shape: [1, latents, rows, columns, channels] };
      start += length;
      const x = (await this.phase("decode_chunk", size.key, new Map([["z_BTHWC", chunk]]), variant)).get("x_BtHWC");
      const [, , ...rest] = x.shape;
      for (let n = 0; n < count; n++) {
        const one = { data: x.data.slice(n * volume(rest), (n + 1) * volume(rest)), shape: [1, 1, ...rest] };
        frames.push((await this.phase("decode_frame", size.key, new Map([["x_BtHWC", one]]))).get("frames_Bthw3").data);
      }
    }
    return pixels(frames.flatMap((frame) => [...frame]));
  }

  async clip(prompt, seed, numbers) {
    const size = this.size();
    return this.decode(await this.sample(prompt, size, noise(seed, volume(size.latents)), numbers), size);
  }
}
