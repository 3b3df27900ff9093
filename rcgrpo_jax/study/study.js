"use strict";
// A vote is in the browser's storage before the next choice is shown. Nothing leaves the page but the file that is saved.
const $ = (id) => document.getElementById(id);
const STUDY = JSON.parse($("study").textContent);
const QUESTIONS = Object.keys(STUDY.questions);
const EXAMPLES = Object.keys(STUDY.shown); // id -> ids of its edits, from the first place to the last
const MAKERS = STUDY.shown[EXAMPLES[0]].length;
const STORE = "rcgrpo-study/" + STUDY.study;
const NOBODY = 300; // milliseconds in which nobody has looked: a second click of a double one

let votes = null; // the file as it is saved
let trials = []; // [example, question] in this voter's order
let at = 0; // which of them is shown; trials.length: the end
let edits = []; // ids of those that are shown
let shownAt = 0;
let kept = true; // whether the browser keeps votes

// Storage

function load(key) {
  try { return localStorage.getItem(key); } catch { return null; }
}

function store(key, value) {
  try {
    localStorage.setItem(key, value);
    kept = true;
  } catch { kept = false; }
}

const place = (voter) => STORE + "/" + voter;

function keep() {
  store(place(votes.voter), JSON.stringify(votes));
}

// The votes of a text, or why it holds none.
function parse(text) {
  let found;
  try { found = JSON.parse(text); } catch { throw new Error("This file is damaged, or holds no votes."); }
  if (!found || typeof found.voter !== "string" || !found.voter.trim() || !Array.isArray(found.answers))
    throw new Error("This file holds no votes.");
  if (found.study !== STUDY.study) throw new Error("This file has votes of another study.");
  if (!found.answers.every(isOurs)) throw new Error("This file is damaged: it has votes that this page cannot give.");
  return { study: found.study, voter: found.voter.trim(), answers: found.answers };
}

function isOurs(answer) {
  const shown = answer && STUDY.shown[answer.example];
  return Boolean(shown) && QUESTIONS.includes(answer.question) && answer.seconds >= 0 &&
    JSON.stringify(answer.shown) === JSON.stringify(shown) && (answer.chosen === null || shown.includes(answer.chosen));
}

function keptVotes(voter) {
  const text = load(place(voter));
  try { return text ? parse(text) : null; } catch { return null; }
}

// Order: a hash of voter and example, so that each voter has another one, and the same after a reload.

function hash(text) { // FNV-1a
  let value = 2166136261;
  for (let i = 0; i < text.length; i++) value = Math.imul(value ^ text.charCodeAt(i), 16777619);
  return Math.imul(value ^ (value >>> 15), 2246822519) >>> 0;
}

function order(voter) {
  const sorted = EXAMPLES.map((id) => [hash(voter + "/" + id), id]).sort((a, b) => a[0] - b[0] || (a[1] < b[1] ? -1 : 1));
  return sorted.flatMap(([, id]) => QUESTIONS.map((question) => [id, question]));
}

const answerOf = ([example, question]) =>
  votes.answers.find((answer) => answer.example === example && answer.question === question);

// Screens

function show(id) {
  for (const section of ["welcome", "trial", "done"]) $(section).hidden = section !== id;
  $("footer").hidden = id === "welcome";
  $("save").hidden = id === "done"; // which has a button of its own
}

function say(text) {
  $("status").textContent = text;
}

function begin(found) {
  votes = found;
  trials = order(votes.voter);
  store(STORE, votes.voter);
  keep();
  const open = trials.findIndex((trial) => !answerOf(trial));
  at = open < 0 ? trials.length : open;
  $("name").textContent = votes.voter;
  render();
}

function welcome() {
  votes = null;
  $("total").textContent = EXAMPLES.length * QUESTIONS.length;
  $("problem").textContent = $("voter").value = "";
  say("");
  show("welcome");
  $("voter").focus();
}

function render() {
  window.scrollTo(0, 0);
  if (at === trials.length) {
    show("done");
    $("thanks").focus();
    warn();
    return;
  }
  const [example, question] = trials[at];
  const trial = JSON.parse($("e" + example).textContent); // one at a time: all pictures together are large
  const answer = answerOf(trials[at]);
  edits = STUDY.shown[example];
  $("question").textContent = STUDY.questions[question];
  $("instruction").textContent = "Instruction: “" + trial.instruction + "”";
  $("place").textContent = "Choice " + (at + 1) + " of " + trials.length;
  $("progress").max = trials.length;
  $("progress").value = votes.answers.length;
  $("pictures").replaceChildren(
    figure("Source", trial.source, null),
    ...trial.edits.map((picture, i) => figure("Edit " + (i + 1), picture, voteButton(i, answer))),
  );
  $("unsure").setAttribute("aria-pressed", String(Boolean(answer) && answer.chosen === null));
  $("back").disabled = at === 0;
  $("forward").disabled = !answer;
  show("trial");
  $("question").focus({ preventScroll: true });
  shownAt = performance.now();
  warn();
}

function figure(name, picture, button) {
  const element = document.createElement("figure");
  const look = document.createElement("button");
  look.className = "look";
  look.setAttribute("aria-label", "Enlarge: " + name);
  const image = document.createElement("img");
  image.alt = name;
  image.src = picture;
  look.append(image);
  look.onclick = () => enlarge(name);
  const caption = document.createElement("figcaption");
  caption.textContent = name;
  element.append(look, button || caption);
  return element;
}

