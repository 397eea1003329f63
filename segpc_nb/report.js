"use strict";

// Data, and the words of the page

const data = JSON.parse(document.getElementById("data").textContent);
const COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"];
const MARKS = {accept: "accepted", reject: "rejected", other: "other type"};
const SIGNS = {accept: "✓", reject: "✕", other: "◆"};
const CARDS = 48;  // cards that the gallery adds at a time
const ROWS = 200;  // rows that a short table shows, see report.css
const SVG_TAGS = new Set(["svg", "path", "g", "rect", "text", "line", "title", "image"]);

const $ = id => document.getElementById(id);
const natural = new Intl.Collator("en", {numeric: true});
const fixed = (value, digits) => value === null ? "–" : Number(value).toFixed(digits);

function el(name, attributes = {}, ...children) {
  const node = SVG_TAGS.has(name) ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function quantile(values, at) {  // between two values on a straight line, as in summary.csv
  const sorted = values.filter(value => value !== null).sort((a, b) => a - b), place = (sorted.length - 1) * at, low = Math.floor(place);
  return sorted.length ? sorted[low] + (place - low) * ((sorted[low + 1] ?? sorted[low]) - sorted[low]) : null;
}

function wilson(count, total) {  // the 95% interval of a proportion
  const z = 1.959963984540054, middle = count + z * z / 2, half = z * Math.sqrt(count * (total - count) / total + z * z / 4);
  return [(middle - half) / (total + z * z), (middle + half) / (total + z * z)];
}

const pictures = data.pictures;
const cells = pictures.flatMap(picture => picture.cells.map(cell => {
  cell.picture = picture;
  cell.key = picture.id + "_" + cell.k;
  cell.ref = picture.id + "/" + cell.outline;  // stays when cells are numbered anew
  cell.suspicion = (cell.doubtful ? 1 : 0) + 1 - (cell.score ?? 1);
  return cell;
}));
const missable = pictures.flatMap(picture => picture.truth.map((truth, i) => Object.assign(truth, {picture, number: i + 1})));
const byRef = new Map(cells.map(cell => [cell.ref, cell]));
const scales = [...new Set(cells.map(cell => cell.scale))].sort((a, b) => a - b);
const color = cell => COLORS[scales.indexOf(cell.scale) % COLORS.length];

function imageUrl(picture) {  // one decoded picture for all cards and the viewer
  if (!picture.url) {
    const [head, body] = picture.src.split(",");
    const bytes = Uint8Array.from(atob(body), letter => letter.charCodeAt(0));
    picture.url = URL.createObjectURL(new Blob([bytes], {type: head.slice(5, head.indexOf(";"))}));
  }
  return picture.url;
}

// Marks: kept in the browser under the key of the report

const STORE = "segpc review " + data.key;
const CLEAR = {mark: "", type: "", note: ""};
const applied = new Map(cells.filter(cell => cell.review).map(cell => [cell.ref, {...CLEAR, ...cell.review}]));
let marks = new Map(applied);

const review = cell => marks.get(cell.ref) ?? CLEAR;

function cleaned(entry) {  // what was read may be anything
  const text = value => typeof value === "string" ? value.slice(0, 2000) : "";
  return {mark: Object.hasOwn(MARKS, entry?.mark) ? entry.mark : "", type: text(entry?.type), note: text(entry?.note)};
}

function readStored() {
  const stored = JSON.parse(localStorage.getItem(STORE) ?? "{}");
  marks = new Map(applied);
  for (const [ref, entry] of Object.entries(stored)) if (byRef.has(ref)) marks.set(ref, cleaned(entry));
}

function changed() {  // marks that differ from what was applied before, as the file has them
  return cells.filter(cell => JSON.stringify(review(cell)) !== JSON.stringify(applied.get(cell.ref) ?? CLEAR)).map(cell =>
    ({picture: cell.picture.id, cell: cell.k, outline: cell.outline, ...review(cell)}));
}

function store() {
  try {
    localStorage.setItem(STORE, JSON.stringify(Object.fromEntries(changed().map(({picture, outline, mark, type, note}) => [picture + "/" + outline, {mark, type, note}]))));
  } catch {
    say("This browser does not keep marks. Download the review before you close the page.");
  }
}

function say(text) {
  $("message").textContent = text;
  $("message").hidden = !text;
}

function setReview(cell, change) {
  marks.set(cell.ref, {...review(cell), ...change});
  store();
}

// What is shown: score, filter and search; and in which order

const SORTS = {
  suspicion: ["doubtful first", true], nc: ["N:C ratio", true], score: ["score", false], area: ["cell area", true],
  ...(data.scores ? {iou: ["IoU with the annotation", false]} : {}), key: ["name", false],
};
let sorting = {field: "suspicion", down: true};
let order = [], cards = CARDS, chosen = null, place = 0;

const sure = cell => cell.score === null || cell.score >= Number($("score").value);
const counted = cell => !["reject", "other"].includes(review(cell).mark);
const FILTERS = {
  all: () => true, open: cell => !review(cell).mark, uncertain: cell => cell.uncertain, doubtful: cell => cell.doubtful, border: cell => cell.border,
  accept: cell => review(cell).mark === "accept", reject: cell => review(cell).mark === "reject", other: cell => review(cell).mark === "other",
  note: cell => review(cell).note !== "",
};

function found(cell) {
  const words = $("search").value.trim().toLowerCase();
  return !words || [cell.key, review(cell).type, review(cell).note].some(text => text.toLowerCase().includes(words));
}

function compare(a, b) {
  const {field, down} = sorting, value = cell => field in CLEAR ? review(cell)[field] : cell[field];
  const [x, y] = [value(a), value(b)];
  if (x === null || y === null) return (x === null) - (y === null);  // unknown values come last
  return (down ? -1 : 1) * (typeof x === "string" ? natural.compare(x, y) : x - y);
}

function sortBy(field, down) {
  sorting = {field, down};
  refresh();
}

function refresh() {
  order = cells.filter(cell => sure(cell) && FILTERS[$("filter").value](cell) && found(cell));
  order.sort(compare);
  if (order.includes(chosen)) place = order.indexOf(chosen);
  showNumbers();
  showSummary();
  showGallery();
  showPictures();
  showMissed();
  showTable();
  showPlots();
  showViewer();
}

function longTable() {
  $("cells").classList.remove("short");
  $("more-rows").hidden = true;
}

function showChosen() {
  const before = document.querySelector("#cells tr.chosen");
  if (order.includes(chosen)) place = order.indexOf(chosen);
  if (chosen && place >= cards) { cards = Math.ceil((place + 1) / CARDS) * CARDS; showGallery(); }
  for (const card of $("gallery").children) card.classList.toggle("chosen", card.dataset.key === chosen?.key);
  for (const cell of cells) if (cell.row && (cell === chosen || cell.row === before)) showRow(cell);
  showPictures();
  showViewer();
}

let waiting = false;
function refreshSoon() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; refresh(); });
}

