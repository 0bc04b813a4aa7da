// What a page computes besides its networks: noise, tokens, conditions, and the plan of a sampler. No DOM: node runs it,
// and tests compare each part with Python. Images are {data, h, w, c}, rows of pixels of interleaved channels.

import {canny} from "./edges.mjs";

// ---- noise: jax.random's Threefry, so that a seed gives the picture that it gives in Python

const ROTATIONS = [[13, 15, 26, 6], [17, 29, 16, 24]];

// Threefry-2x32 (Salmon et al. 2011, 20 rounds) of one pair of 32-bit counters.
export function threefry([k0, k1], x0, x1) {
  const keys = [k0, k1, k0 ^ k1 ^ 0x1bd11bda];
  x0 = (x0 + k0) >>> 0;
  x1 = (x1 + k1) >>> 0;
  for (let i = 0; i < 5; i++) {
    for (const r of ROTATIONS[i % 2]) {
      x0 = (x0 + x1) >>> 0;
      x1 = ((x1 << r) | (x1 >>> (32 - r))) ^ x0;
    }
    x0 = (x0 + keys[(i + 1) % 3]) >>> 0;
    x1 = (x1 + keys[(i + 2) % 3] + i + 1) >>> 0;
  }
  return [x0, x1];
}

// jax.random.fold_in of a 32-bit number.
export const foldIn = (key, x) => threefry(key, 0, x >>> 0);

// jax.random.normal: uniform numbers in (-1, 1) of 23 bits through the inverse error function.
export function normal(key, count) {
  const out = new Float32Array(count);
  for (let i = 0; i < count; i++) {
    const [high, low] = threefry(key, 0, i);
    const unit = ((high ^ low) >>> 9) / 2 ** 23;
    out[i] = Math.SQRT2 * erfInv(Math.max(Math.fround(unit * 2 - LEAST), -LEAST));
  }
  return out;
}

const LEAST = 1 - 2 ** -24; // the largest float32 below 1

// M. Giles, Approximating the erfinv function (2010), single precision: highest power first.
const CENTRAL = [2.81022636e-8, 3.43273939e-7, -3.5233877e-6, -4.39150654e-6, 0.00021858087, -0.00125372503,
  -0.00417768164, 0.246640727, 1.50140941];
const TAIL = [-0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773, -0.0076224613,
  0.00943887047, 1.00167406, 2.83297682];

function erfInv(x) {
  const w = -Math.log1p(-x * x);
  const [terms, at] = w < 5 ? [CENTRAL, w - 2.5] : [TAIL, Math.sqrt(w) - 3];
  return x * terms.reduce((sum, term) => sum * at + term);
}

// The noise of row 0, as cddistill.generate.noises has it: `count` arrays, the initial one and what is added after steps.
export function noises(seed, size, count) {
  const key = [0, seed >>> 0];
  const rest = foldIn(key, 1);
  return Array.from({length: count}, (_, i) => normal(foldIn(i ? foldIn(rest, i - 1) : key, 0), size));
}

// ---- sampling: a plan says which sums of noise and outputs a network is called with, and which sum is x0

// basis: the noise, to which outputs are added. run(call, z) resolves to the network's output for z.
export async function sample(plan, noise, run) {
  const basis = [...noise];
  for (const call of plan.calls) basis.push(await run(call, combined(call.z, basis)));
  return combined(plan.x0, basis);
}

function combined(weights, basis) {
  const out = new Float32Array(basis[0].length);
  weights.forEach((weight, k) => {
    if (weight !== 0) basis[k].forEach((x, i) => { out[i] += weight * x; });
  });
  return out;
}

// Pixels in [-1, 1] as an image in [0, 1], where no decoder does it.
export const unit = (x0) => x0.map((x) => Math.min(Math.max(x * 0.5 + 0.5, 0), 1));

// ---- tokens: CLIP's byte-pair encoding of lower-cased words

