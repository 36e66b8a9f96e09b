"use strict";
// Every word of a memory is put on the page as text, never as markup; the page asks its own server and no one else.
const $ = (id) => document.getElementById(id);
const PAGE = 60;
const at = { key: "", space: "", conversation: "", first: 0, found: null };

function make(tag, set = {}, ...within) {
  const one = document.createElement(tag);
  for (const [name, value] of Object.entries(set)) {
    if (name.startsWith("on")) one.addEventListener(name.slice(2), value);
    else if (name in one && !name.startsWith("aria")) one[name] = value;
    else one.setAttribute(name, value);
  }
  one.append(...within.filter((part) => part !== null));
  return one;
}
const many = (count, one, more = one + "s") => `${count.toLocaleString("en")} ${count === 1 ? one : more}`;
const day = (seconds) => new Date(seconds * 1000).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
const inSpace = (rest) => `/v1/spaces/${encodeURIComponent(at.space)}/${rest}`;
const query = (set) => new URLSearchParams(Object.entries(set).filter(([, value]) => value !== null && value !== "")).toString();

async function ask(method, path, body) {
  const headers = at.key ? { authorization: `Bearer ${at.key}` } : {};
  if (body !== undefined) headers["content-type"] = "application/json";
  const answer = await fetch(path, { method, headers, body: body === undefined ? undefined : JSON.stringify(body) }).catch(() => {
    throw new Error("The server does not answer.");
  });
  if (answer.ok) return answer;
  const told = await answer.json().then((json) => json.error, () => null);
  const error = new Error(told ? `${told.problem}; ${told.remedy}` : `The server answered ${answer.status}.`);
  error.status = answer.status;
  throw error;
}
const get = async (path) => (await ask("GET", path)).json();
const post = async (path, body) => (await ask("POST", path, body)).json();

let hush = 0;
function say(words, bad = false) {
  $("said").textContent = words;
  $("said").classList.toggle("bad", bad);
  clearTimeout(hush);
  hush = setTimeout(() => { $("said").textContent = ""; }, bad ? 9000 : 4000);
}
const tried = (work) => async (event) => {
  if (event?.type === "submit") event.preventDefault();
  try { await work(event); } catch (error) {
    if (error.status === 401) leave("This key is not known (any more).");
    else say(error.message, true);
  }
};

// In and out.

async function enter(key, keep) {
  at.key = key;
  const spaces = await get("/v1/spaces");
  (keep ? localStorage : sessionStorage).setItem("remanence-key", key);
  $("door").hidden = true;
  $("room").hidden = false;
  showSpaces(spaces);
  await openSpace(spaces.some((one) => one.name === at.space) ? at.space : spaces[0]?.name ?? "default");
}

function leave(words = "") {
  at.key = "";
  sessionStorage.removeItem("remanence-key");
  localStorage.removeItem("remanence-key");
  $("room").hidden = true;
  $("door").hidden = false;
  $("door-said").textContent = words;
  $("key").value = "";
  $("key").focus();
}

// Spaces and conversations.

function showSpaces(spaces) {
  const names = spaces.length ? spaces.map((one) => one.name) : ["default"];
  $("space").replaceChildren(...names.map((name) => make("option", { textContent: name, value: name })));
}

async function openSpace(name) {
  at.space = $("space").value = name;
  at.conversation = "";
  await refresh();
}

async function refresh() {
  await showConversation(await overview());
}

async function overview() {
  const known = (await get("/v1/spaces")).some((one) => one.name === at.space);
  const [list, stats, facts] = known
    ? await Promise.all([get(inSpace("conversations")), get(inSpace("stats")), get(inSpace("facts"))]) : [[], {}, []];
  list.sort((a, b) => b.last - a.last);
  if (!list.some((one) => one.name === at.conversation)) at.conversation = list[0]?.name ?? "default";
  $("figures").textContent = [["messages", "message"], ["chunks", "chunk"], ["facts", "fact"]]
    .filter(([name]) => name in stats).map(([name, one]) => many(stats[name], one)).join(" · ");
  $("conversation-count").textContent = list.length || "";
  $("conversations").replaceChildren(...list.map((one) => make("li", {},
    make("button", { type: "button", "aria-current": one.name === at.conversation ? "true" : "false", onclick: tried(() => choose(one.name)) },
      make("b", { textContent: one.name }), make("small", { textContent: one.messages.toLocaleString("en") }),
      make("small", {}, make("time", { textContent: day(one.last) })))), ));
  for (const other of $("conversations").querySelectorAll("[aria-current=false]")) other.removeAttribute("aria-current");
  showFacts(facts);
  return known && list.length > 0;
}

async function choose(name) {
  at.conversation = name;
  if (matchMedia("(max-width: 760px)").matches) $("fold").open = false;
  show("messages");
  await refresh();
}

