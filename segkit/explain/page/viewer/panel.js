"use strict";
// The panel beside the planes: the cross-hair's position, and the controls of scan and overlays.

/** An element; strings among its children become text, never markup. */
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

function swatch(colour) {
  const element = make("span", { className: "swatch" });
  element.style.background = colour;
  return element;
}

/** A slider with its name and its value, formatted by `format`. */
function slider(name, { min, max, step, value }, format, changed) {
  const output = make("output", {}, format(value));
  const input = make("input", { type: "range", min, max, step: step || "any" });
  input.value = value;
  input.addEventListener("input", () => {
    output.textContent = format(input.valueAsNumber);
    changed(input.valueAsNumber);
  });
  const row = make("label", { className: "slider" }, make("span", {}, name), input, output);
  return { row, input, set: (number) => { input.value = number; output.textContent = format(number); } };
}

function checkbox(name, checked, changed) {
  const input = make("input", { type: "checkbox", checked });
  input.addEventListener("change", () => changed(input.checked));
  return make("label", { className: "checkbox" }, input, name);
}

function percent(share) {
  return `${Math.round(100 * share)} %`;
}

/** Number of decimals for coordinates: two, or more if voxels are smaller than 0.1 units. */
function decimals(view) {
  return Math.max(2, 1 - Math.floor(Math.log10(Math.min(...view.spacing))));
}

/** The cross-hair's position in mm and voxels, and the value of each volume there. */
function whereabouts(view, goTo) {
  const inputs = AXES.map((axis) => {
    const input = make("input", { type: "number", step: "any", "aria-label": `World ${axis} in ${view.unit}` });
    input.addEventListener("change", () => goTo(inputs.map((each) => each.valueAsNumber)));
    return input;
  });
  const voxel = make("td", { id: "voxel" });
  const rows = [view.scan.channelName, ...view.layers.map((layer) => layer.name)].map((name, n) => {
    const value = make("td", { id: `value-${n}` });
    return { value, row: make("tr", {}, make("th", { scope: "row" }, name), value) };
  });
  const element = make("section", { id: "whereabouts" },
    make("h2", {}, "Cross-hair"),
    make("div", { className: "world" }, ...inputs.flatMap((input, n) => [make("span", {}, AXES[n]), input]), view.unit),
    make("table", {},
      make("tbody", {}, make("tr", {}, make("th", { scope: "row" }, "Voxel of the file"), voxel),
        ...rows.map(({ row }) => row))));
  const show = () => {
    const world = through(view.affine, view.at);
    world.forEach((length, n) => { inputs[n].value = length.toFixed(decimals(view)); });
    voxel.textContent = through(view.fileIndex, world).map((index) => Math.round(index)).join(", ");
    const numbers = [voxelAt(view.scan, ...view.at), ...view.layers.map((layer) =>
      (layer.kind === "map" ? valueAt : labelAt)(layer.volume, ...through(layer.from_scan, view.at)))];
    rows.forEach(({ value }, n) => {
      const layer = view.layers[n - 1];
      value.dataset.value = numbers[n]; // with all its digits
      if (layer?.kind === "labels") value.textContent = layer.names.get(numbers[n]) || "–";
      else value.textContent = formatted(numbers[n], layer ? finest(layer.volume) : view.scan.exact ? 1 : finest(view.scan));
    });
    return `${AXES.map((axis, n) => `${axis} ${world[n].toFixed(decimals(view) - 1)}`).join(", ")} ${view.unit}; ` +
      rows.map(({ row }) => [...row.children].map((cell) => cell.textContent).join(" ")).join("; ");
  };
  return { element, show };
}

/** The controls of the scan. */
function scanCard(view, changed, chooseChannel) {
  const lowest = view.scan.low;
  const highest = view.scan.low + view.scan.spread;
  const [low, high] = view.window;
  const widest = Math.max(highest - lowest, high - low, 1e-9);
  const format = (number) => formatted(number, widest / 255);
  const apply = () => {
    const [centre, width] = [level.input.valueAsNumber, Math.max(span.input.valueAsNumber, widest / 1e4)];
    view.window = [centre - width / 2, centre + width / 2];
    changed();
  };
  const reach = { min: Math.min(lowest, low), max: Math.max(highest, high) };
  const level = slider("Level", { ...reach, value: (low + high) / 2 }, format, apply);
  const span = slider("Window", { min: 0, max: widest, value: high - low }, format, apply);
  const parts = [level.row, span.row];
  if (view.channels.length > 1) {
    const choice = make("select", {}, ...view.channels.map((_, n) => make("option", { value: n }, `${n + 1}`)));
    choice.value = view.channel;
    choice.addEventListener("change", () => chooseChannel(Number(choice.value)));
    parts.unshift(make("label", { className: "choice" }, make("span", {}, "Channel"), choice));
  }
  parts.push(make("div", { className: "row" },
    checkbox("Smooth pixels", view.smooth, (on) => { view.smooth = on; changed(); }),
    checkbox("Cross-hair", view.crossHair, (on) => { view.crossHair = on; changed(); })));
  return make("section", { className: "card" }, make("h2", {}, "Scan"), ...parts);
}

