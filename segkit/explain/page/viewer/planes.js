"use strict";
// The three planes: their orientation, drawing, and movement through the scan.

const PLANES = [
  { name: "Coronal", across: 0, up: 2, through: 1 },
  { name: "Sagittal", across: 1, up: 2, through: 0 },
  { name: "Axial", across: 0, up: 1, through: 2 },
];
const LETTERS = [["L", "R"], ["P", "A"], ["I", "S"]];
const AXES = ["x", "y", "z"];
const NOTCH = 50; // pixels of scrolling
const SIDES = { L: "left", R: "right", P: "back", A: "front", I: "feet", S: "head" };

/** The colours of each colour map in equal steps, low to high. */
const COLOUR_MAPS = {
  inferno: ["#000004", "#280b54", "#65156e", "#9f2a63", "#d44842", "#f57d15", "#fac12a", "#fcffa4"],
  viridis: ["#440154", "#46327e", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#a0da39", "#fde725"],
  ice: ["#04061a", "#14275c", "#1c519b", "#2a81c4", "#52b2d9", "#98dbe6", "#eaffff"],
  "blue to red": ["#2166ac", "#67a9cf", "#d1e5f0", "#f7f7f7", "#fddbc7", "#ef8a62", "#b2182b"],
};

function rgb(colour) {
  return [1, 3, 5].map((start) => parseInt(colour.slice(start, start + 2), 16));
}

const DASH = 4; // length of a dash, in pixels of the page, at least

function pale(colour) {
  return `rgb(${rgb(colour).map((part) => Math.round(0.5 * part + 0.5 * 255)).join(", ")})`;
}

/** 256 colours of a map, three bytes each. */
function lookup(name) {
  const stops = COLOUR_MAPS[name].map(rgb);
  const table = new Uint8Array(256 * 3);
  for (let n = 0; n < 256; n++) {
    const place = (n / 255) * (stops.length - 1);
    const below = Math.min(Math.floor(place), stops.length - 2);
    for (let part = 0; part < 3; part++) {
      const [first, last] = [stops[below][part], stops[below + 1][part]];
      table[3 * n + part] = Math.round(first + (place - below) * (last - first));
    }
  }
  return table;
}

/** The planes to show: all three, or only one if the scan has a single slice. */
function planesOf(volume) {
  const shown = PLANES.filter((plane) => volume.shape[plane.across] > 1 && volume.shape[plane.up] > 1);
  return shown.length ? shown : PLANES;
}

/** The column of an index. Columns run to the patient's left and back in the radiological view, else to right and front. */
function column(index, size, radiological) {
  return radiological ? size - 1 - index : index;
}

/** The letters at the edges of a plane; empty for a picture, which shows no patient. */
function edgeLetters(plane, { radiological, picture }) {
  if (picture) return { left: "", right: "", top: "", bottom: "" };
  const [low, high] = LETTERS[plane.across];
  const [bottom, top] = LETTERS[plane.up];
  return { left: radiological ? high : low, right: radiological ? low : high, top, bottom };
}

/** A slice of the scan with its layers as ImageData, one pixel for each voxel. */
function painted(plane, view) {
  const { scan, at, radiological } = view;
  const width = scan.shape[plane.across], height = scan.shape[plane.up];
  const image = new ImageData(width, height);
  paintScan(image.data, plane, view, width, height);
  for (const layer of view.layers) {
    if (!layer.shown || layer.outline) continue;
    const values = sampled(layer, plane, at, width, height);
    const paint = layer.kind === "labels" ? paintLabels : paintMap;
    paint(image.data, values, layer, width, height, radiological);
  }
  return image;
}

function paintScan(pixels, plane, { scan, at, radiological, window: [low, high] }, width, height) {
  const place = [...at];
  const gain = 255 / (high - low);
  for (let u = 0; u < height; u++) {
    for (let a = 0; a < width; a++) {
      place[plane.across] = a;
      place[plane.up] = u;
      const value = (voxelAt(scan, place[0], place[1], place[2]) - low) * gain;
      const pixel = 4 * ((height - 1 - u) * width + column(a, width, radiological));
      pixels[pixel] = pixels[pixel + 1] = pixels[pixel + 2] = value; // clamped; NaN becomes 0
      pixels[pixel + 3] = 255;
    }
  }
}

/** A layer's values at the voxel centres of the slice, read from the layer's own grid. */
function sampled(layer, plane, at, width, height) {
  const start = [...at];
  start[plane.across] = start[plane.up] = 0;
  const [x, y, z] = through(layer.from_scan, start);
  const [ax, ay, az] = layer.from_scan.map((row) => row[plane.across]);
  const [ux, uy, uz] = layer.from_scan.map((row) => row[plane.up]);
  const read = layer.kind === "labels" ? labelAt : valueAt;
  const values = new Float32Array(width * height);
  for (let u = 0, n = 0; u < height; u++) {
    for (let a = 0; a < width; a++, n++) {
      values[n] = read(layer.volume, x + a * ax + u * ux, y + a * ay + u * uy, z + a * az + u * uz);
    }
  }
  return values;
}

function blend(pixels, pixel, red, green, blue, share) {
  pixels[pixel] += share * (red - pixels[pixel]);
  pixels[pixel + 1] += share * (green - pixels[pixel + 1]);
  pixels[pixel + 2] += share * (blue - pixels[pixel + 2]);
}

function paintMap(pixels, values, layer, width, height, radiological) {
  const table = layer.table;
  const gain = layer.high > layer.low ? 255 / (layer.high - layer.low) : 0;
  for (let u = 0, n = 0; u < height; u++) {
    for (let a = 0; a < width; a++, n++) {
      const value = values[n];
      if (!(value >= layer.threshold)) continue; // also skips NaN
      const level = Math.min(Math.max((value - layer.low) * gain, 0), 255);
      const share = layer.fade ? (layer.opacity * level) / 255 : layer.opacity;
      const entry = 3 * Math.round(level);
      const pixel = 4 * ((height - 1 - u) * width + column(a, width, radiological));
      blend(pixels, pixel, table[entry], table[entry + 1], table[entry + 2], share);
    }
  }
}

function paintLabels(pixels, values, layer, width, height, radiological) {
  for (let u = 0, n = 0; u < height; u++) {
    for (let a = 0; a < width; a++, n++) {
      const label = values[n];
      if (label === 0) continue;
      const [red, green, blue] = layer.colours.get(label);
      const pixel = 4 * ((height - 1 - u) * width + column(a, width, radiological));
      blend(pixels, pixel, red, green, blue, layer.opacity);
    }
  }
}

/** Draw the outlines of labels along voxel edges, each label in its colour; those of a dashed layer as dashes. */
function strokeOutlines(context, plane, view, layer, width, height) {
  const values = sampled(layer, plane, view.at, width, height);
  const paths = new Map(layer.labels.map(({ number }) => [number, new Path2D()]));
  const dx = context.canvas.width / width, dy = context.canvas.height / height;
  // Dashes and gaps of whole voxels, long enough to be seen: each edge is a line of its own.
  const dash = Math.ceil((DASH * devicePixelRatio) / Math.min(dx, dy));
  const gap = (place) => layer.dashed && Math.floor(place / dash) % 2 === 1;
  const label = (a, u) => (a >= 0 && a < width && u >= 0 && u < height ? values[u * width + a] : 0);
  for (let u = 0; u < height; u++) {
    for (let a = 0; a < width; a++) {
      const own = label(a, u);
      if (own === 0) continue;
      const path = paths.get(own);
      const x = column(a, width, view.radiological) * dx, y = (height - 1 - u) * dy;
      const segment = (fromX, fromY, toX, toY) => { path.moveTo(fromX, fromY); path.lineTo(toX, toY); };
      const leftwards = view.radiological ? 1 : -1;
      if (!gap(u)) {
        if (label(a + leftwards, u) !== own) segment(x, y, x, y + dy);
        if (label(a - leftwards, u) !== own) segment(x + dx, y, x + dx, y + dy);
      }
      if (!gap(a)) {
        if (label(a, u + 1) !== own) segment(x, y, x + dx, y);
        if (label(a, u - 1) !== own) segment(x, y + dy, x + dx, y + dy);
      }
    }
  }
  context.globalAlpha = layer.opacity;
  // The second set of labels is dashed and pale on a dark line, so that both show where they agree.
  const thick = Math.min(Math.max(Math.min(dx, dy) / 3, 1.5 * devicePixelRatio), 3 * devicePixelRatio);
  context.lineCap = layer.dashed ? "butt" : "round";
  for (const { number, colour } of layer.labels) {
    if (layer.dashed) {
      context.lineWidth = thick + 2 * devicePixelRatio;
      context.strokeStyle = "rgb(0, 0, 0)";
      context.stroke(paths.get(number));
    }
    context.lineWidth = thick;
    context.strokeStyle = layer.dashed ? pale(colour) : colour;
    context.stroke(paths.get(number));
  }
  context.globalAlpha = 1;
}

/** Draw a slice with outlines and the cross-hair on a plane's canvas. */
function draw(plane, view) {
  const { canvas, voxels } = plane;
  const image = painted(plane, view);
  voxels.width = image.width;
  voxels.height = image.height;
  voxels.getContext("2d").putImageData(image, 0, 0);
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = view.smooth;
  context.imageSmoothingQuality = "high";
  context.drawImage(voxels, 0, 0, canvas.width, canvas.height);
  for (const layer of view.layers) {
    if (layer.shown && layer.outline) strokeOutlines(context, plane, view, layer, image.width, image.height);
  }
  if (!view.crossHair) return;
  const across = column(view.at[plane.across], image.width, view.radiological) + 0.5;
  const down = image.height - view.at[plane.up] - 0.5;
  const x = Math.floor((across * canvas.width) / image.width) + 0.5;
  const y = Math.floor((down * canvas.height) / image.height) + 0.5;
  const gap = 7 * devicePixelRatio;
  context.lineWidth = devicePixelRatio;
  context.strokeStyle = "rgba(94, 234, 212, 0.8)";
  context.beginPath();
  for (const [fromX, fromY, toX, toY] of [
    [0, y, x - gap, y], [x + gap, y, canvas.width, y], [x, 0, x, y - gap], [x, y + gap, x, canvas.height],
  ]) {
    context.moveTo(fromX, fromY);
    context.lineTo(toX, toY);
  }
  context.stroke();
}

/** Give all planes the same scale in pixels per millimetre, so that they line up. */
function layOut(planes, container, view) {
  const { shape } = view.scan;
  const mm = shape.map((size, axis) => size * view.spacing[axis]);
  const room = container.clientWidth - 36;
  const tall = Math.max(innerHeight - 150, 420);
  const oneColumn = planes.length === 1 || room < 560;
  const wide = oneColumn ? Math.max(...planes.map((plane) => mm[plane.across])) : mm[0] + mm[1];
  const high = planes.length === 1 ? mm[planes[0].up] : oneColumn ? 0 : mm[2] + mm[1];
  const scale = Math.min(room / wide, high ? (tall - 90) / high : Infinity);
  container.classList.toggle("one-column", oneColumn);
  for (const { canvas, across, up } of planes) {
    const width = Math.max(mm[across] * scale, 2), height = Math.max(mm[up] * scale, 2);
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    canvas.width = Math.round(width * devicePixelRatio);
    canvas.height = Math.round(height * devicePixelRatio);
  }
}

/** Handle mouse, wheel and keys on a plane. `move` takes pairs of axis and new index. */
function listen(plane, view, move) {
  const { canvas } = plane;
  let turned = 0;
  const size = (axis) => view.scan.shape[axis];
  const point = (event) => {
    const box = canvas.getBoundingClientRect();
    const a = Math.floor(((event.clientX - box.left) / box.width) * size(plane.across));
    const r = Math.floor(((event.clientY - box.top) / box.height) * size(plane.up));
    move([
      [plane.across, column(a, size(plane.across), view.radiological)],
      [plane.up, size(plane.up) - 1 - r],
    ]);
  };
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    point(event);
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (canvas.hasPointerCapture(event.pointerId)) point(event);
  });
  canvas.addEventListener("wheel", (event) => {
    if (event.ctrlKey || size(plane.through) === 1) return; // the browser's zoom; nowhere to go
    event.preventDefault();
    // A notch of a wheel is a slice; the small steps of a touchpad add up to one.
    turned += event.deltaMode ? NOTCH * Math.sign(event.deltaY) : event.deltaY;
    const slices = Math.trunc(turned / NOTCH);
    turned -= slices * NOTCH;
    if (slices) move([[plane.through, view.at[plane.through] - Math.sign(slices)]]);
  }, { passive: false });
  canvas.addEventListener("keydown", (event) => {
    const rightwards = view.radiological ? -1 : 1;
    const steps = {
      ArrowRight: [plane.across, rightwards],
      ArrowLeft: [plane.across, -rightwards],
      ArrowUp: [plane.up, 1],
      ArrowDown: [plane.up, -1],
      PageUp: [plane.through, 1],
      PageDown: [plane.through, -1],
    };
    const step = steps[event.key];
    if (!step || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    const [axis, by] = step;
    move([[axis, view.at[axis] + by * (event.shiftKey ? 10 : 1)]]);
  });
}
