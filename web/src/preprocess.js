// From pixels to the network's input, as mambavision.inference.preprocess does it: Pillow's antialiased bicubic
// resampling (8 bits between its two passes, as there), then the centre, then normalisation.

const PRECISION = 22; // bits behind the point of a weight, Pillow's 32 - 8 - 2
const SUPPORT = 2; // of the bicubic filter, in output pixels

function bicubic(x) {
  const a = -0.5;
  const distance = Math.abs(x);
  if (distance < 1) return ((a + 2) * distance - (a + 3)) * distance * distance + 1;
  if (distance < 2) return (((distance - 5) * distance + 8) * distance - 4) * a;
  return 0;
}

/** For each output place: the first input place and the integer weights from there on. */
function weightsOf(inputSize, outputSize) {
  const scale = inputSize / outputSize;
  const stretch = Math.max(scale, 1);
  const support = SUPPORT * stretch;
  return Array.from({ length: outputSize }, (_, place) => {
    const centre = (place + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - support + 0.5));
    const end = Math.min(inputSize, Math.trunc(centre + support + 0.5));
    const values = Array.from({ length: end - first }, (_, tap) => bicubic((tap + first - centre + 0.5) / stretch));
    const total = values.reduce((sum, value) => sum + value, 0);
    const fixed = values.map((value) => {
      const share = (total === 0 ? value : value / total) * 2 ** PRECISION;
      return Math.trunc(share < 0 ? share - 0.5 : share + 0.5);
    });
    return { first, fixed };
  });
}

function clip(sum) {
  return Math.min(255, Math.max(0, sum >> PRECISION));
}

/**
 * Resize as Pillow's `Image.resize(size, BICUBIC)` does.
 *
 * @param {{data: Uint8Array | Uint8ClampedArray, width: number, height: number}} image RGBA; alpha is not looked at
 * @returns {{data: Uint8Array, width: number, height: number}} RGBA, opaque
 */
export function resize(image, width, height) {
  let { data } = image;
  if (width !== image.width) {
    const columns = weightsOf(image.width, width);
    const out = new Uint8Array(4 * width * image.height);
    for (let row = 0; row < image.height; row++) {
      for (let column = 0; column < width; column++) {
        const { first, fixed } = columns[column];
        let red = 1 << (PRECISION - 1);
        let green = red;
        let blue = red;
        let from = 4 * (row * image.width + first);
        for (const weight of fixed) {
          red += data[from] * weight;
          green += data[from + 1] * weight;
          blue += data[from + 2] * weight;
          from += 4;
        }
        out.set([clip(red), clip(green), clip(blue), 255], 4 * (row * width + column));
      }
    }
    data = out;
  }
  if (height === image.height) return { data: new Uint8Array(data), width, height };
  const rows = weightsOf(image.height, height);
  const out = new Uint8Array(4 * width * height);
  for (let row = 0; row < height; row++) {
    const { first, fixed } = rows[row];
    for (let column = 0; column < width; column++) {
      let red = 1 << (PRECISION - 1);
      let green = red;
      let blue = red;
      let from = 4 * (first * width + column);
      for (const weight of fixed) {
        red += data[from] * weight;
        green += data[from + 1] * weight;
        blue += data[from + 2] * weight;
        from += 4 * width;
      }
      out.set([clip(red), clip(green), clip(blue), 255], 4 * (row * width + column));
    }
  }
  return { data: out, width, height };
}

/** Half to even, as Python rounds. */
function round(value) {
  const rounded = Math.round(value);
  return Math.abs(value % 1) === 0.5 && rounded % 2 !== 0 ? rounded - 1 : rounded;
}

/**
 * The part of a picture that the network sees, and its size when the whole picture is resized.
 *
 * @param {{img_size: [number, number], crop_pct: number}} settings of a square network that takes the centre
 */
export function plan(width, height, settings) {
  const [side] = settings.img_size;
  const target = Math.floor(side / settings.crop_pct);
  const [short, long] = [Math.min(width, height), Math.max(width, height)];
  const longer = Math.trunc((target * long) / short);
  const [resizedWidth, resizedHeight] = width <= height ? [target, longer] : [longer, target];
  const left = round((resizedWidth - side) / 2);
  const top = round((resizedHeight - side) / 2);
  return { side, resizedWidth, resizedHeight, left, top };
}

/**
 * @param image RGBA pixels of the whole picture, upright and opaque
 * @returns {{input: Float32Array, seen: Uint8ClampedArray, side: number}} planes of R, G, B; and RGBA for people
 */
export function prepare(image, settings) {
  const { side, resizedWidth, resizedHeight, left, top } = plan(image.width, image.height, settings);
  const resized = resize(image, resizedWidth, resizedHeight);
  const input = new Float32Array(3 * side * side);
  const seen = new Uint8ClampedArray(4 * side * side);
  for (let row = 0; row < side; row++) {
    for (let column = 0; column < side; column++) {
      const from = 4 * ((row + top) * resizedWidth + column + left);
      const place = row * side + column;
      seen.set([...resized.data.subarray(from, from + 3), 255], 4 * place);
      for (let channel = 0; channel < 3; channel++) {
        const value = resized.data[from + channel] / 255;
        input[channel * side * side + place] = (value - settings.mean[channel]) / settings.std[channel];
      }
    }
  }
  return { input, seen, side };
}

/** Probabilities of logits. */
export function softmax(logits) {
  const largest = Math.max(...logits);
  const powers = Array.from(logits, (value) => Math.exp(value - largest));
  const total = powers.reduce((sum, value) => sum + value, 0);
  return powers.map((value) => value / total);
}
