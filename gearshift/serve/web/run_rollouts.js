// The episodes of a step or of a whole run in a table: filter, sort, groups, export; and one episode alone.
import { api, html, useEffect, useState } from "./common.js";
import { figure } from "./run_chart.js";
import { Conversation, Facts, Group } from "./run_group.js";
import { Tokens } from "./run_tokens.js";
import { words } from "./run_en.js";

const said = words.rollouts;
const DRAWN = 400;
const NAME = 60; // the most characters of a name that a file gives

const path = (run, rest, query) => `/api/runs/${encodeURIComponent(run)}/${rest}?${new URLSearchParams(query)}`;

function withSpread(rows) {
  const groups = new Map();
  for (const row of rows) {
    const key = `${row.step}/${row.group_id}`;
    if (!groups.has(key)) groups.set(key, []);
    if (typeof row.reward === "number") groups.get(key).push(row.reward);
  }
  return rows.map((row) => {
    const own = groups.get(`${row.step}/${row.group_id}`), mean = own.reduce((a, b) => a + b, 0) / own.length;
    return { ...row, spread: own.length ? Math.sqrt(own.reduce((a, b) => a + (b - mean) ** 2, 0) / own.length) : null };
  });
}

function compare(a, b) {
  if (a === b) return 0;
  if (a === null || a === undefined) return 1;
  if (b === null || b === undefined) return -1;
  return a < b ? -1 : 1;
}

/** Rows of a step, or of all steps: the server searches for a part of a second, and goes on when asked. */
function useRows(run, stage, step, filter, all) {
  const [state, setState] = useState({ rows: [], share: 0, error: null });
  useEffect(() => {
    let ended = false;
    const load = async () => {
      let rows = [], next = 0;
      while (next !== null && !ended && rows.length < 20000) {
        const query = all ? { stage, filter, from: next } : { stage, filter, step };
        const found = await api(path(run, "rollouts", query));
        rows = [...rows, ...found.rows];
        next = all ? found.next : null;
        if (!ended) setState({ rows: withSpread(rows), share: next === null ? 1 : found.share, error: null });
      }
    };
    if (step !== null || all) load().catch((error) => !ended && setState({ rows: [], share: 1, error: error.message }));
    return () => { ended = true; };
  }, [run, stage, step, filter, all]);
  return state;
}

export function Rollouts({ run, stage, query, go, labels }) {
  const [steps, setSteps] = useState(null);
  const [text, setText] = useState(query.filter ?? "");
  const [filter, setFilter] = useState(query.filter ?? "");
  const [all, setAll] = useState(false);
  const [order, setOrder] = useState({ by: "episode", down: false });
  const [picked, setPicked] = useState([]);
  useEffect(() => {
    api(path(run, "steps", { stage })).then((found) => setSteps(found.steps), () => setSteps([]));
  }, [run, stage, query.step]);
  const step = query.step !== undefined ? Number(query.step) : steps?.at(-1) ?? null;
  const { rows, share, error } = useRows(run, stage, step, filter, all);
  if (query.episode !== undefined && step !== null)
    return html`<${Episode} run=${run} stage=${stage} step=${step} place=${Number(query.episode)} go=${go} />`;
  if (query.group !== undefined && step !== null)
    return html`<${Group} run=${run} stage=${stage} step=${step} group=${query.group} go=${go} labels=${labels} />`;
  if (steps?.length === 0) return html`<p>${words.none}</p>`;
  const sorted = order.by === "random"
    ? [...rows].sort((a, b) => Math.sin(a.step * 91 + a.episode * 7919) - Math.sin(b.step * 91 + b.episode * 7919))
    : [...rows].sort((a, b) => (order.down ? -1 : 1) * compare(a[order.by], b[order.by]));
  const at = steps?.indexOf(step) ?? -1;
  const pick = (row, on) => setPicked((old) => (on ? [...old, `${row.step}.${row.episode}`] : old.filter((p) => p !== `${row.step}.${row.episode}`)));
  const exported = new URLSearchParams({ stage, filter, ...(all ? {} : { step: step ?? 0 }) });
  if (picked.length) { exported.delete("filter"); exported.delete("step"); picked.forEach((p) => exported.append("pick", p)); }
  return html`<form class="tools" onSubmit=${(e) => { e.preventDefault(); setFilter(text); }}>
      <label>${said.step} <input type="number" min="0" value=${step ?? ""} disabled=${all} onChange=${(e) => go({ step: e.target.value })} /></label>
      <button type="button" disabled=${all || at <= 0} aria-label=${words.episode.before} onClick=${() => go({ step: steps[at - 1] })}>‹</button>
      <button type="button" disabled=${all || at < 0 || at >= steps.length - 1} aria-label=${words.episode.after} onClick=${() => go({ step: steps[at + 1] })}>›</button>
      <button type="button" onClick=${() => go({ step: undefined })}>${said.newest}</button>
      <label class="wide">${said.filter} <input type="search" value=${text} onInput=${(e) => setText(e.target.value)} onChange=${() => setFilter(text)} /></label>
      <label><input type="checkbox" checked=${all} onChange=${(e) => setAll(e.target.checked)} /> ${said.all}</label>
    </form>
    <p class="note">${said.hint}</p>
    <div class="tools">
      <button onClick=${() => setOrder({ by: "reward", down: false })}>${said.worst}</button>
      <button onClick=${() => setOrder({ by: "random" })}>${said.random}</button>
      <button onClick=${() => setOrder({ by: "group_id", down: false })}>${said.groups}</button>
      <a href=${`/api/runs/${encodeURIComponent(run)}/export?${exported}`} download="episodes.jsonl">${said.export(picked.length)}</a>
      <span class="note" role="status">${said.count(rows.length)}${share < 1 ? `, ${said.searching(share)}` : ""}</span>
    </div>
    ${error && html`<p role="alert">${error}</p>`}
    <${Table} rows=${sorted} order=${order} setOrder=${setOrder} picked=${picked} pick=${pick} go=${go} />
    ${rows.length > DRAWN && html`<p class="note">${said.more(rows.length - DRAWN)}</p>`}`;
}

