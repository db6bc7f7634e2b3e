// The panel of customer service: the orders that the conversation is about, and the tool's answer.

import { html } from "/web/common.js";

const words = {
  title: "The shop",
  intro: "You are the customer. Begin with one of these, or with your own words:",
  orders: "Orders in this conversation",
  number: "Order",
  what: "What it is",
  address: "Goes to",
  state: "State",
  answer: "The tool answers:",
  send: "Send the tool's answer to the model",
};

export function Panel({ state, busy, send }) {
  return html`<h2>${words.title}</h2>
    ${!state.orders.length &&
    html`<p>${words.intro}</p>
      <ul>
        ${state.customers.map(
          ({ order, problem }) => html`<li key=${order}>
            <button type="button" disabled=${busy} onClick=${() => send(problem)}>${problem}</button>
            <span class="quiet"> ${words.number} ${order}</span>
          </li>`,
        )}
      </ul>`}
    ${state.orders.length > 0 &&
    html`<table>
      <caption>${words.orders}</caption>
      <thead>
        <tr>
          ${["number", "what", "address", "state"].map((name) => html`<th scope="col">${words[name]}</th>`)}
        </tr>
      </thead>
      <tbody>
        ${state.orders.map(
          (order) => html`<tr key=${order.number}>
            <th scope="row">${order.number}</th>
            <td>${order.text}</td>
            <td>${order.address}</td>
            <td>${order.state}</td>
          </tr>`,
        )}
      </tbody>
    </table>`}
    ${state.answer !== null &&
    html`<p role="status">${words.answer} ${state.answer}</p>
      <button type="button" disabled=${busy} onClick=${() => send(state.answer, "tool")}>${words.send}</button>`}`;
}
