// One chart on a canvas: lines with gaps, a logarithmic axis, zoom by dragging, and a cursor that
// all charts of the page share.
import { html, useEffect, useRef } from "./common.js";
import { words } from "./run_en.js";

export const COLOURS = ["#3b82f6", "#d97706", "#0d9488", "#dc2626", "#9333ea", "#64748b", "#db2777"];
const DASHES = [[], [6, 3], [2, 2], [8, 3, 2, 3]];
const LEFT = 52, RIGHT = 8, TOP = 6, BOTTOM = 20;

/** What all charts show: the zoomed range of steps and the step under the cursor. */
export const view = {
  range: null,
  step: null,
  charts: new Set(),
  set(change) {
    Object.assign(view, change);
    for (const draw of view.charts) draw();
  },
};

export function figure(x) {
  if (x === null || x === undefined || Number.isNaN(x)) return "";
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

function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * unit).find((s) => s >= rough);
  const found = [];
  for (let x = Math.ceil(low / step) * step; x <= high + step * 1e-9; x += step) found.push(Number(x.toPrecision(12)));
  return found;
}

function bounds(lines, range, log) {
  let x0 = Infinity, x1 = -Infinity, y0 = Infinity, y1 = -Infinity;
  for (const { steps, values } of lines)
    for (let i = 0; i < steps.length; i++) {
      const x = steps[i], y = values[i];
      if (y === null || y === undefined || (log && y <= 0) || (range && (x < range[0] || x > range[1]))) continue;
      if (x < x0) x0 = x;
      if (x > x1) x1 = x;
      if (y < y0) y0 = y;
      if (y > y1) y1 = y;
    }
  if (range) [x0, x1] = range;
  if (!Number.isFinite(y0)) return null;
  if (log) [y0, y1] = [Math.log10(y0), Math.log10(y1)];
  if (y0 === y1) [y0, y1] = [y0 - (Math.abs(y0) || 1) * 0.1, y1 + (Math.abs(y1) || 1) * 0.1];
  if (x0 === x1) [x0, x1] = [x0 - 0.5, x1 + 0.5];
  return { x0, x1, y0, y1 };
}

function draw(canvas, { lines, markers, log }) {
  if (!canvas?.clientWidth) return null; // it is not on the page now
  const ratio = window.devicePixelRatio || 1;
  const width = canvas.clientWidth, height = canvas.clientHeight;
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  const at = canvas.getContext("2d");
  at.scale(ratio, ratio);
  at.clearRect(0, 0, width, height);
  const ink = getComputedStyle(canvas).color;
  at.font = "11px sans-serif";
  at.fillStyle = ink;
  const box = bounds(lines, view.range, log);
  if (!box) {
    at.fillText(words.curves.nothing, LEFT, height / 2);
    return null;
  }
  const px = (x) => LEFT + ((x - box.x0) / (box.x1 - box.x0)) * (width - LEFT - RIGHT);
  const py = (y) => height - BOTTOM - ((y - box.y0) / (box.y1 - box.y0)) * (height - TOP - BOTTOM);
  at.strokeStyle = ink;
  at.textAlign = "right";
  for (const y of ticks(box.y0, box.y1, 4)) {
    at.globalAlpha = 0.15;
    at.beginPath(); at.moveTo(LEFT, py(y)); at.lineTo(width - RIGHT, py(y)); at.stroke();
    at.globalAlpha = 1;
    at.fillText(figure(log ? 10 ** y : y), LEFT - 4, py(y) + 4);
  }
  at.textAlign = "center";
  for (const x of ticks(box.x0, box.x1, Math.max(2, width / 90))) at.fillText(figure(x), px(x), height - 6);
  at.globalAlpha = 0.5;
  for (const x of markers) {
    if (x < box.x0 || x > box.x1) continue;
    at.beginPath(); at.moveTo(px(x), height - BOTTOM); at.lineTo(px(x) - 3, height - BOTTOM + 5); at.lineTo(px(x) + 3, height - BOTTOM + 5); at.fill();
  }
  at.globalAlpha = 1;
  at.save();
  at.beginPath(); at.rect(LEFT, TOP, width - LEFT - RIGHT, height - TOP - BOTTOM); at.clip();
  for (const line of lines) path(at, line, px, py, log);
  at.restore();
  if (view.step !== null) {
    at.globalAlpha = 0.6;
    at.strokeStyle = ink;
    at.beginPath(); at.moveTo(px(view.step), TOP); at.lineTo(px(view.step), height - BOTTOM); at.stroke();
    at.globalAlpha = 1;
  }
  return { ...box, toStep: (x) => box.x0 + ((x - LEFT) / (width - LEFT - RIGHT)) * (box.x1 - box.x0) };
}

