"use strict";
// Light or dark: as the reader's system has it, until the reader chooses. Runs before the page is drawn.

const page = document.documentElement;
const night = matchMedia("(prefers-color-scheme: dark)");
let themeChosen = false;

function setTheme(theme, chosen = true) {
  page.dataset.theme = theme;
  themeChosen = chosen;
}

setTheme(night.matches ? "dark" : "light", false);
night.addEventListener("change", () => {
  if (!themeChosen) setTheme(night.matches ? "dark" : "light", false);
});
