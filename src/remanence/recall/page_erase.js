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

function tally(counts) {
  const shown = Object.entries(counts).filter(([, value]) => typeof value === "number" && Number.isInteger(value));
  return make("div", { className: "tally" }, ...shown.map(([name, value]) => make("span", {}, make("b", { textContent: value.toLocaleString("en") }), name.replaceAll("_", " "))));
}

let agreed = null;
async function look() {
  stale();
  const [path, which] = doomed();
  const seen = await post(`${path}/preview`, which);
  agreed = [path, { ...seen.selection, confirm: seen.confirm }];
  const { examples = [], counts = {}, ...rest } = seen.preview;
  const quotes = examples.slice(0, 5).map((one) => make("blockquote", { textContent: typeof one === "string" ? one : one.text }));
  $("erase-seen").replaceChildren(make("div", { className: "seen" }, make("b", { textContent: "This would go, and everything that was made of it:" }), tally({ ...rest, ...counts }), ...quotes));
  const any = (rest.messages ?? counts.messages ?? 1) > 0;
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
    const save = make("button", { type: "button", className: "primary", textContent: "Save the receipt", onclick: () => download("receipt.json", JSON.stringify(receipt, null, 1) + "\n") });
    const sealed = receipt.signature ? "It is signed." : "It is not signed: there is no local key.";
    $("erase-seen").replaceChildren(make("div", { className: "seen done" }, make("b", { textContent: "Erased." }), tally(receipt.counts ?? {}),
      make("p", { className: "soft", textContent: `The receipt holds counts and hashes, no words. ${sealed}` }), save));
    $("erase-go").hidden = true;
    $("erase-close").textContent = "Close";
    save.focus();
    const spaces = await get("/v1/spaces");
    if (!spaces.some((one) => one.name === at.space)) at.space = spaces[0]?.name ?? "default";
    showSpaces(spaces);
    $("space").value = at.space;
    await (at.found ? search() : refresh());
  } finally {
    $("erase-go").disabled = false;
  }
}

async function checkReceipt() {
  const file = $("receipt").files[0];
  if (!file) return;
  let receipt;
  try { receipt = JSON.parse(await file.text()); } catch { throw new Error("This file is no JSON."); }
  const found = await post("/v1/receipts/verify", { receipt });
  $("checks").replaceChildren(...found.map((one) => make("li", { className: one.holds ? "yes" : "no" }, make("b", { textContent: `${one.holds ? "✓" : "✗"} ${one.what}: ` }), one.words)));
}

$("erase-some").addEventListener("click", () => openErase());
$("erase-look").addEventListener("click", complained(look));
$("erase-go").addEventListener("click", complained(erase));
$("erase-form").addEventListener("submit", complained(async () => ($("erase-go").hidden ? look() : undefined)));
$("erase-close").addEventListener("click", () => $("erase").close());
$("receipt").addEventListener("change", tried(checkReceipt));
