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
export const newPane = (model, settings = {}) => ({ model, settings, leaf: null });

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
export const branches = (nodes, id) =>
  Object.values(nodes).filter(
    (node) => node.parent === nodes[id].parent && node.role === nodes[id].role,
  );

// The newest message below this one.
export function newestBelow(nodes, id) {
  const children = Object.values(nodes).filter((node) => node.parent === id);
  return children.length ? newestBelow(nodes, children[children.length - 1].id) : id;
}

export function changePane(conversation, at, change) {
  const panes = conversation.panes.map((pane, i) => (i === at ? { ...pane, ...change } : pane));
  return { ...conversation, panes, changed: Date.now() };
}

export const titleOf = (conversation) => {
  const first = Object.values(conversation.nodes).find((node) => node.role === "user");
  return first ? first.content.slice(0, 60) : "…";
};
