// The completions of one prompt side by side; where a labelling is served, two of them can be compared.
import { api, html, useEffect, useState } from "./common.js";
import { Judge } from "./judge.js";
import { figure } from "./run_chart.js";
import { words } from "./run_en.js";

const said = words.group;
const alike = (a, b) => JSON.stringify(a) === JSON.stringify(b);
const listOf = (episode) => (Array.isArray(episode.messages) ? episode.messages : []);

/** The messages with which all of these episodes begin; the last one of each is its own. */
function shared(episodes) {
  const lists = episodes.map((episode) => listOf(episode).slice(0, -1));
  const end = lists[0].findIndex((message, i) => lists.some((list) => !alike(list[i], message)));
  return end < 0 ? lists[0] : lists[0].slice(0, end);
}

export function Conversation({ messages }) {
  return messages.map((m) => html`<article class="message"><h4>${String(m?.role ?? "")}</h4>
    ${m?.reasoning_content && html`<pre class="text note">${String(m.reasoning_content)}</pre>`}
    <pre class="text">${typeof m?.content === "string" ? m.content : JSON.stringify(m?.content ?? null)}</pre>
    ${m?.tool_calls && html`<pre class="text">${JSON.stringify(m.tool_calls, null, 2)}</pre>`}</article>`);
}

/** The figures of an episode in words: those of `names` that it has, and the parts of its reward. */
export function Facts({ episode, names }) {
  const facts = [
    ["reward", figure(episode.reward)],
    ...Object.entries(episode.rewards ?? {}).map(([name, x]) => [name.slice(0, 60), figure(x)]),
    ...names.map((n) => [words.rollouts.columns[n], typeof episode[n] === "number" ? figure(episode[n]) : episode[n]]),
  ].filter(([, value]) => value !== null && value !== undefined && value !== "");
  return html`<dl class="facts">${facts.map(([name, value]) => html`<div><dt>${name}</dt><dd>${String(value)}</dd></div>`)}</dl>`;
}

export function Group({ run, stage, step, group, go, labels }) {
  const [state, setState] = useState({});
  const [sides, setSides] = useState([0, 1]);
  useEffect(() => {
    setState({});
    setSides([0, 1]);
    const query = new URLSearchParams({ stage, step, group });
    api(`/api/runs/${encodeURIComponent(run)}/group?${query}`)
      .then((value) => setState({ value }), (error) => setState({ error: error.message }));
  }, [run, stage, step, group]);
  const back = html`<div class="tools"><button onClick=${() => go({ group: undefined })}>${words.episode.close}</button></div>`;
  if (state.error) return html`${back}<p role="alert">${state.error}</p>`;
  if (!state.value) return html`${back}<p>${words.loading}</p>`;
  const { episodes } = state.value, first = shared(episodes);
  return html`${back}<h2>${words.rollouts.group(step, group)}</h2>
    <p class="note">${said.count(episodes.length)}</p>
    <h3>${said.prompt}</h3><${Conversation} messages=${first} />
    ${labels && episodes.length > 1 && html`<${Compare} run=${run} step=${step} pair=${sides.map((i) => episodes[i])} />`}
    <div class="beside group">${episodes.map((episode, i) => html`<section key=${episode.episode}>
      <h3><a href=${`?step=${step}&episode=${episode.episode}`} onClick=${(e) => { e.preventDefault(); go({ group: undefined, episode: episode.episode }); }}>${words.episode.title(step, episode.episode)}</a></h3>
      ${labels && episodes.length > 1 && html`<div class="tools">${said.sides.map((side, at) => html`<label><input type="radio" name=${`side-${at}`} checked=${sides[at] === i}
        onChange=${() => setSides(sides.map((old, other) => (other === at ? i : old)))} /> ${side}</label>`)}</div>`}
      <${Facts} episode=${episode} names=${["advantage", "length", "finish_reason", "left_out"]} />
      <${Conversation} messages=${listOf(episode).slice(first.length)} /></section>`)}</div>`;
}

function Compare({ run, step, pair }) {
  const [prompts, answers] = [pair.map((e) => listOf(e).slice(0, -1)), pair.map((e) => listOf(e).at(-1))];
  const texts = answers.map((m) => (m?.role === "assistant" && !m.tool_calls && typeof m.content === "string" ? m.content : ""));
  const good = alike(...prompts) && prompts[0].length && texts[0] !== texts[1] && texts.every((text) => text.trim());
  const sources = pair.map((e) => ({ model: run, step, episode: e.episode, version: e.version ?? null }));
  return html`<p class="note">${good ? said.label : said.nothing}</p>
    <${Judge} pair=${good ? { prompt: prompts[0], answers: texts, sources } : null} of=${pair.map((e) => e.episode).join()} />`;
}