async function showConversation(known) {
  at.found = null;
  $("query").value = "";
  $("title").textContent = at.conversation;
  $("add").hidden = false;
  $("export").hidden = $("erase-some").hidden = !known;
  const { gist } = known ? await get(inSpace(`gist?${query({ conversation: at.conversation })}`)) : { gist: "" };
  $("gist").hidden = !gist;
  $("gist").replaceChildren(make("b", { textContent: "In one line" }), gist);
  const list = known ? await get(inSpace(`messages?${query({ conversation: at.conversation, newest: true, limit: PAGE })}`)) : [];
  $("messages").replaceChildren(...list.map((one) => card(one)));
  toldEarlier(list);
  $("empty").hidden = list.length > 0;
  $("empty").textContent = "Nothing is remembered here yet. Write the first thing below, or connect your assistant.";
}

function toldEarlier(list) {
  at.first = list[0]?.turn ?? 0;
  $("earlier").hidden = at.first <= 1 || list.length < PAGE;
}

async function earlier() {
  const list = await get(inSpace(`messages?${query({ conversation: at.conversation, last: at.first - 1, newest: true, limit: PAGE })}`));
  $("messages").prepend(...list.map((one) => card(one)));
  toldEarlier(list);
}

// One message.

function card(message, score = null, words = []) {
  const text = make("div", { className: message.text.length > 2000 ? "text long" : "text", tabIndex: message.text.length > 2000 ? 0 : -1 });
  text.append(...marked(message.text, words));
  const when = make("time", { dateTime: new Date(message.at * 1000).toISOString(), textContent: day(message.at) });
  const acts = make("div", { className: "acts" },
    make("button", { type: "button", textContent: "Correct", onclick: tried(() => correct(one, message.id)) }),
    make("button", { type: "button", className: "erase", textContent: "Erase…", onclick: () => openErase(message) }),
    at.found ? make("button", { type: "button", textContent: "Open conversation", onclick: tried(() => choose(message.conversation)) }) : null);
  const one = make("li", { className: "message", id: at.found ? "" : `message-${message.id}` },
    make("div", { className: "top" },
      make("span", { className: message.role === "user" ? "role user" : "role", textContent: message.role }),
      message.person ? make("span", { className: "person", textContent: message.person }) : null,
      when, make("span", { textContent: `turn ${message.turn}` }),
      at.found ? make("span", { textContent: message.conversation }) : null,
      message.edited ? make("span", { textContent: "corrected", title: day(message.edited) }) : null,
      score === null ? null : make("span", { className: "score", textContent: score.toFixed(2), title: "how well it fits" }), acts),
    text);
  return one;
}

function marked(text, words) {
  if (!words.length) return [text];
  const parts = text.split(new RegExp(`(${words.map((word) => word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")).join("|")})`, "giu"));
  return parts.map((part, number) => (number % 2 ? make("mark", { textContent: part }) : part));
}

async function correct(one, id) {
  const message = await get(inSpace(`messages/${id}`)); // whole and fresh: a hit is a piece of it
  const area = make("textarea", { value: message.text, "aria-label": "The corrected text" });
  const shut = () => { box.replaceWith(text); acts.hidden = false; acts.firstChild.focus(); };
  const save = tried(async (event) => {
    event.preventDefault();
    const now = await (await ask("PUT", inSpace(`messages/${message.id}`), { text: area.value })).json();
    const renewed = card(now);
    one.replaceWith(renewed);
    renewed.querySelector("button").focus();
    say("Corrected. The old text is erased everywhere.");
  });
  const box = make("form", { onsubmit: save, onkeydown: (event) => { if (event.key === "Escape") shut(); } }, area,
    make("div", { className: "row" }, make("button", { type: "button", className: "quiet", textContent: "Cancel", onclick: shut }),
      make("button", { className: "primary", textContent: "Save" })));
  const [text, acts] = [one.querySelector(".text"), one.querySelector(".acts")];
  acts.hidden = true;
  text.replaceWith(box);
  area.focus();
}

async function search() {
  const words = $("query").value.trim();
  if (!words) return refresh();
  const body = { query: words, k: 30 };
  if ($("where").value === "conversation") body.conversation = at.conversation;
  const hits = await post(inSpace("search"), body);
  at.found = { body, hits };
  show("messages");
  $("title").textContent = hits.length ? `${many(hits.length, "memory", "memories")} for “${words}”` : `Nothing fits “${words}”`;
  $("add").hidden = $("gist").hidden = $("earlier").hidden = true;
  $("export").hidden = true;
  $("erase-some").hidden = !hits.length;
  const long = [...new Set(words.split(/[^\p{L}\p{N}]+/u).filter((word) => word.length > 2))];
  $("messages").replaceChildren(...hits.map((hit) => card({ ...hit.chunk, id: hit.chunk.message }, hit.score, long)));
  $("empty").hidden = hits.length > 0;
  $("empty").textContent = "Try other words, or search the whole space.";
}

