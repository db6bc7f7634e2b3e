// A conversation is a tree of messages: an edit or another answer is a branch beside the first one.
// All functions give a new value and leave the old one as it is.

let last = 0;

export const newId = () => `${Date.now().toString(36)}-${(last += 1).toString(36)}-${Math.random()
  .toString(36)
  .slice(2, 8)}`;

export const newConversation = (system, panes) => ({
  id: newId(),
  system,
  panes,
  nodes: {},
  changed: Date.now(),
});

// A pane shows the path to its leaf; `settings` are texts by field.
export const newPane = (model, settings = {}) => ({ id: newId(), model, settings, leaf: null });

// The conversation as a browser kept it: an answer that was on its way then comes no more.
export function opened(conversation) {
  const nodes = Object.entries(conversation.nodes).map(([id, node]) =>
    [id, ["waits", "writes"].includes(node.state) ? { ...node, state: "stopped" } : node]);
  return { ...conversation, nodes: Object.fromEntries(nodes) };
}

// Which messages a pane may show: all while it is alone; beside another pane, its own and those from
// before or of both.
export const mayShow = ({ panes }, pane) => (node) =>
  panes.length === 1 || !node.pane || node.pane === pane.id;

// The messages from the first one to this one.
export function pathTo(nodes, leaf) {
  const path = [];
  for (let id = leaf; id; id = nodes[id].parent) path.unshift(nodes[id]);
  return path;
}

export function addNode(conversation, parent, node) {
  const made = { id: newId(), parent, ...node };
  const nodes = { ...conversation.nodes, [made.id]: made };
  return [{ ...conversation, nodes, changed: Date.now() }, made.id];
}

export function changeNode(conversation, id, change) {
  const nodes = { ...conversation.nodes, [id]: { ...conversation.nodes[id], ...change } };
  return { ...conversation, nodes };
}

// The branches at this message: itself and those beside it, in the order in which they came.
// `may` says which messages the pane may show.
export const branches = (nodes, id, may) =>
  Object.values(nodes).filter(
    (node) => node.parent === nodes[id].parent && node.role === nodes[id].role && (node.id === id || may(node)),
  );

// The newest message below this one.
export function newestBelow(nodes, id, may) {
  const child = Object.values(nodes).findLast((node) => node.parent === id && may(node));
  return child ? newestBelow(nodes, child.id, may) : id;
}

export function changePane(conversation, at, change) {
  const panes = conversation.panes.map((pane, i) => (i === at ? { ...pane, ...change } : pane));
  return { ...conversation, panes, changed: Date.now() };
}

export const titleOf = (conversation) => {
  const first = Object.values(conversation.nodes).find((node) => node.role === "user");
  return first ? first.content.slice(0, 60) : "…";
};
