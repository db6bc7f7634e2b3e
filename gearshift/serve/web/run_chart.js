// A chart of steps, drawn by uPlot: lines with gaps, a logarithmic axis, a zoom and a cursor that all
// charts of the page share.
import { html, useEffect, useLayoutEffect, useRef } from "./common.js";
import uPlot from "./vendor/uplot.js";
import { words } from "./run_en.js";

export const COLOURS = ["#3b82f6", "#d97706", "#0d9488", "#dc2626", "#9333ea", "#64748b", "#db2777"];
const DASHES = [[], [6, 3], [2, 2], [8, 3, 2, 3]];
const FONT = "11px sans-serif";
const shared = uPlot.sync("steps");

let range = null; // the zoomed steps

/** Show these steps in all charts, or all steps. */
export function zoom(steps) {
  range = steps;
  for (const chart of shared.plots) chart.setData(chart.data);
}

const redraw = () => shared.plots.forEach((chart) => chart.redraw(false));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
new MutationObserver(redraw).observe(document.documentElement, { attributeFilter: ["data-theme"] });

export function figure(x) {
  if (typeof x !== "number" || Number.isNaN(x)) return "";
  const size = Math.abs(x);
  if (size !== 0 && (size < 1e-3 || size >= 1e5)) return x.toExponential(2);
  return String(Number(x.toPrecision(5)));
}

/** A moving mean with this weight of the past, gaps left out. */
export function smooth(values, weight) {
  if (!weight) return values;
  let mean = 0, sum = 0;
  return values.map((x) => {
    if (x === null) return null;
    mean = weight * mean + (1 - weight) * x;
    sum = weight * sum + (1 - weight);
    return mean / sum;
  });
}

/** The steps of all lines, then each line's values at them: null is a gap, undefined none of its steps. */
function aligned(lines, log) {
  const steps = [...new Set(lines.flatMap((line) => line.steps))].filter((step) => step !== null).sort((a, b) => a - b);
  const places = new Map(steps.map((step, i) => [step, i]));
  const columns = lines.map((line) => {
    const column = Array(steps.length).fill(undefined);
    line.steps.forEach((step, i) => {
      if (step !== null) column[places.get(step)] = log && line.values[i] <= 0 ? null : line.values[i];
    });
    return column;
  });
  return [steps, ...columns];
}

const ink = (chart) => getComputedStyle(chart.root).color;
const faintInk = (chart) => getComputedStyle(chart.root).borderTopColor;

const power = (y) => (Math.abs(Math.log10(y) - Math.round(Math.log10(y))) < 1e-9 ? y : null);

function heights(low, high, log) {
  if (low === null) return [null, null];
  if (log) return uPlot.rangeLog(low, high, 10, false);
  const room = low === high && (Math.abs(low) || 1) / 10;
  return room ? [low - room, high + room] : uPlot.rangeNum(low, high, 0.1, true);
}

function plot(place, lines, log, hooks) {
  const axis = { stroke: ink, font: FONT, grid: { stroke: faintInk, width: 1 }, ticks: { stroke: faintInk, width: 1, size: 4 }, values: (_, found) => found.map(figure) };
  const chosen = (chart) => {
    const { left, width } = chart.select;
    const [from, to] = [left, left + width].map((x) => chart.posToVal(x, "x"));
    chart.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
    if (to - from >= 1) zoom([from, to]);
  };
  return new uPlot({
    width: place.clientWidth || 300,
    height: place.clientHeight || 192,
    padding: [8, 12, 0, 0],
    legend: { show: false },
    cursor: {
      y: false,
      drag: { x: true, y: false, setScale: false },
      bind: { dblclick: () => () => zoom(null) },
      sync: { key: "steps", scales: ["x", null], filters: { pub: (type) => type === "mousemove", sub: () => true } },
    },
    scales: {
      x: { time: false, range: (_, low, high) => range ?? (low === high ? [low - 0.5, high + 0.5] : [low, high]) },
      y: { distr: log ? 3 : 1, range: (_, low, high) => heights(low, high, log) },
    },
    axes: [{ ...axis, size: 24, space: 64 }, { ...axis, size: 56, space: 32, grid: { ...axis.grid, filter: (_, found) => (log ? found.map(power) : found) } }],
    series: [{}, ...lines.map((line) => ({
      stroke: line.colour, width: line.faint ? 1 : 1.6, alpha: line.faint ? 0.25 : 1, dash: DASHES[line.dash % DASHES.length],
      points: line.faint ? { show: false } : { size: 4 },
    }))],
    hooks: { ...hooks, setSelect: [chosen] },
  }, null, place);
}