function download(name, content) {
  const link = make("a", { href: URL.createObjectURL(new Blob([content])), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

// Facts and prompt.

function showFacts(facts) {
  $("fact-count").textContent = facts.length || "";
  $("facts").replaceChildren(...facts.map((fact) => make("li", {},
    make("p", {}, fact.text, make("small", { textContent: [fact.conversation, fact.sources.length ? `from ${many(fact.sources.length, "message")}` : "written by hand", day(fact.at)].filter(Boolean).join(" · ") })),
    fact.pinned ? make("span", { className: "pin", textContent: "pinned" }) : null,
    make("button", { type: "button", className: "erase", textContent: "Remove", onclick: tried(async () => { await ask("DELETE", inSpace(`facts/${fact.id}`)); await refresh(); say("Removed."); }) }))));
}

const PARTS = { system: "Rules", compact: "The gist", facts: "Facts", retrieved: "What was found", dialogue_tail: "The last turns", user: "The user's words" };
async function compose() {
  const user = $("compose-text").value.trim();
  if (!user) return $("compose-text").focus();
  const made = await post(inSpace("prompt"), { user, conversation: at.conversation, preview: true });
  $("prompt").replaceChildren(make("p", { className: "meter", textContent: `${many(made.tokens, "token")} · ${many(made.chunk_ids.length, "memory", "memories")} used` }),
    ...Object.entries(made.parts).map(([name, content]) => make("div", { className: "part" }, make("h2", { textContent: PARTS[name] ?? name }), make("p", { textContent: content }))));
}

function show(name) {
  for (const tab of document.querySelectorAll("[role=tab]")) {
    const chosen = tab.id === `tab-${name}`;
    tab.setAttribute("aria-selected", String(chosen));
    tab.tabIndex = chosen ? 0 : -1;
    $(tab.getAttribute("aria-controls")).hidden = !chosen;
  }
}

function onKeys(event) {
  const tabs = [...document.querySelectorAll("[role=tab]")];
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (step && event.target.role === "tab") {
    const next = tabs[(tabs.indexOf(event.target) + step + tabs.length) % tabs.length];
    next.focus();
    next.click();
  }
  if (event.key === "/" && !event.target.closest("input, textarea, select, dialog") && !$("room").hidden) {
    event.preventDefault();
    $("query").focus();
  }
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && event.target.tagName === "TEXTAREA") event.target.form.requestSubmit();
}

$("door").addEventListener("submit", tried(() => enter($("key").value.trim(), $("keep").checked)));
$("leave").addEventListener("click", () => leave());
$("space").addEventListener("change", tried(() => openSpace($("space").value)));
$("search").addEventListener("submit", tried(search));
$("query").addEventListener("search", tried(async () => { if (!$("query").value && at.found) await refresh(); }));
$("earlier").addEventListener("click", tried(earlier));
$("export").addEventListener("click", tried(async () => download(`${at.conversation}.jsonl`, await (await ask("GET", inSpace(`export?${query({ conversation: at.conversation })}`))).blob())));
$("add").addEventListener("submit", tried(async () => {
  if (!$("add-text").value.trim()) return $("add-text").focus();
  const made = await post(inSpace("messages"), { text: $("add-text").value, role: $("add-role").value, person: $("add-person").value.trim() || null, conversation: at.conversation });
  $("add-text").value = "";
  await refresh();
  $(`message-${made.id}`)?.scrollIntoView({ block: "nearest" });
  say("Remembered.");
}));
$("add-fact").addEventListener("submit", tried(async () => {
  if (!$("fact-text").value.trim()) return $("fact-text").focus();
  await post(inSpace("facts"), { text: $("fact-text").value.trim(), pinned: $("fact-pinned").checked });
  $("fact-text").value = "";
  await refresh();
}));
$("compose").addEventListener("submit", tried(compose));
for (const tab of document.querySelectorAll("[role=tab]")) tab.addEventListener("click", () => show(tab.id.slice(4)));
document.addEventListener("keydown", onKeys);
show("messages");
if (matchMedia("(max-width: 760px)").matches) $("fold").open = false;

// A key in the address (behind #, so no server ever sees it) is taken and wiped from there.
const linked = new URLSearchParams(location.hash.slice(1)).get("key");
if (linked) history.replaceState(null, "", location.pathname);
const kept = linked ?? sessionStorage.getItem("remanence-key") ?? localStorage.getItem("remanence-key") ?? "";
enter(kept, kept !== "" && kept === localStorage.getItem("remanence-key")).catch((error) => leave(kept && error.status === 401 ? "This key is not known (any more)." : error.status === 401 ? "" : error.message));