function Table({ rows, order, setOrder, picked, pick, go }) {
  const parts = [...new Set(rows.flatMap((row) => Object.keys(row.rewards ?? {})))].filter((p, _, all) => all.length > 1 || p !== "environment");
  const known = (name) => rows.some((row) => row[name] !== null && row[name] !== undefined);
  const names = ["step", "episode", "group_id", "reward", "spread", "length", "finish_reason", "advantage", "version", "left_out"]
    .filter((n) => known(n) || n === "episode");
  const head = (name, shown) => html`<th scope="col" aria-sort=${order.by === name ? (order.down ? "descending" : "ascending") : "none"}>
    <button class="plain" onClick=${() => setOrder({ by: name, down: order.by === name && !order.down })}>${shown}</button></th>`;
  const cell = (row, name) => (typeof row[name] === "number" ? figure(row[name]) : String(row[name] ?? ""));
  return html`<div class="wide-table"><table>
    <thead><tr><th scope="col">${said.pick}</th>${names.map((n) => head(n, said.columns[n]))}
      ${parts.map((p) => html`<th scope="col">${p.slice(0, NAME)}</th>`)}${["prompt", "answer", "gold"].filter(known).map((n) => head(n, said.columns[n]))}</tr></thead>
    <tbody>${rows.slice(0, DRAWN).map((row) => html`<tr key=${`${row.step}.${row.episode}`}>
      <td><input type="checkbox" aria-label=${`${said.pick} ${words.episode.title(row.step, row.episode)}`} checked=${picked.includes(`${row.step}.${row.episode}`)} onChange=${(e) => pick(row, e.target.checked)} /></td>
      ${names.map((n) => html`<td class="number">${n === "episode"
        ? html`<a href=${`?step=${row.step}&episode=${row.episode}`} aria-label=${words.episode.title(row.step, row.episode)} onClick=${(e) => { e.preventDefault(); go({ step: row.step, episode: row.episode }); }}>${row.episode}</a>`
        : n === "group_id" && row.group_id !== null && row.group_id !== undefined
          ? html`<a href=${`?${new URLSearchParams({ step: row.step, group: row.group_id })}`} aria-label=${said.group(row.step, row.group_id)} onClick=${(e) => { e.preventDefault(); go({ step: row.step, group: row.group_id }); }}>${cell(row, n)}</a>`
          : cell(row, n)}</td>`)}
      ${parts.map((p) => html`<td class="number">${figure(row.rewards?.[p])}</td>`)}
      ${["prompt", "answer", "gold"].filter(known).map((n) => html`<td class="text">${cell(row, n)}</td>`)}
    </tr>`)}</tbody></table></div>`;
}

function Episode({ run, stage, step, place, go }) {
  const [episode, setEpisode] = useState(null);
  const [error, setError] = useState(null);
  useEffect(() => {
    setError(null);
    api(path(run, "episode", { stage, step, episode: place })).then(setEpisode, (e) => { setEpisode(null); setError(e.message); });
  }, [run, stage, step, place]);
  const tools = html`<div class="tools">
    <button onClick=${() => go({ episode: undefined })}>${words.episode.close}</button>
    <button disabled=${place <= 0} onClick=${() => go({ episode: place - 1 })}>${words.episode.before}</button>
    <button disabled=${!episode || place >= episode.count - 1} onClick=${() => go({ episode: place + 1 })}>${words.episode.after}</button>
  </div>`;
  if (error) return html`${tools}<p role="alert">${error}</p>`;
  if (!episode || episode.step !== step || episode.episode !== place) return html`${tools}<p>${words.loading}</p>`;
  const { messages, rewards: _, ...record } = episode.record;
  const beside = () => go({ episode: undefined, group: episode.group_id });
  return html`${tools}<h2>${words.episode.title(step, place)}</h2>
    <${Facts} episode=${episode} names=${["length", "finish_reason", "advantage", "version", "group_id", "left_out", "gold"]} />
    <h3>${words.episode.messages}</h3>
    ${episode.group_id !== null && html`<div class="tools"><button onClick=${beside}>${words.group.beside}</button></div>`}
    <${Conversation} messages=${Array.isArray(messages) ? messages : []} />
    <h3>${words.episode.tokens}</h3>
    <${Tokens} key=${`${step}.${place}`} episode=${episode} />
    <details><summary>${words.episode.record}</summary><pre class="text">${JSON.stringify(record, null, 2)}</pre></details>`;
}
