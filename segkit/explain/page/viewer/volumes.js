"use strict";
// Volumes: decode the volumes of the page, and read values at positions.

const NEARLY = 1e-6; // tolerance for rounding errors, in voxels

/** The volume in the element `volume-NUMBER`; `described` has the numbers that decode it. */
async function unpack(number, described) {
  const text = atob(document.getElementById(`volume-${number}`).textContent);
  const packed = new Uint8Array(text.length);
  for (let n = 0; n < text.length; n++) packed[n] = text.charCodeAt(n);
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const bytes = new Uint8Array(await new Response(stream).arrayBuffer());
  const [nx, ny, nz] = described.shape;
  let codes = bytes;
  if (described.bytes === 2) {
    const count = nx * ny * nz; // all low bytes come first, then all high ones
    codes = new Uint16Array(count);
    for (let n = 0; n < count; n++) codes[n] = bytes[n] | (bytes[count + n] << 8);
  }
  let highest = 0;
  for (const code of codes) if (code > highest && code !== described.missing) highest = code;
  return { ...described, codes, nx, ny, nz, spread: described.step * highest, exact: described.step === 1 };
}

/** The step with which values are displayed: 1/5000 of their range. */
function finest(volume) {
  return volume.spread / 5000;
}

/** The precision of a volume's values, in words. */
function precision({ exact, step }) {
  return exact || step === 0 ? "exact values" : `values within ±${(step / 2).toPrecision(1)}`;
}

/** The value of a code; NaN if the value is missing. */
function decode(volume, code) {
  return code === volume.missing ? NaN : volume.low + volume.step * code;
}

/** The value of voxel (i, j, k), which must lie inside. */
function voxelAt(volume, i, j, k) {
  return decode(volume, volume.codes[i + volume.nx * (j + volume.ny * k)]);
}

/** An index, rounded if nearly whole, and clamped to the outermost voxel centres. */
function within(index, size) {
  const whole = Math.round(index);
  const snapped = Math.abs(index - whole) < NEARLY ? whole : index;
  return Math.min(Math.max(snapped, 0), size - 1);
}

function inside(volume, x, y, z) {
  const edge = 0.5 + NEARLY;
  return x >= -edge && y >= -edge && z >= -edge &&
    x <= volume.nx - 1 + edge && y <= volume.ny - 1 + edge && z <= volume.nz - 1 + edge;
}

/** The label at a fractional index: that of the nearest voxel, or 0 outside. */
function labelAt(volume, x, y, z) {
  if (!inside(volume, x, y, z)) return 0;
  const i = Math.round(within(x, volume.nx));
  const j = Math.round(within(y, volume.ny));
  const k = Math.round(within(z, volume.nz));
  return volume.codes[i + volume.nx * (j + volume.ny * k)];
}

/** The value at a fractional index: linear between voxel centres, constant beyond the outermost ones, NaN outside. */
function valueAt(volume, x, y, z) {
  if (!inside(volume, x, y, z)) return NaN;
  x = within(x, volume.nx);
  y = within(y, volume.ny);
  z = within(z, volume.nz);
  const i = Math.floor(x), j = Math.floor(y), k = Math.floor(z);
  const right = Math.ceil(x), front = Math.ceil(y), top = Math.ceil(z);
  const row = (jj, kk) => mix(voxelAt(volume, i, jj, kk), voxelAt(volume, right, jj, kk), x - i);
  const below = mix(row(j, k), row(front, k), y - j);
  return top === k ? below : mix(below, mix(row(j, top), row(front, top), y - j), z - k);
}

function mix(first, last, share) {
  return first + share * (last - first);
}

/** A point through an affine of three rows. */
function through(affine, [x, y, z]) {
  return affine.map((row) => row[0] * x + row[1] * y + row[2] * z + row[3]);
}

/** A value as text, with as many digits as its quantisation step allows. */
function formatted(value, step) {
  if (!Number.isFinite(value)) return "–";
  if (value !== 0 && Math.abs(value) < 1e-4) return value.toExponential(2);
  if (!step) return String(Number(value.toPrecision(6)));
  return value.toFixed(Math.min(Math.max(Math.ceil(-Math.log10(step)), 0), 6));
}
