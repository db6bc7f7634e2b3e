// The owner's view: progress, agreement, disagreements to decide, exports.

import { api, h, useEffect, useState } from "./common.js";
import { label as words } from "./label_en.js";
import { newId } from "./label_outbox.js";

const own = words.ownerView;
const number = (value) => (value == null ? "-" : value.toFixed(3));
const share = (value) => (value == null ? "-" : `${(100 * value).toFixed(1)}%`);
const interval = (f) => (f?.low == null ? "" : ` [${number(f.low)}, ${number(f.high)}]`);
const headers = () => (sessionStorage.owner ? { "X-Gearshift-Owner": sessionStorage.owner } : {});

export function Owner({ close }) {
  const [view, setView] = useState(null);
  const [fault, setFault] = useState(null);
  const load = () =>
    api("/api/labels/owner", { headers: headers() })
      .then((found) => [setView(found), setFault(null)])
      .catch(setFault);
  useEffect(() => {
    load();
  }, []);
  const back = h("button", { id: "back", onClick: close }, words.back);
  if (fault?.status === 403) return [h(AskKey, { fault, load }), back];
  if (fault) return [h("p", { role: "alert" }, fault.message), back];
  if (!view) return h("p", { role: "status" }, words.loading);
  return [
    h("div", { class: "row" }, h("h1", {}, words.owner), h("span", { class: "grow" }),
      h("button", { onClick: load }, own.refresh), back),
    figures(view),
    table(own.people, own.peopleColumns, view.people.map(person)),
    table(own.kappa, own.kappaColumns, view.kappa.map((k) =>
      [k.people.join(", "), k.items, share(k.percent), number(k.kappa)])),
    table(own.ratings, ["", own.twice, own.alpha], Object.entries(view.ratings).map(([name, a]) =>
      [name, a.items, number(a.value) + interval(a)])),
    h("p", {}, own.sampling(view.sampling)),
    h("h2", {}, own.disagreements),
    view.disagreements.length ? null : h("p", {}, own.none),
    view.disagreements.map((d) => h(Dispute, { key: d.item, d, load })),
    exporter(),
  ];
}

function AskKey({ fault, load }) {
  const submitted = (event) => {
    event.preventDefault();
    sessionStorage.owner = new FormData(event.target).get("key");
    load();
  };
  return h("form", { class: "row", onSubmit: submitted },
    h("h1", {}, words.owner), h("p", { role: "alert" }, fault.message),
    h("label", {}, words.ownerKey, " ", h("input", { name: "key", type: "password" })),
    h("button", { class: "primary" }, words.open));
}

function table(caption, columns, rows) {
  if (!rows.length) return null;
  return h("section", { class: "scroll", tabindex: 0, role: "group", "aria-label": caption },
    h("h2", {}, caption),
    h("table", {},
      h("thead", {}, h("tr", {}, columns.map((name) => h("th", { scope: "col" }, name)))),
      h("tbody", {}, rows.map((row) =>
        h("tr", {}, row.map((cell) => h("td", {}, String(cell ?? "-"))))))));
}

function figures(view) {
  const columns = [own.items, own.labelled, own.twice, own.percent, own.alpha, own.leftShare];
  const left = view.left ? share(view.left.share) + interval(view.left) : "-";
  const alpha = number(view.alpha.value) + interval(view.alpha);
  return table(words.title, columns, [
    [view.items, view.labelled, view.twice, share(view.percent), alpha, left],
  ]);
}

const person = (p) => [
  p.who, p.labelled, p.skipped, p.taken_back, p.edits, p.seconds, share(p.left?.share),
  p.known ? own.knownOf(p.known.right, p.known.of) : "-",
];

function Dispute({ d, load }) {
  const pair = d.answers.length === 2;
  const names = pair ? words.answer : [words.single];
  const vote = (choice) => (typeof choice === "number" ? names[choice] : words[choice]);
  const decide = async (choice) => {
    const event = { id: newId("final"), who: "owner", item: d.item, choice, seconds: 0 };
    const body = { ...event, kind: pair ? "pair" : "thumb" };
    await api("/api/labels/final", { body, headers: headers() }).catch(() => {});
    load();
  };
  const said = (value) => (typeof value === "string" ? value : JSON.stringify(value, null, 1));
  const text = (value, name) => h("div",
    { class: "words long", dir: "auto", tabindex: 0, role: "group", "aria-label": name }, value);
  const reason = (who) => (d.reasons[who]?.text ? ` (${d.reasons[who].text})` : "");
  return h("article", { class: "panel dispute" },
    d.prompt.map((m) => [h("h3", {}, words.roles[m.role] || m.role), text(m.content || "", m.role)]),
    h("div", { class: pair ? "answers" : "answers single" }, d.answers.map((answer, i) =>
      h("div", {}, h("h3", {}, names[i], " ", h("span", { class: "quiet" }, d.sources[i]?.model)),
        text(said(answer), names[i])))),
    h("ul", {}, Object.entries(d.votes).map(([who, choice]) =>
      h("li", {}, `${who}: ${vote(choice)}${reason(who)}`))),
    h("div", { class: "row" }, own.decide,
      (pair ? ["left", "right", "tie", "bad"] : ["up", "down"]).map((choice) =>
        h("button", { class: `decide-${choice}`, onClick: () => decide(choice) }, words[choice]))));
}

async function download(event) {
  event.preventDefault();
  const given = new FormData(event.target);
  const asked = new URLSearchParams({
    format: given.get("format"), min_agree: given.get("least") || "0", by: given.get("by"),
    ties: given.get("ties") ? "1" : "0",
  });
  const answer = await api(`/api/labels/export?${asked}`, { raw: true, headers: headers() });
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await answer.blob());
  link.download = `${given.get("format")}.jsonl`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function exporter() {
  const formats = ["preference", "judged", "messages"];
  return h("form", { class: "panel row", onSubmit: download },
    h("h2", {}, own.export),
    h("label", {}, own.format, " ",
      h("select", { name: "format" }, formats.map((name) => h("option", { value: name }, name)))),
    h("label", {}, own.least, " ",
      h("input", { name: "least", type: "number", min: 0, max: 1, step: "any", value: "0" })),
    h("label", {}, own.by, " ", h("input", { name: "by" })),
    h("label", {}, h("input", { name: "ties", type: "checkbox", value: "1" }), " ", own.ties),
    h("button", { class: "primary", id: "download" }, own.download));
}
