"use strict";
// The whole page: decode the volumes, build the controls, and redraw after each change.
//
// The fragment of the URL sets the view: at=X,Y,Z in mm, or in the unit of a picture; overlay=NAME, once or more, shows
// only these overlays, off=NAME hides one; orientation=radiological|neurological; theme=light|dark.

const FLAT = 1e-3; // colours are stretched only if a map's values span more than this share of its range

const byId = (id) => document.getElementById(id);

async function start() {
  const content = JSON.parse(byId("content").textContent);
  const volumes = await Promise.all(content.volumes.map((described, number) => unpack(number, described)));
  const view = firstView(content, volumes);
  const planes = planesOf(view.scan).map((plane) => buildPlane(plane, view));
  const where = whereabouts(view, (world) => goTo(world));
  byId("planes").append(...planes.map((plane) => plane.element));
  byId(planes.length > 1 ? "planes" : "panel").append(where.element); // in the free corner
  const cards = view.layers.map((layer, n) => layerCard(layer, n + 1, () => changed()));
  let scan = scanCard(view, () => changed(), chooseChannel);
  byId("panel").append(scan, ...cards.map((card) => card.element), help());
  fillSections(content, view, (map) => {
    for (const layer of view.layers) if (layer.kind === "map") layer.shown = layer === map;
    changed();
    byId("viewer").scrollIntoView({ block: "start" });
  });

  let waiting = false;
  function changed() {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; show(); });
  }

  function show() {
    for (const plane of planes) {
      draw(plane, view);
      plane.update();
    }
    for (const card of cards) card.update();
    byId("spoken").textContent = where.show();
    byId("link").hash = fragment(view);
    byId("convention").hidden = view.picture;
    const right = view.radiological
      ? "Radiological: patient’s right on the left"
      : "Neurological: patient’s right on the right";
    byId("convention").textContent = view.picture ? "" : right;
  }

  function move(steps) {
    for (const [axis, index] of steps) {
      view.at[axis] = Math.min(Math.max(Math.round(index), 0), view.scan.shape[axis] - 1);
    }
    changed();
  }

  function goTo(world) {
    if (world.every(Number.isFinite)) move(through(view.index, world).map((index, axis) => [axis, index]));
  }

  function chooseChannel(channel) {
    setChannel(view, channel);
    const card = scanCard(view, changed, chooseChannel);
    scan.replaceWith(card);
    scan = card;
    changed();
  }

  function follow() {
    const wanted = new URLSearchParams(location.hash.slice(1));
    const only = wanted.getAll("overlay");
    for (const layer of view.layers) {
      if (only.length) layer.shown = only.includes(layer.name);
      if (wanted.getAll("off").includes(layer.name)) layer.shown = false;
    }
    if (wanted.has("orientation")) view.radiological = wanted.get("orientation") !== "neurological";
    if (["light", "dark"].includes(wanted.get("theme"))) setTheme(wanted.get("theme"));
    if (wanted.has("at")) goTo(wanted.get("at").split(",").map(Number));
    changed();
  }

  for (const plane of planes) {
    listen(plane, view, move);
    plane.slider.addEventListener("input", () => move([[plane.through, plane.slider.valueAsNumber]]));
  }
  byId("convention").addEventListener("click", () => { view.radiological = !view.radiological; changed(); });
  addEventListener("keydown", (event) => {
    const layer = view.layers[Number(event.key) - 1];
    const typing = event.target.matches("input:not([type=checkbox], [type=range]), select");
    if (!layer || typing || event.ctrlKey || event.metaKey || event.altKey) return;
    layer.shown = !layer.shown;
    changed();
  });
  addEventListener("hashchange", follow);
  const resized = () => { layOut(planes, byId("planes"), view); changed(); };
  addEventListener("resize", resized);
  layOut(planes, byId("planes"), view);
  follow();
  show();
  page.dataset.ready = "yes";
}

/** The view at first: the first map and outlines of labels, at the centre of the labels. */
function firstView(content, volumes) {
  const { scan } = content;
  const view = {
    channels: volumes.slice(0, scan.windows.length),
    windows: scan.windows,
    affine: scan.affine,
    index: scan.index,
    fileIndex: scan.file_index,
    spacing: scan.spacing,
    unit: scan.unit,
    picture: scan.picture,
    flat: scan.flat,
    radiological: true,
    smooth: false,
    crossHair: true,
  };
  setChannel(view, 0);
  const kinds = { labels: 0, map: 0 };
  const mapped = content.layers.some((layer) => layer.kind === "map");
  view.layers = content.layers.map((layer) => {
    const nth = kinds[layer.kind]++;
    const described = { ...layer, volume: volumes[layer.volume], unit: view.unit, flat: view.flat };
    if (layer.kind === "map") {
      const whole = [layer.low, layer.high];
      const [low, high] = layer.spans;
      // A nearly constant map keeps the colours of its full range.
      const stretched = high - low > FLAT * (layer.high - layer.low);
      return {
        ...described, shown: nth === 0, opacity: 0.6, colourMap: "inferno", threshold: -Infinity, fade: true,
        whole, low: stretched ? low : layer.low, high: stretched ? high : layer.high,
      };
    }
    return {
      ...described, shown: true, opacity: nth || mapped ? 0.9 : 0.5, outline: nth > 0 || mapped, dashed: nth > 0,
      colours: new Map(layer.labels.map(({ number, colour }) => [number, rgb(colour)])),
      names: new Map(layer.labels.map(({ number, name }) => [number, name])),
    };
  });
  view.at = middle(view);
  return view;
}

function setChannel(view, channel) {
  view.channel = channel;
  view.scan = view.channels[channel];
  view.scan.channelName = view.channels.length > 1 ? "Scan, channel shown" : "Scan";
  view.window = view.windows[channel];
}