/** The controls of an overlay; only its checkbox while it is hidden. */
function layerCard(layer, number, changed) {
  const toggle = checkbox(layer.name, layer.shown, (on) => { layer.shown = on; update(); changed(); });
  const controls = make("div", { className: "controls" },
    slider("Opacity", { min: 0, max: 1, step: 0.01, value: layer.opacity }, percent,
      (share) => { layer.opacity = share; changed(); }).row,
    ...(layer.kind === "labels" ? labelControls : mapControls)(layer, changed));
  const digit = number <= 9 ? [make("kbd", { title: `Key ${number} shows or hides it` }, `${number}`)] : [];
  const element = make("section", { className: "card layer" },
    make("h3", {}, toggle, ...digit), controls);
  const update = () => {
    toggle.firstChild.checked = layer.shown;
    controls.hidden = !layer.shown;
  };
  update();
  return { element, update };
}

function labelControls(layer, changed) {
  const items = layer.labels.map(({ name, colour, amount: size, unit }) => {
    const amount = size ? `${Number(size.toPrecision(3))} ${unit}` : "none";
    return make("li", { className: size ? "" : "absent" },
      swatch(colour), make("span", {}, name), make("span", { className: "amount" }, amount));
  });
  return [
    checkbox("Outline only", layer.outline, (on) => { layer.outline = on; changed(); }),
    make("ul", { className: "legend" }, ...items),
    make("p", { className: "note" }, layer.dashed ? "Outlines are dashed and pale." : "Outlines are solid."),
  ];
}

function mapControls(layer, changed) {
  const bar = make("div", { className: "scale-bar", role: "img" });
  const own = [layer.low, layer.high];
  const step = (layer.high - layer.low) / 255;
  const format = (number) => formatted(number, step);
  const end = (number) => String(Number(number.toPrecision(3)));
  const ends = make("div", { className: "scale" });
  const paint = () => {
    layer.table = lookup(layer.colourMap);
    ends.replaceChildren(...[end(layer.low), layer.quantity, end(layer.high)].map((text) => make("span", {}, text)));
    bar.style.background = `linear-gradient(to right, ${COLOUR_MAPS[layer.colourMap].join(", ")})`;
    bar.setAttribute("aria-label", `${layer.colourMap}, ${end(layer.low)} to ${end(layer.high)}`);
  };
  const choice = make("select", {}, ...Object.keys(COLOUR_MAPS).map((name) => make("option", {}, name)));
  choice.value = layer.colourMap;
  choice.addEventListener("change", () => { layer.colourMap = choice.value; paint(); changed(); });
  paint();
  const pitch = layer.spacing.slice(0, layer.flat ? 2 : 3).map((step) => Number(step.toPrecision(3))).join(" × ");
  const hide = slider("Hide below", { min: layer.low, max: layer.high, value: layer.low }, format, (number) => {
    layer.threshold = number > layer.low ? number : -Infinity;
    changed();
  });
  const parts = [
    bar,
    ends,
    make("label", { className: "choice" }, make("span", {}, "Colours"), choice),
  ];
  if (layer.high > layer.low) parts.push(hide.row);
  const options = [checkbox("Fade low values", layer.fade, (on) => { layer.fade = on; changed(); })];
  if (own.some((value, n) => value !== layer.whole[n])) {
    options.push(checkbox(`Colours from ${layer.whole.map(end).join(" to ")}`, false, (on) => {
      [layer.low, layer.high] = on ? layer.whole : own;
      paint();
      changed();
    }));
  }
  parts.push(
    make("div", { className: "row" }, ...options),
    make("p", { className: "note" }, `Cells of ${pitch} ${layer.unit}, ${precision(layer.volume)}`));
  return parts;
}
