// What a host computes itself, in float32: noise, times, guidance, the leap, pixels; docs/host_program.md has every rule.

const f = Math.fround;

function threefry(key, counter) {
  const keys = [key[0], key[1], (key[0] ^ key[1] ^ 0x1bd11bda) >>> 0];
  const rotations = [[13, 15, 26, 6], [17, 29, 16, 24]];
  let a = (counter[0] + keys[0]) >>> 0, b = (counter[1] + keys[1]) >>> 0;
  for (let i = 0; i < 5; i++) {
    for (const r of rotations[i % 2]) {
      a = (a + b) >>> 0;
      b = (((b << r) | (b >>> (32 - r))) ^ a) >>> 0;
    }
    a = (a + keys[(i + 1) % 3]) >>> 0;
    b = (b + keys[(i + 2) % 3] + i + 1) >>> 0;
  }
  return [a, b];
}

const NEAR = [2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087, -0.00125372503, -0.00417768164,
  0.246640727, 1.50140941].map(f);
const FAR = [-0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773, -0.0076224613, 0.00943887047,
  1.00167406, 2.83297682].map(f);

function erfinv(u) {
  const w = f(-f(Math.log1p(f(-f(u * u)))));
  const x = w < 5 ? f(w - 2.5) : f(f(Math.sqrt(w)) - 3);
  return f((w < 5 ? NEAR : FAR).reduce((sum, coefficient) => f(f(sum * x) + coefficient), 0) * u);
}

export function noise(seed, count) {
  const key = threefry([0, seed], [0, 0]), made = new Float32Array(count);
  const words = new Uint32Array(1), unit = new Float32Array(words.buffer), low = f(-0.99999994);
  for (let n = 0; n < count; n++) {
    const [a, b] = threefry(key, [Math.floor(n / 2 ** 32), n >>> 0]);
    words[0] = (((a ^ b) >>> 9) | 0x3f800000) >>> 0;
    const u = Math.max(low, f(f(f(unit[0] - 1) * f(1 - low)) + low));
    made[n] = f(f(Math.SQRT2) * erfinv(u));
  }
  return made;
}

export function times(steps, shift, most) {
  const s = f(shift);
  return Array.from({ length: steps }, (_, i) => {
    const u = f(f((1 - i / steps) * most) / most);
    return Math.min(f(f(f(s * u) / f(1 + f(f(s - 1) * u))) * most), most);
  });
}

export function guided(rows, guidance) {
  const half = rows.length / 2, g = f(guidance);
  return Float32Array.from({ length: half }, (_, i) => rows[half + i] + f(g * f(rows[i] - rows[half + i])));
}

export function cosine(a, b) {
  let product = 0, ours = 0, theirs = 0;
  for (let i = 0; i < a.length; i++) {
    product += a[i] * b[i];
    ours += a[i] * a[i];
    theirs += b[i] * b[i];
  }
  return product / Math.max(Math.sqrt(ours) * Math.sqrt(theirs), 1e-8);
}

// Whether a step leaps, told one guided velocity after the other.
export class Leap {
  constructor(rule, steps, mergeSteps) {
    Object.assign(this, { rule, mergeSteps, step: -1, first: Math.max(1, Math.ceil(rule.min_share * steps - 1e-9) - 1) });
    this.restart();
  }

  restart() {
    this.best = -1;
    this.left = this.rule.patience;
    this.before = null;
  }

  leaps(v) {
    this.step++;
    if (this.step === this.mergeSteps) this.restart();
    const before = this.before;
    this.before = v;
    if (this.rule.mode === "static") return this.step === this.rule.index;
    if (this.rule.mode === "off" || before === null || this.step < this.first) return false;
    const c = cosine(v, before);
    if (c > this.best + this.rule.tolerance) {
      this.best = c;
      this.left = this.rule.patience;
    } else {
      this.left--;
    }
    return this.left <= 0;
  }
}

// The latents after a step, which a leap ends at 0; d are the times as shares of the noise's, and the 0 behind the last.
export function moved(z, v, d, step, leaps) {
  const dt = leaps ? d[step] : f(d[step] - d[step + 1]);
  return z.map((x, n) => x + f(v[n] * dt));
}

export function pixels(values) {
  const clamp = (x, low, high) => Math.min(Math.max(x, low), high);
  return Uint8Array.from(values, (x) => Math.floor(clamp(f(f(f(f(clamp(x, -1, 1) + 1) / 2) * 255) + 0.5), 0, 255)));
}