/** The voxel of the scan nearest to the centre of the labels; the middle voxel if there are none. */
function middle(view) {
  const { shape } = view.scan;
  const half = shape.map((size) => Math.floor(size / 2));
  const labels = view.layers.find((layer) => layer.labels?.some(({ amount }) => amount));
  if (!labels) return half;
  const { codes, nx, ny } = labels.volume;
  const sum = [0, 0, 0];
  let count = 0;
  codes.forEach((code, n) => {
    if (code === 0) return;
    sum[0] += n % nx;
    sum[1] += Math.floor(n / nx) % ny;
    sum[2] += Math.floor(n / (nx * ny));
    count++;
  });
  const centre = through(labels.to_scan, sum.map((each) => each / count));
  return centre.map((index, axis) => Math.min(Math.max(Math.round(index), 0), shape[axis] - 1));
}

/** A plane's canvas, the letters at its edges and its slider. */
function buildPlane(plane, view) {
  const slices = view.scan.shape[plane.through];
  const title = view.flat ? "Picture" : view.picture && plane.name === "Axial" ? "Page" : plane.name;
  const canvas = make("canvas", { tabIndex: 0, role: "application", id: plane.name.toLowerCase() });
  canvas.setAttribute("aria-label",
    `${plane.name} plane: arrow keys move the cross-hair, Page Up and Page Down change the slice`);
  canvas.setAttribute("aria-describedby", "spoken");
  const letters = {};
  for (const edge of ["left", "right", "top", "bottom"]) letters[edge] = make("span", { className: `edge ${edge}` });
  const slider = make("input", { type: "range", min: 0, max: slices - 1, step: 1, disabled: slices === 1 });
  slider.setAttribute("aria-label", `${plane.name} slice`);
  const place = make("output");
  const element = make("figure", { className: `plane ${plane.name.toLowerCase()}` },
    make("div", { className: "screen" }, canvas, ...Object.values(letters)),
    make("figcaption", {}, make("span", {}, title), slider, place));
  slider.hidden = view.flat;
  const update = () => {
    for (const [edge, letter] of Object.entries(edgeLetters(plane, view))) {
      letters[edge].textContent = letter;
      letters[edge].title = SIDES[letter] ?? "";
    }
    slider.value = view.at[plane.through];
    const height = through(view.affine, view.at)[plane.through].toFixed(1);
    place.textContent = view.flat ? "" : `${AXES[plane.through]} ${height} ${view.unit}`;
  };
  return { ...plane, canvas, slider, element, update, voxels: document.createElement("canvas") };
}

function fillSections(content, view, showAlone) {
  const fill = (id, parts) => {
    byId(id).hidden = !parts.length;
    byId(id).append(make("div", { className: "cards" }, ...parts));
  };
  fill("verdicts", content.verdicts.map((verdict) => {
    const map = view.layers.find((layer) => layer.kind === "map" && layer.name === verdict.map);
    return verdictCard(verdict, map && (() => showAlone(map)));
  }));
  fill("plots", [...content.bars.map(barPlot), ...content.curves.map(curvePlot)]);
  fill("tables", content.tables.map(sortableTable));
  const facts = { ...content.facts, ...aboutScan(content, view) };
  byId("facts").append(make("div", { className: "card" }, definitions(facts)));
}

/** Facts about the volumes on the page. */
function aboutScan({ scan, layers }, view) {
  const axes = scan.flat ? 2 : 3;
  const spacing = scan.file_spacing.slice(0, axes).map((step) => Number(step.toPrecision(4))).join(" × ");
  const size = scan.file_shape.slice(0, axes).join(" × ");
  const facts = { Scan: scan.picture
    ? `${size} pixels of ${spacing} ${scan.unit}`
    : `${size} voxels of ${spacing} mm, stored ${scan.orientation}` };
  if (scan.oblique > 0.5) {
    facts.Planes = `along the scan's own axes, up to ${scan.oblique.toFixed(1)}° from the patient's axes; ` +
      "world coordinates are exact";
  }
  if (scan.every.some((step) => step > 1)) {
    facts.Shown = `one voxel of every ${scan.every.join(" × ")} along the file's axes, to keep this page small`;
  }
  facts["Values shown"] = `of the scan, at the centre of the voxel under the cross-hair (${precision(view.scan)})`;
  if (layers.some((layer) => layer.kind === "map")) {
    facts["Values shown"] += "; maps are interpolated linearly between the centres of their cells";
  }
  return facts;
}

function help() {
  return make("p", { className: "note" },
    "Click or drag to move the cross-hair. The mouse wheel, Page Up and Page Down change the slice. Arrow keys move " +
    "by one voxel, with Shift by ten. Keys 1 to 9 show or hide overlays.");
}

/** The URL fragment of the current view. */
function fragment(view) {
  const wanted = new URLSearchParams();
  wanted.set("at", through(view.affine, view.at).map((length) => length.toFixed(decimals(view))).join(","));
  for (const layer of view.layers) wanted.append(layer.shown ? "overlay" : "off", layer.name);
  wanted.set("orientation", view.radiological ? "radiological" : "neurological");
  return wanted.toString();
}

byId("theme").textContent = "Light or dark";
byId("theme").addEventListener("click", () => setTheme(page.dataset.theme === "dark" ? "light" : "dark"));
start().catch((error) => {
  byId("trouble").hidden = false;
  byId("trouble").textContent = "DecompressionStream" in window
    ? `This page cannot be shown: ${error.message}`
    : "This browser is too old for this page; use Chrome 80, Firefox 113, Safari 16.4 or later.";
  console.error(error);
});