function path(at, { steps, values, colour, dash, faint }, px, py, log) {
  at.strokeStyle = colour;
  at.globalAlpha = faint ? 0.25 : 1;
  at.lineWidth = faint ? 1 : 1.6;
  at.setLineDash(DASHES[dash % DASHES.length]);
  at.beginPath();
  let open = false, shown = 0, last = null;
  for (let i = 0; i < steps.length; i++) {
    const y = values[i];
    if (y === null || y === undefined || (log && y <= 0)) { open = false; continue; }
    last = [px(steps[i]), py(log ? Math.log10(y) : y)];
    if (open) at.lineTo(...last);
    else at.moveTo(...last);
    open = true;
    shown++;
  }
  at.stroke();
  at.setLineDash([]);
  if (shown === 1) { at.fillStyle = colour; at.fillRect(last[0] - 2, last[1] - 2, 4, 4); }
  at.globalAlpha = 1;
}

function nearest(steps, step) {
  let best = -1;
  for (let i = 0; i < steps.length; i++) if (best < 0 || Math.abs(steps[i] - step) < Math.abs(steps[best] - step)) best = i;
  return best;
}

/** lines: [{name, steps, values, colour, dash}]; the legend shows the values under the cursor. */
export function Chart({ title, lines, markers = [], log = false, smoothing = 0 }) {
  const canvas = useRef(null), legend = useRef(null), state = useRef({});
  const shown = smoothing
    ? [...lines.map((l) => ({ ...l, faint: true })), ...lines.map((l) => ({ ...l, values: smooth(l.values, smoothing) }))]
    : lines;
  state.current.props = { lines: shown, markers, log };
  const redraw = () => {
    state.current.box = draw(canvas.current, state.current.props);
    const bold = shown.filter((l) => !l.faint);
    [...(legend.current?.querySelectorAll("output") ?? [])].forEach((place, i) => {
      const line = bold[i];
      if (!line) return;
      const n = view.step === null ? line.values.length - 1 : nearest(line.steps, view.step);
      place.textContent = n >= 0 ? figure(line.values[n]) : "";
    });
  };
  useEffect(() => {
    redraw();
    view.charts.add(redraw);
    return () => view.charts.delete(redraw);
  });
  useEffect(() => {
    const watch = new ResizeObserver(() => draw(canvas.current, state.current.props));
    watch.observe(canvas.current);
    return () => watch.disconnect();
  }, []);
  const step = (event) => state.current.box && Math.round(state.current.box.toStep(event.offsetX));
  const down = (event) => { state.current.from = step(event); };
  const up = (event) => {
    const [a, b] = [state.current.from, step(event)].sort((x, y) => x - y);
    state.current.from = null;
    if (a !== null && b - a >= 1) view.set({ range: [a, b] });
  };
  const keys = (event) => {
    const box = state.current.box;
    if (!box) return;
    const now = view.step ?? Math.round(box.x1), width = box.x1 - box.x0;
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (move) view.set({ step: Math.min(box.x1, Math.max(box.x0, now + move)) });
    else if (event.key === "+") view.set({ range: [now - width / 4, now + width / 4] });
    else if (event.key === "-") view.set({ range: null });
    else return;
    event.preventDefault();
  };
  return html`<figure class="chart">
    <figcaption>${title}</figcaption>
    <canvas ref=${canvas} tabindex="0" role="img" aria-label=${`${title}: ${lines.map((l) => `${l.name} ${figure(l.values.at(-1))}`).join(", ")}`}
      onMouseDown=${down} onMouseUp=${up} onMouseMove=${(e) => view.set({ step: step(e) })}
      onMouseLeave=${() => view.set({ step: null })} onDblClick=${() => view.set({ range: null })} onKeyDown=${keys}></canvas>
    <ul ref=${legend} class="legend">${lines.map((l) => html`<li key=${l.name}>
      <svg width="22" height="8" aria-hidden="true"><line x1="0" y1="4" x2="22" y2="4" stroke=${l.colour} stroke-width="2" stroke-dasharray=${DASHES[l.dash % DASHES.length].join(" ")} /></svg>
      <span>${l.name}</span> <output></output></li>`)}</ul>
  </figure>`;
}