function voteButton(i, answer) {
  const button = document.createElement("button");
  const key = document.createElement("kbd");
  key.textContent = i + 1;
  key.setAttribute("aria-hidden", "true");
  button.className = "vote";
  button.setAttribute("aria-label", "Choose edit " + (i + 1));
  button.setAttribute("aria-pressed", String(Boolean(answer) && answer.chosen === edits[i]));
  button.append("Edit ", key);
  button.onclick = () => vote(edits[i]);
  return button;
}

function warn() {
  if (!kept) say("This browser keeps no votes: save them before you close the page.");
}

// Votes

function vote(chosen) {
  const now = performance.now();
  if (now - shownAt < NOBODY) return;
  const [example, question] = trials[at];
  const before = answerOf(trials[at]);
  const seconds = (before ? before.seconds : 0) + (now - shownAt) / 1000;
  const answer = { question, example, chosen, seconds: Math.round(seconds * 1000) / 1000, shown: edits };
  if (before) Object.assign(before, answer);
  else votes.answers.push(answer);
  keep();
  at += 1;
  say(at < trials.length ? "Kept. Choice " + (at + 1) + " of " + trials.length + "." : "Kept. That was the last one.");
  render();
}

function move(by) {
  if (by > 0 && !answerOf(trials[at])) return;
  at = Math.max(0, at + by);
  say("");
  render();
}

function save() {
  const link = document.createElement("a");
  const name = votes.voter.normalize("NFKD").replace(/[^A-Za-z0-9]+/g, "-").replace(/^-+|-+$/g, "") || "voter";
  link.href = URL.createObjectURL(new Blob([JSON.stringify(votes, null, 1) + "\n"], { type: "application/json" }));
  link.download = "votes-" + name + "-" + STUDY.study.slice(0, 8) + ".json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  say("Saved as " + link.download + ": " + votes.answers.length + " of " + trials.length + " votes.");
}

// Enlarged pictures

function enlarge(name) {
  const names = ["Source", ...edits.map((_, i) => "Edit " + (i + 1))];
  const tools = names.map((other) => tool(other, () => turn(other)));
  const double = tool("Double size", resize);
  double.id = "double";
  const close = tool("Close", () => $("zoom").close());
  close.classList.add("close");
  $("tools").replaceChildren(...tools, double, close);
  $("stage").classList.remove("double");
  $("zoom").showModal();
  turn(name);
  $("stage").focus();
}

function tool(name, action) {
  const button = document.createElement("button");
  button.textContent = name;
  button.onclick = action;
  return button;
}

function turn(name) {
  const image = [...document.querySelectorAll("#pictures img")].find((other) => other.alt === name);
  $("large").src = image.src;
  $("large").alt = name;
  $("turned").textContent = name;
  for (const button of $("tools").children)
    if (button.textContent !== "Close" && button.id !== "double")
      button.setAttribute("aria-pressed", String(button.textContent === name));
  resize(false);
}

function resize(change) {
  const isDouble = change === false ? $("stage").classList.contains("double") : $("stage").classList.toggle("double");
  $("double").setAttribute("aria-pressed", String(isDouble));
}

// Keys

function zoomKey(key) {
  if (key === "z") resize();
  else if (key === "s") turn("Source");
  else if (key >= "1" && key <= String(MAKERS)) turn("Edit " + key);
  else return false;
  return true;
}

function trialKey(key) {
  if (key >= "1" && key <= String(MAKERS)) vote(edits[key - 1]);
  else if (key === "0" || key === "n") vote(null);
  else if (key === "ArrowLeft") move(-1);
  else if (key === "ArrowRight") move(1);
  else if (key === "z") enlarge("Source");
  else return false;
  return true;
}

document.addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.altKey || event.metaKey || !votes || !$("keys").checked) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  let used = false;
  if ($("zoom").open) used = zoomKey(key);
  else if (!$("trial").hidden) used = trialKey(key);
  else if (!$("done").hidden && key === "ArrowLeft") used = move(-1) || true;
  if (used) event.preventDefault();
});

$("start").onsubmit = (event) => {
  event.preventDefault();
  const voter = $("voter").value.trim();
  if (voter) begin(keptVotes(voter) || { study: STUDY.study, voter, answers: [] });
};

$("file").onchange = async () => {
  const [file] = $("file").files;
  $("file").value = "";
  if (!file) return;
  try {
    const found = parse(await file.text());
    const here = keptVotes(found.voter); // what was voted here stays; the file adds to it
    const have = new Set((here ? here.answers : []).map((answer) => answer.example + answer.question));
    const added = found.answers.filter((answer) => !have.has(answer.example + answer.question));
    begin({ ...found, answers: [...(here ? here.answers : []), ...added] });
  } catch (error) {
    $("problem").textContent = error.message;
  }
};

$("unsure").onclick = () => vote(null);
$("back").onclick = $("review").onclick = () => move(-1);
$("forward").onclick = () => move(1);
$("save").onclick = $("finish").onclick = save;
$("leave").onclick = () => { store(STORE, ""); welcome(); };
$("large").onclick = () => resize();
window.addEventListener("beforeunload", (event) => { if (votes && !kept) event.preventDefault(); });

for (const element of [$("last"), ...document.querySelectorAll(".last")]) element.textContent = MAKERS;
const lastVoter = load(STORE);
if (lastVoter && keptVotes(lastVoter)) begin(keptVotes(lastVoter));
else welcome();
