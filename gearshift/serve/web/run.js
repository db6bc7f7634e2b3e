// The run page: which run, stage and tab are shown is in the address, so that it can be sent.
import { api, html, render, Shell, useEffect, useRef, useState } from "./common.js";
import { Curves } from "./run_curves.js";
import { Rollouts } from "./run_rollouts.js";
import { Heldout, Recipes, Timeline } from "./run_tables.js";
import { words } from "./run_en.js";

function readAddress() {
  const name = location.pathname.match(/^\/runs\/([^/]+)/);
  const query = Object.fromEntries(new URLSearchParams(location.search));
  return { run: name && decodeURIComponent(name[1]), ...query };
}

function Page({ served }) {
  const [place, setPlace] = useState(readAddress());
  const [state, setState] = useState({});
  const [overlaid, setOverlaid] = useState(null);
  const all = useRef(!place.run); // an address without a run shows all of them
  useEffect(() => {
    api("/api/runs").then((value) => setState({ value }), (error) => setState({ error: error.message }));
    const back = () => setPlace(readAddress());
    addEventListener("popstate", back);
    return () => removeEventListener("popstate", back);
  }, []);
  const go = (change) => {
    const { run, ...query } = Object.fromEntries(Object.entries({ ...place, run: shown?.name, ...change }).filter(([, v]) => v !== undefined && v !== null));
    history.pushState(null, "", `/runs/${encodeURIComponent(run)}?${new URLSearchParams(query)}`);
    setPlace({ run, ...query });
  };
  const runs = state.value?.runs ?? [];
  const shown = runs.find((run) => run.name === place.run) ?? runs[0];
  const stage = shown?.stages.find((s) => s.name === place.stage) ?? shown?.stages.at(-1);
  const tab = place.tab ?? (place.episode !== undefined || place.step !== undefined ? "rollouts" : "curves");
  const frame = (title, inner) => html`<${Shell} title=${title} page="runs" served=${served}>${inner}<//>`;
  if (state.error) return frame(words.title, html`<p role="alert">${state.error}</p>`);
  if (!state.value) return frame(words.title, html`<p>${words.loading}</p>`);
  if (!stage) return frame(words.title, html`<p>${words.none}</p>`);
  const chosen = overlaid ?? (!all.current ? [shown.name] : runs.filter((run) => run.stages.some((s) => s.name === stage.name)).map((run) => run.name));
  const drawn = tab === "curves" || tab === "recipes" ? [shown.name, ...chosen.filter((name) => name !== shown.name)] : [shown.name];
  const tabs = ["curves", ...(stage.rollouts ? ["rollouts"] : []), "timeline", "heldout", ...(runs.length > 1 ? ["recipes"] : [])];
  return frame(shown.name, html`<div class="runpage"><h1>${shown.name}</h1>
    <div class="tools">
      <label>${words.run} <select value=${shown.name} onChange=${(e) => go({ run: e.target.value, step: undefined, episode: undefined, group: undefined })}>${runs.map((run) => html`<option value=${run.name}>${run.name}</option>`)}</select></label>
      <label>${words.stage} <select value=${stage.name} onChange=${(e) => go({ stage: e.target.value, step: undefined, episode: undefined, group: undefined })}>${shown.stages.map((s) => html`<option value=${s.name}>${s.name}</option>`)}</select></label>
      ${runs.length > 1 && html`<fieldset><legend>${words.compare}</legend>${runs.filter((run) => run.name !== shown.name).map((run) => html`<label><input type="checkbox" checked=${chosen.includes(run.name)} onChange=${(e) => setOverlaid(e.target.checked ? [...chosen, run.name] : chosen.filter((n) => n !== run.name))} /> ${run.name}</label>`)}</fieldset>`}
    </div>
    <nav class="tabs" aria-label=${words.title}>${tabs.map((name) => html`<button aria-current=${name === tab ? "page" : undefined} onClick=${() => go({ tab: name, episode: undefined, group: undefined })}>${words.tabs[name]}</button>`)}</nav>
    ${tab === "curves" && html`<${Curves} runs=${drawn} stage=${stage.name} pinned=${state.value.curves} />`}
    ${tab === "rollouts" && html`<${Rollouts} key=${`${shown.name}/${stage.name}`} run=${shown.name} stage=${stage.name} query=${place} go=${go} labels=${served.labels} />`}
    ${tab === "timeline" && html`<${Timeline} run=${shown.name} stage=${stage.name} go=${go} />`}
    ${tab === "heldout" && html`<${Heldout} run=${shown.name} />`}
    ${tab === "recipes" && html`<${Recipes} runs=${drawn} />`}
  </div>`);
}

render(Page);
