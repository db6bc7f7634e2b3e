// All words of the pages in English; another language is another file with these names.
// Each page has a section of its own, in a file of its own.

export const common = {
  name: "Gearshift",
  chat: "Chat",
  labels: "Labels",
  runs: "Runs",
  skip: "Skip to the content",
  theme: "Colours",
  themes: { system: "as the system", light: "light", dark: "dark" },
  askKey: "This server needs a key.",
  key: "Key",
  enter: "Enter",
  wrongKey: "The key is wrong.",
  offline: "The server does not answer.",
  copy: "Copy",
  copied: "Copied",
};

// Which of two answers is better, on the chat page and on the run page.
export const judge = {
  better: (side) => `${side} is better`,
  tie: "As good as each other",
  labelled: "Label saved",
  who: "Your name",
};