// Numbers and distributions

function showNumbers() {
  const plasma = order.filter(counted), believed = plasma.filter(cell => !cell.doubtful);
  const reviewed = cells.filter(cell => review(cell).mark).length, missed = missedCells().length;
  const rows = [["pictures", pictures.length], ["plasma cells", plasma.length], ["uncertain", plasma.filter(cell => cell.uncertain).length], ["doubtful", plasma.filter(cell => cell.doubtful).length],
    ["median N:C ratio", fixed(quantile(believed.map(cell => cell.nc), 0.5), 2)], ["median cell area, " + data.unit, fixed(quantile(plasma.map(cell => cell.area), 0.5), data.digits)], ["reviewed", `${reviewed} of ${cells.length}`]];
  if (data.scores) rows.push(["missed", `${missed} of ${missable.length}`]);
  $("numbers").replaceChildren(...rows.map(([name, value]) => el("div", {}, el("b", {}, String(value)), name)));
  $("counts").textContent = `${order.length} of ${cells.length} cells`;
  $("score-value").textContent = fixed(Number($("score").value), 2);
  const words = $("search").value.trim(), filter = $("filter").selectedOptions[0].textContent;
  $("shown").textContent = `${order.length} of ${cells.length} cells shown: ${filter}, score from ${$("score-value").textContent}` + (words ? `, search "${words}"` : "");
  const count = changed().length;
  $("download").textContent = count ? `Download review (${count})` : "Download review";
  $("download").disabled = !count;
}

function summaryRow(name, patient, members) {
  const own = members.flatMap(picture => picture.cells).filter(cell => sure(cell) && counted(cell)), believed = own.filter(cell => !cell.doubtful).map(cell => cell.nc);
  const plasma = new Set(own.map(cell => cell.picture.id + "/" + cell.of)).size, all = members.some(picture => picture.nuclei === null) ? null : members.reduce((sum, picture) => sum + picture.nuclei, 0);
  const percent = value => all ? fixed(100 * value, 1) : "–", [low, high] = wilson(Math.min(plasma, all), all);
  const range = believed.length ? `${fixed(quantile(believed, 0.05), 2)} – ${fixed(quantile(believed, 0.95), 2)}` : "–";
  return [patient, name, plasma, all ?? "–", percent(plasma / all), all ? `${percent(low)} – ${percent(high)}` : "–", fixed(quantile(believed, 0.5), 2), range, own.filter(cell => cell.doubtful).length];
}

