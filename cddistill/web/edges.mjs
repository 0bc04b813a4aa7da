// Canny's edges (Canny 1986) with the choices of scikit-image's detector, which Python takes edges with: a blur that does
// not darken the border, Sobel's gradient, thinning across it, hysteresis. An image is {data, h, w, c: 1}; numbers are
// rounded to 32 bits where Python rounds, so that equal neighbours stay equal.

const f32 = Math.fround;
const LUMA = [0.299, 0.587, 0.114].map(f32); // ITU-R 601

// Edges [h, w], 0 or 1, of an image of c = 3 in [0, 1]. sigma: of the blur, in px; low and high: of the gradient of luma.
export function canny({data, h, w}, [sigma, low, high]) {
  const luma = Float32Array.from({length: h * w}, (_, i) =>
    LUMA.reduce((sum, x, k) => f32(sum + x * data[3 * i + k]), 0));
  const smooth = blurred({data: luma, h, w, c: 1}, sigma);
  const down = sobel(smooth, true), right = sobel(smooth, false);
  const size = down.map((x, i) => Math.sqrt(f32(f32(x * x) + f32(right[i] ** 2))));
  const thin = thinned(down, right, size, h, w, low);
  return linked(thin, size, w, high);
}

// An image with weights summed along its columns or rows; beyond the border it is 0, or repeats its last pixel.
function along({data, h, w}, weights, vertical, repeats) {
  const n = vertical ? h : w, step = vertical ? w : 1, reach = (weights.length - 1) / 2;
  return {h, w, c: 1, data: data.map((_, i) => {
    const at = vertical ? Math.floor(i / w) : i % w;
    return weights.reduce((sum, weight, k) => {
      const j = at + k - reach, kept = Math.min(Math.max(j, 0), n - 1);
      return j === kept || repeats ? sum + weight * data[i + (kept - at) * step] : sum;
    }, 0);
  })};
}

// A Gaussian, cut at four sigma; each pixel is divided by the weights that lie inside of the image.
function blurred(image, sigma) {
  const reach = Math.floor(4 * sigma + 0.5);
  const raw = Array.from({length: 2 * reach + 1}, (_, k) => k === reach ? 1 : Math.exp(-0.5 * ((k - reach) / sigma) ** 2));
  const sum = raw.reduce((a, b) => a + b), weights = raw.map((x) => x / sum);
  const both = (x) => along(along(x, weights, true, false), weights, false, false);
  const inside = both({...image, data: image.data.map(() => 1)}).data;
  return {...image, data: both(image).data.map((x, i) => x / f32(inside[i] + 2 ** -23))};
}

const sobel = (image, vertical) =>
  along(along(image, [-1, 0, 1], vertical, true), [1, 2, 1], !vertical, true).data;

// 1 where the gradient is at least low and at no side, across the edge, smaller than what lies one pixel further.
function thinned(down, right, size, h, w, low) {
  return size.map((here, i) => {
    const y = Math.floor(i / w), x = i % w, dy = down[i], dx = right[i];
    if (here < low || here === 0 || x === 0 || y === 0 || x === w - 1 || y === h - 1) return 0;
    const steep = Math.abs(dy) > Math.abs(dx), [long, short] = steep ? [dy, dx] : [dx, dy];
    const share = Math.abs(short) / Math.abs(long); // of the diagonal neighbour
    const straight = steep ? Math.sign(dy) * w : Math.sign(dx), diagonal = Math.sign(dy) * w + Math.sign(dx);
    const further = (sign) => size[i + sign * diagonal] * share + size[i + sign * straight] * (1 - share);
    return Number(further(1) <= here && further(-1) <= here);
  });
}

// The pixels of `thin` that are connected, also diagonally, to one of at least high. No pixel lies on the border.
function linked(thin, size, w, high) {
  const found = thin.map((x, i) => Number(x && size[i] >= high)), open = [...found.keys()].filter((i) => found[i]);
  while (open.length) {
    const i = open.pop();
    for (const j of [-w - 1, -w, -w + 1, -1, 1, w - 1, w, w + 1].map((step) => i + step)) {
      if (thin[j] && !found[j]) {
        found[j] = 1;
        open.push(j);
      }
    }
  }
  return found;
}