const SPACE = /[\t-\r \u0085\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+/gu;
const WORDS = /'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\u0085\p{L}\p{N}]+/gu;
const BYTES = byteLetters();

// A printable letter for each byte (Radford et al. 2019): itself, or one from 256 on.
function byteLetters() {
  const printable = (b) => (b > 32 && b < 127) || (b > 160 && b < 173) || b > 173;
  let next = 256;
  return Array.from({length: 256}, (_, b) => String.fromCodePoint(printable(b) ? b : next++));
}

// encode(text) -> Int32Array of spec.length ids, padded or truncated; spec is tokenizer.json of the page.
export function tokenizer(spec) {
  const ranks = new Map(spec.merges.map((pair, i) => [pair, i]));
  const specials = new RegExp(`(${Object.keys(spec.special).map((x) => x.replace(/[^\w]/g, "\\$&")).join("|")})`);
  const word = (text) => {
    let parts = [...new TextEncoder().encode(text)].map((b) => BYTES[b]);
    parts[parts.length - 1] += "</w>";
    for (;;) {
      const pairs = parts.slice(1).map((part, i) => ranks.get(`${parts[i]} ${part}`) ?? Infinity);
      const best = Math.min(...pairs);
      if (best === Infinity) return parts.map((part) => spec.vocab[part] ?? spec.unknown);
      const at = pairs.indexOf(best);
      parts = [...parts.slice(0, at), parts[at] + parts[at + 1], ...parts.slice(at + 2)];
    }
  };
  const plain = (text) => {
    const lower = [...text.normalize("NFC").replace(SPACE, " ")].map((x) => x.toLowerCase()).join("");
    return (lower.match(WORDS) ?? []).flatMap(word);
  };
  return (text) => {
    const ids = text.split(specials).flatMap((part) => (part in spec.special ? [spec.special[part]] : plain(part)));
    const kept = [spec.start, ...ids.slice(0, spec.length - 2), spec.end];
    return Int32Array.from({length: spec.length}, (_, i) => kept[i] ?? spec.pad);
  };
}

// ---- images

const cubic = (x) => x < 1 ? 1.5 * x ** 3 - 2.5 * x ** 2 + 1 : x < 2 ? -0.5 * (x ** 3 - 5 * x ** 2 + 8 * x - 4) : 0;
const linear = (x) => Math.max(0, 1 - x);

// For each of m points, [first of the n points, weights]: antialiased, cut at the border, as in Pillow.
function taps(n, m, kernel) {
  const scale = n / m, wide = Math.max(scale, 1);
  return Array.from({length: m}, (_, j) => {
    const centre = (j + 0.5) * scale - 0.5, reach = 2 * wide;
    const first = Math.max(0, Math.ceil(centre - reach)), last = Math.min(n - 1, Math.floor(centre + reach));
    const weights = Array.from({length: last - first + 1}, (_, i) => kernel(Math.abs(first + i - centre) / wide));
    const sum = weights.reduce((a, b) => a + b);
    return [first, weights.map((x) => x / sum)];
  });
}

// An image at h x w; round is what happens to numbers after each of the two passes.
export function resize(image, h, w, kernel = cubic, round = (x) => x) {
  const across = (from, m) => { // along rows; the result has rows and columns exchanged
    const {data, h, w, c} = from, out = new Float32Array(m * h * c);
    taps(w, m, kernel).forEach(([first, weights], j) => {
      for (let y = 0; y < h; y++) {
        for (let k = 0; k < c; k++) {
          const sum = weights.reduce((s, weight, i) => s + weight * data[(y * w + first + i) * c + k], 0);
          out[(j * h + y) * c + k] = w === m ? data[(y * w + j) * c + k] : round(sum);
        }
      }
    });
    return {data: out, h: m, w: h, c};
  };
  return across(across(image, w), h);
}

const to8bits = (x) => Math.min(Math.max(Math.round(x), 0), 255);

// An image of 8-bit numbers resized to cover size x size and cut in its centre, as cddistill.data.images.fit does.
export function fit(image, size, kernel = cubic, round = to8bits) {
  const scale = Math.max(size / image.w, size / image.h);
  const side = (n) => Math.max(size, roundHalfEven(n * scale));
  const whole = resize(image, side(image.h), side(image.w), kernel, round);
  const top = Math.floor((whole.h - size) / 2), left = Math.floor((whole.w - size) / 2);
  return made(size, image.c, (y, x, k) => whole.data[((top + y) * whole.w + left + x) * image.c + k]);
}

const roundHalfEven = (x) => (x % 1 === 0.5 ? 2 * Math.round(x / 2) : Math.round(x));

// An image [size, size, c] of a function of row, column and channel.
function made(size, c, value) {
  const data = new Float32Array(size * size * c);
  for (let i = 0; i < data.length; i++) data[i] = value(Math.floor(i / c / size), Math.floor(i / c) % size, i % c);
  return {data, h: size, w: size, c};
}

const each = (image, f) => ({...image, data: image.data.map(f)});
const over255 = (x) => Math.fround(x / 255);

// The condition [size, size, c] in [0, 1] of an image of 8-bit RGB, by task. mask is [size, size, 1], 1 in the hole.
// Each throws an Error, in one sentence, for what the task cannot take.
export const CONDITIONS = {
  image: (image, {size}) => each(fit(image, size), over255),
  sr: (image, {size, small}) => {
    const low = each(fit(image, small), over255);
    return each(resize(low, size, size), (x) => Math.min(Math.max(x, 0), 1));
  },
  inpaint: (image, {size}, mask) => {
    const known = each(fit(image, size), over255), share = mask.data.reduce((a, b) => a + b) / mask.data.length;
    if (share === 0) throw new Error("Paint over a part of the picture first: what is painted is generated.");
    if (share === 1) throw new Error("The hole covers all of the picture: leave some of it.");
    return made(size, 4, (y, x, k) => {
      const hole = mask.data[y * size + x];
      return k === 3 ? hole : hole ? 0.5 : known.data[(y * size + x) * 3 + k];
    });
  },
  depth: (image, {size, metres}) => {
    if (image.data.some((x, i) => x !== image.data[i - i % image.c])) {
      throw new Error("This picture has colours: a depth map is grey.");
    }
    const map = fit(grey(image), size, linear, (x) => x);
    if (metres && map.data.some((x) => x <= 0)) throw new Error("The map holds distances of 0: fill them first.");
    const near = metres ? each(map, (x) => 1 / x) : map;
    const low = near.data.reduce((a, b) => Math.min(a, b)), high = near.data.reduce((a, b) => Math.max(a, b));
    if (high <= low) throw new Error("The map is constant: it says nothing about depth.");
    return made(size, 3, (y, x) => (near.data[y * size + x] - low) / (high - low));
  },
  canny: (image, {size, edges}) => {
    const whole = fit(image, size), picture = each(whole, over255);
    if (whole.data.every((x, i) => (x === 0 || x === 255) && x === whole.data[i - i % 3])) return picture;
    const found = canny(picture, edges);
    return made(size, 3, (y, x) => found[y * size + x]);
  },
};

// The first channel of an image of several.
const grey = ({data, h, w, c}) => ({data: data.filter((_, i) => i % c === 0), h, w, c: 1});

// Whether the first bytes of a file are those of a PNG of 16 bits a channel.
export const deepPng = (bytes) => PNG.every((x, i) => bytes[i] === x) && bytes[24] === 16;

const PNG = [0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a];

// A generated image [size, size, 3] with the pixels that its condition of four channels knows.
export function paste(image, condition) {
  return image.map((x, i) => {
    const at = Math.floor(i / 3) * 4;
    return condition[at + 3] ? x : condition[at + (i % 3)];
  });
}