function showSummary() {
  const patients = [...new Set(pictures.map(picture => picture.patient))].filter(Boolean).sort(natural.compare);
  const rows = [["all", summaryRow(`${pictures.length} pictures`, "all", pictures)]];
  for (const patient of patients) {
    const own = pictures.filter(picture => picture.patient === patient);
    rows.push(["patient", summaryRow(own.length === 1 ? "1 picture" : `${own.length} pictures`, patient, own)]);
  }
  rows.push(...pictures.map(picture => ["", summaryRow(picture.id, picture.patient, [picture])]));
  const head = ["patient", "picture", "plasma cells", "nucleated cells", "plasma cells, %", "95% interval", "median N:C", "N:C, 5% to 95%", "doubtful"];
  $("summary").tHead.replaceChildren(el("tr", {}, ...head.map((name, k) => el("th", k < 2 ? {class: "text"} : {}, name))));
  $("summary").tBodies[0].replaceChildren(...rows.map(([kind, values]) => el("tr", {class: kind}, ...values.map((value, k) => el("td", k < 2 ? {class: "text"} : {}, String(value))))));
}

function histogram(name, values, digits) {
  const width = 320, height = 170, left = 8, bottom = 30, bins = 16;
  const known = values.filter(value => value !== null).sort((a, b) => a - b);
  const svg = el("svg", {viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `histogram of ${name}, ${known.length} cells`});
  svg.append(el("text", {x: left, y: 14, "font-size": 13}, name));
  if (!known.length) return svg;
  const at = part => known[Math.min(known.length - 1, Math.floor(known.length * part))];
  const low = at(0.02), high = at(0.98);  // what lies outside is counted in the first and last bar
  const counts = Array(bins).fill(0);
  for (const value of known) counts[Math.min(bins - 1, Math.max(0, Math.floor((value - low) / ((high - low) || 1) * bins)))]++;
  const top = Math.max(...counts), step = (width - 2 * left) / bins;
  counts.forEach((count, i) => {
    const tall = count / top * (height - bottom - 26);
    const bar = el("rect", {x: left + i * step + 1, y: height - bottom - tall, width: step - 2, height: tall});
    const from = i === 0 && known[0] < low ? "below " : fixed(low + i * (high - low) / bins, digits) + " to ";
    const to = i === bins - 1 && known.at(-1) > high ? "and above" : fixed(low + (i + 1) * (high - low) / bins, digits);
    bar.append(el("title", {}, `${from}${to}: ${count}`));
    svg.append(bar);
  });
  svg.append(el("line", {x1: left, x2: width - left, y1: height - bottom, y2: height - bottom}),
    el("text", {x: left, y: height - 12, "font-size": 12}, (known[0] < low ? "≤ " : "") + fixed(low, digits)),
    el("text", {x: width - left, y: height - 12, "font-size": 12, "text-anchor": "end"}, (known.at(-1) > high ? "≥ " : "") + fixed(high, digits)));
  return svg;
}

function showPlots() {
  const plasma = order.filter(counted);
  $("plots").replaceChildren(histogram("N:C ratio (nucleus area / cytoplasm area)", plasma.filter(cell => !cell.doubtful).map(cell => cell.nc), 2),
    histogram(`cell area, ${data.unit}`, plasma.map(cell => cell.area), data.digits), histogram("score", plasma.map(cell => cell.score), 2));
}

// Cells over pictures, in the page, in cards and in the viewer

const state = cell => [review(cell).mark, cell === chosen ? "chosen" : ""].filter(Boolean).join(" ");

function drawCell(cell) {
  const sign = SIGNS[review(cell).mark] ?? "";
  return el("g", {class: "cell " + state(cell), style: "--scale:" + color(cell), "data-key": cell.key},
    el("path", {class: "whole", d: cell.path}, el("title", {}, `${cell.key}: score ${fixed(cell.score, 2)}, N:C ${fixed(cell.nc, 2)}`)),
    el("path", {class: "nucleus", d: cell.nucleus}),
    el("text", {class: "number", x: cell.box[0], y: cell.box[1], dx: "-0.1em", dy: "0.6em"}, cell.k + sign));
}

