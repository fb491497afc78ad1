// The page's arithmetic against Pillow's, without a browser.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import test from "node:test";

import { heatmap } from "../src/heatmap.js";
import { plan, prepare, resize, softmax } from "../src/preprocess.js";

const expected = JSON.parse(readFileSync(new URL("expected.json", import.meta.url)));
const square = { img_size: [32, 32], crop_pct: 1, mean: [0.5, 0.4, 0.3], std: [0.2, 0.1, 0.3] };

/** The same picture as in make_expected.py, as RGBA. */
function picture(width, height) {
  const data = new Uint8ClampedArray(4 * width * height).fill(255);
  for (let place = 0; place < 3 * width * height; place++) {
    const noise = (((place * 7919) % 65521) * 31) % 256;
    const value = Math.floor(place / 30) % 3 === 0 ? (place % 2) * 255 : noise;
    data[4 * Math.floor(place / 3) + (place % 3)] = value;
  }
  return { data, width, height };
}

function withoutAlpha(data) {
  return new Uint8Array(data).filter((_, place) => place % 4 < 3);
}

for (const { width, height, size, rgb } of expected.resized) {
  test(`${width} x ${height} resized to ${size} equals Pillow's to the last bit`, () => {
    const resized = resize(picture(width, height), ...size);
    assert.deepEqual([resized.width, resized.height], size);
    assert.deepEqual(withoutAlpha(resized.data), new Uint8Array(Buffer.from(rgb, "base64")));
  });
}

test("the shorter side is resized and the centre taken, rounded as Python does", () => {
  assert.deepEqual(plan(100, 33, square), { side: 32, resizedWidth: 96, resizedHeight: 32, left: 32, top: 0 });
  assert.deepEqual(plan(32, 37, square), { side: 32, resizedWidth: 32, resizedHeight: 37, left: 0, top: 2 }); // of 2.5
  assert.deepEqual(plan(32, 39, square), { side: 32, resizedWidth: 32, resizedHeight: 39, left: 0, top: 4 }); // of 3.5
  assert.equal(plan(500, 300, { ...square, crop_pct: 0.875 }).resizedHeight, 36);
});

test("the input has a plane a channel, normalised", () => {
  const { input, seen, side } = prepare(picture(32, 32), square);
  assert.equal(side, 32);
  for (const [place, channel] of [[0, 0], [77, 1], [1023, 2]]) {
    const value = seen[4 * place + channel] / 255;
    const normalised = (value - square.mean[channel]) / square.std[channel];
    assert.ok(Math.abs(input[channel * 1024 + place] - normalised) < 1e-6);
  }
});

test("probabilities add up, whatever the logits", () => {
  const [first, second] = softmax([1000, 1000 - Math.log(3)]);
  assert.ok(Math.abs(first - 0.75) < 1e-9 && Math.abs(second - 0.25) < 1e-9);
});

test("the map is hot where its value is largest", () => {
  const pixels = heatmap([0, 0, 0, 1], 2, 2, 8);
  const [cold, hot] = [pixels.subarray(0, 4), pixels.subarray(-4)];
  assert.ok(cold[2] > cold[0] + 80 && hot[0] > hot[2] + 80);
  assert.ok(pixels.every((value, place) => place % 4 < 3 || value === 255));
  assert.deepEqual([...heatmap([0, 1], 1, 2, 2)].slice(0, 4), [65, 69, 171, 255]);
  assert.deepEqual([...heatmap([3, 3, 3, 3], 2, 2, 1)], [65, 69, 171, 255]);
});
