// The time of each step by phase, the held-out figures row by row, and the differences of recipes.
import { api, html, useEffect, useState } from "./common.js";
import { COLOURS, figure } from "./run_chart.js";
import { words } from "./run_en.js";

function useAnswer(path) {
  const [state, setState] = useState({});
  useEffect(() => {
    let ended = false;
    setState({});
    api(path).then((value) => !ended && setState({ value }), (error) => !ended && setState({ error: error.message }));
    return () => { ended = true; };
  }, [path]);
  return state;
}

const at = (run, rest, query) => `/api/runs/${encodeURIComponent(run)}/${rest}?${new URLSearchParams(query)}`;
const waiting = ({ value, error }) => (error ? html`<p role="alert">${error}</p>` : value ? null : html`<p>${words.loading}</p>`);

export function Timeline({ run, stage, go }) {
  const state = useAnswer(at(run, "phases", { stage, limit: 100 }));
  if (!state.value) return waiting(state);
  const said = words.timeline, steps = state.value.steps;
  const names = [...new Set(steps.flatMap((s) => s.phases.map(([name]) => name)))];
  const colour = (name) => COLOURS[names.indexOf(name) % COLOURS.length];
  const ends = (s) => Math.max(s.seconds ?? 0, ...s.phases.map(([, , end]) => end ?? 0));
  const longest = Math.max(1e-9, ...steps.map(ends));
  const sums = names.map((name) => steps.flatMap((s) => s.phases).filter(([n]) => n === name).reduce((sum, [, a, b]) => sum + (b - a), 0));
  const whole = steps.reduce((sum, s) => sum + ends(s), 0) || 1;
  const rows = [...names.map((name, i) => [name, sums[i]]), [said.idle, Math.max(0, whole - sums.reduce((a, b) => a + b, 0))]];
  const peak = (name) => Math.max(...steps.map((s) => s.memory?.[name] ?? -Infinity));
  const memory = names.some((name) => Number.isFinite(peak(name)));
  return html`<p class="note">${said.steps(steps.length)}. ${said.hint}</p>
    <table><thead><tr><th scope="col">${said.phase}</th><th scope="col">${said.seconds}</th><th scope="col">${said.share}</th>${memory && html`<th scope="col">${said.memory}</th>`}</tr></thead>
      <tbody>${rows.map(([name, sum]) => html`<tr><th scope="row">${names.includes(name) && html`<svg width="12" height="12" aria-hidden="true"><rect width="12" height="12" fill=${colour(name)} /></svg> `}${name}</th>
        <td class="number">${figure(sum)}</td><td class="number">${figure((100 * sum) / whole)}%</td>${memory && html`<td class="number">${Number.isFinite(peak(name)) ? figure(peak(name)) : ""}</td>`}</tr>`)}</tbody></table>
    <ol class="timeline">${[...steps].reverse().map((s) => html`<li key=${s.step}>
      <button class="plain" onClick=${() => go({ tab: "rollouts", step: s.step, episode: undefined })}>${s.step}</button>
      <svg viewBox="0 0 1000 12" preserveAspectRatio="none" role="img" aria-label=${s.phases.map(([n, a, b]) => `${n} ${figure(b - a)} s`).join(", ")}>
        <rect x="0" y="5" width=${(1000 * ends(s)) / longest} height="2" fill="currentColor" opacity="0.3" />
        ${s.phases.map(([name, a, b]) => html`<rect x=${(1000 * Math.max(0, a)) / longest} y="0" width=${Math.max(1, (1000 * (b - Math.max(0, a))) / longest)} height="12" fill=${colour(name)}><title>${`${name} ${figure(b - a)} s`}</title></rect>`)}
      </svg><span class="number">${figure(ends(s))} s</span></li>`)}</ol>`;
}

/** A table that scrolls in itself where the page is narrow. */
const wide = (name, table) => html`<div class="wide-table" tabindex="0" role="group" aria-label=${name}>${table}</div>`;

const interval = (found) => (Array.isArray(found) ? `[${found.map((x) => (x === null ? "?" : figure(x))).join(", ")}]` : "");

export function Heldout({ run }) {
  const [first, setFirst] = useState(0);
  const state = useAnswer(at(run, "heldout", { from: first }));
  const said = words.heldout;
  if (!state.value) return waiting(state);
  const { policies, compared, rows, better, worse, count } = state.value;
  if (!Object.keys(policies).length) return html`<p>${said.none}</p>`;
  return html`${wide(words.tabs.heldout, html`<table><thead><tr>${["policy", "metric", "value", "interval", "n", "failures"].map((n) => html`<th scope="col">${said[n]}</th>`)}</tr></thead>
      <tbody>${Object.entries(policies).map(([name, p]) => html`<tr><th scope="row">${name}</th><td>${p.metric}</td><td class="number">${figure(p.value)}</td><td class="number">${interval(p.interval)}</td><td class="number">${p.n}</td><td class="number">${p.failures}</td></tr>`)}</tbody></table>`)}
    ${compared.length > 0 && wide(said.compared, html`<table><thead><tr>${["compared", "difference", "interval", "p", "better", "worse"].map((n) => html`<th scope="col">${said[n]}</th>`)}<th></th></tr></thead>
      <tbody>${compared.map((c) => html`<tr><th scope="row">${c.before} → ${c.after}</th><td class="number">${figure(c.difference)}</td><td class="number">${interval(c.interval)}</td><td class="number">${figure(c.p)}</td><td class="number">${c.better}</td><td class="number">${c.worse}</td><td>${c.told_apart ? said.apart : said.chance}</td></tr>`)}</tbody></table>`)}
    <h2>${said.rows(better, worse)}</h2>
    ${rows.map((row) => html`<article class="message" key=${row.row}><h3>${row.row}${row.change !== null ? `: ${said.change} ${row.change > 0 ? "+" : ""}${figure(row.change)}` : ""}</h3>
      <pre class="text">${String(row.prompt ?? "")}</pre>${row.gold && html`<p>${said.gold}: <bdi>${String(row.gold)}</bdi></p>`}
      <div class="beside">${Object.entries(row.policies).map(([name, p]) => html`<section><h4>${name} ${figure(p.value)}</h4><pre class="text">${String(p.answer ?? "")}</pre></section>`)}</div></article>`)}
    <div class="tools"><button disabled=${first === 0} onClick=${() => setFirst(Math.max(0, first - 100))}>‹</button>
      <button disabled=${first + rows.length >= count} onClick=${() => setFirst(first + 100)}>${said.more} ›</button></div>`;
}

export function Recipes({ runs }) {
  const query = new URLSearchParams(runs.map((run) => ["run", run]));
  const state = useAnswer(`/api/runs-differences?${query}`);
  const said = words.recipes;
  if (runs.length < 2) return html`<p>${said.one}</p>`;
  if (!state.value) return waiting(state);
  if (!state.value.keys.length) return html`<p>${said.none}</p>`;
  return wide(words.tabs.recipes, html`<table><thead><tr><th scope="col">${said.key}</th>${state.value.runs.map((run) => html`<th scope="col">${run}</th>`)}</tr></thead>
    <tbody>${state.value.keys.map((row) => html`<tr><th scope="row">${row.key}</th>${row.values.map((value) => html`<td class="text">${value ?? ""}</td>`)}</tr>`)}</tbody></table>`);
}
