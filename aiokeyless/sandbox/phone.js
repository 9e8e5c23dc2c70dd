"use strict";
// Follows the sandbox by server-sent events, each of which is a complete snapshot, and changes on the page only what
// differs, so that focus and scroll position are kept. Text from an operation is always set as text; the page's policy
// (Trusted Types) refuses the ways to set it as HTML.

const CONFIRMED_MS = 6000;  // how long an approved operation stays visible

const byId = (id) => document.getElementById(id);
const user = (new URLSearchParams(location.search).get("user") ?? "").trim().toUpperCase();
const phones = new Map();   // by user
let source = null;
let first = true;           // whether no snapshot was shown yet
let serial = 0;
let shownHistory = "";

const copyOf = (id) => byId(id).content.firstElementChild.cloneNode(true);
const setText = (node, text) => { if (node.textContent !== text) node.textContent = text; };
const timeText = (at) => new Date(1000 * at).toLocaleTimeString("en-GB");
const howText = (authType) => authType === "pin" ? "Approved with PIN" : "Approved with face";
const failureText = ({reason, errorCode}) => `${capital(reason ?? "failed")} (${errorCode})`;
const capital = (text) => text[0].toUpperCase() + text.slice(1);
const say = (text) => { byId("news").textContent = text; };

function element(tag, className, ...content) {
  const node = document.createElement(tag);
  node.className = className;
  node.append(...content);
  return node;
}

// The connection to the sandbox

function connect() {
  if (source) return;
  const mine = source = new EventSource(`/sandbox/page/events${user && `?user=${encodeURIComponent(user)}`}`);
  mine.onmessage = (event) => {
    setReach("live", "Live");
    show(JSON.parse(event.data));
  };
  mine.onerror = () => {
    setReach("gone", "Not reachable");
    if (mine.readyState !== EventSource.CLOSED) return;  // it reconnects by itself
    disconnect();
    setTimeout(() => { if (!document.hidden) connect(); }, 2000);
  };
}

function disconnect() {
  source?.close();
  source = null;
}

function setReach(reach, text) {
  if (reach === document.body.dataset.reach) return;
  document.body.dataset.reach = reach;
  setText(byId("reach"), text);
  byId("gone").hidden = reach === "live";
  byId("faults").disabled = reach !== "live";
  for (const problem of document.querySelectorAll(".problem")) problem.hidden = true;  // of another time
}

/** Posts to the sandbox, and shows in `problem` why it refused. */
async function post(path, body, problem) {
  problem.hidden = true;
  try {
    const answer = await fetch(`/sandbox/page/${path}`, {
      method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(body),
    });
    if (answer.ok) return;
    problem.textContent = (await answer.json()).error;
  } catch {
    problem.textContent = "The sandbox is not reachable.";
  }
  problem.hidden = false;
}

// The snapshot

function show(snapshot) {
  const named = new Set(snapshot.phones.map((each) => each.user));
  for (const name of [...phones.keys()]) if (!named.has(name)) removePhone(name);
  const attempts = Map.groupBy(snapshot.history, (each) => each.key);
  for (const each of snapshot.phones) showPhone(each, attempts);
  byId("help").hidden = phones.size > 0;
  const pending = snapshot.phones.reduce((sum, each) => sum + each.pending.length + each.more, 0);
  document.title = pending ? `(${pending}) Keyless sandbox` : "Keyless sandbox";
  document.querySelector(`[value="${snapshot.fault}"]`).checked = true;
  byId("fault").hidden = snapshot.fault === "recover";
  showHistory(snapshot.history);
  showRequests(snapshot.requests);
  first = false;
}

// Phones

