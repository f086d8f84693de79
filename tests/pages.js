// What tests/test_pages.py asks of a page; each function returns what is wrong.
const article = document.querySelector("article");
const shown = (element) => element.checkVisibility({ visibilityProperty: true });
const named = (element) =>
  `${element.tagName.toLowerCase()} ${(element.id || element.innerText || element.outerHTML).trim().slice(0, 80)}`;
const all = (selector, within = article) => [...within.querySelectorAll(selector)];
const runsOver = (box) =>
  box.scrollWidth > box.clientWidth + 2 && /hidden|auto|scroll/.test(getComputedStyle(box).overflowX);
const within = (element) => (element === article ? [] : [element, ...within(element.parentElement)]);
const CLICKABLE = "a[href], button, summary, article select, article input";

// Before anybody has touched the page.
function firstScreen() {
  const [first] = all("p").filter((p) => shown(p) && !p.closest(".admonition"));
  const code = all("pre").filter((pre) => shown(pre) && pre.getBoundingClientRect().top < innerHeight);
  const found = code.map((pre) => `code on the first screen: ${named(pre)}`);
  if (!first || first.getBoundingClientRect().bottom > innerHeight) found.push("no sentence is whole on the first screen");
  return found;
}

// With all open that is folded; tables, code and formulas may scroll on a phone (`wide` false), drawings that have a form for one nowhere.
async function layout([wide, smallest]) {
  const width = document.documentElement.scrollWidth;
  const found = width > innerWidth + 1 ? [`the page is ${width} pixels wide`] : [];
  const say = (fault, elements) => found.push(...elements.map((element) => `${fault}: ${named(element)}`));
  for (const folded of all("details")) folded.open = true;
  say("cut", all(wide ? "pre, table, div.math, .drawing" : ".drawing:has(.narrow)").filter((e) => within(e).some(runsOver)));
  await new Promise((frame) => requestAnimationFrame(() => requestAnimationFrame(frame)));  // then the fade is there
  const fade = (box) => parseFloat(getComputedStyle(box).getPropertyValue("--fade"));
  const cut = new Set(all("table").map((table) => within(table).find(runsOver)).filter(Boolean));
  if (!wide) say("goes on to the right without a sign", [...cut].filter((box) => !fade(box)));
  const letters = all(".drawing:has(.narrow) svg text, .drawing svg.wide text").filter((text) => shown(text) && text.textContent.trim());
  const scale = ({ a, b }) => Math.hypot(a, b);
  const size = (text) => parseFloat(getComputedStyle(text).fontSize) * scale(text.getScreenCTM());
  say("small letters in a drawing", letters.filter((text) => size(text) < smallest).slice(0, 1));
  say("not loaded", all("img").filter((img) => shown(img) && img.complete && !img.naturalWidth));
  const pictures = all("img, svg:not([aria-hidden=true])").filter((e) => shown(e) && !e.closest(CLICKABLE));
  say("no alternative text", pictures.filter((e) => !(e.alt || e.getAttribute("aria-label") || "").trim()));
  const focused = (element) => (element.focus({ preventScroll: true }), document.activeElement === element);
  say("cannot be focused", all(CLICKABLE, document).filter((element) => shown(element) && !focused(element)));
  return found;
}

const links = () => [all("a[href]", document).map((a) => a.href), all("[id], a[name]", document).map((e) => e.id || e.name)];

// Drawings have one text, and the rows of a table are alike; the theme decides on nothing but the contrast.
async function barriers(theme) {
  const part = { include: "article", exclude: ["article svg", "article tbody tr:nth-child(n+3)"] };
  const only = theme === "dark" ? { runOnly: ["color-contrast"] } : {};
  const { violations } = await axe.run(part, { preload: false, ...only });
  const grave = violations.filter(({ impact, id }) => /serious|critical/.test(impact) || id === "heading-order");
  return grave.map(({ help, nodes }) => `${help}: ${nodes.slice(0, 3).map((node) => node.html.slice(0, 120)).join("; ")}`);
}

// What the tabulator should come to; it marks what it comes to as reached.
const wanted = () =>
  all(CLICKABLE, document).filter((e) => shown(e) && e.getBoundingClientRect().width).map((e) => (e.dataset.wanted = "yes")).length;
const unreached = () => all("[data-wanted]:not([data-reached])", document).map(named);
