"use strict";
/* The page of `avlprof explore`. All data is in the element #data; every text goes in as text, never as HTML. */
(() => {
  const $ = (id) => document.getElementById(id);
  const LEVELS = 47, PARTS = 15;
  const HEAT = [[255, 255, 255], [253, 212, 158], [252, 141, 89], [215, 48, 31], [127, 0, 0]];
  const NIGHT = [[28, 34, 42], [92, 38, 28], [186, 66, 38], [252, 141, 89], [255, 236, 210]];
  const BARS = { sink: "#6B6B6B", system: "#B9B9B9", vision: "#0072B2", text: "#E69F00", generated: "#009E73", learned_sink: "#CC79A7" };
  const NAMES = { sink: "first token", system: "system", vision: "vision", text: "text", generated: "generated", learned_sink: "learned sink" };
  const STORED = "#56B4E9", CORE = "#0072B2";
  const SAID = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6A3D9A", "#8C6D31"], UNCOLOURED = "#9A9A9A";
  const SINK_TIMES = 10, SINK_WORDS = 0.9, CACHED = 3;
  const data = JSON.parse($("data").textContent);
  const state = { sample: 0, words: [], layer: -1, head: -1, show: "attention", sinks: "mark", patch: null, across: "words" };
  let now = null, timer = 0, loading = 0;
  const cache = new Map();

  /* --- making elements */
  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name === "class") element.className = value;
      else element.setAttribute(name, value);
    }
    element.append(...children);
    return element;
  }
  const percent = (share) => (share >= 0.0995 ? `${(100 * share).toFixed(0)}%` : share >= 0.001 ? `${(100 * share).toFixed(1)}%` : `${(100 * share).toPrecision(1)}%`);
  const shown = (text) => (text.trim() ? text : "␣");

  /* --- unpacking, a sample at a time and when it is shown */
  async function inflate(text) {
    const bytes = Uint8Array.from(atob(text), (sign) => sign.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Response(stream).arrayBuffer();
  }
  async function maps(packed) {
    const [peaks, levels] = await Promise.all([inflate(packed.peaks), inflate(packed.levels)]);
    return { shape: packed.shape, peaks: new Float32Array(peaks), levels: new Uint8Array(levels) };
  }
  async function opened(index) {
    const found = [];
    for (const side of data.samples[index].sides) {
      if (!side) { found.push(null); continue; }
      const [own, sums] = await Promise.all([maps(side.maps), inflate(side.sums)]);
      const sets = side.states ? new Uint8Array(await inflate(side.states.data)) : null;
      found.push({ side, maps: own, sums: new Float32Array(sums), sets, heads: null, pictures: side.tiles.map(geometry), sinks: new Map(), says: await said(side.says) });
    }
    return found;
  }
  async function said(packed) {
    if (!packed) return null;
    const [ids, shares] = await Promise.all([inflate(packed.ids), inflate(packed.shares)]);
    return { layers: packed.layers, words: packed.words, shape: packed.shape, ids: new Uint16Array(ids), shares: new Uint8Array(shares) };
  }
  async function withHeads(sides) {
    for (const own of sides) if (own && own.side.heads && !own.heads) own.heads = await maps(own.side.heads);
  }
  function unpacked(index) {
    if (!cache.has(index)) cache.set(index, opened(index));
    const found = cache.get(index);
    cache.delete(index);
    cache.set(index, found);
    for (const old of cache.keys()) if (cache.size > CACHED && old !== index) cache.delete(old);
    return found;
  }

  /* --- values */
  function addMap(into, packed, number, scale) {
    const vision = packed.shape[packed.shape.length - 1], start = number * vision;
    const factor = (scale * packed.peaks[number]) / (LEVELS * LEVELS);
    for (let i = 0; i < vision; i++) { const level = packed.levels[start + i]; into[i] += factor * level * level; }
  }
  function values(own, word, layer, head) {
    const [, layers] = own.maps.shape, vision = own.maps.shape[2], out = new Float32Array(vision);
    const chosen = layer < 0 ? [...Array(layers).keys()] : [layer];
    for (const at of chosen) {
      if (head >= 0 && own.heads) addMap(out, own.heads, (word * layers + at) * own.heads.shape[2] + head, 1 / chosen.length);
      else addMap(out, own.maps, word * layers + at, 1 / chosen.length);
    }
    return out;
  }
  function tokenValue(packed, number, pick) {
    const start = number * packed.shape[packed.shape.length - 1];
    let total = 0;
    for (const [token, weight] of pick) { const level = packed.levels[start + token]; total += weight * level * level; }
    return (total * packed.peaks[number]) / (LEVELS * LEVELS);
  }
  const sum = (list) => list.reduce((a, b) => a + b, 0);
  const largest = (list) => list.reduce((a, b) => (a > b ? a : b), 0);
  function sinksOf(own, layer) {
    if (!own.sinks.has(layer)) {
      const [words, , vision] = own.maps.shape, hits = new Uint16Array(vision);
      let seeing = 0;
      for (let word = 0; word < words; word++) {
        const row = values(own, word, layer, -1), total = sum(row);
        if (total <= 0) continue;
        seeing++;
        for (let i = 0; i < vision; i++) if (row[i] * vision >= SINK_TIMES * total) hits[i]++;
      }
      own.sinks.set(layer, seeing ? [...hits.keys()].filter((i) => hits[i] >= SINK_WORDS * seeing) : []);
    }
    return own.sinks.get(layer);
  }
  /* Shares of KV heads that hold and compute each token while a word is read or written; null without a policy. */
  function held(own, word, layer) {
    if (!own.sets) return null;
    const about = own.side.states, entry = own.side.words[word], [, layers, vision] = about.shape;
    const row = entry.kind === "answer" ? Math.min(entry.rows[0], about.rows.length - 1) : 0;
    const kept = new Float32Array(vision), core = new Float32Array(vision);
    const chosen = layer < 0 ? [...Array(layers).keys()] : [layer];
    for (const at of chosen) for (let i = 0, from = (about.rows[row] * layers + at) * vision; i < vision; i++) {
      const both = own.sets[from + i];
      kept[i] += (both >> 4) / PARTS / chosen.length;
      core[i] += (both & 15) / PARTS / chosen.length;
    }
    return { kept, core, refreshes: about.refreshes.includes(row) && row > 0, prompt: row === 0 };
  }

  /* --- where tokens lie in a picture */
  function spread(start, end, tokens, cells) {
    const rows = [];
    for (let i = 0; i < tokens; i++) {
      const low = start + ((end - start) * i) / tokens, high = start + ((end - start) * (i + 1)) / tokens, own = [];
      for (let j = Math.max(0, Math.floor(low * cells)); j < Math.min(cells, Math.ceil(high * cells)); j++) {
        const shared = Math.min(high, (j + 1) / cells) - Math.max(low, j / cells);
        if (shared > 1e-9) own.push([j, shared]);
      }
      if (!own.length) own.push([high <= 0.5 ? 0 : cells - 1, 1]);
      const total = sum(own.map((one) => one[1]));
      rows.push(own.map(([j, shared]) => [j, shared / total]));
    }
    return rows;
  }
  function geometry(tiles) {
    const finest = (count, side) => Math.min(256, Math.max(1, Math.round(Math.max(...tiles.map(side), count))));
    const rows = finest(1, (t) => t[1] / (t[7] - t[5])), columns = finest(1, (t) => t[2] / (t[6] - t[4]));
    const tokens = [], cells = [], weights = [], boxes = [];
    for (const [first, high, wide, stride, left, top, right, bottom] of tiles) {
      const down = spread(top, bottom, high, rows), along = spread(left, right, wide, columns);
      for (let r = 0; r < high; r++) for (let c = 0; c < wide; c++) {
        const token = first + r * stride + c;
        const x = left + ((right - left) * c) / wide, y = top + ((bottom - top) * r) / high;
        boxes.push([token, x, y, (right - left) / wide, (bottom - top) / high]);
        for (const [j, a] of down[r]) for (const [k, b] of along[c]) { tokens.push(token); cells.push(j * columns + k); weights.push(a * b); }
      }
    }
    return { rows, columns, tokens, cells, weights, boxes, tiles: tiles.length };
  }
  function painted(place, row) {
    const heat = new Float32Array(place.rows * place.columns);
    for (let i = 0; i < place.tokens.length; i++) heat[place.cells[i]] += row[place.tokens[i]] * place.weights[i];
    return heat;
  }
  function cellAt(place, x, y) {
    const r = Math.min(place.rows - 1, Math.max(0, Math.floor(y * place.rows)));
    return { r, c: Math.min(place.columns - 1, Math.max(0, Math.floor(x * place.columns))) };
  }
  function picked(own) {
    const place = state.patch && own.pictures[state.patch.picture];
    if (!place || !place.tiles) return null;
    const { r, c } = cellAt(place, state.patch.x, state.patch.y), found = [];
    for (let i = 0; i < place.cells.length; i++) if (place.cells[i] === r * place.columns + c) found.push([place.tokens[i], place.weights[i]]);
    return found;
  }

  /* --- what patches say */
  /* The layer whose words are shown: the one that is chosen, or the last before it that was read; of the mean, the last. */
  function saidAt(says, layer) {
    const read = says.layers.map((own, at) => (layer < 0 || own <= layer ? at : -1));
    return Math.max(0, largest(read));
  }
  function wordsOf(says, at, index) {
    const [, vision, top] = says.shape, from = (at * vision + index) * top;
    return [...Array(top).keys()].map((k) => [shown(says.words[says.ids[from + k]]), says.shares[from + k] / 255]);
  }
  /* The token that shows a place in most detail: of the tiles that hold it the one with the smallest patches. */
  function finest(place, x, y) {
    let found = -1, size = Infinity;
    for (const [index, left, top, w, h] of place.boxes) if (x >= left && x < left + w && y >= top && y < top + h && w * h < size) { found = index; size = w * h; }
    return found;
  }
  /* Colours of the commonest words of a layer, the commonest first. */
  function saidColours(own) {
    const at = saidAt(own.says, own.layer), counts = new Map();
    for (const place of own.pictures) for (const [index] of place.boxes) {
      const [word] = wordsOf(own.says, at, index)[0];
      counts.set(word, (counts.get(word) || 0) + 1);
    }
    const order = [...counts].sort((a, b) => b[1] - a[1]);
    return new Map(order.slice(0, SAID.length).map(([word], i) => [word, SAID[i]]));
  }
  function drawSaid(context, own, place, width, height) {
    const at = saidAt(own.says, own.layer), colours = saidColours(own), order = [...place.boxes].sort((a, b) => b[3] * b[4] - a[3] * a[4]);
    context.textAlign = "center";
    context.textBaseline = "middle";
    for (const [index, x, y, w, h] of order) {
      const [word, share] = wordsOf(own.says, at, index)[0], box = [x * width, y * height, w * width, h * height];
      context.clearRect(...box);
      context.globalAlpha = 0.3 + 0.6 * Math.sqrt(share);
      context.fillStyle = colours.get(word) || UNCOLOURED;
      context.fillRect(...box);
      context.globalAlpha = 1;
      const size = Math.max(7, Math.min(11, box[3] * 0.6, (box[2] - 3) / (0.6 * word.length))), room = Math.floor((box[2] - 2) / (size * 0.6));
      if (box[3] < 9 || room < 2) continue;
      context.font = `600 ${size}px system-ui, sans-serif`;
      context.lineWidth = 2.5;
      context.strokeStyle = "rgba(255,255,255,0.85)";
      context.fillStyle = "#101418";
      const text = word.length > room ? `${word.slice(0, room - 1)}…` : word, centre = [box[0] + box[2] / 2, box[1] + box[3] / 2];
      context.strokeText(text, ...centre);
      context.fillText(text, ...centre);
    }
  }
  function saidText(own, index) {
    const at = saidAt(own.says, own.layer);
    return `behind layer ${own.says.layers[at]}: ${wordsOf(own.says, at, index).map(([word, share]) => `“${word}” ${percent(share)}`).join(", ")}`;
  }
  function drawSays() {
    const own = now.find((one) => one && one.says), place = own && state.patch && own.pictures[state.patch.picture];
    $("says").hidden = !own;
    if (!own) return;
    const index = place && place.tiles ? finest(place, state.patch.x, state.patch.y) : -1;
    $("says-about").textContent = index < 0
      ? "Choose a patch on the picture to see which words it would write behind each layer."
      : "The likeliest words, had the model stopped behind a layer: the patch’s hidden state through the final norm and head.";
    if (index < 0) return $("says-table").replaceChildren();
    const here = saidAt(own.says, own.layer), names = ["Layer", ...[...Array(own.says.shape[2]).keys()].map((k) => (k ? `${k + 1}.` : "likeliest"))];
    const body = own.says.layers.map((layer, at) => {
      const cells = wordsOf(own.says, at, index).map(([word, share], k) => make("td", {}, k ? word : make("b", {}, word), ` ${percent(share)}`));
      return make("tr", at === here ? { class: "on" } : {}, make("th", { scope: "row" }, String(layer)), ...cells);
    });
    return $("says-table").replaceChildren(make("table", {}, make("thead", {}, make("tr", {}, ...names.map((text) => make("th", { scope: "col" }, text)))), make("tbody", {}, ...body)));
  }

  /* --- colours */
  const isDark = () => (document.documentElement.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  function colour(stops, share, alpha = 1) {
    const at = Math.min(Math.max(share, 0), 1) * (stops.length - 1), low = Math.min(Math.floor(at), stops.length - 2);
    const mix = stops[low].map((from, i) => Math.round(from + (stops[low + 1][i] - from) * (at - low)));
    return `rgba(${mix},${alpha})`;
  }
  const token = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  function canvasOf(canvas, width, height) {
    const ratio = window.devicePixelRatio || 1, context = canvas.getContext("2d");
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    return context;
  }

  /* --- the pictures */
  function layStages() {
    const sample = data.samples[state.sample];
    document.querySelector(".columns").classList.toggle("two", now.length > 1);
    $("stages").replaceChildren(...now.map((own, s) => {
      const holder = make("div", { class: "stage" });
      if (now.length > 1) holder.append(make("h3", {}, data.sides[s].label));
      if (!own) { holder.append(make("p", { class: "note" }, "This run does not have the sample.")); return holder; }
      const many = own.pictures.filter((place) => place.tiles).length;
      const row = make("div", { class: many > 4 ? "pictures many small" : many > 1 ? "pictures many" : "pictures" });
      own.pictures.forEach((place, p) => { if (place.tiles) row.append(picture(sample.pictures[p], place, s, p, many)); });
      if (!many) row.append(make("p", { class: "note" }, "There are no vision tokens in this sample."));
      holder.append(row, make("p", { class: "fact" }));
      return holder;
    }));
  }
  function picture(known, place, s, p, many) {
    const shape = known ? known.width / known.height : place.columns / place.rows;
    const figure = make("figure", { class: "picture" });
    figure.style.aspectRatio = String(shape);
    figure.style.setProperty("--shape", String(shape));
    if (known) { const image = make("img", { alt: "", draggable: "false" }); image.src = known.uri; figure.append(image); }
    const canvas = make("canvas", { tabindex: "0", role: "application", "aria-roledescription": "patch map", "data-side": s, "data-picture": p });
    canvas.dataset.name = many > 1 ? `picture ${p + 1}` : "the picture";
    canvas.addEventListener("click", (event) => {
      const box = canvas.getBoundingClientRect();
      take(place, p, (event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
    });
    canvas.addEventListener("mousemove", (event) => {
      const own = now[s], box = canvas.getBoundingClientRect();
      if (!own || !own.says) return;
      const index = finest(place, (event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
      canvas.title = index < 0 ? "" : `This patch says ${saidText(own, index)}`;
    });
    canvas.addEventListener("keydown", (event) => steer(event, place, p));
    figure.append(canvas);
    return figure;
  }
  function take(place, p, x, y, keep = false) {
    const { r, c } = cellAt(place, x, y), centre = { picture: p, x: (c + 0.5) / place.columns, y: (r + 0.5) / place.rows };
    const same = state.patch && ["picture", "x", "y"].every((name) => Math.abs(state.patch[name] - centre[name]) < 1e-9);
    state.patch = same && !keep ? null : centre;
    draw();
  }
  function steer(event, place, p) {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const at = state.patch && state.patch.picture === p ? state.patch : { x: 0.5, y: 0.5 };
    if (event.key === "Escape") state.patch = null;
    else if (event.key === "Enter" || event.key === " ") { event.preventDefault(); return take(place, p, at.x, at.y, true); }
    else if (moves[event.key]) {
      event.preventDefault();
      const [across, down] = moves[event.key], { r, c } = cellAt(place, at.x, at.y);
      const inside = (value, count) => Math.min(count - 1, Math.max(0, value));
      return take(place, p, (inside(c + across, place.columns) + 0.5) / place.columns, (inside(r + down, place.rows) + 0.5) / place.rows, true);
    } else return undefined;
    return draw();
  }
  function drawStages() {
    for (const canvas of document.querySelectorAll("#stages canvas")) {
      const own = now[Number(canvas.dataset.side)], place = own.pictures[Number(canvas.dataset.picture)];
      const width = canvas.clientWidth, height = canvas.clientHeight, context = canvasOf(canvas, width, height);
      const attention = state.show === "attention" || state.show === "both", sets = own.sets && (state.show === "policy" || state.show === "both");
      canvas.parentElement.classList.toggle("grey", attention || (state.show === "says" && Boolean(own.says)));
      if (attention) drawHeat(context, own, place, width, height);
      if (sets) drawSets(context, own, place, width, height);
      if (state.show === "says" && own.says) drawSaid(context, own, place, width, height);
      if (state.sinks !== "no" && attention) drawSinks(context, own, place, width, height);
      const cell = state.patch && state.patch.picture === Number(canvas.dataset.picture) ? cellAt(place, state.patch.x, state.patch.y) : null;
      if (cell) {
        const w = width / place.columns, h = height / place.rows;
        for (const [ink, line] of [["#000000", 4], ["#FFFFFF", 2]]) {
          context.strokeStyle = ink;
          context.lineWidth = line;
          context.strokeRect(cell.c * w, cell.r * h, w, h);
        }
      }
      canvas.setAttribute("aria-label", `${canvas.dataset.name}, ${data.sides[Number(canvas.dataset.side)].label}, ${place.rows} rows of ${place.columns} patches${cell ? `; chosen: row ${cell.r + 1}, column ${cell.c + 1}` : "; press Enter to choose one"}`);
    }
  }
  function drawHeat(context, own, place, width, height) {
    context.fillStyle = "rgba(255,255,255,0.25)";
    context.fillRect(0, 0, width, height);
    const heat = painted(place, own.seen), w = width / place.columns, h = height / place.rows;
    for (let i = 0; i < heat.length; i++) {
      const share = own.peak > 0 ? heat[i] / own.peak : 0, r = Math.floor(i / place.columns), c = i % place.columns;
      const x = Math.round(c * w), y = Math.round(r * h);
      context.fillStyle = colour(HEAT, share, 0.15 + 0.75 * Math.sqrt(share));
      context.fillRect(x, y, Math.round((c + 1) * w) - x, Math.round((r + 1) * h) - y);
    }
  }
  function drawSets(context, own, place, width, height) {
    for (const [index, x, y, w, h] of place.boxes) {
      const kept = own.held.kept[index], core = own.held.core[index], box = [x * width, y * height, w * width, h * height];
      if (kept < 1) {
        context.globalAlpha = 1 - kept;
        context.fillStyle = state.show === "policy" ? "rgba(30,34,40,0.78)" : "rgba(30,34,40,0.45)";
        context.fillRect(...box);
        context.strokeStyle = "rgba(255,255,255,0.55)";
        context.lineWidth = 1;
        context.beginPath();
        context.moveTo(box[0], box[1] + box[3]);
        context.lineTo(box[0] + box[2], box[1]);
        context.stroke();
      }
      const line = Math.max(1.5, Math.min(3, box[2] / 8));
      for (const [ink, share, thick] of [[STORED, kept, line], [CORE, core, line]]) {
        if (share <= 0) continue;
        context.globalAlpha = share;
        context.strokeStyle = ink;
        context.lineWidth = thick;
        context.strokeRect(box[0] + thick / 2 + 0.5, box[1] + thick / 2 + 0.5, box[2] - thick - 1, box[3] - thick - 1);
      }
      context.globalAlpha = 1;
    }
  }
  function drawSinks(context, own, place, width, height) {
    const marked = new Set(sinksOf(own, own.layer));
    for (const [index, x, y, w, h] of place.boxes) if (marked.has(index)) {
      const radius = Math.max(4, (Math.min(w * width, h * height) / 2) * 0.8);
      for (const [ink, dash] of [["#FFFFFF", []], ["#000000", [3, 3]]]) {
        context.setLineDash(dash);
        context.strokeStyle = ink;
        context.lineWidth = 2;
        context.beginPath();
        context.arc((x + w / 2) * width, (y + h / 2) * height, radius, 0, 7);
        context.stroke();
      }
      context.setLineDash([]);
    }
  }

  /* --- the words */
  function layTalk() {
    const sample = data.samples[state.sample], rows = [];
    now.forEach((own, s) => {
      if (!own) return;
      const words = own.side.words, asked = words.filter((word) => word.kind !== "answer").map((word) => word.text).join(" ");
      const first = now.find(Boolean), again = own !== first && asked === first.side.words.filter((word) => word.kind !== "answer").map((word) => word.text).join(" ");
      const group = make("div", { class: "chips", role: "radiogroup", "aria-label": `Words, ${data.sides[s].label}` });
      const question = make("div", { class: "line" }, make("span", { class: "who" }, "Question"));
      const answer = make("div", { class: "line" }, make("span", { class: "who" }, now.length > 1 ? data.sides[s].label : "Answer"));
      if (!data.sides[s].textRows && !again) question.append(make("span", { class: "said-whole" }, sample.prompt));
      words.forEach((word, index) => {
        const chip = make("button", { type: "button", role: "radio", class: `chip ${word.kind}`, "data-side": s, "data-word": index, "aria-checked": "false", tabindex: "-1" });
        chip.textContent = word.kind === "question" && !data.sides[s].textRows ? "all question words" : shown(word.text);
        chip.addEventListener("click", () => { stop(); choose(s, index); });
        if (word.kind === "answer") answer.append(chip);
        else if (!again) question.append(chip);
      });
      group.addEventListener("keydown", (event) => hop(event, s));
      if (!again) group.append(question);
      group.append(answer);
      if (!words.some((word) => word.kind === "answer")) answer.append(make("span", { class: "note" }, own.side.answer || "No answer was written."));
      rows.push(group);
    });
    $("talk").replaceChildren(...rows);
    $("reference").textContent = sample.references.length ? `Reference: ${sample.references.join(" · ")}` : "";
  }
  function hop(event, s) {
    const chips = [...event.currentTarget.querySelectorAll(".chip")], at = chips.findIndex((chip) => Number(chip.dataset.word) === state.words[s]);
    const to = { ArrowLeft: at - 1, ArrowUp: at - 1, ArrowRight: at + 1, ArrowDown: at + 1, Home: 0, End: chips.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    stop();
    const chip = chips[Math.min(chips.length - 1, Math.max(0, to))];
    choose(s, Number(chip.dataset.word));
    chip.focus();
  }
  const answers = (own) => own.side.words.map((word, index) => (word.kind === "answer" ? index : -1)).filter((index) => index >= 0);
  /* The word of another side that stands for one of this: of the same place in question or answer. */
  function choose(s, index) {
    const own = now[s], kind = own.side.words[index].kind, place = own.side.words.slice(0, index).filter((word) => word.kind === kind).length;
    state.words = now.map((other, o) => {
      if (!other || o === s) return o === s ? index : 0;
      const same = other.side.words.map((word, at) => (word.kind === kind ? at : -1)).filter((at) => at >= 0);
      return same.length ? same[Math.min(place, same.length - 1)] : other.side.words.findIndex((word) => word.kind === "last");
    });
    draw();
  }
  function drawTalk() {
    for (const chip of document.querySelectorAll(".chip")) {
      const s = Number(chip.dataset.side), own = now[s], word = Number(chip.dataset.word), on = state.words[s] === word;
      const shares = own.grid.shares, most = Math.max(own.grid.most[own.layer + 1], 1e-12);
      const share = state.across === "words" && shares ? shares[own.layer + 1][word] / most : 0;
      chip.style.setProperty("--share", share.toFixed(3));
      chip.setAttribute("aria-checked", String(on));
      chip.tabIndex = on ? 0 : -1;
    }
  }

  /* --- layers by words, or of one word by heads */
  function gridOf(own, s) {
    const [words, layers] = own.maps.shape, pick = picked(own), byHead = state.across === "heads" && own.heads;
    const word = state.words[s], columns = byHead ? own.heads.shape[2] : words, rows = [];
    for (let layer = 0; layer < layers; layer++) {
      const row = new Float32Array(columns);
      for (let column = 0; column < columns; column++) {
        const source = byHead ? own.heads : own.maps, number = byHead ? (word * layers + layer) * columns + column : column * layers + layer;
        if (pick) row[column] = tokenValue(source, number, pick);
        else if (byHead) { const one = new Float32Array(own.maps.shape[2]); addMap(one, source, number, 1); row[column] = sum(one); }
        else row[column] = own.sums[number];
      }
      rows.push(row);
    }
    const mean = new Float32Array(columns);
    for (const row of rows) row.forEach((value, i) => { mean[i] += value / layers; });
    const shares = [mean, ...rows];
    return { shares, most: shares.map(largest), byHead, columns, layers };
  }
  function layGrids() {
    $("grids").replaceChildren(...now.map((own, s) => {
      const holder = make("div", { class: "gridholder" });
      if (!own) return holder;
      if (now.length > 1) holder.append(make("h3", {}, data.sides[s].label));
      const labels = make("canvas", { class: "labels", "aria-hidden": "true" });
      const canvas = make("canvas", { class: "cells", tabindex: "0", role: "application", "aria-roledescription": "grid", "data-side": s });
      const under = (event, from) => { const box = from.getBoundingClientRect(); return own.layout.at(event.clientX - box.left, event.clientY - box.top); };
      canvas.addEventListener("click", (event) => { const cell = under(event, canvas); if (cell) enter(s, cell.layer, cell.column); });
      labels.addEventListener("click", (event) => { const cell = under(event, labels); if (cell) enter(s, cell.layer, own.grid.byHead ? state.head : state.words[s]); });
      canvas.addEventListener("mousemove", (event) => { const cell = under(event, canvas); canvas.title = cell ? cellText(own, cell.layer, cell.column) : ""; });
      canvas.addEventListener("keydown", (event) => {
        const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
        if (event.key === "Escape") { state.patch = null; draw(); }
        if (!moves) return;
        event.preventDefault();
        const column = own.grid.byHead ? state.head : state.words[s];
        enter(s, Math.min(own.grid.layers - 1, Math.max(-1, state.layer + moves[0])), Math.min(own.grid.columns - 1, Math.max(0, column + moves[1])));
      });
      holder.append(make("div", { class: "wide frozen" }, labels, canvas));
      return holder;
    }));
  }
  function enter(s, layer, column) {
    stop();
    state.layer = layer;
    if (now[s].grid.byHead) { state.head = layer < 0 ? -1 : column; draw(); }
    else choose(s, column);
  }
  function cellText(own, layer, column) {
    const what = own.grid.byHead ? `head ${column}` : `“${shown(own.side.words[column].text)}”`;
    return `${layer < 0 ? "mean of layers" : `layer ${layer}`}, ${what}: ${percent(own.grid.shares[layer + 1][column])}`;
  }
  function layoutOf(own, room) {
    const grid = own.grid, count = grid.layers + 1, bar = 58, left = 42 + bar + 8;
    const w = Math.max(7, Math.min(34, (room - left - 26) / grid.columns)), h = count <= 9 ? 26 : count <= 17 ? 20 : 13;
    const top = grid.byHead ? 20 : w >= 10 ? 74 : 8, y = (layer) => top + h * (layer + 1) + (layer >= 0 ? 6 : 0);
    return { w, h, top, y, bar, left, width: w * grid.columns + 26, height: y(grid.layers) + 6, at: (px, py) => {
      const column = Math.floor(px / w), layer = py < y(-1) + h + 3 ? -1 : Math.floor((py - y(0)) / h);
      return py >= top && layer < grid.layers && column < grid.columns ? { layer, column } : null;
    } };
  }
  function drawGrids() {
    for (const canvas of document.querySelectorAll("#grids canvas.cells")) {
      const s = Number(canvas.dataset.side), own = now[s], grid = own.grid, view = canvas.parentElement;
      const lay = (own.layout = layoutOf(own, view.clientWidth)), chosen = grid.byHead ? state.head : state.words[s];
      drawLabels(view.querySelector("canvas.labels"), own, s, lay);
      drawCells(canvas, own, lay, chosen);
      canvas.setAttribute("aria-label", `${grid.byHead ? "Layers by heads" : "Layers by words"}, ${data.sides[s].label}. ${chosen >= 0 ? cellText(own, own.layer, chosen) : ""}`);
      const at = lay.w * Math.max(chosen, 0), open = view.clientWidth - lay.left;
      if (at < view.scrollLeft || at + lay.w > view.scrollLeft + open) view.scrollLeft = Math.max(0, at - open / 2);
    }
  }
  function drawLabels(canvas, own, s, lay) {
    canvas.style.width = `${lay.left}px`;
    canvas.style.height = `${lay.height}px`;
    const context = canvasOf(canvas, lay.left, lay.height), word = own.side.words[state.words[s]];
    const masses = own.side.masses[word.kind === "answer" && word.rows[0] > 0 ? "generated" : "last"];
    context.textBaseline = "middle";
    context.textAlign = "right";
    for (let layer = -1; layer < own.grid.layers; layer++) {
      const bold = layer === own.layer;
      context.fillStyle = token(bold ? "--ink" : "--soft");
      context.font = `${bold ? "bold " : ""}${Math.min(12, lay.h - 1)}px system-ui, sans-serif`;
      context.fillText(layer < 0 ? "mean" : String(layer), 36, lay.y(layer) + lay.h / 2);
      let x = 42;
      for (const [i, share] of layer >= 0 && masses ? masses[layer].entries() : []) {
        context.fillStyle = BARS[data.masses[i]];
        context.fillRect(x, lay.y(layer) + 1.5, share * lay.bar, lay.h - 3);
        x += share * lay.bar;
      }
    }
  }
  function drawCells(canvas, own, lay, chosen) {
    const { w, h, y, width, height } = lay, grid = own.grid, stops = isDark() ? NIGHT : HEAT;
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    const context = canvasOf(canvas, width, height), most = Math.max(largest(grid.most), 1e-12);
    for (let layer = -1; layer < grid.layers; layer++) for (let column = 0; column < grid.columns; column++) {
      context.fillStyle = colour(stops, Math.pow(grid.shares[layer + 1][column] / most, state.patch ? 0.5 : 1));
      const x = Math.round(w * column);
      context.fillRect(x, y(layer), Math.round(w * (column + 1)) - x - (w > 14 ? 1 : 0), h - (h > 14 ? 1 : 0));
    }
    context.strokeStyle = token("--line");
    context.lineWidth = 1;
    context.strokeRect(0.5, y(0) - 0.5, w * grid.columns, h * grid.layers + 1);
    context.textBaseline = "middle";
    drawColumnNames(context, own, lay, chosen);
    context.strokeStyle = token("--accent");
    context.lineWidth = 2;
    context.strokeRect(1, y(own.layer), w * grid.columns - 1, h);
    if (chosen < 0) return;
    context.strokeRect(w * chosen + 1, y(-1), w - 1, h * (grid.layers + 1) + 6);
    context.lineWidth = 3;
    context.strokeRect(w * chosen + 1, y(own.layer), w - 1, h);
  }
  function drawColumnNames(context, own, { w, y, top }, chosen) {
    const grid = own.grid, kinds = own.side.words, ink = token("--ink"), soft = token("--soft");
    const font = (column, style = "") => { context.fillStyle = column === chosen ? ink : soft; context.font = `${column === chosen ? "bold " : ""}${style}11px system-ui, sans-serif`; };
    context.textAlign = grid.byHead ? "center" : "left";
    for (let column = 0; grid.byHead && column < grid.columns; column += w >= 18 ? 1 : 4) {
      font(column);
      context.fillText(String(column), w * (column + 0.5), top - 9);
    }
    const step = Math.ceil(12 / w), near = (column) => column !== chosen && Math.abs(column - chosen) < step;
    for (let column = 0; !grid.byHead && w >= 10 && column < grid.columns; column++) {
      if (column !== chosen && (column % step || near(column))) continue;
      const last = kinds[column].kind === "last", text = last ? "last prompt" : shown(kinds[column].text);
      context.save();
      context.translate(w * (column + 0.5), top - 5);
      context.rotate(-Math.PI / 3);
      font(column, last ? "italic " : "");
      context.fillText(text.length > 11 ? `${text.slice(0, 10)}…` : text, 0, 0);
      context.restore();
    }
    const border = grid.byHead ? -1 : kinds.findIndex((word) => word.kind === "answer");
    context.fillStyle = ink;
    if (border > 0) context.fillRect(Math.round(w * border) - 1, top - 5, 2, y(grid.layers) - top + 5);
  }

  /* --- words about it */
  function sentence(own, s) {
    const word = own.side.words[state.words[s]], total = sum(own.row), all = own.maps.shape[1];
    const where = own.layer < 0 ? `mean of ${all} layers` : `layer ${own.layer}${state.head >= 0 && own.heads ? `, head ${state.head}` : ""}`;
    const who = word.kind === "last" ? "The last prompt token" : word.kind === "question" && !data.sides[s].textRows ? "The question (mean of its words)" : `“${shown(word.text)}”`;
    const parts = [`${who}, ${where}: ${percent(total)} of its attention goes to vision`];
    if (total > 0) parts[0] += `, the strongest token has ${percent(largest(own.row) / total)} of that`;
    const pick = picked(own);
    if (pick) parts.push(`The chosen patch gets ${percent(sum(pick.map(([index, weight]) => weight * own.row[index])))}`);
    const spoken = pick && own.says ? finest(own.pictures[state.patch.picture], state.patch.x, state.patch.y) : -1;
    if (spoken >= 0) parts.push(`It says ${saidText(own, spoken)}`);
    if (own.held) parts.push(holds(own.held));
    const other = now.find((one) => one && one !== own && one.held && one.held.kept.length === own.row.length);
    if (other && !own.held && total > 0) parts.push(covers(own.row, other.held, total));
    return `${parts.join(". ")}.`;
  }
  function holds({ kept, core, refreshes, prompt }) {
    const tell = (list) => `${Math.round(sum(list))}`;
    const when = prompt ? "After the prompt, which reads all, it keeps" : "It keeps";
    return `${when} ${tell(kept)} of ${kept.length} vision tokens, ${tell(core)} of them in the core${refreshes ? "; this step is a refresh and reads all that is kept" : ""}`;
  }
  function covers(row, { kept, core }, total) {
    let inCore = 0, stored = 0;
    row.forEach((value, i) => { inCore += value * core[i]; stored += value * (kept[i] - core[i]); });
    return `Of this attention ${percent(inCore / total)} lies in the policy's core, ${percent(stored / total)} on what it stores besides, ${percent(Math.max(0, total - inCore - stored) / total)} on what it drops`;
  }
  function drawWords() {
    const facts = [...document.querySelectorAll("#stages .stage")].map((stage, s) => {
      const fact = now[s] && sentence(now[s], s), place = stage.querySelector(".fact");
      if (place && fact) place.textContent = fact;
      return fact && now.length > 1 ? `${data.sides[s].label}: ${fact}` : fact;
    });
    if (!timer) $("said").textContent = facts.filter(Boolean).join(" ");
    const patch = state.patch, own = now.find(Boolean), place = patch && own.pictures[patch.picture];
    const what = own.grid.byHead ? "head" : "word", cell = place && place.tiles ? cellAt(place, patch.x, patch.y) : null;
    $("grid-title").textContent = own.grid.byHead ? "Layers by heads" : "Layers by words";
    $("about").textContent = cell
      ? `Who looks at the chosen patch (row ${cell.r + 1}, column ${cell.c + 1}): its share of each ${what}’s attention in each layer.`
      : `How much of each ${what}’s attention goes to vision, in each layer. Choose a patch on the picture to see who looks at it.`;
    const most = largest(now.filter(Boolean).map((one) => largest(one.grid.most)));
    const ramp = make("span", { class: "ramp" });
    ramp.style.background = `linear-gradient(90deg, ${[0, 0.25, 0.5, 0.75, 1].map((at) => colour(isDark() ? NIGHT : HEAT, Math.pow(at, patch ? 0.5 : 1))).join(",")})`;
    const seen = data.masses.filter((name, i) => now.some((one) => one && Object.values(one.side.masses).some((table) => table && table.some((row) => row[i] > 0))));
    $("scale").replaceChildren(make("span", { class: "group" }, "0%", ramp, percent(most)), make("span", { class: "group" }, "bars:"), ...seen.map((name) => legend(BARS[name], NAMES[name])));
  }
  function legend(fill, text, kind = "fill") {
    const swatch = make("span", { class: `swatch ${kind}` });
    swatch.style.setProperty("--fill", fill);
    return make("span", { class: "group" }, swatch, text);
  }
  function drawKey() {
    const parts = [], sets = now.some((own) => own && own.sets), ramp = make("span", { class: "ramp" });
    ramp.style.background = `linear-gradient(90deg, ${HEAT.map((stop) => `rgb(${stop})`).join(",")})`;
    if (state.show === "attention" || state.show === "both") parts.push(make("span", { class: "group" }, "nothing", ramp, "strongest patch shown"));
    if (sets && (state.show === "policy" || state.show === "both")) parts.push(legend(CORE, "core, read at each step", "line"), legend(STORED, "stays in memory", "line"), legend("#6B6B6B", "dropped", "hatch"));
    const rings = now.reduce((count, own) => count + (own ? sinksOf(own, own.layer).length : 0), 0);
    const speaks = state.show === "says" && now.find((own) => own && own.says);
    if (speaks) parts.push(...[...saidColours(speaks)].map(([word, fill]) => legend(fill, word)), legend(UNCOLOURED, "other words"));
    if (state.sinks !== "no" && (state.show === "attention" || state.show === "both")) parts.push(rings ? legend("#222222", `${rings === 1 ? "sink" : `${rings} sinks`}${state.sinks === "out" ? ", not coloured" : ""}`, "ring") : make("span", { class: "group" }, "no sinks here"));
    $("key").replaceChildren(...parts);
  }
  function drawTable() {
    if (!$("numbers").open) return;
    const heads = ["Layer"], body = [];
    now.forEach((own, s) => {
      if (!own) return;
      const name = now.length > 1 ? `${data.sides[s].label}: ` : "";
      heads.push(`${name}on vision`, `${name}strongest token`);
      if (state.patch) heads.push(`${name}chosen patch`);
      if (own.sets) heads.push(`${name}kept`, `${name}core`);
    });
    const deepest = largest(now.filter(Boolean).map((own) => own.maps.shape[1]));
    for (let layer = 0; layer < deepest; layer++) {
      const row = make("tr", {}, make("th", { scope: "row" }, String(layer)));
      now.forEach((own, s) => { if (own) row.append(...tableCells(own, s, layer)); });
      body.push(row);
    }
    $("table").replaceChildren(make("table", {}, make("thead", {}, make("tr", {}, ...heads.map((text) => make("th", { scope: "col" }, text)))), make("tbody", {}, ...body)));
  }
  function tableCells(own, s, layer) {
    if (layer >= own.maps.shape[1]) return [make("td", { colspan: 2 + (state.patch ? 1 : 0) + (own.sets ? 2 : 0) }, "–")];
    const row = values(own, state.words[s], layer, state.head), total = sum(row), pick = picked(own), states = held(own, state.words[s], layer);
    const cells = [percent(total), total > 0 ? percent(largest(row) / total) : "–"];
    if (state.patch) cells.push(pick ? percent(sum(pick.map(([index, weight]) => weight * row[index]))) : "–");
    if (states) cells.push(String(Math.round(sum(states.kept))), String(Math.round(sum(states.core))));
    return cells.map((text) => make("td", {}, text));
  }

  /* --- all of it */
  function draw() {
    if (!now) return;
    const deepest = largest(now.filter(Boolean).map((own) => own.maps.shape[1]));
    state.layer = Math.min(state.layer, deepest - 1);
    if (state.layer < 0) state.head = -1;
    now.forEach((own, s) => {
      if (!own) return;
      own.layer = Math.min(state.layer, own.maps.shape[1] - 1);
      own.row = values(own, state.words[s], own.layer, state.head);
      own.seen = own.row.slice();
      if (state.sinks === "out") for (const index of sinksOf(own, own.layer)) own.seen[index] = 0;
      own.held = held(own, state.words[s], own.layer);
      own.peak = largest(own.pictures.filter((place) => place.tiles).map((place) => largest(painted(place, own.seen))));
      own.grid = gridOf(own, s);
    });
    $("layer").value = String(state.layer);
    $("head").value = String(state.head);
    drawStages();
    drawGrids();
    drawTalk();
    drawKey();
    drawWords();
    drawTable();
    drawSays();
  }
  function options(select, entries) {
    select.replaceChildren(...entries.map(([value, text]) => make("option", { value }, text)));
  }
  function layControls() {
    const sides = data.sides, own = now.find(Boolean), layers = largest(sides.map((side) => side.layers));
    const heads = now.every((one) => !one || one.side.heads), many = heads ? Math.min(...sides.map((side) => side.heads)) : 0;
    options($("layer"), [["-1", `mean of ${layers}`], ...[...Array(layers).keys()].map((i) => [i, `layer ${i}`])]);
    options($("head"), [["-1", many ? `mean of ${many}` : "mean of heads"], ...[...Array(many).keys()].map((i) => [i, `head ${i}`])]);
    $("head").disabled = !heads;
    if (!heads) { state.head = -1; state.across = "words"; }
    $("across").hidden = !heads;
    for (const radio of document.querySelectorAll("input[name=across]")) radio.checked = radio.value === state.across;
    const sets = now.some((one) => one && one.sets);
    for (const option of $("show").options) option.hidden = option.disabled = !sets && (option.value === "policy" || option.value === "both");
    if (!sets && (state.show === "policy" || state.show === "both")) state.show = "attention";
    const speaks = now.some((one) => one && one.says);
    for (const option of $("show").options) if (option.value === "says") option.hidden = option.disabled = !speaks;
    if (!speaks && state.show === "says") state.show = "attention";
    $("show").value = state.show;
    const notes = [data.samples[state.sample].note];
    if (!own.side.placed && own.maps.shape[2]) notes.push("Where these vision tokens lie in the picture is not known: they stand in their order, row by row.");
    if (!sides[0].textRows) notes.push("Words of the question were not recorded one by one (avlprof trace --text-rows).");
    if (!sides[0].perHead) notes.push("Heads were averaged (avlprof trace --per-head).");
    else if (!heads) notes.push("The heads of this sample were left out to bound the page; explore it alone (--sample).");
    $("note").textContent = notes.filter(Boolean).join(" ");
    $("play").disabled = !now.some((one) => one && answers(one).length);
  }
  async function show(index) {
    stop();
    const mine = ++loading;
    $("main").setAttribute("aria-busy", "true");
    let found;
    try {
      found = await unpacked(index);
      if (state.head >= 0 || state.across === "heads") await withHeads(found);
    } catch (error) {
      return problem(`The data of sample ${index + 1} cannot be unpacked (${error}).`);
    }
    if (mine !== loading) return undefined;
    const other = index !== state.sample || !now;
    state.sample = index;
    now = found;
    if (other) {
      state.patch = null;
      state.words = now.map((own) => (own ? (answers(own)[0] ?? own.side.words.findIndex((word) => word.kind === "last")) : 0));
    }
    $("main").hidden = false;
    $("sample").value = String(index);
    $("before").disabled = index === 0;
    $("after").disabled = index === data.samples.length - 1;
    layControls();
    layTalk();
    layStages();
    layGrids();
    draw();
    $("main").setAttribute("aria-busy", "false");
    return undefined;
  }
  function problem(text) {
    $("problem").textContent = text;
    $("problem").hidden = false;
  }
  function stop() {
    if (!timer) return;
    clearInterval(timer);
    timer = 0;
    playing(false);
    drawWords();
  }
  function playing(on) {
    $("play").setAttribute("aria-pressed", String(on));
    $("play").replaceChildren(make("span", { "aria-hidden": "true" }, on ? "❚❚" : "▶"), on ? " Pause" : " Play the answer");
  }
  function play() {
    if (timer) return stop();
    const s = now.reduce((best, own, at) => (own && (!now[best] || answers(own).length > answers(now[best]).length) ? at : best), 0);
    const words = answers(now[s]), at = words.indexOf(state.words[s]);
    let next = at < 0 || at === words.length - 1 ? 0 : at;
    const step = () => { if (next >= words.length) return stop(); choose(s, words[next++]); return undefined; };
    timer = setInterval(step, Number($("speed").value));
    playing(true);
    return step();
  }
  async function headsFirst() {
    try { await withHeads(now); } catch (error) { problem(`The maps of heads cannot be unpacked (${error}).`); }
    draw();
  }
  function listen() {
    const lists = [["sample", (value) => show(Number(value))], ["layer", (value) => { state.layer = Number(value); draw(); }], ["show", (value) => { state.show = value; draw(); }], ["sinks", (value) => { state.sinks = value; draw(); }]];
    for (const [id, act] of lists) $(id).addEventListener("change", (event) => act(event.target.value));
    $("head").addEventListener("change", (event) => {
      state.head = Number(event.target.value);
      if (state.head >= 0 && state.layer < 0) {
        const means = now.find(Boolean).grid.shares.slice(1).map(sum);
        state.layer = means.indexOf(largest(means));
      }
      headsFirst();
    });
    $("across").addEventListener("change", (event) => { state.across = event.target.value; headsFirst(); });
        $("before").addEventListener("click", () => show(state.sample - 1));
    $("after").addEventListener("click", () => show(state.sample + 1));
    $("play").addEventListener("click", play);
    $("speed").addEventListener("change", () => { if (timer) { stop(); play(); } });
    $("numbers").addEventListener("toggle", drawTable);
    $("theme").addEventListener("change", (event) => {
      if (event.target.value) document.documentElement.dataset.theme = event.target.value;
      else delete document.documentElement.dataset.theme;
      draw();
    });
    document.addEventListener("keydown", (event) => { if (event.key === "Escape" && state.patch && event.target === document.body) { state.patch = null; draw(); } });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
    let wide = 0;
    new ResizeObserver(() => { if (now && wide !== document.body.clientWidth) { wide = document.body.clientWidth; draw(); } }).observe(document.body);
  }
  function begin() {
    if (data.format !== "avlprof.explore/1") return problem("This page was put together wrongly.");
    if (typeof DecompressionStream === "undefined") return problem("This browser is too old to unpack the data: Chrome 80, Firefox 113 or Safari 16.4 does.");
    const [first] = data.sides, size = `${first.layers} layers x ${first.heads} query heads`;
    $("lead").textContent = data.sides.length > 1
      ? `${data.sides.map((side) => side.label).join(" beside ")} · ${size}`
      : `${first.policy ? `under policy ${first.policy}` : "dense"} · ${size}`;
    options($("sample"), data.samples.map((sample, i) => [i, sample.id.length > 60 ? `${sample.id.slice(0, 59)}…` : sample.id]));
    listen();
    return show(0);
  }
  begin();
})();
