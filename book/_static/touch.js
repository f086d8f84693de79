// Figures that a reader can touch. Python writes `<div class="touch" data-kind="…">` with a sentence for readers without
// scripts and a table as JSON (figures.touch); this puts native controls, marks and words in the place of the sentence.
(() => {
  "use strict";

  const make = (tag, attributes = {}, ...children) => {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (value !== undefined) node.setAttribute(name, value);
    }
    node.append(...children);
    return node;
  };
  const distinct = (rows, column) => [...new Set(rows.map((row) => row[column]))];
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
  const minus = (text) => String(text).replace(/-(?=[.\d])/g, "−");
  const percent = (share) => `${(100 * share).toFixed(share && share < 0.1 ? 1 : 0)} %`;
  const count = (number, word, words = `${word}s`) => `${number} ${number === 1 ? word : words}`;

  // Controls: each has a node for the page and a value.
  const choice = (name, values, changed) => {
    const select = make("select", { onchange: changed }, ...values.map((value) => make("option", { value }, value)));
    return { node: make("label", {}, name, select), get value() { return select.value; } };
  };
  const slider = (name, values, start, changed) => {
    const input = make("input", { type: "range", min: 0, max: values.length - 1, step: 1, value: values.indexOf(start) });
    const told = make("span", { "aria-hidden": "true" });
    const say = () => {
      told.textContent = minus(values[input.value]);
      input.setAttribute("aria-valuetext", told.textContent);
    };
    input.addEventListener("input", () => (say(), changed()));
    say();
    return { node: make("div", {}, make("label", {}, name, input), " ", told), get value() { return values[input.value]; } };
  };
  const controls = (...parts) => make("div", { class: "touch-controls" }, ...parts.map((part) => part.node));

  // Marks stand in a box at percent of its width and height, so that they fit any screen.
  const at = (kind, x, y, title) => make("span", { class: kind, style: `left:${x}%;bottom:${y}%`, title });
  const ticks = (places) => make("div", { class: "touch-ticks", "aria-hidden": "true" },
    ...places.map(([x, text]) => make("span", { style: `left:${x}%` }, minus(text))));
  const picture = (kind, label, marks) => make("div", { class: `touch-box ${kind}`, role: "img", "aria-label": label }, ...marks);
  const note = (text) => make("p", { class: "touch-note" }, text);

  const table = (headings, rows) => make("table", {},
    make("thead", {}, make("tr", {}, ...headings)),
    make("tbody", {}, ...rows.map(({ cells, chosen }) => make("tr", chosen ? { class: "chosen", "aria-current": "true" } : {},
      ...cells.map((cell) => make("td", {}, cell))))));

  // A bar a frame; those of another person are hatched and have a cross.
  const bars = (frames, column, top, label, digits) => {
    const told = (frame) => `${minus(frame[column].toFixed(digits))}${frame.wrong ? " (another person)" : ""}`;
    const marks = frames.map((frame) => make("span",
      { class: frame.wrong ? "wrong" : "right", title: `frame ${frame.frame + 1}: ${told(frame)}` },
      make("i", { style: `height:${100 * Math.max(0, frame[column]) / top}%` })));
    return picture("bars", `${label}, frame by frame: ${frames.map(told).join(", ")}`, marks);
  };

  // Rows: kind, arm, frame, quality, wrong, weight, rank, cosine, identities.
  const clips = (rows) => {
    const [shown, said] = [make("div"), make("output")];
    const show = () => {
      const clip = rows.filter((row) => row.kind === kind.value);
      const frames = clip.filter((row) => row.arm === arm.value);
      const wrong = frames.filter((frame) => frame.wrong);
      const onWrong = (arms) => arms.reduce((sum, frame) => sum + frame.wrong * frame.weight, 0);
      const [{ rank, cosine, identities }] = frames;
      const others = wrong.length
        ? `${count(wrong.length, "frame")} of ${frames.length} ${wrong.length === 1 ? "shows" : "show"} another person and`
          + ` ${wrong.length === 1 ? "gets" : "get"} ${percent(onWrong(frames))} of the weight.`
        : `All ${frames.length} frames show the right person.`;
      said.textContent = minus(`${others} By ${arm.value}, the right person comes at rank ${rank} of ${identities}, `
        + `with a cosine of ${cosine.toFixed(3)}.`);
      const known = frames.every((frame) => frame.quality !== null);
      const [best, most] = ["quality", "weight"].map((column) => Math.max(1e-9, ...clip.map((frame) => frame[column])));
      shown.replaceChildren(
        ...(known ? [note(`Quality score of each frame, the highest ${best.toFixed(0)}`), bars(frames, "quality", best, "quality score", 0)] : []),
        note(`Share of the weight, at most ${percent(most)} by any arm; hatched, with a cross: frames of another person`),
        bars(frames, "weight", most, "share of the weight", 3),
        table(["weights", "on wrong frames", "rank", "cosine"].map((name) => make("th", { scope: "col" }, name)),
          distinct(clip, "arm").map((name) => {
            const own = clip.filter((row) => row.arm === name);
            const cells = [name, percent(onWrong(own)), own[0].rank, minus(own[0].cosine.toFixed(3))];
            return { cells: cells.map(String), chosen: name === arm.value };
          })));
    };
    const kind = choice("Clip: ", distinct(rows, "kind"), show);
    const arm = choice("Weights: ", distinct(rows, "arm"), show);
    show();
    return [controls(kind, arm), said, shown];
  };

  // Rows: three axes, aggregator, difference, low, high, calibrated, gain, interval, verdict.
  const grid = (rows, columns) => {
    const axes = columns.slice(0, 3);
    const [shown, said] = [make("div"), make("output")];
    const known = rows.flatMap((row) => [row.difference, row.low, row.high]).filter((value) => value !== null);
    const [least, most] = [Math.min(0, ...known), Math.max(0, ...known)];
    const place = (value) => 6 + 88 * (value - least) / (most - least || 1);
    const show = () => {
      const arms = rows.filter((row) => row.aggregator === arm.value);
      const found = arms.find((row) => axes.every((axis, i) => row[axis] === worlds[i].value));
      if (!found) {
        said.textContent = "Nobody has run this world.";
        shown.replaceChildren();
        return;
      }
      const where = found.calibrated ? "At the calibrated point" : "In this world";
      said.textContent = minus(`${where}, ${arm.value} ${found.verdict} quality weights: `
        + `${found.gain} points of MAP@100, ${found.interval}.`);
      const bar = found.low === null ? [] : [make("span",
        { class: "interval", style: `left:${place(found.low)}%;width:${place(found.high) - place(found.low)}%` })];
      const others = arms.filter((row) => row !== found).map((row) => at("other", place(row.difference), 50));
      shown.replaceChildren(
        picture("strip", said.textContent, [at("zero", place(0), 0), ...others, ...bar, at("mark", place(found.difference), 50)]),
        ticks([[place(least), least.toFixed(1)], [place(0), "0"], [place(most), most.toFixed(1)]]),
        note(`Difference from quality weights, points; small dots: ${arm.value} in the other worlds`));
    };
    const start = rows.find((row) => row.calibrated) || rows[0];
    const worlds = axes.map((axis) => slider(axis, distinct(rows, axis).sort((a, b) => a - b), start[axis], () => show()));
    const arm = choice("Arm: ", distinct(rows, "aggregator"), show);
    show();
    return [controls(...worlds, arm), said, shown];
  };

  // Rows: identity, train, clips, group, ap, places ("1" where a clip of the ranking is right, "0" where not).
  const SORTED = { identity: "identity", train: "train clips", clips: "clips to find", ap: "AP" };
  const MOST = 10; // rows at a time
  const identities = (rows) => {
    const [shown, said] = [make("div"), make("output")];
    const order = { by: "clips", sign: -1 }; // rankings with right and wrong places first
    const widest = Math.log(Math.max(2, ...rows.map((row) => row.clips)));
    const place = (number) => 3 + 94 * Math.log(number) / widest;
    const aside = rows.map((_, i) => ((i * 0.618) % 1) - 0.5); // equal numbers of clips would hide each other
    const strip = ({ places }) => {
      const right = [...places].flatMap((hit, i) => (hit === "1" ? [i + 1] : []));
      const label = `right at rank ${right.join(", ") || "none"} of the first ${places.length}`;
      return picture("places", label, [...places].map((hit) => make("i", { class: hit === "1" ? "right" : "wrong" })));
    };
    const show = () => {
      const chosen = rows.filter((row) => group.value === ANY || row.group === group.value);
      const whole = chosen.filter((row) => row.ap === 1).length;
      said.textContent = `${count(chosen.length, "identity", "identities")}: mean AP ${mean(chosen.map((row) => row.ap)).toFixed(3)}, `
        + `${whole} of them with all their clips on top.`;
      const dots = rows.map((row, i) => at(chosen.includes(row) ? "dot" : "dot pale", place(row.clips) + 2 * aside[i], 4 + 92 * row.ap,
        `identity ${row.identity}: ${count(row.clips, "clip")}, AP ${row.ap.toFixed(3)}`));
      const sorted = [...chosen].sort((a, b) => order.sign * (a[order.by] - b[order.by]) || a.clips - b.clips);
      const turn = (by) => () => {
        Object.assign(order, { by, sign: order.by === by ? -order.sign : 1 });
        show();
        shown.querySelector("[aria-sort] button").focus();
      };
      const headings = Object.entries(SORTED).map(([by, name]) => make("th",
        { scope: "col", "aria-sort": by === order.by ? (order.sign > 0 ? "ascending" : "descending") : undefined },
        make("button", { type: "button", onclick: turn(by) }, name)));
      const cells = (row) => [row.identity, row.train, row.clips, row.ap.toFixed(3)].map(String);
      shown.replaceChildren(
        note("AP of each identity, from 0 (bottom) to 1 (top)"),
        picture("cloud", `${said.textContent} A dot an identity, AP over number of clips.`, dots),
        ticks([1, 2, 5, 10, 20, 50, 100, 200, 500].filter((n) => Math.log(n) <= widest).map((n) => [place(n), n])),
        note(`Clips to find. Below, ${Math.min(MOST, sorted.length)} of ${sorted.length}, sorted by ${SORTED[order.by]}; `
          + "full squares are clips of the right person, hatched ones of others"),
        table([...headings, make("th", { scope: "col" }, "first places")],
          sorted.slice(0, MOST).map((row) => ({ cells: [...cells(row), strip(row)] }))));
    };
    const ANY = "any number";
    const group = choice("Clips to find: ", [ANY, ...distinct([...rows].sort((a, b) => a.clips - b.clips), "group")], show);
    show();
    return [controls(group), said, shown];
  };

  const KINDS = { clips, grid, identities };
  const begin = () => {
    for (const box of document.querySelectorAll(".touch")) {
      const { columns, data } = JSON.parse(box.querySelector("script").textContent);
      const rows = data.map((row) => Object.fromEntries(columns.map((column, i) => [column, row[i]])));
      const made = KINDS[box.dataset.kind](rows, columns); // before the sentence goes, which stays where this fails
      box.querySelector(".instead").replaceWith(...made);
    }
  };
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", begin);
  else begin();
})();
