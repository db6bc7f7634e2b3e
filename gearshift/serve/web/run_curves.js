// The curves of one or several runs: the first ones pinned, all others by group; live while a run writes.
import { api, html, sse, useEffect, useRef, useState } from "./common.js";
import { COLOURS, Chart, signOf, zoom } from "./run_chart.js";
import { words } from "./run_en.js";

const said = words.curves;

function under(patterns, name) {
  return patterns.some((p) => {
    const [head, tail] = p.split("*");
    return tail === undefined ? p === name : name.startsWith(head) && name.endsWith(tail);
  });
}

/** The metrics of these runs, which grow while the runs write. */
export function useMetrics(runs, stage, keys) {
  const [found, setFound] = useState({});
  const [live, setLive] = useState(true);
  const wanted = runs.join("\n"), shown = useRef("");
  useEffect(() => {
    let ended = false;
    const ends = [];
    const load = async (run) => {
      const query = new URLSearchParams({ stage });
      for (const key of keys) query.append("keys", key);
      const metrics = await api(`/api/runs/${encodeURIComponent(run)}/metrics?${query}`).catch((error) => ({ error: error.message }));
      if (ended) return;
      setFound((all) => ({ ...all, [run]: metrics }));
      if (!metrics.error) follow(run, metrics);
    };
    const follow = (run, metrics) => {
      let last = metrics.columns.step?.at(-1) ?? -1, waiting = [], timer = null;
      const again = () => { end(); clearTimeout(timer); load(run); };
      const path = `/api/runs/${encodeURIComponent(run)}/live?stage=${encodeURIComponent(stage)}&from=${metrics.offset}`;
      const end = sse(path, ({ reset, record }) => {
        setLive(true);
        if (!reset && !record) return;
        if (reset || record.step <= last) return again();
        last = record.step ?? last;
        waiting.push(record);
        timer ??= setTimeout(() => {
          const records = waiting;
          [waiting, timer] = [[], null];
          if (!ended) setFound((all) => ({ ...all, [run]: appended(all[run], records, keys) }));
        }, 100);
      }, () => setLive(false));
      ends.push(end);
    };
    if (shown.current !== `${stage}/${wanted}`) setFound({}); // more keys leave the curves in sight
    shown.current = `${stage}/${wanted}`;
    runs.forEach(load);
    return () => { ended = true; ends.forEach((end) => end()); };
  }, [wanted, stage, keys.join("\n")]);
  return [found, live];
}

function appended(metrics, records, keys) {
  const columns = { ...metrics.columns };
  for (const record of records) {
    const count = columns.step?.length ?? 0;
    for (const [name, value] of Object.entries(record)) {
      const known = name in columns || name === "step" || keys.length === 0 || under(keys, name);
      if (known && typeof value === "number" && !(name in columns)) columns[name] = Array(count).fill(null);
    }
    for (const name of Object.keys(columns)) columns[name] = [...columns[name], typeof record[name] === "number" ? record[name] : null];
  }
  return { ...metrics, columns, names: [...new Set([...metrics.names, ...Object.keys(columns)])] };
}

function linesOf(found, runs, patterns) {
  const lines = [];
  runs.forEach((run, nth) => {
    const columns = found[run]?.columns ?? {};
    Object.keys(columns).filter((name) => name !== "step" && under(patterns, name)).forEach((name, i) => {
      const many = runs.length > 1;
      lines.push({
        name: many ? `${run}: ${name}` : name, steps: columns.step ?? columns[name].map((_, n) => n), values: columns[name],
        colour: COLOURS[(many ? nth : i) % COLOURS.length], dash: many ? i : 0,
      });
    });
  });
  return lines;
}

export function Curves({ runs, stage, pinned }) {
  const [smoothing, setSmoothing] = useState(0);
  const [log, setLog] = useState(false);
  const [open, setOpen] = useState([]);
  const patterns = pinned.flatMap(([, under]) => under);
  const [found, live] = useMetrics(runs, stage, [...patterns, ...open]);
  const names = [...new Set(runs.flatMap((run) => found[run]?.names ?? []))].filter((n) => n !== "step" && !under(patterns, n));
  const groups = Object.groupBy ? Object.groupBy(names, (n) => n.split("/")[0]) : {};
  const marks = found[runs[0]]?.marks ?? {};
  const chart = (title, under) => {
    const lines = linesOf(found, runs, under);
    return lines.length ? html`<${Chart} key=${title} title=${title} lines=${lines} marks=${marks} log=${log} smoothing=${smoothing} />` : null;
  };
  return html`<div class="tools">
      <label>${said.smoothing} <input type="range" min="0" max="0.98" step="0.02" value=${smoothing} onInput=${(e) => setSmoothing(Number(e.target.value))} /></label>
      <label><input type="checkbox" checked=${log} onChange=${(e) => setLog(e.target.checked)} /> ${said.log}</label>
      <button onClick=${() => zoom(null)}>${said.reset}</button>
      <span class="note" role="status">${live ? words.live : words.waiting}</span>
    </div>
    <p class="note">${said.hint}</p>
    ${Object.keys(marks).length > 0 && html`<ul class="marks note">${Object.entries(marks).map(([name, steps], i) =>
      html`<li key=${name}><span aria-hidden="true">${signOf(i)}</span> ${said.mark(name, steps.length)}</li>`)}</ul>`}
    ${runs.filter((run) => found[run]?.error).map((run) => html`<p role="alert">${run}: ${found[run].error}</p>`)}
    <div class="charts">${pinned.map(([title, under]) => chart(title, under))}</div>
    <h2>${said.more}</h2>
    ${Object.entries(groups).map(([group, own]) => html`<details key=${group} onToggle=${(e) => e.target.open && setOpen((all) => [...new Set([...all, ...own])])}>
      <summary>${group} (${own.length})</summary>
      <div class="charts">${own.map((name) => chart(name, [name]))}</div></details>`)}`;
}