function drawTruth(picture, wanted) {
  return picture.truth.map(truth => el("path", {class: "truth" + (truth === wanted ? " chosen" : ""), d: truth.path}));
}

function showPictures() {
  const visible = new Set(order), free = !$("search").value.trim() && $("filter").value === "all";
  for (const picture of pictures) {
    const shown = picture.cells.filter(cell => visible.has(cell)), {figure, overlay, caption} = picture;
    figure.hidden = !(free || shown.length || (picture.id.toLowerCase().includes($("search").value.trim().toLowerCase()) && $("filter").value === "all"));
    caption.textContent = `${picture.id}: ${shown.length} ${shown.length === 1 ? "cell" : "cells"}`;
    const now = shown.map(cell => cell.k + state(cell)).join();
    if (picture.drawn === now) continue;
    picture.drawn = now;
    overlay.replaceChildren(...drawTruth(picture), ...shown.map(drawCell));
  }
}

function makePicture(picture) {
  picture.overlay = el("svg", {viewBox: `0 0 ${picture.width} ${picture.height}`, style: `--unit:${picture.width / 400}`});
  picture.caption = el("figcaption");
  const image = el("img", {src: picture.src, width: picture.width, height: picture.height, alt: "picture " + picture.id, decoding: "async"});
  const stack = el("div", {class: "stack", tabindex: 0, role: "button", "aria-label": "open picture " + picture.id}, image, picture.overlay);
  const open = event => {
    const group = event.target.closest("g.cell");
    openViewer(picture, group ? cells.find(cell => cell.key === group.dataset.key) : null);
  };
  stack.addEventListener("click", open);
  stack.addEventListener("keydown", event => { if (event.key === "Enter") { event.stopPropagation(); open(event); } });
  picture.figure = el("figure", {id: "picture-" + picture.id}, stack, picture.caption);
  return picture.figure;
}

function crop(picture, [x, y, w, h], ...content) {
  const side = Math.max(w, h) * 1.35 + 8;
  return el("svg", {viewBox: `${x + w / 2 - side / 2} ${y + h / 2 - side / 2} ${side} ${side}`, "aria-hidden": "true", style: `--unit:${side / 132}`},
    el("image", {href: imageUrl(picture), width: picture.width, height: picture.height}), ...content);
}

function makeCard(cell) {
  const {mark, type, note} = review(cell), sign = el("span", {class: "sign " + mark}, mark ? SIGNS[mark] + " " : "");
  const judged = cell.iou === null ? "" : `IoU ${fixed(cell.iou, 2)}`, warnings = [cell.doubtful ? "doubtful" : "", cell.border ? "border" : ""].filter(Boolean).join(", ");
  const lines = [`N:C ${fixed(cell.nc, 2)}`, `score ${fixed(cell.score, 2)}`, judged, mark === "other" ? type : "", warnings, note ? "✎ " + note : ""].filter(Boolean);
  const card = el("button", {class: "card " + state(cell), "data-key": cell.key, "aria-label": `cell ${cell.key}, ${MARKS[mark] ?? "not reviewed"}`},
    crop(cell.picture, cell.box, ...drawTruth(cell.picture), drawCell(cell)),
    el("span", {}, sign, el("b", {}, cell.key), ...lines.flatMap(text => [el("br"), text])));
  card.addEventListener("click", () => openViewer(cell.picture, cell));
  return card;
}

function showGallery() {
  $("sort").value = sorting.field in SORTS ? sorting.field : "";
  $("direction").textContent = sorting.down ? "▼ high to low" : "▲ low to high";
  const kept = document.activeElement?.closest?.(".card")?.dataset.key;
  $("gallery").replaceChildren(...order.slice(0, cards).map(makeCard));
  if (kept) $("gallery").querySelector(`[data-key="${CSS.escape(kept)}"]`)?.focus({preventScroll: true});
  $("more").hidden = order.length <= cards;
  $("more-cells").textContent = `Show ${Math.min(CARDS, order.length - cards)} more of ${order.length - cards}`;
}

// Annotated cells that nothing found

const missedCells = () => missable.filter(truth => !truth.hits.some(k => { const cell = truth.picture.cells.find(cell => cell.k === k); return cell && sure(cell) && counted(cell); }));

