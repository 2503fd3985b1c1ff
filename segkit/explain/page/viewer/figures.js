"use strict";
// Verdicts, plots and tables of the measures.

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 560; // width of a plot, in its own units
const NARROW = 6; // a table with more columns takes the full width of the page

function figure3(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value)) return String(value);
  return Math.abs(value) >= 1000 ? value.toFixed(0) : String(Number(value.toPrecision(3)));
}

function svg(tag, attributes = {}, text = null) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== null) element.textContent = text;
  return element;
}

/** Text at a point, centred by default. */
function words(text, x, y, more = {}) {
  return svg("text", { x, y, "text-anchor": "middle", ...more }, text);
}

/** Round numbers that span low to high, about five steps of 1, 2 or 5 times a power of ten. */
function ticks(low, high) {
  if (!(high > low)) [low, high] = [low - 0.5, low + 0.5];
  const rough = (high - low) / 5;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
  const first = Math.floor(low / step + NEARLY), last = Math.ceil(high / step - NEARLY);
  return Array.from({ length: last - first + 1 }, (_, n) => Number(((first + n) * step).toPrecision(12)));
}

function finite(numbers) {
  return numbers.filter((number) => typeof number === "number");
}

function plotFrame({ title, note }, drawing) {
  const parts = [make("figcaption", {}, make("h3", {}, title)), drawing];
  if (note) parts.push(make("p", { className: "note" }, note));
  return make("figure", { className: "card plot" }, ...parts);
}

/** A bar plot with whiskers for intervals and marks for chance. */
function barPlot(plot) {
  const left = 150, right = 56, row = 30, top = 8;
  const all = finite(plot.bars.flatMap(({ value, low, high, chance }) => [value, low, high, chance]));
  const marks = ticks(Math.min(0, ...all), Math.max(0, ...all));
  const x = (value) => left + ((value - marks[0]) / (marks.at(-1) - marks[0])) * (WIDTH - left - right);
  const bottom = top + row * plot.bars.length;
  const drawing = svg("svg", { viewBox: `0 0 ${WIDTH} ${bottom + 42}`, role: "img" });
  drawing.setAttribute("aria-label", `${plot.title}: ` +
    plot.bars.map(({ name, value }) => `${name} ${figure3(value)}`).join(", "));
  for (const mark of marks) {
    drawing.append(svg("line", { class: mark === 0 ? "axis" : "grid", x1: x(mark), x2: x(mark), y1: top, y2: bottom }),
      words(figure3(mark), x(mark), bottom + 16));
  }
  drawing.append(words(plot.label, (left + WIDTH - right) / 2, bottom + 36, { class: "label" }));
  plot.bars.forEach(({ name, value, low, high, chance, baseline }, n) => {
    const middle = top + row * (n + 0.5);
    // The end of a name holds its channel and the mark of low values, so its middle is left out.
    const shown = name.length > 24 ? `${name.slice(0, 9)}…${name.slice(-13)}` : name;
    const kind = baseline ? " baseline" : "";
    const label = svg("text", { class: `name${kind}`, x: left - 8, y: middle + 4, "text-anchor": "end" }, shown);
    label.append(svg("title", {}, name));
    drawing.append(label);
    if (value === null) {
      drawing.append(svg("text", { x: x(0) + 6, y: middle + 4 }, "–"));
      return;
    }
    const [from, to] = [Math.min(x(0), x(value)), Math.max(x(0), x(value))];
    drawing.append(svg("rect", { class: `bar${kind}`, x: from, y: middle - 9, width: to - from, height: 18, rx: 2 }));
    let end = to;
    if (low !== null && high !== null) {
      const path = `M${x(low)} ${middle - 5}v10M${x(low)} ${middle}H${x(high)}M${x(high)} ${middle - 5}v10`;
      drawing.append(svg("path", { class: "whisker", d: path }));
      end = Math.max(end, x(high));
    }
    if (chance !== null) {
      const mark = svg("line", { class: "chance", x1: x(chance), x2: x(chance), y1: middle - 13, y2: middle + 13 });
      mark.append(svg("title", {}, `chance ${figure3(chance)}`));
      drawing.append(mark);
      if (x(chance) > end) end = x(chance);
    }
    drawing.append(svg("text", { class: `number${kind}`, x: end + 6, y: middle + 4 }, figure3(value)));
  });
  const parts = [drawing];
  const keys = [];
  if (plot.bars.some(({ chance }) => chance !== null)) keys.push(make("span", { className: "key chance" }, "chance"));
  if (plot.bars.some(({ low }) => low !== null)) keys.push(make("span", { className: "key whisker" }, "interval"));
  if (keys.length) parts.push(make("p", { className: "keys" }, ...keys));
  return plotFrame(plot, make("div", {}, ...parts));
}

