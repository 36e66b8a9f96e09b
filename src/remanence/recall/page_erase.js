"use strict";
// Erasing: what, a preview, the deed, the receipt.

let doomed = null;
function openErase(message = null) {
  const choices = [];
  if (message) choices.push(["This message", { ids: [message.id] }, false]);
  if (message?.person) {
    choices.push([`Everything by ${message.person} in this space`, { person: message.person }, false]);
    choices.push([`Everything by ${message.person} in every space`, { person: message.person }, true]);
  }
  if (!message && at.found) choices.push([`The ${many(new Set(at.found.hits.map((hit) => hit.chunk.message)).size, "message")} found`,
    { ids: [...new Set(at.found.hits.map((hit) => hit.chunk.message))] }, false]);
  if (!at.found) choices.push([`The whole conversation “${at.conversation}”`, { conversation: at.conversation }, false]);
  if (!message) {
    choices.push(["Everything by one person", "person", false], ["Everything of a period", "period", false], [`The whole space “${at.space}”`, {}, false]);
  }
  const person = make("input", { placeholder: "Person", "aria-label": "Person" });
  const since = make("input", { type: "date", "aria-label": "From this day" });
  const until = make("input", { type: "date", "aria-label": "To this day, included" });
  const fields = { person: [person], period: [since, until] };
  const group = make("fieldset", { className: "choices" }, make("legend", { textContent: "What shall be forgotten?" }),
    ...choices.map(([words, which], number) => make("label", {}, make("input", { type: "radio", name: "what", value: number, checked: number === 0 }),
      make("span", { textContent: words }), ...(typeof which === "string" ? fields[which] : []))));
  group.addEventListener("input", () => { stale(); });
  for (const field of [person, since, until]) field.addEventListener("focus", () => { field.closest("label").firstChild.checked = true; stale(); });
  doomed = () => {
    const [, which, everywhere] = choices[group.querySelector(":checked").value];
    let rest = which;
    if (which === "person") rest = { person: person.value.trim() };
    if (which === "person" && !rest.person) throw new Error("Say whose messages.");
    if (which === "period") {
      rest = {};
      if (since.value) rest.since = new Date(`${since.value}T00:00:00`).getTime() / 1000;
      if (until.value) rest.until = new Date(`${until.value}T23:59:59.999`).getTime() / 1000;
      if (!since.value && !until.value) throw new Error("Say from or to which day.");
    }
    return [everywhere ? "/v1/forget" : inSpace("forget"), rest];
  };
  $("erase-what").replaceChildren(group);
  $("erase-close").textContent = "Cancel";
  stale();
  $("erase").showModal();
  group.querySelector(":checked").focus();
}

function stale() {
  $("erase-seen").replaceChildren();
  $("erase-said").textContent = "";
  $("erase-go").hidden = true;
  $("erase-look").hidden = false;
}

const complained = (work) => async (event) => {
  event.preventDefault();
  try { await work(); } catch (error) { $("erase-said").textContent = error.message; }
};

const KINDS = { messages: "messages", chunks: "chunks", facts: "facts", gists: "gists made anew", keys: "keys destroyed" };
function tally(counts) {
  return make("div", { className: "tally" }, ...Object.entries(KINDS).filter(([name]) => counts[name] || name === "messages")
    .map(([name, words]) => make("span", {}, make("b", { textContent: (counts[name] ?? 0).toLocaleString("en") }), counts[name] === 1 ? words.replace(/s\b/, "") : words)));
}