function showMissed() {
  if (!data.scores) return;
  const missed = missedCells();
  $("missed-note").textContent = `${missed.length} of ${missable.length} annotated cells overlap with no cell that has at least the chosen score and was not rejected (IoU 0.5).`;
  $("missed").replaceChildren(...missed.map(truth => {
    const card = el("button", {class: "card missed", "aria-label": `missed cell ${truth.number} of picture ${truth.picture.id}`}, crop(truth.picture, truth.box, el("path", {class: "truth", d: truth.path})),
      el("span", {}, el("b", {}, truth.picture.id), el("br"), `annotated cell ${truth.number}`));
    card.addEventListener("click", () => openViewer(truth.picture, null, truth));
    return card;
  }));
}

// The table, and the same as CSV

const COLUMNS = [  // name, field, digits, name in the CSV
  ["cell", "key", null, "cell"], ["mark", "mark", null, "mark"], ["score", "score", 2, "score"], ["N:C ratio", "nc", 2, "nc_ratio"],
  [`cell area, ${data.unit}`, "area", data.digits, "cell_area"], ["nucleus", "nucleus_area", data.digits, "nucleus_area"], ["cytoplasm", "cytoplasm_area", data.digits, "cytoplasm_area"],
  ["doubtful", "suspicion", null, "doubtful"], ["border", "border", null, "touches_border"], ["scale", "scale", 2, "scale"],
  ...(data.scores ? [["IoU", "iou", 2, "iou"]] : []), ["note", "note", null, "note"],
];

function content(cell, field, digits) {
  const {mark, type, note} = review(cell);
  if (field === "mark") return mark === "other" ? `${SIGNS.other} ${type || MARKS.other}` : mark ? `${SIGNS[mark]} ${MARKS[mark]}` : "";
  if (field === "note") return note;
  if (field === "suspicion") return cell.doubtful ? "yes" : "";
  if (field === "border") return cell.border ? "yes" : "";
  return digits === null ? cell[field] : fixed(cell[field], digits);
}

function showRow(cell) {
  const now = JSON.stringify(review(cell)) + (cell === chosen);
  cell.row ??= el("tr", {"data-key": cell.key}, ...COLUMNS.map(([, field]) => el("td", ["key", "mark", "note"].includes(field) ? {class: "text"} : {})));
  if (cell.written === now) return cell.row;
  cell.written = now;
  cell.row.className = state(cell);
  COLUMNS.forEach(([, field, digits], i) => { cell.row.children[i].textContent = content(cell, field, digits); });
  return cell.row;
}

function showTable() {
  document.querySelector("#cells tbody").replaceChildren(...order.map(showRow));
  $("more-rows").hidden = order.length <= ROWS || !$("cells").classList.contains("short");
  $("more-rows").textContent = `Show all ${order.length} rows`;
  document.querySelectorAll("#cells th").forEach((head, i) => {
    const here = COLUMNS[i][1] === sorting.field;
    here ? head.setAttribute("aria-sort", sorting.down ? "descending" : "ascending") : head.removeAttribute("aria-sort");
  });
}

function makeHead() {
  const row = el("tr");
  for (const [name, field] of COLUMNS) {
    const button = el("button", {}, name);
    button.addEventListener("click", () => sortBy(field, sorting.field === field && !sorting.down));
    row.append(el("th", {scope: "col", ...(["key", "mark", "note"].includes(field) ? {class: "text"} : {})}, button));
  }
  document.querySelector("#cells thead").append(row);
  document.querySelector("#cells tbody").addEventListener("click", event => {
    const cell = cells.find(cell => cell.row === event.target.closest("tr"));
    if (cell) openViewer(cell.picture, cell);
  });
}