function showPhone({user: name, externalUserId, removed, pending, more, lockedFor}, attempts) {
  const phone = phones.get(name) ?? addPhone(name);
  setText(phone.known, externalUserId ? `known as ${externalUserId}` : "");
  phone.removed.hidden = !removed;
  phone.locked.hidden = !lockedFor;
  const until = timeText(Date.now() / 1000 + lockedFor);
  setText(phone.locked.querySelector("span"), `Locked out until ${until}, after too many failed attempts.`);
  const keys = new Set(pending.map((each) => each.key));
  for (const card of [...phone.cards.values()]) {
    if (card.done || keys.has(card.key)) continue;
    const approval = attempts.get(card.key)?.find((each) => !each.errorCode);
    if (approval) confirm(phone, card, approval.authType);
    else removeCard(phone, card);  // it was removed from the sandbox, or there are too many newer ones
  }
  let older = null;
  for (const each of pending.toReversed()) {
    const card = phone.cards.get(each.key) ?? addCard(phone, each, older);
    older = card.root;
    const failure = attempts.get(card.key)?.[0];  // the latest one
    setText(card.failure, failure ? `${failureText(failure)}. The operation stays pending.` : "");
  }
  setText(phone.more, more ? `${more} older ${more === 1 ? "one is" : "ones are"} waiting too.` : "");
  phone.quiet.hidden = phone.cards.size > 0;
}

function addPhone(name) {
  const root = copyOf("phone-template");
  const find = (selector) => root.querySelector(selector);
  const phone = {
    name, root, cards: new Map(), title: find("h2"), known: find(".known"), locked: find(".locked"),
    removed: find(".removed"), list: find(".cards"), more: find(".more"), quiet: find(".quiet"),
  };
  const unlock = phone.locked.querySelector("button");
  unlock.setAttribute("aria-label", `Unlock the phone of ${name}`);
  const problem = find(".problem");  // the phone's own, since it has no card yet
  unlock.addEventListener("click", async () => {
    await post("unlock", {userId: name}, problem);
    phone.title.focus();  // the button is gone
  });
  phone.title.textContent = name;
  phone.title.title = name;
  phone.title.id = `phone-${++serial}`;
  root.setAttribute("aria-labelledby", phone.title.id);
  phone.list.setAttribute("aria-labelledby", phone.title.id);
  const alone = find("a");
  alone.href = `/?user=${encodeURIComponent(name)}`;
  alone.hidden = Boolean(user);
  alone.setAttribute("aria-label", `Open alone the phone of ${name}`);
  byId("phones").append(root);
  phones.set(name, phone);
  return phone;
}

function removePhone(name) {
  const {root} = phones.get(name);
  const focused = root.contains(document.activeElement);
  root.remove();
  phones.delete(name);
  if (focused) byId("title").focus();
}

// Operations

function addCard(phone, {key, operationId, operationPayload, externalUserId, at}, older) {
  const root = copyOf("card-template");
  const find = (selector) => root.querySelector(selector);
  const text = operationPayload || "No text";
  const card = {key, root, text, failure: find(".failure"), done: false};
  const payload = find(".payload");
  payload.textContent = text;
  payload.id = `payload-${++serial}`;
  payload.classList.toggle("none", !operationPayload);
  payload.classList.toggle("long", text.length > 200);
  find("time").textContent = timeText(at);
  find(".id").textContent = operationId;
  find(".external").textContent = externalUserId;
  find(".external").parentElement.hidden = !externalUserId;
  for (const button of root.querySelectorAll("button")) {
    button.setAttribute("aria-describedby", payload.id);  // tells the buttons of the same name apart
    const {how, code} = button.dataset;
    const [path, choice] = how ? ["approve", {authType: how}] : ["decline", {errorCode: Number(code)}];
    button.addEventListener("click", () => post(path, {operationId, ...choice}, find(".problem")));
  }
  phone.list.insertBefore(root, older);
  phone.cards.set(key, card);
  if (!first) say(`Approval requested of ${phone.name}: ${text}`);
  return card;
}

