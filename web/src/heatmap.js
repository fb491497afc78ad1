// A map of a few cells as colours, lowest to highest, for laying over a photograph.

// Google's Turbo at equal steps without its dark ends, as in mambavision.inference.overlay.
const COLOURS = [
  [65, 69, 171],
  [70, 117, 237],
  [57, 162, 252],
  [27, 207, 212],
  [36, 236, 166],
  [97, 252, 108],
  [164, 252, 59],
  [209, 232, 52],
  [243, 198, 58],
  [254, 155, 45],
  [243, 99, 21],
  [217, 56, 6],
  [177, 25, 1],
];

function colour(strength) {
  const place = strength * (COLOURS.length - 1);
  const low = Math.min(Math.floor(place), COLOURS.length - 2);
  const share = place - low;
  return COLOURS[low].map((value, channel) => Math.round(value + share * (COLOURS[low + 1][channel] - value)));
}

/** The four cells around a place and their weights (Catmull-Rom), the outermost cells repeated beyond the edge. */
function taps(place, cells, side) {
  const position = ((place + 0.5) * cells) / side - 0.5;
  const first = Math.floor(position);
  const t = position - first;
  const weights = [
    ((2 - t) * t - 1) * t,
    (3 * t - 5) * t * t + 2,
    ((4 - 3 * t) * t + 1) * t,
    (t - 1) * t * t,
  ];
  return weights.map((weight, tap) => ({
    cell: Math.min(Math.max(first + tap - 1, 0), cells - 1),
    weight: weight / 2,
  }));
}

/**
 * @param {ArrayLike<number>} values a map in rows
 * @returns {Uint8ClampedArray} RGBA of side x side
 */
export function heatmap(values, rows, columns, side) {
  const low = Math.min(...values);
  const span = Math.max(...values) - low || 1;
  const pixels = new Uint8ClampedArray(4 * side * side);
  const across = Array.from({ length: side }, (_, x) => taps(x, columns, side));
  for (let y = 0; y < side; y++) {
    const down = taps(y, rows, side);
    for (let x = 0; x < side; x++) {
      let value = 0;
      for (const row of down) {
        for (const column of across[x]) value += row.weight * column.weight * values[row.cell * columns + column.cell];
      }
      const strength = Math.min(Math.max((value - low) / span, 0), 1); // the curve may swing beyond the cells
      pixels.set([...colour(strength), 255], 4 * (y * side + x));
    }
  }
  return pixels;
}