let agreed = null;
async function look() {
  stale();
  const [path, which] = doomed();
  const { selection, confirm, preview } = await post(`${path}/preview`, which);
  agreed = [path, { ...selection, confirm }];
  const quotes = preview.examples.map((one) => make("blockquote", { textContent: one.text }));
  const stay = [[preview.echoes, "repeats a piece of it", "repeat pieces of it"], [preview.mentions, "names this person", "name this person"]].filter(([ids]) => ids?.length)
    .map(([ids, one, more]) => make("p", { textContent: `${many(ids.length, "message")} that would stay ${ids.length === 1 ? one : more}.` }));
  $("erase-seen").replaceChildren(make("div", { className: "seen" }, make("b", { textContent: "This would go, and everything that was made of it:" }), tally(preview), ...quotes, ...stay));
  const any = preview.messages > 0 || !Object.keys(which).length;
  $("erase-go").hidden = !any;
  $("erase-look").hidden = any;
  if (any) $("erase-go").focus();
  else $("erase-said").textContent = "There is no such message.";
}

async function erase() {
  $("erase-go").disabled = true;
  try {
    const receipt = await post(...agreed);
    $("erase-what").replaceChildren();
    const keep = make("button", { type: "button", className: "primary", textContent: "Save the receipt", onclick: () => save(receipt) });
    const scan = receipt.scan;
    const words = scan ? (scan.found ? `A scan of ${many(scan.files, "file")} still found ${many(scan.found, "trace")}.` : `A scan of ${many(scan.files, "file")} found nothing of it.`) : "";
    $("erase-seen").replaceChildren(make("div", { className: "seen done" }, make("b", { textContent: `Erased. ${words}` }), tally(receipt.erased),
      make("p", { className: "soft", textContent: `The receipt holds counts and hashes, no words. ${receipt.signature ? "It is signed." : "It is not signed: there is no local key."}` }), keep));
    $("erase-go").hidden = true;
    $("erase-close").textContent = "Close";
    keep.focus();
    const spaces = await get("/v1/spaces");
    if (!spaces.some((one) => one.name === at.space)) at.space = spaces[0]?.name ?? "default";
    showSpaces(spaces);
    $("space").value = at.space;
    const known = await overview();
    await (at.found && known ? search() : showConversation(known));
  } finally {
    $("erase-go").disabled = false;
  }
}

// Receipts.

const save = (receipt) => download(`receipt-${receipt.id.slice(0, 8)}.json`, JSON.stringify(receipt, null, 1) + "\n");

async function showReceipts() {
  const list = await get("/v1/receipts").catch((error) => { if (error.status === 403) return []; throw error; }); // a key of some spaces sees none
  $("receipts-none").hidden = list.length > 0;
  $("receipts").replaceChildren(...list.reverse().slice(0, 200).map((one) => make("li", {},
    make("p", {}, one.kind === "edit" ? "Corrected: " : "Erased: ", many(one.erased.messages, "message"), make("small", {
      textContent: [day(one.at), one.scan ? (one.scan.found ? `${many(one.scan.found, "trace")} left` : "nothing left in any file") : "not scanned", one.signature ? "signed" : "not signed"].join(" · ") })),
    make("button", { type: "button", textContent: "Save", onclick: () => save(one) }),
    make("button", { type: "button", textContent: "Check", onclick: tried(() => check(one)) }))));
}

async function check(receipt) {
  const found = await post("/v1/receipts/verify", { receipt });
  $("checks").replaceChildren(...found.map((one) => make("li", { className: one.holds ? "yes" : "no" }, make("b", { textContent: `${one.holds ? "✓" : "✗"} ${one.what}: ` }), one.words)));
}

async function checkReceipt() {
  const file = $("receipt").files[0];
  if (!file) return;
  let receipt;
  try { receipt = JSON.parse(await file.text()); } catch { throw new Error("This file is no JSON."); }
  await check(receipt);
}

$("erase-some").addEventListener("click", () => openErase());
$("erase-look").addEventListener("click", complained(look));
$("erase-go").addEventListener("click", complained(erase));
$("erase-form").addEventListener("submit", complained(async () => ($("erase-go").hidden ? look() : undefined)));
$("erase-close").addEventListener("click", () => $("erase").close());
$("receipt").addEventListener("change", tried(checkReceipt));
$("tab-receipts").addEventListener("click", tried(showReceipts));