function confirm(phone, card, authType) {
  const focused = card.root.contains(document.activeElement);
  card.done = true;
  card.root.classList.add("done");
  card.root.prepend(element("p", "verdict", element("span", "", "✓"), howText(authType)));
  if (focused) card.root.focus({preventScroll: true});
  say(`${howText(authType)}: ${card.text}`);
  setTimeout(() => { if (phone.cards.get(card.key) === card) removeCard(phone, card); }, CONFIRMED_MS);
}

function removeCard(phone, {key, root}) {
  const focused = root.contains(document.activeElement);
  // To a card and never to its button: holding Enter must not approve one operation after the other.
  const next = root.nextElementSibling ?? root.previousElementSibling ?? phone.title;
  root.remove();
  phone.cards.delete(key);
  phone.quiet.hidden = phone.cards.size > 0;
  if (focused) next.focus({preventScroll: true});
}

// The history and the journal

function showHistory(entries) {
  byId("history").hidden = !entries.length;
  byId("no-history").hidden = entries.length > 0;
  const shown = JSON.stringify(entries);
  if (shown === shownHistory) return;  // so that a position in the list is kept
  shownHistory = shown;
  byId("history").replaceChildren(...entries.map((entry) => {
    const {user: name, authType, errorCode, text, at} = entry;
    const mark = errorCode ? element("span", "failed", "✕") : element("span", "approved", "✓");
    mark.ariaHidden = true;
    const what = element("span", "what", text || "No text");
    what.dir = "auto";
    return element("li", "", mark, element("strong", "", errorCode ? failureText(entry) : howText(authType)), what,
      element("small", "", `${name}, ${timeText(at)}`));
  }));
}

function showRequests(requests) {
  byId("rows").replaceChildren(...requests.map(({method, path, status, duration}) => {
    const answer = element("span", "status", status ?? (duration ? "no answer" : "…"));
    answer.dataset.class = String(status ?? "")[0];
    const row = document.createElement("tr");
    for (const content of [element("code", "", element("b", "", method), ` ${path}`), answer, duration ? durationText(duration) : "…"]) {
      row.insertCell().append(content);
    }
    return row;
  }));
  byId("requests").hidden = !requests.length;
  byId("no-requests").hidden = requests.length > 0;
}

const durationText = (duration) => duration < 10 ? `${(1000 * duration).toFixed(1)} ms` : `${duration.toFixed(1)} s`;

// The start

/** Posts the fields of a form that are not empty. */
function onSubmit(form, path) {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const fields = [...new FormData(form)].map(([name, value]) => [name, value.trim()]);
    post(path, Object.fromEntries(fields.filter(([, value]) => value)), form.querySelector(".problem"));
  });
}

function start() {
  setText(byId("reach"), "Connecting…");
  byId("environment").textContent = `export KEYLESS_BASE_URL=${location.origin}\nexport KEYLESS_API_KEY=sandbox-key`;
  byId("command").textContent = `aiokeyless create ${user || "C0FFEE"} --payload "Pay 40 EUR to Alice?"`;
  byId("all").hidden = !user;
  byId("journal").hidden = Boolean(user);
  for (const form of document.forms) form.elements.userId.value = user || "C0FFEE";
  onSubmit(byId("try"), "create");
  onSubmit(byId("enroll"), "enroll");
  byId("faults").addEventListener("change", ({target}) => post("fault", {fault: target.value}, byId("fault-problem")));
  // A browser opens at most six connections to a host, and each stream takes one: hidden pages release theirs.
  document.addEventListener("visibilitychange", () => { if (document.hidden) disconnect(); else connect(); });
  window.addEventListener("pageshow", connect);
  connect();
}

if (user && !/^[0-9A-F]+$/.test(user)) {
  setText(byId("reach"), "Not connected");
  byId("wrong").textContent = `“${user.slice(0, 100)}” is not a user id. A user id is a hex string, such as C0FFEE.`;
  byId("wrong").hidden = false;
  byId("all").hidden = false;
  for (const each of [byId("faults"), byId("column"), byId("side")]) each.hidden = true;
} else {
  start();
}
