// Names the segment under the pointer, over the picture and over the legend. gradio keeps the elements of one result for
// the next where they are alike: events are listened to on the document, and what was read of a result is kept with its
// element for as long as the element says the same.
(() => {
  "use strict";
  const known = new WeakMap(); // .mf-map image -> what it says

  function read(view) {
    const map = view.querySelector(".mf-map");
    if (!map || !map.complete || !map.naturalWidth) return null;
    const said = view.querySelector(".mf-stage").dataset.facts;
    let facts = known.get(map);
    if (!facts || facts.source !== map.src || facts.said !== said) {
      const canvas = document.createElement("canvas");
      const [width, height] = [(canvas.width = map.naturalWidth), (canvas.height = map.naturalHeight)];
      const context = canvas.getContext("2d", { willReadFrequently: true });
      context.drawImage(map, 0, 0);
      const pixels = context.getImageData(0, 0, width, height).data;
      facts = { ...JSON.parse(said), said, source: map.src, width, height, pixels, row: null };
      known.set(map, facts);
    }
    return facts;
  }

  const rowOf = (facts, index) => facts.pixels[4 * index] + 256 * facts.pixels[4 * index + 1] - 1;

  // Darkens all but one segment; row null: nothing is darkened.
  function highlight(view, facts, row) {
    if (facts.row === row) return;
    facts.row = row;
    for (const line of view.querySelectorAll("tr[data-row]")) {
      line.classList.toggle("mf-here", Number(line.dataset.row) === row);
    }
    const shade = view.querySelector(".mf-shade");
    [shade.width, shade.height] = [facts.width, facts.height]; // which clears it
    if (row === null || row < 0) return;
    const context = shade.getContext("2d");
    const dark = context.createImageData(facts.width, facts.height);
    for (let index = 0; index < facts.width * facts.height; index++) {
      if (rowOf(facts, index) !== row) dark.data[4 * index + 3] = 120;
    }
    context.putImageData(dark, 0, 0);
  }

  function describe(tip, facts, row, index) {
    tip.replaceChildren();
    const segment = facts.segments[row];
    tip.style.borderLeftColor = segment ? `rgb(${segment.color.join(",")})` : "#888";
    const name = document.createElement("b");
    name.textContent = segment ? segment.name : facts.nothing;
    tip.append(name);
    if (!segment) return;
    const score = facts.unit === null ? segment.score : (facts.pixels[4 * index + 2] * facts.unit) / 255;
    tip.append(score === null ? "" : ` score ${score.toFixed(2)}`, ` · ${segment.kind}`);
  }

  // Below the pointer, or above it where there is no room, and within the picture.
  function place(tip, stage, x, y) {
    const [width, height] = [stage.clientWidth, stage.clientHeight];
    const [w, h] = [tip.offsetWidth, tip.offsetHeight];
    tip.style.left = `${Math.max(0, Math.min(x + 14, width - w))}px`;
    tip.style.top = `${y + 14 + h > height ? Math.max(0, y - 14 - h) : y + 14}px`;
  }

  function leave(except) {
    for (const view of document.querySelectorAll(".mf-view")) {
      if (view === except) continue;
      const facts = read(view);
      if (facts) highlight(view, facts, null);
      view.querySelector(".mf-tip").hidden = true;
    }
  }

  function point(event) {
    const target = event.target instanceof Element ? event.target : null;
    const picture = target && target.closest(".mf-picture");
    const line = target && target.closest("tr[data-row]");
    const view = (picture || line) && target.closest(".mf-view");
    leave(view);
    if (!view) return;
    const [facts, tip] = [read(view), view.querySelector(".mf-tip")];
    if (!facts) {
      // a new result, which the browser is still decoding
      view.querySelector(".mf-map").addEventListener("load", () => point(event), { once: true });
      return;
    }
    if (line) {
      tip.hidden = true;
      highlight(view, facts, Number(line.dataset.row));
      return;
    }
    const box = picture.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    const cell = (at, size, cells) => Math.min(cells - 1, Math.max(0, Math.floor((at / size) * cells)));
    const index = cell(y, box.height, facts.height) * facts.width + cell(x, box.width, facts.width);
    const row = rowOf(facts, index);
    describe(tip, facts, row, index);
    tip.hidden = false;
    place(tip, view.querySelector(".mf-stage"), x, y);
    highlight(view, facts, row);
  }

  document.addEventListener("pointermove", point);
  document.addEventListener("pointerdown", point);
  document.documentElement.addEventListener("pointerleave", () => leave(null));
})();