function csvField(value) {
  let text = String(value);
  if (typeof value === "string" && /^[=+\-@\t\r]/.test(text)) text = "'" + text;  // no formula for a spreadsheet
  return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

function csv() {
  const unit = data.unit === "px" ? "px" : "um2";
  const heads = ["picture", ...COLUMNS.map(([, , , name]) => name.endsWith("_area") ? `${name}_${unit}` : name), "type"];
  const rows = order.map(cell => [cell.picture.id, ...COLUMNS.map(([, field]) => field === "key" ? cell.k : field === "suspicion" ? cell.doubtful : field in CLEAR ? review(cell)[field] : cell[field] ?? ""), review(cell).type]);
  return [heads, ...rows].map(row => row.map(csvField).join(",")).join("\n") + "\n";
}

// Files out and in

function save(name, content, type) {
  const link = el("a", {href: URL.createObjectURL(new Blob([content], {type})), download: name});
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

function downloadReview() {
  const file = {format: "segpc review", version: 1, report: data.key, title: data.title, segpc_nb: data.version, made: new Date().toISOString(), cells: changed()};
  save("review.json", JSON.stringify(file, null, 1) + "\n", "application/json");
}

async function loadReview(file) {
  let read;
  try { read = JSON.parse(await file.text()); } catch { read = null; }
  if (read?.format !== "segpc review" || !Array.isArray(read.cells)) return say(`${file.name} is no review; load a file that "Download review" wrote.`);
  const known = read.cells.filter(entry => byRef.has(`${entry?.picture}/${entry?.outline}`));
  for (const entry of known) marks.set(`${entry.picture}/${entry.outline}`, cleaned(entry));
  store();
  refresh();
  const lost = read.cells.length - known.length;
  say(`${known.length} marks loaded from ${file.name}.` + (lost ? ` ${lost} belong to cells that this report does not have, and were left out.` : ""));
}

// The viewer: one picture, zoomed and moved; one cell, marked

const view = {picture: null, wanted: null, x: 0, y: 0, w: 1};  // what the viewer shows: picture, missed cell, part of the picture
const stage = $("stage");

function openViewer(picture, cell, wanted = null) {
  const opened = !$("viewer").open, near = cell?.box ?? wanted?.box;
  if (opened) $("viewer").showModal();
  const whole = opened ? !near : view.w > 0.98 * wholeWidth();
  Object.assign(view, {picture, wanted});
  if (whole || !near) fit(); else zoomTo(near, opened ? 3.2 : null);
  chosen = cell;
  showChosen();
  if (opened) stage.focus();
}

const stageRatio = () => (stage.clientHeight || 1) / (stage.clientWidth || 1);
const wholeWidth = () => Math.max(view.picture.width, view.picture.height / stageRatio());

function setView(x, y, w) {  // top left corner and width, px of the preview
  const whole = wholeWidth(), {width, height} = view.picture;
  view.w = Math.min(whole, Math.max(whole / 60, w));
  const h = view.w * stageRatio(), inside = (start, size, all) => size >= all ? (all - size) / 2 : Math.min(all - 0.9 * size, Math.max(-0.1 * size, start));
  view.x = inside(x, view.w, width);
  view.y = inside(y, h, height);
  stage.setAttribute("viewBox", `${view.x} ${view.y} ${view.w} ${h}`);
  stage.style.setProperty("--unit", view.w / (stage.clientWidth || 1));
}

const fit = () => setView(0, 0, wholeWidth());

function zoomTo([x, y, w, h], times) {  // without `times` the zoom stays, if the cell fits
  const least = Math.max(w, h / stageRatio());
  const width = times ? least * times : Math.max(view.w, least * 1.2);
  setView(x + w / 2 - width / 2, y + h / 2 - width * stageRatio() / 2, width);
}

function zoomAt(clientX, clientY, factor) {  // the point under the pointer stays
  const box = stage.getBoundingClientRect(), [u, v] = [(clientX - box.left) / box.width, (clientY - box.top) / box.height];
  const before = view.w, [x, y] = [view.x + u * before, view.y + v * before * stageRatio()];
  const w = Math.min(wholeWidth(), Math.max(wholeWidth() / 60, before * factor));
  setView(x - u * w, y - v * w * stageRatio(), w);
}

function zoomStep(factor) {
  const box = stage.getBoundingClientRect();
  zoomAt(box.left + box.width / 2, box.top + box.height / 2, factor);
}

function showViewer() {
  if (!$("viewer").open) return;
  const picture = view.picture, visible = new Set(order), {mark, type, note} = chosen ? review(chosen) : CLEAR;
  const drawn = picture.cells.filter(cell => visible.has(cell) || cell === chosen);
  stage.replaceChildren(el("image", {href: imageUrl(picture), width: picture.width, height: picture.height}), ...drawTruth(picture, view.wanted), ...drawn.map(drawCell));
  stage.setAttribute("aria-label", `picture ${picture.id} with ${drawn.length} cells`);
  $("cell-name").textContent = chosen ? `Cell ${chosen.key}` : view.wanted ? `Missed cell of picture ${picture.id}` : `Picture ${picture.id}`;
  $("place").textContent = !chosen ? `${drawn.length} cells shown; click one to mark it` : order.includes(chosen) ? `${place + 1} of ${order.length} in this order` : "not among the cells shown";
  $("review").hidden = !chosen;
  for (const button of document.querySelectorAll(".marks button")) button.setAttribute("aria-pressed", button.dataset.mark === mark);
  if (document.activeElement !== $("type")) $("type").value = type;
  if (document.activeElement !== $("note")) $("note").value = note;
  const facts = chosen ? COLUMNS.filter(([, field]) => !["key", "mark", "note"].includes(field)) : [];
  $("facts").replaceChildren(...facts.flatMap(([name, field, digits]) => [el("dt", {}, name), el("dd", {}, content(chosen, field, digits) || "no")]));
}

function step(by) {
  if (!order.length) return;
  const here = order.indexOf(chosen);
  const next = here >= 0 ? here + by : chosen ? (by > 0 ? place : place - 1) : 0;
  if (next < 0 || next >= order.length) return;
  const cell = order[next];
  if ($("viewer").open) return openViewer(cell.picture, cell);
  choose(cell);
}

function choose(cell) {  // on the page; what is seen, table or gallery, follows
  chosen = cell;
  showChosen();
  const box = $("cells").parentNode.getBoundingClientRect(), table = box.top < innerHeight * 0.7 && box.bottom > innerHeight * 0.3;
  if (table && place >= ROWS) longTable();
  (table ? cell.row : $("gallery").querySelector(".chosen")).scrollIntoView({block: "nearest"});
}

function setMark(mark) {
  if (!chosen) return;
  const cell = chosen, cleared = review(cell).mark === mark || !mark;
  setReview(cell, cleared ? {mark: "", type: ""} : {mark, type: mark === "other" ? review(cell).type : ""});
  refresh();
  if (!cleared && mark === "other" && $("viewer").open) return $("type").focus();
  if (!cleared && $("advance").checked) step(1);
}

// Pointers: drag to move, pinch or wheel to zoom, click to choose

const pointers = new Map();
let moved = false;

stage.addEventListener("wheel", event => {
  event.preventDefault();
  zoomAt(event.clientX, event.clientY, Math.exp(event.deltaY * (event.deltaMode ? 0.05 : 0.0015)));
}, {passive: false});

stage.addEventListener("pointerdown", event => {
  if (!pointers.size) moved = false;
  pointers.set(event.pointerId, [event.clientX, event.clientY]);
});

stage.addEventListener("pointermove", event => {
  if (!pointers.has(event.pointerId)) return;
  const [x, y] = pointers.get(event.pointerId), [dx, dy] = [event.clientX - x, event.clientY - y];
  if (!moved && Math.hypot(dx, dy) < 4) return;
  if (!moved) stage.setPointerCapture(event.pointerId);
  moved = true;
  stage.classList.add("dragged");
  const others = [...pointers].filter(([id]) => id !== event.pointerId).map(([, point]) => point);
  pointers.set(event.pointerId, [event.clientX, event.clientY]);
  const perPixel = view.w / stage.clientWidth;
  if (!others.length) return setView(view.x - dx * perPixel, view.y - dy * perPixel, view.w);
  const [ox, oy] = others[0], before = Math.hypot(x - ox, y - oy), after = Math.hypot(event.clientX - ox, event.clientY - oy);
  zoomAt((event.clientX + ox) / 2, (event.clientY + oy) / 2, before / Math.max(after, 1));
});

for (const name of ["pointerup", "pointercancel"]) stage.addEventListener(name, event => {
  pointers.delete(event.pointerId);
  if (!pointers.size) stage.classList.remove("dragged");
});

stage.addEventListener("click", event => {
  const group = event.target.closest("g.cell");
  if (moved || !group) return;
  chosen = view.picture.cells.find(cell => cell.key === group.dataset.key);
  view.wanted = null;
  showChosen();
});

// Keys

const KEYS = {
  j: () => step(1), ArrowRight: () => step(1), k: () => step(-1), ArrowLeft: () => step(-1),
  a: () => setMark("accept"), r: () => setMark("reject"), u: () => setMark(""),
  o: () => { if (!chosen) return; openViewer(chosen.picture, chosen); $("type").focus(); },
  n: () => { if (!chosen) return; openViewer(chosen.picture, chosen); $("note").focus(); },
  "/": () => { $("viewer").close(); $("search").focus(); },
};
const PAGE_KEYS = {Enter: () => { if (chosen) openViewer(chosen.picture, chosen); }};
const VIEWER_KEYS = {"+": () => zoomStep(0.8), "=": () => zoomStep(0.8), "-": () => zoomStep(1.25), "0": fit, ArrowDown: () => step(1), ArrowUp: () => step(-1)};

document.addEventListener("keydown", event => {
  const typing = event.target.closest("input:not([type=checkbox]), textarea, select");
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  const action = KEYS[event.key] ?? ($("viewer").open ? VIEWER_KEYS : PAGE_KEYS)[event.key];
  if (!action || (event.key === "Enter" && event.target.closest("button, a, [role=button]"))) return;
  event.preventDefault();
  action();
});

// The page

function connect() {
  for (const id of ["score", "search"]) $(id).addEventListener("input", refreshSoon);
  $("filter").addEventListener("change", refresh);
  for (const [name, score] of Object.entries(data.points)) {
    const point = el("button", {title: `score from ${fixed(score, 2)}`}, name);
    point.addEventListener("click", () => { $("score").value = score; refresh(); });
    $("points").append(point);
    $("ticks").append(el("option", {value: fixed(score, 2), label: name}));
  }
  $("sort").append(el("option", {value: "", hidden: ""}, "a column of the table"), ...Object.entries(SORTS).map(([field, [name]]) => el("option", {value: field}, name)));
  $("sort").addEventListener("change", () => sortBy($("sort").value, SORTS[$("sort").value][1]));
  $("direction").addEventListener("click", () => sortBy(sorting.field, !sorting.down));
  $("more-cells").addEventListener("click", () => { cards += CARDS; showGallery(); });
  for (const [id, name, wanted] of [["show-nucleus", "no-nucleus", false], ["show-cytoplasm", "no-cytoplasm", false], ["show-numbers", "no-numbers", false], ["show-truth", "no-truth", false], ["by-scale", "by-scale", true]])
    $(id).addEventListener("change", event => { document.body.classList.toggle(name, event.target.checked === wanted); $("legend").hidden = !$("by-scale").checked; });
  $("more-rows").addEventListener("click", longTable);
  $("csv").addEventListener("click", () => save("cells-of-report.csv", csv(), "text/csv"));
  $("download").addEventListener("click", downloadReview);
  $("load").addEventListener("click", () => $("load-file").click());
  $("load-file").addEventListener("change", event => { if (event.target.files[0]) loadReview(event.target.files[0]); event.target.value = ""; });
  $("close").addEventListener("click", () => $("viewer").close());
  $("viewer").addEventListener("close", () => { refresh(); document.querySelector(".card.chosen")?.focus({preventScroll: true}); });
  $("previous").addEventListener("click", () => step(-1));
  $("next").addEventListener("click", () => step(1));
  $("zoom-in").addEventListener("click", () => zoomStep(0.8));
  $("zoom-out").addEventListener("click", () => zoomStep(1.25));
  $("zoom-fit").addEventListener("click", fit);
  for (const button of document.querySelectorAll(".marks button")) button.addEventListener("click", () => setMark(button.dataset.mark));
  $("type").addEventListener("input", () => { setReview(chosen, $("type").value ? {mark: "other", type: $("type").value} : {mark: "", type: ""}); refreshSoon(); });
  $("type").addEventListener("keydown", event => { if (event.key === "Enter") { stage.focus(); if ($("type").value && $("advance").checked) step(1); } });
  $("note").addEventListener("input", () => { setReview(chosen, {note: $("note").value}); refreshSoon(); });
  for (const id of ["type", "note"]) $(id).addEventListener("keydown", event => { if (event.key === "Escape") { event.preventDefault(); event.stopPropagation(); stage.focus(); } });
  addEventListener("resize", () => { if ($("viewer").open) setView(view.x, view.y, view.w); });
  addEventListener("storage", event => { if (event.key === STORE) { readStored(); refresh(); } });  // marked in another tab
}

function fillScores() {
  if (!data.scores) return;
  document.body.classList.remove("without-truth");
  $("scores").append(el("tr", {}, ...["", ...data.scores.map(score => score.name)].map(name => el("th", {}, name))),
    el("tr", {}, el("td", {}, "all pictures"), ...data.scores.map(score => el("td", {}, fixed(score.value, 3)))),
    el("tr", {}, el("td", {}, "95% interval"), ...data.scores.map(score => el("td", {}, score.low === null ? "–" : fixed(score.low, 3) + " – " + fixed(score.high, 3)))));
}

document.title = document.querySelector("h1").textContent = data.title;
$("what").textContent = data.what;
$("how").textContent = JSON.stringify(data.how, null, 2);
$("legend").append(...scales.flatMap(scale => [el("span", {class: "swatch", style: "background:" + COLORS[scales.indexOf(scale) % COLORS.length]}), "scale " + scale]));
try { readStored(); } catch { say("This browser does not keep marks. Download the review before you close the page."); }
fillScores();
makeHead();
$("pictures").append(...pictures.map(makePicture));
connect();
refresh();