const SIGNS = ["\u25b2", "\u25cf", "\u25a0", "\u25c6"];

/** The sign of the kind of marks that has this number. */
export const signOf = (i) => SIGNS[i % SIGNS.length];

/** The signs of marks under the axis; and a word where no line has a figure. */
function mark(chart, marks) {
  const { ctx, bbox } = chart, base = bbox.top + bbox.height;
  ctx.save();
  ctx.fillStyle = ink(chart);
  ctx.textAlign = "center";
  ctx.textBaseline = "middle";
  ctx.font = `${8 * uPlot.pxRatio}px sans-serif`;
  Object.values(marks).forEach((steps, i) => {
    for (const step of steps) {
      const x = chart.valToPos(step, "x", true);
      if (x >= bbox.left && x <= bbox.left + bbox.width) ctx.fillText(signOf(i), x, base);
    }
  });
  ctx.font = `${11 * uPlot.pxRatio}px sans-serif`;
  if (chart.scales.y.min === null) ctx.fillText(words.curves.nothing, bbox.left + bbox.width / 2, bbox.top + bbox.height / 2);
  ctx.restore();
}

function press(event, chart) {
  const { min, max } = chart.scales.x, steps = chart.data[0], at = chart.cursor.idx ?? steps.length - 1;
  const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (move) {
    const [first, last] = chart.series[0].idxs;
    const step = steps[Math.min(last, Math.max(first, at + move))];
    chart.setCursor({ left: chart.valToPos(step, "x"), top: 0 }, true, true);
  } else if (event.key === "+") zoom([steps[at] - (max - min) / 4, steps[at] + (max - min) / 4]);
  else if (event.key === "-") zoom(null);
  else return;
  event.preventDefault();
}

/** lines: [{name, steps, values, colour, dash}]; the legend shows the values under the cursor. */
export function Chart({ title, lines, marks = {}, log = false, smoothing = 0 }) {
  const place = useRef(null), legend = useRef(null), head = useRef(null), chart = useRef(null), now = useRef({});
  const shown = smoothing
    ? [...lines.map((l) => ({ ...l, values: smooth(l.values, smoothing) })), ...lines.map((l) => ({ ...l, faint: true }))]
    : lines;
  now.current = { lines: shown.slice(0, lines.length), marks };
  const tell = (made) => {
    const { idx, idxs } = made.cursor;
    const step = idx === null ? null : made.data[0][idx];
    const marked = Object.keys(now.current.marks).filter((name) => now.current.marks[name].includes(step));
    head.current.textContent = step === null ? "" : [`${words.curves.step} ${step}`, ...marked.map(words.curves.kind)].join(", ");
    legend.current.querySelectorAll("output").forEach((output, i) => {
      output.textContent = figure(idx === null ? now.current.lines[i].values.at(-1) : made.data[i + 1][idxs[i + 1]]);
    });
  };
  useLayoutEffect(() => {
    const made = plot(place.current, shown, log, { setCursor: [tell], draw: [(drawn) => mark(drawn, now.current.marks)] });
    const watch = new ResizeObserver(([{ contentRect }]) => contentRect.width && made.setSize(contentRect));
    watch.observe(place.current);
    chart.current = made;
    return () => { watch.disconnect(); made.destroy(); };
  }, [JSON.stringify([log, shown.map((l) => [l.name, l.colour, l.dash, l.faint])])]);
  useEffect(() => {
    chart.current.setData(aligned(shown, log));
    tell(chart.current);
  });
  return html`<figure class="chart">
    <figcaption>${title} <span class="note" ref=${head}></span></figcaption>
    <div class="plot" ref=${place} tabindex="0" role="img" aria-label=${`${title}: ${lines.map((l) => `${l.name} ${figure(l.values.at(-1))}`).join(", ")}`}
      onKeyDown=${(event) => press(event, chart.current)}></div>
    <ul ref=${legend} class="legend">${lines.map((l) => html`<li key=${l.name}>
      <svg width="22" height="8" aria-hidden="true"><line x1="0" y1="4" x2="22" y2="4" stroke=${l.colour} stroke-width="2" stroke-dasharray=${DASHES[l.dash % DASHES.length].join(" ")} /></svg>
      <span>${l.name}</span> <output></output></li>`)}</ul>
  </figure>`;
}
