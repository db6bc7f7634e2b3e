// The tokens of an episode, coloured by a figure. Elements are made by hand: thousands of tokens change at once.
import { html, useEffect, useRef, useState } from "./common.js";
import { figure } from "./run_chart.js";
import { words } from "./run_en.js";

const said = words.episode;
const WINDOW = 8192;
const STEPS = 4; // shades of each sign

const minus = (a, b) => a && b && a.map((x, i) => (x === null || b[i] === null ? null : x - b[i]));

/** For each measure the value of every token, null where there is none. */
export function measures(tokens) {
  const found = {
    gap: minus(tokens.logprobs, tokens.trained_logprobs),
    logprobs: tokens.logprobs,
    trained_logprobs: tokens.trained_logprobs,
    advantages: tokens.advantages,
    reference: minus(tokens.trained_logprobs ?? tokens.logprobs, tokens.ref_logprobs),
  };
  return Object.fromEntries(Object.entries(found).filter(([, values]) => values?.some((x) => x !== null)));
}

/** The value at which colours are full: the 98th percentile of the sizes, so that one token does not hide the rest. */
export function scaleOf(values) {
  const sizes = values.filter((x) => x !== null).map(Math.abs).sort((a, b) => a - b);
  return sizes[Math.floor(0.98 * (sizes.length - 1))] || sizes.at(-1) || 0;
}

function shade(value, most) {
  if (value === null || value === undefined || !most) return "";
  const level = Math.min(STEPS, Math.ceil((Math.abs(value) / most) * STEPS));
  return level ? ` ${value < 0 ? "n" : "p"}${level}` : "";
}

const visible = (text) => text.replaceAll(" ", "\u00b7").replaceAll("\t", "\u2192").replaceAll("\n", "\u21b5\n");

function textOf(episode, i, ids, spaces) {
  const piece = ids || !episode.pieces ? String(episode.tokens.ids[i]) : episode.pieces[i];
  return spaces && !ids ? visible(piece) : piece;
}

export function Tokens({ episode }) {
  return episode.tokens.ids.length ? html`<${Window} episode=${episode} />` : html`<p>${said.missing}</p>`;
}

function Window({ episode }) {
  const found = measures(episode.tokens);
  const names = Object.keys(found);
  const [measure, setMeasure] = useState(names[0] ?? "none");
  const [ids, setIds] = useState(false);
  const [spaces, setSpaces] = useState(false);
  const [first, setFirst] = useState(0);
  const [chosen, setChosen] = useState(null);
  const place = useRef(null);
  const count = episode.tokens.ids.length, last = Math.min(count, first + WINDOW);
  const values = found[measure] ?? [], most = scaleOf(values);

  useEffect(() => {
    const elements = [];
    for (let i = first; i < last; i++) {
      const element = document.createElement("span");
      element.textContent = textOf(episode, i, ids, spaces);
      elements.push(element);
    }
    place.current.classList.toggle("separate", ids || !episode.pieces);
    place.current.replaceChildren(...elements);
  }, [episode, first, ids, spaces]);
  useEffect(() => {
    const elements = place.current.children;
    for (let i = first; i < last; i++) {
      const given = episode.tokens.mask[i] ? "" : " given";
      elements[i - first].className = `token${given}${given ? "" : shade(values[i], most)}`;
    }
  }, [episode, first, ids, spaces, measure]);
  useEffect(() => {
    const element = chosen === null ? null : place.current.children[chosen - first];
    element?.classList.add("chosen");
    element?.scrollIntoView({ block: "nearest" });
    return () => element?.classList.remove("chosen");
  }, [chosen, first, ids, spaces, measure]);

  const choose = (i) => {
    if (i < 0 || i >= count) return;
    setFirst(Math.floor(i / WINDOW) * WINDOW);
    setChosen(i);
  };
  const largest = () => {
    let best = -1;
    values.forEach((x, i) => { if (x !== null && x !== undefined && (best < 0 || Math.abs(x) > Math.abs(values[best]))) best = i; });
    choose(best);
  };
  const over = (event) => {
    if (event.target.parentNode === place.current) setChosen(first + [].indexOf.call(place.current.children, event.target));
  };
  const keys = (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move) return;
    choose((chosen ?? first - 1) + move);
    event.preventDefault();
  };
  return html`<div class="tools">
      <label>${said.colour} <select value=${measure} onChange=${(e) => setMeasure(e.target.value)}>
        ${[...names, "none"].map((name) => html`<option value=${name}>${said.measures[name]}</option>`)}</select></label>
      <button onClick=${largest} disabled=${measure === "none"}>${said.largest}</button>
      <label><input type="checkbox" checked=${ids} onChange=${(e) => setIds(e.target.checked)} /> ${said.ids}</label>
      <label><input type="checkbox" checked=${spaces} onChange=${(e) => setSpaces(e.target.checked)} /> ${said.spaces}</label>
    </div>
    ${count > WINDOW && html`<div class="tools">
      <button disabled=${first === 0} onClick=${() => setFirst(first - WINDOW)}>${said.before}</button>
      <span>${said.window(first, last - 1, count)}</span>
      <button disabled=${last === count} onClick=${() => setFirst(first + WINDOW)}>${said.after}</button></div>`}
    <p class="note">${most ? `${said.measures[measure]}, ${said.scale(figure(most))}. ` : ""}${said.hint}</p>
    <div class="tokenview">
      <div class="tokens" ref=${place} tabindex="0" role="group" aria-label=${said.tokens} onMouseOver=${over} onKeyDown=${keys}></div>
      <${Figures} episode=${episode} found=${found} i=${chosen} />
    </div>`;
}

function Figures({ episode, found, i }) {
  if (i === null) return html`<dl class="figures"></dl>`;
  const { ids, mask, versions } = episode.tokens;
  const rows = [
    [said.token, JSON.stringify(episode.pieces?.[i] ?? "")],
    [said.id, ids[i]],
    [said.place, `${i}, ${mask[i] ? said.written : said.given}`],
    ...["logprobs", "trained_logprobs", "ref_logprobs"].filter((n) => episode.tokens[n])
      .map((n) => [said.measures[n] ?? "log-prob (reference)", figure(episode.tokens[n][i])]),
    ...["gap", "reference", "advantages"].filter((n) => found[n]).map((n) => [said.measures[n], figure(found[n][i])]),
    ...(versions ? [[words.rollouts.columns.version, versions[i] ?? ""]] : []),
  ];
  return html`<dl class="figures" aria-live="polite">${rows.map(([name, value]) => html`<div><dt>${name}</dt><dd>${value === "" ? said.no : value}</dd></div>`)}</dl>`;
}