/** A plot of lines on shared axes. */
function curvePlot(plot) {
  const left = 56, right = 12, top = 10, bottom = 250;
  const xs = ticks(...extent(plot.lines.flatMap((line) => line.x)));
  const ys = ticks(...extent(plot.lines.flatMap((line) => line.y)));
  const x = (value) => left + ((value - xs[0]) / (xs.at(-1) - xs[0])) * (WIDTH - left - right);
  const y = (value) => bottom - ((value - ys[0]) / (ys.at(-1) - ys[0])) * (bottom - top);
  const drawing = svg("svg", { viewBox: `0 0 ${WIDTH} ${bottom + 42}`, role: "img" });
  const names = plot.lines.map((line) => line.name).join(", ");
  drawing.setAttribute("aria-label", `${plot.title}: ${plot.y_label} over ${plot.x_label}; ${names}`);
  for (const mark of xs) {
    drawing.append(svg("line", { class: "grid", x1: x(mark), x2: x(mark), y1: top, y2: bottom }),
      words(figure3(mark), x(mark), bottom + 16));
  }
  for (const mark of ys) {
    const rule = { class: mark === 0 ? "axis" : "grid", x1: left, x2: WIDTH - right, y1: y(mark), y2: y(mark) };
    drawing.append(svg("line", rule), words(figure3(mark), left - 6, y(mark) + 4, { "text-anchor": "end" }));
  }
  const middle = (top + bottom) / 2;
  drawing.append(
    words(plot.x_label, (left + WIDTH - right) / 2, bottom + 36, { class: "label" }),
    words(plot.y_label, 14, middle, { class: "label", transform: `rotate(-90 14 ${middle})` }));
  plot.lines.forEach((line, n) => {
    const points = line.x.map((value, at) => [value, line.y[at]]).filter((pair) => finite(pair).length === 2);
    const path = points.map(([a, b]) => `${x(a)},${y(b)}`).join(" ");
    drawing.append(svg("polyline", { class: `line line-${n % 6}`, points: path }));
  });
  const keys = plot.lines.map((line, n) => {
    const stroke = svg("svg", { viewBox: "0 0 28 8", width: 28, height: 8, "aria-hidden": "true" });
    stroke.append(svg("polyline", { class: `line line-${n % 6}`, points: "0,4 28,4" }));
    return make("span", { className: "key" }, stroke, line.name);
  });
  return plotFrame(plot, make("div", {}, drawing, make("p", { className: "keys" }, ...keys)));
}

function extent(numbers) {
  const known = finite(numbers);
  return known.length ? [Math.min(...known), Math.max(...known)] : [0, 1];
}

/** A table that is sorted by a click on a column heading. */
function sortableTable({ title, columns, rows, note }) {
  const body = make("tbody");
  const numeric = columns.map((_, n) => rows.some((row) => typeof row[n] === "number"));
  const fill = (sorted) => body.replaceChildren(...sorted.map((row) => make("tr", {}, ...row.map((cell, n) => {
    const text = figure3(cell);
    const properties = { className: numeric[n] ? "number" : "", title: typeof cell === "number" ? String(cell) : "" };
    return n === 0 ? make("th", { scope: "row", ...properties }, text) : make("td", properties, text);
  }))));
  fill(rows);
  const heads = columns.map((name, n) => {
    const button = make("button", { type: "button" }, name);
    const head = make("th", { scope: "col", className: numeric[n] ? "number" : "" }, button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of heads) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      fill([...rows].sort((first, second) => (down ? -1 : 1) * compare(first[n], second[n])));
    });
    return head;
  });
  const table = make("table", {}, make("caption", {}, title), make("thead", {}, make("tr", {}, ...heads)), body);
  const parts = [make("div", { className: "scrolled", tabIndex: 0, role: "region", "aria-label": title }, table)];
  if (note) parts.push(make("p", { className: "note" }, note));
  return make("div", { className: columns.length > NARROW ? "card wide" : "card" }, ...parts);
}

/** Order of table cells: missing values first, numbers by size, words by the alphabet. */
function compare(first, second) {
  if (first === second) return 0;
  if (first === null || second === null) return first === null ? -1 : 1;
  if (typeof first === "number" && typeof second === "number") return first - second;
  return String(first).localeCompare(String(second));
}

/** The card of a verdict. `look` shows only its map; it is missing if the map is not among the layers. */
function verdictCard({ map, verdict, reason, numbers }, look) {
  const parts = [
    make("h3", {},
      make("span", { className: "name" }, map),
      make("span", { className: `verdict ${verdict.replace(" ", "-")}` }, verdict)),
    make("p", {}, reason),
    make("dl", { className: "numbers" }, ...Object.entries(numbers).map(([name, value]) =>
      make("div", {}, make("dt", {}, name), make("dd", {}, figure3(value))))),
  ];
  if (look) {
    const button = make("button", { type: "button" }, "Show this map");
    button.addEventListener("click", look);
    parts.push(button);
  }
  return make("article", { className: "card" }, ...parts);
}

function definitions(facts) {
  return make("dl", { className: "facts" }, ...Object.entries(facts).flatMap(([name, value]) =>
    [make("dt", {}, name), make("dd", {}, value)]));
}
