// Sets the colours before the page is drawn, so that it does not flash in the other ones.
// `common.js` has the switch.
try {
  const chosen = localStorage.getItem("theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  // A browser that keeps nothing: the system's colours.
}
